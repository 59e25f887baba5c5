"""What both sandboxes have in common: how they are made, and what they tell without waiting."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from code_sandboxes.checks import check_number, check_str, check_str_mapping
from code_sandboxes.info import Capabilities, ResourceConfig, SandboxInfo, SandboxStatus, SandboxVariant
from code_sandboxes.operations import Core
from code_sandboxes.results import Logs
from code_sandboxes.variants.base import Variant

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["Front", "known_variant"]

_MIB = 1024**2


class Front:
    """A sandbox without the methods that wait."""

    _variant: ClassVar[SandboxVariant]

    def __init__(
        self,
        *,
        config: SandboxConfig | None = None,
        timeout: float | None = None,
        name: str | None = None,
        environment: str | None = None,
        gpu: str | None = None,
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
        variant = _variant_class(self._variant)(settings, options)
        if snapshot_name is not None:
            raise variant.refuse(f"restore the snapshot {snapshot_name!r}", "it cannot make any yet")
        self._core = Core(variant, settings, name, check_str_mapping("tags", tags))

    @staticmethod
    def capabilities_of(variant: SandboxVariant | str) -> Capabilities:
        """What *variant* can do on this machine."""
        return _variant_class(known_variant(variant)).capabilities()

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

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Replace its tags."""
        self._core.tags = check_str_mapping("tags", tags)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return self._core.variant.capabilities()

    @property
    def info(self) -> SandboxInfo:
        """What it is now."""
        core = self._core
        return SandboxInfo(
            id=core.id,
            variant=self._variant,
            status=core.status,
            created_at=core.created_at,
            end_at=core.end_at,
            name=core.name,
            tags=dict(core.tags),
            config=core.config,
            resources=ResourceConfig(core.config.cpu_limit, core.config.memory_limit, core.config.gpu),
            isolation=core.variant.isolation,
        )


def known_variant(variant: SandboxVariant | str | None) -> SandboxVariant:
    """The variant of that name, or the default one.

    Raises:
        ValueError: there is none of that name.
    """
    if variant is None:
        variant = os.environ.get("CODE_SANDBOXES_VARIANT") or SandboxVariant.LOCAL_JUPYTER
    try:
        return SandboxVariant(variant)
    except ValueError:
        known = ", ".join(sorted(SandboxVariant))
        raise ValueError(f"no sandbox variant {str(variant)!r} (known: {known})") from None


def _variant_class(variant: SandboxVariant) -> type[Variant]:
    # Imported on use: each brings the libraries of its own world along.
    if variant is SandboxVariant.LOCAL_EVAL:
        from code_sandboxes.variants.eval import LocalEval

        return LocalEval
    from code_sandboxes.variants.jupyter import LocalJupyter

    return LocalJupyter
