"""A kernel process of this machine, and its process group: watched, signalled, and what it leaves removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from code_sandboxes.forks import in_forked_child
from code_sandboxes.guest import journal
from code_sandboxes.protocol.events import Streamed
from code_sandboxes.protocol.messages import Message
from code_sandboxes.reaper import Reaper
from code_sandboxes.transports.loop import Loop
from code_sandboxes.transports.zmq import ConnectionInfo, ZmqTransport

__all__ = ["LocalProcess", "close_reaper", "the_reaper"]

_KEPT_STDERR = 16 * 1024


class LocalProcess:
    """A kernel process that this program started, and its process group."""

    how_killed = "its kernel was killed; its variables are gone"

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        connection: ConnectionInfo,
        interrupt_mode: Literal["signal", "message"],
        stderr: int,
        folder: Path,
        journal_identity: tuple[int, int],
    ) -> None:
        self._process = process
        self._connection = connection
        self._interrupt_mode = interrupt_mode
        self._stderr = stderr
        self._folder = folder
        self._journal = str(folder / "journal"), journal_identity
        self._said: deque[bytes] = deque()
        self._said_size = 0
        self._has_ended = False

    def transport(
        self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
    ) -> ZmqTransport:
        return ZmqTransport(loop, self._connection, identity, receive, max_message)

    @property
    def interrupt_mode(self) -> Literal["signal", "message"]:
        return self._interrupt_mode

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        os.set_blocking(self._stderr, False)
        loop.add_reader(self._stderr, lambda: self._hear(loop))
        try:
            pidfd = os.pidfd_open(self._process.pid)
        except (AttributeError, OSError):  # macOS, or a kernel before Linux 5.3
            self._look(loop, ended)
            return
        loop.add_reader(pidfd, lambda: self._exited(loop, pidfd, ended))

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
        self._has_ended = True
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

    def exit_code(self) -> int | None:
        return self._process.returncode

    def output(self) -> str:
        return b"".join(self._said)[-_KEPT_STDERR:].decode("utf-8", "replace")

    def written(self) -> list[int]:
        return journal.read_totals(*self._journal) or [0, 0]

    def unpublished(self, published: Sequence[int]) -> list[Streamed]:
        left = []
        for stream, (total, latest) in enumerate(journal.read(*self._journal)):
            missing = min(len(latest), total - published[stream])
            if missing > 0:
                left.append(Streamed(latest[-missing:].decode("utf-8", "replace"), error=stream == 1))
        return left

    def interrupt(self) -> None:
        self._signal_group(signal.SIGINT)

    def terminate(self) -> None:
        self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        self._signal_group(signal.SIGKILL)

    def release(self) -> None:
        the_reaper().release_group(self._process.pid)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal_group(self, number: signal.Signals) -> None:
        # The kernel leads its group. Until it is reaped its number cannot be another's.
        if not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


_the_reaper: Reaper | None = None


def the_reaper() -> Reaper:
    """The one of this process."""
    global _the_reaper
    if _the_reaper is None:
        _the_reaper = Reaper()
    return _the_reaper


def close_reaper() -> None:
    """The program ends: nothing is left to be guarded."""
    if _the_reaper is not None:
        _the_reaper.close()


def _let_go() -> object:
    global _the_reaper
    kept, _the_reaper = _the_reaper, None
    return kept


in_forked_child(_let_go)
