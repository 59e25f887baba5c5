"""What ends what this program has made elsewhere, kernels and runtimes, should it be killed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from threading import Lock

from code_sandboxes.forks import in_forked_child
from code_sandboxes.reaper import Guard, Reaper
from code_sandboxes.transports.loop import the_loop

__all__ = ["Guard", "guards"]

_log = logging.getLogger(__name__)

# Seconds after which it is looked whether something has come of a request without an answer: four times.
_LOOKS = (15.0, 30.0, 60.0, 120.0)

# Windows has no way to start who watches, and a program without an interpreter has none.
_CAN_WATCH = os.name == "posix" and bool(sys.executable) and not getattr(sys, "frozen", False)


class _Guards:
    """Those of this process; its forks have none of them. From any thread.

    The process that watches this one, should it be killed, is there as long as there is something to guard.
    Where it cannot be started a runtime ends with its reservation, and a kernel when it is culled.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._reaper = Reaper()
        self._guarded: set[Guard] = set()
        in_forked_child(self._let_go)

    def guard(self, guard: Guard) -> None:
        """From before it is asked for until it is released."""
        with self._lock:
            self._guarded.add(guard)
            if _CAN_WATCH:
                self._reaper.guard_remote(guard)

    def release(self, guard: Guard) -> None:
        """It has ended, or is to go on; may be called again."""
        with self._lock:
            if guard not in self._guarded:
                return
            self._guarded.discard(guard)
            if _CAN_WATCH:
                self._reaper.release_remote(guard)
            if not self._guarded:
                self._reaper.close()

    def release_later(self, guard: Guard, end: Callable[[], bool]) -> None:
        """Release it when *end* has ended what has come of it, or nothing has come for long.

        Args:
            end: says whether nothing more can come; it may block.
        """
        the_loop().call_soon(lambda: self._end_later(guard, end, *_LOOKS))

    def _end_later(self, guard: Guard, end: Callable[[], bool], delay: float, *more: float) -> None:
        loop = the_loop()

        def ended(is_over: bool | None, error: Exception | None) -> None:
            if error is not None:
                _log.warning("something may be left: %s", error)
            if more and not is_over:
                self._end_later(guard, end, *more)
            elif error is None:  # else it is left to who watches this process
                loop.run_blocking(lambda: self.release(guard), lambda *_: None, apart=True)

        loop.call_later(delay, lambda: loop.run_blocking(end, ended, apart=True))

    def _let_go(self) -> object:
        parents, self._reaper, self._guarded, self._lock = self._reaper, Reaper(), set(), Lock()
        parents.forget()
        return parents


guards = _Guards()
"""All of this process: one process watches for all of them."""
