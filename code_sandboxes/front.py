"""What both sandboxes have in common: how they are made, and what they tell without waiting."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from code_sandboxes.checks import check_environment, check_number, check_str, check_str_mapping
from code_sandboxes.errors import SandboxNotFoundError
from code_sandboxes.info import (
    Capabilities,
    GPUType,
    ResourceConfig,
    SandboxEnvironment,
    SandboxInfo,
    SandboxStatus,
    SandboxVariant,
)
from code_sandboxes.operations import Core, find, find_all
from code_sandboxes.results import Logs
from code_sandboxes.steps import Operation, in_worker
from code_sandboxes.variants.base import Record, Variant

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = [
    "Front",
    "finding",
    "info_of",
    "known_variant",
    "listing",
    "listing_environments",
    "variant_class",
]

FrontT = TypeVar("FrontT", bound="Front")

_MIB = 1024**2


class Front:
    """A sandbox without the methods that wait."""

    _variant: ClassVar[SandboxVariant]
    _core: Core

    def __init__(
        self,
        *,
        config: SandboxConfig | None = None,
        timeout: float | None = None,
        name: str | None = None,
        environment: str | None = None,
        gpu: GPUType | str | None = None,
        cpu: float | None = None,
        memory: int | None = None,
        env: Mapping[str, str] | None = None,
        network_policy: str | None = None,
        allowed_hosts: list[str] | None = None,
        tags: Mapping[str, str] | None = None,
        snapshot_name: str | None = None,
        **options: object,
    ) -> None:
        from code_sandboxes.config import SandboxConfig

        if not hasattr(self, "_variant"):
            name = type(self).__name__
            raise TypeError(f"{name} is made by {name}.create(), or by the class of its variant")
        if config is not None and not isinstance(config, SandboxConfig):
            raise TypeError(f"config must be a SandboxConfig, not {type(config).__name__}")
        check_str("name", name)
        check_number("memory", memory, "MiB")
        check_number("cpu", cpu, "CPUs")
        changes = {
            "timeout": timeout,
            "environment": environment,
            "gpu": gpu,
            "cpu_limit": cpu,
            "memory_limit": None if memory is None else round(memory * _MIB),
            "env_vars": None if env is None else check_str_mapping("env", env),
            "network_policy": network_policy,
            "allowed_hosts": allowed_hosts,
        }
        settings = (config or SandboxConfig()).replace(changes)
        check_environment("env", settings.env_vars)
        variant = variant_class(self._variant).chosen(settings, options)
        origin = None
        if snapshot_name is not None:
            from code_sandboxes.snapshot_operations import origin_of

            origin = origin_of(variant, snapshot_name)
        self._core = Core(variant, settings, name, check_str_mapping("tags", tags), origin)

    @staticmethod
    def capabilities_of(variant: SandboxVariant | str) -> Capabilities:
        """What *variant* can do on this machine."""
        return variant_class(known_variant(variant)).capabilities()

    @classmethod
    def _around(cls: type[FrontT], core: Core) -> FrontT:
        """A front of this class for a sandbox that is there already."""
        front = object.__new__(cls)
        front._core = core
        return front

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status}>"

    @property
    def is_executing(self) -> bool:
        """A run is on, or waits for its turn."""
        return self._core.is_executing

    @property
    def background_output(self) -> Logs:
        """What threads and child processes printed while no run was on; the latest MiB of it."""
        return self._core.background_output

    # What it is.

    @property
    def id(self) -> str:
        """Tells its variant, and is unique."""
        return self._core.id

    sandbox_id = id

    @property
    def name(self) -> str | None:
        return self._core.name

    @property
    def variant(self) -> SandboxVariant:
        return self._variant

    @property
    def config(self) -> SandboxConfig:
        return self._core.config

    @property
    def status(self) -> SandboxStatus:
        return self._core.status

    @property
    def is_running(self) -> bool:
        return self._core.status is SandboxStatus.RUNNING

    @property
    def tags(self) -> Mapping[str, str]:
        return dict(self._core.tags)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do; when it runs, as its kernel says it."""
        return self._core.capabilities

    @property
    def info(self) -> SandboxInfo:
        """What it is now."""
        core = self._core
        info = info_of(self._variant, core.record(), core.config)
        metadata = {**info.metadata, **core.metadata, "dropped_messages": core.dropped_messages}
        return replace(info, created_at=core.created_at, status=core.status, metadata=metadata)


