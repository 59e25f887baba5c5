"""Commands in a sandbox: the asyncio front of ``command_operations.py``.

What each method means is documented in ``commands.py``; the documentation is taken over.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType

from code_sandboxes import command_operations as operations, system_packages
from code_sandboxes.awaiting import documented_by, drive
from code_sandboxes.command_operations import CommandLine, Folder, Input
from code_sandboxes.commands import Attention, ProcessHandle, ProcessLines, SandboxCommands, StartedCommand
from code_sandboxes.operations import Core
from code_sandboxes.process_info import CommandResult, ProcessInfo
from code_sandboxes.processes import SIGKILL, SIGTERM, Process, Stream
from code_sandboxes.results import Context
from code_sandboxes.steps import Handlers, OutputHandler

__all__ = ["AsyncProcessHandle", "AsyncProcessLines", "AsyncSandboxCommands"]


class AsyncSandboxCommands:
    """Commands in a sandbox; they work while code runs. See :class:`SandboxCommands`."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @documented_by(SandboxCommands.run)
    async def run(
        self,
        command: CommandLine,
        *args: str,
        cwd: Folder | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        stdin: Input | None = None,
        on_stdout: OutputHandler | None = None,
        on_stderr: OutputHandler | None = None,
        shell: bool = True,
        check: bool = False,
        context: Context | str | None = None,
    ) -> CommandResult:
        handlers = Handlers(on_stdout, on_stderr).check()
        operation = operations.run(
            self._core,
            command,
            args,
            shell=shell,
            context=context,
            cwd=cwd,
            env=env,
            timeout=timeout,
            stdin=stdin,
            listen=handlers.listen,
            check=check,
        )
        return await drive(operation, handlers)

    @documented_by(SandboxCommands.run_script)
    async def run_script(
        self,
        script: str,
        interpreter: str = "/bin/bash",
        *,
        cwd: Folder | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        stdin: Input | None = None,
        on_stdout: OutputHandler | None = None,
        on_stderr: OutputHandler | None = None,
        check: bool = False,
        context: Context | str | None = None,
    ) -> CommandResult:
        handlers = Handlers(on_stdout, on_stderr).check()
        operation = operations.run_script(
            self._core,
            script,
            interpreter,
            context=context,
            cwd=cwd,
            env=env,
            timeout=timeout,
            stdin=stdin,
            listen=handlers.listen,
            check=check,
        )
        return await drive(operation, handlers)

    @documented_by(SandboxCommands.exec)
    async def exec(
        self,
        *args: str,
        cwd: Folder | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        context: Context | str | None = None,
    ) -> AsyncProcessHandle:
        operation = operations.start(self._core, args, context=context, cwd=cwd, env=env, timeout=timeout)
        return AsyncProcessHandle(await drive(operation))

    @documented_by(SandboxCommands.spawn)
    async def spawn(
        self,
        command: CommandLine,
        *,
        cwd: Folder | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        context: Context | str | None = None,
    ) -> AsyncProcessHandle:
        operation = operations.start(self._core, command, context=context, cwd=cwd, env=env, timeout=timeout)
        return AsyncProcessHandle(await drive(operation))

    @documented_by(SandboxCommands.list)
    async def list(self, *, context: Context | str | None = None) -> builtins.list[ProcessInfo]:
        return await drive(operations.list_processes(self._core, context))

    @documented_by(SandboxCommands.connect)
    async def connect(self, pid: int, *, context: Context | str | None = None) -> AsyncProcessHandle:
        return AsyncProcessHandle(await drive(operations.connect(self._core, pid, context)))

    @documented_by(SandboxCommands.kill)
    async def kill(self, pid: int, *, context: Context | str | None = None) -> bool:
        return await drive(operations.kill(self._core, pid, context))

    @documented_by(SandboxCommands.install_system_packages)
    async def install_system_packages(
        self,
        packages: Sequence[str],
        package_manager: str | None = None,
        *,
        timeout: float = 600.0,
        on_stdout: OutputHandler | None = None,
        on_stderr: OutputHandler | None = None,
        context: Context | str | None = None,
    ) -> CommandResult:
        handlers = Handlers(on_stdout, on_stderr).check()
        operation = system_packages.install(
            self._core, packages, package_manager, timeout, context, listen=handlers.listen
        )
        return await drive(operation, handlers)


class AsyncProcessHandle(StartedCommand):
    """A command that runs, or has ended; ``async with`` kills it at the end if it still runs.

    See :class:`ProcessHandle`.
    """

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self._stdout = AsyncProcessLines(process.streams[0], self._attention)
        self._stderr = AsyncProcessLines(process.streams[1], self._attention)

    @property
    def stdout(self) -> AsyncProcessLines:
        return self._stdout

    @property
    def stderr(self) -> AsyncProcessLines:
        return self._stderr

    stdout.__doc__ = ProcessHandle.stdout.__doc__
    stderr.__doc__ = ProcessHandle.stderr.__doc__

    @documented_by(ProcessHandle.wait)
    async def wait(self, timeout: float | None = None) -> int:
        return await drive(self._process.wait(timeout, asyncio.current_task()))

    @documented_by(ProcessHandle.poll)
    async def poll(self) -> int | None:
        return self._process.poll()

    @documented_by(ProcessHandle.write_stdin)
    async def write_stdin(self, data: Input) -> None:
        await drive(self._process.write(data))

    @documented_by(ProcessHandle.close_stdin)
    async def close_stdin(self) -> None:
        await drive(self._process.close_stdin())

    @documented_by(ProcessHandle.send_signal)
    async def send_signal(self, signal: int) -> None:
        await drive(self._process.signal(signal))

    @documented_by(ProcessHandle.terminate)
    async def terminate(self) -> None:
        await drive(self._process.signal(SIGTERM))

    @documented_by(ProcessHandle.kill)
    async def kill(self) -> None:
        await drive(self._process.signal(SIGKILL))

    async def __aenter__(self) -> AsyncProcessHandle:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await drive(self._process.finish())


class AsyncProcessLines:
    """What a command prints on one stream, line by line as it comes; see :class:`ProcessLines`."""

    def __init__(self, stream: Stream, attention: Attention) -> None:
        self._stream = stream
        self._attention = attention

    async def __aiter__(self) -> AsyncIterator[str]:
        reader = asyncio.current_task()
        try:
            while await drive(self._stream.fill(reader)):
                for line in self._stream.ready():
                    yield line
        finally:
            self._stream.release(reader)

    async def __anext__(self) -> str:
        reader = asyncio.current_task()
        try:
            while await drive(self._stream.fill(reader)):
                for line in self._stream.ready():
                    return line
        finally:
            self._stream.release(reader)
        raise StopAsyncIteration

    @documented_by(ProcessLines.read)
    async def read(self) -> str:
        return "".join([line async for line in self])
