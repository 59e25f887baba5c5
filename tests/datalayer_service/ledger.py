"""Credits: reserved when a runtime is created, the unused rest refunded when it ends."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Literal

from tests.datalayer_service.answers import Json, Refusal, new_uid
from tests.datalayer_service.knobs import Knobs

__all__ = ["Entry", "Ledger", "Reservation"]


@dataclass(frozen=True)
class Reservation:
    """What a runtime may cost, taken from the account up front."""

    id: str
    credits: float
    burning_rate: float
    start: float


@dataclass(frozen=True)
class Entry:
    """One movement."""

    kind: Literal["reserve", "refund"]
    reservation_id: str
    credits: float


class Ledger:
    """One account."""

    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs
        self._lock = threading.Lock()
        self._credits = knobs.credits
        self._reservations: dict[str, Reservation] = {}
        self._entries: list[Entry] = []

    @property
    def available(self) -> float:
        """What is not reserved, nor used."""
        with self._lock:
            return self._credits

    @property
    def reservations(self) -> list[Reservation]:
        with self._lock:
            return list(self._reservations.values())

    @property
    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._entries)

    def reserve(self, credits: float, burning_rate: float) -> Reservation:
        with self._lock:
            if credits > self._credits:
                message = f"Not enough credits: {credits:g} asked, {self._credits:g} available"
                raise Refusal(402, message, {"reason": "insufficient_credits"})
            reservation = Reservation(f"runtime-{new_uid()}", credits, burning_rate, time.time())
            self._reservations[reservation.id] = reservation
            self._move("reserve", reservation.id, -credits)
        return reservation

    def refund(self, reservation: Reservation, *, started_at: float | None) -> None:
        """End *reservation*: what was not burnt since *started_at* (all of it without one) comes back."""
        seconds = 0.0 if started_at is None else (time.time() - started_at) * self._knobs.clock_speed
        unused = max(0.0, reservation.credits - seconds * reservation.burning_rate)
        with self._lock:
            if self._reservations.pop(reservation.id, None):
                self._move("refund", reservation.id, unused)

    def usage(self) -> Json:
        """What the account service tells of it."""
        with self._lock:
            quota = self._knobs.credits_quota
            told: Json = {
                "credits": self._credits if quota is None else quota - self._credits,
                "quota": quota,
                "last_update": _iso(time.time()),
            }
            if self._knobs.credits_field is not None:
                told[self._knobs.credits_field] = self._credits
            return {"credits": told, "reservations": [_told(r) for r in self._reservations.values()]}

    def _move(self, kind: Literal["reserve", "refund"], reservation_id: str, credits: float) -> None:
        self._credits += credits
        self._entries.append(Entry(kind, reservation_id, abs(credits)))


def _told(reservation: Reservation) -> Json:
    return {
        "id": reservation.id,
        "credits": reservation.credits,
        "resource": "runtime",
        "last_update": _iso(reservation.start),
        "burning_rate": reservation.burning_rate,
        "start_date": _iso(reservation.start),
    }


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
