"""A forwarder in front of a server that knows where each frame of a websocket ends.

What it does to them is :class:`tests.datalayer_service.websockets.Faults`; all else it carries as it is.
(``tests/cutting_proxy.py`` does what can be done to any connection.)
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from io import BufferedIOBase
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tests.datalayer_service.websockets import Faults, Tunnel

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WebSocketProxy"]

_ALL = "all"


class WebSocketProxy:
    """Forwards from :attr:`url` to the server at *url*; ``with WebSocketProxy(server.url) as proxy:``."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._faults = Faults()
        self._server = _Server((parts.hostname, parts.port), self._faults)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), name="websocket-proxy", daemon=True
        )
        self.url = parts._replace(netloc=f"127.0.0.1:{self._server.server_address[1]}").geturl()

    # What it is told; see there.

    def wait_until_open(self) -> None:
        """There is one websocket."""
        self._faults.wait_until_open(_ALL)

    def close_websockets(self, code: int) -> None:
        self._faults.close(_ALL, code)

    def close_before(self, holding: bytes, code: int) -> None:
        self._faults.close_before(_ALL, holding, code)

    def duplicate(self) -> None:
        self._faults.duplicate(_ALL)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._faults.close_all()
        self._server.hang_up()
        self._server.server_close()  # when every thread has ended


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, upstream: tuple[str, int], faults: Faults) -> None:
        self.upstream = upstream
        self.faults = faults
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Connection)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            _shut(connection)


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: _Server

    def handle(self) -> None:
        client: socket.socket = self.connection
        self.server.connections.add(client)
        try:
            with contextlib.suppress(OSError):  # the server, or the client, has gone
                self._carry(client)
        finally:
            self.server.connections.discard(client)

    def _carry(self, client: socket.socket) -> None:
        asked = _head(self.rfile)
        with socket.create_connection(self.server.upstream) as server, server.makefile("rb") as answers:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.sendall(asked)
            if b"upgrade: websocket" in asked.lower():
                opened = _head(answers)
                if opened.startswith(b"HTTP/1.1 101"):
                    Tunnel(_ALL, client, server, self.server.faults).carry(opened, self.rfile, answers)
                    return
                client.sendall(opened)
            up = threading.Thread(target=_pipe, args=(self.rfile, server), name="websocket-proxy-up")
            up.start()
            try:
                _pipe(answers, client)
            finally:
                _shut(client)
                up.join()


def _head(stream: BufferedIOBase) -> bytes:
    """What comes before the body of a request or an answer."""
    lines = [stream.readline()]
    while lines[-1].strip():
        lines.append(stream.readline())
    return b"".join(lines)


def _pipe(source: BufferedIOBase, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):  # one of them has gone
        while data := source.read1(65536):
            sink.sendall(data)
    _shut(sink, socket.SHUT_WR)


def _shut(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        connection.shutdown(how)
