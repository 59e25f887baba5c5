"""Ends what a service has started, and removes its folder: when the service closes, or dies without that.

Run as a program by its path, with the folder as argument; it waits for a byte, or for the end of its
standard input, which comes with any end of the service's process. It imports nothing of this package.
"""

from __future__ import annotations

import os
import shutil
import sys
import time

import psutil

__all__ = ["MARK", "sweep"]

# All processes of a runtime have inherited it: kernels, and what code in them has started, in any session.
MARK = "JUPYTER_RUNTIME_DIR"

_PATIENCE = 30.0


def sweep(folder: str) -> None:
    """End all processes of the runtimes in *folder*, and remove it."""
    give_up = time.monotonic() + _PATIENCE
    while (found := _processes_of(folder)) or os.path.lexists(folder):
        if time.monotonic() > give_up:
            raise TimeoutError(f"{folder} is still there, or in use by {found}")
        for process in found:
            _end(process)
        psutil.wait_procs(found, timeout=0.05)
        shutil.rmtree(folder, ignore_errors=True)  # somebody may still write there, or remove it, too


def _processes_of(folder: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _is_of(process, folder)]


def _is_of(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get(MARK, "").startswith(f"{folder}{os.sep}")
    except (psutil.Error, OSError):  # it has ended, or is somebody else's
        return False


def _end(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.stdin.buffer.read(1)
    sweep(sys.argv[1])
