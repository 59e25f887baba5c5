"""What can be done with commands, written once for both fronts."""

from __future__ import annotations

import codecs
import os
import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from code_sandboxes.checks import check_environment, check_seconds
from code_sandboxes.errors import SandboxConnectionError, SandboxExecutionError, SandboxTimeoutError
from code_sandboxes.guest.calls import cost, wire_path
from code_sandboxes.guest_calls import Guest
from code_sandboxes.guest_link import Answered, Channel, ChannelEnded, GuestCall, Refused, Told
from code_sandboxes.guest_values import as_bool, as_float, as_int, as_list, as_object, as_path, as_str
from code_sandboxes.inbox import Inbox
from code_sandboxes.operations import Core
from code_sandboxes.process_info import CommandResult, ProcessInfo
from code_sandboxes.processes import SIGKILL, WINDOW, End, Process, end_of, output_of, pieces_of
from code_sandboxes.protocol.events import Event
from code_sandboxes.protocol.outputs import LineSplitter
from code_sandboxes.results import Context, Printed
from code_sandboxes.steps import Emit, Operation, Wait

__all__ = ["CommandLine", "connect", "kill", "list_processes", "run", "run_script", "start"]

CommandLine = str | Sequence[str]
"""A line for the shell, or a program and its arguments."""

Input = str | bytes
Folder = str | os.PathLike[str]

SHELL = "/bin/sh"

# Seconds that whoever gives a command up waits for its end.
_PATIENCE = 1.0

# Pieces of input that may be on their way.
_AHEAD = 4

# Bytes of output that may come after a command should have ended: what was in pipes.
_AFTERMATH = 4 * 1024**2

# Characters of standard error in an error.
_QUOTED = 2000


@dataclass(frozen=True, slots=True)
class _Command:
    """What is to be started.

    Args:
        shown: to people.
    """

    argv: tuple[str, ...]
    shown: str


def command_of(command: CommandLine, arguments: Sequence[str] = (), *, shell: bool = True) -> _Command:
    """One string is for the shell; several, or a list, are a program and its arguments.

    Raises:
        TypeError: one of them is no str.
        ValueError: there is none.
    """
    if isinstance(command, str) and shell and not arguments:
        return _Command((SHELL, "-c", command), command)
    if not isinstance(command, (str, list, tuple)):
        raise TypeError(f"a command is a str or a list of them, not {type(command).__name__}")
    argv = (command, *arguments) if isinstance(command, str) else (*command, *arguments)
    for each in argv:
        if not isinstance(each, str):
            raise TypeError(f"an argument of a command must be a str, not {type(each).__name__}")
    if not argv:
        raise ValueError("a command needs at least the name of a program")
    return _Command(argv, shlex.join(argv))


def run(
    core: Core,
    command: CommandLine,
    arguments: Sequence[str] = (),
    *,
    shell: bool = True,
    context: Context | str | None = None,
    cwd: Folder | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    stdin: Input | None = None,
    listen: bool = False,
    check: bool = False,
) -> Operation[CommandResult]:
    """Run a command to its end; yields its output line by line, if somebody listens.

    Bad arguments raise at once, before the operation is driven.

    Args:
        timeout: seconds; 0 for no limit; by default that of the sandbox.

    Raises:
        FileNotFoundError: there is no such program, or no such directory.
        SandboxExecutionError: it failed, under *check*.
        SandboxTimeoutError: it took too long, under *check*; or nobody in the sandbox answers.
    """
    what = command_of(command, arguments, shell=shell)
    return _prepared(core, what, None, context, cwd, env, timeout, stdin, listen=listen, check=check)


