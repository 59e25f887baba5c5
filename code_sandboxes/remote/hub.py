"""A JupyterHub as whoever has servers of it sees it: it starts a server, says where that is, and stops it.

Source: JupyterHub's REST API, "Starting a server with the REST API". A server that is started here is a named
one of its own, so that what the user has going on is left alone. Blocking.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from code_sandboxes.errors import (
    SandboxAuthenticationError,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxQuotaExceededError,
)
from code_sandboxes.reaper import Guard
from code_sandboxes.remote.rest import Answer, Place, Rest
from code_sandboxes.remote.server import JupyterServer

__all__ = ["Hub", "hub_of"]

# Seconds between two looks at a server that starts or stops, and how long one may take to stop.
_LOOK = 0.25
_TO_STOP = 60.0

# With it the Hub forgets a server that it stops.
_REMOVE = {"remove": True}

# What tells a server that was started here from those of the user.
_PREFIX = "code-sandboxes-"


class Hub:
    """A Hub, and whoever asks it.

    Args:
        place: of the Hub. If its path ends in ``/user/NAME``, servers are that user's; else they are those of
            the user whose token it is.
        server_name: of a server that was started before.
    """

    def __init__(self, place: Place, token: str | None, server_name: str | None = None) -> None:
        base, _, user = place.url.partition("/user/")
        self._token = token
        self._user = unquote(user)
        self._origin = base.removesuffix("/hub")
        self._rest = Rest(Place(self._origin, "hub_url"), token, scheme="token", what="the JupyterHub")
        self._server_name = server_name or _PREFIX + os.urandom(4).hex()
        self._may_be_there = server_name is not None

    def guard(self) -> Guard:
        """Stops the server if this program is killed; blocks.

        Raises:
            SandboxError: the Hub does not say whose it would be.
        """
        self._user = self._user or self._who_asks()
        return self._rest.guard(self._path, _REMOVE)

    def start(self, seconds: float) -> JupyterServer:
        """A new server, when it can be used.

        Raises:
            SandboxError: it did not start within *seconds*, or is not allowed to.
        """
        give_up = time.monotonic() + seconds
        self._user = self._user or self._who_asks()
        answer = self._ask_for_server(seconds)
        while answer.status == 429 and time.monotonic() < give_up:  # others are starting
            time.sleep(min(answer.retry_after or 1.0, max(0.0, give_up - time.monotonic())))
            answer = self._ask_for_server(seconds)
        if answer.status not in (201, 202):
            self._may_be_there = answer.status >= 500
            raise self._why_not(answer)
        while not (server := self._look()).get("ready"):
            if not server:
                raise SandboxConnectionError(f"{self._rest.what} could not start a server for {self._user}")
            if time.monotonic() > give_up:
                raise SandboxConnectionError(
                    f"{self._rest.what} did not start a server for {self._user} within {seconds:g} s"
                )
            time.sleep(_LOOK)
        return JupyterServer(Place(self._origin + _path_of(server), "the server's URL"), self._token)

    def _ask_for_server(self, seconds: float) -> Answer:
        self._may_be_there = True  # whatever comes of it
        try:
            return self._rest.ask("POST", self._path, {}, seconds=seconds)
        except (SandboxAuthenticationError, SandboxQuotaExceededError):  # nothing does
            self._may_be_there = False
            raise

    def stop(self) -> None:
        """Stop the server, and let the Hub forget it; nothing is wrong if it is gone already.

        Raises:
            SandboxError: it was not stopped.
        """
        if not self._may_be_there or not self._user:
            return
        give_up = time.monotonic() + _TO_STOP
        answer = self._rest.ask("DELETE", self._path, _REMOVE)
        # One that is still starting is stopped when it has started, and not sooner.
        while answer.status in (202, 400) and time.monotonic() < give_up:
            time.sleep(_LOOK)
            if not self._look():
                break
            answer = self._rest.ask("DELETE", self._path, _REMOVE)
        if answer.status not in (202, 204, 404):
            raise self._rest.error(answer, "the end of a server")
        self._may_be_there = False

    def close(self) -> None:
        """Let go of the connections to it."""
        self._rest.close()

    @property
    def _path(self) -> str:
        return f"/hub/api/users/{quote(self._user, safe='')}/servers/{self._server_name}"

    def _who_asks(self) -> str:
        told = self._rest.expect("GET", "/hub/api/user").mapping
        if told.get("kind") != "user" or not isinstance(told.get("name"), str):
            raise SandboxConfigurationError(
                f"{self._rest.what} knows this token as no user's: say whose server is meant with a hub_url="
                " that ends in /user/NAME"
            )
        return str(told["name"])

    def _look(self) -> Mapping[str, Any]:
        """What the Hub says of the server; nothing if there is none."""
        servers = self._rest.expect("GET", f"/hub/api/users/{quote(self._user, safe='')}").mapping.get(
            "servers"
        )
        server = servers.get(self._server_name) if isinstance(servers, dict) else None
        return server if isinstance(server, dict) else {}

    def _why_not(self, answer: Answer) -> Exception:
        reason = answer.reason()
        if "named servers are not enabled" in reason.lower():
            return SandboxConfigurationError(
                f"{self._rest.what} has no named servers (JupyterHub.allow_named_servers): start a server"
                " there and give its address with server_url="
            )
        if answer.status in (400, 429) and "limit" in reason.lower():
            return SandboxQuotaExceededError(f"{self._rest.what}: {reason}")
        return self._rest.error(answer, "the start of a server")


def hub_of(server_url: str, token: str | None) -> Hub | None:
    """The Hub of the server there, if it is one that a :class:`Hub` has started."""
    base, _, rest = server_url.partition("/user/")
    user, _, name = rest.partition("/")
    if not name.startswith(_PREFIX):
        return None
    return Hub(Place(f"{base}/user/{user}", "hub_url"), token, name)


def _path_of(server: Mapping[str, Any]) -> str:
    path = server.get("url")
    if not isinstance(path, str) or not path.startswith("/"):
        raise SandboxConnectionError("a JupyterHub told of a server without a URL: is it one?")
    return path
