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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from code_sandboxes.checks import check_environment, check_seconds, check_str, check_str_mapping
from code_sandboxes.errors import (
    ContextNotFoundError,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxNotStartedError,
)
from code_sandboxes.forks import in_forked_child
from code_sandboxes.guest.calls import wire_path
from code_sandboxes.guest.comms import SUBSHELLS, TARGET
from code_sandboxes.guest_calls import Guest
from code_sandboxes.guest_values import as_list, as_str
from code_sandboxes.inbox import Inbox
from code_sandboxes.info import NO_SUBSHELLS, Capabilities, Capability, SandboxStatus
from code_sandboxes.kernel import Ended, Kernel, Ready, StartFailed
from code_sandboxes.kernel_process import LEAST_BACKLOG, Limits
from code_sandboxes.network_info import NetworkAttempt
from code_sandboxes.protocol.calls import Execution, Shown
from code_sandboxes.results import (
    Context,
    ExecutionResult,
    InputRequest,
    Logs,
    OutputMessage,
    Printed,
)
from code_sandboxes.runs import Run
from code_sandboxes.steps import (
    Ask,
    Emit,
    Got,
    LeftEarly,
    Operation,
    Wait,
    drive_in_loop,
    in_worker,
    log_failure,
    next_event,
    running_inside,
    until_got,
)
from code_sandboxes.transports.loop import the_loop
from code_sandboxes.variants.base import ContextSpec, Record, Variant

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["Core", "Origin", "find", "find_all", "live_cores"]

_log = logging.getLogger(__name__)

DEFAULT = "default"
"""The context of runs that name none."""

_ALIVE = (SandboxStatus.RUNNING, SandboxStatus.PAUSED)

# Who gives a run up (Ctrl-C, a cancellation) waits so many seconds for its end. It is stopped, by force if
# need be, whether anybody waits or not, and the next run on its context begins after that.
_PATIENCE = 1.0


class _Held:
    """A context and its kernel."""

    def __init__(self, spec: ContextSpec, kernel: Kernel) -> None:
        self.spec = spec
        self.context = Context(spec.id, spec.name, spec.language, spec.cwd)
        self.kernel = kernel


class Origin(Protocol):
    """What a sandbox is made from, if it does not begin with nothing."""

    def find(self) -> None:
        """Before anything is started; may block.

        Raises:
            SandboxError: it is not there, or not for this sandbox.
        """

    def restore(self, core: Core) -> Operation[None]:
        """Let *core*, which has just been started, be as that was."""


