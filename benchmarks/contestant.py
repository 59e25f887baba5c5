"""The parent's side of a contestant: a process that does what single lines ask for.

Each is a process, so that none shares an interpreter lock, a garbage collector or imports with another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

__all__ = ["ROOT", "Contestant", "ContestantError"]

ROOT = Path(__file__).resolve().parent.parent

_FAREWELL = 30.0

# A driver of ours takes the package from this tree; a peer's must find its own, installed one first.
_BOOT = """\
import runpy, sys
sys.path.{place}
runpy.run_module({driver!r}, run_name="__main__")
"""


class ContestantError(RuntimeError):
    """A contestant could not do what it was asked for."""


class Contestant:
    """A running driver.

    Args:
        driver: a module of :mod:`benchmarks.drivers`.
        python: the interpreter of a peer; by default this one, with the package of this tree.
        env: variables beside those of this program.
    """

    def __init__(
        self, driver: str, *, python: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.driver = driver
        self._folder = tempfile.TemporaryDirectory(prefix="bench", ignore_cleanup_errors=True)
        self._said_in = Path(self._folder.name) / "stderr"
        place = f"insert(0, {str(ROOT)!r})" if python is None else f"append({str(ROOT)!r})"
        boot = _BOOT.format(place=place, driver=f"benchmarks.drivers.{driver}")
        with self._said_in.open("wb") as stderr:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-I", "-c", boot],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=self._folder.name,
                env={**os.environ, "CODE_SANDBOXES_RUNTIME_DIR": f"{self._folder.name}/r", **(env or {})},
            )

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, action: str, *arguments: object) -> object:
        """Let it do *action*, and wait for what it says."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([action, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContestantError(f"{self.driver} has ended; {self._said()}") from None
        line = self._process.stdout.readline()
        if not line:
            raise ContestantError(f"{self.driver} ended while it did {action}; {self._said()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContestantError(f"{self.driver} could not do {action}: {answer['error']}")
        value: object = answer["value"]
        return value

    def times(self, action: str, *arguments: object) -> list[float]:
        """The same, for an action that gives a figure for each repetition."""
        value = self.ask(action, *arguments)
        if not isinstance(value, list):
            raise ContestantError(f"{self.driver}: {action} gave {value!r}, not a list of seconds")
        return [float(each) for each in value]

    def close(self) -> None:
        """Let it end what it started, and end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def _said(self) -> str:
        said = self._said_in.read_text(errors="replace").strip()
        return f"it said: {said[-2000:]}" if said else "it said nothing"
