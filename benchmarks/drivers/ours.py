"""The package of this tree."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.drivers.service import serve, timed
from code_sandboxes import ExecutionResult, OutputMessage, Sandbox, SandboxPool

# Seconds after which each of a pool's sandboxes has surely started.
_FILLED = 1.5


class Ours:
    """One sandbox at a time."""

    def __init__(self) -> None:
        self._sandbox: Sandbox | None = None

    def create(
        self,
        variant: str = "local-jupyter",
        isolation: str = "none",
        network: str = "inherit",
        server_url: str = "",
    ) -> list[float]:
        """Seconds from ``create()`` to its first result."""
        options: dict[str, Any] = {} if variant == "local-eval" else {"network_policy": network}
        options |= {"isolation": isolation} if variant == "local-jupyter" else {}
        options |= {"server_url": server_url} if server_url else {}
        began = time.perf_counter()
        self._sandbox = Sandbox.create(variant=variant, timeout=0, **options)
        self._check(self._sandbox.run_code("1+1"))
        return [time.perf_counter() - began]

    def acquire(self, variant: str, size: int) -> list[float]:
        """Seconds from ``acquire()`` to the first result, of each in a full pool."""
        seconds = []
        with SandboxPool(variant, size=size, network_policy="none") as pool:
            time.sleep(_FILLED * size)
            taken = []
            for _ in range(size):
                began = time.perf_counter()
                taken.append(pool.acquire())
                self._check(taken[-1].run_code("1+1"))
                seconds.append(time.perf_counter() - began)
        return seconds

    def connection_file(self) -> str:
        """Of the kernel, for another client of it."""
        (found,) = Path(os.environ["CODE_SANDBOXES_RUNTIME_DIR"]).glob("*/*/*/connection.json")
        return str(found)

    def kernel_id(self) -> str:
        """Of the kernel, on its server."""
        return self._running().id.rpartition("#")[2]

    def run(self, code: str, repetitions: int) -> list[float]:
        """Seconds of each ``run_code()``."""
        sandbox = self._running()
        sandbox.run_code(code).raise_for_status()
        return timed(lambda: sandbox.run_code(code), repetitions)

    def latency(self, code: str) -> list[float]:
        """Seconds from when each line says that it was printed to its callback."""
        seconds: list[float] = []
        self._running().run_code(
            code, on_stdout=lambda message: seconds.append(time.time() - float(message.line))
        ).raise_for_status()
        return seconds

    def output(self, code: str, size: int, listen: bool) -> list[float]:
        """Seconds to get the *size* characters that *code* prints."""
        heard = 0

        def count(message: OutputMessage) -> None:
            nonlocal heard
            heard += len(message.line) + len(message.end)

        on_stdout: Callable[[OutputMessage], object] | None = count if listen else None
        began = time.perf_counter()
        result = self._running().run_code(code, on_stdout=on_stdout).raise_for_status()
        seconds = time.perf_counter() - began
        kept = sum(len(message.line) + len(message.end) for message in result.logs.stdout)
        if kept != size or result.truncated or (listen and heard != size):
            raise RuntimeError(f"kept {kept} and heard {heard} of {size} characters")
        return [seconds]

    def upload(self, size: int) -> list[float]:
        """Seconds for each MiB of a file of *size* bytes."""
        local = _file(size)
        began = time.perf_counter()
        self._running().files.upload(str(local), "uploaded")
        return [(time.perf_counter() - began) / (size / 1024**2)]

    def download(self, size: int) -> list[float]:
        """The same, for the file that was uploaded before."""
        target = Path("downloaded")
        began = time.perf_counter()
        self._running().files.download("uploaded", str(target))
        seconds = time.perf_counter() - began
        if target.stat().st_size != size:
            raise RuntimeError("not all of it was downloaded")
        target.unlink()
        return [seconds / (size / 1024**2)]

    def meanwhile(self, code: str, what: str, repetitions: int) -> list[float]:
        """Seconds of each small *what*, while the kernel runs *code*."""
        sandbox = self._running()
        sandbox.files.write("small", "x" * 1000)
        call: Callable[[], object] = {
            "files.read()": lambda: sandbox.files.read("small"),
            "commands.run()": lambda: sandbox.commands.run("true"),
        }[what]
        call()
        runner = threading.Thread(target=lambda: sandbox.run_code(code))
        runner.start()
        while code and not sandbox.is_executing:
            time.sleep(0.01)
        seconds = timed(call, repetitions)
        sandbox.interrupt()
        runner.join()
        return seconds

    def end(self) -> list[float]:
        """Seconds that ``terminate()`` takes."""
        sandbox, self._sandbox = self._sandbox, None
        began = time.perf_counter()
        if sandbox is not None:
            sandbox.terminate()
        return [time.perf_counter() - began]

    def _running(self) -> Sandbox:
        assert self._sandbox is not None
        return self._sandbox

    @staticmethod
    def _check(result: ExecutionResult) -> None:
        if result.text != "2":
            raise RuntimeError(f"1+1 gave {result!r}")


def _file(size: int) -> Path:
    path = Path("local")
    if not path.exists() or path.stat().st_size != size:
        path.write_bytes(os.urandom(size))
    return path


if __name__ == "__main__":
    ours = Ours()
    serve(
        {
            "create": ours.create,
            "acquire": ours.acquire,
            "connection_file": ours.connection_file,
            "kernel_id": ours.kernel_id,
            "run": ours.run,
            "latency": ours.latency,
            "output": ours.output,
            "upload": ours.upload,
            "download": ours.download,
            "meanwhile": ours.meanwhile,
            "end": ours.end,
        },
        ours.end,
    )
