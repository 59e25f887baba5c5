"""A kernel process that the keeper started, and its process group: watched, signalled, and removed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code_sandboxes.guest import journal
from code_sandboxes.keeper.lines import start_time
from code_sandboxes.protocol.messages import Channel, Message, Session
from code_sandboxes.reaper import MARK
from code_sandboxes.transports.loop import Loop

if TYPE_CHECKING:
    from code_sandboxes.transports.zmq import ZmqTransport

__all__ = ["LEASE", "HostedKernel", "Observer", "descriptors_left", "raise_descriptor_limit", "start_kernel"]

LEASE = "process"
"""The file beside a kernel's connection file that says which process it is: its number and when it began."""

_CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
_KEPT_STDERR = 16 * 1024
_MAX_MESSAGE = 64 * 1024**2

# Whoever asks for one of these uses the kernel: runs, and calls of files and commands.
_USES = ("execute_request", "comm_open", "comm_msg")

# The ``comm_id`` under which the guest in a kernel tells whether commands are running (guest/comms.py).
_PROCESSES = "code_sandboxes.processes"


class HostedKernel:
    """A kernel process and its process group."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stderr: int,
        folder: Path,
        connection: Mapping[str, Any],
        journal_identity: tuple[int, int],
    ) -> None:
        self.pid = process.pid
        self.folder = folder
        self.connection = connection
        self.journal_identity = journal_identity
        self.has_ended = False
        self._process = process
        self._stderr = stderr
        self._said: deque[bytes] = deque()
        self._said_size = 0

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        """Call *ended* once, when the process has ended."""
        os.set_blocking(self._stderr, False)
        loop.add_reader(self._stderr, lambda: self._hear(loop))
        try:
            pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # macOS, or a kernel before Linux 5.3
            self._look(loop, ended)
            return
        loop.add_reader(pidfd, lambda: self._exited(loop, pidfd, ended))

    def exit_code(self) -> int | None:
        """As in :mod:`subprocess`."""
        return self._process.returncode

    def output(self) -> str:
        """The latest of what it wrote to its standard error."""
        return b"".join(self._said)[-_KEPT_STDERR:].decode("utf-8", "replace")

    def interrupt(self) -> None:
        self._signal_group(signal.SIGINT)

    def terminate(self) -> None:
        self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        self._signal_group(signal.SIGKILL)

    def abort(self) -> None:
        """End it at once, and whoever could not be watched with it."""
        self.kill()
        self._process.wait()
        self.has_ended = True

    def _exited(self, loop: Loop, pidfd: int, ended: Callable[[], None]) -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        self._ended(loop, ended)

    def _look(self, loop: Loop, ended: Callable[[], None]) -> None:
        if self._process.poll() is None:
            loop.call_later(0.05, lambda: self._look(loop, ended))
        else:
            self._ended(loop, ended)

    def _ended(self, loop: Loop, ended: Callable[[], None]) -> None:
        # Children it left go now, while the dead leader still keeps the group's number from being used again.
        self._signal_group(signal.SIGKILL)
        self.has_ended = True
        self._process.wait()
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

    def _signal_group(self, number: signal.Signals) -> None:
        # The kernel leads its group. Until it is reaped its number cannot be another's.
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def start_kernel(folder: Path, command: Sequence[str], env: Mapping[str, str], cwd: str) -> HostedKernel:
    """Start a kernel that has *folder* for its connection file and sockets.

    Args:
        command: with ``{connection_file}`` where its path belongs.

    Raises:
        OSError: there is no such program or directory, or something is missing to start it.
    """
    folder.mkdir(mode=0o700)
    connection = _write_connection_file(folder)
    identity = journal.create(str(folder / "journal"))
    path = str(folder / "connection.json")
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            [argument.replace("{connection_file}", path) for argument in command],
            # ipykernel ends when this is not its parent; what it starts is found by its mark.
            env={**env, "JPY_PARENT_PID": str(os.getpid()), MARK: str(folder)},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=write,
            start_new_session=True,
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    _limit_descriptors(process.pid)
    kernel = HostedKernel(process, read, folder, connection, identity)
    try:
        (folder / LEASE).write_text(f"{process.pid} {start_time(process.pid)}")
    except OSError:  # no room: without it nobody could end it, should the keeper be killed
        kernel.kill()
        process.wait()
        os.close(read)
        raise
    return kernel


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


def _write_connection_file(folder: Path) -> dict[str, Any]:
    """Choose where the kernel listens, and write it where it looks (jupyter_client, "Connection files")."""
    ports = {channel: number for number, channel in enumerate(_CHANNELS, start=1)}
    where = {"transport": "ipc", "ip": str(folder / "s"), "key": secrets.token_hex(32)}
    content = {**where, "signature_scheme": "hmac-sha256"}
    path = folder / "connection.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps({**content, **{f"{channel}_port": port for channel, port in ports.items()}}))
    return {**where, "ports": ports}


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