def info_of(variant: SandboxVariant, record: Record, config: SandboxConfig) -> SandboxInfo:
    """*record* of a running sandbox as users see it."""
    return SandboxInfo(
        id=record.id,
        variant=variant,
        status=SandboxStatus.PAUSED if record.metadata.get("paused") else SandboxStatus.RUNNING,
        created_at=record.created_at or None,
        end_at=None if record.time_left is None else time.time() + record.time_left,
        name=record.name,
        tags=record.tags,
        config=config,
        resources=ResourceConfig(config.cpu_limit, config.memory_limit, config.gpu),
        isolation=record.isolation,
        metadata=record.metadata,
    )


def finding(sandbox_id: str, options: Mapping[str, object]) -> Operation[Core]:
    """Finds the sandbox of that id, which tells its variant; one that tells none is Datalayer's.

    Raises:
        TypeError: it is not a str.
        SandboxNotFoundError: it begins with something else than a variant.
    """
    if not isinstance(sandbox_id, str):
        raise TypeError(f"id must be a str, not {type(sandbox_id).__name__}")
    prefix, colon, _ = str(sandbox_id).partition(":")
    if not colon:
        return find(variant_class(SandboxVariant.DATALAYER_RUNTIME), sandbox_id, options)
    if prefix not in list(SandboxVariant):
        raise SandboxNotFoundError(f"no sandbox {sandbox_id!r}: ids begin with the name of a variant")
    return find(variant_class(SandboxVariant(prefix)), sandbox_id, options)


def listing(
    variant: SandboxVariant | str | None, tags: Mapping[str, str] | None
) -> Operation[list[SandboxInfo]]:
    """Finds every sandbox of this user that has all *tags*.

    Raises:
        ValueError: there is no such variant.
    """
    from code_sandboxes.config import SandboxConfig

    variants = list(SandboxVariant) if variant is None else [known_variant(variant)]
    found = yield from find_all([variant_class(each) for each in variants], tags)
    return [info_of(each.name, record, SandboxConfig(**record.settings)) for each, record in found]


def listing_environments(
    variant: SandboxVariant | str | None, options: Mapping[str, object]
) -> Operation[list[SandboxEnvironment]]:
    """Finds what sandboxes of *variant* can be made of.

    Raises:
        ValueError: there is no such variant.
        SandboxConfigurationError: it has no environments.
    """
    found = variant_class(known_variant(variant))
    return in_worker(lambda: found.environments(options), apart=True)


def known_variant(variant: SandboxVariant | str | None) -> SandboxVariant:
    """The variant of that name, or the default one.

    Raises:
        ValueError: there is none of that name.
    """
    if variant is None:
        variant = os.environ.get("CODE_SANDBOXES_VARIANT") or _default_variant()
    try:
        return SandboxVariant(variant)
    except ValueError:
        known = ", ".join(sorted(SandboxVariant))
        raise ValueError(f"no sandbox variant {str(variant)!r} (known: {known})") from None


def _default_variant() -> SandboxVariant:
    has_account = bool(os.environ.get("DATALAYER_API_KEY"))
    return SandboxVariant.DATALAYER_RUNTIME if has_account else SandboxVariant.LOCAL_JUPYTER


def variant_class(variant: SandboxVariant) -> type[Variant]:
    # Imported on use: each brings the libraries of its own world along.
    if variant is SandboxVariant.LOCAL_EVAL:
        from code_sandboxes.variants.eval import LocalEval

        return LocalEval
    if variant is SandboxVariant.LOCAL_DOCKER:
        from code_sandboxes.variants.docker import LocalDocker

        return LocalDocker
    if variant is SandboxVariant.JUPYTER_GATEWAY:
        from code_sandboxes.variants.gateway import JupyterGateway

        return JupyterGateway
    if variant is SandboxVariant.DATALAYER_RUNTIME:
        from code_sandboxes.variants.datalayer import DatalayerRuntime

        return DatalayerRuntime
    from code_sandboxes.variants.jupyter import LocalJupyter

    return LocalJupyter
