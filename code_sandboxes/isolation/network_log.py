"""Every attempt of a sandbox to reach something, the newest of them kept."""

from __future__ import annotations

import threading
import time
from collections import deque

from code_sandboxes.network_info import NetworkAttempt

__all__ = ["NetworkLog"]

# A host name has at most 253 characters (RFC 1035, section 2.3.4, without the root's dot). With these limits
# all attempts have less than the 16 MiB that a keeper may say at once, however much JSON has to escape.
_LONGEST_HOST = 256
_LONGEST_REASON = 400


class NetworkLog:
    """May be written and read from any thread.

    Args:
        limit: how many attempts are kept; code in a sandbox makes as many as it likes.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._attempts: deque[NetworkAttempt] = deque(maxlen=limit)
        self._lock = threading.Lock()
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """How many older attempts are not there any more."""
        return self._dropped

    def attempts(self) -> list[NetworkAttempt]:
        """The oldest first."""
        with self._lock:
            return list(self._attempts)

    def allowed(self, host: str, port: int, address: str = "") -> None:
        self._add(NetworkAttempt(time.time(), _shown(host, _LONGEST_HOST), port, True, address=address))

    def refused(self, host: str, port: int, reason: str) -> None:
        self._add(
            NetworkAttempt(
                time.time(), _shown(host, _LONGEST_HOST), port, False, reason=_shown(reason, _LONGEST_REASON)
            )
        )

    def _add(self, attempt: NetworkAttempt) -> None:
        with self._lock:
            self._dropped += len(self._attempts) == self._attempts.maxlen
            self._attempts.append(attempt)


def _shown(text: str, longest: int) -> str:
    """The text came out of a sandbox: what a terminal would obey is escaped."""
    text = text[:longest]
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1][:longest]
