"""Over a Jupyter Server with its default limits: a short execution, much output, a big file."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.contestant import Contestant, ContestantError
from benchmarks.peer_environment import PEER, start_peer
from benchmarks.rounds import Turn, interleave
from benchmarks.scale import Scale
from benchmarks.table import Goal, print_table
from tests.servers import JupyterServer, NotInstalledError

__all__ = ["measure_gateway"]

_OURS = "ours, jupyter-gateway"
_AGAIN = "ours again (the noise: 1.0 is right)"
_SAME_KERNEL = "minimal client over ZeroMQ, same kernel process"
_LOCAL = "ours, local-jupyter"

_MIB = 1024**2
_OUTPUT = 10_000_000
_PRINT = f"for i in range(100_000): print('x' * {_OUTPUT // 100_000 - 1})"


def measure_gateway(scale: Scale, *, peer: bool) -> None:
    """``run_code("1+1")``, 10 MB of output, and a file up and down."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="bench")))
        try:
            server = running.enter_context(JupyterServer(folder))
        except NotInstalledError as error:
            raise ContestantError(str(error)) from None
        first, second = (_created(running, server) for _ in range(2))
        minimal = running.enter_context(Contestant("minimal"))
        local = running.enter_context(Contestant("ours"))
        local.ask("create")
        kernel = first.ask("kernel_id")
        minimal.ask("connect", str(next(folder.rglob(f"kernel-{kernel}.json"))))
        turns: dict[str, Turn] = {
            _OURS: lambda: first.times("run", "1+1", scale.calls),
            _SAME_KERNEL: lambda: minimal.times("run", "1+1", scale.calls),
            _AGAIN: lambda: second.times("run", "1+1", scale.calls),
            _LOCAL: lambda: local.times("run", "1+1", scale.calls),
        }
        if peer:
            peers = running.enter_context(start_peer())
            peers.ask("create")
            turns[PEER] = lambda: peers.times("run", "1+1", scale.calls)
        samples = interleave(turns, scale.runs)
        print_table(
            'run_code("1+1") through a Jupyter Server',
            samples,
            goals={_SAME_KERNEL: Goal(1.5), PEER: Goal(0.5)},
        )
        _measure_amounts(scale, first)


def _measure_amounts(scale: Scale, ours: Contestant) -> None:
    output = interleave({_OURS: lambda: ours.times("output", _PRINT, _OUTPUT, False)}, scale.files)
    print_table("10 MB of output in small lines, whole", output)
    size = scale.megabytes_of_file * _MIB
    for way in ("upload", "download"):
        samples = interleave({_OURS: lambda way=way: ours.times(way, size)}, scale.files)  # type: ignore[misc]
        print_table(
            f"{way} of a file of {scale.megabytes_of_file} MiB, each MiB",
            samples,
            goals={_OURS: Goal(_MIB / 250e6, of_ratio=False)},
            notes={name: f": {_MIB / 1e6 / each.median:.1f} MB/s" for name, each in samples.items()},
        )


def _created(running: ExitStack, server: JupyterServer) -> Contestant:
    ours = running.enter_context(Contestant("ours", env={"JUPYTER_TOKEN": server.token}))
    ours.ask("create", "jupyter-gateway", "", "inherit", server.url)
    return ours
