"""The Jupyter Server of a container: it is started when somebody first connects to its socket.

Until then it costs nothing: neither time when a sandbox is made, nor its memory. What it serves are the
kernels of the contexts, which it finds as "external" ones by their connection files. It listens in the
container, where code can do with it as it likes; whoever connects here is passed on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code_sandboxes.isolation.container import HOST
from code_sandboxes.isolation.egress import Service, the_egress
from code_sandboxes.isolation.enclosure import EnclosedKernel, Enclosure
from code_sandboxes.keeper.connections import connection_file
from code_sandboxes.transports.loop import Loop

if TYPE_CHECKING:
    from code_sandboxes.isolation.relay import Connected

__all__ = ["JupyterServer"]

_log = logging.getLogger(__name__)

_BACKLOG = 128

_SOCKET = "/tmp/code-sandboxes-jupyter"

_COMMAND = (
    *("python3", "-m", "jupyter_server"),
    "--ServerApp.allow_external_kernels=True",
    f"--ServerApp.external_connection_dir={HOST}",
    f"--ServerApp.sock={_SOCKET}",
    # Who can reach the socket may use the sandbox in any case.
    "--IdentityProvider.token=",
    "--ServerApp.password=",
    "--ServerApp.disable_check_xsrf=True",
    "--ServerApp.allow_root=True",
    "--ServerApp.open_browser=False",
    "--ZMQChannelsWebsocketConnection.limit_rate=False",  # which drops output
)

# Seconds between two starts, should it end at once.
_REST = 2.0

_KEPT_STDERR = 4096


class JupyterServer:
    """In the I/O thread, but for what is said to block.

    Args:
        path: of its socket.
        shown: the folder that the container sees, with a folder for each kernel, where that listens.
        next_number: gives numbers that nothing else in the enclosure has.
        may_start: tells whether something may begin in the sandbox.
    """

    def __init__(
        self,
        loop: Loop,
        enclosure: Enclosure,
        path: Path,
        shown: Path,
        next_number: Callable[[], int],
        may_start: Callable[[], bool],
    ) -> None:
        self._loop = loop
        self._enclosure = enclosure
        self._path = path
        self._shown = shown
        self._next_number = next_number
        self._may_start = may_start
        self._is_wanted = self._is_closed = False
        self._relay: Service | None = None
        self._runs = False
        self._not_before = 0.0
        self._said = b""
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(_BACKLOG)
        loop.add_reader(self._listener.fileno(), self._first_asked)

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
        self._is_closed = True
        if not self._is_wanted:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
        elif self._relay is not None:
            self._relay.close()
        self._path.unlink(missing_ok=True)

    def _first_asked(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._is_wanted = True

        def begin() -> Service:
            self._show()
            return the_egress().relay(self._listener, self._connect)  # it may have to be imported

        self._loop.run_blocking(begin, self._relays, apart=True)

    def _relays(self, relay: Service | None, error: Exception | None) -> None:
        if relay is None:
            _log.error("a Jupyter Server cannot be reached: %s", error)
            self._listener.close()
        elif self._is_closed:
            relay.close()
        self._relay = relay

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

    def _connect(self, then: Connected) -> None:
        """From any thread; the relay asks again for a while, if it is not there."""

        def answered(descriptor: int, error: OSError | None) -> None:
            if error is not None:
                self._start()
            then(descriptor, error)

        self._enclosure.connect(_SOCKET, answered)

    def _start(self) -> None:
        if self._runs or self._is_closed or time.monotonic() < self._not_before or not self._may_start():
            return
        self._runs, self._said = True, b""
        read, write = os.pipe()
        os.set_blocking(read, False)
        self._loop.add_reader(read, lambda: self._hear(read))

        def start() -> EnclosedKernel:
            plan = self._enclosure.plan
            try:
                return self._enclosure.start_kernel(
                    self._next_number(),
                    [*_COMMAND, f"--ServerApp.root_dir={plan.working_dir}"],
                    {**self._enclosure.environment, "JUPYTER_PLATFORM_DIRS": "1"},
                    plan.working_dir,
                    {},
                    [write],
                )
            finally:
                os.close(write)

        self._loop.run_blocking(start, self._started, apart=True)

    def _hear(self, read: int) -> None:
        with contextlib.suppress(BlockingIOError):
            said = os.read(read, 65536)
            self._said = (self._said + said)[-_KEPT_STDERR:]
            if not said:
                self._loop.remove_reader(read)
                os.close(read)

    def _started(self, server: EnclosedKernel | None, error: Exception | None) -> None:
        if server is None:
            self._ended(f"could not be started: {error}")
        else:
            server.watch(lambda: self._ended(f"ended ({server.status})"))

    def _ended(self, how: str) -> None:
        self._runs, self._not_before = False, time.monotonic() + _REST
        if not self._is_closed:
            said = self._said.decode("utf-8", "replace").strip()
            _log.warning("a Jupyter Server %s; it said: %s", how, said or "nothing")
