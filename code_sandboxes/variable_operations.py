"""What can be done with variables, written once for both fronts.

A value goes as a form and bytes (``guest/values.py``), small ones with the call, others in parts of which a
few are under way. Nothing that comes is unpickled or evaluated, and no room is made for more than has come.
"""

from __future__ import annotations

import itertools
import keyword
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

from code_sandboxes import arrow
from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxNotStartedError,
    SandboxSerializationError,
    VariableNotFoundError,
)
from code_sandboxes.guest.values import NotInstalled, NotTransferable, decode, encode
from code_sandboxes.guest_calls import Guest, Window
from code_sandboxes.guest_link import Buffers, GuestCall
from code_sandboxes.guest_values import as_bytes, as_int, as_object, as_str, bad_answer
from code_sandboxes.inbox import Inbox
from code_sandboxes.operations import Core
from code_sandboxes.results import Context
from code_sandboxes.steps import Operation, in_worker

__all__ = ["get_variable", "set_variables"]

T = TypeVar("T")

# Bytes: what goes with a call, what goes at a time otherwise, and how many of those are under way.
_AT_ONCE = 4 * 1024**2
_PART = 2 * 1024**2
_AHEAD = 4

# What is more is a matter for files: here it has to fit into memory, on both sides.
_LARGEST = 4 * 1024**3

# What takes longer than a thread for it costs.
_QUICK = 64 * 1024

_WHAT_CAN = "JSON types, bytes, numpy arrays and pandas or polars DataFrames are transferred"

_transfers = itertools.count(1)


def get_variable(core: Core, name: str, context: Context | str | None) -> Operation[object]:
    """The value of a variable.

    Raises:
        VariableNotFoundError: there is none of that name.
        SandboxSerializationError: it is not transferable, or what came is no value.
        SandboxConfigurationError: the context speaks another language.
    """
    name = _identifier(name)
    of, guest = core.python(context, "variables")
    return _get(guest, name, of.name)


def _get(guest: Guest, name: str, context: str) -> Operation[object]:
    transfer = next(_transfers)
    with _released(guest, [transfer]):
        arguments = {"variable": name, "transfer": transfer, "at_once": _AT_ONCE}
        asked = GuestCall("variables.get", arguments, (), Inbox())
        answer = yield from guest.ask(asked)
        value = as_object(answer.value)
        if "missing" in value:
            raise VariableNotFoundError(name, context)
        _check_not_refused(name, value)
        size = _size(value.get("size"))
        if size <= _AT_ONCE:
            data = _with_answer(answer.buffers, size)
        else:
            data = yield from received(guest, transfer, size, asked)
            _release(guest, transfer)
    form = as_object(value.get("form"))
    kind = form.get("kind")
    if (size <= _QUICK and kind in ("json", "bytes")) or (kind == "array" and "numpy" in sys.modules):
        return _decoded(name, form, data)
    return (yield from in_worker(lambda: _decoded(name, form, data), apart=True))


def set_variables(
    core: Core, variables: Mapping[str, object], context: Context | str | None
) -> Operation[None]:
    """Set variables, all or none.

    Raises:
        TypeError: a name is no str.
        ValueError: a name is no identifier.
        SandboxSerializationError: a value is not transferable.
        SandboxConfigurationError: the context speaks another language.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a mapping, not {type(variables).__name__}")
    values = {_identifier(name): value for name, value in variables.items()}
    _, guest = core.python(context, "variables")
    return _set(guest, values)


def _set(guest: Guest, values: Mapping[str, object]) -> Operation[None]:
    encoded = []
    for name, value in values.items():
        encoded.append((yield from _encoding(name, value)))
    descriptions: list[dict[str, object]] = []
    buffers: list[memoryview] = []
    transfers: list[int] = []
    sent: GuestCall | None = None
    with _released(guest, transfers):
        for each in encoded:
            description: dict[str, object] = {"name": each.name, "form": each.form, "size": len(each.data)}
            descriptions.append(description)
            if sum(map(len, buffers)) + len(each.data) <= _AT_ONCE:
                buffers += [each.data] if each.data else []
                continue
            transfers.append(next(_transfers))
            description["transfer"] = transfers[-1]
            sent = yield from _sent(guest, transfers[-1], each.data, sent)
        setting = GuestCall("variables.set", {"values": descriptions}, buffers, Inbox(), follows=sent)
        answer = yield from guest.ask(setting)
    answered = as_object(answer.value)
    _check_not_refused(str(answered.get("name")), answered)


# Names.


def _identifier(name: object) -> str:
    """*name* as Python would store it (language reference, section "Identifiers and keywords").

    Raises:
        TypeError: it is no str.
        ValueError: it cannot be the name of a variable.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a variable must be a str, not {type(name).__name__}")
    normal = unicodedata.normalize("NFKC", name)
    if not normal.isidentifier() or keyword.iskeyword(normal):
        raise ValueError(f"a variable cannot be named {name[:100]!r}")
    return normal


