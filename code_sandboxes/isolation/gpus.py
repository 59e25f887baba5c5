"""NVIDIA GPUs: what they are called, and which this machine has.

Source: the README of their driver, "procfs Interface".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["installed", "is_named"]

_DRIVER = Path("/proc/driver/nvidia/gpus")


def installed() -> Mapping[str, str]:
    """The model of each, by its number (``GPU-...``), which engines know it by."""
    found = {}
    for path in sorted(_DRIVER.glob("*/information")):
        told = dict(line.partition(":")[::2] for line in path.read_text().splitlines())
        found[told.get("GPU UUID", "").strip()] = told.get("Model", "").strip()
    return found


def is_named(wanted: str, model: str) -> bool:
    """Are the words of *wanted* in *model*, in their order? An A10 is no A100; an A100-SXM4-80GB is one."""
    words, of_model = _words(wanted), iter(_words(model))
    return bool(words) and all(word in of_model for word in words)  # each is looked for after the one before


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s-]+", name.lower()) if word]
