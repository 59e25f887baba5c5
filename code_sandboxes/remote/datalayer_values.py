"""What Datalayer's services say, as values: its deployments differ, so each is read in all known spellings.

Of what is a number some deployments make a text; names have changed ("pod" was before "runtime"); much may be
null. What cannot be read is as if it had not been said, unless nothing could be done without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from code_sandboxes.errors import SandboxConnectionError
from code_sandboxes.info import SandboxEnvironment

__all__ = [
    "Runtime",
    "ServiceSnapshot",
    "environment_of",
    "free_credits_of",
    "listed",
    "number",
    "quantity",
    "runtime_of",
    "seconds_of",
    "snapshot_of",
]

# Characters of a text that is told on.
_LONGEST = 1000

_GPUS = "nvidia.com/gpu"

# Kubernetes documentation, "Quantity".
_QUANTITY = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)(|[numkMGTPE]|[KMGTPE]i)")
_FACTORS = {
    "": 1.0,
    **{letter: 1000.0**-power for power, letter in enumerate("mun", 1)},
    **{letter: 1000.0**power for power, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", 1)},
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """A machine that runs for the user.

    Args:
        name: what the service's URLs call it.
        given_name: for people.
        ingress: the URL of its Jupyter Server; empty if it does not say.
        token: of that.
        started_at: seconds since the epoch, as it says; None if it does not.
        expires_at: when the service ends it, of the same clock.
    """

    name: str
    uid: str
    given_name: str
    environment: str
    burning_rate: float
    ingress: str
    token: str = field(repr=False)
    started_at: float | None
    expires_at: float | None

    @property
    def names(self) -> tuple[str, str, str]:
        """What it is known by."""
        return self.name, self.uid, self.given_name


@dataclass(frozen=True, slots=True)
class ServiceSnapshot:
    """A snapshot, as the service tells of it.

    Args:
        updated_at: seconds since the epoch; 0 if it is not told.
        size: bytes; 0 if it is not told.
    """

    uid: str
    name: str
    description: str
    environment: str
    updated_at: float
    size: int


def runtime_of(told: object) -> Runtime:
    """
    Raises:
        SandboxConnectionError: it has no name.
    """
    entry = _mapping(told)
    environment = entry.get("environment")
    named = environment.get("name") if isinstance(environment, dict) else environment
    return Runtime(
        name=_needed(entry, "runtime_name", "pod_name"),
        uid=_text(entry, "uid"),
        given_name=_text(entry, "given_name"),
        environment=_text(entry, "environment_name") or (named if isinstance(named, str) else ""),
        burning_rate=number(entry.get("burning_rate")) or 0.0,
        ingress=_text(entry, "ingress"),
        token=_text(entry, "token"),
        started_at=seconds_of(entry.get("started_at")),
        expires_at=seconds_of(entry.get("expired_at")),
    )


def environment_of(told: object) -> SandboxEnvironment:
    """
    Raises:
        SandboxConnectionError: it has no name.
    """
    entry = _mapping(told)
    told_resources = entry.get("resources")
    resources = {
        str(name): str(value)
        for name, value in (told_resources.items() if isinstance(told_resources, dict) else ())
        if value is not None
    }
    memory = quantity(resources.get("memory"))
    return SandboxEnvironment(
        name=_needed(entry, "name"),
        title=_text(entry, "title"),
        language=_text(entry, "language"),
        owner=_text(entry, "owner"),
        visibility=_text(entry, "visibility"),
        burning_rate=number(entry.get("burning_rate")) or 0.0,
        resources=resources,
        cpu=quantity(resources.get("cpu")),
        memory=None if memory is None else int(memory),
        gpus=int(quantity(resources.get(_GPUS)) or 0),
        description=_text(entry, "description"),
    )


def snapshot_of(told: object) -> ServiceSnapshot:
    """
    Raises:
        SandboxConnectionError: it has no uid.
    """
    entry = _mapping(told)
    return ServiceSnapshot(
        uid=_needed(entry, "uid"),
        name=_text(entry, "name"),
        description=_text(entry, "description"),
        environment=_text(entry, "environment"),
        updated_at=seconds_of(entry.get("updated_at")) or 0.0,
        size=int(number(entry.get("size")) or 0),
    )


def free_credits_of(told: Mapping[str, Any]) -> float:
    """What of the credits that the account service tells of is neither used nor reserved.

    Raises:
        SandboxConnectionError: it does not tell.
    """
    credits = _mapping(told.get("credits"))
    there = (number(credits.get(name)) for name in ("available", "credits_available", "remaining"))
    available = next((value for value in there if value is not None), None)
    if available is None:
        amount, quota = number(credits.get("credits")), number(credits.get("quota"))
        if amount is None:
            raise SandboxConnectionError("Datalayer does not tell how many credits there are")
        available = amount if quota is None else quota - amount
    reservations = told.get("reservations")
    reserved = (
        number(each.get("credits")) or 0.0
        for each in (reservations if isinstance(reservations, list) else ())
        if isinstance(each, dict)
    )
    return available - sum(reserved)


def listed(told: Mapping[str, Any], key: str) -> list[Any]:
    """What stands in a list of the answer."""
    value = told.get(key)
    return value if isinstance(value, list) else []


def number(value: object) -> float | None:
    """A finite number, or a text that is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def seconds_of(value: object) -> float | None:
    """A time as seconds since the epoch: a number, a text that is one, or a date of ISO 8601."""
    seconds = number(value)
    if seconds is not None or not isinstance(value, str):
        return seconds
    # As Python 3.10 reads it: with six digits after the point, and no letter for UTC.
    text = re.sub(r"[Zz]$", "+00:00", value.strip())
    text = re.sub(r"\.([0-9]+)", lambda match: f".{match[1]:0<6}"[:7], text)
    try:
        when = datetime.fromisoformat(text)
        # One that names no time zone is meant in UTC, as servers are.
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def quantity(value: object) -> float | None:
    """A number with the units of Kubernetes: ``500m``, ``2Gi``."""
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    amount = number(match[1]) if match else number(value)
    return None if amount is None else amount * _FACTORS[match[2] if match else ""]


def _mapping(told: object) -> Mapping[str, Any]:
    return told if isinstance(told, dict) else {}


def _text(entry: Mapping[str, Any], *keys: str) -> str:
    """The first that is said."""
    texts = (entry.get(key) for key in keys)
    return next((text[:_LONGEST] for text in texts if isinstance(text, str) and text), "")


def _needed(entry: Mapping[str, Any], *keys: str) -> str:
    text = _text(entry, *keys)
    if not text:
        raise SandboxConnectionError(f"Datalayer told of something without {keys[0]!r}: is it Datalayer?")
    return text
