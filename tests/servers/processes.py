"""What a server has started, in whatever session it is: found by a mark in the environment, and ended.

Kernels, proxies and single-user servers are in sessions of their own, and outlive a server that was killed.
So each server is started with a mark that all of them inherit. This file is also the process that ends them
when the tests are killed: see :func:`watch`.
"""

from __future__ import annotations

import atexit
import contextlib
import secrets
import subprocess
import sys
import time
from functools import cache

import psutil

__all__ = ["MARK", "end_marked", "marked", "new_mark"]

MARK = "CODE_SANDBOXES_TEST_SERVER"
"""The environment variable by which what a server started is known."""

# What begins the marks of all servers of this process.
_OURS = secrets.token_hex(8)

# One that was only forked when its parent was killed is missed by a look, and found by the next.
_LOOKS_IN_VAIN = 2

_PATIENCE = 30.0


def new_mark() -> str:
    """One for a server that is about to be started, which ends then even if this process is killed."""
    watch()
    return f"{_OURS}-{secrets.token_hex(4)}"


def marked(mark: str) -> list[psutil.Process]:
    """Those that run and whose mark begins with *mark*. Zombies have no environment, and do not count."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or it is somebody else's
            if process.environ().get(MARK, "").startswith(mark):
                found.append(process)
    return found


def end_marked(mark: str) -> None:
    """Kill them, and all that they still start meanwhile, and wait for their end.

    Raises:
        TimeoutError: some do not end.
    """
    give_up = time.monotonic() + _PATIENCE
    in_vain = 0
    while in_vain < _LOOKS_IN_VAIN:
        found = marked(mark)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        in_vain = 0 if found else in_vain + 1
        _, left = psutil.wait_procs(found, timeout=1)
        if left and time.monotonic() > give_up:
            raise TimeoutError(f"these do not end: {left}")


@cache
def watch() -> None:
    """Have a process that ends all servers of this one when this one ends, in whatever way.

    pytest-timeout ends the tests without any clearing up, and so does whoever kills them.
    """
    watcher = subprocess.Popen(
        [sys.executable, "-I", __file__, _OURS],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    assert watcher.stdin is not None

    def end() -> None:
        watcher.communicate()

    atexit.register(end)


if __name__ == "__main__":
    sys.stdin.read()  # ends when the process that has started this one does
    end_marked(sys.argv[1])
