"""Run commands: start processes, carry what they print to whoever listens, feed them, signal and end them.

Each command has a session of its own: an interrupt of the code does not reach it, and a signal for it reaches
all that it has started, unless that has made a session of its own, too.

One thread waits for all of them. It alone knows whether a process has been reaped, so a signal never goes to
another process that has got the same number.
"""

from __future__ import annotations

import os
import selectors
import subprocess
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from errno import EPIPE, ESRCH
from functools import partial
from struct import unpack
from threading import Lock
from time import monotonic, sleep, time
from traceback import print_exc
from typing import Any
from weakref import WeakSet

try:
    from fcntl import ioctl
    from signal import SIGKILL
    from termios import FIONREAD
except ImportError:  # Windows, where nothing of this works: see _start_thread()
    CAN_START = False
else:
    CAN_START = True

# Bytes of output in one message; a pipe of Linux holds as much.
PIECE = 65536

# What a message on a channel costs beside its buffers; see cost() in calls.py.
MESSAGE = 256

# With less room than this nothing is read: many messages of a few bytes would be slow.
LEAST_ROOM = 4096

# Seconds between two looks at what nothing tells of: processes without a pidfd, and listeners that have died.
POLLED = 0.05
LISTENERS_LOOKED_AFTER = 5.0

# Seconds that it waits at most; epoll takes no more than 2**31 milliseconds.
LONGEST_WAIT = 3600.0

# Seconds between two attempts to wait, when that fails.
WAIT_FAILED = 1.0

UNKNOWN = 255
"""The exit code of a process for which the user's code has waited: its status is told only once."""

STDOUT, STDERR = 0, 1

MARK = "CODE_SANDBOXES_KERNEL"
"""See reaper.py."""


class Listener:
    """A program that is told what a process prints.

    Args:
        call: that has opened a channel for it.
        is_owner: the process is there for this one only, and ends when it goes.
    """

    def __init__(self, call: Any, is_owner: bool) -> None:
        self.channel = call.channel
        self.is_owner = is_owner
        self._link = call.link
        self._forsaken_since: float | None = None

    @property
    def room(self) -> int:
        """Bytes of output that it has room for."""
        return int(self.channel.credit) - MESSAGE

    @property
    def is_gone(self) -> bool:
        """It does not listen any more, or has died and keeps the process waiting.

        Its sign of life may be waiting, too, behind what has held up this thread: it gets some more time.
        """
        if self.room >= LEAST_ROOM or not self._link.is_forsaken:
            self._forsaken_since = None
            return bool(self.channel.is_closed)
        if self._forsaken_since is None:
            self._forsaken_since = monotonic()
        return bool(self.channel.is_closed) or monotonic() - self._forsaken_since > LISTENERS_LOOKED_AFTER


class Output:
    """One end of a pipe, from which the output of a process is read.

    Attributes:
        left: bytes that are still to be told; None while there may be more.
        is_watched: the selector has it.
    """

    def __init__(self, stream: int, fd: int) -> None:
        self.stream = stream
        self.fd = fd
        self.left: int | None = None
        self.is_watched = False

    @property
    def is_open(self) -> bool:
        return self.fd >= 0


class Process:
    """A command that was started.

    Attributes:
        id: names it, and no other one, in whichever kernel; its pid is used again.
        stdin: a descriptor; -1 when it is closed.
        pending: what is to be written there, each with the call that is answered afterwards.
        pidfd: can be read when it has ended; -1 where the system has none.
        ends_at: when its time is over (monotonic seconds).
        exit_code: None while it runs.
    """

    def __init__(self, popen: subprocess.Popen[bytes], stdin: int, outputs: list[Output]) -> None:
        self.id = ""
        self.popen = popen
        self.pid = popen.pid
        self.stdin = stdin
        self.outputs = outputs
        self.listeners: list[Listener] = []
        self.pending: deque[tuple[Any, Any]] = deque()
        self.is_stdin_watched = self.has_stdin_ended = False
        self.pidfd = -1
        self.began = monotonic()
        self.ends_at: float | None = None
        self.duration = 0.0
        self.exit_code: int | None = None
        self.timed_out = False
        self.is_told = False
        self.script: str | None = None
        self.about: dict[str, object] = {}

    @property
    def room(self) -> int:
        """Bytes of output that everybody who listens has room for."""
        return min((listener.room for listener in self.listeners), default=PIECE)

    def signal(self, number: int) -> bool:
        """Send a signal to all its processes; False if it has ended."""
        if self.exit_code is not None:
            return False
        os.killpg(self.pid, number)
        return True


