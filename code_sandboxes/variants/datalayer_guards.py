"""What ends the runtimes of this program at Datalayer, should it be killed."""

from __future__ import annotations

import os
from threading import Lock

from code_sandboxes.forks import in_forked_child
from code_sandboxes.reaper import Reaper

__all__ = ["Guard", "Guards"]

Guard = tuple[str, str, str]
"""Where runtimes are, who may end them, and the name of one."""


class Guards:
    """Those of this process; its forks have none of them. From any thread.

    The process that watches this one is there as long as there is something to guard. Windows has no way to
    start it: there the end of a reservation is what ends a runtime.
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
            if os.name == "posix":
                self._reaper.guard_runtime(*guard)

    def release(self, guard: Guard) -> None:
        """It has ended, or is to go on; may be called again."""
        with self._lock:
            if guard not in self._guarded:
                return
            self._guarded.discard(guard)
            if os.name == "posix":
                self._reaper.release_runtime(*guard)
            if not self._guarded:
                self._reaper.close()

    def _let_go(self) -> object:
        parents, self._reaper, self._guarded, self._lock = self._reaper, Reaper(), set(), Lock()
        return parents
