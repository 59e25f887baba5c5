"""The process of a kernel, wherever it runs: watched and signalled, with the process group that it leads."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Protocol

from code_sandboxes.isolation.enclosure import EnclosedKernel
from code_sandboxes.reaper import Reaper
from code_sandboxes.transports.loop import Loop

__all__ = ["ChildLeader", "EnclosedLeader", "Leader"]


class Leader(Protocol):
    """The process of a kernel, which leads a process group."""

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        """Call *ended* once, when it has ended."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and its group; none if it has ended."""

    def exit_code(self) -> int | None:
        """As in :mod:`subprocess`; None, too, where nobody knows."""

    def why_ended(self) -> str:
        """More than its exit code says: the end of a sentence; empty if there is no more."""

    @property
    def leaves_nothing(self) -> bool:
        """Whatever it started has ended, too."""

    def abort(self) -> None:
        """End it at once, as it could not be watched."""


class ChildLeader:
    """A process of this machine that the keeper started."""

    def __init__(self, process: subprocess.Popen[bytes], guard: Reaper) -> None:
        self._process = process
        self._guard = guard
        self._has_ended = False

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        self._guard.guard_group(self._process.pid)
        try:
            pidfd = os.pidfd_open(self._process.pid)
        except (AttributeError, OSError):  # macOS, or a kernel before Linux 5.3
            self._look(loop, ended)
            return
        loop.add_reader(pidfd, lambda: self._exited(loop, pidfd, ended))

    def signal(self, number: signal.Signals) -> None:
        # Until it is reaped its number cannot be another's.
        if not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def exit_code(self) -> int | None:
        return self._process.returncode

    def why_ended(self) -> str:
        return ""

    @property
    def leaves_nothing(self) -> bool:
        return False

    def abort(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._has_ended = True
        self._guard.release_group(self._process.pid)

    def _exited(self, loop: Loop, pidfd: int, ended: Callable[[], None]) -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        self._ended(ended)

    def _look(self, loop: Loop, ended: Callable[[], None]) -> None:
        if self._process.poll() is None:
            loop.call_later(0.05, lambda: self._look(loop, ended))
        else:
            self._ended(ended)

    def _ended(self, ended: Callable[[], None]) -> None:
        # Children it left go now, while the dead leader still keeps the group's number from being used again.
        self.abort()
        ended()


class EnclosedLeader:
    """A process in an enclosure."""

    def __init__(self, kernel: EnclosedKernel) -> None:
        self._kernel = kernel

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        self._kernel.watch(ended)

    def signal(self, number: signal.Signals) -> None:
        self._kernel.signal(number)

    def exit_code(self) -> int | None:
        return self._kernel.status

    def why_ended(self) -> str:
        return self._kernel.why_ended

    @property
    def leaves_nothing(self) -> bool:
        return self._kernel.has_ended_with_all

    def abort(self) -> None:
        self._kernel.signal(signal.SIGKILL)
