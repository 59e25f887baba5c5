"""Sandboxes that the keeper keeps: they can be found by other programs, and outlive the one that made them.

The keeper (:mod:`code_sandboxes.keeper.server`) is their registry: it owns their kernels, knows which
programs use them, and ends them when their time has come. What isolates them is the variants' business.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxError,
    SandboxNotFoundError,
    SandboxNotStartedError,
)
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.keeper.client import (
    Answer,
    GoneError,
    KeeperClient,
    UnknownSandboxError,
    the_keeper,
)
from code_sandboxes.network_info import NetworkAttempt
from code_sandboxes.transports.loop import the_loop
from code_sandboxes.variants.base import Audience, ContextSpec, Record, Variant, max_output_of
from code_sandboxes.variants.folders import check_length, runtime_root
from code_sandboxes.variants.kept_kernel import KeptKernel, Kernels

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["Kept", "ipykernel_version"]

# Of what the keeper says of a sandbox.
_METADATA = ("programs", "detached", "paused", "kernels", "container", "jupyter_server")


class Kept(Variant):
    """A variant whose kernels the keeper owns."""

    has_registry = True

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        super().__init__(config, options)
        self._check(config, options)
        self._max_output = max_output_of(options)
        self._options = options
        self._keeper = _keeper()
        # It takes a while to start: it does so meanwhile.
        the_loop().run_blocking(self._keeper.start, lambda *_: None)
        self._plan: Plan | None = None
        self._kernel_name = ""
        self._sandbox_id = ""
        self._about_it: Answer = {}  # as the keeper describes it
        self._record: dict[str, Any] = {}
        self._ends_at: float | None = None
        self._why_it_ends = ""
        self._kernels = Kernels()
        self._audience: Audience | None = None
        self._is_over = False
        self._early = _Early()

    @abstractmethod
    def _check(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        """Refuse what cannot be honoured whatever this machine has.

        Raises:
            SandboxConfigurationError: there is such a setting.
        """

    @abstractmethod
    def _decide(self) -> Plan:
        """How it is isolated, by its settings; may block.

        Raises:
            SandboxConfigurationError: something that was asked for cannot be enforced.
        """

    @abstractmethod
    def _describe(self) -> str:
        """What separates it from the machine, in a few words."""

    @abstractmethod
    def _how_to_start(self, spec: ContextSpec) -> Mapping[str, object]:
        """What the keeper has to know to start the kernel of a context.

        Raises:
            SandboxError: it cannot be started from here.
        """

    @property
    def plan(self) -> Plan:
        """How it is isolated; the first time it takes a while to find out.

        Raises:
            SandboxConfigurationError: something that was asked for cannot be enforced.
        """
        if self._plan is None:
            self._plan = self._decide()
        return self._plan

    @property
    def isolation(self) -> str:
        # What the program that made it has said: another one's machine may look otherwise from where it is.
        return str(self._record["about"]["isolation"]) if self._record else self._describe()

    @property
    def metadata(self) -> Mapping[str, object]:
        server = self._about_it.get("jupyter_server")
        return {} if server is None else {"jupyter_server": server}

    @property
    def _home(self) -> str:
        """Where code is at home, if it has nothing of its own."""
        return str(self._about_it.get("home", ""))

    @property
    def most_in_a_snapshot(self) -> tuple[int, int]:
        files, variables = super().most_in_a_snapshot
        disk, memory = self.plan.bounds.disk, self.plan.bounds.memory
        # An archive, and a pickle, have more to say than there is.
        return min(files, 2 * disk if disk else files), min(variables, 2 * memory if memory else variables)

    def _described(self) -> Answer:
        """What the keeper says of it now; may block."""
        return self._ask("open")

    @property
    def max_output(self) -> int:
        return self._max_output

    # Its registry is the keeper's.

    def prepare(self, record: Record, audience: Audience) -> None:
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
        self._about_it = answer
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
        records = [] if answer is None else [_record_of(each) for each in answer["sandboxes"]]
        return [record for record in records if record.id.startswith(f"{cls.name}:")]

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
        variant._sandbox_id, variant._about_it, variant._early = record.id, found, early
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
        elif kind == "paused":
            audience.paused(on=event["on"])
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

    def pause(self, *, on: bool) -> None:
        if not self.own_capabilities.pause:
            super().pause(on=on)
        self._ask("pause", on=on)

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


class _Early:
    """Hears what the keeper tells of a sandbox before there is one here."""

    def __init__(self) -> None:
        self._events: list[Mapping[str, Any] | None] = []

    def told(self, event: Mapping[str, Any]) -> None:
        self._events.append(event)

    def lost(self) -> None:
        self._events.append(None)

    def tell(self, listener: Kept) -> None:
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
        metadata={name: description[name] for name in _METADATA if description[name] is not None},
    )


@cache
def ipykernel_version() -> int:
    """The major version of the one that is installed here; a kernelspec may mean another one."""
    return int(version("ipykernel").partition(".")[0])
