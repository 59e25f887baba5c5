"""local-docker on an engine elsewhere: kernels of a Jupyter server in a container, reached by the engine.

Nothing of this machine is in the container and no port of it is open; the engine's own connection is the way
in (:mod:`code_sandboxes.remote.exec_stream`), so this works without a network, too. There is no keeper: the
container's first process knows whether a program is there, and what programs have to know of one another.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from code_sandboxes.checks import check_str
from code_sandboxes.errors import (
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxNotFoundError,
    SandboxNotStartedError,
    SandboxResourceError,
)
from code_sandboxes.info import Capabilities, Capability, SandboxVariant
from code_sandboxes.isolation.container import WORKING_DIR, files_of
from code_sandboxes.isolation.container_engine import Printed
from code_sandboxes.isolation.distant import SERVER, find, make, sweep
from code_sandboxes.isolation.engine import IMAGE
from code_sandboxes.isolation.engine_address import EngineAddress
from code_sandboxes.isolation.gpus import is_named
from code_sandboxes.isolation.plan import Bounds, ContainerPlan, Plan
from code_sandboxes.network_info import NetworkAttempt
from code_sandboxes.reaper import Guard
from code_sandboxes.remote.exec_stream import dial_socket
from code_sandboxes.remote.kernels import RemoteKernel
from code_sandboxes.remote.rest import Place
from code_sandboxes.remote.server import JupyterServer, KernelModel
from code_sandboxes.remote.steward import Steward
from code_sandboxes.transports.errors import PlaceGoneError
from code_sandboxes.variants.base import Audience, ContextSpec, Record, Variant
from code_sandboxes.variants.engines import engine_of
from code_sandboxes.variants.gateway import JupyterGateway
from code_sandboxes.variants.launches import check_variables, locale, own_packages
from code_sandboxes.variants.lifetimes import Lifetime
from code_sandboxes.variants.mounts import check_start
from code_sandboxes.variants.plans import DISK, PIDS, bounds_of, network_of, told_bounds

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["DistantDocker"]

_MIB = 1024**2

_KERNEL = "python3"

# What code is called that has no name in the image.
_NAME = "sandbox"

# The Jupyter server and a relay or two have to be in it, beside a kernel.
_LEAST_MEMORY = 256 * _MIB

# Seconds after its lifetime at which the container ends by itself: the program, if there is one, tells why.
_LATER = 3.0

_NO_SNAPSHOTS = "on an engine elsewhere it cannot do that yet; with an engine on this machine it can"
_NO_FILES = "the files of this machine are not there on an engine elsewhere; send them with files.upload()"
_NO_PROXY = "the proxy is on this machine, where an engine elsewhere does not reach it; 'none' works there"
_NOT_ROOT = "code is not root in the container, whose image is read-only; create it with user='root'"
_NO_IDLE = "on an engine elsewhere nobody watches for it; max_lifetime works there"

# Seconds until a sandbox whose container has ended is over, too.
_TO_TELL = 0.5

# How what a steward is to remember of contexts begins.
_CONTEXT = "context:"

_OF_A_CONTEXT = ("id", "name", "language", "kernel_name", "cwd")


class DistantDocker(JupyterGateway):
    """Kernels in a container of an engine that is not on this machine."""

    name = SandboxVariant.LOCAL_DOCKER
    options: ClassVar[frozenset[str]] = frozenset(
        {"disk", "docker_client", "docker_host", "image", "max_output", "mounts", "pids", "user"}
    )
    is_elsewhere = True

    def __init__(
        self, config: SandboxConfig, options: Mapping[str, object], *, container: str | None = None
    ) -> None:
        Variant.__init__(self, config, options)
        self._container = container or f"code-sandboxes-{secrets.token_hex(8)}"
        self._making = threading.Lock()
        self._is_made = container is not None
        self._kernel_ids: dict[str, str] = {}  # by the ids of contexts
        self._oom_kills = 0
        self._known_steward: Steward | None = None
        self._engine_choice = engine_of(options, self.refuse)
        super().__init__(config, {name: options[name] for name in {"max_output"} & set(options)})
        self._options = dict(options)
        self._plan = self._decide()

    # What is asked of it.

    def _place_of(self, options: Mapping[str, object]) -> tuple[Place, str | None]:
        return Place(f"http+unix://{self._container}", "the container"), None

    def _refuse_what_cannot_be(self, config: SandboxConfig) -> None:
        if config.environment is not None:
            raise self.refuse(
                f"provide the environment {config.environment!r}", "it runs an image; choose with image="
            )
        if config.idle_timeout is not None:
            raise self.refuse(f"enforce idle_timeout={config.idle_timeout!r}", _NO_IDLE)
        check_variables("env", config.env_vars)

    def _decide(self) -> Plan:
        options, config = self._options, self.config
        for option in ("docker_host", "image", "user"):
            check_str(option, options.get(option))
            if options.get(option) == "":
                raise self.refuse(f"honour {option}=''", "an empty name says nothing; leave it out")
        if options.get("mounts"):
            raise self.refuse(f"mount {options['mounts']!r}", _NO_FILES)
        container = ContainerPlan(
            self._engine_choice.url,
            str(options.get("image") or IMAGE),
            str(options.get("user") or ""),
            gpus=() if config.gpu is None else (config.gpu,),
        )
        reasons = dict.fromkeys(("network_none", "network_allowlist", "memory", "cpu", "pids", "disk"), "")
        reasons["network_allowlist"] = _NO_PROXY
        defaults = Bounds(pids=PIDS, disk=DISK)
        if container.is_root:
            reasons["disk"] = "code that is root can write the whole image, and layers have no limit"
            defaults = Bounds(pids=PIDS)
        plan = Plan(
            "container",
            bounds=bounds_of(config, options, reasons, defaults, self.refuse),
            network=network_of(config, reasons, self.refuse),
            working_dir=check_start(config.working_dir or WORKING_DIR, (), self.refuse),
            container=container,
        )
        if plan.bounds.memory is not None and plan.bounds.memory < _LEAST_MEMORY:
            raise self.refuse(
                f"do with {plan.bounds.memory / _MIB:g} MiB of memory",
                f"on an engine elsewhere a Jupyter server has its part; it takes {_LEAST_MEMORY // _MIB}",
            )
        return plan

    # What it is.

    @classmethod
    def capabilities(cls) -> Capabilities:
        yes, told = Capability(True), super().capabilities()
        return replace(
            told,
            own_home=yes,
            system_packages=Capability(False, _NOT_ROOT),
            network_none=yes,
            network_allowlist=Capability(False, _NO_PROXY),
            memory_limit=yes,
            cpu_limit=yes,
            pids_limit=yes,
            disk_limit=yes,
            gpu=yes,
            mounts=Capability(False, _NO_FILES),
            idle_timeout=Capability(False, _NO_IDLE),
            pause=Capability(False, _NO_SNAPSHOTS),
            snapshots=Capability(False, _NO_SNAPSHOTS),
            fork=Capability(False, _NO_SNAPSHOTS),
        )

    @property
    def own_capabilities(self) -> Capabilities:
        told = self.capabilities()
        if self._is_root and self._plan.network == "none":
            why = "it has no network; create it with a network_policy that lets it have one"
            told = replace(told, system_packages=Capability(False, why))
        elif self._is_root:
            told = replace(told, system_packages=Capability(True))
        return replace(told, languages=tuple(self._languages()) or told.languages)

    @property
    def _is_root(self) -> bool:
        assert self._plan.container is not None
        return self._plan.container.is_root

    @property
    def isolation(self) -> str:
        plan = self._plan
        assert plan.container is not None
        network = "a network of its own behind its machine's" if plan.network == "all" else "no network"
        who = "code is root in it, without most privileges" if self._is_root else "read-only"
        return (
            f"container: the image {plan.container.image} on the engine at {plan.container.engine}, {who},"
            f" processes and users of its own, {network}; {told_bounds(plan.bounds)}; nothing of this machine"
            " is in reach"
        )

    @property
    def metadata(self) -> Mapping[str, object]:
        kernel_ids = [each.kernel_id for each in list(self._contexts.values()) if each.kernel_id is not None]
        return {"engine": self._engine_choice.url, "container": self._container, "kernel_ids": kernel_ids}

    @property
    def sandbox_id(self) -> str | None:
        return None

    @property
    def was_made_elsewhere(self) -> bool:
        return True  # or another program has come since

    @property
    def own_folders(self) -> tuple[str, ...]:
        return files_of(self._plan)

    def check_gpus(self, models: Sequence[str]) -> None:
        wanted = self.config.gpu
        if wanted is not None and not any(is_named(wanted, model) for model in models):
            there = ", ".join(sorted(set(models))) or "none"
            raise SandboxResourceError(
                f"gpu={wanted!r} was asked for, and the engine at {self._engine_choice.url} has given another"
                f" one: {there}"
            )

    def network_log(self) -> list[NetworkAttempt]:
        raise self.refuse(
            "tell what the sandbox tried to reach", "on an engine elsewhere nobody watches that"
        )

    # Start and end.

    @property
    def _server(self) -> JupyterServer:
        if self._known_server is None:
            self._connect()
        assert self._known_server is not None
        return self._known_server

    @property
    def _steward(self) -> Steward:
        if self._known_steward is None:
            self._connect()
        assert self._known_steward is not None
        return self._known_steward

    def _connect(self) -> None:
        engine = self._engine_choice.connect()
        try:
            address = engine.address
        finally:
            engine.close()
        dial = partial(self._dial, address)
        self._known_server = JupyterServer(self._place, None, dial=partial(dial, SERVER))
        self._known_steward = Steward(partial(dial, ""))

    def _dial(self, address: EngineAddress, path: str) -> socket.socket:
        try:
            return dial_socket(address, self._container, path)
        except PlaceGoneError:
            if self._is_made and not self._is_over and self._lifetime is not None:
                # Another program has ended it, or somebody else; what was on is told of that first.
                self._lifetime.end_in(_TO_TELL, "its container has ended")
            raise

    def prepare(self, record: Record, audience: Audience) -> None:
        self._lifetime = Lifetime(audience)
        with self._making:
            if self._is_over:
                raise SandboxNotStartedError("it was terminated while it was started")
            said = self._make(record.id)
        try:
            self._find_out()
        except SandboxConnectionError as error:
            raise SandboxConnectionError(f"{error}; its container said: {said() or 'nothing'}") from None
        finally:
            said.close()
        if record.time_left is not None:
            self.expire_in(record.time_left, f"it reached its max_lifetime of {record.time_left:g} s")
        about = {
            "name": record.name,
            "tags": dict(record.tags),
            "settings": dict(record.settings),
            "created_at": record.created_at,
            "options": {name: self._options.get(name) for name in ("image", "user", "pids", "disk")},
        }
        self._steward.keep({"about": about})

    def _make(self, sandbox_id: str) -> Printed:
        assert self._plan.container is not None
        variables = locale() | {"USER": _NAME, "LOGNAME": _NAME}
        variables |= {} if self._is_root else own_packages(self._plan.container.home)
        engine = self._engine_choice.connect()
        try:
            sweep(engine)
            said = make(engine, self._plan, self._container, sandbox_id, variables)
        finally:
            engine.close()
        self._is_made = True
        return said

    def _find_out(self) -> None:
        self._specs, self._default = self._server.kernelspecs()
        self._default = _KERNEL if _KERNEL in self._specs else self._default
        if self._default not in self._specs:
            raise SandboxConfigurationError(
                f"the image {self._options.get('image') or IMAGE!r} has no Jupyter kernel"
            )

    def launcher(self, spec: ContextSpec) -> Callable[[], RemoteKernel]:
        launch = super().launcher(spec)
        context = self._contexts[spec.id]
        if spec.id in self._kernel_ids:
            context.kernel_id, context.is_fresh = self._kernel_ids[spec.id], False
        if self._plan.bounds.memory is not None:
            context.why_died = self._why_died
        return launch

    def _why_died(self) -> str:
        kills, before = self._steward.about().oom_kills, self._oom_kills
        self._oom_kills = kills
        assert self._plan.bounds.memory is not None
        memory = self._plan.bounds.memory / _MIB
        used_up = f"the sandbox used up its memory of {memory:g} MiB, in which its files lie, too"
        return used_up * (kills > before)

    def _start(self, spec: ContextSpec) -> KernelModel:
        model = super()._start(spec)
        self._kernel_ids[spec.id] = model.id
        told = {name: getattr(spec, name) for name in _OF_A_CONTEXT}
        self._steward.keep({f"{_CONTEXT}{spec.id}": {**told, "env": dict(spec.env), "kernel_id": model.id}})
        return model

    def _guard(self, what: str, guard: Guard) -> None:
        return  # what ends the container ends its kernels, and that is seen to from inside

    def delete_context(self, context_id: str) -> None:
        super().delete_context(context_id)
        self._kernel_ids.pop(context_id, None)
        self._steward.keep({f"{_CONTEXT}{context_id}": None})

    def expire_in(self, seconds: float, why: str) -> None:
        super().expire_in(seconds, why)
        self._steward.end_in(seconds + _LATER)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        about = self._steward.about().kept.get("about")
        self._steward.keep({"about": {**(about if isinstance(about, dict) else {}), "tags": dict(tags)}})

    def remove(self) -> None:
        self._close_connections()
        with self._making:
            if not self._is_made:
                return
            engine = self._engine_choice.connect()
            try:
                engine.remove(self._container)
            finally:
                engine.close()
            self._is_made = False

    def detach(self, *, keep: bool) -> None:
        if self._lifetime is not None:
            self._lifetime.cancel()
        try:
            if keep:
                self._steward.detach()
            else:
                self._steward.leave()
        except SandboxConnectionError:
            if keep:
                raise
            # It has ended, or will, when nobody is heard of any more.
        finally:
            self._close_connections()

    # Found by its id.

    @classmethod
    def attach(cls, sandbox_id: str, options: Mapping[str, object]) -> tuple[Variant, Record]:
        if unknown := sorted(set(options) - {"docker_host", "docker_client"}):
            raise TypeError(
                f"from_id() of {cls.name} takes docker_host= or docker_client= (given: {', '.join(unknown)})"
            )
        choice = engine_of(options, _refuse)
        engine = choice.connect()
        try:
            container, address = find(engine, sandbox_id), engine.address
        finally:
            engine.close()
        if container is None:
            raise SandboxNotFoundError(
                f"no sandbox {sandbox_id!r} on the engine at {choice.url}: it has ended, or never was"
            )
        told = Steward(partial(dial_socket, address, container, "")).about()
        try:
            variant, record = cls._found(sandbox_id, told.kept, told.time_left, options, container)
        except (TypeError, ValueError, KeyError) as error:
            raise SandboxConnectionError(
                f"what the container of {sandbox_id} tells of itself makes no sense: {error!r}"
            ) from None
        variant._oom_kills = told.oom_kills
        try:
            variant._find_out()
        except BaseException:
            variant._close_connections()
            raise
        return variant, record

    @classmethod
    def _found(
        cls,
        sandbox_id: str,
        kept: Mapping[str, Any],
        time_left: float | None,
        options: Mapping[str, object],
        container: str,
    ) -> tuple[DistantDocker, Record]:
        from code_sandboxes.config import SandboxConfig

        about = kept["about"]
        own = {name: value for name, value in about["options"].items() if value is not None}
        config = SandboxConfig(**about["settings"])
        variant = cls(config, {**own, **options}, container=container)
        contexts = []
        for key, value in kept.items():
            if key.startswith(_CONTEXT):
                variant._kernel_ids[value["id"]] = str(value["kernel_id"])
                fields = {each: value[each] for each in _OF_A_CONTEXT}
                contexts.append(ContextSpec(**fields, env=dict(value["env"]), key=None))
        record = Record(
            sandbox_id,
            about["name"],
            dict(about["tags"]),
            about["settings"],
            float(about["created_at"]),
            None if time_left is None else max(0.0, time_left - _LATER),
            variant.isolation,
            contexts,
        )
        return variant, record

    def listen(self, audience: Audience) -> None:
        self._lifetime = Lifetime(audience)


def _refuse(setting: str, reason: str) -> SandboxConfigurationError:
    return SandboxConfigurationError(f"{SandboxVariant.LOCAL_DOCKER} cannot {setting}: {reason}")
