"""The asyncio front: the same names as the blocking one, awaited; no method blocks the event loop.

What each method means is documented there; the documentation is taken over.

What the blocking front imports on use is imported with this module: on use it would hold up the loop.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import code_sandboxes.config
import code_sandboxes.variants.eval
import code_sandboxes.variants.jupyter  # noqa: F401  (see above)
from code_sandboxes import package_operations, snapshot_operations, variable_operations
from code_sandboxes.async_commands import AsyncSandboxCommands
from code_sandboxes.async_files import AsyncSandboxFilesystem
from code_sandboxes.awaiting import documented_by as _documented_by, drive, resumption
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
from code_sandboxes.sandbox import CodeStream, Sandbox
from code_sandboxes.snapshots import SnapshotInfo
from code_sandboxes.steps import LEFT, Emit, Handlers, Operation, OutputHandler

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = [
    "AsyncCodeStream",
    "AsyncDatalayerSandbox",
    "AsyncJupyterGatewaySandbox",
    "AsyncLocalDockerSandbox",
    "AsyncLocalEvalSandbox",
    "AsyncLocalJupyterSandbox",
    "AsyncSandbox",
]

T = TypeVar("T")
AsyncSandboxT = TypeVar("AsyncSandboxT", bound="AsyncSandbox")


class AsyncSandbox(Front):
    """A place where code can run; ``await AsyncSandbox.create()`` gives a running one.

    ``async with`` terminates it at the end. Callbacks may be plain functions or coroutine functions. A
    cancelled ``run_code()`` interrupts the code, and leaves the kernel ready for the next.
    """

    @classmethod
    @_documented_by(Sandbox.create)
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
    ) -> _Starting:
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
        return _Starting(sandbox)

    @staticmethod
    @_documented_by(Sandbox.from_id)
    async def from_id(id: str, **options: object) -> AsyncSandbox:
        core = await drive(finding(id, options))
        return _CLASSES[core.variant.name]._around(core)

    @staticmethod
    @_documented_by(Sandbox.list)
    async def list(
        variant: SandboxVariant | str | None = None, tags: Mapping[str, str] | None = None
    ) -> builtins.list[SandboxInfo]:
        return await drive(listing(variant, tags))

    @staticmethod
    @_documented_by(Sandbox.list_environments)
    async def list_environments(
        variant: SandboxVariant | str | None = None, **options: object
    ) -> builtins.list[SandboxEnvironment]:
        return await drive(listing_environments(variant, options))

    def __reduce__(self) -> tuple[Callable[[str], AsyncSandbox], tuple[str]]:
        self._core.check_running()
        return _from_id, (self.id,)

    # Life.

    @_documented_by(Sandbox.start)
    async def start(self: AsyncSandboxT) -> AsyncSandboxT:
        await drive(self._core.start())
        return self

    @_documented_by(Sandbox.terminate)
    async def terminate(self) -> bool:
        return await drive(self._core.terminate(orderly=True))

    stop = close = terminate

    @_documented_by(Sandbox.kill)
    async def kill(self) -> bool:
        return await drive(self._core.terminate(orderly=False, why="it was killed"))

    @_documented_by(Sandbox.detach)
    async def detach(self) -> None:
        await drive(self._core.detach())

    @_documented_by(Sandbox.set_timeout)
    async def set_timeout(self, seconds: float) -> None:
        await drive(self._core.set_timeout(seconds))

    @_documented_by(Sandbox.pause)
    async def pause(self) -> None:
        await drive(self._core.pause())

    @_documented_by(Sandbox.resume)
    async def resume(self) -> None:
        await drive(self._core.resume())

    @_documented_by(Sandbox.set_tags)
    async def set_tags(self, tags: Mapping[str, str]) -> None:
        await drive(self._core.set_tags(tags))

    @_documented_by(Sandbox.network_log)
    async def network_log(self) -> builtins.list[NetworkAttempt]:
        return await drive(self._core.network_log())

    @_documented_by(Sandbox.restart)
    async def restart(self) -> None:
        await drive(self._core.restart())

    async def __aenter__(self: AsyncSandboxT) -> AsyncSandboxT:
        if self._core.status is SandboxStatus.CREATED:
            await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.terminate()

    # Code.

    @_documented_by(Sandbox.run_code)
    async def run_code(
        self,
        code: str,
        *,
        language: str | None = None,
        context: Context | str | None = None,
        on_stdout: OutputHandler | None = None,
        on_stderr: OutputHandler | None = None,
        on_result: Callable[[Result], object] | None = None,
        on_error: Callable[[ExecutionError], object] | None = None,
        on_input: Callable[[InputRequest], str | Awaitable[str]] | None = None,
        envs: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> ExecutionResult:
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
        return await drive(operation, handlers)

    @_documented_by(Sandbox.run_code_streaming)
    def run_code_streaming(
        self,
        code: str,
        *,
        language: str | None = None,
        context: Context | str | None = None,
        on_input: Callable[[InputRequest], str | Awaitable[str]] | None = None,
        envs: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> AsyncCodeStream:
        operation = self._core.run_code(
            code,
            language=language,
            context=context,
            envs=envs,
            timeout=timeout,
            listen=True,
            allow_stdin=on_input is not None,
        )
        return AsyncCodeStream(operation, Handlers(on_input=on_input).check())

    @_documented_by(Sandbox.interrupt)
    async def interrupt(self, context: Context | str | None = None) -> bool:
        return self._core.interrupt(context)

    # Variables.

    @_documented_by(Sandbox.get_variable)
    async def get_variable(self, name: str, *, context: Context | str | None = None) -> Any:
        return await drive(variable_operations.get_variable(self._core, name, context))

    @_documented_by(Sandbox.set_variable)
    async def set_variable(self, name: str, value: object, *, context: Context | str | None = None) -> None:
        await drive(variable_operations.set_variables(self._core, {name: value}, context))

    @_documented_by(Sandbox.set_variables)
    async def set_variables(
        self, variables: Mapping[str, object], *, context: Context | str | None = None
    ) -> None:
        await drive(variable_operations.set_variables(self._core, variables, context))

    # Packages.

    @_documented_by(Sandbox.install_packages)
    async def install_packages(
        self,
        packages: Sequence[str],
        *,
        timeout: float | None = None,
        context: Context | str | None = None,
    ) -> CommandResult:
        return await drive(package_operations.install_packages(self._core, packages, timeout, context))

    @_documented_by(Sandbox.install_requirements)
    async def install_requirements(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        context: Context | str | None = None,
    ) -> CommandResult:
        return await drive(package_operations.install_requirements(self._core, path, timeout, context))

    # Snapshots.

    @_documented_by(Sandbox.create_snapshot)
    async def create_snapshot(self, name: str) -> SnapshotInfo:
        return await drive(snapshot_operations.create_snapshot(self._core, name))

    @_documented_by(Sandbox.list_snapshots)
    async def list_snapshots(self) -> builtins.list[SnapshotInfo]:
        return await drive(snapshot_operations.list_snapshots(self._core))

    @_documented_by(Sandbox.delete_snapshot)
    async def delete_snapshot(self, id: str) -> None:
        await drive(snapshot_operations.delete_snapshot(self._core, id))

    # Files.

    @property
    def files(self) -> AsyncSandboxFilesystem:
        return AsyncSandboxFilesystem(self._core)

    files.__doc__ = Sandbox.files.__doc__

    @property
    def commands(self) -> AsyncSandboxCommands:
        """Its commands; they work while code runs."""
        return AsyncSandboxCommands(self._core)

    # Contexts.

    @_documented_by(Sandbox.create_context)
    async def create_context(
        self,
        name: str | None = None,
        *,
        language: str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Context:
        return await drive(self._core.create_context(name, language=language, cwd=cwd, env=env))

    @_documented_by(Sandbox.list_contexts)
    async def list_contexts(self) -> builtins.list[Context]:
        return self._core.list_contexts()

    @_documented_by(Sandbox.restart_context)
    async def restart_context(self, context: Context | str) -> None:
        await drive(self._core.restart_context(context))

    @_documented_by(Sandbox.delete_context)
    async def delete_context(self, context: Context | str) -> None:
        await drive(self._core.delete_context(context))


class AsyncLocalEvalSandbox(AsyncSandbox):
    """Code in threads of this process, with nothing around it."""

    _variant = SandboxVariant.LOCAL_EVAL


class AsyncLocalJupyterSandbox(AsyncSandbox):
    """Kernels as processes on this machine."""

    _variant = SandboxVariant.LOCAL_JUPYTER


class AsyncLocalDockerSandbox(AsyncSandbox):
    """Kernels in a container on this machine."""

    _variant = SandboxVariant.LOCAL_DOCKER


class AsyncJupyterGatewaySandbox(AsyncSandbox):
    """Kernels of any Jupyter server."""

    _variant = SandboxVariant.JUPYTER_GATEWAY


class AsyncDatalayerSandbox(AsyncSandbox):
    """Kernels in a runtime of Datalayer's cloud."""

    _variant = SandboxVariant.DATALAYER_RUNTIME


