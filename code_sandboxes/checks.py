"""Check what a caller gave, before anything is done with it."""

from __future__ import annotations

import math

__all__ = ["check_seconds"]


def check_seconds(name: str, value: object) -> float:
    """*value* as a time in seconds.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative or not a number of seconds at all.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name} must be 0 or more seconds, not {value}")
    return float(value)