class Core:
    """One sandbox without a front: its state, and its operations.

    It belongs to the process that made it, or attached to it.

    Attributes:
        metadata: more about it, for whoever looks at it in this program.
    """

    def __init__(
        self,
        variant: Variant,
        config: SandboxConfig,
        name: str | None,
        tags: Mapping[str, str],
        origin: Origin | None = None,
    ) -> None:
        self._id = f"{variant.name}:{os.urandom(8).hex()}"
        self.name = name
        self.tags = dict(tags)
        self.config = config
        self.variant = variant
        self.status = SandboxStatus.CREATED
        self.created_at: float | None = None
        self.metadata: dict[str, object] = {}
        self._origin = origin
        self._ends_at: float | None = None  # monotonic: clocks are set
        self._why_ended = ""
        self._must_end = False
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may come while this thread has it
        self._contexts: dict[str, _Held] = {}
        self.on_end: list[Callable[[], object]] = []  # called in the I/O thread

    @property
    def id(self) -> str:
        """Tells its variant, and is unique; where a server names it, it has that name after its start."""
        return self.variant.sandbox_id or self._id

    # Start and end.

    def start(self) -> Operation[None]:
        """Make what the sandbox needs, and start its first kernel; after a failure nothing is left."""
        self._check_process()
        if self._origin is not None:
            yield from in_worker(self._origin.find, apart=True)
        with self._lock:
            if self.status is not SandboxStatus.CREATED:
                raise SandboxNotStartedError(f"{self.id} cannot be started: it is {self.status}")
            self.status = SandboxStatus.RUNNING
        _live.add(self)
        if self.config.max_lifetime:
            self.rescheduled(self.config.max_lifetime)
        self.created_at = time.time()
        try:
            yield from in_worker(self._prepare, apart=self.variant.is_elsewhere)
            self.variant.warn()
            yield from self._started(self._default_context(None))
            if self.config.gpu is not None and self.variant.is_elsewhere:
                yield from self._check_gpus()
            if self._origin is not None:
                yield from self._origin.restore(self)
        except BaseException:
            try:
                yield from self.terminate(orderly=False, why="its start failed")
                yield from self._remove()  # it may have been terminated before there was anything
            except SandboxError as error:  # why it failed says more
                _log.error("%s", error)
            raise

    def _prepare(self) -> None:
        record = replace(self.record(), time_left=self.config.max_lifetime or None)
        self.variant.prepare(record, self)

    def _check_gpus(self) -> Operation[None]:
        """Nobody else can tell what there is than code in it."""
        answer = yield from self.guest().call("machine.gpus")
        self.variant.check_gpus([as_str(model) for model in as_list(answer.value)])

    def _attach(self, record: Record) -> None:
        """Take up what another program made, or this one in an earlier life."""
        self._id, self.created_at = record.id, record.created_at or None
        self.status = SandboxStatus.PAUSED if record.metadata.get("paused") else SandboxStatus.RUNNING
        if record.time_left is not None:
            self.rescheduled(record.time_left)
        for spec in record.contexts:
            self.context_added(spec)
        _live.add(self)
        self.variant.listen(self)

    def terminate(self, *, orderly: bool, why: str = "it was terminated") -> Operation[bool]:
        """End every kernel and remove everything; returns whether it was running."""
        self._check_process()
        return (yield from self._stop(SandboxStatus.STOPPED, why, lambda: self._end(why, orderly=orderly)))

    def detach(self) -> Operation[None]:
        """Let go of it, and let it go on; a run that is on goes on, too."""
        self.check_running(or_paused=True)
        if not (self.variant.has_registry or self.variant.is_reached_by_id):
            self.variant.detach(keep=True)  # which refuses
        why = f"this program detached from it; reach it with Sandbox.from_id({self.id!r})"
        yield from self._stop(SandboxStatus.DETACHED, why, lambda: self._let_go(why, keep=True))

    def program_ends(self) -> Operation[None]:
        """Nobody here has use for it any more; it ends if nobody else has."""
        why = "its program ended"
        if not (self.variant.has_registry or self.variant.was_made_elsewhere):
            yield from self.terminate(orderly=False, why=why)
        elif self.status in _ALIVE:
            yield from self._stop(SandboxStatus.STOPPED, why, lambda: self._let_go(why, keep=False))

    def _stop(
        self, status: SandboxStatus, why: str, ending: Callable[[], Operation[None]]
    ) -> Operation[bool]:
        over = Inbox()
        with self._lock:
            was_running = self.status in _ALIVE or self._must_end
            self._must_end = was_running  # should Ctrl-C come before the end is under way
            if was_running:
                # It goes on in the I/O thread, whatever becomes of the one who waits for it here.
                self.status, self._why_ended = status, why
                drive_in_loop(the_loop(), ending(), lambda error: self._ended(over, error))
                self._must_end = False
            elif self.status is SandboxStatus.CREATED:
                self.status, self._why_ended = status, why
        if was_running:
            yield from until_got(over)
        return was_running

    def _ended(self, over: Inbox, error: Exception | None) -> None:
        over.put(Got(None, error))
        for tell in self.on_end:
            tell()

    def _end(self, why: str, *, orderly: bool) -> Operation[None]:
        self.variant.ends(why, orderly=orderly)
        contexts = list(self._contexts.values())
        yield from _close(contexts, f"the sandbox ended: {why}", orderly=orderly)
        self._contexts.clear()
        yield from self._remove()

    def _let_go(self, why: str, *, keep: bool) -> Operation[None]:
        try:
            yield from in_worker(lambda: self.variant.detach(keep=keep))
        except SandboxError as error:
            self.status, self._why_ended = SandboxStatus.STOPPED, str(error)
            raise
        finally:
            yield from self._leave(why)

    def _leave(self, why: str) -> Operation[None]:
        inboxes = []
        for held in list(self._contexts.values()):
            inbox = Inbox()
            held.kernel.leave(inbox, why)
            inboxes.append(inbox)
        for inbox in inboxes:
            yield from next_event(inbox)
        self._contexts.clear()
        _live.discard(self)

    def _remove(self) -> Operation[None]:
        try:
            yield from in_worker(self.variant.remove, apart=True)
        except OSError as error:
            raise SandboxConnectionError(
                f"{self.id} has ended, but not all could be removed: {error}"
            ) from error
        _live.discard(self)

    def set_timeout(self, seconds: float) -> Operation[None]:
        """It ends that long from now, shorter or longer than before."""
        self.check_running(or_paused=True)
        seconds = check_seconds("seconds", seconds)
        why = f"the {seconds:g} s that set_timeout() gave it are over"
        yield from in_worker(lambda: self.variant.expire_in(seconds, why), apart=True)
        self.rescheduled(seconds)

    def pause(self) -> Operation[None]:
        """Stop all its processes until :meth:`resume`; to do so twice is once."""
        self.check_running(or_paused=True)
        yield from in_worker(lambda: self.variant.pause(on=True), apart=True)
        self.paused(on=True)

    def resume(self) -> Operation[None]:
        """Let its processes go on, if they do not."""
        self.check_running(or_paused=True)
        yield from in_worker(lambda: self.variant.pause(on=False), apart=True)
        self.paused(on=False)

    def set_tags(self, tags: Mapping[str, str]) -> Operation[None]:
        tags = check_str_mapping("tags", tags)
        if self.status is not SandboxStatus.CREATED:
            self.check_running(or_paused=True)
            yield from in_worker(lambda: self.variant.set_tags(tags), apart=True)
        self.tags = tags

    def network_log(self) -> Operation[list[NetworkAttempt]]:
        self.check_running(or_paused=True)
        return (yield from in_worker(self.variant.network_log, apart=True))

    @property
    def end_at(self) -> float | None:
        """Seconds since the epoch, by the clock as it is now."""
        return None if self._ends_at is None else time.time() + self._ends_at - time.monotonic()

    def record(self) -> Record:
        """What there is to know of it."""
        return Record(
            id=self.id,
            name=self.name,
            tags=dict(self.tags),
            settings=self.config.settings(),
            created_at=self.created_at or 0.0,
            time_left=None if self._ends_at is None else self._ends_at - time.monotonic(),
            isolation=self.variant.isolation,
            metadata=self.variant.metadata,
        )

    # What others do to it; in the I/O thread.

    def over(self, why: str) -> None:
        drive_in_loop(the_loop(), self.terminate(orderly=True, why=why), log_failure)

    def tagged(self, tags: Mapping[str, str]) -> None:
        self.tags = dict(tags)

    def paused(self, *, on: bool) -> None:
        with self._lock:
            if self.status in _ALIVE:
                self.status = SandboxStatus.PAUSED if on else SandboxStatus.RUNNING
            contexts = list(self._contexts.values())
        for held in contexts:
            held.kernel.hold(on=on)

    def rescheduled(self, time_left: float) -> None:
        self._ends_at = time.monotonic() + time_left

    def context_added(self, spec: ContextSpec) -> None:
        with self._lock:
            if spec.id not in self._contexts and self.status in _ALIVE:
                self._hold(spec)

    def context_deleted(self, context_id: str) -> None:
        with self._lock:
            held = self._contexts.pop(context_id, None)
        if held is not None:
            held.kernel.close(Inbox(), f"the context {held.context.name!r} was deleted", orderly=False)

    def check_running(self, *, or_paused: bool = False) -> None:
        """
        Raises:
            SandboxNotStartedError: it was not started yet, is paused, or has ended.
            SandboxConnectionError: it belongs to another process.
        """
        self._check_process()
        if self.status is SandboxStatus.CREATED:
            raise SandboxNotStartedError(f"{self.id} was not started: call start(), or use it with 'with'")
        if self.status is SandboxStatus.DETACHED:
            raise SandboxNotStartedError(f"{self.id} is not to be used from here: {self._why_ended}")
        if self.status is SandboxStatus.STOPPED:
            raise SandboxNotStartedError(f"{self.id} is terminated: {self._why_ended}")
        if self.status is SandboxStatus.PAUSED and not or_paused:
            raise SandboxNotStartedError(f"{self.id} is paused: call resume()")

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
        envs: Mapping[str, str] | None = None,
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
        environment = check_environment("envs", envs)
        held = self._resolve(context, language)
        if environment:
            self._check_can_set_environment(held)
        if any(run.kernel is held.kernel and not run.told for run in running_inside.get()):
            raise RuntimeError(
                f"run_code() on the context {held.context.name!r} from inside a callback of its own run"
                " would wait for itself; use another context"
            )
        return self._run(held, code, environment, seconds, listen=listen, allow_stdin=allow_stdin)

    def _check_can_set_environment(self, held: _Held) -> None:
        can = self.variant.own_capabilities.environment
        if not can:
            raise self.variant.refuse("set environment variables for one run (envs=)", can.reason)
        if held.context.language != "python":
            raise SandboxConfigurationError(
                f"envs= is for Python, and the context {held.context.name!r} speaks {held.context.language};"
                " create_context(env=...) sets environment variables for good"
            )

    def _run(
        self,
        held: _Held,
        code: str,
        environment: Mapping[str, str],
        seconds: float,
        *,
        listen: bool,
        allow_stdin: bool,
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
        inbox = Inbox(max(self.variant.max_output, LEAST_BACKLOG))
        envs = [[wire_path(name), wire_path(value)] for name, value in environment.items()]
        metadata = {TARGET: {"envs": envs}} if envs else None
        content = execution.content
        run = Run(held.kernel, content, seconds or None, inbox, metadata=metadata, listen=listen)
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
    def dropped_messages(self) -> dict[str, int]:
        """How many messages of its kernels were not believed, or not taken in, by why."""
        dropped: Counter[str] = Counter()
        for held in list(self._contexts.values()):
            dropped += held.kernel.dropped
        return dict(dropped)

    @property
    def background_output(self) -> Logs:
        logs = [held.kernel.background_output for held in list(self._contexts.values())]
        return Logs(_in_order(log.stdout for log in logs), _in_order(log.stderr for log in logs))

    # Files, commands and variables.

    @property
    def capabilities(self) -> Capabilities:
        """What it can do, as its kernel says it where that is known."""
        told = self.variant.own_capabilities
        held = self._contexts.get(DEFAULT)
        info = None if held is None else held.kernel.info
        if info is None or info.language != "python":
            return told
        has_subshells = SUBSHELLS in info.supported_features
        return replace(told, subshells=Capability(True) if has_subshells else NO_SUBSHELLS)

    def guest(self, context: Context | str | None = None) -> Guest:
        """What serves the files and commands of *context*: its own kernel, if that speaks Python.

        Raises:
            SandboxNotStartedError: the sandbox is not running.
            ContextNotFoundError: there is no such context.
        """
        self.check_running()
        held = self._resolve(context, None)
        if held.context.language == "python":
            return Guest(held.kernel, None)
        return Guest(self._default_context("python").kernel, held.context.cwd or "")

    def python(self, context: Context | str | None, what: str) -> tuple[Context, Guest]:
        """A context that speaks Python, and what serves it; *what* is there for Python only.

        Raises:
            SandboxConfigurationError: it speaks another language.
        """
        self.check_running()
        held = self._resolve(context, None)
        if held.context.language != "python":
            raise SandboxConfigurationError(
                f"{what} are for Python, and the context {held.context.name!r} speaks {held.context.language}"
            )
        return held.context, Guest(held.kernel, None)

    # Contexts.

    def create_context(
        self, name: str | None, *, language: str | None, cwd: str | None, env: Mapping[str, str] | None
    ) -> Operation[Context]:
        self.check_running()
        for what, value in (("name", name), ("language", language), ("cwd", cwd)):
            check_str(what, value)
        held = self._new_context(name, language, cwd, check_environment("env", env))
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

    def kernels(self) -> list[tuple[ContextSpec, Kernel]]:
        """What runs each context, the default one first, in the same order for every program."""
        contexts = sorted(self._contexts.values(), key=lambda held: (held.spec.id != DEFAULT, held.spec.id))
        return [(held.spec, held.kernel) for held in contexts]

    def make_again(self, spec: ContextSpec) -> Operation[Context]:
        """A context as *spec* says, which is another sandbox's; one of those that are there by themselves.

        Raises:
            ValueError: there is no such kernel.
            SandboxConnectionError: it did not start.
        """
        if spec.id == DEFAULT or spec.id.startswith(f"{DEFAULT}-"):
            held = self._default_context(None if spec.id == DEFAULT else spec.kernel_name)
            yield from self._started(held)
            return held.context
        context = yield from self.create_context(
            spec.name, language=spec.kernel_name, cwd=spec.cwd, env=spec.env
        )
        return context

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
        yield from in_worker(lambda: self.variant.delete_context(held.context.id))

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
        context_id = DEFAULT if is_default else f"{DEFAULT}-{kernel_name}"
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
            if name == DEFAULT or name.startswith(f"{DEFAULT}-"):
                raise ValueError(f"the name {name!r} is kept for the contexts of runs that name none")
            if any(name in (held.context.name, held.context.id) for held in self._contexts.values()):
                raise ValueError(f"there is a context {name!r} already")
            return self._add(context_id, name, kernel_name, cwd, env)

    def _add(
        self, context_id: str, name: str, kernel_name: str, cwd: str | None, env: Mapping[str, str]
    ) -> _Held:
        if self.status is not SandboxStatus.RUNNING:
            raise SandboxNotStartedError(f"{self.id} is terminated: {self._why_ended}")
        language = self.variant.language_of(kernel_name)
        return self._hold(ContextSpec(context_id, name, language, kernel_name, cwd, dict(env)))

    def _hold(self, spec: ContextSpec) -> _Held:
        limits = Limits(grace=self.config.interrupt_grace, start=self.config.start_timeout)
        launch = self.variant.launcher(spec)
        kernel = Kernel(the_loop(), launch, f"the kernel {spec.kernel_name!r}", limits)
        held = self._contexts[spec.id] = _Held(spec, kernel)
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


def _until_ready(inbox: Inbox) -> Operation[None]:
    event = yield from next_event(inbox)
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
        event = yield from next_event(inbox)
        assert isinstance(event, Ended)


def _in_order(streams: Iterable[Iterable[OutputMessage]]) -> list[OutputMessage]:
    return sorted((message for stream in streams for message in stream), key=lambda m: m.timestamp)


_live: set[Core] = set()


def live_cores() -> list[Core]:
    """The sandboxes of this process that have not ended."""
    return list(_live)


def _live_core(sandbox_id: str) -> Core | None:
    for core in live_cores():
        if core.id == sandbox_id and core.status in _ALIVE and core.is_of_this_process:
            return core
    return None


def _leave_what_was_attached(core: Core | None, error: Exception | None) -> None:
    if core is not None:
        drive_in_loop(the_loop(), core.program_ends(), log_failure)


def find(variant_class: type[Variant], sandbox_id: str, options: Mapping[str, object]) -> Operation[Core]:
    """The sandbox of that id: one of this process, or one that others made.

    Raises:
        SandboxNotFoundError: there is none.
    """
    core = _live_core(sandbox_id)
    if core is not None:
        return core
    made = [False]

    def attach() -> Core:  # in the worker thread, where one is done after the other
        core = _live_core(sandbox_id)
        if core is None:
            variant, record = variant_class.attach(sandbox_id, options)
            core = _live_core(record.id)  # which may have been another name of it
            if core is not None:
                variant.detach(keep=True)
                return core
            core = Core(variant, variant.config, record.name, record.tags)
            core._attach(record)
            made[0] = True
        return core

    try:
        core = yield from in_worker(attach)
    except BaseException:  # given up: nobody will let go of it
        the_loop().run_blocking(lambda: _live_core(sandbox_id) if made[0] else None, _leave_what_was_attached)
        raise
    return core


def find_all(
    variant_classes: Iterable[type[Variant]], tags: Mapping[str, str] | None
) -> Operation[list[tuple[type[Variant], Record]]]:
    """Every sandbox of this user that has all *tags*: those of this process, and those in a registry."""
    wanted = check_str_mapping("tags", tags).items()
    found: list[tuple[type[Variant], Record]] = []
    for variant_class in variant_classes:
        if variant_class.has_registry:
            records = list((yield from in_worker(variant_class.all, apart=True)))
            records += [core.record() for core in _running_cores() if _is_only_here(core, variant_class)]
        else:
            records = [core.record() for core in _running_cores() if type(core.variant) is variant_class]
        found += [(variant_class, record) for record in records if wanted <= record.tags.items()]
    return found


def _running_cores() -> list[Core]:
    """Without those that have ended, and of which not all could be removed."""
    return [core for core in live_cores() if core.status in _ALIVE]


def _is_only_here(core: Core, variant_class: type[Variant]) -> bool:
    """It has the name of a variant with a registry, and is in none."""
    return core.variant.name == variant_class.name and not core.variant.has_registry


def _let_go() -> object:
    kept = list(_live)
    _live.clear()
    return kept


in_forked_child(_let_go)
