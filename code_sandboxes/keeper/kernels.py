"""A kernel that the keeper started: watched, signalled, and removed."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code_sandboxes.guest import journal
from code_sandboxes.isolation.egress import the_egress
from code_sandboxes.isolation.enclosure import Enclosure
from code_sandboxes.isolation.landlock import landlocked
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.isolation.seccomp import CORE
from code_sandboxes.keeper.connections import (
    Handover,
    connection_file,
    handed_over,
    listen,
    write_connection_file,
)
from code_sandboxes.keeper.leaders import ChildLeader, EnclosedLeader, Leader
from code_sandboxes.keeper.lines import start_time
from code_sandboxes.protocol.messages import Channel, Message, Session
from code_sandboxes.reaper import MARK, Reaper
from code_sandboxes.transports.loop import Loop

if TYPE_CHECKING:
    from code_sandboxes.transports.zmq import ZmqTransport

__all__ = [
    "LEASE",
    "HostedKernel",
    "Observer",
    "descriptors_left",
    "raise_descriptor_limit",
    "start_confined",
    "start_enclosed",
    "start_kernel",
]

LEASE = "process"
"""The file beside a kernel's connection file that says which process it is: its number and when it began."""

_KEPT_STDERR = 16 * 1024

# Of a kernel that is no enclosure's: as one in it has them.
_LIMITS = {"core": CORE, "nofile": 4096}

_NO_JOURNAL = ("", 0, 0)

# The longest that the keeper wants to know is what a kernel says of itself. What is longer costs it nothing.
_MAX_MESSAGE = 256 * 1024

# Whoever asks for one of these uses the kernel: runs, and calls of files and commands.
_USES = ("execute_request", "comm_open", "comm_msg")

# The ``comm_id`` under which the guest in a kernel tells whether commands are running (guest/comms.py).
_PROCESSES = "code_sandboxes.processes"


