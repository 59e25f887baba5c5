"""The protocol below the sockets of ZeroMQ: what a client says to begin with, and bytes to messages.

No socket. libzmq is not used towards a kernel, since nobody can tell it how much to hold for one: its
ZMQ_MAXMSGSIZE is for one frame of a message that may have endless many, its ZMQ_RCVHWM for the number of
messages of whatever size (zmq_setsockopt(3)); a kernel could fill the memory of this program with either.
Here a message, with all its frames, has a limit. One that is larger is skipped as it comes, and the
connection goes on.

Source: ZeroMQ RFC 23/ZMTP 3.0, sections "Formal Grammar", "The Greeting" and "The NULL Security Mechanism".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

__all__ = ["MessageReader", "ZmtpError", "framed", "hello"]

Buffer = bytes | memoryview

_MORE, _LONG, _COMMAND = 1, 2, 4
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_MECHANISM = b"NULL".ljust(20, b"\0")
_GREETING = _SIGNATURE + b"\3\0" + _MECHANISM + b"\0" + bytes(31)

# What a frame takes here besides its bytes, about; it counts, as frames may be empty.
_FRAME = 64

_LONGEST_COMMAND = 4096

# A piece that is smaller is copied to its neighbours, so that there is less to be sent one by one.
_SMALL = 32 * 1024


class ZmtpError(ValueError):
    """What a peer has sent is not ZMTP 3, or not for a client like this one."""


def hello(socket_type: str, identity: bytes) -> bytes:
    """What a client sends first: its greeting, and the READY command of the NULL mechanism.

    Args:
        socket_type: ``"DEALER"`` or ``"SUB"``.
        identity: what a ROUTER calls it; up to 255 bytes, empty for none.
    """
    body = b"\5READY" + _property(b"Socket-Type", socket_type.encode())
    if identity:
        body += _property(b"Identity", identity)
    return _GREETING + _header(len(body), _COMMAND) + body


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def _header(size: int, flags: int) -> bytes:
    return bytes([flags, size]) if size < 256 else struct.pack(">BQ", flags | _LONG, size)


def framed(frames: Sequence[Buffer]) -> list[memoryview]:
    """One message as it is sent: pieces to be written one after the other."""
    pieces: list[memoryview] = []
    small = bytearray()
    last = len(frames) - 1
    for number, frame in enumerate(frames):
        data = memoryview(frame).cast("B")
        small += _header(len(data), _MORE if number < last else 0)
        if len(data) < _SMALL:
            small += data
        else:
            pieces += [memoryview(bytes(small)), data]
            small.clear()
    return [*pieces, memoryview(bytes(small))] if small else pieces


class MessageReader:
    """Turns the bytes of one connection into messages.

    Args:
        limit: bytes that a message may be; what is larger is dropped.

    Attributes:
        is_ready: the peer has said that it is; nothing but :func:`hello` may be sent to it before.
        skipped: how many messages were larger than the limit.
    """

    def __init__(self, limit: int) -> None:
        self.is_ready = False
        self.skipped = 0
        self._limit = limit
        self._data = bytearray()
        self._is_greeted = False
        self._frames: list[bytes] = []
        self._size = 0
        self._is_skipping = False
        self._to_skip = 0

    def feed(self, data: bytes) -> list[list[bytes]]:
        """The messages that *data* completes, each as its frames.

        Raises:
            ZmtpError: the peer does not keep to the protocol; there is no use in reading on.
        """
        self._data += data
        messages: list[list[bytes]] = []
        at = self._greeted() if not self._is_greeted else 0
        while self._is_greeted:
            after = self._skip(at) if self._to_skip else self._frame(at, messages)
            if after == at:
                break
            at = after
        del self._data[:at]
        return messages

    def _greeted(self) -> int:
        """Take the greeting, if it has come."""
        data = self._data
        start = bytes(data[:1]) + bytes(data[9:10])  # the padding of the signature may be anything
        if not b"\xff\x7f".startswith(start):
            raise ZmtpError("the peer does not speak ZMTP")
        if len(data) < len(_GREETING):
            return 0
        if data[10] < 3 or data[12:32] != _MECHANISM:
            raise ZmtpError("the peer speaks an older ZMTP, or wants to be shown credentials")
        self._is_greeted = True
        return len(_GREETING)

    def _frame(self, at: int, messages: list[list[bytes]]) -> int:
        """Take one frame that begins at *at*; returns where the next one begins."""
        data = self._data
        if len(data) < at + 2:
            return at
        flags, size, start = data[at], data[at + 1], at + 2
        if flags > (_MORE | _LONG | _COMMAND) or (flags & _COMMAND and flags & _MORE):
            raise ZmtpError(f"a frame has the flags {flags:#x}")
        if flags & _LONG:
            start = at + 9
            if len(data) < start:
                return at
            size = int.from_bytes(data[at + 1 : start], "big")
        if flags & _COMMAND or not self.is_ready:
            return self._command(at, flags, start, size)
        if self._is_skipping or self._size + size + _FRAME > self._limit:
            return self._begin_to_skip(flags, start, size)
        end = start + size
        if len(data) < end:
            return at
        self._frames.append(bytes(memoryview(data)[start:end]))
        self._size += size + _FRAME
        if not flags & _MORE:
            messages.append(self._frames)
            self._frames, self._size = [], 0
        return end

    def _command(self, at: int, flags: int, start: int, size: int) -> int:
        if not flags & _COMMAND or size > _LONGEST_COMMAND:
            raise ZmtpError("a message before READY, or a command that is too long")
        end = start + size
        if len(self._data) < end:
            return at
        if not self.is_ready:
            if not self._data.startswith(b"\5READY", start, end):
                raise ZmtpError("the peer is not ready")
            self.is_ready = True
        return end  # others mean nothing to a client that asks for no heartbeats

    def _begin_to_skip(self, flags: int, start: int, size: int) -> int:
        if not self._is_skipping:
            self._is_skipping = True
            self.skipped += 1
            self._frames, self._size = [], 0
        self._to_skip = size
        self._is_skipping = bool(flags & _MORE)
        return start

    def _skip(self, at: int) -> int:
        gone = min(self._to_skip, len(self._data) - at)
        self._to_skip -= gone
        return at + gone
