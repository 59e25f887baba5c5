"""POST of a runtime: what is asked, in either generation's words, and what may become of it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

from tests.datalayer_service.answers import (
    Answer,
    Json,
    Refusal,
    Request,
    html,
    new_uid,
    refusal_answer,
    success,
    unprocessable,
)
from tests.datalayer_service.environments import Environments
from tests.datalayer_service.knobs import CreateFault, Knobs
from tests.datalayer_service.runtimes import Order, Runtime, Runtimes

__all__ = ["OPERATIONS", "Creation"]

OPERATIONS = "/api/runtimes/v1/operations"

_KEYS_OF_BOTH = {"type", "given_name", "credits_limit", "from", "capabilities", "agent_spec_id", "agent_spec"}
_KEYS = {
    "A": {"environment_name", "billable_account_uid", "billable_account_type", "billable_account_handle"},
    "B": {
        *("environment", "runtime_name", "content_attachment_uids", "parent_reservation_uid", "app_uid"),
        *("deployment_uid", "app_spec", "magic_api_key"),
        *("billing_entity_uid", "billing_entity_type", "billing_entity_handle"),
    },
}

_REFUSALS = {
    CreateFault.NO_CAPACITY: (503, "No runtime available"),
    CreateFault.FAILED_WITH_200: (200, "No runtime available"),
}


class Creation:
    """Makes runtimes, one for each request, however often the same is asked."""

    def __init__(
        self,
        knobs: Knobs,
        environments: Environments,
        runtimes: Runtimes,
        variables: Callable[[str], bytes],
        tell: Callable[[Runtime], Json],
        origin: str,
    ) -> None:
        self._knobs = knobs
        self._environments = environments
        self._runtimes = runtimes
        self._variables = variables
        self._tell = tell
        self._origin = origin
        self._lock = threading.Lock()
        self._operations: dict[str, Answer | None] = {}
        self._polls: dict[str, int] = {}
        self._threads: list[threading.Thread] = []

    def create(self, request: Request) -> Answer:
        order = self._order(request.json())  # first: who asks in the other generation's words will ask again
        fault = self._fault()
        if fault is CreateFault.BAD_GATEWAY:
            return html(502)
        if fault in _REFUSALS:
            status, message = _REFUSALS[fault]
            raise Refusal(status, message, {"reason": "no_runtime_available", "retry_after_seconds": 5})
        if fault is CreateFault.ACCEPTED:
            return self._accept(order)
        answer = self._make(order)
        if fault is CreateFault.GATEWAY_TIMEOUT:
            return html(504)
        if fault is CreateFault.SILENCE:
            return Answer(0, is_silence=True)
        return answer

    def operation(self, request: Request, uid: str) -> Answer:
        """What became of an accepted creation; 202 as long as that is open."""
        with self._lock:
            if uid not in self._operations:
                raise Refusal(404, f"Operation {uid} not found")
            self._polls[uid] += 1
            answer = self._operations[uid]
            is_early = self._polls[uid] <= self._knobs.accepted_polls
        return self._accepted(uid) if answer is None or is_early else answer

    def close(self) -> None:
        """Wait for what is in the making."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _fault(self) -> CreateFault | None:
        with self._lock:
            return self._knobs.next_creates.pop(0) if self._knobs.next_creates else self._knobs.create_fault

    def _make(self, order: Order) -> Answer:
        runtime = self._runtimes.make(order)
        return success({"runtime": self._tell(runtime)}, status=201, message="Runtime created successfully")

    def _accept(self, order: Order) -> Answer:
        uid = new_uid()
        thread = threading.Thread(target=self._make_later, args=(uid, order), name="creation", daemon=True)
        with self._lock:
            self._operations[uid] = None
            self._polls[uid] = 0
            self._threads.append(thread)
        thread.start()
        return self._accepted(uid)

    def _make_later(self, uid: str, order: Order) -> None:
        try:
            answer = self._make(order)
        except Refusal as refusal:
            answer = refusal_answer(refusal, self._knobs.error_shape)
        except Exception as error:  # the thread ends here; who polls is told
            answer = refusal_answer(Refusal(500, str(error)), self._knobs.error_shape)
        with self._lock:
            self._operations[uid] = answer

    def _accepted(self, uid: str) -> Answer:
        path = f"{OPERATIONS}/{uid}"
        locations = {
            "relative": path,
            "absolute": f"{self._origin}{path}",
            "other_scheme": f"{self._origin.replace('http:', 'https:')}{path}",
            "malformed": f"{self._origin.replace('http://', 'https:/')}{path}",
        }
        return Answer(202, headers=(("Location", locations[self._knobs.location]),))

    def _order(self, body: Json) -> Order:
        environment = self._environments.find(self._environment_name(body))
        self._refuse_unknown(body)
        limit = body.get("credits_limit")
        if limit is None:
            raise unprocessable(("body", "credits_limit"), "Field required", "missing")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise unprocessable(("body", "credits_limit"), "Input should be greater than 0", "greater_than")
        snapshot = body.get("from")
        return Order(
            environment,
            str(body.get("given_name") or f"runtime-{environment.name}-{uuid.uuid4()}"),
            float(limit),
            str(body.get("type") or "notebook"),
            capabilities_in(body),
            None if snapshot is None else self._variables(str(snapshot)),
        )

    def _environment_name(self, body: Json) -> str:
        """Said as one of the generations says it that are understood."""
        environment = body.get("environment")
        said = {
            "A": body.get("environment_name"),
            "B": environment.get("name") if isinstance(environment, dict) else None,
        }
        for generation in self._knobs.bodies:
            if isinstance(name := said[generation], str) and name:
                return name
        missing = ("body", "environment" if "B" in self._knobs.bodies else "environment_name")
        raise unprocessable(missing, "Field required", "missing")

    def _refuse_unknown(self, body: Json) -> None:
        known = _KEYS_OF_BOTH.union(*(_KEYS[generation] for generation in self._knobs.bodies))
        unknown = sorted(body.keys() - known)
        if unknown and self._knobs.rejects_unknown_keys:
            raise unprocessable(("body", unknown[0]), "Extra inputs are not permitted", "extra_forbidden")


def capabilities_in(body: Json) -> tuple[str, ...]:
    capabilities = body.get("capabilities")
    return tuple(str(capability) for capability in capabilities) if isinstance(capabilities, list) else ()
