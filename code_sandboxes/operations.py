"""What both sandboxes do, written once.

An operation is a generator: it yields what has to be waited for or told to somebody, and returns a value.
:class:`Sandbox` drives it by blocking, ``AsyncSandbox`` by awaiting; neither knows what it does. Whatever a
driver raises where it waits (Ctrl-C, a cancellation) arrives here, at the ``yield``, so that there is one
path for all of them: interrupt the code, wait until it has stopped or was killed, raise it again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from code_sandboxes.checks import check_seconds, check_str, check_str_mapping
from code_sandboxes.errors import (
    ContextNotFoundError,
    SandboxConnectionError,
    SandboxNotStartedError,
)
from code_sandboxes.forks import in_forked_child
from code_sandboxes.inbox import Inbox
from code_sandboxes.info import SandboxStatus
from code_sandboxes.kernel import Ended, Kernel, Ready, StartFailed
from code_sandboxes.kernel_process import Limits
from code_sandboxes.protocol.calls import Execution, Shown
from code_sandboxes.protocol.events import Event
from code_sandboxes.results import (
    Context,
    ExecutionError,
    ExecutionResult,
    InputRequest,
    Logs,
    OutputMessage,
    Printed,
    Result,
)
from code_sandboxes.runs import Run
from code_sandboxes.transports.loop import Loop, Timer, the_loop
from code_sandboxes.variants.base import Variant

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = [
    "LEFT",
    "SILENT",
    "Ask",
    "Core",
    "Emit",
    "Handlers",
    "LeftEarly",
    "Operation",
    "Output",
    "OutputHandler",
    "Step",
    "Wait",
    "inside",
    "running_inside",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Who gives a run up (Ctrl-C, a cancellation) waits so many seconds for its end. It is stopped, by force if
# need be, whether anybody waits or not, and the next run on its context begins after that.
_PATIENCE = 1.0

Output = OutputMessage | Result | ExecutionError
"""What a run produces, as its caller sees it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Come back when *inbox* has something, or at *until* (monotonic seconds)."""

    inbox: Inbox
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Emit:
    """Give *output* of *run* to whoever listens."""

    output: Output
    run: Run


@dataclass(frozen=True, slots=True)
class Ask:
    """Come back with the answer to *request*."""

    request: InputRequest
    run: Run


Step = Wait | Emit | Ask
Operation = Generator[Step, object, T]

OutputHandler = Callable[[OutputMessage], object]

running_inside: ContextVar[frozenset[Run]] = ContextVar("running_inside", default=frozenset())
"""The runs in whose callbacks the caller is; those that were told to the end do not count any more."""


class LeftEarly(BaseException):
    """The iterator over a run was left before its end."""


LEFT = LeftEarly()


@contextmanager
def inside(run: Run) -> Iterator[None]:
    """A callback of *run* is being called."""
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
class _Returned(Event):
    """What was done in another thread is over; *error* is what it raised."""

    error: Exception | None


class _Held:
    """A context and its kernel."""

    def __init__(self, context: Context, kernel: Kernel) -> None:
        self.context = context
        self.kernel = kernel


class Core:
    """One sandbox without a front: its state, and its operations.

    It belongs to the process that made it.
    """

    def __init__(
        self, variant: Variant, config: SandboxConfig, name: str | None, tags: Mapping[str, str]
    ) -> None:
        self.id = f"{variant.name}:{os.urandom(8).hex()}"
        self.name = name
        self.tags = dict(tags)
        self.config = config
        self.variant = variant
        self.status = SandboxStatus.CREATED
        self.created_at: float | None = None
        self.end_at: float | None = None
        self._why_ended = ""
        self._must_end = False
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may come while this thread has it
        self._contexts: dict[str, _Held] = {}
        self._lifetime: Timer | None = None

    # Start and end.

    def start(self) -> Operation[None]:
        """Make what the sandbox needs, and start its first kernel; after a failure nothing is left."""
        self._check_process()
        with self._lock:
            if self.status is not SandboxStatus.CREATED:
                raise SandboxNotStartedError(f"{self.id} cannot be started: it is {self.status}")
            self.status = SandboxStatus.RUNNING
        _live.add(self)
        _used.add(type(self.variant))
        try:
            yield from self._prepare()
            yield from self._started(self._default_context(None))
        except BaseException:
            yield from self.terminate(orderly=False, why="its start failed")
            yield from self._remove()  # it may have been terminated before there was anything
            raise
        self.created_at = time.time()
        self._limit_lifetime()

    def _prepare(self) -> Operation[None]:
        prepared = Inbox()
        the_loop().run_blocking(self.variant.prepare, lambda _, error: prepared.put(_Returned(error)))
        yield from _until_returned(prepared)

    def _limit_lifetime(self) -> None:
        seconds = self.config.max_lifetime
        if not seconds:
            return
        self.end_at = (self.created_at or time.time()) + seconds
        why = f"it reached its max_lifetime of {seconds:g} s"

        def expire() -> None:
            _drive_in_loop(the_loop(), self.terminate(orderly=True, why=why), _log_failure)

        def arm() -> None:
            self._lifetime = the_loop().call_later(seconds, expire)

        the_loop().call_soon(arm)

    def terminate(self, *, orderly: bool, why: str = "it was terminated") -> Operation[bool]:
        """End every kernel and remove everything; returns whether it was running."""
        self._check_process()
        over = Inbox()
        with self._lock:
            was_running = self.status is SandboxStatus.RUNNING or self._must_end
            self._must_end = was_running  # should Ctrl-C come before the end is under way
            self.status, self._why_ended = SandboxStatus.STOPPED, self._why_ended or why
            if was_running:
                # It goes on in the I/O thread, whatever becomes of the one who waits for it here.
                ending = self._end(f"the sandbox ended: {why}", orderly=orderly)
                _drive_in_loop(the_loop(), ending, lambda error: over.put(_Returned(error)))
                self._must_end = False
        if not was_running:
            return False
        yield from _until_returned(over)
        return True

    def _end(self, sentence: str, *, orderly: bool) -> Operation[None]:
        if self._lifetime is not None:
            self._lifetime.cancel()
        yield from _close(list(self._contexts.values()), sentence, orderly=orderly)
        self._contexts.clear()
        yield from self._remove()

    def _remove(self) -> Operation[None]:
        removed = Inbox()
        the_loop().run_blocking(
            self.variant.remove, lambda _, error: removed.put(_Returned(error)), apart=True
        )
        try:
            yield from _until_returned(removed)
        except OSError as error:
            raise SandboxConnectionError(
                f"{self.id} has ended, but not all could be removed: {error}"
            ) from error
        _live.discard(self)

    def check_running(self) -> None:
        """
        Raises:
            SandboxNotStartedError: it was not started yet, or has ended.
            SandboxConnectionError: it belongs to another process.
        """
        self._check_process()
        if self.status is SandboxStatus.CREATED:
            raise SandboxNotStartedError(f"{self.id} was not started: call start(), or use it with 'with'")
        if self.status is SandboxStatus.STOPPED:
            raise SandboxNotStartedError(f"{self.id} is terminated: {self._why_ended}")

    @property
    def is_of_this_process(self) -> bool:
        return os.getpid() == self._pid

    def _check_process(self) -> None:
        if not self.is_of_this_process:
            raise SandboxConnectionError(
                f"{self.id} belongs to process {self._pid}, and this is its fork {os.getpid()};"
                f" reach it with Sandbox.from_id({self.id!r})"
            )

    # Running code.

    def run_code(
        self,
        code: str,
        *,
        language: str | None,
        context: Context | str | None,
        timeout: float | None,
        listen: bool,
        allow_stdin: bool,
    ) -> Operation[ExecutionResult]:
        """Run *code*; yields what it produces as it comes, if somebody listens.

        Bad arguments raise at once, before the operation is driven.
        """
        self.check_running()
        if not isinstance(code, str):
            raise TypeError(f"code must be a str, not {type(code).__name__}")
        check_str("language", language)
        seconds = self.config.timeout if timeout is None else check_seconds("timeout", timeout)
        held = self._resolve(context, language)
        if any(run.kernel is held.kernel and not run.told for run in running_inside.get()):
            raise RuntimeError(
                f"run_code() on the context {held.context.name!r} from inside a callback of its own run"
                " would wait for itself; use another context"
            )
        return self._run(held, code, seconds, listen=listen, allow_stdin=allow_stdin)

    def _run(
        self, held: _Held, code: str, seconds: float, *, listen: bool, allow_stdin: bool
    ) -> Operation[ExecutionResult]:
        execution = Execution(
            code,
            allow_stdin=allow_stdin,
            context_id=held.context.id,
            displays=held.kernel.displays,
            max_output=self.variant.max_output,
            now=time.monotonic(),
            started_at=time.time(),
        )
        inbox = Inbox(self.variant.max_output)
        run = Run(held.kernel, execution.content, seconds or None, inbox, listen=listen)
        held.kernel.execute(run)
        return (yield from _follow(run, execution, listen=listen))

    def interrupt(self, context: Context | str | None = None) -> bool:
        """Interrupt what runs, in one context or in all; False if nothing did."""
        self.check_running()
        held = list(self._contexts.values()) if context is None else [self._find(context)]
        return sum(each.kernel.interrupt() for each in held) > 0

    @property
    def is_executing(self) -> bool:
        return any(held.kernel.is_executing for held in list(self._contexts.values()))

    @property
    def background_output(self) -> Logs:
        logs = [held.kernel.background_output for held in list(self._contexts.values())]
        return Logs(_in_order(log.stdout for log in logs), _in_order(log.stderr for log in logs))

    # Contexts.

    def create_context(
        self, name: str | None, *, language: str | None, cwd: str | None, env: Mapping[str, str] | None
    ) -> Operation[Context]:
        self.check_running()
        for what, value in (("name", name), ("language", language), ("cwd", cwd)):
            check_str(what, value)
        held = self._new_context(name, language, cwd, check_str_mapping("env", env))
        try:
            yield from self._started(held)
        except BaseException:
            yield from self._delete(held)
            raise
        return held.context

    def list_contexts(self) -> list[Context]:
        self.check_running()
        return [held.context for held in list(self._contexts.values())]

    def restart_context(self, context: Context | str) -> Operation[None]:
        self.check_running()
        held = self._find(context)
        inbox = Inbox()
        held.kernel.restart(inbox)
        yield from _until_ready(inbox)

    def delete_context(self, context: Context | str) -> Operation[None]:
        self.check_running()
        yield from self._delete(self._find(context))

    def restart(self) -> Operation[None]:
        self.check_running()
        for held in list(self._contexts.values()):
            yield from self.restart_context(held.context)

    def _delete(self, held: _Held) -> Operation[None]:
        yield from _close([held], f"the context {held.context.name!r} was deleted", orderly=True)
        with self._lock:
            self._contexts.pop(held.context.id, None)

    def _resolve(self, context: Context | str | None, language: str | None) -> _Held:
        if context is None:
            return self._default_context(language)
        if language is not None:
            raise ValueError("give either context= or language=: a context has a language of its own")
        return self._find(context)

    def _find(self, context: Context | str) -> _Held:
        wanted = context.id if isinstance(context, Context) else context
        if not isinstance(wanted, str):
            raise TypeError(f"a context is a Context, its id or its name, not {type(context).__name__}")
        for held in list(self._contexts.values()):
            if wanted in (held.context.id, held.context.name):
                return held
        raise ContextNotFoundError(wanted, [held.context.name for held in self._contexts.values()])

    def _default_context(self, language: str | None) -> _Held:
        """The context of runs that name none: one for each language, made when it is first asked for."""
        kernel_name = self.variant.kernel_name(language)
        is_default = kernel_name == self.variant.kernel_name(None)
        context_id = "default" if is_default else f"default-{kernel_name}"
        with self._lock:
            held = self._contexts.get(context_id)
            if held is None:
                held = self._add(context_id, context_id, kernel_name, None, {})
        return held

    def _new_context(
        self, name: str | None, language: str | None, cwd: str | None, env: Mapping[str, str]
    ) -> _Held:
        kernel_name = self.variant.kernel_name(language)
        context_id = os.urandom(4).hex()
        with self._lock:
            name = context_id if name is None else name
            if name == "default" or name.startswith("default-"):
                raise ValueError(f"the name {name!r} is kept for the contexts of runs that name none")
            if any(name in (held.context.name, held.context.id) for held in self._contexts.values()):
                raise ValueError(f"there is a context {name!r} already")
            return self._add(context_id, name, kernel_name, cwd, env)

    def _add(
        self, context_id: str, name: str, kernel_name: str, cwd: str | None, env: Mapping[str, str]
    ) -> _Held:
        if self.status is not SandboxStatus.RUNNING:
            raise SandboxNotStartedError(f"{self.id} is terminated: {self._why_ended}")
        limits = Limits(grace=self.config.interrupt_grace, start=self.config.start_timeout)
        launch = self.variant.launcher(kernel_name, cwd, env)
        kernel = Kernel(the_loop(), launch, f"the kernel {kernel_name!r}", limits)
        context = Context(context_id, name, self.variant.language_of(kernel_name), cwd)
        held = self._contexts[context_id] = _Held(context, kernel)
        return held

    def _started(self, held: _Held) -> Operation[None]:
        inbox = Inbox()
        held.kernel.start(inbox)
        yield from _until_ready(inbox)


def _follow(run: Run, execution: Execution, *, listen: bool) -> Operation[ExecutionResult]:
    """Take the events of *run* until it is done; whatever is raised meanwhile is raised at the end."""
    failure: BaseException | None = None
    leave_at: float | None = None
    try:
        while not execution.done and (leave_at is None or time.monotonic() < leave_at):
            try:
                shown = yield from _next_shown(execution, run.inbox, leave_at)
                if failure is None:
                    yield from _tell(run, execution, shown, listen=listen)
            except GeneratorExit:  # nobody drives this any more
                raise
            except BaseException as error:
                if failure is not None:
                    raise
                failure = error
                if not isinstance(error, _CallbackError):
                    run.kernel.cancel(run)
                if not isinstance(error, (_CallbackError, LeftEarly)):
                    leave_at = time.monotonic() + _PATIENCE
            if failure is not None and execution.input_asked is not None:
                run.kernel.cancel(run)  # nobody will answer any more
    except BaseException:
        run.kernel.cancel(run)
        run.kernel.abandon(run)
        raise
    finally:
        run.told = True
    if failure is None or isinstance(failure, LeftEarly):
        return execution.result()
    run.kernel.abandon(run)
    raise failure.error if isinstance(failure, _CallbackError) else failure


class _CallbackError(Exception):
    """A callback raised: the run goes on to its end without any, and then *error* is raised."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _next_shown(execution: Execution, inbox: Inbox, until: float | None) -> Operation[list[Shown]]:
    event = inbox.take()
    if event is not None:
        return execution.feed(event, time.monotonic())
    deadlines = [when for when in (execution.next_deadline(), until) if when is not None]
    yield Wait(inbox, min(deadlines, default=None))
    return execution.tick(time.monotonic())


