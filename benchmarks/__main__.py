"""Measure, and print tables; ``--quick`` for a first impression."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

from benchmarks.containers import measure_containers
from benchmarks.contestant import ContestantError
from benchmarks.egress import measure_egress
from benchmarks.files import measure_busy, measure_files
from benchmarks.gateway import measure_gateway
from benchmarks.imports import measure_imports
from benchmarks.isolation import measure_isolation
from benchmarks.life import measure_fresh_program, measure_life
from benchmarks.output import measure_latency, measure_throughput
from benchmarks.peer_environment import PEER, PeerMissingError, start_peer
from benchmarks.roundtrip import measure_eval, measure_kernel, measure_round_trip
from benchmarks.scale import FULL, QUICK, Scale

_SECTIONS: dict[str, Callable[[Scale, bool], None]] = {
    "roundtrip": lambda scale, peer: measure_round_trip(scale, peer=peer),
    "eval": lambda scale, peer: measure_eval(scale, peer=peer),
    "kernel": lambda scale, _: measure_kernel(scale),
    "life": lambda scale, peer: measure_life(scale, peer=peer),
    "fresh": lambda scale, peer: measure_fresh_program(scale, peer=peer),
    "imports": lambda scale, peer: measure_imports(scale, peer=peer),
    "latency": lambda scale, _: measure_latency(scale),
    "throughput": lambda scale, _: measure_throughput(scale),
    "files": lambda scale, peer: measure_files(scale, peer=peer),
    "busy": lambda scale, _: measure_busy(scale),
    "isolation": lambda scale, _: measure_isolation(scale),
    "containers": lambda scale, _: measure_containers(scale),
    "egress": lambda scale, _: measure_egress(scale),
    "gateway": lambda scale, peer: measure_gateway(scale, peer=peer),
}


def main() -> None:
    arguments = _parse()
    scale = QUICK if arguments.quick else FULL
    began = time.monotonic()
    _print_preface()
    peer = _has_peer() if arguments.peer else False
    for name in arguments.sections or _SECTIONS:
        _measure(name, scale, peer)
    print(f"\n{time.monotonic() - began:.0f} s in all; load average at the end: {_load()}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of: {', '.join(_SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, less output")
    parser.add_argument(
        "--peer",
        action=argparse.BooleanOptionalAction,
        help=f"with {PEER}, installed in .venv-peer if need be; by default unless --quick",
    )
    arguments = parser.parse_args()
    if arguments.peer is None:
        arguments.peer = not arguments.quick
    for name in arguments.sections:
        if name not in _SECTIONS:
            parser.error(f"no section {name!r} (known: {', '.join(_SECTIONS)})")
    return arguments


def _print_preface() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("ipykernel", "jupyter_client", "pyzmq"))
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {packages};"
        f" {os.cpu_count()} CPUs, load average {_load()}.\n"
        "Rounds interleave. 'ratio' is the first line's median over this line's: below 1, the first is\n"
        "faster; 'rounds say' is the middle half of the ratios that single rounds give. Where others use\n"
        "the machine too, trust ratios and 'min', and no difference smaller than that to 'ours again'."
    )


def _has_peer() -> bool:
    """Whether the peer can take part; if not, say so where nobody overlooks it."""
    try:
        with start_peer() as peer:
            peer.ask("create")
    except (PeerMissingError, ContestantError) as error:
        print(f"\n!!! {PEER} IS NOT MEASURED: {error}")
        return False
    return True


def _measure(name: str, scale: Scale, peer: bool) -> None:
    try:
        _SECTIONS[name](scale, peer)
    except ContestantError as error:
        print(f"\n!!! {name} IS NOT MEASURED: {error}", flush=True)


def _load() -> str:
    return " ".join(f"{each:.1f}" for each in os.getloadavg())


if __name__ == "__main__":
    main()
