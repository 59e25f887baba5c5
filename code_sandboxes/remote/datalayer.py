"""An account at Datalayer, by the REST interface of its services; blocking."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxError,
    SandboxQuotaExceededError,
    SandboxResourceError,
    SandboxSnapshotError,
)
from code_sandboxes.info import SandboxEnvironment
from code_sandboxes.remote.datalayer_values import (
    Runtime,
    ServiceSnapshot,
    environment_of,
    free_credits_of,
    listed,
    runtime_of,
    snapshot_of,
)
from code_sandboxes.remote.rest import Answer, Place, Rest

__all__ = ["UNCERTAIN", "Datalayer", "pauses", "unknown_environment"]

UNCERTAIN = (502, 503, 504)
"""What a gateway says that does not know what has become of a request behind it."""

_CREDITS = "/api/iam/v1/usage/credits"
_ENVIRONMENTS = "/api/runtimes/v1/environments"
_RUNTIMES = "/api/runtimes/v1/runtimes"

# The same under a new name and under an old one, of which a deployment has at least one.
_SNAPSHOTS = ("/api/runtimes/v1/sandbox-snapshots", "/api/runtimes/v1/runtime-snapshots")

_MOST_PAGES = 1000

# Seconds for which it is tried to end what costs credits, while the service does not answer.
_PERSISTENCE = 10.0

# Seconds that the variables may take to come out of a kernel, and after that until they are kept.
_DUMP, _KEPT = 300.0, 30.0

# Words by which a refusal is about how much there is already, and the statuses that may have them.
_TOO_MUCH = ("quota", "credit", "limit")
_ABOUT_WHO_ASKS = (200, 400, 402, 403, 409, 429)


class Datalayer:
    """Asks the services for one account; from any thread.

    Args:
        iam: where the service for accounts is.
        runtimes: where the one for runtimes is.
    """

    def __init__(self, iam: Place, runtimes: Place, token: str) -> None:
        self.place = runtimes
        self._iam = Rest(iam, token, scheme="Bearer", what="Datalayer")
        self._rest = Rest(runtimes, token, scheme="Bearer", what="Datalayer")
        self._speaks_b = False
        self._snapshots_path = ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.place.url}>"

    @property
    def runtimes_url(self) -> str:
        """Where those of the account are."""
        return f"{self.place.url}{_RUNTIMES}"

    def close(self) -> None:
        """Let go of the connections to it."""
        self._iam.close()
        self._rest.close()

    def free_credits(self) -> float:
        """Those that are neither used nor reserved."""
        answer = self._iam.ask("GET", _CREDITS)
        return free_credits_of(_checked(self._iam, answer, "a question about credits"))

    def environments(self) -> list[SandboxEnvironment]:
        """What runtimes can be made of."""
        found: dict[str, SandboxEnvironment] = {}
        params: dict[str, str] = {}
        for _ in range(_MOST_PAGES):
            answer = self._rest.ask("GET", _ENVIRONMENTS, params=params)
            told = self.checked(answer, "a question about environments")
            for environment in map(environment_of, listed(told, "environments")):
                found.setdefault(environment.name, environment)
            cursor = told.get("nextCursor")
            if not isinstance(cursor, str) or not cursor:
                break
            params = {"cursor": cursor}
        return list(found.values())

    # Runtimes. To make one takes a creation, see datalayer_creation.py.

    def runtimes(self) -> list[Runtime]:
        """Those of the account, whoever has made them."""
        told = self.checked(self._rest.ask("GET", _RUNTIMES), "a question about runtimes")
        return [runtime_of(each) for each in listed(told, "runtimes")]

    def runtime(self, name: str) -> Runtime | None:
        """The one of that name; None if there is none."""
        answer = self._rest.ask("GET", _below(_RUNTIMES, name))
        if answer.status == 404:
            return None
        told = self.checked(answer, f"a question about the runtime {name!r}")
        return runtime_of(told.get("runtime") or told.get("kernel"))

    def find(self, name: str) -> Runtime | None:
        """The one of that name or uid, or else the only one that people call so."""
        if (runtime := self.runtime(name)) is not None:
            return runtime
        runtimes = self.runtimes()
        found = [each for each in runtimes if name in (each.name, each.uid)]
        found = found or [each for each in runtimes if name == each.given_name]
        return found[0] if len(found) == 1 else None

    def delete(self, name: str) -> None:
        """End it; nothing is wrong if it has ended already.

        Raises:
            SandboxError: it has not, for all that is known.
        """
        until = time.monotonic() + _PERSISTENCE
        for pause in pauses():
            try:
                answer = self._rest.ask("DELETE", _below(_RUNTIMES, name))
                if answer.status != 404:
                    self.checked(answer, f"the end of the runtime {name!r}")
                return
            except SandboxConnectionError:
                if time.monotonic() + pause > until:
                    raise
            time.sleep(pause)

    def ask_for_runtime(self, wanted: Mapping[str, object], environment: str, seconds: float) -> Answer:
        """Ask once for a new one.

        Raises:
            SandboxError: there is no answer, and nobody knows whether there is a runtime.
        """
        return self._in_its_words(
            _RUNTIMES,
            {**wanted, "environment_name": environment},
            {**wanted, "environment": {"name": environment}},
            seconds,
        )

    def ask_at(self, location: str) -> Answer:
        """Ask what has become of something for which it has named this place."""
        return self._rest.ask("GET", _path_of(location, self.place))

    def checked(self, answer: Answer, what: str) -> Mapping[str, Any]:
        """What it has answered to *what*, if that was done.

        Raises:
            SandboxError: it was not.
        """
        return _checked(self._rest, answer, what)

    # Snapshots.

    def snapshots(self) -> list[ServiceSnapshot]:
        """Those of the account, the oldest first; many can have one name."""
        answer = self._rest.ask("GET", self._path_of_snapshots())
        told = self.checked(answer, "a question about snapshots")
        found = [snapshot_of(each) for each in listed(told, "snapshots")]
        return sorted(found, key=lambda snapshot: snapshot.updated_at)

    def create_snapshot(self, runtime: str, name: str, description: str) -> ServiceSnapshot:
        """Keep the variables of the kernel that a runtime came with; the runtime goes on.

        Args:
            description: that no other has: the snapshot is known by it.

        Raises:
            SandboxSnapshotError: there is none, for all that is known.
        """
        what = f"the snapshot {name!r}"
        # What it means not to say "stop", clients do not agree on.
        wanted = {"name": name, "description": description, "stop": False}
        in_a, in_b = {"pod_name": runtime, **wanted}, {"runtime_name": runtime, **wanted}
        try:
            answer = self._in_its_words(self._path_of_snapshots(), in_a, in_b, _DUMP)
        except SandboxConnectionError as error:  # there is no answer
            return self._kept(what, description, str(error))
        if answer.status in UNCERTAIN:
            return self._kept(what, description, str(self._rest.error(answer, what)))
        try:
            told = self.checked(answer, what).get("snapshot")
        except (SandboxConnectionError, SandboxResourceError) as error:
            raise SandboxSnapshotError(f"{what} was not made: {error}") from None
        if isinstance(told, dict):
            return snapshot_of(told)
        return self._kept(what, description, f"{self._rest.what} does not list it")

    def _kept(self, what: str, description: str, why_not: str) -> ServiceSnapshot:
        """The one of that description, as soon as it is in the list."""
        until = time.monotonic() + _KEPT
        for pause in pauses():
            found = [each for each in self.snapshots() if each.description == description]
            if found:
                return found[0]
            if time.monotonic() + pause > until:
                break
            time.sleep(pause)
        raise SandboxSnapshotError(f"{what} was not made: {why_not}")

    def delete_snapshot(self, uid: str) -> None:
        """Nothing is wrong if it is gone already."""
        answer = self._rest.ask("DELETE", _below(self._path_of_snapshots(), uid))
        if answer.status != 404:
            self.checked(answer, f"the end of the snapshot {uid!r}")

    def _path_of_snapshots(self) -> str:
        for path in _SNAPSHOTS:
            if self._snapshots_path:
                break
            answer = self._rest.ask("GET", path)
            if answer.status != 404:
                self.checked(answer, "a question about snapshots")
                self._snapshots_path = path
        if not self._snapshots_path:
            raise SandboxSnapshotError(f"{self._rest.what} has no snapshots")
        return self._snapshots_path

    def _in_its_words(self, path: str, in_a: object, in_b: object, seconds: float) -> Answer:
        """The answer to the one of two bodies that it understands, which only trying tells."""
        bodies = [in_b, in_a] if self._speaks_b else [in_a, in_b]
        first = self._rest.ask("POST", path, bodies[0], seconds=seconds)
        if first.status != 422:
            return first
        second = self._rest.ask("POST", path, bodies[1], seconds=seconds)
        if second.status == 422:  # it is about something else
            return first
        self._speaks_b = not self._speaks_b
        return second


def unknown_environment(name: str, known: list[SandboxEnvironment]) -> SandboxResourceError:
    names = ", ".join(sorted(each.name for each in known)) or "none"
    return SandboxResourceError(
        f"Datalayer has no environment {name!r} for this account (there are: {names})"
    )


def pauses() -> Iterator[float]:
    """Seconds between two looks at something that takes its time, without an end."""
    pause = 0.25
    while True:
        yield pause
        pause = min(2 * pause, 8.0)


def _checked(rest: Rest, answer: Answer, what: str) -> Mapping[str, Any]:
    is_done = 200 <= answer.status < 300
    if is_done and answer.mapping.get("success") is not False:
        return answer.mapping
    raise _refusal(rest, answer, what, is_in_words=is_done or bool(answer.mapping))


def _refusal(rest: Rest, answer: Answer, what: str, *, is_in_words: bool) -> SandboxError:
    """The error that says that *what* was not done.

    Args:
        is_in_words: it is the service itself that says so, and not something before it.
    """
    reason = rest.reason(answer)
    is_too_much = any(word in reason.lower() for word in _TOO_MUCH)
    if answer.status in (402, 429) or (is_too_much and answer.status in _ABOUT_WHO_ASKS):
        return SandboxQuotaExceededError(f"{rest.what} refuses {what}: {reason}")
    if is_in_words and (answer.status < 300 or answer.status == 503):
        return SandboxResourceError(f"{rest.what} could not do {what}: {reason}; try again later")
    return rest.error(answer, what)


def _below(path: str, name: str) -> str:
    return f"{path}/{quote(name, safe='')}"


def _path_of(location: str, place: Place) -> str:
    """The path of a Location, below *place*.

    Its scheme may be that behind a proxy, its slashes may be too few, and whatever host it names, the token
    goes to no other one.
    """
    scheme, colon, rest = location.partition(":")
    if colon and scheme.isalpha():
        rest = rest.lstrip("/")
        location = rest[rest.find("/") :] if "/" in rest else "/"
    return "/" + location.removeprefix(place.path).lstrip("/")