class Processes:
    """All commands of one kernel.

    Args:
        environ: the environment that they get.
        tell: told how many are running, when some are after none were, and when none are any more.
    """

    in_threads = ("processes.which",)

    def __init__(self, environ: Callable[[], Mapping[str, str]], tell: Callable[[int], None]) -> None:
        self.functions: Mapping[str, Callable[..., object]] = {
            "processes.start": self._start,
            "processes.connect": self._connect,
            "processes.write": self._write,
            "processes.signal": self._signal,
            "processes.kill": self._kill,
            "processes.list": self._list,
            "processes.which": self._which,
        }
        self._environ = environ
        # By it whoever minds the kernel knows what has come of it, whatever the code does to its environment.
        self._mark = {name: value for name, value in os.environ.items() if name == MARK}
        self._tell = tell
        self._processes: dict[str, Process] = {}
        self._ended_pids: deque[int] = deque(maxlen=1000)
        self._draining: set[Process] = set()
        self._started: WeakSet[Process] = WeakSet()
        self._groups: list[int] = []  # of processes that have ended before all that they had started
        self._selector: Any = None
        self._waker = self._woken = -1
        self._asked: deque[Callable[[], object]] = deque()
        self._starting = Lock()
        self._is_closing = False
        self._over = Lock()
        _all.add(self)

    # What can be called.

    def _start(
        self,
        call: Any,
        id: str,
        argv: list[Any],
        shown: object,
        cwd: Any,
        env: list[list[Any]],
        base: Any,
        timeout: float | None,
        stdin: str | None,
        is_owner: bool,
        script: bool = False,
    ) -> object:
        """Start a command; its output comes on the channel of the call.

        Args:
            id: what it is called from now on.
            argv: the program and its arguments.
            shown: what people are told that it is.
            env: names and values that are added to the environment.
            timeout: seconds after which it is killed.
            stdin: ``"open"`` to write to it; ``"all"`` if the buffers of the call are all of it; None for
                nothing.
            is_owner: nobody else has use for it.
            script: the first buffer is a file, whose name is its last argument.
        """
        self._check_thread()  # before there is something that nobody would take care of
        arguments = [call.path(each) for each in argv]
        environment = dict(self._environ())
        environment.update({call.path(name): call.path(value) for name, value in env})
        environment.update(self._mark)
        buffers = list(call.buffers)
        path = self._script(buffers.pop(0), environment) if script else None
        folder = None if cwd is None and base is None else call.path(cwd or "", base)
        try:
            process = _spawn(arguments if path is None else [*arguments, path], folder, environment, stdin)
        except BaseException as error:
            if path is not None:
                os.unlink(path)
            if isinstance(error, OSError) and cwd is not None and error.filename == folder:
                error.filename = call.path(cwd)
            raise
        self._started.add(process)
        process.id, process.script = id, path
        process.ends_at = None if timeout is None else process.began + timeout
        process.about = {"id": id, "pid": process.pid, "shown": shown, "started_at": time()}
        process.about["cwd"] = call.wire(_absolute(folder))
        process.has_stdin_ended = stdin != "open"
        process.pending.extend((buffer, None) for buffer in buffers)
        process.listeners.append(Listener(call, is_owner))
        if not self._ask(lambda: self._begin(process, call)):
            os.killpg(process.pid, SIGKILL)
        return process.about

    def _connect(self, call: Any, pid: int) -> object:
        """Listen to what a command prints from now on."""

        def connect() -> None:
            process = self._running(pid)
            listener = Listener(call, False)
            process.listeners.append(listener)
            listener.channel.on_change = lambda: self._ask(lambda: self._refresh(process))
            call.answer(process.about)

        return self._later(call, connect)

    def _write(self, call: Any, id: str, end: bool) -> object:
        """Write the buffers of the call to its standard input, then close that if it is the *end*."""

        def write() -> None:
            process = self._processes.get(id)
            if process is None or process.stdin < 0 or process.has_stdin_ended:
                raise BrokenPipeError(EPIPE, os.strerror(EPIPE))
            pieces = [buffer for buffer in call.buffers if len(buffer)]
            process.pending.extend((buffer, None) for buffer in pieces[:-1])
            process.pending.append((pieces[-1] if pieces else b"", call))
            process.has_stdin_ended = end
            self._feed(process)

        return self._later(call, write)

    def _signal(self, call: Any, id: str, number: int) -> object:
        """Send a signal to all its processes; false if it has ended."""

        def signal() -> None:
            process = self._processes.get(id)
            call.answer(process is not None and process.signal(number))

        return self._later(call, signal)

    def _kill(self, call: Any, pid: int) -> object:
        """Kill a command by its number; false if it has ended."""

        def kill() -> None:
            if pid in self._ended_pids and not any(p.pid == pid for p in self._processes.values()):
                call.answer(False)
            else:
                call.answer(self._running(pid).signal(SIGKILL))

        return self._later(call, kill)

    def _list(self, call: Any) -> object:
        """What there is to know of those that run."""

        def answer() -> None:
            call.answer([p.about for p in self._processes.values() if p.exit_code is None])

        return self._later(call, answer)

    def _which(self, call: Any, names: Iterable[str]) -> object:
        """The first of these programs that can be found, and where; null if none can."""
        path = self._environ().get("PATH", os.defpath)
        for name in names:
            for folder in path.split(os.pathsep):
                found = os.path.join(folder, name)
                if os.path.isfile(found) and os.access(found, os.X_OK):
                    return [name, found]
        return None

    def close(self) -> None:
        """End them all, and wait for their end."""
        with self._starting:
            was_closing, self._is_closing = self._is_closing, True
            is_there = self._selector is not None
        if not is_there:
            return
        if not was_closing:
            self._ask(self._end_all)
        if self._over.acquire(timeout=5.0):  # a process that is stuck in the system goes on
            self._over.release()

    def _script(self, content: Any, environment: Mapping[str, str]) -> str:
        """A file with *content* that only this user can read."""
        folder = environment.get("TMPDIR") or "/tmp"
        path = os.path.join(folder, ".script-" + os.urandom(8).hex())
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _write_all(fd, content)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        return path

    # To the thread.

    def _later(self, call: Any, function: Callable[[], object]) -> object:
        """Let the thread answer *call* by *function*."""

        def answer() -> None:
            try:
                function()
            except Exception as error:  # whatever it is, the program is to know
                call.fail(error)

        self._check_thread()
        if not self._ask(answer):
            raise _gone()
        return call.LATER

    def _check_thread(self) -> None:
        """There is a thread that can be asked.

        Raises:
            ProcessLookupError: all has ended.
        """
        with self._starting:
            if self._selector is None:
                if self._is_closing:
                    raise _gone()
                self._start_thread()

    def _ask(self, function: Callable[[], object]) -> bool:
        """Let the thread call *function*, after what it was asked for before; False if all has ended."""
        with self._starting:
            if self._selector is None:
                return False
            self._asked.append(function)
            _wake(self._waker)
            return True

    def _start_thread(self) -> None:
        if not CAN_START:
            raise NotImplementedError("commands need Linux or macOS; this sandbox runs on " + os.name)
        with ExitStack() as undo:
            woken, waker = os.pipe()
            undo.callback(_close, (woken, waker))
            os.set_blocking(woken, False)
            os.set_blocking(waker, False)
            selector = undo.enter_context(selectors.DefaultSelector())
            selector.register(woken, selectors.EVENT_READ, lambda: os.read(woken, PIECE))
            self._over.acquire()
            undo.callback(self._over.release)
            # Not by threading: people patch it, and this one is not to be seen there. It waits for _starting.
            start_new_thread(self._run, ())
            undo.pop_all()
        self._woken, self._waker, self._selector = woken, waker, selector

    # In the thread.

    def _run(self) -> None:
        while not self._has_closed():
            self._call(self._wait)
            for _ in range(len(self._asked)):
                self._call(self._asked.popleft())
            self._call(self._look_at_clock)
        self._over.release()

    def _has_closed(self) -> bool:
        with self._starting:
            if not self._is_closing or self._asked or self._processes or self._draining:
                return False
            selector, self._selector = self._selector, None
            selector.close()
            _close([self._waker, self._woken])
            return True

    def _wait(self) -> None:
        """Wait until something has happened, and do what is to be done then."""
        try:
            happened = self._selector.select(self._patience())
        except Exception:  # it is said; what is asked for and the clock are looked at all the same
            sleep(WAIT_FAILED)
            raise
        for key, _ in happened:
            self._call(key.data)

    def _call(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception:  # one process that went wrong must not end the thread that all of them need
            print_exc()

    def _patience(self) -> float:
        now = monotonic()
        times = [LONGEST_WAIT]
        times += [p.ends_at - now for p in self._processes.values() if p.ends_at is not None]
        if any(p.exit_code is None and p.pidfd < 0 for p in self._processes.values()):
            times.append(POLLED)
        if any(p.room < LEAST_ROOM for p in self._processes.values()):
            times.append(LISTENERS_LOOKED_AFTER)
        return max(0.0, min(times))

    def _look_at_clock(self) -> None:
        now = monotonic()
        for process in list(self._processes.values()):
            if process.exit_code is None and process.pidfd < 0:
                self._reap(process)
            if process.exit_code is None and process.ends_at is not None and process.ends_at <= now:
                process.timed_out = True
                process.ends_at = None
                process.signal(SIGKILL)
            if process.room < LEAST_ROOM:
                self._refresh(process)

    def _begin(self, process: Process, call: Any) -> None:
        """Take care of a process that was just started."""
        self._processes[process.id] = process
        if len(self._processes) == 1:
            self._tell(1)
        call.channel.on_change = lambda: self._ask(lambda: self._refresh(process))
        try:
            process.pidfd = os.pidfd_open(process.pid)
            self._selector.register(process.pidfd, selectors.EVENT_READ, lambda: self._reap(process))
        except (AttributeError, OSError):  # macOS, an old Linux, or it was reaped already: it is polled
            process.pidfd = -1
        self._refresh(process)
        self._feed(process)
        if self._is_closing:
            process.signal(SIGKILL)

    def _refresh(self, process: Process) -> None:
        """Who listens has more room, or is gone."""
        gone = [listener for listener in process.listeners if listener.is_gone]
        process.listeners = [listener for listener in process.listeners if listener not in gone]
        for listener in gone:
            listener.channel.end(None)
        if any(listener.is_owner for listener in gone):
            process.signal(SIGKILL)
        self._watch(process)
        self._tell_end_if_over(process)

    def _watch(self, process: Process) -> None:
        """Read what it prints if everybody has room for that."""
        has_room = process.room >= LEAST_ROOM or process.is_told
        for output in process.outputs:
            wanted = output.is_open and has_room and (output.left != 0 or process.is_told)
            if wanted and not output.is_watched:
                read = self._reader(process, output)
                self._selector.register(output.fd, selectors.EVENT_READ, read)
            elif output.is_watched and not wanted:
                self._selector.unregister(output.fd)
            output.is_watched = wanted

    def _reader(self, process: Process, output: Output) -> Callable[[], None]:
        return lambda: self._read(process, output)

    def _read(self, process: Process, output: Output) -> None:
        """Something can be read, or nobody has this pipe any more."""
        size = PIECE if process.is_told else min(PIECE, process.room)
        if output.left is not None and not process.is_told:
            size = min(size, output.left)
        if not output.is_open or size <= 0:
            return
        try:
            data = os.read(output.fd, size)
        except BlockingIOError:
            if output.left is not None:
                output.left = 0
        else:
            if not data:
                self._close_output(output)
            elif not process.is_told:
                if output.left is not None:
                    output.left -= len(data)
                for listener in process.listeners:
                    listener.channel.send({"stream": output.stream}, [data])
        if process.is_told:
            self._forget_if_drained(process)
        else:
            self._watch(process)
            self._tell_end_if_over(process)

    def _close_output(self, output: Output) -> None:
        if output.is_watched:
            self._selector.unregister(output.fd)
        os.close(output.fd)
        output.fd, output.left, output.is_watched = -1, 0, False

    def _feed(self, process: Process) -> None:
        """Write what is pending, as much as the process takes now."""
        if process.stdin < 0:
            return
        try:
            while process.pending:
                data, call = process.pending[0]
                if call is not None and call.is_stopped:  # whoever wrote it has given up
                    process.pending.popleft()
                    continue
                written = os.write(process.stdin, data[:PIECE]) if len(data) else 0
                if written < len(data):
                    process.pending[0] = (data[written:], call)
                    continue
                process.pending.popleft()
                if call is not None:
                    call.answer(None)
        except BlockingIOError:
            self._watch_stdin(process, True)
            return
        except OSError as error:  # nobody reads it any more
            self._close_stdin(process, error)
            return
        self._watch_stdin(process, False)
        if process.has_stdin_ended:
            self._close_stdin(process, None)

    def _watch_stdin(self, process: Process, wanted: bool) -> None:
        if wanted and not process.is_stdin_watched:
            self._selector.register(process.stdin, selectors.EVENT_WRITE, lambda: self._feed(process))
        elif process.is_stdin_watched and not wanted:
            self._selector.unregister(process.stdin)
        process.is_stdin_watched = wanted

    def _close_stdin(self, process: Process, error: OSError | None) -> None:
        if process.stdin >= 0:
            self._watch_stdin(process, False)
            os.close(process.stdin)
            process.stdin = -1
        while process.pending:
            _, call = process.pending.popleft()
            if call is not None:
                call.fail(error or BrokenPipeError(EPIPE, os.strerror(EPIPE)))

    def _reap(self, process: Process) -> None:
        """It may have ended."""
        if process.exit_code is not None:
            return
        try:
            pid, status = os.waitpid(process.pid, os.WNOHANG)
        except ChildProcessError:  # the user's code has waited for it, or lets SIGCHLD be ignored
            code = UNKNOWN
        else:
            if pid == 0:
                return
            code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        process.exit_code = process.popen.returncode = code
        process.ends_at = None
        process.duration = monotonic() - process.began
        self._ended_pids.append(process.pid)
        if process.pidfd >= 0:
            self._selector.unregister(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1
        self._close_stdin(process, None)
        self._remember_group(process.pid)
        if process.script is not None:
            _remove(process.script)
        for output in process.outputs:
            # A descendant may go on and print for ever: what is there now was printed before the end.
            output.left = _readable(output.fd) if output.is_open else 0
        self._watch(process)
        self._tell_end_if_over(process)

    def _remember_group(self, group: int) -> None:
        self._groups = [each for each in self._groups if _has_members(each)]
        if _has_members(group):
            self._groups.append(group)

    def _tell_end_if_over(self, process: Process) -> None:
        """Its end is told after all that it has printed."""
        if process.exit_code is None or process.is_told or process.id not in self._processes:
            return
        if process.listeners and any(output.left for output in process.outputs):
            return
        process.is_told = True
        end = {
            "exit_code": process.exit_code,
            "timed_out": process.timed_out,
            "duration": process.duration,
        }
        for listener in process.listeners:
            listener.channel.end(end)
        process.listeners = []
        del self._processes[process.id]
        if not self._processes:
            self._tell(0)
        # What it has started may still print: nobody hears it, and it is not to be ended by SIGPIPE.
        self._draining.add(process)
        self._watch(process)
        self._forget_if_drained(process)

    def _forget_if_drained(self, process: Process) -> None:
        if not any(output.is_open for output in process.outputs):
            self._draining.discard(process)

    def _running(self, pid: int) -> Process:
        for process in self._processes.values():
            if process.pid == pid and process.exit_code is None:
                return process
        raise _gone()

    def _end_all(self) -> None:
        for process in self._processes.values():
            self._call(partial(process.signal, SIGKILL))
        for group in self._groups:
            if _has_members(group):
                self._call(partial(os.killpg, group, SIGKILL))
        for process in list(self._draining):
            for output in process.outputs:
                if output.is_open:
                    self._close_output(output)
        self._draining.clear()

    def forked(self) -> None:
        """This is a child of the kernel: what it would hold open is none of its business."""
        for process in list(self._started):
            fds = (process.stdin, process.pidfd, *(output.fd for output in process.outputs))
            _close(fd for fd in fds if fd >= 0)
            process.popen.returncode = UNKNOWN  # it is no child of this process
        self._processes, self._draining, self._started = {}, set(), WeakSet()
        self._is_closing, self._selector = True, None


def _spawn(argv: list[str], folder: str | None, env: Mapping[str, str], stdin: str | None) -> Process:
    """Start a process in a session of its own, with pipes."""
    ours: list[int] = []
    theirs: list[int] = []
    try:
        for _ in (STDOUT, STDERR):
            read, write = os.pipe()
            ours.append(read)
            theirs.append(write)
        if stdin is None:
            theirs.append(os.open(os.devnull, os.O_RDONLY))
        else:
            read, write = os.pipe()
            ours.append(write)
            theirs.append(read)
        for fd in ours:
            os.set_blocking(fd, False)
        popen = subprocess.Popen(
            argv,
            stdin=theirs[2],
            stdout=theirs[0],
            stderr=theirs[1],
            cwd=folder,
            env=env,
            start_new_session=True,
        )
    except BaseException:
        _close(ours)
        raise
    finally:
        _close(theirs)
    outputs = [Output(stream, ours[stream]) for stream in (STDOUT, STDERR)]
    return Process(popen, ours[2] if stdin is not None else -1, outputs)


def _gone() -> ProcessLookupError:
    return ProcessLookupError(ESRCH, os.strerror(ESRCH))


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _absolute(folder: str | None) -> str:
    try:
        return os.path.abspath(folder or os.curdir)
    except OSError:  # the working directory was removed
        return folder or os.curdir


def _write_all(fd: int, data: Any) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(fd, rest) :]


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:  # it has removed itself
        return


def _wake(fd: int) -> None:
    try:
        os.write(fd, b"\0")
    except BlockingIOError:  # it is awake as never before
        return


def _readable(fd: int) -> int:
    """How many bytes are in a pipe."""
    return int(unpack("i", ioctl(fd, FIONREAD, b"\0\0\0\0"))[0])


def _is_gone(pid: int) -> bool:
    """There is no process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _has_members(group: int) -> bool:
    """There are processes in a group whose first one is gone."""
    if not _is_gone(group):  # the number was given to another process: the group has long been empty
        return False
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's, by set-user-ID
        return True
    return True


_all: WeakSet[Processes] = WeakSet()


def _forked() -> None:
    for processes in list(_all):
        processes.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
