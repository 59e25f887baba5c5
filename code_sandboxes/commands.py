"""Commands in a sandbox: the blocking front of ``command_operations.py``."""

from __future__ import annotations

import builtins
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from code_sandboxes import command_operations as operations, system_packages
from code_sandboxes.blocking import drive
from code_sandboxes.command_operations import CommandLine, Folder, Input
from code_sandboxes.operations import Core
from code_sandboxes.process_info import CommandResult, ProcessInfo
from code_sandboxes.processes import SIGKILL, SIGTERM, Process, Stream
from code_sandboxes.results import Context
from code_sandboxes.steps import Handlers, OutputHandler

__all__ = ["Attention", "ProcessHandle", "ProcessLines", "SandboxCommands", "StartedCommand"]


class SandboxCommands:
    """Commands in a sandbox; they work while code runs.

    Each has a session of its own: interrupting the code does not reach it, and what ends it ends all that it
    has started, unless that has made a session of its own, too. Where nothing else is said it starts in the
    working directory of the code, with the environment as the code has made it.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    def run(
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
        """Run a command to its end and return what it printed.

        What it has started in the background goes on, and nobody hears it. Ctrl-C, or an exception in a
        callback, ends all of it.

        Args:
            command: one string is a line for ``/bin/sh``; a list, or several strings, are a program and its
                arguments, which no shell sees.
            cwd: where it starts.
            env: added to the environment.
            timeout: seconds after which it is killed, with what it has started; 0 for no limit; by default
                the setting of the sandbox.
            stdin: what it reads; by default nothing.
            on_stdout: called with each line as soon as it ends.
            on_stderr: the same for standard error.
            shell: False if one string is a program, too.
            check: raise if it fails.
            context: by default the first one.

        Raises:
            FileNotFoundError: there is no such program, or no such directory.
            SandboxExecutionError: it failed, under *check*; the result is in ``error.result``.
            SandboxTimeoutError: it was killed for its timeout, under *check*; or nobody in the sandbox
                answers: code that never lets go of the interpreter keeps commands waiting.
        """
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
        return drive(operation, handlers)

    def run_script(
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
        """Let *interpreter* run a file with *script* in it, which is gone afterwards; see :meth:`run`."""
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
        return drive(operation, handlers)

    def exec(
        self,
        *args: str,
        cwd: Folder | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        context: Context | str | None = None,
    ) -> ProcessHandle:
        """Start a program with these arguments, and return while it runs.

        Args:
            timeout: seconds after which it is killed; by default there is no limit.

        Raises:
            FileNotFoundError: there is no such program, or no such directory.
        """
        operation = operations.start(self._core, args, context=context, cwd=cwd, env=env, timeout=timeout)
        return ProcessHandle(drive(operation))

    def spawn(
        self,
        command: CommandLine,
        *,
        cwd: Folder | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        context: Context | str | None = None,
    ) -> ProcessHandle:
        """Start a line for the shell, or a list of a program and its arguments; see :meth:`exec`."""
        operation = operations.start(self._core, command, context=context, cwd=cwd, env=env, timeout=timeout)
        return ProcessHandle(drive(operation))

    def list(self, *, context: Context | str | None = None) -> builtins.list[ProcessInfo]:
        """The commands that run, whichever program has started them."""
        return drive(operations.list_processes(self._core, context))

    def connect(self, pid: int, *, context: Context | str | None = None) -> ProcessHandle:
        """A handle for a command that runs, with its output from now on.

        Raises:
            ProcessLookupError: no command of that number runs.
        """
        return ProcessHandle(drive(operations.connect(self._core, pid, context)))

    def kill(self, pid: int, *, context: Context | str | None = None) -> bool:
        """End a command with all that it has started; False if it had ended before.

        Raises:
            ProcessLookupError: there never was a command of that number.
        """
        return drive(operations.kill(self._core, pid, context))

    def install_system_packages(
        self,
        packages: Sequence[str],
        package_manager: str | None = None,
        *,
        timeout: float = 600.0,
        on_stdout: OutputHandler | None = None,
        on_stderr: OutputHandler | None = None,
        context: Context | str | None = None,
    ) -> CommandResult:
        """Install packages of the sandbox's own operating system.

        Args:
            package_manager: ``apt-get``, ``dnf``, ``yum``, ``apk``, ``zypper`` or ``pacman``; by default the
                one that is there.
            timeout: seconds; 0 for no limit.

        Raises:
            SandboxConfigurationError: they would be installed on this machine itself; or there is no package
                manager.
            SandboxExecutionError: they could not be installed; what was said is in the message.
            ValueError: one of them is no name of a package.
        """
        handlers = Handlers(on_stdout, on_stderr).check()
        operation = system_packages.install(
            self._core, packages, package_manager, timeout, context, listen=handlers.listen
        )
        return drive(operation, handlers)


class Attention:
    """Whoever holds this wants to know more of a process; when nobody does, no more is told."""

    def __init__(self, process: Process) -> None:
        weakref.finalize(self, process.guest.close_channel, process.channel).atexit = False


class StartedCommand:
    """What is known of a command that was started."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._attention = Attention(process)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.pid} {self.command[:80]!r}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def command(self) -> str:
        """The line for the shell, or the arguments quoted as for one."""
        return self._process.command

    @property
    def returncode(self) -> int | None:
        """Its exit code, -n if signal n has killed it; None while it runs."""
        return None if self._process.end is None else self._process.end.exit_code

    @property
    def timed_out(self) -> bool:
        """It took longer than its timeout, and was killed."""
        return self._process.end is not None and self._process.end.timed_out

    @property
    def truncated(self) -> bool:
        """Some of its output was dropped, because nobody read it."""
        return self._process.truncated


