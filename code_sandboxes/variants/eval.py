"""local-eval: code runs in this process, in threads of its own, with nothing around it.

The quickest, for code that somebody has read: tests, examples, a program's own scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from code_sandboxes.info import NO_SYSTEM_PACKAGES, Capabilities, Capability, SandboxVariant
from code_sandboxes.inprocess.kernel import InProcessKernel
from code_sandboxes.variants.base import MAX_OUTPUT, Audience, ContextSpec, Record, Variant
from code_sandboxes.variants.lifetimes import Lifetime

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["LocalEval"]

_IN_THIS_PROCESS = "the code runs in this process, with all that this process may do; use local-jupyter"
_PROCESS_WIDE = "that would hold for this whole process, in which the code runs; use local-jupyter"
_NOT_YET = "it cannot do that yet"

_PYTHON = ("python", "python3")


class LocalEval(Variant):
    """Code in threads of this process."""

    name = SandboxVariant.LOCAL_EVAL
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        super().__init__(config, options)
        self._lifetime: Lifetime | None = None
        for trait, what in (
            ("memory_limit", "limit the memory"),
            ("cpu_limit", "limit the CPUs"),
            ("gpu", "choose a GPU"),
            ("environment", "provide an environment"),
        ):
            if getattr(config, trait) is not None:
                raise self.refuse(f"{what} ({trait}={getattr(config, trait)!r})", _IN_THIS_PROCESS)
        if config.network_policy in ("none", "allowlist"):
            raise self.refuse(f"enforce network_policy={config.network_policy!r}", _IN_THIS_PROCESS)
        self._refuse_what_is_process_wide(config.working_dir, config.env_vars)
        if config.idle_timeout is not None:
            raise self.refuse("enforce idle_timeout", "nothing watches idle kernels yet; use max_lifetime")

    def _refuse_what_is_process_wide(self, cwd: str | None, env: Mapping[str, str]) -> None:
        if cwd is not None:
            raise self.refuse(f"start in the working directory {cwd!r}", _PROCESS_WIDE)
        if env:
            raise self.refuse(f"set environment variables ({', '.join(sorted(env))})", _PROCESS_WIDE)

    @classmethod
    def capabilities(cls) -> Capabilities:
        yes, no = Capability(True), Capability(False, _IN_THIS_PROCESS)
        process_wide, not_yet = Capability(False, _PROCESS_WIDE), Capability(False, _NOT_YET)
        return Capabilities(
            languages=_PYTHON,
            contexts=yes,
            own_process=no,
            last_words=no,
            own_home=no,
            environment=process_wide,
            magics=Capability(False, "its code is plain Python, with top-level await; use local-jupyter"),
            interrupt_blocked=Capability(
                False, "a thread that does not react cannot be ended, and is abandoned; use local-jupyter"
            ),
            subshells=yes,
            system_packages=NO_SYSTEM_PACKAGES,
            network_none=no,
            network_allowlist=no,
            memory_limit=no,
            cpu_limit=no,
            pids_limit=no,
            disk_limit=no,
            gpu=no,
            mounts=no,
            idle_timeout=not_yet,
            pause=Capability(False, "its threads cannot be stopped; use local-jupyter"),
            snapshots=not_yet,
            fork=no,
        )

    @property
    def isolation(self) -> str:
        return "none: the code runs in this process, and can do and break all that this process can"

    @property
    def max_output(self) -> int:
        return MAX_OUTPUT

    def kernel_name(self, language: str | None) -> str:
        if language is not None and language.lower() not in _PYTHON:
            raise ValueError(f"local-eval only supports Python, not the language {language!r}")
        return "python3"

    def language_of(self, kernel_name: str) -> str:
        return "python"

    def prepare(self, record: Record, audience: Audience) -> None:
        self._lifetime = Lifetime(audience)
        if record.time_left is not None:
            self.expire_in(record.time_left, f"it reached its max_lifetime of {record.time_left:g} s")

    def launcher(self, spec: ContextSpec) -> Callable[[], InProcessKernel]:
        self._refuse_what_is_process_wide(spec.cwd, spec.env)
        return InProcessKernel

    def expire_in(self, seconds: float, why: str) -> None:
        assert self._lifetime is not None
        self._lifetime.end_in(seconds, why)

    def ends(self, why: str, *, orderly: bool) -> None:
        if self._lifetime is not None:
            self._lifetime.cancel()

    def remove(self) -> None:
        return