_CLASSES = {
    each._variant: each
    for each in (
        AsyncDatalayerSandbox,
        AsyncJupyterGatewaySandbox,
        AsyncLocalDockerSandbox,
        AsyncLocalEvalSandbox,
        AsyncLocalJupyterSandbox,
    )
}


class _Starting:
    """A sandbox that can be awaited, or used directly in ``async with``."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    def __await__(self) -> Generator[object, None, AsyncSandbox]:
        return self._sandbox.start().__await__()

    async def __aenter__(self) -> AsyncSandbox:
        return await self._sandbox.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._sandbox.terminate()


def _from_id(id: str) -> AsyncSandbox:
    """For pickle, which cannot await: it takes a moment."""
    core = Sandbox.from_id(id)._core
    return _CLASSES[core.variant.name]._around(core)


class AsyncCodeStream:
    """What a run produces: ``OutputMessage``, ``Result`` and ``ExecutionError``, live and in order.

    The run begins with the iteration. Leaving the loop early interrupts it; asyncio learns of that a moment
    later, so use ``async with contextlib.aclosing(...)`` where the code must have stopped before you go on.
    Afterwards :attr:`result` holds the :class:`ExecutionResult`.
    """

    def __init__(self, operation: Operation[ExecutionResult], handlers: Handlers) -> None:
        self._operation = operation
        self._handlers = handlers
        self._result: ExecutionResult | None = None
        # Not held: that the loop over it lets go of it is how leaving early is noticed.
        self._over = asyncio.Event()
        self._events: weakref.ref[AsyncGenerator[OutputMessage | Result | ExecutionError, None]] | None = None

    @property
    def result(self) -> ExecutionResult:
        if self._result is None:
            raise RuntimeError("the run is not over: iterate over it to its end, or leave the loop")
        return self._result

    result.__doc__ = CodeStream.result.__doc__

    async def aclose(self) -> None:
        """Interrupt the run, if it is still on, and wait until it has stopped."""
        if self._events is None:
            return
        events = self._events()
        if events is not None:
            with contextlib.suppress(RuntimeError):  # the loop has begun to close it already
                await events.aclose()
        await self._over.wait()

    def __aiter__(self) -> AsyncIterator[OutputMessage | Result | ExecutionError]:
        if self._events is not None:
            raise RuntimeError("a run can be iterated over only once")
        events = self._iterate()
        self._events = weakref.ref(events)
        return events

    async def _iterate(self) -> AsyncGenerator[OutputMessage | Result | ExecutionError, None]:
        try:
            step = next(self._operation)
            while True:
                if isinstance(step, Emit):
                    try:
                        yield step.output
                    except GeneratorExit:
                        await self._leave()
                        raise
                    step = self._operation.send(None)
                else:
                    step = (await resumption(step, self._handlers))(self._operation)
        except StopIteration as stop:
            self._result = stop.value
        finally:
            self._over.set()

    async def _leave(self) -> None:
        """Interrupt the run and follow it to its end."""
        try:
            step = self._operation.throw(LEFT)
            while True:
                step = (await resumption(step, self._handlers))(self._operation)
        except StopIteration as stop:
            self._result = stop.value
