"""List, get, update and delete of runtimes; they are named in paths by name, never by uid."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

from tests.datalayer_service.answers import Answer, Json, Refusal, Request, success
from tests.datalayer_service.creation import capabilities_in
from tests.datalayer_service.knobs import Knobs
from tests.datalayer_service.runtimes import Runtime, Runtimes

__all__ = ["RuntimesApi"]


class RuntimesApi:
    """What is done with those that there are; *restore* adds a snapshot's variables to one."""

    def __init__(
        self, knobs: Knobs, runtimes: Runtimes, restore: Callable[[Runtime, str], None], origin: str
    ) -> None:
        self._knobs = knobs
        self._runtimes = runtimes
        self._restore = restore
        self._origin = origin

    def list(self, request: Request) -> Answer:
        return success({"runtimes": [self.told(runtime) for runtime in self._runtimes.all]})

    def get(self, request: Request, name: str) -> Answer:
        return success({self._knobs.get_key: self.told(self._runtimes.get(name))})

    def update(self, request: Request, name: str) -> Answer:
        runtime, body = self._runtimes.get(name), request.json()
        if body.get("from") is not None:
            self._restore(runtime, str(body["from"]))
        if "capabilities" in body:
            self._runtimes.set_capabilities(runtime, capabilities_in(body))
        told = {"runtime": self.told(runtime)}
        return success(told, status=self._knobs.update_status, message="Runtime updated successfully")

    def delete(self, request: Request, name: str) -> Answer:
        if not self._runtimes.end(name):
            raise Refusal(404, f"Runtime {name} not found")
        if self._knobs.delete_status == 204:
            return Answer(204)
        return success(message="Runtime deleted successfully")

    def told(self, runtime: Runtime) -> Json:
        """As answers have it."""
        environment = runtime.environment
        names: dict[str, Json] = {
            "A": {
                "pod_name": runtime.name,
                "environment_name": environment.name,
                "environment_title": environment.title,
            },
            "B": {
                "runtime_name": runtime.name,
                "environment": {"name": environment.name, "title": environment.title},
            },
        }
        told: Json = {
            "uid": runtime.uid,
            "given_name": runtime.given_name,
            "type": runtime.kind,
            "burning_rate": environment.burning_rate,
            "token": runtime.token,
            "ingress": f"{self._origin}{runtime.pod.base_url}",
            "started_at": self._time(runtime.started_at),
            "expired_at": self._time(runtime.expired_at),
            "capabilities": [*self._runtimes.capabilities(runtime)],
        }
        for generation in self._knobs.spelling:
            told |= names[generation]
        if self._knobs.has_reservation_id:
            told["reservation_id"] = runtime.reservation.id
        return told

    def _time(self, seconds: float) -> object:
        values = {
            "numeric_string": str(seconds),
            "number": seconds,
            "iso": datetime.fromtimestamp(seconds, timezone.utc).isoformat(),
            "null": None,
            "empty": "",
        }
        return values[self._knobs.times]
