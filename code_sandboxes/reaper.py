"""End the kernels of a program that was killed, and all that they started, here or elsewhere.

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
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence

__all__ = [
    "CGROUP",
    "MARK",
    "USERS",
    "Guard",
    "Reaper",
    "end_cgroups",
    "end_marked",
    "kill_cgroup",
    "remove_container",
    "remove_tree",
]

MARK = "CODE_SANDBOXES_KERNEL"
"""The environment variable by which a kernel, and whatever comes of it, is known: the kernel's folder."""

CGROUP = "code-sandboxes-"
"""How the names of the cgroups of sandboxes begin; none with another name is ended here."""

USERS = range(0x2000_0000, 0x6000_0000)
"""Who code is in the enclosures that root makes: nobody, as systems give out lower numbers (systemd, "Users,
Groups, UIDs and GIDs"), and not the same in two of them, as what a user has is counted (RLIMIT_NPROC)."""

# How long to try to remove a folder in which something is still being written, or to end what still forks.
_PERSISTENCE = 3.0

# One that forks and ends while a look is on is missed by it, and so is its child: that is for the next look.
_LOOKS_IN_VAIN = 3

# How long one may take that was only forked when its parent was killed to be the program that it was to be.
_NEWBORN = 0.25

# How long an engine may go on to make a container for one who was killed meanwhile.
_MAKING = 10.0

# How long something may be in the making elsewhere (a server of a Hub takes its minute, and ends only then),
# until a server answers, and between two looks.
_APPEARING, _ANSWER, _PAUSE = 120.0, 30.0, 1.0

# HTTP statuses that say that something was done, or will be (RFC 9110, section 15.3).
_OK, _DONE = 200, (200, 202, 204)

# Which say whom TLS trusts (OpenSSL, SSL_CTX_load_verify_locations(3)).
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

# How many to kill before waiting for their end: each takes a descriptor.
_AT_ONCE = 200

_MUCH = 128 * 1024

# What is said of a cgroup that was removed just now, by its file system and by an open file in it.
_REMOVED = (errno.ENOENT, errno.ENODEV)


class Guard(tuple[str, ...]):
    """What to end elsewhere: its kind, and what the function of that kind in this file takes, its URL first.

    * ``runtime``: of Datalayer; the URL at which the service has its runtimes, a token, and its given name.
    * ``resource``: what a DELETE ends, as a kernel of a server; its URL, the path of the server's Unix
      socket (empty for none), the header ``Authorization`` (empty for none), and the request's body.
    """

    def __new__(cls, kind: str, url: str, *more: str) -> Guard:
        return super().__new__(cls, (kind, url, *more))

    def __repr__(self) -> str:
        return f"<Guard of a {self[0]} at {self[1]}>"  # the rest has a secret in it


class Reaper:
    """The program's side: say what must not outlive it; from any thread.

    The watching process is started when there is first something to say, and again if it was ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._folders: set[str] = set()
        self._groups: set[int] = set()
        self._cgroups: set[str] = set()
        self._containers: set[tuple[str, str]] = set()
        self._remote: set[Guard] = set()

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

    def guard_cgroups(self, folders: Collection[str]) -> None:
        with self._lock:
            self._cgroups.update(folders)
            self._tell()

    def release_cgroups(self, folders: Collection[str]) -> None:
        with self._lock:
            self._cgroups.difference_update(folders)
            self._tell()

    def guard_container(self, engine: str, name: str) -> None:
        """Containers end by themselves with the program, but for those that somebody has frozen."""
        with self._lock:
            self._containers.add((engine, name))
            self._tell()

    def release_container(self, engine: str, name: str) -> None:
        with self._lock:
            self._containers.discard((engine, name))
            self._tell()

    def guard_remote(self, guard: Guard) -> None:
        """What will be elsewhere, before it is asked for."""
        with self._lock:
            self._remote.add(guard)
            self._tell()

    def release_remote(self, guard: Guard) -> None:
        with self._lock:
            self._remote.discard(guard)
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

    def forget(self) -> None:
        """In a forked child: all is the parent's, and its pipe must not be held open."""
        if self._process is not None and self._process.stdin is not None:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self._process.stdin.fileno(), inheritable=False)

    def _tell(self) -> None:
        # Everything in one line each time: a new process then knows as much as the old one did.
        guarded = {
            "folders": sorted(self._folders),
            "groups": sorted(self._groups),
            "cgroups": sorted(self._cgroups, reverse=True),  # what is further down has to go first
            "containers": sorted(self._containers),
            "remote": sorted(self._remote),
        }
        line = json.dumps(guarded).encode() + b"\n"
        if self._process is None and not any(guarded.values()):
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
        # Without a mark: if the program runs in a kernel, this ends after it and its keeper.
        env={name: os.path.abspath(os.environ[name]) for name in _CERTIFICATES if os.environ.get(name)},
        start_new_session=True,  # Ctrl-C in a terminal must not end it before the program
    )


