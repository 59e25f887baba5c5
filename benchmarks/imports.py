"""What ``import code_sandboxes`` costs a program."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contestant import ROOT
from benchmarks.peer_environment import PEER, peer_python
from benchmarks.rounds import Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table

__all__ = ["measure_imports"]

_OURS = "import code_sandboxes"


def measure_imports(scale: Scale, *, peer: bool) -> None:
    """Whole interpreters, from start to end."""
    python = Path(sys.executable)
    turns = {
        _OURS: _turn(python, f"import sys; sys.path.insert(0, {str(ROOT)!r}); import code_sandboxes"),
        "pass": _turn(python, "pass"),
        "import zmq": _turn(python, "import zmq"),
        "import jupyter_client": _turn(python, "import jupyter_client"),
    }
    if peer:
        turns[PEER] = _turn(peer_python(), "import code_sandboxes")
    for turn in turns.values():  # the first one may have to compile
        turn()
    samples = interleave(turns, scale.imports)
    print_table("python -c '...'", samples, goals={_OURS: Goal(0.1, of_ratio=False)})


def _turn(python: Path, code: str) -> Turn:
    def turn() -> list[float]:
        began = time.perf_counter()
        subprocess.run([python, "-I", "-c", code], check=True)
        return [time.perf_counter() - began]

    return turn
