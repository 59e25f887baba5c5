"""What it takes to make a snapshot and to begin with one, whoever keeps it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxError,
    SandboxExecutionError,
    SandboxSnapshotError,
    SandboxSnapshotWarning,
)
from code_sandboxes.frames import frames_of_this_package
from code_sandboxes.guest_values import as_list, as_object, as_str
from code_sandboxes.kernel import Kernel
from code_sandboxes.protocol.events import Started
from code_sandboxes.runs import Turn
from code_sandboxes.steps import Operation, in_worker, next_event, running_inside

__all__ = ["apart", "check_not_inside", "come", "explained", "names_of", "reasons_of", "warn_of_missing"]

T = TypeVar("T")

# Things that are named, and characters of one and of a reason.
_MOST_NAMES = 100_000
_LONGEST = 4096

# Things that a warning names.
_MOST_TOLD = 10


def apart(function: Callable[[], T]) -> Operation[T]:
    """What *function* returns, which may take long, so that nobody else should wait for it."""
    return (yield from in_worker(function, apart=True))


def check_not_inside(kernels: Iterable[Kernel]) -> None:
    """
    Raises:
        RuntimeError: this is a callback of a run on one of them, of which it would have to wait for the end.
    """
    if any(run.kernel in kernels and not run.told for run in running_inside.get()):
        raise RuntimeError(
            "create_snapshot() from inside a callback of a run would wait for the end of that run"
        )


def come(turn: Turn) -> Operation[None]:
    """Return when no code runs in its kernel, and none will.

    Raises:
        SandboxSnapshotError: it does not come to that.
    """
    turn.kernel.execute(turn)
    event = yield from next_event(turn.inbox)
    if not isinstance(event, Started):
        why = getattr(event, "sentence", "it was interrupted")
        raise SandboxSnapshotError(f"no snapshot was made: its turn did not come: {why}")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Whatever goes wrong with files, here or there, is about this."""
    try:
        yield
    except SandboxExecutionError as error:
        raise SandboxSnapshotError(f"{what}: {error}") from error
    except SandboxError:
        raise
    except OSError as error:
        raise SandboxSnapshotError(f"{what}: {error}") from error


def names_of(value: object) -> list[str]:
    """What a sandbox has named."""
    names = as_list(value)
    if len(names) > _MOST_NAMES:
        raise SandboxConnectionError(f"the sandbox named {len(names)} things")
    return [as_str(name)[:_LONGEST] for name in names]


def reasons_of(value: object) -> dict[str, str]:
    """What a sandbox has named, with its reasons."""
    reasons = as_object(value)
    names = names_of(list(reasons))
    return dict(zip(names, names_of(list(reasons.values())), strict=True))


def warn_of_missing(snapshot: str, not_restored: Mapping[str, str]) -> None:
    """Let the program know what of a snapshot is not there."""
    if not not_restored:
        return
    names = ", ".join(list(not_restored)[:_MOST_TOLD])
    more = len(not_restored) - _MOST_TOLD
    names += f" and {more} more" if more > 0 else ""
    warnings.warn(
        f"not everything of the snapshot {snapshot!r} was restored: {names} are missing;"
        ' sandbox.info.metadata["not_restored"] says why',
        SandboxSnapshotWarning,
        stacklevel=frames_of_this_package() + 1,
    )
