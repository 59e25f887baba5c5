"""Snapshots: the variables of a runtime's pre-warmed kernel, kept by the cloud."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from tests.datalayer_service.answers import Answer, Json, Refusal, Request, new_uid, success, unprocessable
from tests.datalayer_service.companion import KernelUnavailableError
from tests.datalayer_service.knobs import Knobs
from tests.datalayer_service.runtimes import Runtime, Runtimes

__all__ = ["Shelf", "Snapshot", "SnapshotsApi"]


@dataclass(frozen=True)
class Snapshot:
    uid: str
    name: str
    description: str
    environment: str
    data: bytes
    skipped: dict[str, str]  # why which variables are not in it; the cloud logs that, and tells nobody
    updated_at: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())

    def told(self) -> Json:
        return {
            "uid": self.uid,
            "name": self.name,
            "description": self.description,
            "environment": self.environment,
            "metadata": {"version": "1", "language_info": {"name": "python"}},
            "size": len(self.data),
            "format": "pickle",
            "format_version": "1",
            "status": "created",
            "updated_at": self.updated_at,
        }


class Shelf:
    """Those that there are, by uid: names are not unique."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshots: dict[str, Snapshot] = {}

    @property
    def all(self) -> list[Snapshot]:
        with self._lock:
            return list(self._snapshots.values())

    def get(self, uid: str) -> Snapshot:
        with self._lock:
            if uid not in self._snapshots:
                raise Refusal(404, f"Snapshot {uid} not found")
            return self._snapshots[uid]

    def variables(self, uid: str) -> bytes:
        return self.get(uid).data

    def put(self, snapshot: Snapshot) -> None:
        with self._lock:
            self._snapshots[snapshot.uid] = snapshot

    def remove(self, uid: str) -> None:
        self.get(uid)
        with self._lock:
            self._snapshots.pop(uid, None)


class SnapshotsApi:
    """Takes them, tells of them, and adds them to running runtimes."""

    def __init__(self, knobs: Knobs, runtimes: Runtimes, shelf: Shelf) -> None:
        self._knobs = knobs
        self._runtimes = runtimes
        self._shelf = shelf
        self._later: list[threading.Timer] = []

    def create(self, request: Request) -> Answer:
        body = request.json()
        runtime = self._runtimes.get(self._runtime_name(body))
        snapshot = self._dump(runtime, str(body.get("name") or ""), str(body.get("description") or ""))
        # Clients disagree on what not saying it means; who forgets it shall learn that it loses the runtime.
        if body.get("stop", True):
            self._runtimes.end(runtime.name)
        if self._knobs.snapshot_answer == "accepted":
            self._put_later(snapshot)
            return Answer(202)
        self._shelf.put(snapshot)
        told: Json = {} if self._knobs.snapshot_answer == "no_snapshot" else {"snapshot": snapshot.told()}
        return success(told, status=201, message="Snapshot created successfully")

    def list(self, request: Request) -> Answer:
        return success({"snapshots": [snapshot.told() for snapshot in self._shelf.all]})

    def get(self, request: Request, uid: str) -> Answer:
        snapshot = self._shelf.get(uid)
        if request.query.get("download") == "1":
            return Answer(200, snapshot.data, "application/octet-stream")
        return success({"snapshot": snapshot.told()})

    def update(self, request: Request, uid: str) -> Answer:
        body, snapshot = request.json(), self._shelf.get(uid)
        changed = replace(
            snapshot,
            name=str(body.get("name", snapshot.name)),
            description=str(body.get("description", snapshot.description)),
            updated_at=datetime.now(timezone.utc).isoformat(),
        )
        self._shelf.put(changed)
        return success({"snapshot": changed.told()})

    def delete(self, request: Request, uid: str) -> Answer:
        self._shelf.remove(uid)
        status = self._knobs.snapshot_delete_status
        return Answer(204) if status == 204 else success(status=status)

    def restore(self, runtime: Runtime, uid: str) -> None:
        data = self._shelf.variables(uid)
        try:
            runtime.pod.load(data, self._knobs.snapshot_patience, splits_at_nul=self._knobs.splits_at_nul)
        except KernelUnavailableError as error:
            raise Refusal(409, str(error)) from error

    def close(self) -> None:
        for timer in self._later:
            timer.cancel()
            timer.join()

    def _runtime_name(self, body: Json) -> object:
        keys = {"A": "pod_name", "B": "runtime_name"}
        for generation in self._knobs.bodies:
            if body.get(keys[generation]):
                return body[keys[generation]]
        raise unprocessable(("body", keys[self._knobs.bodies[-1]]), "Field required", "missing")

    def _dump(self, runtime: Runtime, name: str, description: str) -> Snapshot:
        try:
            data, skipped = runtime.pod.dump(self._knobs.snapshot_patience)
        except KernelUnavailableError as error:
            raise Refusal(409, str(error)) from error
        return Snapshot(new_uid(), name, description, runtime.environment.name, data, skipped)

    def _put_later(self, snapshot: Snapshot) -> None:
        timer = threading.Timer(self._knobs.snapshot_seconds, self._shelf.put, (snapshot,))
        timer.daemon = True
        self._later.append(timer)
        timer.start()