def run_script(
    core: Core,
    script: str,
    interpreter: str,
    *,
    context: Context | str | None = None,
    cwd: Folder | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    stdin: Input | None = None,
    listen: bool = False,
    check: bool = False,
) -> Operation[CommandResult]:
    """Let *interpreter* run a file with *script* in it, which is gone afterwards."""
    for name, value in (("script", script), ("interpreter", interpreter)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    what = _Command((interpreter,), f"{interpreter} (a script)")
    return _prepared(core, what, script, context, cwd, env, timeout, stdin, listen=listen, check=check)


def _prepared(
    core: Core,
    command: _Command,
    script: str | None,
    context: Context | str | None,
    cwd: Folder | None,
    env: Mapping[str, str] | None,
    timeout: float | None,
    stdin: Input | None,
    *,
    listen: bool,
    check: bool,
) -> Operation[CommandResult]:
    guest = core.guest(context)
    seconds = core.config.timeout if timeout is None else check_seconds("timeout", timeout)
    pieces = iter(()) if stdin is None else pieces_of(stdin)
    first, rest = next(pieces, None), _Peekable(pieces)
    arguments = _arguments(guest, command, cwd, env, seconds or None)
    arguments |= {"stdin": None if first is None else "open" if rest else "all", "is_owner": True}
    buffers: list[bytes | memoryview] = [] if first is None else [first]
    if script is not None:
        arguments["script"] = True
        buffers.insert(0, script.encode("utf-8", "surrogateescape"))
    running = _Running(guest, arguments, buffers, rest, seconds or None, core.config.interrupt_grace)
    return _run(running, command, core.variant.max_output, listen=listen, check=check)


def _arguments(
    guest: Guest,
    command: _Command,
    cwd: Folder | None,
    env: Mapping[str, str] | None,
    timeout: float | None,
) -> dict[str, object]:
    """Those of ``processes.start``."""
    return {
        "id": os.urandom(8).hex(),
        "argv": [wire_path(each) for each in command.argv],
        "shown": wire_path(command.shown),
        "cwd": None if cwd is None else wire_path(os.fspath(cwd)),
        "env": [[wire_path(name), wire_path(value)] for name, value in check_environment("env", env).items()],
        "base": None if guest.base is None else wire_path(guest.base),
        "timeout": timeout,
    }


class _Peekable:
    """An iterator that is true if there is more."""

    def __init__(self, items: Iterator[memoryview]) -> None:
        self._items = items
        self._next = next(items, None)

    def __bool__(self) -> bool:
        return self._next is not None

    def take(self) -> memoryview | None:
        taken, self._next = self._next, next(self._items, None)
        return taken


class _Running:
    """One command that is being run to its end: what it is fed, and until when it may take.

    Args:
        rest: the input that does not come with the call.
        timeout: seconds that the guest gives it; None for no limit.
        grace: seconds that the guest may take to answer.
    """

    def __init__(
        self,
        guest: Guest,
        arguments: Mapping[str, object],
        buffers: Sequence[bytes | memoryview],
        rest: _Peekable,
        timeout: float | None,
        grace: float,
    ) -> None:
        self.inbox = Inbox()
        self.end: End | None = None
        self.is_over = False  # or was not started, or nobody will ever know
        self._guest = guest
        self._id = arguments["id"]
        self._channel = Channel(self.inbox.put, WINDOW)
        self._start = GuestCall("processes.start", arguments, buffers, self.inbox, self._channel)
        self._rest = rest
        self._timeout, self._grace = timeout, grace
        self._ends_at: float | None = None
        self._overdue = 0.0
        self._owed = 0
        self._aftermath = _AFTERMATH

    def begin(self) -> None:
        self._set_end()
        self._guest.begin(self._start)

    def _set_end(self) -> None:
        self._ends_at = None if self._timeout is None else time.monotonic() + self._timeout

    def next_event(self, flush_at: float | None) -> Operation[Event | None]:
        """What has come; None if nothing has by *flush_at*.

        Raises:
            SandboxTimeoutError: the guest should long have ended the command, and says nothing.
        """
        event = self.inbox.take()
        if event is not None:
            return event
        begun = time.monotonic()
        give_up_at = None
        if self._ends_at is not None:
            # Only the time counts in which nothing came: a slow callback is not the guest's fault.
            give_up_at = max(self._ends_at, begun) + self._grace - self._overdue
            if give_up_at <= begun:
                raise SandboxTimeoutError(
                    f"the sandbox did not answer within {self._timeout:g} s and a grace of {self._grace:g} s;"
                    " the kernel may be stuck"
                )
        yield Wait(self.inbox, min((t for t in (flush_at, give_up_at) if t is not None), default=None))
        if self._ends_at is not None:
            self._overdue += max(0.0, time.monotonic() - max(begun, self._ends_at))
        return self.inbox.take()

    def take(self, event: Event) -> tuple[int, bytes] | None:
        """The stream and what was printed there, if *event* is that."""
        if isinstance(event, Told):
            stream, data = output_of(event)
            self._grant(cost([data]))
            return stream, data
        if isinstance(event, ChannelEnded):
            self.is_over = True
            self.end = end_of(event)
        elif isinstance(event, Answered):
            if event.call is self._start:
                self._set_end()
                for _ in range(_AHEAD):
                    self._feed()
            else:
                self._feed()
        elif isinstance(event, Refused):
            self._refused(event)
        return None

    def _refused(self, event: Refused) -> None:
        self.is_over = self.is_over or event.call is self._start
        if self.is_over or not isinstance(event.error, BrokenPipeError):  # who reads no input may do so
            raise event.error

    def _grant(self, credit: int) -> None:
        self._owed += credit
        if self._owed < WINDOW // 8:
            return
        if self._ends_at is not None and time.monotonic() > self._ends_at + self._grace:
            self._aftermath -= self._owed
            if self._aftermath < 0:  # what does not end by itself ends here
                return
        self._guest.grant(self._channel, self._owed)
        self._owed = 0

    def _feed(self) -> None:
        piece = self._rest.take()
        if piece is not None:
            arguments = {"id": self._id, "end": not self._rest}
            self._guest.begin(GuestCall("processes.write", arguments, [piece], self.inbox))

    def give_up(self) -> Operation[None]:
        """Kill it, and wait a moment for its end."""
        self._guest.cancel(self._start)  # it may not have been sent yet
        kill = GuestCall("processes.signal", {"id": self._id, "number": SIGKILL}, (), self.inbox)
        self._guest.begin(kill)
        self._ends_at, self._rest = None, _Peekable(iter(()))
        until = time.monotonic() + _PATIENCE
        try:
            while self.end is None and time.monotonic() < until:
                event = yield from self.next_event(until)
                if isinstance(event, Answered) and event.call is kill and event.value is False:
                    return  # it has ended, or never began
                if event is not None:
                    self.take(event)
        except SandboxConnectionError:  # so it is gone, too
            return

    def close(self) -> None:
        """Whatever comes now is for nobody."""
        self._guest.close_channel(self._channel)


def _run(
    running: _Running, command: _Command, max_output: int, *, listen: bool, check: bool
) -> Operation[CommandResult]:
    kept = _Kept(max_output), _Kept(max_output)
    lines = _Lines(listen)
    running.begin()
    try:
        while running.end is None:
            event = yield from running.next_event(lines.deadline)
            printed = None if event is None else running.take(event)
            if printed is not None:
                kept[printed[0]].add(printed[1])
            for each in lines.feed(printed):
                for output in each:
                    yield Emit(output, None)
        for each in lines.finish():
            for output in each:
                yield Emit(output, None)
    except GeneratorExit:  # nobody drives this any more
        raise
    except BaseException:
        if not running.is_over:
            yield from running.give_up()
        raise
    finally:
        running.close()
    end = running.end
    result = CommandResult(
        exit_code=end.exit_code,
        stdout=kept[0].text(),
        stderr=kept[1].text(),
        duration=end.duration,
        timed_out=end.timed_out,
        truncated=kept[0].truncated or kept[1].truncated,
    )
    return _checked(command, result) if check else result


def _checked(command: _Command, result: CommandResult) -> CommandResult:
    """
    Raises:
        SandboxTimeoutError: it took too long.
        SandboxExecutionError: it failed otherwise.
    """
    if result.success:
        return result
    sentence = f"the command {command.shown[:_QUOTED]!r} {_how_it_ended(result)}"
    said = result.stderr.rstrip()[-_QUOTED:]
    kind = SandboxTimeoutError if result.timed_out else SandboxExecutionError
    raise kind(f"{sentence}: {said}" if said else sentence, result)


def _how_it_ended(result: CommandResult) -> str:
    if result.timed_out:
        return f"was killed after {result.duration:.1f} s: it took longer than its timeout"
    if result.exit_code < 0:
        return f"was killed by signal {-result.exit_code}"
    return f"failed with exit code {result.exit_code}"


class _Kept:
    """What one stream has told, within a limit: beyond it the first half and the latest rest.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.truncated = False
        self._limit = limit
        self._head: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._head_room = limit // 2
        self._tail_size = 0

    def add(self, data: bytes) -> None:
        if self._head_room > 0:
            self._head.append(data[: self._head_room])
            data, self._head_room = data[self._head_room :], self._head_room - len(data)
        if data:
            self._tail.append(data)
            self._tail_size += len(data)
        while self._tail_size > self._limit - self._limit // 2:
            too_much = self._tail_size - (self._limit - self._limit // 2)
            oldest = self._tail.popleft()
            self._tail_size -= min(too_much, len(oldest))
            if len(oldest) > too_much:
                self._tail.appendleft(oldest[too_much:])
            self.truncated = True

    def text(self) -> str:
        if not self.truncated:
            return b"".join([*self._head, *self._tail]).decode("utf-8", "replace")
        # Characters that were cut are left out, so that what is not there does not look like broken text.
        head = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(self._head))
        tail = b"".join(self._tail)
        start = next((i for i, byte in enumerate(tail[:3]) if byte & 0xC0 != 0x80), 0)
        return head + tail[start:].decode("utf-8", "replace")


class _Lines:
    """What was printed as lines, for callbacks.

    Args:
        listen: whether there are any.
    """

    def __init__(self, listen: bool) -> None:
        self._listen = listen
        self._splitters = LineSplitter(error=False), LineSplitter(error=True)
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(2)]

    @property
    def deadline(self) -> float | None:
        """When :meth:`feed` has something to give, even if nothing comes."""
        return min((s.deadline for s in self._splitters if s.deadline is not None), default=None)

    def feed(self, printed: tuple[int, bytes] | None) -> Iterator[Printed]:
        """What is to be told now."""
        if not self._listen:
            return
        now = time.monotonic()
        if printed is not None:
            text = self._decoders[printed[0]].decode(printed[1])
            yield from self._splitters[printed[0]].feed(text, now, time.time())
        for splitter in self._splitters:
            if splitter.deadline is not None and splitter.deadline <= now:
                yield from splitter.flush(time.time())

    def finish(self) -> Iterator[Printed]:
        if not self._listen:
            return
        for decoder, splitter in zip(self._decoders, self._splitters, strict=True):
            yield from splitter.feed(decoder.decode(b"", True), time.monotonic(), time.time())
            yield from splitter.flush(time.time())


# Commands that go on.


def start(
    core: Core,
    command: CommandLine,
    *,
    shell: bool = True,
    context: Context | str | None = None,
    cwd: Folder | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Operation[Process]:
    """Start a command, and return while it runs.

    Args:
        timeout: seconds after which it is killed; 0 and None for no limit.

    Raises:
        FileNotFoundError: there is no such program, or no such directory.
    """
    what = command_of(command, shell=shell)
    seconds = 0.0 if timeout is None else check_seconds("timeout", timeout)
    guest = core.guest(context)
    arguments = _arguments(guest, what, cwd, env, seconds or None)
    arguments |= {"stdin": "open", "is_owner": False}
    return _started(Process(guest, str(arguments["id"]), what.shown), arguments)


def _started(process: Process, arguments: Mapping[str, object]) -> Operation[Process]:
    call = GuestCall("processes.start", arguments, (), Inbox(), process.channel)
    try:
        info = _described((yield from process.guest.ask(call)).value)
    except BaseException as error:
        if not isinstance(error, OSError):  # it may have been started
            process.kill_at_once()
        process.guest.close_channel(process.channel)
        raise
    process.pid = info.pid
    return process


def connect(core: Core, pid: int, context: Context | str | None) -> Operation[Process]:
    """Listen to what a command prints from now on.

    Raises:
        ProcessLookupError: no command of that number runs.
    """
    return _connected(core.guest(context), _check_pid(pid))


def _connected(guest: Guest, pid: int) -> Operation[Process]:
    process = Process(guest, "", "")
    call = GuestCall("processes.connect", {"pid": pid}, (), Inbox(), process.channel)
    try:
        value = (yield from guest.ask(call)).value
        info = _described(value)
        process.id, process.pid, process.command = as_str(as_object(value).get("id")), info.pid, info.command
    except BaseException:
        guest.close_channel(process.channel)
        raise
    return process


def list_processes(core: Core, context: Context | str | None) -> Operation[list[ProcessInfo]]:
    """Those that run."""
    return _listed(core.guest(context))


def _listed(guest: Guest) -> Operation[list[ProcessInfo]]:
    answer = yield from guest.call("processes.list")
    return [_described(each) for each in as_list(answer.value)]


def kill(core: Core, pid: int, context: Context | str | None) -> Operation[bool]:
    """End a command with all that it has started; False if it has ended before.

    Raises:
        ProcessLookupError: there never was a command of that number.
    """
    return _killed(core.guest(context), _check_pid(pid))


def _killed(guest: Guest, pid: int) -> Operation[bool]:
    return as_bool((yield from guest.call("processes.kill", pid=pid)).value)


def _check_pid(pid: object) -> int:
    if isinstance(pid, bool) or not isinstance(pid, int):
        raise TypeError(f"pid must be an int, not {type(pid).__name__}")
    return pid


def _described(value: object) -> ProcessInfo:
    about = as_object(value)
    pid = as_int(about.get("pid"))
    if pid <= 0:
        raise SandboxConnectionError(f"the sandbox says that a command has the number {pid}")
    return ProcessInfo(
        pid=pid,
        command=as_path(about.get("shown")),
        cwd=as_path(about.get("cwd")),
        started_at=as_float(about.get("started_at")),
    )
