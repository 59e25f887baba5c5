"""Messages to ZeroMQ frames and back, signed.

Source: the Jupyter messaging documentation, section "The Wire Protocol". What comes in is believed only
when its HMAC-SHA256 fits and was not seen before; then it still may be anything, so every field is checked
where its shape is named.
"""

from __future__ import annotations

import hmac
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import ClassVar

from code_sandboxes.protocol.messages import Channel, Message

__all__ = [
    "ForgedMessageError",
    "MalformedMessageError",
    "ReplayedMessageError",
    "WireCodec",
    "WireError",
    "dump",
    "load",
    "message_of",
]

_DELIMITER = b"<IDS|MSG>"

# At least so many of the latest messages are known again; two generations make forgetting cheap. It bounds
# what a connection costs: about a megabyte.
_REMEMBERED = 4096

# What a small message may become when it is unpacked: two bytes are enough for a list of 56. Beyond these it
# is not. How many bytes of memory each such byte may cost was measured (CPython 3.10 to 3.14).
_MOST_UNPACKED = 256 * 1024**2
_COSTS = ((b"[", 100), (b"{", 200), (b",", 100), (b":", 100))

# Header and parent header are a few hundred bytes, and kept for a while.
_LONGEST_HEADER = 64 * 1024

# Nested deeper than this a value is no use: it could not be printed, as repr() is recursive.
_DEEPEST = 200

_LONGEST_INTEGER = 4300


class WireError(ValueError):
    """Frames that are no message to be believed; *reason* says why in one word."""

    reason: ClassVar[str]


class MalformedMessageError(WireError):
    """They do not have the form of a message."""

    reason = "malformed"


class ForgedMessageError(WireError):
    """Their signature does not fit."""

    reason = "forged"


class ReplayedMessageError(WireError):
    """Their signature was seen before: somebody sent a recorded message again."""

    reason = "replayed"


class WireCodec:
    """Encodes and decodes the messages of one connection.

    Args:
        key: of the connection file; empty turns signing off, as Jupyter defines it.
    """

    def __init__(self, key: bytes) -> None:
        self._signed = bool(key)
        self._hmac = hmac.new(key or b"-", digestmod=sha256)
        self._recent: set[int] = set()
        self._older: set[int] = set()

    def encode(self, message: Message) -> list[bytes | memoryview]:
        parts = [
            dump(part) for part in (message.header, message.parent_header, message.metadata, message.content)
        ]
        return [_DELIMITER, self._sign(parts), *parts, *message.buffers]

    def decode(self, frames: Sequence[bytes], channel: Channel) -> Message:
        """The message that *frames* are.

        Raises:
            WireError: they are malformed, forged or replayed; nothing else is raised for any input.
        """
        try:
            start = frames.index(_DELIMITER)
        except ValueError:
            raise MalformedMessageError("no delimiter <IDS|MSG>") from None
        if len(frames) < start + 6:
            raise MalformedMessageError(f"{len(frames) - start - 1} frames instead of signature and parts")
        signature, *parts = frames[start + 1 : start + 6]
        self._verify(signature, parts)
        return message_of(channel, parts, frames[start + 6 :])

    def _sign(self, parts: Sequence[bytes]) -> bytes:
        if not self._signed:
            return b""
        digest = self._hmac.copy()
        for part in parts:
            digest.update(part)
        return digest.hexdigest().encode()

    def _verify(self, signature: bytes, parts: Sequence[bytes]) -> None:
        if not self._signed:
            return
        if not hmac.compare_digest(self._sign(parts), signature):
            raise ForgedMessageError("the signature does not fit")
        seen = int(signature[:16], 16)  # 64 of the 256 bits tell a few thousand messages apart
        if seen in self._recent or seen in self._older:
            raise ReplayedMessageError("the signature was seen before")
        self._recent.add(seen)
        if len(self._recent) >= _REMEMBERED:
            self._older, self._recent = self._recent, set()


def message_of(channel: Channel, parts: Sequence[bytes], buffers: Sequence[bytes | memoryview]) -> Message:
    """The message whose four dictionaries are the JSON *parts*.

    Raises:
        MalformedMessageError: they are not.
    """
    if max(len(parts[0]), len(parts[1])) > _LONGEST_HEADER:
        raise MalformedMessageError("a header that is too long")
    header, parent_header, metadata, content = (load(part) for part in parts)
    return Message(channel, header, parent_header, metadata, content, buffers)


# Kept, because json.dumps() with arguments of its own makes one at every call.
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str)


def dump(part: Mapping[str, object]) -> bytes:
    """*part* as JSON."""
    # A lone surrogate has no UTF-8: it becomes "?" here as it does in what a kernel prints.
    return _encoder.encode(part).encode("utf-8", "replace") if part else b"{}"


def load(part: bytes) -> dict[str, object]:
    """The JSON object that *part* is.

    Raises:
        MalformedMessageError: it is none, or one that nobody needs and that would take too much to unpack.
    """
    if part == b"{}":
        return {}
    if len(part) > _MOST_UNPACKED // 200 and _unpacked_size(part) > _MOST_UNPACKED:
        raise MalformedMessageError(f"a part would take more than {_MOST_UNPACKED // 1024**2} MiB of memory")
    # Python's encoder lets through what is no UTF-8 ("surrogateescape"); such bytes become U+FFFD.
    try:
        value = _decode_json(part.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"a part is not JSON: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise MalformedMessageError("a part is not an object")
    if len(part) > 2 * _DEEPEST and _is_too_deep(part, value):
        raise MalformedMessageError(f"a part is nested deeper than {_DEEPEST}")
    return value


def _unpacked_size(part: bytes) -> int:
    return len(part) + sum(part.count(byte) * cost for byte, cost in _COSTS)


def _is_too_deep(part: bytes, value: object) -> bool:
    if part.count(b"[") + part.count(b"{") <= _DEEPEST:
        return False
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for each in level for child in _children(each) if isinstance(child, (list, dict))]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


_without_limit = json.JSONDecoder(parse_int=_integer)


def _decode_json(text: str) -> object:
    # The time to read an integer grows with the square of its length. Python has a limit since 3.10.7, which
    # a program may switch off.
    if getattr(sys, "get_int_max_str_digits", lambda: 0)():
        return json.loads(text)
    return _without_limit.decode(text)
