"""The runtimes that exist: a pod for each, its reservation, and its end when its credits are used up."""

from __future__ import annotations

import secrets
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.datalayer_service.answers import Refusal, new_uid
from tests.datalayer_service.ground import Ground
from tests.datalayer_service.iam import Secrets
from tests.datalayer_service.knobs import Environment, Knobs
from tests.datalayer_service.ledger import Ledger, Reservation
from tests.datalayer_service.pods import Pod

__all__ = ["Order", "Runtime", "Runtimes"]


@dataclass(frozen=True)
class Order:
    """What somebody wants."""

    environment: Environment
    given_name: str
    credits_limit: float
    kind: str
    capabilities: tuple[str, ...] = ()
    variables: bytes | None = None  # of a snapshot


@dataclass(frozen=True)
class Runtime:
    """One that exists, or existed."""

    name: str
    uid: str
    given_name: str
    environment: Environment
    kind: str
    pool: str
    pod: Pod
    reservation: Reservation
    started_at: float
    expired_at: float  # when it ends, whatever it says of that

    @property
    def token(self) -> str:
        return self.pod.token

    @property
    def kernel_id(self) -> str | None:
        """The pre-warmed kernel's."""
        return self.pod.kernel_id

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Its Jupyter Server."""
        assert self.pod.process is not None, "a runtime that never started"
        return self.pod.process


class Runtimes:
    """Those of one account. *hang_up* ends the websockets of a name with a code."""

    def __init__(
        self,
        knobs: Knobs,
        ledger: Ledger,
        user_secrets: Secrets,
        ground: Ground,
        hang_up: Callable[[str, int], None],
    ) -> None:
        self._knobs = knobs
        self._ledger = ledger
        self._secrets = user_secrets
        self._ground = ground
        self._hang_up = hang_up
        self._lock = threading.Lock()
        self._runtimes: dict[str, Runtime] = {}
        self._capabilities: dict[str, tuple[str, ...]] = {}
        self._timers: dict[str, threading.Timer] = {}
        self._in_the_making = 0
        self._is_closed = False

    @property
    def all(self) -> list[Runtime]:
        with self._lock:
            return list(self._runtimes.values())

    def find(self, name: str) -> Runtime | None:
        with self._lock:
            return self._runtimes.get(name)

    def get(self, name: object) -> Runtime:
        runtime = self.find(name) if isinstance(name, str) else None
        if runtime is None:
            raise Refusal(404, f"Runtime {name} not found")
        return runtime

    def capabilities(self, runtime: Runtime) -> tuple[str, ...]:
        with self._lock:
            return self._capabilities.get(runtime.name, ())

    def set_capabilities(self, runtime: Runtime, capabilities: tuple[str, ...]) -> None:
        with self._lock:
            self._capabilities[runtime.name] = capabilities

    def make(self, order: Order) -> Runtime:
        """A new one, once it is there and has its variables."""
        self._take_slot()
        try:
            reservation = self._ledger.reserve(order.credits_limit, order.environment.burning_rate)
            try:
                return self._make(order, reservation)
            except BaseException:
                self._ledger.refund(reservation, started_at=None)
                raise
        finally:
            with self._lock:
                self._in_the_making -= 1

    def end(self, name: str) -> bool:
        """Whether it was there; when this returns, nothing of it is."""
        with self._lock:
            runtime = self._runtimes.pop(name, None)
            timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        if runtime is None:
            return False
        self._hang_up(name, self._knobs.end_code)
        runtime.pod.end()
        self._ledger.refund(runtime.reservation, started_at=runtime.started_at)
        return True

    def close(self) -> None:
        """End all; none begins afterwards."""
        with self._lock:
            self._is_closed = True
            names, timers = list(self._runtimes), list(self._timers.values())
        for name in names:
            self.end(name)
        for timer in timers:
            timer.cancel()
            timer.join()

    def _take_slot(self) -> None:
        with self._lock:
            self._refuse_when_closed()
            if len(self._runtimes) + self._in_the_making >= self._knobs.quota:
                message = f"The limit of {self._knobs.quota} simultaneous runtimes has been reached"
                raise Refusal(self._knobs.quota_status, message, {"reason": "quota_exceeded"})
            self._in_the_making += 1

    def _refuse_when_closed(self) -> None:
        if self._is_closed:
            raise Refusal(503, "The service is closed")

    def _make(self, order: Order, reservation: Reservation) -> Runtime:
        name = f"runtime-{secrets.token_hex(5)}"
        pool = f"{order.environment.name.removesuffix('-env').replace('/', '-')}-pool"
        pod = Pod(self._ground.folder() / name, f"/jupyter/server/{pool}/{name}")
        try:
            self._start(pod, order)
            return self._open(order, reservation, name, pool, pod)
        except BaseException:
            pod.end()
            raise

    def _start(self, pod: Pod, order: Order) -> None:
        environment = order.environment
        pod.start(environment.env, environment.gpus, self._knobs.gpu)
        if self._knobs.pre_warmed:
            pod.start_kernel(self._secrets.values())
        if order.variables is not None:
            pod.load(order.variables, self._knobs.snapshot_patience, splits_at_nul=self._knobs.splits_at_nul)

    def _open(self, order: Order, reservation: Reservation, name: str, pool: str, pod: Pod) -> Runtime:
        started_at = time.time()
        seconds = order.credits_limit / order.environment.burning_rate / self._knobs.clock_speed
        runtime = Runtime(
            name,
            new_uid(),
            order.given_name,
            order.environment,
            order.kind,
            pool,
            pod,
            reservation,
            started_at,
            started_at + seconds,
        )
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self.end, (name,))
        timer.daemon = True
        with self._lock:
            self._refuse_when_closed()
            self._runtimes[name] = runtime
            self._capabilities[name] = order.capabilities
            self._timers[name] = timer
            timer.start()
        return runtime
