"""What a program asks of the first process in a container of an engine elsewhere (``guest/steward.py``)."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from code_sandboxes.errors import SandboxConnectionError

__all__ = ["Steward", "Told"]

_LONGEST = 32 * 1024**2


@dataclass(frozen=True, slots=True)
class Told:
    """What it knows.

    Args:
        kept: what programs have asked it to remember.
        time_left: seconds until the container ends; None if nobody has said.
        oom_kills: how many processes have been ended for want of memory.
    """

    kept: Mapping[str, Any]
    detached: bool
    time_left: float | None
    oom_kills: int


class Steward:
    """From any thread; everything blocks.

    Args:
        dial: makes a connection to it.
    """

    def __init__(self, dial: Callable[[], socket.socket]) -> None:
        self._dial = dial

    def about(self) -> Told:
        """
        Raises:
            SandboxConnectionError: it does not answer.
        """
        answer = self._ask({"about": True})
        kept, time_left, kills = answer.get("kept"), answer.get("time_left"), answer.get("oom_kills")
        return Told(
            kept if isinstance(kept, dict) else {},
            answer.get("detached") is True,
            float(time_left) if isinstance(time_left, (int, float)) else None,
            kills if isinstance(kills, int) else 0,
        )

    def keep(self, values: Mapping[str, object]) -> None:
        """Let it remember these, and forget those that are None.

        Raises:
            SandboxConnectionError: it does not answer.
        """
        self._ask({"keep": dict(values)})

    def end_in(self, seconds: float) -> None:
        """
        Raises:
            SandboxConnectionError: it does not answer.
        """
        self._ask({"lifetime": seconds})

    def detach(self) -> None:
        """It goes on although nobody is there.

        Raises:
            SandboxConnectionError: it does not answer.
        """
        self._ask({"detach": True})

    def leave(self) -> None:
        """This program is about to go.

        Raises:
            SandboxConnectionError: it does not answer.
        """
        self._ask({"leave": True})

    def _ask(self, request: Mapping[str, object]) -> Mapping[str, Any]:
        try:
            connection = self._dial()
            try:
                connection.sendall(json.dumps(request).encode() + b"\n")
                answer = json.loads(_line(connection))
            finally:
                connection.close()
        except (OSError, ValueError) as error:
            raise SandboxConnectionError(f"the sandbox's container does not answer: {error}") from None
        return answer if isinstance(answer, dict) else {}


def _line(connection: socket.socket) -> bytes:
    heard = b""
    while not heard.endswith(b"\n"):
        piece = connection.recv(65536)
        heard += piece
        if not piece or len(heard) > _LONGEST:
            raise ConnectionResetError("it has hung up")
    return heard