def main(program: int) -> None:
    """Watch *program* until it ends, then end what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    line = _last_line(program)
    if line:
        left = json.loads(line)
        missing = _remove_containers(left["containers"])
        _end(left["groups"], left["folders"], left["cgroups"], program)
        give_up = time.monotonic() + _MAKING
        while missing and time.monotonic() < give_up:
            time.sleep(_NEWBORN)
            if not _was_killed(program):
                return
            missing = _remove_containers(missing)
        _end_remote(left["remote"], program)


def _was_killed(program: int) -> bool:
    """The pipe of one that is killed is closed a moment before: this is asked as late as possible."""
    return os.getppid() != program


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


def _end(groups: list[int], folders: list[str], cgroups: list[str], program: int) -> None:
    with contextlib.suppress(OSError):  # the rest must go all the same
        end_cgroups(cgroups)
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(OSError):  # the folders must go all the same
        end_marked(folders)
        if _was_killed(program):  # what it had just forked has its mark only after execve(2)
            time.sleep(_NEWBORN)
            end_marked(folders)
    for folder in folders:
        with contextlib.suppress(OSError):  # the next one must go all the same
            remove_tree(folder)


def _remove_containers(containers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of them that are not there, as far as is known."""
    missing = []
    for engine, name in containers:
        try:
            if not remove_container(engine, name):
                missing.append((engine, name))
        except TimeoutError:
            missing.append((engine, name))
        except OSError:  # nobody is there to ask, and the rest must go all the same
            continue
    return missing


