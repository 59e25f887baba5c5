"""A forwarder in front of a server that knows where each frame of a websocket ends.

What it does to them is :class:`tests.datalayer_service.websockets.Faults`; all else it carries as it is.
(``tests/cutting_proxy.py`` does what can be done to any connection.)
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable
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

    @property
    def asked(self) -> bytes:
        """All requests that came, but not what goes through websockets."""
        return b"".join(self._server.asked)

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

    def refuse(self, status: int | None) -> None:
        """From now on refuse to open any, with that status of HTTP; ``None``: no more."""
        self._server.refusal = status

    def lose_answer(self, holding: bytes) -> None:
        """Lose the answer to the next request with *holding* in it, and end its connection."""
        self._server.loses = holding

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
        self.asked: list[bytes] = []
        self.refusal: int | None = None
        self.loses: bytes | None = None
        super().__init__(("127.0.0.1", 0), _Connection)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            _shut(connection)


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: _Server
    _is_losing = False

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
        self._heard(asked)
        with socket.create_connection(self.server.upstream) as server, server.makefile("rb") as answers:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if b"upgrade: websocket" not in asked.lower():
                server.sendall(asked)
                self._carry_requests(client, server, answers)
            elif (status := self.server.refusal) is not None:
                client.sendall(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
            else:
                server.sendall(asked)
                opened = _head(answers)
                if opened.startswith(b"HTTP/1.1 101"):
                    Tunnel(_ALL, client, server, self.server.faults).carry(opened, self.rfile, answers)
                else:
                    client.sendall(opened)
                    _pipe(answers, client)

    def _carry_requests(self, client: socket.socket, server: socket.socket, answers: BufferedIOBase) -> None:
        up = threading.Thread(target=_pipe, args=(self.rfile, server, self._heard), name="websocket-proxy-up")
        up.start()
        try:
            _pipe(answers, client, self._answers)
        finally:
            _shut(client)
            up.join()

    def _heard(self, data: bytes) -> None:
        self.server.asked.append(data)
        self._is_losing |= self.server.loses is not None and self.server.loses in data

    def _answers(self, _: bytes) -> None:
        if self._is_losing:
            self.server.loses = None
            raise ConnectionError("the answer is lost, and so is the connection")


def _head(stream: BufferedIOBase) -> bytes:
    """What comes before the body of a request or an answer."""
    lines = [stream.readline()]
    while lines[-1].strip():
        lines.append(stream.readline())
    return b"".join(lines)


def _pipe(
    source: BufferedIOBase, sink: socket.socket, tell: Callable[[bytes], object] = lambda _: None
) -> None:
    with contextlib.suppress(OSError):  # one of them has gone
        while data := source.read1(65536):
            tell(data)
            sink.sendall(data)
    _shut(sink, socket.SHUT_WR)


def _shut(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        connection.shutdown(how)
