"""What kernels started, and did not take along when they ended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from code_sandboxes.reaper import end_marked
from code_sandboxes.transports.loop import Callback, Loop, Timer

__all__ = ["Leftovers"]

_log = logging.getLogger(__name__)

# How long a look may take: one that reads of a process that is stuck in the system may never be over.
_PATIENCE = 5.0

_Waiting = Sequence[tuple[Path, Callback]]


class Leftovers:
    """Ends them, without keeping the I/O thread; one look is for all kernels that have ended before it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._next: list[tuple[Path, Callback]] = []
        self._looked_for: _Waiting = ()
        self._timer: Timer | None = None

    def end(self, folder: Path, then: Callback) -> None:
        """End what is left of the kernel in *folder*, which has ended itself; then call *then*."""
        self._next.append((folder, then))
        if not self._looked_for:
            self._look()

    def _look(self) -> None:
        kernels: _Waiting
        kernels, self._next = self._next, []
        self._looked_for = kernels
        if kernels:
            folders = [str(folder) for folder, _ in kernels]
            self._timer = self._loop.call_later(_PATIENCE, lambda: self._looked(kernels, None))
            self._loop.run_blocking(
                lambda: end_marked(folders), lambda _, error: self._looked(kernels, error), apart=True
            )

    def _looked(self, kernels: _Waiting, error: Exception | None) -> None:
        if error is not None:
            _log.error("could not look for what kernels left: %s", error)
        if kernels is not self._looked_for:  # it took too long, and nobody waits for it any more
            return
        if self._timer is not None:
            self._timer.cancel()
        for _, then in kernels:
            self._loop.call_soon(then)
        self._look()
