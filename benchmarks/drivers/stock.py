"""jupyter_client as its documentation uses it: a KernelManager and its BlockingKernelClient."""

from __future__ import annotations

import time
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from benchmarks.drivers.service import serve, timed


class Stock:
    """One kernel at a time."""

    def __init__(self) -> None:
        self._manager: KernelManager | None = None
        self._client: BlockingKernelClient | None = None

    def create(self) -> list[float]:
        """Seconds from the start of a kernel to its first result."""
        began = time.perf_counter()
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel()
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)
        self._execute("1+1")
        return [time.perf_counter() - began]

    def run(self, code: str, repetitions: int) -> list[float]:
        """Seconds of each execution, up to its idle status."""
        return timed(lambda: self._execute(code), repetitions)

    def end(self) -> list[float]:
        """Seconds that ``shutdown_kernel()`` takes."""
        manager, client = self._manager, self._client
        self._manager = self._client = None
        began = time.perf_counter()
        if client is not None:
            client.stop_channels()
        if manager is not None:
            manager.shutdown_kernel()
        return [time.perf_counter() - began]

    def _execute(self, code: str) -> None:
        client: Any = self._client  # jupyter_client's methods are made at run time, without types
        request = client.execute(code)
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
        while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != request:
            continue


if __name__ == "__main__":
    stock = Stock()
    serve({"create": stock.create, "run": stock.run, "end": stock.end}, stock.end)
