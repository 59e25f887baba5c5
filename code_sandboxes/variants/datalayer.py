"""datalayer-runtime: kernels in Datalayer's cloud, each sandbox in a runtime of its own.

A runtime costs credits for every second. As many as its lifetime may take are reserved when it is made, and
when they are used up, the service ends it: later than that it cannot end. It ends with this program, too,
unless that has detached from it, and however that ends, as long as this machine is up (``reaper.py``). What
has no field in the service's interface (a network policy, an idle time, tags) is refused, or is of this
program alone. Beyond the runtime's start and end all is as with any other Jupyter server.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakValueDictionary

from code_sandboxes.checks import check_str
from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxError,
    SandboxNotFoundError,
    SandboxNotStartedError,
    SandboxResourceError,
    SandboxSnapshotError,
)
from code_sandboxes.info import Capabilities, Capability, SandboxEnvironment, SandboxVariant
from code_sandboxes.isolation.gpus import is_named
from code_sandboxes.remote.datalayer_creation import Creation
from code_sandboxes.remote.datalayer_values import Runtime
from code_sandboxes.remote.kernels import RemoteKernel
from code_sandboxes.remote.server import is_kernel_id
from code_sandboxes.transports.loop import the_loop
from code_sandboxes.variants.base import Audience, ContextSpec, Record, Variant, max_output_of
from code_sandboxes.variants.datalayer_accounts import Account, account_of, known_account
from code_sandboxes.variants.datalayer_orders import name_of, order_of
from code_sandboxes.variants.datalayer_shelf import DatalayerShelf
from code_sandboxes.variants.gateway import JupyterGateway
from code_sandboxes.variants.ingress import Ingress, reached
from code_sandboxes.variants.lifetimes import Lifetime
from code_sandboxes.variants.remote_guards import Guard, guards

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig
    from code_sandboxes.snapshots import Shelf

__all__ = ["DatalayerRuntime"]

_NO_FIELD = "the service has no way to ask for it; local-docker and local-jupyter can do it on this machine"
_BY_ENVIRONMENT = "a runtime has what its environment has: more is refused, and less is not enforced"


class DatalayerRuntime(Variant):
    """Kernels in a runtime of Datalayer's cloud.

    Credits are reserved for ``max_lifetime``, or for ten minutes if that is its default, which nobody has
    chosen. The default context has the kernel that the runtime came with.
    """

    name = SandboxVariant.DATALAYER_RUNTIME
    options: ClassVar[frozenset[str]] = frozenset({"max_output", "run_url", "token"})
    has_registry = True
    is_elsewhere = True

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        super().__init__(config, options)
        self._max_output = max_output_of(options)
        self._refuse_what_cannot_be(config)
        self._account = account_of(options)
        self._datalayer = self._account.open()
        self._shelf = DatalayerShelf(self._datalayer, self._kept_runtime)
        self._creation: Creation | None = None
        self._guard: Guard | None = None
        self._runtime: Runtime | None = None
        self._kernels: Ingress | None = None
        self._record: Record | None = None
        self._audience: Audience | None = None
        self._lifetime: Lifetime | None = None
        self._expires_at = self._ends_at = math.inf  # monotonic: when the service ends it, and when this does
        self._was_attached = self._is_over = self._has_other_kernel = False

    def _refuse_what_cannot_be(self, config: SandboxConfig) -> None:
        if config.network_policy in ("none", "allowlist"):
            raise self.refuse(f"enforce network_policy={config.network_policy!r}", _NO_FIELD)
        if config.idle_timeout is not None:
            raise self.refuse(
                f"enforce idle_timeout={config.idle_timeout!r}",
                "nobody watches the runtime when this program is gone; use max_lifetime",
            )
        if not 0 < config.max_lifetime < math.inf:
            raise self.refuse(
                f"live without an end (max_lifetime={config.max_lifetime!r})",
                "it ends when the credits are used up that are reserved for it",
            )

    @classmethod
    def capabilities(cls) -> Capabilities:
        yes, no = Capability(True), Capability(False, _NO_FIELD)
        return replace(
            JupyterGateway.capabilities(),
            own_home=Capability(False, "its kernels have the home of the runtime's server, and share it"),
            system_packages=Capability(
                False, "code is not root in a runtime; choose an environment that has them"
            ),
            network_none=no,
            network_allowlist=no,
            memory_limit=Capability(False, _BY_ENVIRONMENT),
            cpu_limit=Capability(False, _BY_ENVIRONMENT),
            pids_limit=no,
            disk_limit=no,
            gpu=yes,
            mounts=no,
            idle_timeout=Capability(
                False, "nobody watches the runtime when this program is gone; use max_lifetime"
            ),
            pause=no,
            snapshots=yes,
        )

    @property
    def isolation(self) -> str:
        return (
            f"a runtime of its own in the cloud at {self._account.runtimes}; nothing of this machine is in"
            " reach"
        )

    @property
    def max_output(self) -> int:
        return self._max_output

    @property
    def sandbox_id(self) -> str | None:
        return None if self._runtime is None else f"{self.name}:{self._runtime.name}"

    @property
    def was_made_elsewhere(self) -> bool:
        return self._was_attached

    @property
    def metadata(self) -> Mapping[str, object]:
        if self._runtime is None:
            return {}
        kernels = {} if self._kernels is None else self._kernels.metadata
        return {**_about(self._runtime), **kernels}

    @property
    def shelf(self) -> Shelf:
        return self._shelf

    @classmethod
    def environments(cls, options: Mapping[str, object]) -> list[SandboxEnvironment]:
        _check_options("list_environments", options)
        datalayer = account_of(options).open()
        try:
            return datalayer.environments()
        finally:
            datalayer.close()

    # Its kernels are those of a Jupyter server.

    @property
    def _there(self) -> Ingress:
        assert self._kernels is not None
        return self._kernels

    def kernel_name(self, language: str | None) -> str:
        return self._there.kernel_name(language)

    def language_of(self, kernel_name: str) -> str:
        return self._there.language_of(kernel_name)

    def launcher(self, spec: ContextSpec) -> Callable[[], RemoteKernel]:
        launch = self._there.launcher(spec)

        def launch_or_tell() -> RemoteKernel:
            try:
                return launch()
            except SandboxError:
                self._check_is_there()
                raise

        return launch_or_tell

    def delete_context(self, context_id: str) -> None:
        self._there.delete_context(context_id)

    def _check_is_there(self) -> None:
        """
        Raises:
            SandboxConnectionError: the runtime has ended by itself; so does the sandbox.
        """
        runtime = self._known
        if not self._is_over and self._datalayer.runtime(runtime.name) is None:
            why = f"its runtime {runtime.name} has ended: its credits were used up, or somebody has ended it"
            if (audience := self._audience) is not None:
                the_loop().call_soon(lambda: audience.over(why))
            raise SandboxConnectionError(why)

    # Start and end.

    @property
    def _known(self) -> Runtime:
        assert self._runtime is not None
        return self._runtime

    def prepare(self, record: Record, audience: Audience) -> None:
        self._record, self._audience = record, audience
        order, environment = order_of(self.config, record.name, self._datalayer, self._shelf)
        self._creation = Creation(self._datalayer, order, self.config.start_timeout, lambda: self._is_over)
        self._guard = Guard("runtime", self._datalayer.runtimes_url, self._account.token, order.given_name)
        guards.guard(self._guard)
        self._runtime = runtime = self._creation.make()
        _here[runtime.name] = self
        lifetime = order.credits / environment.burning_rate if environment.burning_rate > 0 else math.inf
        if runtime.started_at is not None and runtime.expires_at is not None:
            lifetime = runtime.expires_at - runtime.started_at  # by one clock, which may not be ours
        self._expires_at = time.monotonic() + lifetime
        self._keep_lifetime(audience, record.time_left)
        self._reach(runtime, None, is_fresh=True)

    def _keep_lifetime(self, audience: Audience, seconds: float | None) -> None:
        """It ends after so many *seconds*, unless the service ends it before that."""
        self._lifetime = Lifetime(audience)
        left = max(0.0, self._expires_at - time.monotonic())
        if seconds is not None and seconds <= left:
            self._end_in(seconds, f"it reached its max_lifetime of {seconds:g} s")
        elif left < math.inf:
            self._end_in(left, "the credits that were reserved for its runtime are used up")
            the_loop().call_soon(lambda: audience.rescheduled(self._expires_at - time.monotonic()))

    def _end_in(self, seconds: float, why: str) -> None:
        assert self._lifetime is not None
        self._ends_at = time.monotonic() + seconds
        self._lifetime.end_in(seconds, why)

    def _reach(self, runtime: Runtime, kernel_id: str | None, *, is_fresh: bool) -> None:
        """Find its kernels; the default context has the one of that id, or the one it came with."""
        server, kernels = reached(runtime, self.config.start_timeout, self._check_not_over)
        if kernel_id is not None and kernel_id not in kernels:
            server.close()
            raise SandboxNotFoundError(f"there is no kernel {kernel_id} in the runtime {runtime.name!r}")
        # The one it came with is the oldest; a snapshot was restored in it, and secrets are in it alone.
        came_with = next(iter(kernels), None)
        kernel_id = kernel_id or came_with
        self._has_other_kernel = kernel_id != came_with
        self._kernels = Ingress(self.config, server, kernel_id, is_fresh=is_fresh)
        self._kernels.find()

    def _kept_runtime(self) -> str:
        """The name of the runtime of which snapshots are made: of the kernel that it came with."""
        if self._has_other_kernel:
            raise SandboxSnapshotError(
                "Datalayer makes snapshots of the kernel that a runtime came with, and this sandbox has"
                " another one; reach it with Sandbox.from_id() without a kernel"
            )
        return self._known.name

    def _check_not_over(self) -> None:
        if self._is_over:
            raise SandboxNotStartedError("it was terminated while it was started")

    def check_gpus(self, models: Sequence[str]) -> None:
        wanted = self.config.gpu
        if wanted is not None and not any(is_named(wanted, model) for model in models):
            there = ", ".join(sorted(set(models))) or "none"
            raise SandboxResourceError(
                f"gpu={wanted!r} was asked for, and a runtime of {self._known.environment!r} has come with"
                f" other GPUs: {there}; choose another environment, or ask for one of these"
            )

    def expire_in(self, seconds: float, why: str) -> None:
        left = self._expires_at - time.monotonic()
        if seconds > left:
            raise self.refuse(
                f"let it end only in {seconds:g} s",
                f"in {max(left, 0.0):.0f} s the credits are used up that were reserved for its runtime;"
                " create it with a longer max_lifetime",
            )
        self._end_in(seconds, why)

    def ends(self, why: str, *, orderly: bool) -> None:
        self._is_over = True
        if self._lifetime is not None:
            self._lifetime.cancel()
        if self._kernels is not None:
            self._kernels.ends(why, orderly=orderly)

    def remove(self) -> None:
        is_over = True
        try:
            if self._creation is not None:
                is_over = self._creation.undo()
            elif self._runtime is not None:
                self._datalayer.delete(self._runtime.name)
        except SandboxError as error:
            what = "a runtime" if self._runtime is None else f"the runtime {self._runtime.name}"
            raise SandboxConnectionError(
                f"{what} may be left at {self._account.runtimes}, and cost credits until its reservation"
                f" is used up: {error}"
            ) from None
        self._close()
        if self._guard is not None and self._creation is not None and not is_over:
            guards.release_later(self._guard, self._creation.undo)
        else:
            self._release()

    def _release(self) -> None:
        """Nobody has to end it any more."""
        if self._guard is not None:
            guards.release(self._guard)

    def _close(self) -> None:
        """Let go of all connections."""
        if self._runtime is not None and _here.get(self._runtime.name) is self:
            del _here[self._runtime.name]
        if self._kernels is not None:
            self._kernels.close()
        self._datalayer.close()

    # In the registry, which is the service.

    @classmethod
    def all(cls) -> list[Record]:
        accounts = {variant._account for variant in list(_here.values()) if not variant._is_over}
        if (account := known_account()) is not None:
            accounts.add(account)
        found: dict[str, Record] = {}
        for account in accounts:
            datalayer = account.open()
            try:
                for runtime in datalayer.runtimes():
                    found.setdefault(runtime.name, _record_of(runtime, account))
            finally:
                datalayer.close()
        return list(found.values())

    @classmethod
    def attach(cls, sandbox_id: str, options: Mapping[str, object]) -> tuple[Variant, Record]:
        from code_sandboxes.config import SandboxConfig

        _check_options("from_id", options)
        name, _, kernel_id = sandbox_id.removeprefix(f"{cls.name}:").partition("#")
        if not name or (kernel_id and not is_kernel_id(kernel_id)):
            raise SandboxNotFoundError(
                f"no sandbox {sandbox_id!r}: the id of a {cls.name} is the name of its runtime"
            )
        if known_account(options) is None:
            raise SandboxNotFoundError(
                f"no sandbox {sandbox_id!r}: it would be looked up at Datalayer, for which there is no API"
                " key; pass token=, or set DATALAYER_API_KEY"
            )
        variant = cls(SandboxConfig(), options)
        try:
            runtime = variant._datalayer.find(name)
            if runtime is None:
                raise SandboxNotFoundError(
                    f"no sandbox {sandbox_id!r} at {variant._account.runtimes}: it has ended, or never was"
                )
            variant._attach_to(runtime, kernel_id or None)
        except BaseException:
            variant._close()
            raise
        record = _record_of(runtime, variant._account)
        return variant, replace(record, contexts=[variant._there.default_spec()])

    def _attach_to(self, runtime: Runtime, kernel_id: str | None) -> None:
        self._was_attached, self._runtime = True, runtime
        self._reach(runtime, kernel_id, is_fresh=False)
        if runtime.expires_at is not None:
            self._expires_at = time.monotonic() + runtime.expires_at - time.time()
        _here.setdefault(runtime.name, self)

    def listen(self, audience: Audience) -> None:
        self._audience = audience
        self._keep_lifetime(audience, None)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        if self._record is not None:
            self._record = replace(self._record, tags=dict(tags))

    def detach(self, *, keep: bool) -> None:
        if self._lifetime is not None:
            self._lifetime.cancel()
        if keep or self._was_attached:
            self._close()
            self._release()
        else:
            self.remove()


# The runtimes that this program uses, by their names: of them it knows more than the service.
_here: WeakValueDictionary[str, DatalayerRuntime] = WeakValueDictionary()


def _about(runtime: Runtime) -> dict[str, object]:
    return {
        "runtime": runtime.name,
        "uid": runtime.uid,
        "environment": runtime.environment,
        "burning_rate": runtime.burning_rate,
        "expires_at": runtime.expires_at,
    }


def _record_of(runtime: Runtime, account: Account) -> Record:
    from code_sandboxes.config import SandboxConfig

    variant = _here.get(runtime.name)
    own = None if variant is None else variant._record
    if variant is not None and own is not None:
        left = None if variant._ends_at == math.inf else variant._ends_at - time.monotonic()
        return replace(own, id=f"{variant.name}:{runtime.name}", time_left=left, metadata=_about(runtime))
    left = None if runtime.expires_at is None else max(0.0, runtime.expires_at - time.time())
    settings = SandboxConfig().settings() | {"environment": runtime.environment or None}
    return Record(
        id=f"{DatalayerRuntime.name}:{runtime.name}",
        name=name_of(runtime.given_name),
        tags={},
        settings=settings,
        created_at=runtime.started_at or time.time(),
        time_left=left,
        isolation=f"a runtime of its own in the cloud at {account.runtimes}",
        metadata=_about(runtime),
    )


def _check_options(what: str, options: Mapping[str, object]) -> None:
    if unknown := sorted(set(options) - {"run_url", "token"}):
        raise TypeError(
            f"{what}() of {DatalayerRuntime.name} takes token= and run_url= (given: {', '.join(unknown)})"
        )
    for name in options:
        check_str(name, options[name])
