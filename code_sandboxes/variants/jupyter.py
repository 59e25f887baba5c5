"""local-jupyter: kernels on this machine, each a process of its own, spoken to over ``ipc://``.

The processes are those of a keeper (:mod:`code_sandboxes.keeper.server`), so that a sandbox can be found by
other programs and outlive this one. Everything it has on this machine is one folder that only this user can
enter. How it is isolated is decided in :mod:`.plans`, how a kernel is started in :mod:`.launches`.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from code_sandboxes.checks import check_str
from code_sandboxes.errors import (
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxIsolationWarning,
    SandboxNotFoundError,
    SandboxNotStartedError,
)
from code_sandboxes.info import NO_SUBSHELLS, NO_SYSTEM_PACKAGES, Capabilities, Capability, SandboxVariant
from code_sandboxes.isolation.plan import Method, Plan
from code_sandboxes.keeper.client import (
    Answer,
    GoneError,
    KeeperClient,
    UnknownSandboxError,
    the_keeper,
)
from code_sandboxes.network_info import NetworkAttempt
from code_sandboxes.transports.loop import the_loop
from code_sandboxes.variants.base import Audience, ContextSpec, Record, Variant
from code_sandboxes.variants.folders import check_length, runtime_root
from code_sandboxes.variants.kept_kernel import KeptKernel, Kernels
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

__all__ = ["LocalJupyter"]

_NO_GPU_CHOICE = "isolation hides the GPUs of the machine; with isolation='none' code sees all of them"


class LocalJupyter(Variant):
    """Kernels as processes of this machine."""

    name = SandboxVariant.LOCAL_JUPYTER
    options: ClassVar[frozenset[str]] = frozenset(
        {"disk", "isolation", "kernel_name", "max_output", "mounts", "pids", "preload"}
    )
    has_registry = True

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        super().__init__(config, options)
        if not hasattr(os, "killpg"):
            raise self.refuse("run on this system", "it needs process groups; use Linux or macOS")
        check_str("kernel_name", options.get("kernel_name"))
        self._refuse_what_it_has_not(config, options)
        self._max_output = _bytes("max_output", options.get("max_output"), default=256 * 1024**2)
        self._keeper = _keeper()
        # It takes as long to start as the kernelspecs take to be found: it does so meanwhile.
        the_loop().run_blocking(self._keeper.start, lambda *_: None)
        self._kernel_name = kernel_named(options.get("kernel_name"))
        self._options = options
        self._plan: Plan | None = None
        self._sandbox_id = ""
        self._home = ""
        self._record: dict[str, Any] = {}
        self._ends_at: float | None = None
        self._why_it_ends = ""
        self._kernels = Kernels()
        self._audience: Audience | None = None
        self._is_over = False
        self._early = _Early()

    def _refuse_what_it_has_not(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
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

    @property
    def plan(self) -> Plan:
        """How it is isolated; the first time it takes a while to find out.

        Raises:
            SandboxConfigurationError: something that was asked for cannot be enforced.
        """
        if self._plan is None:
            self._plan = plan_of(self.config, self._options, self._startable().values(), self.refuse)
        return self._plan

    def warn(self) -> None:
        if self.plan.method == "none" and self._options.get("isolation") != "none":
            _warn_once(why_not("bubblewrap"))

    @property
    def isolation(self) -> str:
        # What the program that made it has said: another one's machine may look otherwise from where it is.
        return self._record["about"]["isolation"] if self._record else describe(self.plan)

    @property
    def max_output(self) -> int:
        return self._max_output

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

    # Its registry is the keeper's.

    def prepare(self, record: Record, audience: Audience) -> None:
        installed_kernels()  # here, where it holds up nobody's event loop
        self._sandbox_id = record.id
        self._record = {
            "about": {
                "name": record.name,
                "settings": dict(record.settings),
                "created_at": record.created_at,
                "isolation": record.isolation,
                "kernel_name": self._kernel_name,
                "max_output": self._max_output,
            },
            "tags": dict(record.tags),
            "plan": self.plan.as_json(),
            "idle_timeout": self.config.idle_timeout or None,
        }
        if record.time_left is not None:
            self._ends_at = time.monotonic() + record.time_left
            self._why_it_ends = f"it reached its max_lifetime of {record.time_left:g} s"
        self._audience = audience
        self._keeper.listen(self._sandbox_id, self)
        self._open()

    def _open(self) -> None:
        if self._ends_at is not None:
            left = max(0.0, self._ends_at - time.monotonic())
            self._record |= {"lifetime": left, "reason": self._why_it_ends}
        self._check_not_over()
        answer = self._keeper.ask("open", sandbox=self._sandbox_id, record=self._record)
        self._home = answer["home"]
        if self._is_over:  # just now, and the keeper was told before it knew of it
            self.ends("it was terminated", orderly=False)
            self._check_not_over()

    def _check_not_over(self) -> None:
        if self._is_over:
            raise SandboxNotStartedError(f"{self._sandbox_id} is terminated")

    def _ask(self, verb: str, **fields: object) -> Answer:
        """Ask the keeper about this sandbox. If it is not the one that made it, it has to make it again."""
        try:
            return self._keeper.ask(verb, sandbox=self._sandbox_id, **fields)
        except UnknownSandboxError:
            self._open()
        try:
            return self._keeper.ask(verb, sandbox=self._sandbox_id, **fields)
        except UnknownSandboxError as error:
            raise SandboxConnectionError(f"{self._sandbox_id} has ended: {error}") from None

    @classmethod
    def all(cls) -> list[Record]:
        answer = _keeper().ask_if_running("list")
        return [] if answer is None else [_record_of(each) for each in answer["sandboxes"]]

    @classmethod
    def attach(cls, sandbox_id: str, options: Mapping[str, object]) -> tuple[Variant, Record]:
        if options:
            raise TypeError(f"from_id() of {cls.name} takes no options (given: {', '.join(sorted(options))})")
        keeper, early = _keeper(), _Early()
        keeper.listen(sandbox_id, early)
        try:
            found = keeper.ask_if_running("open", sandbox=sandbox_id)
        except UnknownSandboxError:
            found = None
        if found is None:
            keeper.forget(sandbox_id, early)
            why = "it has ended, or never was"
            if keeper.has_rivals:
                why += ", or it is kept for another version of code_sandboxes, which runs on this machine too"
            raise SandboxNotFoundError(f"no sandbox {sandbox_id!r} on this machine: {why}")
        try:
            return cls._attached(found, early)
        except BaseException:
            keeper.forget(sandbox_id, early)
            keeper.ask_if_running("detach", sandbox=sandbox_id, keep=False)
            raise

    @classmethod
    def _attached(cls, found: Answer, early: _Early) -> tuple[Variant, Record]:
        from code_sandboxes.config import SandboxConfig

        record, about = _record_of(found), found["about"]
        config = SandboxConfig(**record.settings)
        # What was checked when it was made is not checked again: a directory may be gone by now.
        variant = cls(SandboxConfig(), {})
        variant.config = config
        variant._kernel_name, variant._max_output = about["kernel_name"], about["max_output"]
        variant._sandbox_id, variant._home, variant._early = record.id, found["home"], early
        variant._plan = Plan.from_json(found["plan"])
        variant._record = {
            "about": about,
            "tags": found["tags"],
            "plan": found["plan"],
            "idle_timeout": variant.config.idle_timeout,
        }
        if record.time_left is not None:
            variant._ends_at = time.monotonic() + record.time_left
            variant._why_it_ends = "its lifetime is over"
        return variant, record

    def listen(self, audience: Audience) -> None:
        self._audience = audience
        the_loop().call_soon(self._take_over)

    def _take_over(self) -> None:
        """From whoever listened before this was here; in the I/O thread, so that no event comes between."""
        self._early.tell(self)
        self._keeper.listen(self._sandbox_id, self, instead_of=self._early)

    def told(self, event: Mapping[str, Any]) -> None:
        """What the keeper tells; in the I/O thread."""
        audience, kind = self._audience, event["event"]
        assert audience is not None
        if kind == "kernel_ended":
            self._kernels.ended(event)
        elif kind == "turn_wanted":
            self._kernels.turn_wanted(event["kernel"])
        elif kind == "turn_lost":
            self._kernels.turn_lost(event["kernel"])
        elif kind == "ending":
            self._is_over = True
            audience.over(event["why"])
        elif kind == "tags":
            audience.tagged(event["tags"])
        elif kind == "lifetime":
            audience.rescheduled(event["time_left"])
        elif kind == "context":
            audience.context_added(ContextSpec(**event["context"]))
        elif kind == "context_deleted":
            audience.context_deleted(event["context"])

    def lost(self) -> None:
        """The keeper is gone; in the I/O thread."""
        self._kernels.lost()
        if self._ends_at is not None:  # nobody else would end it
            the_loop().call_at(self._ends_at, self._end_if_nobody_does)

    def _end_if_nobody_does(self) -> None:
        assert self._audience is not None
        if not self._is_over and self._ends_at is not None and self._ends_at <= time.monotonic():
            self._audience.over(self._why_it_ends)

    def detach(self, *, keep: bool) -> None:
        try:
            self._keeper.ask_if_running("detach", sandbox=self._sandbox_id, keep=keep)
        except UnknownSandboxError:
            if keep:
                raise SandboxConnectionError(
                    f"{self._sandbox_id} cannot go on: its keeper is gone, and its kernels with it"
                ) from None
        self._is_over = True
        self._keeper.forget(self._sandbox_id, self)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._record["tags"] = dict(tags)
        self._ask("tags", tags=dict(tags))

    def expire_in(self, seconds: float, why: str) -> None:
        self._ends_at, self._why_it_ends = time.monotonic() + seconds, why
        self._ask("lifetime", seconds=seconds, reason=why)

    def network_log(self) -> list[NetworkAttempt]:
        if self.plan.network == "all":
            raise self.refuse(
                "tell what the sandbox tried to reach",
                "it uses the machine's network; with network_policy='none' or 'allowlist' it is watched",
            )
        return [NetworkAttempt(**attempt) for attempt in self._ask("network_log")["attempts"]]

    def delete_context(self, context_id: str) -> None:
        self._ask("delete_context", context=context_id)

    def ends(self, why: str, *, orderly: bool) -> None:
        self._is_over = True
        self._keeper.tell("end", sandbox=self._sandbox_id, why=why, orderly=orderly)

    def remove(self) -> None:
        if not self._sandbox_id:
            return
        try:
            # Whoever else is attached was told by ends(); this waits until everything is gone.
            self._keeper.ask_if_running(
                "end", sandbox=self._sandbox_id, why="it was terminated", orderly=False
            )
        finally:
            self._keeper.forget(self._sandbox_id, self)

    # Kernels.

    def launcher(self, spec: ContextSpec) -> Callable[[], KeptKernel]:
        return lambda: self._launch(spec)

    def _launch(self, spec: ContextSpec) -> KeptKernel:
        keepers_lost = self._kernels.keepers_lost
        try:
            launch, why_not = self._how_to_start(spec), None
        except SandboxError as error:  # which is no matter where it runs already
            launch, why_not = None, error
        try:
            answer = self._ask("kernel", context=asdict(spec), launch=launch)
        except GoneError as error:
            raise (why_not or SandboxConnectionError(f"the context {spec.name!r} is gone: {error}")) from None
        return KeptKernel(self._keeper, self._sandbox_id, self._kernels, keepers_lost, answer)

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
        environment=yes,
        magics=yes,
        interrupt_blocked=yes,
        subshells=yes if _ipykernel() >= 7 else NO_SUBSHELLS,
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
        snapshots=not_yet,
        fork=not_yet,
    )


@cache
def _ipykernel() -> int:
    """The major version of the one that is installed here; a kernelspec may mean another one."""
    return int(version("ipykernel").partition(".")[0])


class _Early:
    """Hears what the keeper tells of a sandbox before there is one here."""

    def __init__(self) -> None:
        self._events: list[Mapping[str, Any] | None] = []

    def told(self, event: Mapping[str, Any]) -> None:
        self._events.append(event)

    def lost(self) -> None:
        self._events.append(None)

    def tell(self, listener: LocalJupyter) -> None:
        for event in self._events:
            if event is None:
                listener.lost()
            else:
                listener.told(event)
        self._events.clear()


def _keeper() -> KeeperClient:
    root = runtime_root()
    check_length(root)
    return the_keeper(root)


def _record_of(description: Mapping[str, Any]) -> Record:
    about = description["about"]
    return Record(
        id=description["sandbox"],
        name=about["name"],
        tags=description["tags"],
        settings=about["settings"],
        created_at=about["created_at"],
        time_left=description["time_left"],
        isolation=about["isolation"],
        contexts=[ContextSpec(**context) for context in description["contexts"]],
        metadata={name: description[name] for name in ("programs", "detached", "kernels")},
    )


def _bytes(name: str, value: object, *, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise SandboxConfigurationError(f"{name} must be a positive number of bytes, not {value!r}")
    return value


@cache
def _warn_once(why: str) -> None:
    warnings.warn(
        "local-jupyter has no isolation on this machine but a process of its own: code in it can read and"
        " change what this user can, and reach the network (isolation='none' says that this is intended);"
        f" bubblewrap would isolate it: {why}",
        SandboxIsolationWarning,
        stacklevel=_frames_of_this_package() + 1,
    )


def _frames_of_this_package() -> int:
    """How many frames, from the caller up, lie between it and the program that uses this package."""
    frame = sys._getframe(1)
    count = 0
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("code_sandboxes."):
        count, frame = count + 1, frame.f_back
    return count
