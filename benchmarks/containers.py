"""What local-docker costs: at the start, at each execution, and out of a pool."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.contestant import Contestant
from benchmarks.rounds import Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table

__all__ = ["measure_containers"]

_OURS, _STOCK, _JUPYTER = "local-docker", "a container with a Jupyter Server", "local-jupyter"
_POOL = 4


def measure_containers(scale: Scale) -> None:
    """``create()`` to the first result, ``run_code("1+1")``, and ``SandboxPool.acquire()``."""
    with ExitStack() as running:
        drivers = {_OURS: "ours", _STOCK: "stock_docker", _JUPYTER: "ours"}
        contestants = {name: running.enter_context(Contestant(drivers[name])) for name in drivers}
        ways = {_OURS: (_OURS, "", "none"), _STOCK: (), _JUPYTER: (_JUPYTER, "auto", "none")}
        for name, way in ways.items():  # imports, a keeper, what the engine has to read
            contestants[name].ask("create", *way)
            contestants[name].ask("end")
        starts: dict[str, Turn] = {name: _start(contestants[name], way) for name, way in ways.items()}
        print_table(
            "create() to the first result, cold kernel, in a running program",
            interleave(starts, scale.starts),
            goals={_OURS: Goal(1.0, of_ratio=False)},
        )
        for name, way in ways.items():
            contestants[name].ask("create", *way)
        runs: dict[str, Turn] = {
            name: lambda each=each: each.times("run", "1+1", scale.calls)  # type: ignore[misc]  # a default
            for name, each in contestants.items()
        }
        print_table('run_code("1+1")', interleave(runs, scale.runs), goals={_JUPYTER: Goal(1.2)})
        for each in contestants.values():
            each.ask("end")
        ours = contestants[_OURS]
        taken: dict[str, Turn] = {f"a pool of {_POOL}": lambda: ours.times("acquire", _OURS, _POOL)}
        print_table(
            "acquire() from a SandboxPool of started containers, to the first result",
            interleave(taken, scale.starts),
            goals={f"a pool of {_POOL}": Goal(0.1, of_ratio=False)},
        )


def _start(contestant: Contestant, way: tuple[str, ...]) -> Turn:
    def turn() -> list[float]:
        seconds = contestant.times("create", *way)
        contestant.ask("end")
        return seconds

    return turn
