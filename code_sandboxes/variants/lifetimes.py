"""The end of a sandbox whose lifetime this program alone keeps."""

from __future__ import annotations

import time

from code_sandboxes.transports.loop import Timer, the_loop
from code_sandboxes.variants.base import Audience

__all__ = ["Lifetime"]


class Lifetime:
    """Tells when it is over; from any thread."""

    def __init__(self, audience: Audience) -> None:
        self._audience = audience
        self._timer: Timer | None = None

    def end_in(self, seconds: float, why: str) -> None:
        """It is over that long from now, shorter or longer than before."""
        due = time.monotonic() + seconds
        the_loop().call_soon(lambda: self._arm(due, why))

    def cancel(self) -> None:
        """It does not end by itself any more; in the I/O thread."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, due: float, why: str) -> None:
        self.cancel()
        self._timer = the_loop().call_at(due, lambda: self._audience.over(why))
