"""Much output, and how late it comes; each client has a kernel of its own, started the same way."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.contestant import Contestant
from benchmarks.rounds import Samples, Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table

__all__ = ["measure_latency", "measure_throughput"]

_OURS = "ours"
_MINIMAL = "minimal client"
_CHUNK = 64 * 1024


def measure_latency(scale: Scale) -> None:
    """From the kernel's ``print(time.time())`` to the callback."""
    code = f"import time\nfor _ in range({scale.prints}):\n    print(time.time())\n    time.sleep(0.03)\n"
    with ExitStack() as running:
        ours, minimal = _started(running)
        turns: dict[str, Turn] = {
            _OURS: lambda: ours.times("latency", code),
            _MINIMAL: lambda: minimal.times("latency", code),
        }
        samples = interleave(turns, scale.outputs)
    print_table("print to callback", samples, goals={_OURS: Goal(0.01, of_ratio=False)})


def measure_throughput(scale: Scale) -> None:
    """Lines of 100 characters, and writes of 64 KiB."""
    size = scale.megabytes * 10**6
    lines = f"for _ in range({size // 100}):\n    print({'x' * 99!r})\n"
    chunks = (
        f"import sys\nchunk = 'y' * {_CHUNK - 1} + '\\n'\n"
        f"for _ in range({size // _CHUNK}):\n    sys.stdout.write(chunk)\nNone\n"
    )
    with ExitStack() as running:
        ours, minimal = _started(running)
        for title, code, exact in (
            (f"{size // 100} lines", lines, size),
            ("64 KiB writes", chunks, size // _CHUNK * _CHUNK),
        ):
            samples = interleave(_turns(ours, minimal, code, exact), scale.outputs)
            print_table(
                f"{scale.megabytes} MB of stdout as {title}",
                samples,
                notes=_megabytes_per_second(samples, exact),
            )


def _started(running: ExitStack) -> tuple[Contestant, Contestant]:
    ours = running.enter_context(Contestant("ours"))
    minimal = running.enter_context(Contestant("minimal"))
    ours.ask("create")
    minimal.ask("create", "tuned")
    return ours, minimal


def _turns(ours: Contestant, minimal: Contestant, code: str, size: int) -> dict[str, Turn]:
    return {
        "ours, kept": lambda: ours.times("output", code, size, False),
        "ours, kept and on_stdout": lambda: ours.times("output", code, size, True),
        _MINIMAL: lambda: minimal.times("output", code, size),
    }


def _megabytes_per_second(samples: dict[str, Samples], size: int) -> dict[str, str]:
    return {name: f": {size / 1e6 / each.median:.1f} MB/s" for name, each in samples.items()}
