"""Everything this library raises, and the warnings it gives.

::

    SandboxError
     +-- SandboxConfigurationError   (ValueError)       a setting cannot be honoured
     +-- SandboxNotStartedError      (RuntimeError)     used before start() or after the end
     +-- SandboxNotFoundError        (LookupError)      no sandbox of that id
     +-- SandboxConnectionError      (ConnectionError)  a kernel could not be started, or was lost
     +-- SandboxAuthenticationError  (PermissionError)  a server does not take the token, or wants one
     +-- SandboxQuotaExceededError   (RuntimeError)     there are as many as there may be, or no credits
     +-- SandboxResourceError        (RuntimeError)     what was asked for is not there, or is not what came
     +-- SandboxTimeoutError         (TimeoutError)     a run took longer than its timeout, or a pool had none
     +-- SandboxExecutionError       (RuntimeError)     the code of a run failed
     +-- SandboxSnapshotError        (RuntimeError)     a snapshot cannot be made or restored, or is not there
     +-- ContextNotFoundError        (LookupError)      no context of that name or id
     +-- VariableNotFoundError       (LookupError)      no variable of that name
     +-- SandboxSerializationError   (TypeError)        a value cannot go into a sandbox, or come out of it

Code that fails inside a sandbox raises nothing: its error is a value, ``result.error``;
``result.raise_for_status()`` makes it one of SandboxConnectionError, SandboxTimeoutError and
SandboxExecutionError, with the result attached.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from code_sandboxes.process_info import CommandResult
    from code_sandboxes.results import ExecutionResult

__all__ = [
    "ContextNotFoundError",
    "SandboxAuthenticationError",
    "SandboxConfigurationError",
    "SandboxConnectionError",
    "SandboxError",
    "SandboxExecutionError",
    "SandboxIsolationWarning",
    "SandboxNotFoundError",
    "SandboxNotStartedError",
    "SandboxQuotaExceededError",
    "SandboxResourceError",
    "SandboxSerializationError",
    "SandboxSnapshotError",
    "SandboxSnapshotWarning",
    "SandboxTimeoutError",
    "VariableNotFoundError",
]


class SandboxError(Exception):
    """Base of every error of this library; catch it to catch them all."""


class SandboxConfigurationError(SandboxError, ValueError):
    """A setting that the chosen variant cannot honour, refused before anything was started."""


class SandboxNotStartedError(SandboxError, RuntimeError):
    """The sandbox is not running: it was not started yet, or it has ended."""


class SandboxNotFoundError(SandboxError, LookupError):
    """There is no sandbox of that id that this user could reach: it has ended, or never was."""


class _RunError(SandboxError):
    """A run, or a command, that did not succeed; *result* is all it produced."""

    def __init__(self, message: str, result: ExecutionResult | CommandResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class SandboxConnectionError(_RunError, ConnectionError):
    """A kernel could not be started or reached, or died; *result* is set where a run was cut short."""


class SandboxAuthenticationError(SandboxError, PermissionError):
    """A server does not know the token that it was given, wants one, or does not allow that to it."""


class SandboxQuotaExceededError(SandboxError, RuntimeError):
    """There are as many sandboxes, servers or kernels as this user may have, or no credits are left."""


class SandboxResourceError(SandboxError, RuntimeError):
    """What was asked for is not to be had now, or what came is something else."""


class SandboxTimeoutError(_RunError, TimeoutError):
    """A run took longer than its timeout and was interrupted; or a pool had no sandbox ready in time."""


class SandboxExecutionError(_RunError, RuntimeError):
    """The code of a run raised, or was interrupted or not run."""


class SandboxSnapshotError(SandboxError, RuntimeError):
    """A snapshot could not be made, or restored; or there is none of that name or id."""


class ContextNotFoundError(SandboxError, LookupError):
    """The sandbox has no such context."""

    def __init__(self, context: str, known: Iterable[str]) -> None:
        self.context = context
        self.known = sorted(known)
        super().__init__(context, self.known)

    def __str__(self) -> str:
        return f"no context {self.context!r} in this sandbox (known: {', '.join(self.known) or 'none'})"


class VariableNotFoundError(SandboxError, LookupError):
    """The context has no such variable."""

    def __init__(self, variable: str, context: str) -> None:
        self.variable = variable
        self.context = context
        super().__init__(variable, context)

    def __str__(self) -> str:
        return f"no variable {self.variable!r} in the context {self.context!r}"


class SandboxSerializationError(SandboxError, TypeError):
    """A value is of a type that is not transferred, or contains one; or what came is no value."""


class SandboxIsolationWarning(UserWarning):
    """``isolation="auto"`` found nothing stronger than a process of its own."""


class SandboxSnapshotWarning(UserWarning):
    """Something of a snapshot could not be restored: ``sandbox.info.metadata["not_restored"]`` says what."""
