"""What the guest says, as values of Python: each is checked before it is believed."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from code_sandboxes.errors import SandboxConnectionError, SandboxExecutionError
from code_sandboxes.guest.calls import path_of

__all__ = [
    "as_bool",
    "as_bytes",
    "as_float",
    "as_int",
    "as_list",
    "as_object",
    "as_path",
    "as_str",
    "bad_answer",
    "error_of",
]

_LONGEST = 10_000
"""Characters of a text or path that an error quotes."""

_PLAIN: Mapping[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}


def bad_answer(wanted: str, got: object) -> SandboxConnectionError:
    """The sandbox has answered something that cannot be."""
    return SandboxConnectionError(f"the sandbox answered with {type(got).__name__} instead of {wanted}")


def as_int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_answer("an integer", value)
    return value


def as_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_answer("a number", value)
    try:
        return float(value)
    except OverflowError:
        raise bad_answer("a number", value) from None


def as_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise bad_answer("true or false", value)
    return value


def as_str(value: object) -> str:
    if not isinstance(value, str):
        raise bad_answer("a text", value)
    return value


def as_list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise bad_answer("a list", value)
    return value


def as_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_answer("an object", value)
    return value


def as_bytes(value: object) -> bytes | memoryview:
    if not isinstance(value, (bytes, memoryview)):
        raise bad_answer("bytes", value)
    return value


def as_path(value: object) -> str:
    """A path as :mod:`os` gives it: bytes that are no UTF-8 are lone surrogates."""
    if isinstance(value, str):
        return value
    encoded = as_object(value).get("hex")
    try:
        return path_of({"hex": as_str(encoded)})
    except ValueError:
        raise bad_answer("a path", value) from None


def error_of(value: object, name: str) -> Exception:
    """The exception that a failure of the call *name* tells of; Python's own where the system raised it."""
    failure = value if isinstance(value, dict) else {}
    kind, message = failure.get("kind"), failure.get("message")
    text = message[:_LONGEST] if isinstance(message, str) else ""
    if kind == "OSError":
        try:
            return _os_error(failure, text)
        except SandboxConnectionError as error:  # nor is this what it should be
            return error
    if isinstance(kind, str) and kind in _PLAIN:
        return _PLAIN[kind](text)
    what = kind[:_LONGEST] if isinstance(kind, str) else "an error"
    return SandboxExecutionError(f"{name} failed in the sandbox: {what}: {text}")


def _os_error(failure: Mapping[str, object], text: str) -> OSError:
    """The subclass is chosen by the number, which is this system's: they differ."""
    symbol = failure.get("errno")
    number = _NUMBERS.get(symbol) if isinstance(symbol, str) else None
    if number is None:
        return OSError(f"{symbol}: {text}")
    path = failure.get("path")
    if path is None:
        return OSError(number, os.strerror(number))
    return OSError(number, os.strerror(number), as_path(path)[:_LONGEST])


_NUMBERS = {symbol: number for number, symbol in errno.errorcode.items()}
