"""Bytes in memory in the place of a channel, for what the guest writes and reads of a snapshot."""

from __future__ import annotations

import ctypes
import time
from typing import Any

__all__ = ["Memory", "Stopped"]


class Stopped(BaseException):
    """Raised in a thread of which somebody has had enough."""


class Memory:
    """Bytes in memory in the place of a channel."""

    is_closed = False

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.restarts = 0
        self.ahead = 0.0
        self._at = 0

    def clock(self) -> float:
        return time.monotonic() + self.ahead

    def stop(self, thread: int) -> None:
        raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
        raise_in(ctypes.c_ulong(thread), ctypes.py_object(Stopped))

    def write(self, data: Any) -> None:
        self.data += data

    def restart(self) -> None:
        self.data.clear()
        self.restarts += 1

    def read(self, size: int) -> bytes:
        data = bytes(self.data[self._at : self._at + size])
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
