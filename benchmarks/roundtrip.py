"""One short execution: ours, a minimal client on the very same kernel process, and others."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.contestant import Contestant
from benchmarks.peer_environment import PEER, start_peer
from benchmarks.rounds import Samples, Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table

__all__ = ["measure_eval", "measure_kernel", "measure_round_trip"]

_OURS = "ours"
_AGAIN = "ours again (the noise: 1.0 is right)"
_SAME_KERNEL = "minimal client, same kernel process"
_TWIN_KERNEL = "minimal client, own kernel, same launcher"
_STOCK_KERNEL = "minimal client, stock kernel"
_JUPYTER_CLIENT = "jupyter_client, stock kernel"

_EVAL = "local-eval"
_PEER_EVAL = "code-sandboxes 1.10.0 (eval)"
_SHELL = "IPython's InteractiveShell.run_cell(), no thread, no message"

_GOALS = {
    _SAME_KERNEL: Goal(1.15),
    _TWIN_KERNEL: Goal(1.15),
    _JUPYTER_CLIENT: Goal(0.5),
    PEER: Goal(0.1),
}

_REALISTIC = "\n".join(f"value_{i} = [n * {i} for n in range(10)]  # line {i}" for i in range(35))
_CELLS = {"pass": "pass", "1+1": "1+1", "print(1)": "print(1)", "35 lines": _REALISTIC}


def measure_round_trip(scale: Scale, *, peer: bool) -> None:
    """``run_code("1+1")``."""
    with ExitStack() as running:
        contestants = {
            _OURS: _created(running, "ours"),
            _SAME_KERNEL: running.enter_context(Contestant("minimal")),
            _TWIN_KERNEL: _created(running, "minimal", "tuned"),
            _AGAIN: _created(running, "ours"),
            _JUPYTER_CLIENT: _created(running, "stock"),
        }
        contestants[_SAME_KERNEL].ask("connect", contestants[_OURS].ask("connection_file"))
        if peer:
            contestants[PEER] = running.enter_context(start_peer())
            contestants[PEER].ask("create")
        samples = _alternate(contestants, "1+1", scale)
    print_table('run_code("1+1")', samples, goals=_GOALS)


def measure_eval(scale: Scale, *, peer: bool) -> None:
    """``run_code("1+1")`` in the program's own process."""
    with ExitStack() as running:
        contestants = {
            _EVAL: _created(running, "ours", "local-eval"),
            "local-jupyter": _created(running, "ours"),
            _SHELL: _created(running, "shell"),
        }
        if peer:
            contestants[_PEER_EVAL] = running.enter_context(start_peer())
            contestants[_PEER_EVAL].ask("create", "eval")
        samples = _alternate(contestants, "1+1", scale)
    print_table('run_code("1+1") in local-eval', samples, goals={_EVAL: Goal(0.0003, of_ratio=False)})


def measure_kernel(scale: Scale) -> None:
    """What the launcher of local-jupyter is worth: the same client on both kernels."""
    with ExitStack() as running:
        contestants = {
            "tuned": _created(running, "minimal", "tuned"),
            _STOCK_KERNEL: _created(running, "minimal", "stock"),
        }
        for name, code in _CELLS.items():
            print_table(
                f"the kernel's part: minimal client, {name}, tuned launcher against stock",
                _alternate(contestants, code, scale),
            )


def _created(running: ExitStack, driver: str, *arguments: object) -> Contestant:
    contestant = running.enter_context(Contestant(driver))
    contestant.ask("create", *arguments)
    return contestant


def _alternate(contestants: dict[str, Contestant], code: str, scale: Scale) -> dict[str, Samples]:
    turns = {name: _turn(contestant, code, scale.calls) for name, contestant in contestants.items()}
    return interleave(turns, scale.runs)


def _turn(contestant: Contestant, code: str, calls: int) -> Turn:
    return lambda: contestant.times("run", code, calls)
