"""What a sandbox is asked to be: its settings, and the check that they make sense.

Whether a variant can honour a setting is the variant's to say (``variants/base.py``). Imported on use:
traitlets takes longer to import than all the rest of what ``import code_sandboxes`` needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traitlets import Dict, Enum as EnumTrait, Float, Integer, List, TraitError, Unicode
from traitlets.config import Configurable

from code_sandboxes.checks import check_seconds
from code_sandboxes.errors import SandboxConfigurationError

__all__ = ["NETWORK_POLICIES", "SandboxConfig"]

NETWORK_POLICIES = ("inherit", "all", "none", "allowlist")


class SandboxConfig(Configurable):
    """Settings of a sandbox; a traitlets configurable, so Jupyter config files can set its traits too."""

    timeout = Float(30.0, help="Seconds a run may take; 0 for no limit.").tag(config=True)
    interrupt_grace = Float(
        5.0, help="Seconds an interrupted run may take to stop before its kernel is killed."
    ).tag(config=True)
    start_timeout = Float(60.0, help="Seconds a kernel may take to start.").tag(config=True)
    max_lifetime = Float(86400.0, help="Seconds after which the sandbox ends.").tag(config=True)
    idle_timeout = Float(
        None, allow_none=True, help="Seconds without a run after which the sandbox ends."
    ).tag(config=True)
    environment = Unicode(None, allow_none=True, help="Name of a prepared environment.").tag(config=True)
    env_vars = Dict(value_trait=Unicode(), key_trait=Unicode(), help="Environment variables.").tag(
        config=True
    )
    working_dir = Unicode(None, allow_none=True, help="Where code starts.").tag(config=True)
    memory_limit = Integer(None, allow_none=True, help="Bytes of memory.").tag(config=True)
    cpu_limit = Float(None, allow_none=True, help="Number of CPUs.").tag(config=True)
    gpu = Unicode(None, allow_none=True, help="Type of GPU.").tag(config=True)
    network_policy = EnumTrait(NETWORK_POLICIES, "inherit", help="What may be reached.").tag(config=True)
    allowed_hosts = List(Unicode(), help="What may be reached under the policy 'allowlist'.").tag(config=True)

    def __init__(self, **settings: Any) -> None:
        known = set(self.class_trait_names()) | {"parent", "config", "log"}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise TypeError(
                f"SandboxConfig has no setting {unknown[0]!r} (known: {', '.join(self.setting_names())})"
            )
        try:
            super().__init__(**settings)
        except TraitError as error:
            raise SandboxConfigurationError(str(error)) from None
        for name in ("timeout", "interrupt_grace", "start_timeout", "max_lifetime"):
            check_seconds(name, getattr(self, name))
        if self.idle_timeout is not None:
            check_seconds("idle_timeout", self.idle_timeout)

    @classmethod
    def setting_names(cls) -> list[str]:
        return sorted(cls.class_trait_names(config=True))

    def settings(self) -> dict[str, Any]:
        """All settings, by name."""
        return {name: getattr(self, name) for name in self.setting_names()}

    def replace(self, changes: Mapping[str, Any]) -> SandboxConfig:
        """A copy with *changes* applied; those that are None change nothing."""
        return SandboxConfig(
            **self.settings() | {name: value for name, value in changes.items() if value is not None}
        )

    def __repr__(self) -> str:
        # Values of environment variables are often secrets.
        shown = {name: value for name, value in self.settings().items() if name != "env_vars"}
        shown["env_vars"] = sorted(self.env_vars)
        return f"SandboxConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
