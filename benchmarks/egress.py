"""What the egress proxy costs: a small request, and each MB of a download."""

from __future__ import annotations

from benchmarks.contestant import Contestant
from benchmarks.rounds import Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table

__all__ = ["measure_egress"]

_WAYS = {"through the proxy (CONNECT)": "connect", "through the proxy (http)": "http", "directly": "directly"}
_SIZE = 64_000_000


def measure_egress(scale: Scale) -> None:
    """Everything on loopback, each end in a process of its own."""
    with Contestant("egress") as ours:
        small: dict[str, Turn] = {
            name: lambda way=way: ours.times("get", way, scale.calls)  # type: ignore[misc]  # mypy: a default
            for name, way in _WAYS.items()
        }
        big: dict[str, Turn] = {
            name: lambda way=way: ours.times("download", way, _SIZE)  # type: ignore[misc]
            for name, way in _WAYS.items()
        }
        samples = interleave(small, scale.runs)
        print_table(
            "a small request", samples, goals=dict.fromkeys(list(_WAYS)[:1], Goal(0.002, of_ratio=False))
        )
        samples = interleave(big, 2 * scale.files)
        print_table(
            f"a download of {_SIZE // 10**6} MB, each MB",
            samples,
            goals=dict.fromkeys(list(_WAYS)[:1], Goal(1 / 200, of_ratio=False)),
            notes={name: f": {1 / each.median:.0f} MB/s" for name, each in samples.items()},
        )
