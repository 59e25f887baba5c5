"""The minimal client, on a kernel of its own or of somebody else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from benchmarks.drivers.service import serve, timed
from benchmarks.kernels import OwnKernel
from benchmarks.minimal_client import MinimalClient


class Minimal:
    """One client at a time."""

    def __init__(self) -> None:
        self._client: MinimalClient | None = None
        self._kernel: OwnKernel | None = None

    def connect(self, connection_file: str) -> None:
        """To a kernel that runs already."""
        self._client = MinimalClient(Path(connection_file))
        self._client.wait_ready()

    def create(self, launcher: Literal["tuned", "stock"]) -> list[float]:
        """Seconds from the start of a kernel to its first result."""
        began = time.perf_counter()
        self._kernel = OwnKernel(launcher)
        self.connect(str(self._kernel.connection_file))
        self.run("1+1", 0)
        return [time.perf_counter() - began]

    def run(self, code: str, repetitions: int) -> list[float]:
        """Seconds of each execution."""
        client = self._connected()
        client.drain()
        if client.execute(code)["status"] != "ok":
            raise RuntimeError(f"{code!r} failed")
        return timed(lambda: client.execute(code), repetitions) if repetitions else []

    def latency(self, code: str) -> list[float]:
        """Seconds from when each line says that it was printed to its arrival."""
        seconds: list[float] = []

        def arrived(msg_type: str, content: Mapping[str, object]) -> None:
            if msg_type == "stream":
                now = time.time()
                seconds.extend(now - float(line) for line in str(content["text"]).split())

        self._connected().execute(code, arrived)
        return seconds

    def output(self, code: str, size: int) -> list[float]:
        """Seconds to get the *size* characters that *code* prints, as they come."""
        texts: list[str] = []

        def arrived(msg_type: str, content: Mapping[str, object]) -> None:
            if msg_type == "stream":
                texts.append(str(content["text"]))

        began = time.perf_counter()
        self._connected().execute(code, arrived)
        seconds = time.perf_counter() - began
        if (got := sum(map(len, texts))) != size:
            raise RuntimeError(f"got {got} of {size} characters")
        return [seconds]

    def end(self) -> list[float]:
        """Seconds to kill the kernel, if it is its own."""
        began = time.perf_counter()
        if self._client is not None:
            self._client.close()
        if self._kernel is not None:
            self._kernel.end()
        self._client = self._kernel = None
        return [time.perf_counter() - began]

    def _connected(self) -> MinimalClient:
        assert self._client is not None
        return self._client


if __name__ == "__main__":
    minimal = Minimal()
    serve(
        {
            "connect": minimal.connect,
            "create": minimal.create,
            "run": minimal.run,
            "latency": minimal.latency,
            "output": minimal.output,
            "end": minimal.end,
        },
        minimal.end,
    )
