"""What can happen to a run: one small value for each, and the one place that reads kernel messages.

A message says nothing before :func:`event_of` has checked its shape; one that has the wrong shape raises
:class:`MalformedContentError` and is dropped by the router. Sources: the Jupyter messaging documentation,
sections "Messages on the IOPub (PUB/SUB) channel", "Execution results", "Messages on the stdin channel",
"Custom Messages" (comms); JEP 65 for ``iopub_welcome``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from code_sandboxes.protocol.messages import Message

__all__ = [
    "Cleared",
    "CommClosed",
    "CommMessage",
    "CommOpened",
    "ConnectionLost",
    "Died",
    "Displayed",
    "Done",
    "Event",
    "Failed",
    "Idle",
    "InputAsked",
    "InterruptAsked",
    "KernelReplaced",
    "KernelStatus",
    "MalformedContentError",
    "NotRun",
    "OthersRun",
    "OutputDropped",
    "Replied",
    "Started",
    "Streamed",
    "Terminated",
    "TimedOut",
    "Updated",
    "Welcomed",
    "event_of",
    "failure",
    "json_size",
    "memory_size",
    "utf8_size",
]


# What is longer is not what it says it is.
_LONGEST_PROMPT = 64 * 1024
_LONGEST_DISPLAY_ID = 1024


class MalformedContentError(ValueError):
    """A message whose content does not have the shape that its type demands."""


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all of them."""


# Told by the kernel.


@dataclass(frozen=True, slots=True)
class Started(Event):
    """``execute_input``: the kernel begins with the code."""

    execution_count: int | None


@dataclass(frozen=True, slots=True)
class Streamed(Event):
    """``stream``: text was printed."""

    text: str
    error: bool


@dataclass(frozen=True, slots=True)
class Displayed(Event):
    """``display_data`` or ``execute_result`` (*is_main_result*), or a page of ``obj?``."""

    data: Mapping[str, object]
    metadata: Mapping[str, object]
    display_id: str | None = None
    is_main_result: bool = False
    execution_count: int | None = None


@dataclass(frozen=True, slots=True)
class Updated(Event):
    """``update_display_data``: every display of that id shows something else from now on."""

    data: Mapping[str, object]
    metadata: Mapping[str, object]
    display_id: str


@dataclass(frozen=True, slots=True)
class Cleared(Event):
    """``clear_output``; with *wait*, as soon as there is something new to show."""

    wait: bool


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """``error``: an exception was shown."""

    name: str
    value: str
    traceback: str


@dataclass(frozen=True, slots=True)
class InputAsked(Event):
    """``input_request``; *header* is what the answer must name as its parent."""

    prompt: str
    password: bool
    header: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Replied(Event):
    """The reply to a request, on shell or control; *status* is ``ok``, ``error`` or ``aborted``."""

    status: str
    content: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Idle(Event):
    """``status: idle``: the kernel has done all it does for a request."""


@dataclass(frozen=True, slots=True)
class KernelStatus(Event):
    """Any other ``status``: ``busy``, or of the kernel itself ``starting``, ``restarting``, ``dead``."""

    state: str


@dataclass(frozen=True, slots=True)
class OthersRun(Event):
    """A run of another client of the kernel has begun, or is over."""

    is_on: bool


@dataclass(frozen=True, slots=True)
class Welcomed(Event):
    """``iopub_welcome``: a subscription has reached the kernel; nothing it publishes is missed any more."""