# Values.


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A value on its way."""

    name: str
    form: Mapping[str, object]
    data: memoryview


def _encoding(name: str, value: object) -> Operation[_Encoded]:
    is_quick = value is None or (
        type(value) in (bool, int, float, str, bytes)
        and (not isinstance(value, (str, bytes)) or len(value) < _QUICK)
    )
    if is_quick:
        return _encoded(name, value)
    return (yield from in_worker(lambda: _encoded(name, value), apart=True))


def _encoded(name: str, value: object) -> _Encoded:
    form, data = _explained(name, lambda: encode(value))
    if len(data) > _LARGEST:
        raise _too_large(name, len(data))
    return _Encoded(name, form, data)


def _decoded(name: str, form: Mapping[str, object], data: BytesIO) -> object:
    def value() -> object:
        if form.get("kind") in ("pandas", "polars"):
            return arrow.frame(str(form["kind"]), data.getbuffer())
        return decode(form, data)

    return _explained(name, value)


def _explained(name: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except NotInstalled as error:
        extra = "code-sandboxes[arrow]" if error.package == "pyarrow" else error.package
        raise _error(name, f"{error} here; pip install {extra!r} does it") from None
    except NotTransferable as error:
        raise _error(name, str(error)) from None


def _error(name: str, why: str) -> SandboxSerializationError:
    return SandboxSerializationError(f"the variable {name!r} cannot be transferred: {why}; {_WHAT_CAN}")


def _too_large(name: str, size: int) -> SandboxSerializationError:
    return _error(name, f"its {size:,} bytes are more than {_LARGEST:,}; use files for that")


def _check_not_refused(name: str, value: Mapping[str, object]) -> None:
    if "refused" in value:
        raise _error(name, as_str(value["refused"])[:2000])


# Bytes.


def _size(value: object) -> int:
    size = as_int(value)
    if not 0 <= size <= _LARGEST:
        raise SandboxSerializationError(
            f"the sandbox has a value of {size:,} bytes; more than {_LARGEST:,} are a matter for files"
        )
    return size


def _with_answer(buffers: Buffers, size: int) -> BytesIO:
    came = as_bytes(buffers[0]) if len(buffers) == 1 else b""
    if len(came) != size:
        raise bad_answer(f"{size} bytes", came)
    return BytesIO(came)


def received(guest: Guest, transfer: int, size: int, asked: GuestCall) -> Operation[BytesIO]:
    """The *size* bytes that come under this number, which *asked* gave: each part when there is room for it.

    Raises:
        SandboxConnectionError: what came is something else.
    """
    data = BytesIO()
    with Window(guest, asked) as calls:
        for offset in range(0, size, _PART):
            if len(calls) == _AHEAD:
                data.write((yield from _next_part(calls, size - data.tell())))
            calls.begin("variables.part", transfer=transfer, offset=offset, size=min(_PART, size - offset))
        while calls:
            data.write((yield from _next_part(calls, size - data.tell())))
    return data


def _next_part(calls: Window, left: int) -> Operation[bytes | memoryview]:
    buffers = (yield from calls.oldest()).buffers
    part = as_bytes(buffers[0]) if len(buffers) == 1 else b""
    if len(part) != min(_PART, left):
        raise bad_answer("a part of a value", part)
    return part


def _sent(
    guest: Guest, transfer: int, data: memoryview, after: GuestCall | None
) -> Operation[GuestCall | None]:
    """Send *data* under this number; so many parts are under way that the kernel is never idle.

    Returns what the next call has to follow, as these follow what was sent *after*.
    """
    with Window(guest, after) as calls:
        for offset in range(0, len(data), _PART):
            if len(calls) == _AHEAD:
                yield from calls.oldest()
            part = data[offset : offset + _PART]
            calls.follows = calls.begin("variables.put", part, transfer=transfer, offset=offset)
        while calls:
            yield from calls.oldest()
    return calls.follows


@contextmanager
def _released(guest: Guest, transfers: Iterable[int]) -> Iterator[None]:
    """Whatever goes wrong, nothing stays under way."""
    try:
        yield
    except (SandboxConnectionError, SandboxNotStartedError):  # it is all gone with the kernel
        raise
    except BaseException:
        for transfer in transfers:
            _release(guest, transfer)
        raise


def _release(guest: Guest, transfer: int) -> None:
    """Nobody waits for more of it; without an answer that anybody waits for."""
    guest.begin(GuestCall("variables.release", {"transfer": transfer}, (), Inbox()))
