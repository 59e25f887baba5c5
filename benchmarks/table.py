"""Print samples as a table: one line for each contestant, with ratios to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.rounds import Samples

__all__ = ["Goal", "print_table"]

_COLUMNS = ("", "median", "min", "p95", "n", "ratio", "rounds say", "goal")


@dataclass(frozen=True, slots=True)
class Goal:
    """What the ratio should not exceed; without *of_ratio*, the first one's median in seconds."""

    at_most: float
    of_ratio: bool = True

    def verdict(self, ours: Samples, theirs: Samples) -> str:
        value = ours.ratio_to(theirs) if self.of_ratio else ours.median
        limit = f"{self.at_most:g}" if self.of_ratio else f"{self.at_most * 1000:g} ms"
        return f"<= {limit}: {'met' if value <= self.at_most else 'MISSED'}"


def print_table(
    title: str,
    samples: Mapping[str, Samples],
    *,
    goals: Mapping[str, Goal] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """The ratio is that of the first contestant to each: 0.5 means it takes half as long."""
    first = next(iter(samples.values()))
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for name, theirs in samples.items():
        low, high = first.spread_of_ratio_to(theirs)
        rows.append(
            (
                name + (notes or {}).get(name, ""),
                *(f"{1000 * value:.2f}" for value in (theirs.median, theirs.least, theirs.p95)),
                str(len(theirs.values)),
                "" if theirs is first else f"{first.ratio_to(theirs):.3f}",
                "" if theirs is first else f"{low:.3f} to {high:.3f}",
                (goals or {})[name].verdict(first, theirs) if name in (goals or {}) else "",
            )
        )
    print(f"\n## {title} (ms)\n")
    _print_rows(rows)


def _print_rows(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for number, row in enumerate(rows):
        print(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |")
        if number == 0:
            print(f"|{'|'.join('-' * (width + 2) for width in widths)}|", flush=True)
