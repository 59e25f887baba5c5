"""A container engine at a distance: what is said to it goes through TCP, and can be cut."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

__all__ = ["Distance"]

_PIECE = 1 << 20


class Distance:
    """Passes TCP connections on to a Unix socket of this machine, ends of either side included.

    Args:
        tls: with which they are expected.

    Attributes:
        url: where the engine seems to be.
    """

    def __init__(self, path: str, tls: ssl.SSLContext | None = None) -> None:
        self._path = path
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: set[socket.socket] = set()
        self.url = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """End all connections, as a network does that fails."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # close() was called
                return
            if self._tls is not None:
                near = self._tls.wrap_socket(near, server_side=True)
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._path)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ways = ((near, far), (far, near))
            self._connections |= {near, far}
            threads = [threading.Thread(target=self._pass_on, args=way, daemon=True) for way in ways]
            threading.Thread(target=self._follow, args=(threads, near, far), daemon=True).start()

    def _follow(self, threads: list[threading.Thread], near: socket.socket, far: socket.socket) -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._connections -= {near, far}
        near.close()
        far.close()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
