"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Scale"]


@dataclass(frozen=True, slots=True)
class Scale:
    """Rounds and repetitions of each measurement.

    Args:
        runs: rounds of ``run_code()``.
        calls: calls in a round.
        starts: rounds of ``create()`` and ``terminate()``.
        peer_starts: of which the peer, whose ``stop()`` may take ten seconds, takes part in so many.
        imports: rounds of ``import``.
        prints: lines whose latency is measured, in a round.
        outputs: rounds of latency and throughput.
        megabytes: of output.
        files: rounds of files up and down.
        megabytes_of_file: each.
        meanwhile: calls while code runs.
    """

    runs: int
    calls: int
    starts: int
    peer_starts: int
    imports: int
    prints: int
    outputs: int
    megabytes: int
    files: int
    megabytes_of_file: int
    meanwhile: int


FULL = Scale(
    runs=80,
    calls=5,
    starts=12,
    peer_starts=4,
    imports=20,
    prints=40,
    outputs=5,
    megabytes=100,
    files=5,
    megabytes_of_file=1024,
    meanwhile=100,
)
QUICK = Scale(
    runs=25,
    calls=5,
    starts=4,
    peer_starts=2,
    imports=5,
    prints=20,
    outputs=2,
    megabytes=10,
    files=2,
    megabytes_of_file=100,
    meanwhile=20,
)