def _tell(run: Run, execution: Execution, shown: list[Shown], *, listen: bool) -> Operation[None]:
    for item in shown:
        if isinstance(item, InputRequest):
            yield from _ask(run, execution, item)
        elif listen:
            # A piece of text may be many lines: they are made one by one, as they are told.
            for output in item if isinstance(item, Printed) else (item,):
                try:
                    yield Emit(output, run)
                except Exception as error:
                    raise _CallbackError(error) from None


def _ask(run: Run, execution: Execution, request: InputRequest) -> Operation[None]:
    answer = yield Ask(request, run)
    if not isinstance(answer, str):
        raise TypeError(f"on_input must return a str, not {type(answer).__name__}")
    asked, execution.input_asked = execution.input_asked, None
    if asked is not None:
        run.kernel.answer(run, asked, answer)


def _next_event(inbox: Inbox) -> Operation[Event]:
    while True:
        event = inbox.take()
        if event is not None:
            return event
        yield Wait(inbox)


def _until_returned(inbox: Inbox) -> Operation[None]:
    event = yield from _next_event(inbox)
    assert isinstance(event, _Returned)
    if event.error is not None:
        raise event.error


def _until_ready(inbox: Inbox) -> Operation[None]:
    event = yield from _next_event(inbox)
    if isinstance(event, StartFailed):
        raise event.error
    assert isinstance(event, Ready)


