"""Messages to the frames of a kernel's websocket and back, in both ways that servers know.

Source: Jupyter Server documentation, "WebSocket kernel wire protocols" (the default, older one, and
``v1.kernel.websocket.jupyter.org``). Which of them holds is what the server has selected at the opening,
whatever was offered. Nothing is signed here: the server does that, towards the kernel. What it passes on
is the kernel's word all the same, and every part is checked before it is believed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.protocol.wire import MalformedMessageError, dump, load, message_of

__all__ = ["SUBPROTOCOL", "decode", "encode"]

SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"

_CHANNELS = ("shell", "iopub", "stdin", "control")
_PARTS = ("header", "parent_header", "metadata", "content")

# A channel and four dictionaries come before the buffers.
_FIXED = 5

_MOST_PARTS = 65536


def encode(message: Message, *, is_v1: bool) -> bytes | str:
    """The frame for *message*: bytes for a binary one, text for a text one."""
    return _encode_v1(message) if is_v1 else _encode_legacy(message)


def decode(data: bytes | str, *, is_v1: bool) -> Message:
    """The message that the frame *data* is.

    Raises:
        MalformedMessageError: it is none; nothing else is raised for any input.
    """
    if not is_v1:
        return _decode_legacy(data)
    if isinstance(data, str):
        raise MalformedMessageError("a text frame, where all are binary")
    return _decode_v1(data)


def _encode_v1(message: Message) -> bytes:
    parts: list[bytes | memoryview] = [message.channel.encode()]
    parts += (dump(getattr(message, name)) for name in _PARTS)
    parts += message.buffers
    count = len(parts) + 1  # of offsets: each part's, and the end
    return struct.pack(f"<{count + 1}Q", count, *_offsets(parts, 8 * (count + 1))) + b"".join(parts)


def _offsets(parts: Sequence[bytes | memoryview], start: int) -> list[int]:
    offsets = [start]
    for part in parts:
        offsets.append(offsets[-1] + memoryview(part).nbytes)
    return offsets


def _decode_v1(data: bytes) -> Message:
    if len(data) < 8:
        raise MalformedMessageError("a frame without offsets")
    (count,) = struct.unpack_from("<Q", data)
    if not _FIXED < count <= _MOST_PARTS or 8 * (count + 1) > len(data):
        raise MalformedMessageError(f"a frame of {len(data)} bytes with {count} offsets")
    offsets = struct.unpack_from(f"<{count}Q", data, 8)
    # What lies behind the last offset some servers leave out, and none needs.
    parts = _cut(data, [*offsets[:-1], min(offsets[-1], len(data))], 8 * (count + 1))
    return message_of(_channel(bytes(parts[0])), [bytes(part) for part in parts[1:_FIXED]], parts[_FIXED:])


def _encode_legacy(message: Message) -> bytes | str:
    whole = {"channel": message.channel} | {name: getattr(message, name) for name in _PARTS}
    if not message.buffers:
        return dump({**whole, "buffers": []}).decode()
    parts = [dump(whole), *message.buffers]
    offsets = _offsets(parts, 4 * (len(parts) + 1))
    return struct.pack(f">{len(parts) + 1}I", len(parts), *offsets[:-1]) + b"".join(parts)


def _decode_legacy(data: bytes | str) -> Message:
    if isinstance(data, str):
        # What a text frame of a websocket carries was UTF-8 (RFC 6455, section 5.6).
        return _message_of_whole(data.encode("utf-8", "replace"), ())
    if len(data) < 4:
        raise MalformedMessageError("a frame without offsets")
    (count,) = struct.unpack_from(">I", data)
    if not 0 < count <= _MOST_PARTS or 4 * (count + 1) > len(data):
        raise MalformedMessageError(f"a frame of {len(data)} bytes with {count} parts")
    offsets = struct.unpack_from(f">{count}I", data, 4)
    parts = _cut(data, [*offsets, len(data)], 4 * (count + 1))
    return _message_of_whole(bytes(parts[0]), parts[1:])


def _message_of_whole(whole: bytes, buffers: Sequence[memoryview]) -> Message:
    value = load(whole)
    parts = [value.get(name) or {} for name in _PARTS]  # null stands for an empty one
    if not all(isinstance(part, dict) for part in parts):
        raise MalformedMessageError("a part is not an object")
    header, parent_header, metadata, content = cast("list[Mapping[str, object]]", parts)
    channel = value.get("channel") or "shell"
    name = channel.encode("utf-8", "replace") if isinstance(channel, str) else b"?"
    return Message(_channel(name), header, parent_header, metadata, content, buffers)


def _cut(data: bytes, offsets: Sequence[int], first: int) -> list[memoryview]:
    whole = memoryview(data)
    if offsets[0] < first or list(offsets) != sorted(offsets) or offsets[-1] > len(data):
        raise MalformedMessageError("offsets that are not of this frame")
    return [whole[start:end] for start, end in pairwise(offsets)]


def _channel(name: bytes) -> Channel:
    text = name.decode("utf-8", "replace")
    if text not in _CHANNELS:
        raise MalformedMessageError("a channel that there is not")
    return cast(Channel, text)
