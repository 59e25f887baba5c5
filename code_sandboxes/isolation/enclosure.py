"""An enclosure: the place of its own on this machine in which all kernels of one sandbox are.

Bubblewrap makes it (:mod:`code_sandboxes.isolation.bubblewrap`), ``guest/init.py`` is the first process in
it and does there what is asked here. It ends with that process, and all that is in it with it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import queue
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from code_sandboxes.guest.init import SHARED_MEMORY
from code_sandboxes.isolation import cgroups
from code_sandboxes.isolation.bubblewrap import (
    USER,
    arguments,
    data_files,
    environment,
    init_command,
    owned,
)
from code_sandboxes.isolation.landlock import SCOPES
from code_sandboxes.isolation.memory_files import memory_file
from code_sandboxes.isolation.plan import Bounds, Plan
from code_sandboxes.isolation.probe import probe
from code_sandboxes.isolation.seccomp import CORE, deny_filter
from code_sandboxes.reaper import MARK, USERS
from code_sandboxes.transports.loop import Loop

__all__ = ["EnclosedKernel", "Enclosure", "EnclosureError"]

# Seconds: how long making one may take, and how long its first process may take to answer.
_PATIENCE = 20.0

# A file for each so many bytes: what a tmpfs takes for one is memory, too.
_BYTES_PER_FILE = 4096
_MOST_FILES = 1_000_000

_SHARED_MEMORY = 64 * 1024**2
_UNLIMITED = 2**50

_OPEN_FILES = 4096

# Some systems give users what stops others ("nice", "rtprio"); the rest is counted for all processes of a
# user, so that there must be something left for those that are not in a sandbox (getrlimit(2)).
_OF_A_USER = {"nice": 0, "rtprio": 0, "memlock": 1024**2, "msgqueue": 256 * 1024, "sigpending": 4096}

_LONGEST = 65536
_KEPT_STDERR = 4096


class EnclosureError(Exception):
    """It could not be made, or something in it could not be started: a sentence."""


@dataclass(frozen=True, slots=True)
class _Reply:
    message: Mapping[str, Any]
    descriptors: Sequence[int]


class EnclosedKernel:
    """A process in an enclosure that leads a process group; in the I/O thread."""

    def __init__(self, enclosure: Enclosure, number: int) -> None:
        self.has_ended = False
        self.status: int | None = None
        """As in :mod:`subprocess`; None, too, if it ended with its enclosure."""
        self.why_ended = ""
        """More than the status says: the end of a sentence; empty if there is no more."""
        self._enclosure = enclosure
        self._number = number
        self._memory_used_up = enclosure.out_of_memory_kills()
        self._on_end: Callable[[], None] | None = None

    @property
    def has_ended_with_all(self) -> bool:
        """Nothing is left of the enclosure."""
        return self._enclosure.is_over

    def watch(self, on_end: Callable[[], None]) -> None:
        """Call *on_end* once, when it has ended."""
        self._on_end = on_end
        if self.has_ended:
            on_end()

    def signal(self, what: signal.Signals) -> None:
        """Send a signal to it and its group."""
        if not self.has_ended:
            self._enclosure.signal(self._number, what)

    def ended(self, status: int | None) -> None:
        self.has_ended, self.status = True, status
        self.why_ended = self._reason()
        if self._on_end is not None:
            self._on_end()

    def _reason(self) -> str:
        if self.status not in (None, -signal.SIGKILL):
            return ""
        reasons = []
        if self._enclosure.out_of_memory_kills() > self._memory_used_up:
            memory = (self._enclosure.plan.bounds.memory or 0) / 1024**2
            reasons.append(f"the sandbox used up its memory of {memory:g} MiB, in which its files lie, too")
        if self.status is None:
            reasons.append("the whole sandbox was ended, and its files with it")
        return "; ".join(reasons)


class Enclosure:
    """See :meth:`make`. What is not said to block is called in the I/O thread."""

    def __init__(
        self,
        loop: Loop,
        plan: Plan,
        process: subprocess.Popen[bytes],
        first: int,
        control: socket.socket,
        proxy_listener: socket.socket | None,
        cgroup: cgroups.Cgroup | None,
    ) -> None:
        self.plan = plan
        self.pid = process.pid
        self.is_over = False
        self.proxy_listener = proxy_listener
        self._loop = loop
        self._process = process
        self._first = first  # a descriptor of the first process in it
        self._control = control
        self._cgroup = cgroup
        self._waiting: dict[int, Callable[[_Reply | None], None]] = {}
        self._kernels: dict[int, EnclosedKernel] = {}
        self._memory_used_up = 0
        self._connections = 0
        self._tell: Callable[[], None] = _nothing

    @staticmethod
    def cgroups_of(name: str, plan: Plan) -> tuple[str, ...]:
        """The folders of the cgroups that :meth:`make` makes."""
        return cgroups.folders_of(name, _of_cgroups(plan))

    @classmethod
    def make(cls, loop: Loop, plan: Plan, name: str, folder: str) -> Enclosure:
        """Make one; blocks, and whose thread this is must live as long as the enclosure.

        Args:
            name: for what else has to be made on this machine, a cgroup; nothing else has it.
            folder: the sandbox's, by which a reaper finds what is left of it.

        Raises:
            EnclosureError: it cannot be made as it is planned.
            OSError: something is missing to make it: descriptors, processes.
        """
        _check_places(plan)
        user = secrets.choice(USERS) if os.geteuid() == 0 else USER
        with contextlib.ExitStack() as undo:
            cgroup = cgroups.make(name, _of_cgroups(plan))
            if cgroup is not None:
                undo.callback(cgroup.remove)
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(control.close)
            with theirs:
                process, info, said = _start(plan, user, theirs.fileno(), folder)
            undo.callback(process.wait)
            undo.callback(_kill_group, process)
            with open(info), open(said):
                pid, first = _first_process(info, said)
                undo.callback(os.close, first)
                undo.callback(_kill, first)
                if cgroup is not None:
                    cgroup.add(pid)
                listener = _configured(control, _configuration(plan, user), said)
            undo.pop_all()
        return cls(loop, plan, process, first, control, listener, cgroup)

    # What it is asked.

    def watch(self, on_end: Callable[[], None]) -> None:
        """Call *on_end* once, when it is over."""
        self._tell = on_end
        self._loop.add_reader(self._control.fileno(), self._read)

    def start_kernel(
        self,
        number: int,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        files: Mapping[str, str],
        descriptors: Sequence[int],
    ) -> EnclosedKernel:
        """Start a kernel; blocks, so not in the I/O thread.

        Args:
            number: above zero, and no other kernel's.
            files: private ones to write first, by path.
            descriptors: what it has from its standard error, 2, on.

        Raises:
            OSError: there is no such program or directory.
            EnclosureError: the enclosure is over.
        """
        document = {"argv": list(command), "env": dict(env), "cwd": cwd, "files": dict(files)}
        kernel = self._kernels[number] = EnclosedKernel(self, number)
        how = memory_file(json.dumps(document).encode())
        try:
            self._ask(number, {"start": number}, [how, *descriptors])
        except BaseException:
            self._kernels.pop(number, None)
            raise
        finally:
            os.close(how)
        return kernel

    def signal(self, number: int, what: signal.Signals) -> None:
        """Send a signal to a kernel and its process group."""
        self._send({"signal": number, "number": int(what)})

    def connect(self, path: str, then: Callable[[int, OSError | None], None]) -> None:
        """Call *then* with a connection, as a descriptor, to a Unix socket of the sandbox, or with an error.

        From any thread; *then* is called in the I/O thread.
        """
        self._loop.call_soon(lambda: self._connect(path, then))

    def out_of_memory_kills(self) -> int:
        """How often something in it was ended because its memory was used up, as far as that is known."""
        if self._cgroup is not None:
            with contextlib.suppress(OSError):  # it is gone: there are no more
                self._memory_used_up = self._cgroup.out_of_memory_kills()
        return self._memory_used_up

    @property
    def cgroups(self) -> tuple[str, ...]:
        """The folders of its cgroups."""
        return () if self._cgroup is None else self._cgroup.folders

    def kill(self) -> None:
        """End it at once; from any thread."""
        if not self.is_over:
            _kill(self._first)

    def remove(self) -> None:
        """End it, and remove what is left; blocks.

        Raises:
            OSError: something does not end, or cannot be removed.
        """
        self.kill()
        # When it has ended, so has everything in its PID namespace (pid_namespaces(7)).
        if not select.select([self._first], [], [], _PATIENCE)[0]:
            raise TimeoutError(f"the sandbox's first process does not end within {_PATIENCE:g} s")
        self._process.kill()  # it only waits for the other one
        self._process.wait()
        os.close(self._first)
        self._control.close()
        if self.proxy_listener is not None:
            self.proxy_listener.close()
        if self._cgroup is not None:
            self._cgroup.remove()

    # What it tells.

    def _connect(self, path: str, then: Callable[[int, OSError | None], None]) -> None:
        self._connections -= 1  # kernels have the numbers above zero
        number = self._connections

        def answered(reply: _Reply | None) -> None:
            del self._waiting[number]
            if reply is not None and reply.descriptors:
                then(reply.descriptors[0], None)
            else:
                then(-1, _error_of(reply, path))

        self._waiting[number] = answered
        self._send({"connect": number, "path": path})

    def _ask(self, number: int, message: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        answer: queue.SimpleQueue[_Reply | None] = queue.SimpleQueue()
        self._waiting[number] = answer.put
        self._loop.call_soon(lambda: self._send(message, descriptors))
        try:
            reply = answer.get(timeout=_PATIENCE)
        except queue.Empty:
            self.kill()
            raise EnclosureError(f"its first process did not answer within {_PATIENCE:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if reply is None:
            raise EnclosureError("the sandbox has ended")
        if "failed" in reply.message:
            raise _error_of(reply, "")

    def _send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        try:
            if not self.is_over:
                socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        except BlockingIOError:  # it has not read for long: it never will
            self.kill()
        except OSError:  # it is over, which is told
            return
        self._forget_waiting_if_over()

    def _read(self) -> None:
        try:
            reply = _receive(self._control)
        except BlockingIOError:
            return
        except (OSError, ValueError, RecursionError):  # what is in there is not what was put there
            self._over()
            return
        if not reply.message:
            self._over()
        elif not self._is_taken(reply):  # by nobody, or too late
            _close_all(reply.descriptors)

    def _is_taken(self, reply: _Reply) -> bool:
        numbers = {kind: value for kind, value in reply.message.items() if type(value) is int}
        kernel = self._kernels.pop(numbers.get("ended", 0), None)
        if kernel is not None:
            kernel.ended(numbers.get("status"))
            return False
        answers = (self._waiting.get(numbers.get(kind, 0)) for kind in ("started", "connected", "failed"))
        answer = next((answer for answer in answers if answer is not None), None)
        if answer is not None:
            answer(reply)
        return answer is not None

    def _over(self) -> None:
        if self.is_over:
            return
        self.kill()
        self.is_over = True
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        self._forget_waiting_if_over()
        kernels, self._kernels = self._kernels, {}
        for kernel in kernels.values():
            kernel.ended(None)
        self._tell()

    def _forget_waiting_if_over(self) -> None:
        if self.is_over:
            for answer in list(self._waiting.values()):
                answer(None)


def _error_of(reply: _Reply | None, path: str) -> OSError:
    if reply is None:
        return OSError(errno.ECONNRESET, "the sandbox has ended", path)
    code = reply.message.get("errno")
    if type(code) is not int:
        code = errno.EPROTO
    return OSError(code, os.strerror(code), str(reply.message.get("path") or path))


def _check_places(plan: Plan) -> None:
    """
    Raises:
        EnclosureError: a place that bubblewrap makes lies behind a link. Whoever could write where that is
            may have led it out of the enclosure, of which bubblewrap is still outside when it makes places.
    """
    for place in (*(mount.target for mount in plan.mounts), plan.working_dir):
        for mount in plan.mounts:
            if place.startswith(f"{mount.target}/"):
                path = mount.source + place.removeprefix(mount.target)
                if os.path.realpath(path) != os.path.realpath(mount.source) + path.removeprefix(mount.source):
                    raise EnclosureError(
                        f"{place} cannot be made in it: on this machine {path} lies behind a link"
                    )


def _start(plan: Plan, user: int, control: int, folder: str) -> tuple[subprocess.Popen[bytes], int, int]:
    """The process of bubblewrap, and what to read: its information and its standard error."""
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as on_failure:
        data = {}
        for path, content in data_files(plan, user).items():
            data[path] = memory_file(content)
            ours.callback(os.close, data[path])
        info, info_write = os.pipe()
        on_failure.callback(os.close, info)
        ours.callback(os.close, info_write)
        said, said_write = os.pipe()
        on_failure.callback(os.close, said)
        ours.callback(os.close, said_write)
        command = arguments(
            plan,
            program=plan.program or probe().bubblewrap_path,
            as_root=user != USER,
            sizes=_sizes(plan),
            data=data,
            info=info_write,
        )
        process = subprocess.Popen(
            [*command, *init_command(plan, control)],
            pass_fds=[control, info_write, *data.values()],
            # The first process has another one by the time that code could look at it.
            env={**environment(), MARK: folder},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said_write,
            start_new_session=True,
        )
        on_failure.pop_all()
    return process, info, said


def _configured(control: socket.socket, configuration: Mapping[str, Any], said: int) -> socket.socket | None:
    """Let the first process do its part; returns the socket for a proxy, if there is to be one.

    Raises:
        EnclosureError: it cannot.
    """
    control.settimeout(_PATIENCE)
    try:
        socket.send_fds(control, [json.dumps({"configure": configuration}).encode()], [])
        reply = _receive(control)
    except OSError as error:
        raise EnclosureError(f"its first process does not answer: {_said(said) or error}") from None
    control.setblocking(False)
    if "ready" not in reply.message:
        why = reply.message.get("unfit") or _said(said) or "it does not say why"
        raise EnclosureError(f"its first process has ended: {why}")
    return socket.socket(fileno=reply.descriptors[0]) if reply.descriptors else None


def _first_process(info: int, said: int) -> tuple[int, int]:
    """The number of the enclosure's first process, and a descriptor of it.

    Raises:
        EnclosureError: there is none.
    """
    # To its end: it is written in pieces, and ends when the enclosure is complete. Before that, ending
    # bubblewrap would leave the process in it (bubblewrap, issue 633).
    told = _read_to_end(info)
    try:
        pid = int(json.loads(told)["child-pid"])
    except (ValueError, KeyError):
        raise EnclosureError(f"bubblewrap did not make it: {_said(said) or 'it does not say why'}") from None
    return pid, os.pidfd_open(pid)


def _configuration(plan: Plan, user: int) -> dict[str, Any]:
    """What the first process has to do before anything runs."""
    sizes = dict(zip(("/", SHARED_MEMORY), _sizes(plan), strict=True))
    return {
        "uid": user,
        "in_namespace": user == USER,
        "proxy": plan.network != "all",
        "mounts": [(mount.target, mount.identity) for mount in plan.mounts if mount.identity is not None],
        "sizes": {path: (size, _files(size, plan)) for path, size in sizes.items()},
        "owned": owned(plan),
        "scoped": plan.network == "all" and probe().landlock >= SCOPES,
        "core": CORE,
        "limits": _limits(plan),
        "filter": base64.b64encode(deny_filter()).decode(),
    }


def _of_cgroups(plan: Plan) -> Bounds:
    return replace(plan.bounds, pids=None)  # as the first process must be able to start more


def _limits(plan: Plan) -> dict[str, int]:
    limits = {"nofile": _OPEN_FILES, **_OF_A_USER}
    if plan.bounds.pids is not None:
        limits["nproc"] = plan.bounds.pids
    return limits


def _sizes(plan: Plan) -> tuple[int, int]:
    """Bytes of the root and of the shared memory, together what the plan allows."""
    if plan.bounds.disk is None:
        return _UNLIMITED, _SHARED_MEMORY
    shared_memory = min(_SHARED_MEMORY, plan.bounds.disk // 4)
    return plan.bounds.disk - shared_memory, shared_memory


def _files(size: int, plan: Plan) -> int:
    """How many may be in a tmpfs of *size* bytes."""
    if plan.bounds.memory is not None:  # of which what the system has to know of a file takes a part
        size = min(size, plan.bounds.memory)
    return max(1024, min(size // _BYTES_PER_FILE, _MOST_FILES))


def _receive(control: socket.socket) -> _Reply:
    data, descriptors, _, _ = socket.recv_fds(control, _LONGEST, 4)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    message = json.loads(data) if data else {}
    if not isinstance(message, dict):
        raise ValueError("that is no message")
    return _Reply(message, descriptors)


def _read_to_end(descriptor: int) -> bytes:
    give_up = time.monotonic() + _PATIENCE
    data = b""
    while select.select([descriptor], [], [], max(0.0, give_up - time.monotonic()))[0]:
        part = os.read(descriptor, _LONGEST)
        if not part:
            return data
        data += part
    raise EnclosureError(f"bubblewrap took longer than {_PATIENCE:g} s")


def _said(stderr: int) -> str:
    """What is there to read, without waiting for more."""
    os.set_blocking(stderr, False)
    try:
        return os.read(stderr, _KEPT_STDERR).decode("utf-8", "replace").strip()
    except BlockingIOError:
        return ""


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End bubblewrap, and its child that waits for ever where this was ended too early (its issue 633)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _nothing() -> None:
    return
