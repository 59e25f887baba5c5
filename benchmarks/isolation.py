"""What isolation costs: at the start, and at each execution."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.contestant import Contestant
from benchmarks.rounds import Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table

__all__ = ["measure_isolation"]

_NONE = "no isolation"
_WAYS: dict[str, tuple[str, str]] = {
    "bubblewrap": ("bubblewrap", "inherit"),
    "bubblewrap, no network": ("bubblewrap", "none"),
    "landlock": ("landlock", "inherit"),
    _NONE: ("none", "inherit"),
    "no isolation again (the noise)": ("none", "inherit"),
}


def measure_isolation(scale: Scale) -> None:
    """``create()`` to the first result, and ``run_code("1+1")``, with and without it."""
    with ExitStack() as running:
        contestants = {name: running.enter_context(Contestant("ours")) for name in _WAYS}
        for name, way in _WAYS.items():  # imports, and a keeper
            contestants[name].ask("create", "local-jupyter", *way)
            contestants[name].ask("end")
        starts: dict[str, Turn] = {name: _start(contestants[name], way) for name, way in _WAYS.items()}
        samples = interleave(starts, 3 * scale.starts)
        base = samples[_NONE].median
        print_table(
            "create() to the first result, cold kernel, in a running program",
            samples,
            goals={name: Goal(base + 0.06, of_ratio=False) for name in list(_WAYS)[:2]},
            notes={name: f": {1000 * (each.median - base):+.0f} ms" for name, each in samples.items()},
        )
        for name, way in _WAYS.items():
            contestants[name].ask("create", "local-jupyter", *way)
        runs: dict[str, Turn] = {
            name: lambda each=each: each.times("run", "1+1", scale.calls)  # type: ignore[misc]  # a default
            for name, each in contestants.items()
        }
        samples = interleave(runs, scale.runs)
        base = samples[_NONE].median
        print_table(
            'run_code("1+1")',
            samples,
            goals={name: Goal(1.05 * base, of_ratio=False) for name in list(_WAYS)[:2]},
            notes={name: f": {each.median / base:.2f} x" for name, each in samples.items()},
        )


def _start(contestant: Contestant, way: tuple[str, str]) -> Turn:
    def turn() -> list[float]:
        seconds = contestant.times("create", "local-jupyter", *way)
        contestant.ask("end")
        return seconds

    return turn
