"""Files up and down, and how soon files and commands answer while code runs."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.contestant import Contestant
from benchmarks.peer_environment import PEER, start_peer
from benchmarks.rounds import Samples, Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table

__all__ = ["measure_busy", "measure_files"]

_OURS = "ours"
_AGAIN = "ours again (the noise: 1.0 is right)"
_FLOOR = "the floor: a copy through a Unix socket"

_MIB = 1024**2
# The peer fails at 100 MB, and takes its time below.
_PEERS_SIZE = 4 * _MIB

_SPIN = "while True: pass"
_SLEEP = "import time; time.sleep(3600)"


def measure_files(scale: Scale, *, peer: bool) -> None:
    """Each MiB of a big file, and a small file."""
    size = scale.megabytes_of_file * _MIB
    with ExitStack() as running:
        ours, floor = running.enter_context(Contestant("ours")), running.enter_context(Contestant("floor"))
        ours.ask("create")
        peers = None
        if peer:
            peers = running.enter_context(start_peer())
            peers.ask("create")
        for way in ("upload", "download"):
            turns: dict[str, Turn] = {
                _OURS: lambda way=way: ours.times(way, size),  # type: ignore[misc]  # mypy: a default
                _FLOOR: lambda: floor.times("copy", size),
                _AGAIN: lambda way=way: ours.times(way, size),  # type: ignore[misc]
            }
            if peers is not None:
                turns[PEER] = lambda way=way: peers.times(way, _PEERS_SIZE)  # type: ignore[misc]
            samples = interleave(turns, scale.files, at_most={PEER: 2})
            print_table(
                f"{way} of a file of {scale.megabytes_of_file} MiB, each MiB",
                samples,
                goals={_OURS: Goal(_MIB / 300e6, of_ratio=False), PEER: Goal(1 / 50)},
                notes={name: f": {_MIB / 1e6 / each.median:.1f} MB/s" for name, each in samples.items()},
            )


def measure_busy(scale: Scale) -> None:
    """``files.read()`` and ``commands.run()`` while the kernel has nothing to do, sleeps, and computes."""
    with ExitStack() as running:
        ours = running.enter_context(Contestant("ours"))
        ours.ask("create")
        for what, goals in (("files.read()", (0.05, 0.05, 0.2)), ("commands.run()", (0.05, 0.05, 0.2))):
            for code, when, goal in zip(("", _SLEEP, _SPIN), _WHEN, goals, strict=True):
                samples = {what: Samples([ours.times("meanwhile", code, what, scale.meanwhile)])}
                print_table(
                    f"{what} while the kernel {when}", samples, goals={what: Goal(goal, of_ratio=False)}
                )


_WHEN = ("has nothing to do", "sleeps", "computes in Python")
