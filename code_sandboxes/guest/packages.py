"""Help pip to install packages for this kernel: say which Python it is, and notice what is new."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib import invalidate_caches
from tempfile import gettempdir
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from code_sandboxes.guest.calls import Call


class Packages:
    """Help pip to install packages."""

    in_threads = ()

    def __init__(self) -> None:
        self.functions: Mapping[str, Callable[..., object]] = {
            "packages.prepare": self._prepare,
            "packages.finish": self._finish,
        }
        self._written: set[str] = set()
        self._prefix = os.environ.get("CODE_SANDBOXES_PACKAGES")  # see launch.py

    def close(self) -> None:
        for path in list(self._written):
            self._remove(path)

    def _prepare(self, call: Call) -> object:
        """The interpreter, where it is to install, and a file with the requirements that have come along."""
        path = None
        if call.buffers:
            path = os.path.join(gettempdir(), "requirements-" + os.urandom(8).hex() + ".txt")
            self._written.add(path)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                for buffer in call.buffers:
                    file.write(buffer)
        return {
            "interpreter": call.wire(sys.executable),
            "path": None if path is None else call.wire(path),
            "prefix": None if self._prefix is None else call.wire(self._prefix),
        }

    def _finish(self, call: Call, path: object) -> None:
        """Let imports look again; remove that file."""
        if path is not None:
            self._remove(call.path(path))
        invalidate_caches()

    def _remove(self, path: str) -> None:
        if path in self._written:
            self._written.discard(path)
            try:
                os.unlink(path)
            except OSError:  # somebody has removed it before
                return
