"""What a sandbox tells about itself: its variant, its state, and what it can and cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from code_sandboxes.results import Text

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = [
    "NO_SUBSHELLS",
    "NO_SYSTEM_PACKAGES",
    "Capabilities",
    "Capability",
    "GPUType",
    "ResourceConfig",
    "SandboxEnvironment",
    "SandboxInfo",
    "SandboxStatus",
    "SandboxVariant",
]


class SandboxVariant(Text):
    """Where code can run."""

    LOCAL_EVAL = "local-eval"
    LOCAL_JUPYTER = "local-jupyter"
    LOCAL_DOCKER = "local-docker"
    JUPYTER_GATEWAY = "jupyter-gateway"
    DATALAYER_RUNTIME = "datalayer-runtime"


class GPUType(Text):
    """For ``gpu=``, which takes any other type, too: the words of its name."""

    T4 = "T4"
    V100 = "V100"
    L4 = "L4"
    L40S = "L40S"
    A10 = "A10"
    A10G = "A10G"
    A100 = "A100"
    A100_80GB = "A100-80GB"
    H100 = "H100"
    H200 = "H200"
    B200 = "B200"


class SandboxStatus(Text):
    """Compares equal to the plain strings."""

    CREATED = "created"  # not started yet
    RUNNING = "running"
    PAUSED = "paused"  # it is there, and nothing in it goes on
    DETACHED = "detached"  # it goes on, and this program has let go of it
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ResourceConfig:
    """What the sandbox may use; None where nothing is enforced.

    Args:
        cpu: number of CPUs.
        memory: bytes.
        gpu: type.
    """

    cpu: float | None = None
    memory: int | None = None
    gpu: str | None = None


@dataclass(frozen=True, slots=True)
class SandboxEnvironment:
    """What a sandbox can be made of, by the name that ``environment=`` takes.

    Args:
        title: for people.
        owner: whose it is.
        visibility: to whom it is there: ``public``, say.
        burning_rate: credits a second.
        resources: as the service says it: ``{"cpu": "1", "memory": "2Gi", "nvidia.com/gpu": "1"}``.
        cpu: number of CPUs; None if it is not told.
        memory: bytes; None if it is not told.
        gpus: number of GPUs.
        description: may have HTML in it.
    """

    name: str
    title: str
    language: str
    owner: str
    visibility: str
    burning_rate: float
    resources: Mapping[str, str] = field(default_factory=dict)
    cpu: float | None = None
    memory: int | None = None
    gpus: int = 0
    description: str = ""


@dataclass(frozen=True, slots=True)
class SandboxInfo:
    """A sandbox as it is now.

    Args:
        created_at: seconds since the epoch; None before the start, and where another program has made it and
            its server does not tell.
        end_at: when its lifetime ends, seconds since the epoch; None if it has none.
        isolation: what separates it from the machine it runs on.
        metadata: more about it. Where this program uses it, ``dropped_messages`` says how many messages of
            its kernels were not taken in, by why: ``{"forged": 3, "too large": 1}``; and of one that was made
            from a snapshot, ``snapshot`` is its name, and ``not_restored`` what of it is not there, with
            reasons: ``{"f": "it has code of Python 3.11, which Python 3.12 does not read"}``. Of a container,
            ``jupyter_server`` is the URL of a Jupyter Server that serves its kernels; of one on an engine
            elsewhere, ``engine`` and ``container`` say where it is. Of a runtime of
            Datalayer, ``runtime``, ``uid``, ``environment``, ``burning_rate`` (credits a second) and
            ``expires_at`` (seconds since the epoch) are what the service says of it.
    """

    id: str
    variant: SandboxVariant
    status: SandboxStatus
    created_at: float | None
    end_at: float | None
    name: str | None
    tags: Mapping[str, str]
    config: SandboxConfig
    resources: ResourceConfig
    isolation: str
    metadata: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Capability:
    """Yes, or no and why not. True in a condition if it is yes."""

    supported: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.supported

    def __str__(self) -> str:
        return "yes" if self.supported else f"no: {self.reason}"


NO_SYSTEM_PACKAGES = Capability(False, "they would be installed on this machine itself; use local-docker")

NO_SUBSHELLS = Capability(
    False,
    "the kernel has no subshells, so files and commands wait for the end of the code; install ipykernel 7",
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a variant can do on this machine, one field for each thing in which variants differ.

    Args:
        languages: the names that ``language=`` takes.
        contexts: several, with variables of their own.
        own_process: code has one. It cannot harm the program, can always be ended, and what its child
            processes print is its output.
        last_words: what code has printed in the milliseconds before its process died is known, and the exit
            code or signal.
        own_home: it has a home directory and an environment of its own, and may ruin them.
        environment: environment variables and a working directory can be chosen.
        magics: IPython's ``%magics``, ``!commands`` and ``name?``.
        interrupt_blocked: code that waits in the system (a sleep, a socket) reacts to an interrupt, and code
            that reacts to none can be ended, at the cost of its state.
        subshells: files and commands work while code runs.
        system_packages: the sandbox has an operating system of its own, for which packages can be installed.
        snapshots: its files and variables can be kept, and other sandboxes begin with them.
    """

    languages: tuple[str, ...]
    contexts: Capability
    own_process: Capability
    last_words: Capability
    own_home: Capability
    environment: Capability
    magics: Capability
    interrupt_blocked: Capability
    subshells: Capability
    system_packages: Capability
    network_none: Capability
    network_allowlist: Capability
    memory_limit: Capability
    cpu_limit: Capability
    pids_limit: Capability
    disk_limit: Capability
    gpu: Capability
    mounts: Capability
    idle_timeout: Capability
    pause: Capability
    snapshots: Capability
    fork: Capability
