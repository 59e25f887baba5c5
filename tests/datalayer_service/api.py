"""Which path is whose, who may ask, and how errors are said."""

from __future__ import annotations

import re
import secrets
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.datalayer_service.answers import Answer, Refusal, Request, html, refusal_answer, success
from tests.datalayer_service.creation import OPERATIONS, Creation
from tests.datalayer_service.environments import Environments
from tests.datalayer_service.iam import Iam
from tests.datalayer_service.knobs import SNAPSHOT_PATHS, Knobs
from tests.datalayer_service.runtimes_api import RuntimesApi
from tests.datalayer_service.snapshots import SnapshotsApi

__all__ = ["Api", "Route", "routes"]

_IAM = "/api/iam/v1"
_RUNTIMES = "/api/runtimes/v1"
_ID = "([^/]+)"


@dataclass(frozen=True)
class Route:
    method: str
    path: str  # its groups are arguments of the handler
    handler: Callable[..., Answer]
    is_open: bool = False  # to everybody


def routes(
    iam: Iam, environments: Environments, runtimes: RuntimesApi, creation: Creation, snapshots: SnapshotsApi
) -> list[Route]:
    """All of them."""
    found = [
        Route("GET", f"{_IAM}/ping", _ping, is_open=True),
        Route("GET", f"{_RUNTIMES}/ping", _ping, is_open=True),
        Route("GET", f"{_IAM}/whoami", iam.whoami),
        Route("GET", f"{_IAM}/usage/credits", iam.credits),
        Route("GET", f"{_IAM}/secrets", iam.secrets),
        Route("POST", f"{_IAM}/secrets", iam.add_secret),
        Route("DELETE", f"{_IAM}/secrets/{_ID}", iam.remove_secret),
        Route("GET", f"{_RUNTIMES}/environments", environments.list),
        Route("GET", f"{_RUNTIMES}/runtimes", runtimes.list),
        Route("POST", f"{_RUNTIMES}/runtimes", creation.create),
        Route("GET", f"{_RUNTIMES}/runtimes/{_ID}", runtimes.get),
        Route("PUT", f"{_RUNTIMES}/runtimes/{_ID}", runtimes.update),
        Route("DELETE", f"{_RUNTIMES}/runtimes/{_ID}", runtimes.delete),
        Route("GET", f"{OPERATIONS}/{_ID}", creation.operation),
    ]
    for path in SNAPSHOT_PATHS:
        found += [
            Route("GET", f"{_RUNTIMES}/{path}", snapshots.list),
            Route("POST", f"{_RUNTIMES}/{path}", snapshots.create),
            Route("GET", f"{_RUNTIMES}/{path}/{_ID}", snapshots.get),
            Route("PATCH", f"{_RUNTIMES}/{path}/{_ID}", snapshots.update),
            Route("DELETE", f"{_RUNTIMES}/{path}/{_ID}", snapshots.delete),
        ]
    return found


class Api:
    """The control plane."""

    def __init__(self, knobs: Knobs, api_key: str, known: Sequence[Route]) -> None:
        self._knobs = knobs
        self._api_key = api_key
        self._routes = known

    def answer(self, request: Request) -> Answer:
        try:
            return self._answer(request)
        except Refusal as refusal:
            return refusal_answer(refusal, self._knobs.error_shape)
        except Exception as error:  # the service's own fault: whoever asks shall see it
            traceback.print_exc()
            return refusal_answer(Refusal(500, f"{type(error).__name__}: {error}"), "envelope")

    def _answer(self, request: Request) -> Answer:
        if request.method in ("GET", "DELETE") and self._knobs.bad_gateways > 0:
            self._knobs.bad_gateways -= 1
            return html(502)
        matches = [(route, match) for route in self._routes if (match := self._match(route, request.path))]
        if not any(route.is_open for route, _ in matches):
            self._check(request)
        if not matches:
            raise Refusal(404, "Not Found", detail="Not Found")
        for route, match in matches:
            if route.method == request.method:
                return route.handler(request, *match.groups())
        raise Refusal(405, "Method Not Allowed", detail="Method Not Allowed")

    def _match(self, route: Route, path: str) -> re.Match[str] | None:
        is_off = any(
            f"/{name}" in route.path and name not in self._knobs.snapshot_paths for name in SNAPSHOT_PATHS
        )
        return None if is_off else re.fullmatch(route.path, path)

    def _check(self, request: Request) -> None:
        key = request.credential if request.scheme.lower() == "bearer" else ""
        if request.query.get("download") == "1":  # links of a browser, which sends no header
            key = key or request.query.get("token", "")
        if not secrets.compare_digest(key.encode(), self._api_key.encode()):
            raise Refusal(401, "The API key is missing or not valid")


def _ping(request: Request) -> Answer:
    return success({"status": "OK", "version": "1.0.0"}, message="pong")
