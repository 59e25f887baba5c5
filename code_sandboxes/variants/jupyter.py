"""local-jupyter: kernels on this machine, each a process of its own, spoken to over ``ipc://``.

The processes are those of a keeper (:mod:`code_sandboxes.keeper.server`), so that a sandbox can be found by
other programs and outlive this one. Everything it has on this machine is one folder that only this user can
enter. How it is isolated is decided in :mod:`.plans`, how a kernel is started in :mod:`.launches`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from code_sandboxes.checks import check_str
from code_sandboxes.errors import SandboxConnectionError, SandboxIsolationWarning
from code_sandboxes.frames import frames_of_this_package
from code_sandboxes.info import NO_SUBSHELLS, NO_SYSTEM_PACKAGES, Capabilities, Capability, SandboxVariant
from code_sandboxes.isolation.plan import Method, Plan
from code_sandboxes.variants.base import Audience, ContextSpec, Record
from code_sandboxes.variants.kept import Kept, ipykernel_version
from code_sandboxes.variants.kernelspecs import (
    InstalledKernel,
    installed_kernels,
    kernel_named,
    kernels_speaking,
    known_languages,
)
from code_sandboxes.variants.launches import launch_of
from code_sandboxes.variants.plans import describe, enforceable, plan_of, strongest, why_not

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig
    from code_sandboxes.snapshots import Store

__all__ = ["LocalJupyter"]

_NO_PAUSE = "its processes are not together in a place of their own; with isolation='bubblewrap' they are"

_NO_GPU_CHOICE = "isolation hides the GPUs of the machine; with isolation='none' code sees all of them"


class LocalJupyter(Kept):
    """Kernels as processes of this machine."""

    name = SandboxVariant.LOCAL_JUPYTER
    options: ClassVar[frozenset[str]] = frozenset(
        {"disk", "isolation", "kernel_name", "max_output", "mounts", "pids", "preload"}
    )

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        super().__init__(config, options)
        self._kernel_name = kernel_named(options.get("kernel_name"))

    def _check(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        if not hasattr(os, "killpg"):
            raise self.refuse("run on this system", "it needs process groups; use Linux or macOS")
        check_str("kernel_name", options.get("kernel_name"))
        if config.gpu is not None:
            raise self.refuse(f"choose a GPU (gpu={config.gpu!r})", _NO_GPU_CHOICE)
        if options.get("preload") is not None:
            raise self.refuse(f"preload {options['preload']!r}", "its kernels are started one by one yet")
        if config.environment is not None:
            raise self.refuse(
                f"provide the environment {config.environment!r}",
                "it runs what is installed on this machine; choose with kernel_name=",
            )

    @classmethod
    def capabilities(cls) -> Capabilities:
        return _capabilities(strongest())

    @property
    def own_capabilities(self) -> Capabilities:
        return _capabilities(self.plan.method)

    def _startable(self) -> Mapping[str, InstalledKernel]:
        """The kernels that can be started, by name."""
        return installed_kernels()

    def _decide(self) -> Plan:
        return plan_of(self.config, self._options, self._startable().values(), self.refuse)

    def _describe(self) -> str:
        return describe(self.plan)

    @property
    def snapshots(self) -> Store:
        from code_sandboxes.snapshots import FolderStore

        return FolderStore(self.name)

    @property
    def own_folders(self) -> tuple[str, ...]:
        return ("/",) if self.plan.method == "bubblewrap" else ("~",)

    def warn(self) -> None:
        if self.plan.method == "none" and self._options.get("isolation") != "none":
            _warn_once(why_not("bubblewrap"))

    def kernel_name(self, language: str | None) -> str:
        specs = installed_kernels()
        if language is None:
            return self._kernel_name
        if language not in specs and not kernels_speaking(language, specs):
            specs = installed_kernels(refresh=True)
        if language in specs:
            return language
        speaking = kernels_speaking(language, specs)
        if not speaking:
            known = ", ".join(known_languages())
            raise ValueError(f"no kernel for the language {language!r} (installed: {known})")
        return speaking[0]

    def language_of(self, kernel_name: str) -> str:
        return installed_kernels()[kernel_name].language

    def prepare(self, record: Record, audience: Audience) -> None:
        installed_kernels()  # here, where it holds up nobody's event loop
        super().prepare(record, audience)

    def _how_to_start(self, spec: ContextSpec) -> Mapping[str, object]:
        """
        Raises:
            SandboxError: it cannot be started from here.
        """
        kernel = self._startable().get(spec.kernel_name)
        if kernel is None:
            raise SandboxConnectionError(f"there is no kernelspec {spec.kernel_name!r} for this program")
        return launch_of(kernel, spec, self.plan, self._home, self.config.env_vars)


def _capabilities(isolation: Method) -> Capabilities:
    yes, not_yet = Capability(True), Capability(False, "it cannot do that yet")
    enforced = {name: Capability(not why, why) for name, why in enforceable(isolation).items()}
    return Capabilities(
        languages=tuple(known_languages()),
        contexts=yes,
        own_process=yes,
        last_words=yes,
        own_home=yes,
        environment=yes,
        magics=yes,
        interrupt_blocked=yes,
        subshells=yes if ipykernel_version() >= 7 else NO_SUBSHELLS,
        system_packages=NO_SYSTEM_PACKAGES,
        network_none=enforced["network_none"],
        network_allowlist=enforced["network_allowlist"],
        memory_limit=enforced["memory"],
        cpu_limit=enforced["cpu"],
        pids_limit=enforced["pids"],
        disk_limit=enforced["disk"],
        gpu=Capability(False, _NO_GPU_CHOICE),
        mounts=enforced["mounts"],
        idle_timeout=yes,
        pause=yes if isolation == "bubblewrap" else Capability(False, _NO_PAUSE),
        snapshots=yes,
        fork=not_yet,
    )


@cache
def _warn_once(why: str) -> None:
    warnings.warn(
        "local-jupyter has no isolation on this machine but a process of its own: code in it can read and"
        " change what this user can, and reach the network (isolation='none' says that this is intended);"
        f" bubblewrap would isolate it: {why}",
        SandboxIsolationWarning,
        stacklevel=frames_of_this_package() + 1,
    )
