"""IPython in this process: what a local-eval without our messages and threads could be."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.drivers.service import serve, timed


class Shell:
    """One ``InteractiveShell``."""

    def __init__(self) -> None:
        self._shell: Any = None

    def create(self) -> list[float]:
        """Seconds from its import to its first result."""
        began = time.perf_counter()
        from IPython.core.interactiveshell import InteractiveShell

        shell: Any = InteractiveShell
        self._shell = shell.instance(history_length=0)
        # What it shows would go where this driver answers.
        self._shell.displayhook.write_output_prompt = lambda: None
        self._shell.displayhook.write_format_data = lambda *_: None
        self._shell.displayhook.finish_displayhook = lambda: None
        self._execute("1+1")
        return [time.perf_counter() - began]

    def run(self, code: str, repetitions: int) -> list[float]:
        """Seconds of each ``run_cell()``."""
        return timed(lambda: self._execute(code), repetitions)

    def _execute(self, code: str) -> None:
        result = self._shell.run_cell(code, store_history=True)
        if result.result != 2:
            raise RuntimeError(f"1+1 gave {result!r}")


if __name__ == "__main__":
    shell = Shell()
    serve({"create": shell.create, "run": shell.run}, list)
