"""The Jupyter Server of a container: it is started when somebody first connects to its socket.

Until then it costs nothing: neither time when a sandbox is made, nor its memory. What it serves are the
kernels of the contexts, which it finds as "external" ones by their connection files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from code_sandboxes.isolation.container import GUEST, HOST
from code_sandboxes.isolation.enclosure import EnclosedKernel, Enclosure
from code_sandboxes.keeper.connections import connection_file
from code_sandboxes.transports.loop import Loop

__all__ = ["JupyterServer"]

_log = logging.getLogger(__name__)

_BACKLOG = 128

# As a kernel it would have its standard error first.
_LISTENER = 3


class JupyterServer:
    """In the I/O thread, but for what is said to block.

    Args:
        path: of its socket.
        shown: the folder that the container sees, with a folder for each kernel, where that listens.
        next_number: gives numbers that nothing else in the enclosure has.
    """

    def __init__(
        self, loop: Loop, enclosure: Enclosure, path: Path, shown: Path, next_number: Callable[[], int]
    ) -> None:
        self._loop = loop
        self._enclosure = enclosure
        self._path = path
        self._shown = shown
        self._next_number = next_number
        self._is_wanted = False
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._wait()

    def add(self, number: int, connection: Mapping[str, Any]) -> Callable[[], None]:
        """Let it know a kernel; blocks. Gives what takes that back."""
        path = self._shown / f"{number}.json"
        content = json.loads(connection_file(connection, f"{HOST}/{number}/s"))
        path.touch(mode=0o600)
        path.write_text(json.dumps({**content, "kernel_name": "python3"}))
        if self._is_wanted:
            self._show()
        return lambda: path.unlink(missing_ok=True)

    def close(self) -> None:
        """The container is over."""
        if self._listener.fileno() >= 0:
            with contextlib.suppress(KeyError):  # it is being started
                self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._path.unlink(missing_ok=True)

    def _wait(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._begin)

    def _begin(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._is_wanted = True
        self._loop.run_blocking(self._start, self._started, apart=True)

    def _start(self) -> EnclosedKernel:
        self._show()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            return self._enclosure.start_kernel(
                self._next_number(),
                ["python3", f"{GUEST}/server.py", str(_LISTENER), HOST, self._enclosure.plan.working_dir],
                {**self._enclosure.environment, "JUPYTER_PLATFORM_DIRS": "1"},
                self._enclosure.plan.working_dir,
                {},
                [null, self._listener.fileno()],
            )
        finally:
            os.close(null)

    def _show(self) -> None:
        """Let the sandbox see where its kernels listen, and with which keys they sign."""
        for path in self._shown.iterdir():
            with contextlib.suppress(FileNotFoundError):  # of a kernel that has just ended
                if path.is_dir():
                    for each in path.glob("s-*"):
                        each.chmod(0o666)
                    path.chmod(0o711)
                elif path.suffix == ".json":
                    path.chmod(0o644)

    def _started(self, server: EnclosedKernel | None, error: Exception | None) -> None:
        if server is None:
            _log.error("a Jupyter Server could not be started: %s", error)
            self._ended()
        else:
            server.watch(self._ended)

    def _ended(self) -> None:
        """Who waits for it waits in vain; the next one has it started again."""
        if self._listener.fileno() < 0:
            return
        with contextlib.suppress(OSError):  # nobody more
            while True:
                self._listener.accept()[0].close()
        self._wait()
