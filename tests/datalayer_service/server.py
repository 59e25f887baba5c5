"""Requests from sockets, and answers to them."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.datalayer_service.answers import Answer, Request
from tests.datalayer_service.api import Api
from tests.datalayer_service.ingress import PREFIX, Ingress
from tests.datalayer_service.knobs import Knobs
from tests.datalayer_service.records import Records

__all__ = ["Server"]


class Server(ThreadingHTTPServer):
    """One origin for everything. What it serves, it is given before it starts."""

    request_queue_size = 128

    api: Api
    ingress: Ingress
    knobs: Knobs
    records: Records

    def __init__(self, port: int) -> None:
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.02,), name="datalayer", daemon=True
        )
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Hang up on everybody; no thread is left."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections.values():
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections:
            thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="datalayer", daemon=True
        )
        with self._lock:
            self._connections[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._connections[threading.current_thread()]

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients hang up when they like; that is theirs to do, and what some tests are about.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "nginx"
    sys_version = ""
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        request = self._read()
        if request is None:
            return
        if not request.path.startswith(PREFIX):
            self._send(request, self._server.api.answer(request))
        elif not request.is_websocket:
            self._send(request, self._server.ingress.answer(request))
        else:
            self._upgrade(request)

    do_DELETE = do_GET = do_HEAD = do_OPTIONS = do_PATCH = do_POST = do_PUT = _serve

    def _upgrade(self, request: Request) -> None:
        self.close_connection = True
        server = self._server

        def tell(status: int) -> None:
            server.records.add(request, status, server.origin)

        answer = server.ingress.upgrade(request, self.rfile, self.connection, tell)
        if answer is not None:
            self._send(request, answer)

    def log_message(self, format: str, *args: Any) -> None:
        """The service keeps a log of its own."""

    @property
    def _server(self) -> Server:
        return cast(Server, self.server)

    def _read(self) -> Request | None:
        url = urlsplit(self.path)
        headers = tuple(self.headers.items())
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        request = Request(self.command, unquote(url.path), query, self.path, headers)
        if self.headers.get("Transfer-Encoding"):  # which nobody needs who knows what to send
            self.close_connection = True
            self._send(request, Answer(411))
            return None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return Request(self.command, request.path, query, self.path, headers, body)

    def _send(self, request: Request, answer: Answer) -> None:
        status = None if answer.is_silence else answer.status
        self._server.records.add(request, status, self._server.origin)
        if answer.is_silence:
            self._keep_silence()
            return
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if answer.body and answer.content_type:
            self.send_header("Content-Type", answer.content_type)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _keep_silence(self) -> None:
        """Until who waits has had enough, or the knob has."""
        self.close_connection = True
        self.connection.settimeout(self._server.knobs.silence_seconds)
        with contextlib.suppress(TimeoutError):
            self.connection.recv(1)
