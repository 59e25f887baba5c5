"""The blocking front: each method waits in the caller's thread for what the operations ask for.

It needs no event loop and disturbs none, so it works in a notebook cell and from any thread.
"""

from __future__ import annotations

import atexit
import builtins
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from code_sandboxes import operations, package_operations, variable_operations
from code_sandboxes.blocking import advance, drive
from code_sandboxes.errors import SandboxError
from code_sandboxes.front import Front, finding, known_variant, listing, listing_environments
from code_sandboxes.info import GPUType, SandboxEnvironment, SandboxInfo, SandboxStatus, SandboxVariant
from code_sandboxes.network_info import NetworkAttempt
from code_sandboxes.process_info import CommandResult
from code_sandboxes.results import (
    Context,
    ExecutionError,
    ExecutionResult,
    InputRequest,
    OutputMessage,
    Result,
)
from code_sandboxes.steps import LEFT, Emit, Handlers, Operation, OutputHandler

if TYPE_CHECKING:
    from code_sandboxes.commands import SandboxCommands
    from code_sandboxes.config import SandboxConfig
    from code_sandboxes.files import SandboxFilesystem
    from code_sandboxes.snapshots import SnapshotInfo

__all__ = [
    "CodeStream",
    "DatalayerSandbox",
    "JupyterGatewaySandbox",
    "LocalDockerSandbox",
    "LocalEvalSandbox",
    "LocalJupyterSandbox",
    "Sandbox",
]

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
        gpu: GPUType | str | None = None,
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
            variant: where; by default what ``CODE_SANDBOXES_VARIANT`` says, else ``datalayer-runtime`` if
                there is a ``DATALAYER_API_KEY``, else ``local-jupyter``.
            config: settings; the parameters below override the same setting.
            timeout: seconds that a run may take; 0 for no limit.
            name: for people.
            environment: a prepared environment, where the variant has some, see :meth:`list_environments`.
            gpu: its type: a :class:`GPUType`, or the words of another one.
            cpu: number of CPUs.
            memory: MiB.
            env: environment variables; the program's own are not passed on.
            network_policy: ``inherit``, ``all``, ``none`` or ``allowlist``.
            allowed_hosts: read under ``allowlist`` only.
            tags: to find it by.
            snapshot_name: the snapshot of this variant to start from, see :meth:`create_snapshot`.
            options: those of the variant.

        Raises:
            ValueError: there is no such variant.
            TypeError: an option is unknown, or a parameter is of the wrong type.
            SandboxConfigurationError: the variant cannot honour a setting.
            SandboxConnectionError: its kernel did not start; what it said is in the message.
            SandboxSnapshotError: there is no such snapshot, or it cannot be restored.
            SandboxAuthenticationError: a server does not take the token, or wants one.
            SandboxQuotaExceededError: there are as many as there may be, or no credits for it.
            SandboxResourceError: what was asked for is not to be had now, or is not what came.
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
        core = drive(finding(id, options))
        return _CLASSES[core.variant.name]._around(core)

    @staticmethod
    def list(
        variant: SandboxVariant | str | None = None, tags: Mapping[str, str] | None = None
    ) -> builtins.list[SandboxInfo]:
        """Every running sandbox of this user, whichever process made it; ``local-eval`` those of this one.

        Args:
            variant: only of this one.
            tags: only those that have all of these. Datalayer keeps none: of its runtimes, those of this
                program alone have any here.

        Raises:
            ValueError: there is no such variant.
        """
        return drive(listing(variant, tags))

    @staticmethod
    def list_environments(
        variant: SandboxVariant | str | None = None, **options: object
    ) -> builtins.list[SandboxEnvironment]:
        """What ``environment=`` can choose from.

        Args:
            variant: by default the same as in :meth:`create`.
            options: credentials, where the variant needs them.

        Raises:
            ValueError: there is no such variant.
            SandboxConfigurationError: it has no environments.
        """
        return drive(listing_environments(variant, options))

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
        drive(self._core.start())
        return self

    def terminate(self) -> bool:
        """End it in an orderly way; a run that is on is cut short. Returns whether it was running."""
        return drive(self._core.terminate(orderly=True))

    stop = close = terminate

    def kill(self) -> bool:
        """End it at once. Returns whether it was running."""
        return drive(self._core.terminate(orderly=False, why="it was killed"))

    def detach(self) -> None:
        """Let go of it, and leave it running: :meth:`from_id` finds it again, from any process.

        It ends at the end of its lifetime, after its idle time, or when somebody terminates it. A run that is
        on goes on; its result here is ``connection_lost``.

        Raises:
            SandboxConfigurationError: its code runs in this process.
        """
        drive(self._core.detach())

    def set_timeout(self, seconds: float) -> None:
        """Let it end that long from now, shorter or longer than before; not the timeout of a run."""
        drive(self._core.set_timeout(seconds))

    def pause(self) -> None:
        """Let nothing in it go on until :meth:`resume`; variables, files and what runs stay as they are.

        Using its code, files and commands raises meanwhile. The time does not count against the timeout of a
        run, but against the lifetime of the sandbox and its idle time.

        Raises:
            SandboxConfigurationError: its processes cannot be stopped together.
            SandboxConnectionError: one of them does not stop.
        """
        drive(self._core.pause())

    def resume(self) -> None:
        """Let all of it go on, if it was paused."""
        drive(self._core.resume())

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Replace its tags."""
        drive(self._core.set_tags(tags))

    def network_log(self) -> builtins.list[NetworkAttempt]:
        """What its code tried to reach, allowed or refused, the oldest first; the newest 10,000 are kept.

        It is what the way out of the sandbox was asked for; there is no other, and who tries one fails.

        Raises:
            SandboxConfigurationError: its network policy is neither ``none`` nor ``allowlist``.
        """
        return drive(self._core.network_log())

    def restart(self) -> None:
        """Start all its kernels afresh; their variables are gone, files stay."""
        drive(self._core.restart())

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
        envs: Mapping[str, str] | None = None,
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
            envs: environment variables that hold until it ends, on top of those of the sandbox; commands and
                threads that run meanwhile see them too.
            timeout: seconds from when the kernel gets it, without those that ``input()`` waits; 0 for no
                limit; by default the setting of the sandbox.

        Raises:
            SandboxNotStartedError: the sandbox is not running.
            ContextNotFoundError: there is no such context.
            SandboxConfigurationError: *envs* where the variant or the language has no way to set them.
            ValueError: no kernel for that language; or *context* and *language* together.
            RuntimeError: called from a callback of a run on the same context.
        """
        handlers = Handlers(on_stdout, on_stderr, on_result, on_error, on_input).check()
        operation = self._core.run_code(
            code,
            language=language,
            context=context,
            envs=envs,
            timeout=timeout,
            listen=handlers.listen,
            allow_stdin=on_input is not None,
        )
        return drive(operation, handlers)

    def run_code_streaming(
        self,
        code: str,
        *,
        language: str | None = None,
        context: Context | str | None = None,
        on_input: Callable[[InputRequest], str] | None = None,
        envs: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> CodeStream:
        """Iterate over what *code* produces, live and in order; see :class:`CodeStream`."""
        operation = self._core.run_code(
            code,
            language=language,
            context=context,
            envs=envs,
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

    # Variables.

    def get_variable(self, name: str, *, context: Context | str | None = None) -> Any:
        """The value of a variable, as a copy; works while code runs.

        JSON types (dict with str as keys, list, str, int, float, bool, None; subclasses of them arrive as
        these, a tuple as a list), bytes, numpy arrays and scalars of any dtype but objects, and pandas or
        polars DataFrames, for which pyarrow is needed on both sides (``code-sandboxes[arrow]``).

        Raises:
            VariableNotFoundError: there is none of that name.
            SandboxSerializationError: it is of another type, or has something of another type in it.
            SandboxConfigurationError: the context speaks another language than Python.
            ValueError: that is no name of a variable.
        """
        return drive(variable_operations.get_variable(self._core, name, context))

    def set_variable(self, name: str, value: object, *, context: Context | str | None = None) -> None:
        """Set a variable to a copy of *value*; what that may be says :meth:`get_variable`.

        Raises:
            SandboxSerializationError: it is of another type, or has something of another type in it.
            SandboxConfigurationError: the context speaks another language than Python.
            ValueError: that is no name of a variable.
        """
        drive(variable_operations.set_variables(self._core, {name: value}, context))

    def set_variables(self, variables: Mapping[str, object], *, context: Context | str | None = None) -> None:
        """Set several variables, all or none; see :meth:`set_variable`."""
        drive(variable_operations.set_variables(self._core, variables, context))

    # Packages.

    def install_packages(
        self,
        packages: Sequence[str],
        *,
        timeout: float | None = None,
        context: Context | str | None = None,
    ) -> CommandResult:
        """Install Python packages for the interpreter of the kernel, with pip; then they can be imported.

        Args:
            packages: as pip takes them: names, versions, extras, URLs, paths in the sandbox; no options.
            timeout: seconds; 0 for no limit; by default 600.

        Raises:
            SandboxExecutionError: pip failed; what it said is in the message, all of it in ``result``.
            SandboxTimeoutError: it took too long.
            SandboxConfigurationError: the context speaks another language than Python.
            ValueError: one of them is an option, or nothing at all.
        """
        return drive(package_operations.install_packages(self._core, packages, timeout, context))

    def install_requirements(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        context: Context | str | None = None,
    ) -> CommandResult:
        """Install what a requirements file lists; see :meth:`install_packages`.

        Args:
            path: of a file on this machine; other files that it names are looked for in the sandbox.
            timeout: seconds; 0 for no limit; by default 600.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return drive(package_operations.install_requirements(self._core, path, timeout, context))

    # Snapshots.

    def create_snapshot(self, name: str) -> SnapshotInfo:
        """Keep its files and variables as they are now, for ``create(snapshot_name=...)``.

        It waits its turn as a run does: code that runs comes to its end, and no other runs meanwhile. Threads
        of the code and commands go on; what they change may be found in the snapshot or not.

        Files are those that are the sandbox's own: all that was written below ``/``, if it has that for
        itself, else in its home; nothing of what is mounted. Variables are those of all Python contexts, with
        the functions and classes that were defined in them; what they share they share again, also between
        variables. What cannot be carried (open files, generators, locks, more than 4 GiB) is in
        ``not_carried`` with its reason. Running commands, threads, what code has done to its environment
        variables and working directory, and the history are not carried.

        Args:
            name: to find it by; unique among the snapshots of a variant.

        Raises:
            SandboxSnapshotError: there is one of that name, or no room for it; nothing is left of it.
            SandboxConfigurationError: the variant has no snapshots.
            ValueError: no snapshot can have that name.
            RuntimeError: called from a callback of a run.
        """
        from code_sandboxes import snapshot_operations

        return drive(snapshot_operations.create_snapshot(self._core, name))

    def list_snapshots(self) -> builtins.list[SnapshotInfo]:
        """The snapshots of this variant, of whichever sandbox, the oldest first."""
        from code_sandboxes import snapshot_operations

        return drive(snapshot_operations.list_snapshots(self._core))

    def delete_snapshot(self, id: str) -> None:
        """Delete a snapshot, by its id or name; sandboxes that were made from it stay as they are.

        Raises:
            SandboxSnapshotError: there is no such snapshot.
        """
        from code_sandboxes import snapshot_operations

        drive(snapshot_operations.delete_snapshot(self._core, id))

    # Files.

    @property
    def files(self) -> SandboxFilesystem:
        """Its files; they can be used while code runs."""
        from code_sandboxes.files import SandboxFilesystem  # a tenth of what the whole package takes

        return SandboxFilesystem(self._core)

    @property
    def commands(self) -> SandboxCommands:
        """Its commands; they work while code runs."""
        from code_sandboxes.commands import SandboxCommands

        return SandboxCommands(self._core)

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
        return drive(self._core.create_context(name, language=language, cwd=cwd, env=env))

    def list_contexts(self) -> builtins.list[Context]:
        """The contexts, the default one first."""
        return self._core.list_contexts()

    def restart_context(self, context: Context | str) -> None:
        """Start its kernel afresh: its variables are gone, a run that is on is cut short."""
        drive(self._core.restart_context(context))

    def delete_context(self, context: Context | str) -> None:
        """End its kernel."""
        drive(self._core.delete_context(context))


class LocalEvalSandbox(Sandbox):
    """Code in threads of this process, with nothing around it."""

    _variant = SandboxVariant.LOCAL_EVAL


class LocalJupyterSandbox(Sandbox):
    """Kernels as processes on this machine."""

    _variant = SandboxVariant.LOCAL_JUPYTER


class LocalDockerSandbox(Sandbox):
    """Kernels in a container on this machine."""

    _variant = SandboxVariant.LOCAL_DOCKER


class JupyterGatewaySandbox(Sandbox):
    """Kernels of any Jupyter server."""

    _variant = SandboxVariant.JUPYTER_GATEWAY


class DatalayerSandbox(Sandbox):
    """Kernels in a runtime of Datalayer's cloud."""

    _variant = SandboxVariant.DATALAYER_RUNTIME


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
                    step = advance(self._operation, step, self._handlers)
        except StopIteration as stop:
            self._result = stop.value

    def _leave(self) -> None:
        """Interrupt the run and follow it to its end; in a forked child it is not ours."""
        if os.getpid() != self._pid:
            return
        try:
            step = self._operation.throw(LEFT)
            while True:
                step = advance(self._operation, step, self._handlers)
        except StopIteration as stop:
            self._result = stop.value


_CLASSES = {
    each._variant: each
    for each in (
        DatalayerSandbox,
        JupyterGatewaySandbox,
        LocalDockerSandbox,
        LocalEvalSandbox,
        LocalJupyterSandbox,
    )
}


def _end_all() -> None:
    """At the end of the program: nothing that it made outlives it."""
    for core in operations.live_cores():
        try:
            drive(core.program_ends())
        except SandboxError as error:  # the others must end all the same
            _log.error("%s", error)


atexit.register(_end_all)
