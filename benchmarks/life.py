"""From ``create()`` to the first result, with a kernel that starts cold, and ``terminate()``."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.contestant import Contestant
from benchmarks.peer_environment import PEER, start_peer
from benchmarks.rounds import Samples, Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table

__all__ = ["measure_fresh_program", "measure_life"]

_OURS = "ours"
_MINIMAL = "minimal client, same launcher"
_JUPYTER_CLIENT = "jupyter_client KernelManager"

_GOALS = {_JUPYTER_CLIENT: Goal(0.7), PEER: Goal(0.1)}


def measure_life(scale: Scale, *, peer: bool) -> None:
    """Starts and ends in a program that has imported everything."""
    ends: dict[str, Samples] = {}
    with ExitStack() as running:
        turns: dict[str, Turn] = {}
        for name, start, arguments in _contestants(peer):
            ends[name] = Samples()
            turns[name] = _create_and_end(running.enter_context(start()), arguments, ends[name])
        starts = interleave(turns, scale.starts, at_most={PEER: scale.peer_starts})
    print_table("create() to the first result, cold kernel, in a running program", starts, goals=_GOALS)
    print_table("terminate()", ends, goals={_OURS: Goal(0.1, of_ratio=False)})


def measure_fresh_program(scale: Scale, *, peer: bool) -> None:
    """The same from the start of the program: with the interpreter, and all imports."""
    turns = {name: _fresh(start, arguments) for name, start, arguments in _contestants(peer)}
    samples = interleave(turns, max(2, scale.starts // 2), at_most={PEER: 2})
    print_table("start of the program to the first result, cold kernel", samples, goals=_GOALS)


def _contestants(peer: bool) -> list[tuple[str, Callable[[], Contestant], tuple[object, ...]]]:
    contestants: list[tuple[str, Callable[[], Contestant], tuple[object, ...]]] = [
        (_OURS, lambda: Contestant("ours"), ()),
        (_MINIMAL, lambda: Contestant("minimal"), ("tuned",)),
        (_JUPYTER_CLIENT, lambda: Contestant("stock"), ()),
    ]
    return [*contestants, (PEER, start_peer, ())] if peer else contestants


def _create_and_end(contestant: Contestant, arguments: tuple[object, ...], ends: Samples) -> Turn:
    def turn() -> list[float]:
        seconds = contestant.times("create", *arguments)
        ends.rounds.append(contestant.times("end"))
        return seconds

    return turn


def _fresh(start: Callable[[], Contestant], arguments: tuple[object, ...]) -> Turn:
    def turn() -> list[float]:
        began = time.perf_counter()
        with start() as contestant:
            contestant.ask("create", *arguments)
            return [time.perf_counter() - began]

    return turn