@dataclass(frozen=True, slots=True)
class CommOpened(Event):
    comm_id: str
    target_name: str
    data: object
    buffers: Sequence[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class CommMessage(Event):
    comm_id: str
    data: object
    buffers: Sequence[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class CommClosed(Event):
    comm_id: str
    data: object


# Concluded by the router.


@dataclass(frozen=True, slots=True)
class Done(Event):
    """Reply and idle have both come: nothing more belongs to the request."""


@dataclass(frozen=True, slots=True)
class KernelReplaced(Event):
    """The kernel speaks under another session: it is a new process, and its variables are gone."""


# Told by whoever owns the kernel: its process, its deadlines, its user.


@dataclass(frozen=True, slots=True)
class TimedOut(Event):
    """The deadline has passed; the code is being interrupted."""

    timeout: float


@dataclass(frozen=True, slots=True)
class InterruptAsked(Event):
    """Somebody called ``interrupt()``, or pressed Ctrl-C, or left the iterator."""


@dataclass(frozen=True, slots=True)
class Terminated(Event):
    """The sandbox or the context was ended under the run."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Died(Event):
    """The process of the kernel has ended.

    *exit_code* is as in :mod:`subprocess`, None if nobody knows; *output* is what it said on the standard
    error of the process itself (a fatal error of the interpreter, say); *how_killed* is what became of code
    that did not stop, should that be why.
    """

    sentence: str
    exit_code: int | None = None
    output: str = ""
    how_killed: str = "its kernel was killed; its variables are gone"


@dataclass(frozen=True, slots=True)
class ConnectionLost(Event):
    """The kernel tells nothing any more."""

    sentence: str
    state_preserved: bool = True


@dataclass(frozen=True, slots=True)
class NotRun(Event):
    """The code never reached a kernel."""

    sentence: str


@dataclass(frozen=True, slots=True)
class OutputDropped(Event):
    """Output was produced faster than it was taken, or was lost on the way."""


def event_of(message: Message) -> Event | None:
    """What *message* says; None for a type that means nothing to a client like this one.

    Raises:
        MalformedContentError: its content has the wrong shape.
    """
    if message.channel in ("shell", "control"):
        return _replied(message)
    if message.channel == "stdin":
        return _input_asked(message) if message.msg_type == "input_request" else None
    read = _IOPUB.get(message.msg_type)
    return read(message) if read else None


def _replied(message: Message) -> Event | None:
    if not message.msg_type.endswith("_reply"):
        return None
    # Old and small kernels leave the status out of replies that cannot fail.
    status = message.content.get("status", "ok")
    if status == "abort":  # how protocol versions before 5.0 called it
        status = "aborted"
    if status not in ("ok", "error", "aborted"):
        raise MalformedContentError("a status that is none of ok, error and aborted")
    return Replied(str(status), message.content)


def _input_asked(message: Message) -> Event:
    prompt = _utf8(_str(message, "prompt", ""))
    if len(prompt) > _LONGEST_PROMPT:
        raise MalformedContentError(f"input_request: a prompt of {len(prompt)} characters")
    return InputAsked(prompt, message.content.get("password") is True, dict(message.header))


def _status(message: Message) -> Event:
    state = _str(message, "execution_state")
    return Idle() if state == "idle" else KernelStatus(state)


def _streamed(message: Message) -> Event:
    name = _str(message, "name", "stdout")
    if name not in ("stdout", "stderr"):
        raise MalformedContentError(f"a stream named {name!r}")
    return Streamed(_utf8(_str(message, "text")), name == "stderr")


def _started(message: Message) -> Event:
    return Started(_count(message))


def _displayed(message: Message) -> Event:
    is_main = message.msg_type == "execute_result"
    return Displayed(
        _bundle(message, "data"),
        _bundle(message, "metadata"),
        _display_id(message),
        is_main,
        _count(message) if is_main else None,
    )


def _updated(message: Message) -> Event | None:
    display_id = _display_id(message)
    if display_id is None:
        return None
    return Updated(_bundle(message, "data"), _bundle(message, "metadata"), display_id)


def _cleared(message: Message) -> Event:
    return Cleared(message.content.get("wait") is True)


def _failed(message: Message) -> Event:
    return failure(message.content)


def failure(content: Mapping[str, object]) -> Failed:
    """The exception that an ``error`` message, or the content of a reply, tells of."""
    name, value, lines = content.get("ename"), content.get("evalue"), content.get("traceback")
    return Failed(
        _utf8(name) if isinstance(name, str) and name else "Error",
        _utf8(value) if isinstance(value, str) else "",
        _utf8("\n".join(line for line in lines if isinstance(line, str))) if isinstance(lines, list) else "",
    )


def _welcomed(message: Message) -> Event:
    return Welcomed()


def _comm_opened(message: Message) -> Event:
    content = message.content
    return CommOpened(
        _str(message, "comm_id"), _str(message, "target_name", ""), content.get("data"), message.buffers
    )


def _comm_message(message: Message) -> Event:
    return CommMessage(_str(message, "comm_id"), message.content.get("data"), message.buffers)


def _comm_closed(message: Message) -> Event:
    return CommClosed(_str(message, "comm_id"), message.content.get("data"))


_IOPUB: Mapping[str, Callable[[Message], Event | None]] = {
    "status": _status,
    "stream": _streamed,
    "execute_input": _started,
    "execute_result": _displayed,
    "display_data": _displayed,
    "update_display_data": _updated,
    "clear_output": _cleared,
    "error": _failed,
    "iopub_welcome": _welcomed,
    "comm_open": _comm_opened,
    "comm_msg": _comm_message,
    "comm_close": _comm_closed,
}


def _str(message: Message, key: str, default: str | None = None) -> str:
    value = message.content.get(key, default)
    if not isinstance(value, str):
        raise MalformedContentError(f"{message.msg_type}: {key} is {type(value).__name__}, not str")
    return value


def _bundle(message: Message, key: str) -> Mapping[str, object]:
    value = message.content.get(key, {})
    if not isinstance(value, dict):
        raise MalformedContentError(f"{message.msg_type}: {key} is {type(value).__name__}, not an object")
    return {_utf8(name): _utf8(data) if isinstance(data, str) else data for name, data in value.items()}


def _count(message: Message) -> int | None:
    value = message.content.get("execution_count")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _display_id(message: Message) -> str | None:
    transient = message.content.get("transient")
    value = transient.get("display_id") if isinstance(transient, dict) else None
    if not isinstance(value, str):
        return None
    if len(value) > _LONGEST_DISPLAY_ID:
        raise MalformedContentError(f"{message.msg_type}: a display_id of {len(value)} characters")
    return value


def _utf8(text: str) -> str:
    """*text* as it can be written to any file: a lone surrogate has no UTF-8, and becomes ``?``."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def utf8_size(text: str) -> int:
    """How many bytes *text* is."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def json_size(value: object) -> int:
    """About how many bytes a value from JSON takes; not recursive, since a kernel may nest it deeply."""
    size = 0
    values = [value]
    while values:
        item = values.pop()
        size += 8
        if isinstance(item, str):
            size += utf8_size(item)
        elif isinstance(item, Mapping):
            values += item.keys()
            values += item.values()
        elif isinstance(item, list):
            values += item
    return size


def memory_size(value: object) -> int:
    """How many bytes of memory a value from JSON takes; as :func:`json_size` not recursive."""
    size = 0
    values = [value]
    while values:
        item = values.pop()
        size += sys.getsizeof(item)
        if isinstance(item, Mapping):
            values += item.keys()
            values += item.values()
        elif isinstance(item, list):
            values += item
    return size
