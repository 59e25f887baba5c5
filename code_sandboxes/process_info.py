"""What users get to see of commands: how one ended, and which ones run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CommandResult", "ProcessInfo"]


@dataclass(frozen=True, slots=True)
class CommandResult:
    """A command that has ended.

    Args:
        exit_code: -n if signal n has killed it; 255 also if code in the sandbox has waited for it, and so has
            taken its status.
        stdout: exactly what it has printed; bytes that are no UTF-8 as U+FFFD.
        stderr: the same for standard error.
        duration: seconds.
        timed_out: it took longer than its timeout, and was killed with all that it had started.
        truncated: it has printed more than is kept: the beginning and the latest part of it are there.
    """

    exit_code: int
    stdout: str
    stderr: str
    duration: float = 0.0
    timed_out: bool = False
    truncated: bool = False

    @property
    def success(self) -> bool:
        """It ended by itself, with exit code 0."""
        return self.exit_code == 0 and not self.timed_out


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A command that was running when somebody asked.

    Args:
        command: the line for the shell, or the arguments quoted as for one.
        cwd: where it was started.
        started_at: seconds since the epoch, by the clock of the sandbox.
    """

    pid: int
    command: str
    cwd: str
    started_at: float
    is_running: bool = True
