"""The frames of a websocket, as they pass (RFC 6455, section 5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BufferedIOBase

__all__ = ["Frame", "close_frame", "read_frame"]

_PING, _PONG = 0x9, 0xA


@dataclass(frozen=True)
class Frame:
    raw: bytes  # as it came, with its head
    opcode: int
    is_last: bool  # of its message

    @property
    def is_message(self) -> bool:
        """It is a whole message: text or binary, in one frame."""
        return self.is_last and self.opcode in (0x1, 0x2)

    @property
    def is_heartbeat(self) -> bool:
        return self.opcode in (_PING, _PONG)


def read_frame(stream: BufferedIOBase) -> Frame | None:
    """The next one; none at the end of the *stream*, wherever that is."""
    head = stream.read(2)
    if len(head) < 2:
        return None
    length = head[1] & 0x7F
    size = {126: 2, 127: 8}.get(length, 0)
    extended = stream.read(size)
    if len(extended) < size:
        return None
    if size:
        (length,) = struct.unpack({2: ">H", 8: ">Q"}[size], extended)
    length += 4 if head[1] & 0x80 else 0  # the mask of what a client sends
    payload = stream.read(length)
    if len(payload) < length:
        return None
    return Frame(head + extended + payload, head[0] & 0x0F, bool(head[0] & 0x80))


def close_frame(code: int) -> bytes:
    """A server's: it is not masked."""
    return struct.pack(">BBH", 0x88, 2, code)
