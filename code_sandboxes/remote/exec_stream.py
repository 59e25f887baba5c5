"""A program that a container engine runs for us in a container, as if it were a socket.

Source: the Docker Engine API, "Create an exec instance", "Start an exec instance", and, of "Attach to a
container", "Stream format". What is written is the program's standard input, as it is; what is read comes in
frames, which say whether they are of its standard output or of its standard error.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any, cast

from code_sandboxes.guest.relay import READY
from code_sandboxes.isolation.distant import STEWARD, source_of
from code_sandboxes.isolation.engine_address import EngineAddress
from code_sandboxes.transports.errors import PlaceGoneError

__all__ = ["ExecStream", "dial_socket"]

# Seconds that it may take until the program runs, and then until it is ready.
_ANSWER, _READY = 30.0, 60.0

# Of the engine's answer, and of what the program says on its standard error.
_LONGEST_HEAD, _KEPT = 65536, 4096

# Of a frame: which stream it is of, three bytes of nothing, its size.
_HEADER = 8
_ERROR = 2


class ExecStream:
    """What there is of :class:`socket.socket` in transports and HTTP clients; nothing is kept unread.

    So whoever waits until :meth:`fileno` can be read, is never kept waiting with something here.

    Attributes:
        said: what the program has written last to its standard error.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.said = b""
        self._connection = connection
        self._header = b""
        self._left = 0
        self._is_error = False
        self._readers = 0
        self._is_closed = False
        self._closing = threading.Lock()

    def fileno(self) -> int:
        return self._connection.fileno()

    def pending(self) -> int:
        """Bytes that have come and of which the system does not know any more (TLS)."""
        pending = getattr(self._connection, "pending", None)
        return 0 if pending is None else int(pending())

    def setblocking(self, flag: bool) -> None:
        self._connection.setblocking(flag)

    def settimeout(self, seconds: float | None) -> None:
        self._connection.settimeout(seconds)

    def gettimeout(self) -> float | None:
        return self._connection.gettimeout()

    def setsockopt(self, *args: Any) -> None:
        """What is between, is not one connection; it has what it needs."""

    def send(self, data: Any) -> int:
        return self._connection.send(data)

    def sendall(self, data: Any) -> None:
        self._connection.sendall(data)

    def recv(self, size: int) -> bytes:
        """What the program has printed next; nothing when it has ended.

        Raises:
            OSError: as of a socket.
        """
        while True:
            raw = self._connection.recv(size)
            text = self._without_headers(raw)
            if text or not raw:
                return text

    def recv_into(self, buffer: Any) -> int:
        data = self.recv(memoryview(buffer).nbytes)
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)

    def makefile(self, mode: str = "rb", buffering: int | None = None) -> io.BufferedReader:
        """Only for reading; this stays open until that is closed, too."""
        self._readers += 1
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        self._is_closed = True
        self.close_if_unread()

    def shutdown(self, how: int) -> None:
        self._connection.shutdown(how)

    def reader_closed(self) -> None:
        self._readers -= 1
        self.close_if_unread()

    def close_if_unread(self) -> None:
        with self._closing:
            if self._is_closed and self._readers <= 0:
                self._connection.close()

    def _without_headers(self, raw: bytes) -> bytes:
        parts = []
        while raw:
            if self._left == 0:
                missing = _HEADER - len(self._header)
                self._header, raw = self._header + raw[:missing], raw[missing:]
                if len(self._header) == _HEADER:
                    self._is_error = self._header[0] == _ERROR
                    self._left = int.from_bytes(self._header[4:], "big")
                    self._header = b""
                continue
            part, raw = raw[: self._left], raw[self._left :]
            self._left -= len(part)
            if self._is_error:
                self.said = (self.said + part)[-_KEPT:]
            else:
                parts.append(part)
        return b"".join(parts)


class _Reader(io.RawIOBase):
    def __init__(self, stream: ExecStream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._stream.recv_into(buffer)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.reader_closed()


def dial_socket(address: EngineAddress, container: str, path: str, *, by: str = "0:0") -> socket.socket:
    """A connection to a Unix socket in a container; with no *path* to its steward. Blocks.

    Args:
        by: the user who connects there; root has no privileges there, but cannot be held up by another.

    Raises:
        PlaceGoneError: there is no such container any more.
        OSError: there is no engine, or nobody who listens in the container.
    """
    command = ["python3", "-I", "-S", "-c", source_of("relay"), STEWARD, path]
    stream = ExecStream(_started(address, container, command, by))
    try:
        stream.settimeout(_READY)
        if stream.recv(len(READY)) != READY:
            said = stream.said.decode("utf-8", "replace").strip()
            raise ConnectionRefusedError(f"the container {container} lets nobody in: {said or 'it ended'}")
    except BaseException:
        stream.close()
        raise
    return cast("socket.socket", stream)  # it has what is used of one


def _started(address: EngineAddress, container: str, command: Sequence[str], user: str) -> socket.socket:
    connection = address.dial()
    try:
        connection.settimeout(_ANSWER)
        prefix = f"/v{address.version}"
        how = {
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "Cmd": list(command),
            "User": user,
            "WorkingDir": "/",
        }
        made = _asked(connection, f"{prefix}/containers/{container}/exec", how)
        head = {"Connection": "Upgrade", "Upgrade": "tcp"}
        _ask(connection, f"{prefix}/exec/{made.get('Id')}/start", {"Detach": False, "Tty": False}, head)
        _check_began(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _asked(connection: socket.socket, path: str, body: Mapping[str, object]) -> Mapping[str, Any]:
    client = HTTPConnection("docker")
    client.sock = connection
    # So that it is not closed with this one.
    client.auto_open = 0
    try:
        client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = client.getresponse()
        value = json.loads(answer.read() or b"{}")
    except (HTTPException, ValueError) as error:
        raise ConnectionError(f"the container engine answered what makes no sense: {error!r}") from None
    if answer.status not in (200, 201) or not isinstance(value, dict):
        why = value.get("message") if isinstance(value, dict) else None
        sentence = f"the container engine answered {answer.status}: {why}"
        is_gone = answer.status == 404 or "not running" in str(why)
        raise PlaceGoneError(sentence) if is_gone else ConnectionRefusedError(sentence)
    return value


def _ask(connection: socket.socket, path: str, body: Mapping[str, object], head: Mapping[str, str]) -> None:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: docker", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", *(f"{name}: {value}" for name, value in head.items())]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + content)


def _check_began(connection: socket.socket) -> None:
    """
    Raises:
        OSError: the program does not run.
    """
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        # One by one: what comes behind it is the stream's.
        byte = connection.recv(1)
        head += byte
        if not byte or len(head) > _LONGEST_HEAD:
            raise ConnectionResetError("the container engine has hung up")
    status = head.split(b" ", 2)[1:2]
    if status not in ([b"101"], [b"200"]):
        with contextlib.suppress(OSError):
            connection.settimeout(1.0)
            head += connection.recv(_LONGEST_HEAD)
        why = head.partition(b"\r\n\r\n")[2].decode("utf-8", "replace").strip()
        raise ConnectionRefusedError(f"the container engine runs nothing in it: {why}")