class ProcessHandle(StartedCommand):
    """A command that runs, or has ended; ``with`` kills it at the end if it still runs.

    Signals go to all that it has started, too. What it prints is held until it is read: of a stream that
    nobody reads the latest 16 MiB, see :attr:`truncated`. A handle that nobody holds any more ends nothing.
    """

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self._stdout = ProcessLines(process.streams[0], self._attention)
        self._stderr = ProcessLines(process.streams[1], self._attention)

    @property
    def stdout(self) -> ProcessLines:
        """Its lines as they come; see :class:`ProcessLines`."""
        return self._stdout

    @property
    def stderr(self) -> ProcessLines:
        """The same for standard error."""
        return self._stderr

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended and all that it has printed is there.

        Raises:
            SandboxTimeoutError: it did not end within *timeout* seconds, and goes on.
            SandboxConnectionError: its kernel has died.
        """
        return drive(self._process.wait(timeout, threading.get_ident()))

    def poll(self) -> int | None:
        """Its exit code, None while it runs.

        Raises:
            SandboxConnectionError: its kernel has died.
        """
        return self._process.poll()

    def write_stdin(self, data: Input) -> None:
        """Returns when the process, or its pipe, has taken all of it.

        Raises:
            BrokenPipeError: nobody reads it any more.
        """
        drive(self._process.write(data))

    def close_stdin(self) -> None:
        """No more will be written; what was comes before the end."""
        drive(self._process.close_stdin())

    def send_signal(self, signal: int) -> None:
        """Send it a signal; one that has ended gets none."""
        drive(self._process.signal(signal))

    def terminate(self) -> None:
        """Ask it to end, with SIGTERM."""
        drive(self._process.signal(SIGTERM))

    def kill(self) -> None:
        """End it, with SIGKILL."""
        drive(self._process.signal(SIGKILL))

    def __enter__(self) -> ProcessHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        drive(self._process.finish())


class ProcessLines:
    """What a command prints on one stream, line by line as it comes.

    Lines keep their newline; the last one has none if it was not ended, and one of more than a million
    characters comes in parts. A loop over it goes on where the one before has stopped. While a loop is in its
    middle, the process waits for it: no more than a few MiB are held, however much it prints.
    """

    def __init__(self, stream: Stream, attention: Attention) -> None:
        self._stream = stream
        self._attention = attention

    def __iter__(self) -> Iterator[str]:
        reader = threading.get_ident()
        try:
            while drive(self._stream.fill(reader)):
                yield from self._stream.ready()
        finally:
            self._stream.release(reader)

    def __next__(self) -> str:
        for line in self:
            return line
        raise StopIteration

    def read(self) -> str:
        """All the rest, when the process has ended."""
        return "".join(self)
