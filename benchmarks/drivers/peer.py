"""code-sandboxes 1.10.0 from PyPI, in its own environment: its ``jupyter-server`` and its ``eval``.

mypy reads it against the package of this tree; the few names it uses are in both.
"""

from __future__ import annotations

import os
import signal
import time

from benchmarks.drivers.service import serve, timed
from code_sandboxes import Sandbox


class Peer:
    """One sandbox at a time."""

    def __init__(self) -> None:
        self._sandbox: Sandbox | None = None

    def create(self, variant: str = "jupyter-server") -> list[float]:
        """Seconds from ``create()`` to its first result."""
        began = time.perf_counter()
        self._sandbox = Sandbox.create(variant=variant)
        try:
            self._sandbox.start()
        except BaseException:
            _end_server_of(self._sandbox)
            raise
        text = self._sandbox.run_code("1+1").text
        if str(text) != "2":
            raise RuntimeError(f"1+1 gave {text!r}")
        return [time.perf_counter() - began]

    def run(self, code: str, repetitions: int) -> list[float]:
        """Seconds of each ``run_code()``."""
        assert self._sandbox is not None
        sandbox = self._sandbox
        return timed(lambda: sandbox.run_code(code), repetitions)

    def upload(self, size: int) -> list[float]:
        """Seconds for each MiB of *size* bytes."""
        assert self._sandbox is not None
        content = os.urandom(size)
        began = time.perf_counter()
        self._sandbox.files.write_bytes("/tmp/uploaded-by-the-peer", content)
        return [(time.perf_counter() - began) / (size / 1024**2)]

    def download(self, size: int) -> list[float]:
        """The same, for the bytes that were uploaded before."""
        assert self._sandbox is not None
        began = time.perf_counter()
        content = self._sandbox.files.read_bytes("/tmp/uploaded-by-the-peer")
        seconds = time.perf_counter() - began
        if len(content) != size:
            raise RuntimeError("not all of it was downloaded")
        return [seconds / (size / 1024**2)]

    def end(self) -> list[float]:
        """Seconds that ``stop()`` takes."""
        sandbox, self._sandbox = self._sandbox, None
        began = time.perf_counter()
        if sandbox is not None:
            sandbox.stop()
        return [time.perf_counter() - began]


def _end_server_of(sandbox: Sandbox) -> None:
    """Its ``stop()`` does nothing for a sandbox that did not start, and leaves the server running."""
    server = getattr(sandbox, "_server_process", None)
    if server is not None:
        os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    peer = Peer()
    serve(
        {
            "create": peer.create,
            "run": peer.run,
            "upload": peer.upload,
            "download": peer.download,
            "end": peer.end,
        },
        peer.end,
    )
