"""Turns that alternate, and what they say: medians, and ratios with the spread between rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Samples", "Turn", "interleave"]

Turn = Callable[[], list[float]]
"""One turn of one contestant; gives one figure for each repetition."""


@dataclass(slots=True)
class Samples:
    """The figures of one contestant, round by round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        return sorted(value for turn in self.rounds for value in turn)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        return self.values[0]

    @property
    def p95(self) -> float:
        values = self.values
        return values[min(len(values) - 1, int(0.95 * len(values)))]

    def ratio_to(self, other: Samples) -> float:
        """Of the medians."""
        return self.median / other.median

    def spread_of_ratio_to(self, other: Samples) -> tuple[float, float]:
        """Between which values the middle half of the ratios lies that single rounds give."""
        ratios = [
            statistics.median(ours) / statistics.median(theirs)
            for ours, theirs in zip(self.rounds, other.rounds, strict=False)
        ]
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high


def interleave(
    turns: Mapping[str, Turn], rounds: int, *, at_most: Mapping[str, int] | None = None
) -> dict[str, Samples]:
    """Let everyone have a turn in every round, the first one last in the next round.

    Args:
        turns: by name.
        rounds: how many.
        at_most: rounds of the contestants that are too slow for all of them.
    """
    samples = {name: Samples() for name in turns}
    order = list(turns)
    for number in range(rounds):
        for name in order:
            if number < (at_most or {}).get(name, rounds):
                samples[name].rounds.append(turns[name]())
        order.append(order.pop(0))
    return samples
