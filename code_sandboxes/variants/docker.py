"""local-docker: kernels in a container on this machine, hardened, each spoken to over ``ipc://``.

Where the engine is elsewhere, ``distant_docker.py`` has the name.

The keeper makes the container (:mod:`code_sandboxes.isolation.container`) and keeps the sandbox, as it keeps
those of local-jupyter. What is in the container is its image's: an operating system, Python, ipykernel.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from code_sandboxes.checks import check_str
from code_sandboxes.errors import SandboxConfigurationError, SandboxError
from code_sandboxes.info import Capabilities, Capability, SandboxVariant
from code_sandboxes.isolation.bubblewrap import INIT
from code_sandboxes.isolation.container import GUEST, WORKING_DIR, files_of
from code_sandboxes.isolation.engine import IMAGE
from code_sandboxes.isolation.gpus import installed, is_named
from code_sandboxes.isolation.plan import Bounds, ContainerPlan, Plan
from code_sandboxes.isolation.system import is_below
from code_sandboxes.variants.base import ContextSpec, Record, Variant
from code_sandboxes.variants.engines import engine_of
from code_sandboxes.variants.kept import Kept
from code_sandboxes.variants.kernelspecs import IPYKERNEL_ARGUMENTS, LAUNCH
from code_sandboxes.variants.launches import THROUGH_PROXY, check_variables, locale, own_packages
from code_sandboxes.variants.mounts import (
    asked_mounts,
    check_hidden,
    check_keeper_is_hidden,
    check_start,
)
from code_sandboxes.variants.plans import DISK, PIDS, bounds_of, network_of, told_bounds, told_mounts

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig
    from code_sandboxes.snapshots import Snapshot, Store

__all__ = ["LocalDocker"]

# Of our image, and of ours.
_OWN_PLACES = ("/opt/sandbox", os.path.dirname(GUEST))

_KERNEL = "python3"
_LAUNCH = f"{GUEST}/{os.path.basename(LAUNCH)}"
_PYTHON = ("python", "python3")
_NOT_ROOT = "code is not root in the container, whose image is read-only; create it with user='root'"

# What code is called that has no name in the image.
_NAME = "sandbox"


class LocalDocker(Kept):
    """Kernels in a container on this machine."""

    name = SandboxVariant.LOCAL_DOCKER
    options: ClassVar[frozenset[str]] = frozenset(
        {"disk", "docker_client", "docker_host", "image", "max_output", "mounts", "pids", "user"}
    )

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        super().__init__(config, options)
        self._kernel_name = _KERNEL
        self._image = str(options.get("image") or IMAGE)

    @property
    def snapshots(self) -> Store:
        from code_sandboxes.variants.container_snapshots import ContainerStore

        return ContainerStore(self.name, self._engine, lambda: str(self._described()["container"]))

    @property
    def _engine(self) -> str:
        plan = self._plan
        return plan.container.engine if plan and plan.container else self._chosen_engine

    @property
    def _chosen_engine(self) -> str:
        return engine_of(self._options, self.refuse).url

    @property
    def own_folders(self) -> tuple[str, ...]:
        return files_of(self.plan)

    def begin_with(self, snapshot: Snapshot) -> None:
        from code_sandboxes.variants.container_snapshots import image_of

        if self._options.get("image") is not None:
            raise self.refuse("begin with a snapshot and image=", "a snapshot has an image of its own")
        self._image = image_of(snapshot.info.id)

    def _check(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        if not hasattr(os, "pidfd_open"):
            raise self.refuse("run on this system", "it needs Linux, version 5.3 or newer")
        for option in ("docker_host", "image", "user"):
            check_str(option, options.get(option))
            if options.get(option) == "":
                raise self.refuse(f"honour {option}=''", "an empty name says nothing; leave it out")
        if config.environment is not None:
            raise self.refuse(
                f"provide the environment {config.environment!r}", "it runs an image; choose with image="
            )
        check_variables("env", config.env_vars)

    @classmethod
    def chosen(cls, config: SandboxConfig, options: Mapping[str, object]) -> Variant:
        if set(options) <= cls.options and not engine_of(options, _refuse).is_here:
            return _distant()(config, options)
        return cls(config, options)

    @classmethod
    def attach(cls, sandbox_id: str, options: Mapping[str, object]) -> tuple[Variant, Record]:
        if options or not engine_of({}, _refuse).is_here:
            return _distant().attach(sandbox_id, options)
        return super().attach(sandbox_id, options)

    @classmethod
    def capabilities(cls) -> Capabilities:
        try:
            choice = engine_of({}, _refuse)
            choice.connect().close()
        except SandboxError as error:
            return _capabilities(str(error), _NOT_ROOT)
        return _capabilities("", _NOT_ROOT) if choice.is_here else _distant().capabilities()

    @property
    def own_capabilities(self) -> Capabilities:
        assert self.plan.container is not None
        return _capabilities("", self._why_no_system_packages(self.plan.container))

    def _why_no_system_packages(self, plan: ContainerPlan) -> str:
        if not plan.is_root:
            return _NOT_ROOT
        return "it has no network; create it with a network_policy that lets it have one" * (
            self.plan.network == "none"
        )

    def _decide(self) -> Plan:
        options, config, user = self._options, self.config, str(self._options.get("user") or "")
        mounts = asked_mounts(options.get("mounts"), (), self.refuse)
        check_keeper_is_hidden(mounts, self.refuse)
        engine = self._chosen_engine
        check_hidden(mounts, engine.removeprefix("unix://"), "the container engine", self.refuse)
        start = check_start(config.working_dir or WORKING_DIR, mounts, self.refuse)
        for place in (start, *(mount.target for mount in mounts)):
            if place == "/" or any(is_below(place, own) or is_below(own, place) for own in _OWN_PLACES):
                raise self.refuse(f"use {place}", "the container has something of its own there")
        container = ContainerPlan(
            engine=engine,
            image=self._image,
            user=user,
            as_caller=any(mount.writable for mount in mounts) and os.geteuid() != 0,
            gpus=self._gpus(config.gpu),
        )
        reasons = dict.fromkeys(("network_none", "network_allowlist", "memory", "cpu", "pids", "disk"), "")
        defaults = Bounds(pids=PIDS, disk=DISK)
        if container.is_root:
            reasons["disk"] = "code that is root can write the whole image, and layers have no limit"
            defaults = Bounds(pids=PIDS)
        return Plan(
            "container",
            mounts,
            bounds_of(config, options, reasons, defaults, self.refuse),
            network_of(config, reasons, self.refuse),
            tuple(config.allowed_hosts) if config.network_policy == "allowlist" else (),
            start,
            first=INIT,
            container=container,
        )

    def _gpus(self, wanted: str | None) -> tuple[str, ...]:
        """The GPU that was asked for, by its type."""
        if wanted is None:
            return ()
        gpus = installed()
        chosen = [number for number, model in gpus.items() if is_named(wanted, model)]
        if not chosen:
            there = ", ".join(sorted(set(gpus.values()))) or "none"
            raise self.refuse(
                f"choose a GPU (gpu={wanted!r})", f"this machine has no such one (NVIDIA GPUs: {there})"
            )
        return tuple(chosen[:1])

    def _describe(self) -> str:
        plan = self.plan
        assert plan.container is not None
        network = {
            "all": "a network of its own behind the machine's, whose services it reaches",
            "none": "no network",
            "allowlist": f"from the network only {', '.join(plan.allowed_hosts) or 'nothing'}",
        }[plan.network]
        who = "code is root in it, without most privileges" if plan.container.is_root else "read-only"
        return (
            f"container: the image {plan.container.image}, {who}, processes and users of its own, {network};"
            f" {told_bounds(plan.bounds)}{told_mounts(plan.mounts)}; the system's kernel is shared"
        )

    def kernel_name(self, language: str | None) -> str:
        if language is not None and language.lower() not in _PYTHON:
            raise ValueError(f"local-docker only runs the Python of its image, not the language {language!r}")
        return _KERNEL

    def language_of(self, kernel_name: str) -> str:
        return "python"

    def _how_to_start(self, spec: ContextSpec) -> Mapping[str, object]:
        check_variables("env", spec.env)
        plan = self.plan
        assert plan.container is not None
        home = plan.container.home
        # HOME and PATH are the container's: what its image says goes before.
        own = locale() | {"USER": _NAME, "LOGNAME": _NAME}
        own |= {} if plan.container.is_root else own_packages(home)
        own |= {} if plan.network == "all" else THROUGH_PROXY
        return {
            "command": [_KERNEL, _LAUNCH, "-f", "{connection_file}", *IPYKERNEL_ARGUMENTS],
            "env": {**own, **self.config.env_vars, **spec.env},
            "cwd": spec.cwd or plan.working_dir,
            "interrupt_mode": "signal",
            "by_descriptors": True,
        }


def _distant() -> type[Variant]:
    # Imported on use: it brings an HTTP client along.
    from code_sandboxes.variants.distant_docker import DistantDocker

    return DistantDocker


def _refuse(setting: str, reason: str) -> SandboxConfigurationError:
    return SandboxConfigurationError(f"{SandboxVariant.LOCAL_DOCKER} cannot {setting}: {reason}")


def _capabilities(why_not: str, why_no_system_packages: str) -> Capabilities:
    not_yet = Capability(False, "it cannot do that yet")
    here = Capability(not why_not, why_not)
    gpu = Capability(bool(installed()), "" if installed() else "this machine has no NVIDIA GPU")
    return Capabilities(
        languages=_PYTHON,
        contexts=here,
        own_process=here,
        last_words=here,
        own_home=here,
        environment=here,
        magics=here,
        interrupt_blocked=here,
        subshells=here,
        system_packages=Capability(not why_no_system_packages, why_no_system_packages) if here else here,
        network_none=here,
        network_allowlist=here,
        memory_limit=here,
        cpu_limit=here,
        pids_limit=here,
        disk_limit=here,
        gpu=gpu if here else here,
        mounts=here,
        idle_timeout=here,
        pause=here,
        snapshots=here,
        fork=not_yet,
    )
