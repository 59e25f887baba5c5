"""The blocking front: each method waits in the caller's thread for what the operations ask for.

It needs no event loop and disturbs none, so it works in a notebook cell and from any thread.
"""

from __future__ import annotations

import atexit
import builtins
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from code_sandboxes import operations
from code_sandboxes.errors import SandboxError
from code_sandboxes.front import Front, finding, known_variant, listing
from code_sandboxes.info import SandboxInfo, SandboxStatus, SandboxVariant
from code_sandboxes.operations import (
    LEFT,
    SILENT,
    Ask,
    Emit,
    Handlers,
    Operation,
    OutputHandler,
    Step,
    Wait,
    inside,
)
from code_sandboxes.results import (
    Context,
    ExecutionError,
    ExecutionResult,
    InputRequest,
    OutputMessage,
    Result,
)

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["CodeStream", "LocalEvalSandbox", "LocalJupyterSandbox", "Sandbox"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
SandboxT = TypeVar("SandboxT", bound="Sandbox")


class Sandbox(Front):
    """A place where code can run; :meth:`create` gives a running one.

    ``with`` terminates it at the end. It may be used from many threads: runs on one context queue in order,
    runs on different contexts go side by side.
    """

    @classmethod
    def create(
        cls,
        variant: SandboxVariant | str | None = None,
        *,
        config: SandboxConfig | None = None,
        timeout: float | None = None,
        name: str | None = None,
        environment: str | None = None,
        gpu: str | None = None,
        cpu: float | None = None,
        memory: int | None = None,
        env: Mapping[str, str] | None = None,
        network_policy: str | None = None,
        allowed_hosts: builtins.list[str] | None = None,
        tags: Mapping[str, str] | None = None,
        snapshot_name: str | None = None,
        **options: object,
    ) -> Sandbox:
        """A running sandbox.

        Args:
            variant: where; by default what ``CODE_SANDBOXES_VARIANT`` says, else ``local-jupyter``.
            config: settings; the parameters below override the same setting.
            timeout: seconds that a run may take; 0 for no limit.
            name: for people.
            environment: a prepared environment, where the variant has some.
            gpu: its type.
            cpu: number of CPUs.
            memory: MiB.
            env: environment variables; the program's own are not passed on.
            network_policy: ``inherit``, ``all``, ``none`` or ``allowlist``.
            allowed_hosts: read under ``allowlist`` only.
            tags: to find it by.
            snapshot_name: what to start from, where the variant has snapshots.
            options: those of the variant.

        Raises:
            ValueError: there is no such variant.
            TypeError: an option is unknown, or a parameter is of the wrong type.
            SandboxConfigurationError: the variant cannot honour a setting.
            SandboxConnectionError: its kernel did not start; what it said is in the message.
        """
        sandbox = _CLASSES[known_variant(variant)](
            config=config,
            timeout=timeout,
            name=name,
            environment=environment,
            gpu=gpu,
            cpu=cpu,
            memory=memory,
            env=env,
            network_policy=network_policy,
            allowed_hosts=allowed_hosts,
            tags=tags,
            snapshot_name=snapshot_name,
            **options,
        )
        sandbox.start()
        return sandbox

    @staticmethod
    def from_id(id: str, **options: object) -> Sandbox:
        """The sandbox of that id, with its variables, contexts and files; this program is attached to it.

        Any process of this user may have made it. One that is attached to this process already is the same.

        Args:
            id: what :attr:`id` says, or :meth:`list`.
            options: credentials, where the variant needs them.

        Raises:
            SandboxNotFoundError: it has ended, or never was; or it is a ``local-eval`` of another process.
        """
        core = _drive(finding(id, options))
        return _CLASSES[core.variant.name]._around(core)

    @staticmethod
    def list(
        variant: SandboxVariant | str | None = None, tags: Mapping[str, str] | None = None
    ) -> builtins.list[SandboxInfo]:
        """Every running sandbox of this user, whichever process made it; ``local-eval`` those of this one.

        Args:
            variant: only of this one.
            tags: only those that have all of these.

        Raises:
            ValueError: there is no such variant.
        """
        return _drive(listing(variant, tags))

    def __reduce__(self) -> tuple[Callable[[str], Sandbox], tuple[str]]:
        self._core.check_running()
        return Sandbox.from_id, (self.id,)

    # Life.

    def start(self: SandboxT) -> SandboxT:
        """Start it, if :meth:`create` did not.

        Raises:
            SandboxNotStartedError: it was started before.
            SandboxConnectionError: its kernel did not start; nothing is left of it.
        """
        _drive(self._core.start())
        return self

    def terminate(self) -> bool:
        """End it in an orderly way; a run that is on is cut short. Returns whether it was running."""
        return _drive(self._core.terminate(orderly=True))

    stop = close = terminate

    def kill(self) -> bool:
        """End it at once. Returns whether it was running."""
        return _drive(self._core.terminate(orderly=False, why="it was killed"))

    def detach(self) -> None:
        """Let go of it, and leave it running: :meth:`from_id` finds it again, from any process.

        It ends at the end of its lifetime, after its idle time, or when somebody terminates it. A run that is
        on goes on; its result here is ``connection_lost``.

        Raises:
            SandboxConfigurationError: its code runs in this process.
        """
        _drive(self._core.detach())

    def set_timeout(self, seconds: float) -> None:
        """Let it end that long from now, shorter or longer than before; not the timeout of a run."""
        _drive(self._core.set_timeout(seconds))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Replace its tags."""
        _drive(self._core.set_tags(tags))

    def restart(self) -> None:
        """Start all its kernels afresh; their variables are gone, files stay."""
        _drive(self._core.restart())

    def __enter__(self: SandboxT) -> SandboxT:
        if self._core.status is SandboxStatus.CREATED:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._core.is_of_this_process:  # a forked child leaves the block too; it ends nothing
            self.terminate()

    # Code.

    def run_code(
        self,
        code: str,
        *,
        language: str | None = None,
        context: Context | str | None = None,
        on_stdout: OutputHandler | None = None,
        on_stderr: OutputHandler | None = None,
        on_result: Callable[[Result], object] | None = None,
        on_error: Callable[[ExecutionError], object] | None = None,
        on_input: Callable[[InputRequest], str] | None = None,
        timeout: float | None = None,
    ) -> ExecutionResult:
        """Run *code* and return everything it produced; errors of the code are in the result.

        Callbacks are called in this thread, while the code runs. If one raises, the run goes on to its end
        without callbacks, and then the exception is raised.

        Args:
            code: source text; magics and top-level ``await`` work where the kernel knows them.
            language: a kernel's name or the language it declares; not together with *context*.
            context: where to run it, an object, id or name; by default the first one.
            on_stdout: called with each line as soon as it ends.
            on_stderr: the same for standard error.
            on_result: called with each display and with the value of the last expression.
            on_error: called with the error of the run.
            on_input: answers ``input()``; without it ``input()`` fails at once.
            timeout: seconds from when the kernel gets it, without those that ``input()`` waits; 0 for no
                limit; by default the setting of the sandbox.

        Raises:
            SandboxNotStartedError: the sandbox is not running.
            ContextNotFoundError: there is no such context.
            ValueError: no kernel for that language; or *context* and *language* together.
            RuntimeError: called from a callback of a run on the same context.
        """
        handlers = Handlers(on_stdout, on_stderr, on_result, on_error, on_input).check()
        operation = self._core.run_code(
            code,
            language=language,
            context=context,
            timeout=timeout,
            listen=handlers.listen,
            allow_stdin=on_input is not None,
        )
        return _drive(operation, handlers)

    def run_code_streaming(
        self,
        code: str,
        *,
        language: str | None = None,
        context: Context | str | None = None,
        on_input: Callable[[InputRequest], str] | None = None,
        timeout: float | None = None,
    ) -> CodeStream:
        """Iterate over what *code* produces, live and in order; see :class:`CodeStream`."""
        operation = self._core.run_code(
            code,
            language=language,
            context=context,
            timeout=timeout,
            listen=True,
            allow_stdin=on_input is not None,
        )
        return CodeStream(operation, Handlers(on_input=on_input).check())

    def interrupt(self, context: Context | str | None = None) -> bool:
        """Interrupt what runs, as Ctrl-C does; code that does not stop within the grace is killed.

        Returns:
            Whether something was running.
        """
        return self._core.interrupt(context)

    # Contexts.

    def create_context(
        self,
        name: str | None = None,
        *,
        language: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Context:
        """A new kernel, with variables of its own.

        Raises:
            ValueError: the name is taken, or there is no kernel for that language.
            SandboxConnectionError: the kernel did not start; what it said is in the message.
        """
        return _drive(self._core.create_context(name, language=language, cwd=cwd, env=env))

    def list_contexts(self) -> builtins.list[Context]:
        """The contexts, the default one first."""
        return self._core.list_contexts()

    def restart_context(self, context: Context | str) -> None:
        """Start its kernel afresh: its variables are gone, a run that is on is cut short."""
        _drive(self._core.restart_context(context))

    def delete_context(self, context: Context | str) -> None:
        """End its kernel."""
        _drive(self._core.delete_context(context))


class LocalEvalSandbox(Sandbox):
    """Code in threads of this process, with nothing around it."""

    _variant = SandboxVariant.LOCAL_EVAL


class LocalJupyterSandbox(Sandbox):
    """Kernels as processes on this machine."""

    _variant = SandboxVariant.LOCAL_JUPYTER


class CodeStream:
    """What a run produces: ``OutputMessage``, ``Result`` and ``ExecutionError``, live and in order.

    The run begins with the iteration. Leaving the loop early interrupts it. Afterwards :attr:`result` holds
    the :class:`ExecutionResult`.
    """

    def __init__(self, operation: Operation[ExecutionResult], handlers: Handlers) -> None:
        self._operation = operation
        self._handlers = handlers
        self._result: ExecutionResult | None = None
        self._begun = False
        self._pid = os.getpid()

    @property
    def result(self) -> ExecutionResult:
        """
        Raises:
            RuntimeError: the run is not over yet.
        """
        if self._result is None:
            raise RuntimeError("the run is not over: iterate over it to its end, or leave the loop")
        return self._result

    def __iter__(self) -> Iterator[OutputMessage | Result | ExecutionError]:
        if self._begun:
            raise RuntimeError("a run can be iterated over only once")
        self._begun = True
        try:
            step = next(self._operation)
            while True:
                if isinstance(step, Emit):
                    try:
                        yield step.output
                    except GeneratorExit:
                        self._leave()
                        raise
                    step = self._operation.send(None)
                else:
                    step = _advance(self._operation, step, self._handlers)
        except StopIteration as stop:
            self._result = stop.value

    def _leave(self) -> None:
        """Interrupt the run and follow it to its end; in a forked child it is not ours."""
        if os.getpid() != self._pid:
            return
        try:
            step = self._operation.throw(LEFT)
            while True:
                step = _advance(self._operation, step, self._handlers)
        except StopIteration as stop:
            self._result = stop.value


def _drive(operation: Operation[T], handlers: Handlers = SILENT) -> T:
    """Run *operation* to its end, blocking this thread where it waits."""
    try:
        step = next(operation)
        while True:
            step = _advance(operation, step, handlers)
    except StopIteration as stop:
        value: T = stop.value
        return value


def _advance(operation: Operation[T], step: Step, handlers: Handlers) -> Step:
    try:
        answer = _perform(step, handlers)
    except BaseException as error:  # the operation decides what becomes of it
        return operation.throw(error)
    return operation.send(answer)


def _perform(step: Step, handlers: Handlers) -> object:
    if isinstance(step, Wait):
        step.inbox.wait(None if step.until is None else step.until - time.monotonic())
        return None
    with inside(step.run):
        return handlers.call(step.request if isinstance(step, Ask) else step.output)


_CLASSES = {each._variant: each for each in (LocalEvalSandbox, LocalJupyterSandbox)}


def _end_all() -> None:
    """At the end of the program: nothing that it made outlives it."""
    for core in operations.live_cores():
        try:
            _drive(core.program_ends())
        except SandboxError as error:  # the others must end all the same
            _log.error("%s", error)


atexit.register(_end_all)
