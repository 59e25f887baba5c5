"""Check what a caller gave, before anything is done with it."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["check_environment", "check_number", "check_seconds", "check_str", "check_str_mapping"]


def check_seconds(name: str, value: object) -> float:
    """*value* as a time in seconds.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative or not a number of seconds at all.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    try:
        seconds = float(value)
    except OverflowError:
        raise ValueError(f"{name} is more seconds than a float holds") from None
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"{name} must be 0 or more seconds, not {value}")
    return seconds


def check_number(name: str, value: object, unit: str) -> None:
    """
    Raises:
        TypeError: *value* is neither None nor a number.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name} must be a number of {unit}, not {type(value).__name__}")


def check_str(name: str, value: object) -> None:
    """
    Raises:
        TypeError: *value* is neither None nor a str.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")


def check_str_mapping(name: str, value: object) -> dict[str, str]:
    """*value* as a dictionary; an empty one for None.

    Raises:
        TypeError: it is not a mapping from str to str.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, not {type(value).__name__}")
    for item in (*value.keys(), *value.values()):
        if not isinstance(item, str):
            raise TypeError(f"{name} must map str to str, not {type(item).__name__}")
    return dict(value)


def check_environment(name: str, value: object) -> dict[str, str]:
    """*value* as environment variables; none for None.

    Raises:
        TypeError: it is not a mapping from str to str.
        ValueError: no system has such a variable.
    """
    variables = check_str_mapping(name, value)
    for variable, text in variables.items():
        if not variable or "=" in variable or "\0" in variable:
            raise ValueError(f"{name} has a variable {variable!r}: a name is not empty, without '=' and NUL")
        if "\0" in text:
            raise ValueError(f"{name} has a NUL in the value of {variable!r}")
        for each in (variable, text):
            try:
                each.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise ValueError(f"{name} has in {variable!r} what cannot be encoded") from None
    return variables
