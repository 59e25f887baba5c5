"""The egress proxy in a process of its own, and a server in another, both on loopback."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from benchmarks.drivers.service import serve, timed

__all__ = ["Way"]

_CHUNK = 1024**2


class Way:
    """Downloads from a server: through the proxy, or directly."""

    def __init__(self) -> None:
        self._buffer = bytearray(_CHUNK)
        self._server, self._server_pid = _fork(_serve_downloads)
        self._proxy, self._proxy_pid = _fork(lambda listener: _serve_proxy(listener, self._server))

    def get(self, how: str, repetitions: int) -> list[float]:
        """Seconds of small requests."""
        return timed(lambda: self._download(how, 0), repetitions)

    def download(self, how: str, size: int) -> list[float]:
        """Seconds for each MB of *size* bytes."""
        began = time.perf_counter()
        self._download(how, size)
        return [(time.perf_counter() - began) / (size / 1e6)]

    def end(self) -> None:
        for pid in (self._proxy_pid, self._server_pid):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _download(self, how: str, size: int) -> None:
        host = f"host.sandbox.internal:{self._server}"
        with socket.create_connection(
            ("127.0.0.1", self._server if how == "directly" else self._proxy)
        ) as way:
            way.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if how == "connect":
                way.sendall(f"CONNECT {host} HTTP/1.1\r\n\r\n".encode())
                way.recv(_CHUNK)
            target = f"http://{host}/{size}" if how == "http" else f"/{size}"
            way.sendall(f"GET {target} HTTP/1.1\r\n\r\n".encode())
            received = 0
            while count := way.recv_into(self._buffer):
                received += count
        if received <= size:
            raise RuntimeError("not all of it has come")


def _fork(serve: object) -> tuple[int, int]:
    """The port and the pid of a child that serves."""
    assert callable(serve)
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    pid = os.fork()
    if pid == 0:
        serve(listener)
        os._exit(0)
    port = int(listener.getsockname()[1])
    listener.close()
    return port, pid


def _serve_proxy(listener: socket.socket, server: int) -> None:
    from code_sandboxes.isolation.egress import the_egress
    from code_sandboxes.isolation.hosts import HOST_NAME, AllowedHosts
    from code_sandboxes.isolation.network_log import NetworkLog

    the_egress().serve(listener, AllowedHosts([f"{HOST_NAME}:{server}"]), NetworkLog()).wait_closed()


def _serve_downloads(listener: socket.socket) -> None:
    while True:
        threading.Thread(target=_answer, args=(listener.accept()[0],), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += connection.recv(_CHUNK)
        left = int(request.split(b" ")[1][1:])
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        block = bytes(_CHUNK)
        while left:
            connection.sendall(block[:left])
            left -= len(block[:left])


if __name__ == "__main__":
    way = Way()
    serve({"get": way.get, "download": way.download}, way.end)
