"""End the kernels of a program that was killed, and all that they started, and remove their folders.

A program that ends in any orderly way does this itself. One that is killed with SIGKILL cannot: a second,
small process watches it, told beforehand what to end. Both sides of their conversation are in this file:
:class:`Reaper` in the program, :func:`main` in the process that watches. The latter runs this file as a
script, isolated from any installation, so nothing but the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection

__all__ = ["MARK", "Reaper", "end_marked", "remove_tree"]

MARK = "CODE_SANDBOXES_KERNEL"
"""The environment variable by which a kernel, and whatever comes of it, is known: the kernel's folder."""

# How long to try to remove a folder in which something is still being written, or to end what still forks.
_PERSISTENCE = 3.0

# One that forks and ends while a look is on is missed by it, and so is its child: that is for the next look.
_LOOKS_IN_VAIN = 3

# How many to kill before waiting for their end: each takes a descriptor.
_AT_ONCE = 200

_MUCH = 128 * 1024


class Reaper:
    """The program's side: say what must not outlive it; from any thread.

    The watching process is started when there is first something to say, and again if it was ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._folders: set[str] = set()
        self._groups: set[int] = set()

    def guard_folder(self, folder: str) -> None:
        with self._lock:
            self._folders.add(folder)
            self._tell()

    def guard_group(self, process_group: int) -> None:
        with self._lock:
            self._groups.add(process_group)
            self._tell()

    def release_group(self, process_group: int) -> None:
        with self._lock:
            self._groups.discard(process_group)
            self._tell()

    def close(self) -> None:
        """The program ends in an orderly way; what is still guarded is ended now."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=_PERSISTENCE)
        except subprocess.TimeoutExpired:  # it goes on by itself; the program need not wait for it
            return

    def _tell(self) -> None:
        # Everything in one line each time: a new process then knows as much as the old one did.
        line = json.dumps({"folders": sorted(self._folders), "groups": sorted(self._groups)}).encode() + b"\n"
        if self._process is None and not (self._folders or self._groups):
            return
        for _ in range(2):
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                return
            except BrokenPipeError:
                self._process.wait()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},  # without a mark: if the program runs in a kernel, this ends after it and its keeper
        start_new_session=True,  # Ctrl-C in a terminal must not end it before the program
    )


