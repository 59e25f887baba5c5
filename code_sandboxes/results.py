"""What users get back: values, frozen, that say what happened in one run of code.

The outcome is in :class:`ExecutionResult`; what was printed is in its ``logs``, what a notebook would
show below the cell is in its ``results``. Shapes follow the Jupyter messaging documentation, sections
"Messages on the IOPub (PUB/SUB) channel" and "Execution results".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar, overload

from code_sandboxes.errors import SandboxConnectionError, SandboxExecutionError, SandboxTimeoutError

__all__ = [
    "CodeError",
    "Context",
    "ExecutionError",
    "ExecutionResult",
    "ExecutionStatus",
    "InputRequest",
    "Logs",
    "MIMEType",
    "OutputMessage",
    "OutputMessages",
    "Printed",
    "Result",
    "ResultList",
    "Text",
]


class Text(str, Enum):
    """Members compare and print as the plain strings they stand for."""

    __str__ = str.__str__


class MIMEType(Text):
    """The MIME types that :class:`Result` has a property for."""

    TEXT = "text/plain"
    HTML = "text/html"
    MARKDOWN = "text/markdown"
    LATEX = "text/latex"
    JSON = "application/json"
    PNG = "image/png"
    JPEG = "image/jpeg"
    SVG = "image/svg+xml"
    PDF = "application/pdf"
    JAVASCRIPT = "application/javascript"


class ExecutionStatus(Text):
    """How a run ended."""

    OK = "ok"  # it ran to its end
    ERROR = "error"  # it raised
    EXITED = "exited"  # it called sys.exit(): see exit_code
    INTERRUPTED = "interrupted"  # by interrupt(), Ctrl-C or terminate()
    TIMED_OUT = "timed_out"  # it ran longer than its timeout, and was stopped
    KERNEL_DIED = "kernel_died"  # its process ended under it
    CONNECTION_LOST = "connection_lost"  # the kernel may be alive, but tells nothing any more
    ABORTED = "aborted"  # it was not run


@dataclass(frozen=True, slots=True)
class OutputMessage:
    """One line of output, or a part of one.

    ``"".join(m.line + m.end)`` over the messages of a stream is exactly the text the kernel published.

    Args:
        line: the text, without what ended it.
        end: ``"\\n"``, ``"\\r\\n"``, ``"\\r"`` (a progress bar), or ``""`` for a line that is not ended yet.
        timestamp: when it arrived, in seconds since the epoch.
        error: True for standard error.
    """

    line: str
    end: str = "\n"
    timestamp: float = 0.0
    error: bool = False

    def __str__(self) -> str:
        return self.line


_LINE_END = re.compile(r"\r\n|\r|\n")

# So many messages are made at once when one is asked for; of more, only that one: they would take a hundred
# times the memory of their text.
_MANY = 1_000_000


@dataclass(frozen=True, slots=True)
class Printed:
    """Text of one stream that came at once: whole lines, or one that is not ended. Its lines are made when
    they are asked for: a hundred million empty ones must not take a hundred times their size.
    """

    text: str
    timestamp: float = 0.0
    error: bool = False

    def __iter__(self) -> Iterator[OutputMessage]:
        start = 0
        for match in _LINE_END.finditer(self.text):
            yield OutputMessage(self.text[start : match.start()], match[0], self.timestamp, self.error)
            start = match.end()
        if start < len(self.text):
            yield OutputMessage(self.text[start:], "", self.timestamp, self.error)


class OutputMessages(Sequence[OutputMessage]):
    """The messages of one stream of one run, in order."""

    __slots__ = ("_messages", "_printed")

    def __init__(self, printed: Iterable[Printed] = ()) -> None:
        self._printed = tuple(printed)
        self._messages: list[OutputMessage] | None = None

    @property
    def text(self) -> str:
        """``"".join(m.line + m.end)`` over all of them."""
        return "".join([printed.text for printed in self._printed])

    def __iter__(self) -> Iterator[OutputMessage]:
        return itertools.chain.from_iterable(self._printed)

    @overload
    def __getitem__(self, index: int) -> OutputMessage: ...

    @overload
    def __getitem__(self, index: slice) -> list[OutputMessage]: ...

    def __getitem__(self, index: int | slice) -> OutputMessage | list[OutputMessage]:
        if isinstance(index, int) and len(self) > _MANY:
            return next(itertools.islice(self, range(len(self))[index], None))
        return self._made()[index]

    def __len__(self) -> int:
        return sum(_count_lines(printed.text) for printed in self._printed)

    def __bool__(self) -> bool:
        return bool(self._printed)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (OutputMessages, list, tuple)):
            return self._made() == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self._printed)

    def __repr__(self) -> str:
        first = list(itertools.islice(self, 5))
        return repr(first) if len(first) < 5 else f"<{len(self.text):,} characters of output>"

    def _made(self) -> list[OutputMessage]:
        if self._messages is None:
            self._messages = list(iter(self))
        return self._messages


def _count_lines(text: str) -> int:
    ended = text.count("\n") + text.count("\r") - text.count("\r\n")
    return ended if text.endswith(("\r", "\n")) or not text else ended + 1


@dataclass(frozen=True, slots=True)
class Result:
    """Something that a notebook would show: the value of the last expression, or a display.

    Args:
        data: the MIME bundle; images and PDF are base64 text, JSON types are objects.
        metadata: what the kernel said about it, by MIME type.
        is_main_result: True for the value of the cell's last expression.
        display_id: set where a later ``update_display()`` can replace it.
    """

    data: Mapping[str, object]
    metadata: Mapping[str, object] = field(default_factory=dict)
    is_main_result: bool = False
    display_id: str | None = None

    def formats(self) -> list[str]:
        """The MIME types it is there in."""
        return list(self.data)

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None
    ) -> tuple[dict[str, object], dict[str, object]]:
        return dict(self.data), dict(self.metadata)

    def _as_text(self, mime_type: MIMEType) -> str | None:
        value = self.data.get(mime_type.value)
        return value if isinstance(value, str) else None

    @property
    def text(self) -> str | None:
        return self._as_text(MIMEType.TEXT)

    @property
    def html(self) -> str | None:
        return self._as_text(MIMEType.HTML)

    @property
    def markdown(self) -> str | None:
        return self._as_text(MIMEType.MARKDOWN)

    @property
    def latex(self) -> str | None:
        return self._as_text(MIMEType.LATEX)

    @property
    def json(self) -> object:
        return self.data.get(MIMEType.JSON.value)

    @property
    def png(self) -> str | None:
        return self._as_text(MIMEType.PNG)

    @property
    def jpeg(self) -> str | None:
        return self._as_text(MIMEType.JPEG)

    @property
    def svg(self) -> str | None:
        return self._as_text(MIMEType.SVG)

    @property
    def pdf(self) -> str | None:
        return self._as_text(MIMEType.PDF)

    @property
    def javascript(self) -> str | None:
        return self._as_text(MIMEType.JAVASCRIPT)


class ResultList(Sequence[Result]):
    """The results of one run, in order; an ``update_display()`` replaces its entry, even much later."""

    __slots__ = ("__weakref__", "_items")

    def __init__(self, results: Sequence[Result] = ()) -> None:
        self._items = dict(enumerate(results))

    @overload
    def __getitem__(self, index: int) -> Result: ...

    @overload
    def __getitem__(self, index: slice) -> list[Result]: ...

    def __getitem__(self, index: int | slice) -> Result | list[Result]:
        return list(self._items.values())[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(list(self._items.values()))

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (ResultList, list, tuple)):
            return list(self) == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(frozen=True, slots=True)
class ExecutionError:
    """Why a run did not succeed.

    Args:
        name: the class of the exception (``"ZeroDivisionError"``), or ``"TimeoutError"``, ``"KernelDied"``.
        value: its message.
        traceback: as the kernel formatted it, ANSI colours included; empty where there is none.
    """

    name: str
    value: str
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.value}" if self.value else self.name


CodeError = ExecutionError


@dataclass(frozen=True, slots=True)
class Logs:
    """What a run printed: its messages, stream by stream, in order."""

    stdout: Sequence[OutputMessage] = ()
    stderr: Sequence[OutputMessage] = ()


@dataclass(frozen=True, slots=True)
class InputRequest:
    """The code called ``input(prompt)`` or, with *password*, ``getpass(prompt)``."""

    prompt: str
    password: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """A kernel of a sandbox, with variables of its own.

    Args:
        id: unique in the sandbox.
        name: as it was created; unique in the sandbox too.
        language: what its kernel runs (``"python"``).
        cwd: the directory it started in, where one was asked for.
    """

    id: str
    name: str
    language: str
    cwd: str | None = None


_SelfT = TypeVar("_SelfT", bound="ExecutionResult")


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """Everything one run produced, and how it ended.

    Args:
        status: how it ended.
        results: what a notebook would show.
        logs: what was printed, message by message.
        error: set whenever *status* is none of ``ok`` and ``exited``.
        exit_code: of ``sys.exit()``; of the process where the kernel died (-9: killed by signal 9).
        execution_count: the kernel's count, None where it told none.
        context_id: where it ran.
        started_at: seconds since the epoch.
        completed_at: seconds since the epoch.
        truncated: some output was not kept, or did not arrive.
        state_preserved: False where the variables of the context are gone.
    """

    status: ExecutionStatus
    results: Sequence[Result] = field(default_factory=ResultList)
    logs: Logs = field(default_factory=Logs)
    error: ExecutionError | None = None
    exit_code: int | None = None
    execution_count: int | None = None
    context_id: str | None = None
    started_at: float = 0.0
    completed_at: float = 0.0
    truncated: bool = False
    state_preserved: bool = True

    @property
    def success(self) -> bool:
        """The code ran to its end, or called ``sys.exit(0)``."""
        return self.status is ExecutionStatus.OK or (
            self.status is ExecutionStatus.EXITED and self.exit_code == 0
        )

    @property
    def text(self) -> str | None:
        """The plain text of the value of the last expression; None where it had none."""
        return next((result.text for result in self.results if result.is_main_result), None)

    @property
    def stdout(self) -> str:
        """What was printed to standard output, without its one final newline."""
        return _joined(self.logs.stdout)

    @property
    def stderr(self) -> str:
        """What was printed to standard error, without its one final newline."""
        return _joined(self.logs.stderr)

    @property
    def duration(self) -> float:
        """Seconds from start to end."""
        return self.completed_at - self.started_at

    @property
    def execution_ok(self) -> bool:
        """The machinery worked: the code ran, and its own doing decided how it ended."""
        return self.status in (ExecutionStatus.OK, ExecutionStatus.ERROR, ExecutionStatus.EXITED)

    @property
    def execution_error(self) -> ExecutionError | None:
        """What went wrong with the machinery."""
        return None if self.execution_ok else self.error

    @property
    def code_error(self) -> ExecutionError | None:
        """What the code raised."""
        return self.error if self.status is ExecutionStatus.ERROR else None

    def raise_for_status(self: _SelfT) -> _SelfT:
        """Return the result itself if it is a success.

        Raises:
            SandboxTimeoutError: the run timed out.
            SandboxConnectionError: the kernel died or was lost.
            SandboxExecutionError: the code failed, was interrupted, or was not run.
        """
        if self.success:
            return self
        sentence = str(self.error) if self.error else f"the code called sys.exit({self.exit_code})"
        raise _raised_for(self.status)(sentence, self)


def _raised_for(
    status: ExecutionStatus,
) -> type[SandboxExecutionError | SandboxTimeoutError | SandboxConnectionError]:
    if status is ExecutionStatus.TIMED_OUT:
        return SandboxTimeoutError
    if status in (ExecutionStatus.KERNEL_DIED, ExecutionStatus.CONNECTION_LOST):
        return SandboxConnectionError
    return SandboxExecutionError


def _joined(messages: Sequence[OutputMessage]) -> str:
    if isinstance(messages, OutputMessages):
        text = messages.text
    else:
        text = "".join([message.line + message.end for message in messages])
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")
