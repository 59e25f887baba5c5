"""What programs and their keeper say to each other: JSON objects, one a line, over a Unix socket.

A request has an ``id``, a ``verb`` and fields; the answer has the same ``id``, and fields or an ``error`` of
a ``kind`` and a ``text``. What has no ``id`` is an ``event``: the keeper tells it, and wants no answer.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from code_sandboxes.transports.loop import Loop

__all__ = ["LONGEST", "PROTOCOL", "Lines", "as_line", "start_time"]

PROTOCOL = 2
"""Changes whenever a program and a keeper that do not agree on it would misunderstand each other."""

LONGEST = 16 * 1024**2
"""Bytes of one line; who says more is hung up on."""

_MOST_WAITING = 64 * 1024**2


class Lines:
    """One end of a connection; everything in the I/O thread.

    Args:
        receive: called with each object that comes.
        ended: called once when the other side has hung up, talks nonsense, or does not listen.
    """

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        receive: Callable[[dict[str, Any]], None],
        ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._receive = receive
        self._ended = ended
        self._received = bytearray()
        self._unsent = bytearray()
        self._closed = False
        connection.setblocking(False)
        loop.add_reader(connection.fileno(), self._read)

    def send(self, message: Mapping[str, object]) -> None:
        """Never waits: what the other side does not take yet is kept, up to a limit."""
        if self._closed:
            return
        waiting = bool(self._unsent)
        self._unsent += as_line(message)
        if len(self._unsent) > _MOST_WAITING:
            self._hang_up()
        elif not waiting:
            self._write()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.forget(self._read)
            self._loop.remove_reader(self._connection.fileno())
            self._connection.close()

    def _hang_up(self) -> None:
        if not self._closed:
            self.close()
            self._ended()

    def _write(self) -> None:
        if self._closed:
            return
        try:
            sent = self._connection.send(self._unsent)
            del self._unsent[:sent]
        except BlockingIOError:
            sent = 0
        except OSError:
            self._hang_up()
            return
        if self._unsent:
            self._loop.call_when_writable(self._connection.fileno(), self._write)

    def _read(self) -> None:
        if self._closed:
            return
        try:
            received = self._connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received or len(self._received) > LONGEST:
            self._hang_up()
            return
        self._received += received
        *lines, rest = self._received.split(b"\n") if b"\n" in received else [self._received]
        self._received = rest
        for line in lines:
            message = _parsed(bytes(line))
            if message is None:
                self._hang_up()
            if message is None or self._closed:
                return
            self._receive(message)


def as_line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def start_time(pid: int) -> str:
    """When the process *pid* began: no two that had the same number have this in common (proc(5), ``stat``).

    Empty where nobody tells (no such process, or no /proc).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}-{fields[19].decode()}"
    except (OSError, IndexError):
        return ""
