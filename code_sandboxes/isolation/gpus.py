"""The NVIDIA GPUs of this machine, as their driver tells (its README, "procfs Interface")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["installed"]

_DRIVER = Path("/proc/driver/nvidia/gpus")


def installed() -> Mapping[str, str]:
    """The model of each, by its number (``GPU-...``), which engines know it by."""
    found = {}
    for path in sorted(_DRIVER.glob("*/information")):
        told = dict(line.partition(":")[::2] for line in path.read_text().splitlines())
        found[told.get("GPU UUID", "").strip()] = told.get("Model", "").strip()
    return found