def main(program: int) -> None:
    """Watch *program* until it ends, then end what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    line = _last_line(program)
    if line:
        left = json.loads(line)
        _end(left["groups"], left["folders"])


def _last_line(program: int) -> bytes:
    """The last whole line that *program* wrote before it ended or closed the pipe."""
    os.set_blocking(0, False)
    watched = [0]
    # A child forked from the program would hold the pipe open: its end is not the program's end.
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            watched.append(os.pidfd_open(program))
    data = b""
    alive = True
    while alive:
        readable, _, _ = select.select(watched, [], [], 0.5)
        alive = os.getppid() == program and not any(fd in readable for fd in watched[1:])
        try:
            while chunk := os.read(0, 65536):
                data += chunk
                # The last whole line, and what may follow it.
                data = data[data.rfind(b"\n", 0, data.rfind(b"\n")) + 1 :]
            alive = False
        except BlockingIOError:
            continue
    return data[: data.rfind(b"\n") + 1]


def _end(groups: list[int], folders: list[str]) -> None:
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(OSError):  # the folders must go all the same
        end_marked(folders)
    for folder in folders:
        with contextlib.suppress(OSError):  # the next one must go all the same
            remove_tree(folder)


def end_marked(folders: Collection[str]) -> None:
    """Kill whatever kernels started whose folders are among *folders* or below them, and wait for its end.

    It may be in a session of its own, and who started it long gone: its environment tells (proc(5),
    ``environ``). What was started with another one is not found, nor what does not end for a while. Where
    nobody tells, which is anywhere but on Linux, killing the groups of the kernels is all there is.

    Raises:
        OSError: there are too few descriptors to look.
    """
    if not hasattr(os, "pidfd_open") or not os.path.exists("/proc/self/environ"):
        return
    search = _Search(folders)
    give_up = time.monotonic() + _PERSISTENCE
    in_vain = 0
    while in_vain < _LOOKS_IN_VAIN and time.monotonic() < give_up:
        in_vain = 0 if search.finds_any() else in_vain + 1
        search.wait_for_the_killed(give_up)


class _Search:
    """Looks at every process of this user, and kills the marked ones."""

    def __init__(self, folders: Collection[str]) -> None:
        self._folders = {os.fsencode(folder) for folder in folders}
        self._user = os.geteuid()
        self._others = {os.getpid()}  # not marked, or not there any more
        self._bare: set[int] = set()
        self._killed: dict[int, int] = {}  # by the descriptors that tell their end

    def finds_any(self) -> bool:
        """Look at all that are there, but for those that an earlier look has settled."""
        for process in {int(name) for name in os.listdir("/proc") if name.isdecimal()} - self._others:
            if len(self._killed) < _AT_ONCE:
                self._look_at(process)
        return bool(self._killed)

    def wait_for_the_killed(self, give_up: float) -> None:
        poll = select.poll()
        for pidfd in self._killed:
            poll.register(pidfd, select.POLLIN)
        waiting = len(self._killed)
        while waiting and time.monotonic() < give_up:
            for pidfd, _ in poll.poll(100):
                poll.unregister(pidfd)
                self._others.add(self._killed[pidfd])
                waiting -= 1
        for pidfd in self._killed:
            os.close(pidfd)
        self._killed.clear()

    def _look_at(self, process: int) -> None:
        try:
            if self._is_marked(process):
                self._kill(process)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):  # it has ended, or it is not ours to look at
                self._others.add(process)
            elif not self._killed:  # else there will be more when those have ended
                raise

    def _kill(self, process: int) -> None:
        pidfd = os.pidfd_open(process)
        self._killed[pidfd] = process
        if self._is_marked(process):  # still: the number is not another's since
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        else:
            del self._killed[pidfd]
            os.close(pidfd)

    def _is_marked(self, process: int) -> bool:
        environment = self._environment(process)
        mark = (b"\0" + environment).partition(b"\0%b=" % MARK.encode())[2].partition(b"\0")[0]
        if mark and any(mark == folder or mark.startswith(folder + b"/") for folder in self._folders):
            return True
        # In the middle of execve(2) it has none yet (fs/proc/base.c, environ_read): it gets a second look.
        if environment or process in self._bare:
            self._others.add(process)
        self._bare.add(process)
        return False

    def _environment(self, process: int) -> bytes:
        fd = os.open(f"/proc/{process}/environ", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid != self._user:
                raise PermissionError
            environment = part = os.read(fd, _MUCH)
            while len(part) == _MUCH:
                part = os.read(fd, _MUCH)
                environment += part
            return environment
        finally:
            os.close(fd)


def remove_tree(folder: str) -> None:
    """Remove *folder*, also while something still writes in it, for a while.

    Raises:
        OSError: that did not help.
    """
    give_up = time.monotonic() + _PERSISTENCE
    while os.path.exists(folder):
        if sys.version_info >= (3, 12):
            shutil.rmtree(folder, onexc=_make_removable)
        else:
            shutil.rmtree(folder, onerror=_make_removable)
        if os.path.exists(folder):
            if time.monotonic() > give_up:
                raise OSError(f"something still writes in {folder}")
            time.sleep(0.02)


def _make_removable(function: object, path: str, error: object) -> None:
    """Code may have closed a folder of its own; whose folder it is may open it, for the next try."""
    for folder in (os.path.dirname(path), path):
        if os.path.isdir(folder) and not os.path.islink(folder):
            with contextlib.suppress(OSError):
                os.chmod(folder, 0o700)


if __name__ == "__main__":
    main(int(sys.argv[1]))
