"""What every variant has to say and do; the fronts and operations know no more of it than this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from code_sandboxes.errors import SandboxConfigurationError, SandboxNotFoundError
from code_sandboxes.info import Capabilities, SandboxEnvironment, SandboxVariant
from code_sandboxes.kernel_process import KernelProcess
from code_sandboxes.network_info import NetworkAttempt

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig
    from code_sandboxes.snapshots import Shelf, Snapshot, Store

__all__ = ["MAX_OUTPUT", "Audience", "ContextSpec", "Record", "Variant", "max_output_of"]

MAX_OUTPUT = 256 * 1024**2
"""Bytes of output that a run keeps, if nobody says otherwise."""


# As many as there may be of variables (guest/namespace.py), where nothing else bounds them.
_MOST_IN_A_SNAPSHOT = 16 * 1024**3


@dataclass(frozen=True, slots=True)
class ContextSpec:
    """A context as whoever starts its kernel must know it, in this program or in another one.

    Args:
        key: what messages to and from its kernels are signed with; None: each kernel has another one.
    """

    id: str
    name: str
    language: str
    kernel_name: str
    cwd: str | None
    env: Mapping[str, str]
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """What there is to know of a sandbox without being attached to it.

    Args:
        settings: of its :class:`SandboxConfig`, by name.
        created_at: seconds since the epoch; 0 if nobody knows.
        time_left: seconds until its lifetime ends; None if it has no end.
        isolation: what separates it from the machine it runs on.
    """

    id: str
    name: str | None
    tags: Mapping[str, str]
    settings: Mapping[str, Any]
    created_at: float
    time_left: float | None
    isolation: str
    contexts: Sequence[ContextSpec] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)


class Audience(Protocol):
    """Who is told what others do to the sandbox; in the I/O thread."""

    def over(self, why: str) -> None:
        """It is ending."""

    def tagged(self, tags: Mapping[str, str]) -> None:
        """It has other tags."""

    def paused(self, *, on: bool) -> None:
        """Nothing in it goes on, or all does again."""

    def rescheduled(self, time_left: float) -> None:
        """It will end in so many seconds."""

    def context_added(self, spec: ContextSpec) -> None:
        """It has one more context."""

    def context_deleted(self, context_id: str) -> None:
        """It has one context less."""


class Variant(ABC):
    """Where the kernels of one sandbox run.

    Args:
        config: the settings; one that cannot be honoured is refused here.
        options: those of the variant itself.

    Raises:
        TypeError: an option is unknown.
        SandboxConfigurationError: a setting cannot be honoured.
    """

    name: ClassVar[SandboxVariant]
    options: ClassVar[frozenset[str]]
    has_registry: ClassVar[bool] = False
    """Its sandboxes can be listed and used by other programs, and go on when this one ends."""

    is_reached_by_id: ClassVar[bool] = False
    """Other programs can use its sandboxes if they are told their ids; those of a registry can anyway."""

    is_elsewhere: ClassVar[bool] = False
    """They are on other machines: :meth:`prepare` waits for these, and starts no process here."""

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        unknown = sorted(set(options) - self.options)
        if unknown:
            known = ", ".join(sorted(self.options)) or "none"
            raise TypeError(f"{self.name} has no option {unknown[0]!r} (known: {known})")
        self.config = config

    @classmethod
    def chosen(cls, config: SandboxConfig, options: Mapping[str, object]) -> Variant:
        """Itself, or what goes by the same name and suits these settings better; may block."""
        return cls(config, options)

    @classmethod
    @abstractmethod
    def capabilities(cls) -> Capabilities:
        """What it can do on this machine."""

    @property
    def own_capabilities(self) -> Capabilities:
        """What this sandbox can do, as it was asked to be."""
        return self.capabilities()

    @property
    @abstractmethod
    def isolation(self) -> str:
        """What separates this sandbox from the machine it runs on, and what does not, in a few words."""

    @property
    @abstractmethod
    def max_output(self) -> int:
        """Bytes of output a run keeps."""

    @property
    def sandbox_id(self) -> str | None:
        """What its sandbox is called where its kernels are; None if anything will do."""
        return None

    @property
    def was_made_elsewhere(self) -> bool:
        """Another program has made it, and may go on with it when this one ends."""
        return False

    @property
    def metadata(self) -> Mapping[str, object]:
        """More about this sandbox, see :class:`code_sandboxes.info.SandboxInfo`; after :meth:`prepare`."""
        return {}

    @property
    def snapshots(self) -> Store:
        """Where its snapshots are.

        Raises:
            SandboxConfigurationError: it has none.
        """
        raise self.refuse("make or restore snapshots", self.capabilities().snapshots.reason)

    @property
    def shelf(self) -> Shelf | None:
        """Where its snapshots are, if a service makes and restores them; then there are no others."""
        return None

    @property
    def own_folders(self) -> tuple[str, ...]:
        """The folders of a sandbox in which files are its own; ``~`` for its home. May block.

        What is mounted in them is not: only what is on the same file system as the folder itself.
        """
        return ("~",)

    @abstractmethod
    def kernel_name(self, language: str | None) -> str:
        """The kernel that runs *language*.

        Raises:
            ValueError: there is none.
        """

    @abstractmethod
    def language_of(self, kernel_name: str) -> str:
        """What the kernel *kernel_name* declares to run."""

    @abstractmethod
    def prepare(self, record: Record, audience: Audience) -> None:
        """Make what all kernels of the sandbox share, and see to it that its lifetime ends; may block."""

    def warn(self) -> None:
        """Tell the caller what to know of it, as a warning; after :meth:`prepare`, in the caller's thread."""
        return

    def check_gpus(self, models: Sequence[str]) -> None:
        """*models* are the GPUs that code in it sees; asked of those that are elsewhere.

        Raises:
            SandboxResourceError: what was asked for is not among them.
        """
        return

    @abstractmethod
    def launcher(self, spec: ContextSpec) -> Callable[[], KernelProcess]:
        """What starts the kernel of a context, again and again; it is called in the worker thread."""

    @abstractmethod
    def expire_in(self, seconds: float, why: str) -> None:
        """Its lifetime ends that long from now, shorter or longer than before; may block."""

    def ends(self, why: str, *, orderly: bool) -> None:
        """The sandbox is about to be ended; in the I/O thread."""
        return

    @abstractmethod
    def remove(self) -> None:
        """Remove what :meth:`prepare` made, when no kernel is left; may be called again, may block."""

    @classmethod
    def environments(cls, options: Mapping[str, object]) -> list[SandboxEnvironment]:
        """What its sandboxes can be made of; may block.

        Args:
            options: credentials, where it needs them.

        Raises:
            SandboxConfigurationError: it has no environments.
        """
        raise SandboxConfigurationError(
            f"{cls.name} has no environments to choose from; datalayer-runtime has some"
        )

    # Of those that have a registry.

    @classmethod
    def all(cls) -> list[Record]:
        """The sandboxes of this user, whichever program made them; may block."""
        return []

    @classmethod
    def attach(cls, sandbox_id: str, options: Mapping[str, object]) -> tuple[Variant, Record]:
        """Find a sandbox and become one of its users; may block.

        Raises:
            SandboxNotFoundError: there is none of that id.
        """
        raise SandboxNotFoundError(
            f"no sandbox {sandbox_id!r}: a {cls.name} sandbox belongs to the process that made it"
        )

    def listen(self, audience: Audience) -> None:
        """Tell *audience* from now on what others do; after :meth:`attach`."""
        return

    def detach(self, *, keep: bool) -> None:
        """Be one of its users no more; with *keep* it goes on although it has none. May block.

        Raises:
            SandboxConfigurationError: it cannot go on without this program.
        """
        raise self.refuse("detach", "the code runs in this process; use local-jupyter")

    @property
    def most_in_a_snapshot(self) -> tuple[int, int]:
        """Bytes of its files, and of the variables of a context, that can be in a snapshot; may block."""
        return _MOST_IN_A_SNAPSHOT, _MOST_IN_A_SNAPSHOT

    def begin_with(self, snapshot: Snapshot) -> None:
        """It is to be made for what that snapshot has; before :meth:`prepare`, may block.

        Raises:
            SandboxConfigurationError: its settings say otherwise.
        """
        return

    def pause(self, *, on: bool) -> None:
        """Stop all processes of the sandbox, or let them go on; may block.

        Raises:
            SandboxConfigurationError: they cannot be stopped together.
        """
        raise self.refuse("pause", self.own_capabilities.pause.reason)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Let others know them; may block."""
        return

    def network_log(self) -> list[NetworkAttempt]:
        """What the sandbox tried to reach; may block.

        Raises:
            SandboxConfigurationError: nobody watches that.
        """
        raise self.refuse("tell what the sandbox tried to reach", "it has no network of its own")

    def delete_context(self, context_id: str) -> None:
        """Let others know that its kernel is gone for good; may block."""
        return

    def refuse(self, setting: str, reason: str) -> SandboxConfigurationError:
        """The error that says that *setting* cannot be honoured."""
        return SandboxConfigurationError(f"{self.name} cannot {setting}: {reason}")


def max_output_of(options: Mapping[str, object]) -> int:
    """The option of that name, or its default.

    Raises:
        SandboxConfigurationError: it is no number of bytes.
    """
    value = options.get("max_output")
    if value is None:
        return MAX_OUTPUT
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise SandboxConfigurationError(f"max_output must be a positive number of bytes, not {value!r}")
    return value