class HostedKernel:
    """A kernel: its process, what it says, and what it has on this machine.

    Args:
        stderr: a descriptor to read what it writes to its standard error.
        journal: where its journal is, and what tells it from another file.
        close: lets go of what the keeper has open for it.
    """

    def __init__(
        self,
        leader: Leader,
        stderr: int,
        folder: Path,
        connection: Mapping[str, Any],
        journal: tuple[str, int, int],
        close: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.connection = connection
        self.journal = journal
        self.close = close
        self._leader = leader
        self._stderr = stderr
        self._said: deque[bytes] = deque()
        self._said_size = 0

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        """Call *ended* once, when the process has ended."""
        os.set_blocking(self._stderr, False)
        loop.add_reader(self._stderr, lambda: self._hear(loop))
        self._leader.watch(loop, lambda: self._ended(loop, ended))

    def exit_code(self) -> int | None:
        return self._leader.exit_code()

    def why_ended(self) -> str:
        """More than its exit code says: the end of a sentence; empty if there is no more."""
        return self._leader.why_ended()

    @property
    def leaves_nothing(self) -> bool:
        """Whatever it started has ended, too."""
        return self._leader.leaves_nothing

    def output(self) -> str:
        """The latest of what it wrote to its standard error."""
        return b"".join(self._said)[-_KEPT_STDERR:].decode("utf-8", "replace")

    def interrupt(self) -> None:
        self._leader.signal(signal.SIGINT)

    def terminate(self) -> None:
        self._leader.signal(signal.SIGTERM)

    def kill(self) -> None:
        self._leader.signal(signal.SIGKILL)

    def abort(self) -> None:
        """End it at once, and whoever could not be watched with it."""
        self._leader.abort()

    def _ended(self, loop: Loop, ended: Callable[[], None]) -> None:
        if self._stderr >= 0:
            self._hear(loop)  # a pipe holds 64 KiB: that is all there can be
        if self._stderr >= 0:
            self._close_stderr(loop)
        ended()

    def _hear(self, loop: Loop) -> None:
        # Once a turn: whoever floods it must not keep the others waiting.
        try:
            said = os.read(self._stderr, 65536)
        except BlockingIOError:
            return
        if not said:
            self._close_stderr(loop)
            return
        self._said.append(said)
        self._said_size += len(said)
        while self._said_size - len(self._said[0]) > _KEPT_STDERR:
            self._said_size -= len(self._said.popleft())

    def _close_stderr(self, loop: Loop) -> None:
        loop.remove_reader(self._stderr)
        os.close(self._stderr)
        self._stderr = -1


def start_kernel(folder: Path, launch: Mapping[str, Any], home: Path, guard: Reaper) -> HostedKernel:
    """Start a kernel as a process of this machine.

    Args:
        folder: for its connection file and sockets; made here.
        launch: ``command``, with ``{connection_file}`` where its path belongs, ``env`` and ``cwd``; and a
            ``key``, if it is to sign with a given one.
        home: where it starts, if ``cwd`` does not say.

    Raises:
        OSError: there is no such program or directory, or something is missing to start it.
    """
    folder.mkdir(mode=0o700)
    connection = write_connection_file(folder, launch.get("key"))
    path = str(folder / "journal")
    identity = journal.create(path)
    read, write = os.pipe()
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(os.close, read)
        try:
            process = subprocess.Popen(
                _filled_in(launch["command"], str(folder / "connection.json")),
                env=_environment(launch, folder, os.getpid()),
                cwd=launch["cwd"] or str(home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=write,
                start_new_session=True,
            )
        finally:
            os.close(write)
        _limit_descriptors(process.pid)
        leader = ChildLeader(process, guard)
        _lease(folder, process.pid, leader)
        on_failure.pop_all()
    return HostedKernel(leader, read, folder, connection, (path, *identity), _nothing)


def start_confined(
    folder: Path, launch: Mapping[str, Any], home: Path, guard: Reaper, plan: Plan
) -> HostedKernel:
    """Start a kernel as a process of this machine that has given up most of it (landlock(7)).

    Args:
        folder: for its sockets; made here.
        launch: as in :func:`start_kernel`, of a kernel that takes descriptors.
        home: all that it can write; where it starts, if ``cwd`` does not say.

    Raises:
        OSError: as :func:`start_kernel`.
    """
    folder.mkdir(mode=0o700)
    temporary = home / "tmp"
    temporary.mkdir(mode=0o700, exist_ok=True)
    with (
        handed_over(folder, launch.get("key"), renumbered=False) as handover,
        contextlib.ExitStack() as stack,
    ):
        stderr, *descriptors = handover.descriptors
        command, document = landlocked(
            _filled_in(launch["command"], handover.connection_file),
            readable=[mount.source for mount in plan.mounts],
            writable=[str(home)],
            limits=_LIMITS,
            block_inet=plan.network == "none",
        )
        stack.callback(os.close, document)
        process = subprocess.Popen(
            command,
            pass_fds=[document, *descriptors],
            env={**_environment(launch, folder, os.getpid()), "TMPDIR": str(temporary)},
            cwd=launch["cwd"] or str(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        leader = ChildLeader(process, guard)
        _lease(folder, process.pid, leader)
    return _of(leader, folder, handover)


def start_enclosed(
    enclosure: Enclosure, number: int, folder: Path, launch: Mapping[str, Any]
) -> HostedKernel:
    """Start a kernel in *enclosure*; blocks, so not in the I/O thread.

    Args:
        number: of the kernel; no other one in the enclosure has it.
        folder: for its sockets; made here.
        launch: as in :func:`start_kernel`; if not ``by_descriptors``, of any kernel that listens in files.

    Raises:
        OSError: there is no such program or directory, or something is missing to start it.
        EnclosureError: the enclosure is over.
    """
    folder.mkdir(mode=0o700)
    cwd = launch["cwd"]
    environment = {**enclosure.environment, **_environment(launch, folder, 1)}
    if not launch["by_descriptors"]:
        return _start_relayed(enclosure, number, folder, launch, environment, cwd)
    with handed_over(folder, launch.get("key"), renumbered=True) as handover:
        command = _filled_in(launch["command"], handover.connection_file)
        kernel = enclosure.start_kernel(number, command, environment, cwd, {}, handover.descriptors)
    return _of(EnclosedLeader(kernel), folder, handover)


def _start_relayed(
    enclosure: Enclosure,
    number: int,
    folder: Path,
    launch: Mapping[str, Any],
    environment: Mapping[str, str],
    cwd: str,
) -> HostedKernel:
    """A kernel that listens in the enclosure's own files: programs reach it through the keeper."""
    inside = f"/run/kernels/{number}"
    path = f"{inside}/connection.json"
    with contextlib.ExitStack() as for_kernel, contextlib.ExitStack() as for_keeper:
        listening = listen(folder, launch.get("key"))
        for each in listening.sockets:
            for_keeper.enter_context(each)
        read, write = os.pipe()
        for_keeper.callback(os.close, read)
        for_kernel.callback(os.close, write)
        files = {path: connection_file(listening.connection, f"{inside}/s")}
        command = _filled_in(launch["command"], path)
        kernel = enclosure.start_kernel(number, command, environment, cwd, files, [write])
        for_keeper.pop_all()
    relays = [
        the_egress().relay(each, partial(enclosure.connect, f"{inside}/s-{port}"))
        for port, each in enumerate(listening.sockets, start=1)
    ]

    def close() -> None:
        for relay in relays:
            relay.close()

    leader = EnclosedLeader(kernel)
    return HostedKernel(leader, read, folder, listening.connection, _NO_JOURNAL, close)


def _of(leader: Leader, folder: Path, handover: Handover) -> HostedKernel:
    book, identity = handover.journal
    where = (f"/proc/{os.getpid()}/fd/{book}", *identity)
    return HostedKernel(leader, handover.stderr, folder, handover.connection, where, lambda: os.close(book))


def _environment(launch: Mapping[str, Any], folder: Path, parent: int) -> dict[str, str]:
    # ipykernel ends when that is not its parent; what it starts is found by its mark.
    return {**launch["env"], "JPY_PARENT_PID": str(parent), MARK: str(folder)}


def _filled_in(command: Sequence[str], path: str) -> list[str]:
    return [argument.replace("{connection_file}", path) for argument in command]


def _lease(folder: Path, pid: int, leader: Leader) -> None:
    try:
        (folder / LEASE).write_text(f"{pid} {start_time(pid)}")
    except OSError:  # no room: without it nobody could end it, should the keeper be killed
        leader.abort()
        raise


_descriptors = None
"""What the limit of descriptors was before :func:`raise_descriptor_limit`: a soft and a hard one."""


def raise_descriptor_limit() -> None:
    """A keeper has two for each kernel, and more for some."""
    global _descriptors
    if hasattr(resource, "prlimit"):
        _descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (_descriptors[1], _descriptors[1]))


def descriptors_left() -> int | None:
    """How many more the keeper may open; None where nobody tells."""
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - used


def _limit_descriptors(pid: int) -> None:
    """The limit that the keeper had is the one for its kernels."""
    if _descriptors is not None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, _descriptors)


def _nothing() -> None:
    return


class Observer:
    """Hears from a kernel when it is used, and can tell when it has come to the end of what it does.

    Args:
        changed: called when a run, a call or the first of some commands has begun, and when it is over.
    """

    def __init__(self, loop: Loop, kernel: HostedKernel, changed: Callable[[], None]) -> None:
        from code_sandboxes.transports.zmq import ConnectionInfo, ZmqTransport

        class StatusTransport(ZmqTransport):
            """Reads no other message: what code publishes may be large, and is not the keeper's business."""

            def _decode(self, name: Channel, frames: list[bytes]) -> None:
                if name != "iopub" or any(b'"status"' in frame for frame in frames if len(frame) < 2000):
                    super()._decode(name, frames)

        self._session = Session(secrets.token_hex(16), lambda: datetime.now(timezone.utc).isoformat())
        self._changed = changed
        self.runs_commands = False
        self._when_done: dict[str, Callable[[], None]] = {}
        self._transport: ZmqTransport = StatusTransport(
            loop,
            ConnectionInfo(**kernel.connection),
            self._session.session_id,
            self._receive,
            _MAX_MESSAGE,
        )
        self._transport.open()

    @property
    def is_asked(self) -> bool:
        """An answer is still to come."""
        return bool(self._when_done)

    def when_done(self, then: Callable[[], None]) -> None:
        """Call *then* when everything that the kernel was asked before this has been done."""
        request = self._session.message("shell", "kernel_info_request")
        self._when_done[request.msg_id] = then
        self._transport.send(request)

    def close(self) -> None:
        self._when_done.clear()
        self._transport.close()

    def _receive(self, message: Message) -> None:
        if message.msg_type == "kernel_info_reply":
            done = self._when_done.pop(message.parent_id, None)
            if done is not None:
                done()
        elif message.msg_type == "status" and message.parent_header.get("msg_type") in _USES:
            self._changed()
        elif message.msg_type == "comm_msg" and message.content.get("comm_id") == _PROCESSES:
            runs_commands = _decode_processes(message.content.get("data"))
            if runs_commands is not None:
                self.runs_commands = runs_commands
                self._changed()


def _decode_processes(data: object) -> bool | None:
    """Whether commands are running; None where that is not what it says."""
    if not isinstance(data, Mapping):
        return None
    status, processes = data.get("status"), data.get("processes")
    if type(processes) is not int or (status, processes > 0) not in (("running", True), ("none", False)):
        return None
    return processes > 0
