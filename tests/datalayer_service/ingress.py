"""The way to the runtimes' servers: whatever is below `/jupyter/server/<pool>/<name>`."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterable
from http.client import HTTPException, HTTPMessage, parse_headers
from io import BufferedIOBase

from tests.datalayer_service.answers import Answer, Request, html
from tests.datalayer_service.knobs import Knobs
from tests.datalayer_service.runtimes import Runtime, Runtimes
from tests.datalayer_service.upstream import connect, forward
from tests.datalayer_service.websockets import Faults, Tunnel

__all__ = ["PREFIX", "Ingress"]

PREFIX = "/jupyter/server/"

_PATH = re.compile(f"{PREFIX}(?P<pool>[^/]+)/(?P<name>[^/]+)(/|$)")


class Ingress:
    """It knows runtimes by their names, and looks at no token: that is their servers' business."""

    def __init__(self, knobs: Knobs, runtimes: Runtimes, faults: Faults) -> None:
        self._knobs = knobs
        self._runtimes = runtimes
        self._faults = faults
        self._lock = threading.Lock()
        self._asked: dict[str, int] = {}

    def answer(self, request: Request) -> Answer:
        runtime = self._admitted(request)
        if isinstance(runtime, Answer):
            return runtime
        try:
            return forward(runtime.pod.socket, request)
        except (OSError, HTTPException):  # its server has ended, or is about to
            return html(502)

    def upgrade(
        self, request: Request, stream: BufferedIOBase, client: socket.socket, tell: Callable[[int], None]
    ) -> Answer | None:
        """Open a websocket, *tell* its status, carry it until its end; or the answer that says why not."""
        runtime = self._admitted(request)
        if isinstance(runtime, Answer):
            return runtime
        if (status := self._faults.takes_refusal(runtime.name)) is not None:
            return html(status)
        try:
            server = connect(runtime.pod.socket)
        except OSError:
            return html(502)
        with server, server.makefile("rb") as from_server:
            server.sendall(self._request_head(request))
            status, headers = _read_head(from_server)
            if status != 101:
                body = from_server.read(int(headers.get("Content-Length", "0")))
                return Answer(status, body, headers.get("Content-Type", "text/html"))
            tell(status)
            opened = _head("HTTP/1.1 101 Switching Protocols", headers.items())
            Tunnel(runtime.name, client, server, self._faults).carry(opened, stream, from_server)
        return None

    def _admitted(self, request: Request) -> Runtime | Answer:
        """The runtime that *request* is for, or the answer in its place."""
        match = _PATH.match(request.path)
        runtime = self._runtimes.find(match["name"]) if match else None
        if match is None or runtime is None or runtime.pool != match["pool"]:
            return html(404)
        with self._lock:
            self._asked[runtime.name] = self._asked.get(runtime.name, 0) + 1
            is_warm = self._asked[runtime.name] > self._knobs.warm_up
        if not is_warm:
            return html(self._knobs.warm_up_status)
        if request.scheme and request.scheme.lower() not in self._knobs.ingress_schemes:
            return Answer(401, json.dumps({"message": "Unauthorized"}).encode())
        return runtime

    def _request_head(self, request: Request) -> bytes:
        """As it came, but to the server's own name, and without what it must not know."""
        hidden = {"host"} if self._knobs.selects_v1 else {"host", "sec-websocket-protocol"}
        kept = [(name, value) for name, value in request.headers if name.lower() not in hidden]
        return _head(f"GET {request.target} HTTP/1.1", [("Host", "localhost"), *kept])


def _head(first: str, headers: Iterable[tuple[str, str]]) -> bytes:
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in headers), "", ""]).encode("latin-1")


def _read_head(stream: BufferedIOBase) -> tuple[int, HTTPMessage]:
    """The status and the headers; 502 from a server that has ended."""
    parts = stream.readline().split(b" ", 2)
    return int(parts[1]) if len(parts) > 1 else 502, parse_headers(stream)
