"""Where pods are: a folder, and a janitor who cleans it up when this process closes it, or dies."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.datalayer_service import janitor

__all__ = ["Ground"]


class Ground:
    """It is there from the first need on: a service without runtimes costs nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._janitor: subprocess.Popen[bytes] | None = None

    def folder(self) -> Path:
        with self._lock:
            if self._folder is None:
                # A short name: the paths of sockets in it have 107 bytes at the most.
                self._folder = Path(tempfile.mkdtemp(prefix="dl-")).resolve()
                self._janitor = subprocess.Popen(
                    [sys.executable, janitor.__file__, str(self._folder)],
                    stdin=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is not for it
                )
            return self._folder

    def close(self) -> None:
        """End what is left there, as if this process had died."""
        if self._janitor is None:
            return
        self._janitor.communicate(b"\n")
        if self._janitor.returncode != 0:
            raise RuntimeError(f"the janitor of {self._folder} ended with {self._janitor.returncode}")
