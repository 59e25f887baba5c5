"""What an operation may ask of whoever drives it.

An operation is a generator: it yields steps, and returns a value. It knows neither threads nor event loops:
a driver (``blocking.py``, ``awaiting.py``, or the I/O thread by :func:`drive_in_loop`) does what a step asks
and sends the answer back. What is raised where it waits (Ctrl-C, a cancellation) arrives at the ``yield``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from code_sandboxes.inbox import Inbox
from code_sandboxes.protocol.events import Event
from code_sandboxes.results import ExecutionError, InputRequest, OutputMessage, Result
from code_sandboxes.runs import Run
from code_sandboxes.transports.loop import Loop, the_loop

__all__ = [
    "LEFT",
    "SILENT",
    "Ask",
    "Emit",
    "Got",
    "Handlers",
    "LeftEarly",
    "Operation",
    "Output",
    "OutputHandler",
    "Step",
    "Tell",
    "Wait",
    "drive_in_loop",
    "in_worker",
    "inside",
    "log_failure",
    "next_event",
    "running_inside",
    "until_got",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

Output = OutputMessage | Result | ExecutionError
"""What a run produces, as its caller sees it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Come back when *inbox* has something, or at *until* (monotonic seconds)."""

    inbox: Inbox
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Emit:
    """Give *output* to whoever listens; of *run*, or None if it is no run's."""

    output: Output
    run: Run | None


@dataclass(frozen=True, slots=True)
class Ask:
    """Come back with the answer to *request*."""

    request: InputRequest
    run: Run


@dataclass(frozen=True, slots=True)
class Tell:
    """Call a function that the caller gave."""

    function: Callable[..., object]
    arguments: tuple[object, ...]

    def call(self) -> object:
        return self.function(*self.arguments)


Step = Wait | Emit | Ask | Tell
Operation = Generator[Step, object, T]

OutputHandler = Callable[[OutputMessage], object]

running_inside: ContextVar[frozenset[Run]] = ContextVar("running_inside", default=frozenset())
"""The runs in whose callbacks the caller is; those that were told to the end do not count any more."""


class LeftEarly(BaseException):
    """The iterator over a run was left before its end."""


LEFT = LeftEarly()


@contextmanager
def inside(run: Run | None) -> Iterator[None]:
    """A callback of *run* is being called."""
    if run is None:
        yield
        return
    token = running_inside.set(running_inside.get() | {run})
    try:
        yield
    finally:
        running_inside.reset(token)


@dataclass(frozen=True, slots=True)
class Handlers:
    """The callbacks of one run."""

    on_stdout: OutputHandler | None = None
    on_stderr: OutputHandler | None = None
    on_result: Callable[[Result], object] | None = None
    on_error: Callable[[ExecutionError], object] | None = None
    on_input: Callable[[InputRequest], object] | None = None

    def check(self) -> Handlers:
        """Itself, if what is given can be called.

        Raises:
            TypeError: it cannot.
        """
        for name in self.__slots__:
            handler = getattr(self, name)
            if handler is not None and not callable(handler):
                raise TypeError(f"{name} must be a function, not {type(handler).__name__}")
        return self

    @property
    def listen(self) -> bool:
        return any((self.on_stdout, self.on_stderr, self.on_result, self.on_error))

    def call(self, output: Output | InputRequest) -> object:
        """Give *output* to the callback that is meant for it."""
        if isinstance(output, OutputMessage):
            handler = self.on_stderr if output.error else self.on_stdout
            return handler(output) if handler else None
        if isinstance(output, Result):
            return self.on_result(output) if self.on_result else None
        if isinstance(output, ExecutionError):
            return self.on_error(output) if self.on_error else None
        return self.on_input(output) if self.on_input else None


SILENT = Handlers()


@dataclass(frozen=True, slots=True)
class Got(Event):
    """What was asked for in another thread."""

    value: object
    error: Exception | None


def next_event(inbox: Inbox) -> Operation[Event]:
    while True:
        event = inbox.take()
        if event is not None:
            return event
        yield Wait(inbox)


def in_worker(function: Callable[[], T], *, apart: bool = False) -> Operation[T]:
    """What *function*, which may block, returns in another thread."""
    inbox = Inbox()
    the_loop().run_blocking(function, lambda value, error: inbox.put(Got(value, error)), apart=apart)
    value: T = yield from until_got(inbox)
    return value


def until_got(inbox: Inbox) -> Operation[Any]:
    event = yield from next_event(inbox)
    assert isinstance(event, Got)
    if event.error is not None:
        raise event.error
    return event.value


def drive_in_loop(loop: Loop, operation: Operation[object], then: Callable[[Exception | None], None]) -> None:
    """Drive an operation that only waits, in the I/O thread itself; *then* is told how it ended."""

    is_over = False

    def advance() -> None:
        nonlocal is_over
        if is_over:  # it was woken once more than it waited
            return
        try:
            for step in operation:
                if isinstance(step, Wait):
                    step.inbox.notify(lambda: loop.call_soon(advance))
                    if step.inbox.is_empty:
                        return
        except Exception as error:  # whatever it is belongs to the one who asked
            is_over = True
            then(error)
        else:
            is_over = True
            then(None)

    loop.call_soon(advance)


def log_failure(error: Exception | None) -> None:
    if error is not None:
        _log.error("%s", error)