def remove_container(engine: str, name: str) -> bool:
    """End and remove a container (Docker Engine API, "Remove a container"); False if it is not there.

    Args:
        engine: the URL of a Unix socket.

    Raises:
        OSError: no engine listens there.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PERSISTENCE)
        connection.connect(engine.partition("://")[2])
        request = f"DELETE /containers/{name}?force=1&v=1 HTTP/1.1"
        connection.sendall(f"{request}\r\nHost: engine\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(4096):  # it answers when it is done
            answer += part
    return answer.split(b" ", 2)[1:2] != [b"404"]


def _end_remote(guards: list[list[str]], program: int) -> None:
    """End what is elsewhere; what is not there may be in the making."""
    servers: dict[str, list[list[str]]] = {}
    for guard in guards:
        servers.setdefault(guard[1].partition("://")[2].partition("/")[0], []).append(guard)
    # One that does not answer keeps no other one waiting.
    threads = [threading.Thread(target=_end_on_server, args=(each, program)) for each in servers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _end_on_server(guards: list[list[str]], program: int) -> None:
    from http.client import HTTPException  # all of this takes longer to import than all the rest

    end: dict[str, Callable[..., bool]] = {"runtime": _end_runtime, "resource": _delete}
    give_up = time.monotonic() + _APPEARING
    while guards and time.monotonic() < give_up:
        left = []
        for kind, *what in guards:
            was_there = False
            with contextlib.suppress(OSError, HTTPException, ValueError, KeyError, TypeError):  # tried again
                was_there = end[kind](*what)
            if not was_there:
                left.append([kind, *what])
        guards = left
        if guards:
            time.sleep(_PAUSE)
        if not _was_killed(program):
            return


def _end_runtime(url: str, token: str, given_name: str) -> bool:
    """End the runtime of that name; False if it is not there, for all that is known."""
    from urllib.parse import quote

    was_there = False
    status, answer = _ask("GET", url, "", f"Bearer {token}")
    for runtime in json.loads(answer)["runtimes"] if status == _OK else ():
        if runtime["given_name"] == given_name:
            name = runtime.get("runtime_name") or runtime["pod_name"]
            status, _ = _ask("DELETE", f"{url}/{quote(name, safe='')}", "", f"Bearer {token}")
            was_there = status in _DONE
    return was_there


def _delete(url: str, unix_socket: str, authorization: str, body: str) -> bool:
    """End what has that URL; False if it is not there, for all that is known."""
    status, _ = _ask("DELETE", url, unix_socket, authorization, body)
    return status in _DONE


def _ask(verb: str, url: str, unix_socket: str, authorization: str, body: str = "") -> tuple[int, bytes]:
    """The status and the content of the answer: of this server, not of a proxy or where it sends who asks."""
    from http.client import HTTPConnection, HTTPSConnection
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    with contextlib.closing(kind(parts.hostname or "", parts.port, timeout=_ANSWER)) as connection:
        if unix_socket:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(_ANSWER)
            connection.sock.connect(unix_socket)
        headers = {"Authorization": authorization} if authorization else {}
        if body:
            headers["Content-Type"] = "application/json"
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(verb, path, body or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def end_cgroups(folders: Sequence[str]) -> None:
    """Kill all that is in cgroups of sandboxes and remove these; what is not there, or another's, is left.

    Args:
        folders: what is further down first.

    Raises:
        OSError: something in one does not end, or is not ours to remove. The others are removed.
    """
    failed = None
    for folder in folders:
        with contextlib.suppress(OSError):  # its removal will tell
            kill_cgroup(folder)
    for folder in folders:
        try:
            _remove_cgroup(folder)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def _remove_cgroup(folder: str) -> None:
    give_up = time.monotonic() + _PERSISTENCE
    while _is_cgroup(folder):
        try:
            os.rmdir(folder)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno != errno.EBUSY or time.monotonic() > give_up:
                raise
            kill_cgroup(folder)
            time.sleep(0.002)


def kill_cgroup(folder: str) -> None:
    """Send SIGKILL to all that is in a cgroup of a sandbox, and let nothing begin in it any more.

    Raises:
        OSError: it is not ours, or there are too few descriptors.
    """
    if not _is_cgroup(folder):
        return
    # By that all end at once, whatever they do (cgroup-v2.rst, "cgroup.kill", since Linux 5.14).
    if _write_if_there(folder, "cgroup.kill", "1"):
        return
    # What is frozen does not end, and one that forks might for ever have a child that was not listed.
    _write_if_there(folder, "freezer.state", "THAWED")
    _write_if_there(folder, "cgroup.freeze", "0")
    _write_if_there(folder, "pids.max", "0")
    try:
        with open(f"{folder}/cgroup.procs") as file:
            processes = file.read().split()
    except OSError as error:
        if error.errno in _REMOVED:
            return
        raise
    for process in processes:
        _kill_in_cgroup(int(process), os.path.basename(folder))


def _is_cgroup(folder: str) -> bool:
    return os.path.basename(folder).startswith(CGROUP) and os.path.exists(f"{folder}/cgroup.procs")


def _write_if_there(folder: str, name: str, value: str) -> bool:
    try:
        fd = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        os.write(fd, value.encode())
    except OSError as error:
        if error.errno not in _REMOVED:
            raise
    finally:
        os.close(fd)
    return True


def _kill_in_cgroup(process: int, name: str) -> None:
    try:
        pidfd = os.pidfd_open(process)
    except OSError as error:
        # It has ended; or it is listed as 0, one that another PID namespace has and this one does not.
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return
        raise
    try:
        with open(f"/proc/{process}/cgroup") as file:
            # Still, and the number is not another's since (cgroups(7), "/proc/pid/cgroup").
            is_in_it = any(name in line.rstrip().split("/") for line in file)
        if is_in_it:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return
    finally:
        os.close(pidfd)


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
        self._others_of_ours = USERS if self._user == 0 else ()
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
            owner = os.fstat(fd).st_uid
            if owner != self._user and owner not in self._others_of_ours:
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