def _close(contexts: Iterable[_Held], sentence: str, *, orderly: bool) -> Operation[None]:
    inboxes = []
    for held in contexts:
        inbox = Inbox()
        held.kernel.close(inbox, sentence, orderly=orderly)
        inboxes.append(inbox)
    for inbox in inboxes:
        event = yield from _next_event(inbox)
        assert isinstance(event, Ended)


def _in_order(streams: Iterable[Iterable[OutputMessage]]) -> list[OutputMessage]:
    return sorted((message for stream in streams for message in stream), key=lambda m: m.timestamp)


def _drive_in_loop(
    loop: Loop, operation: Operation[object], then: Callable[[Exception | None], None]
) -> None:
    """Drive an operation that only waits, in the I/O thread itself; *then* is told how it ended."""

    def advance() -> None:
        try:
            for step in operation:
                if isinstance(step, Wait):
                    step.inbox.notify(lambda: loop.call_soon(advance))
                    if step.inbox.is_empty:
                        return
        except Exception as error:  # whatever it is belongs to the one who asked
            then(error)
        else:
            then(None)

    loop.call_soon(advance)


def _log_failure(error: Exception | None) -> None:
    if error is not None:
        _log.error("%s", error)


_live: set[Core] = set()
_used: set[type[Variant]] = set()


def live_cores() -> list[Core]:
    """The sandboxes of this process that have not ended."""
    return list(_live)


def used_variants() -> list[type[Variant]]:
    """The variants that this process has used."""
    return list(_used)


def _let_go() -> object:
    kept = list(_live)
    _live.clear()
    _used.clear()
    return kept


in_forked_child(_let_go)
