"""What a sandbox is allowed on this machine: values, which travel to the keeper as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["ISOLATIONS", "Bounds", "ContainerPlan", "Method", "Mount", "Network", "Plan"]

Method = Literal["bubblewrap", "landlock", "container", "none"]
"""How kernels are kept apart; a container is local-docker's, the others are local-jupyter's."""

Network = Literal["all", "none", "allowlist"]

ISOLATIONS = ("auto", "bubblewrap", "landlock", "none")
"""What ``isolation=`` takes."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or folder of this machine that the sandbox sees.

    Args:
        source: its path on this machine, absolute.
        target: its path in the sandbox, absolute.
        identity: its device and number when it was chosen (stat(2)), as something else may be at its path
            later; None where that does not matter.
        is_asked_for: by the sandbox's user; the others are what its kernels are installed in.
    """

    source: str
    target: str
    writable: bool = False
    identity: tuple[int, int] | None = None
    is_asked_for: bool = False

    @classmethod
    def of(cls, source: str, target: str, *, writable: bool = False, is_asked_for: bool = False) -> Mount:
        """What is at *source* now.

        Raises:
            OSError: nothing is.
        """
        status = os.stat(source)
        return cls(source, target, writable, (status.st_dev, status.st_ino), is_asked_for)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Mount:
        return cls(**{**value, "identity": value["identity"] and tuple(value["identity"])})


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much there is for all kernels of a sandbox together; None where nothing is enforced.

    Args:
        memory: bytes, of processes and of files that lie in memory.
        cpu: number of CPUs.
        pids: processes and threads.
        disk: bytes of everything that can be written.
    """

    memory: int | None = None
    cpu: float | None = None
    pids: int | None = None
    disk: int | None = None


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """What only a container has.

    Args:
        engine: where the engine listens, a URL.
        image: its name, or its number.
        user: who code is, as a name or number of the image's; "" for somebody whom nobody else is.
        as_caller: code is the user who runs the keeper, so that it can write what is mounted.
        gpus: the numbers of the devices that are there.
    """

    engine: str
    image: str
    user: str = ""
    as_caller: bool = False
    gpus: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        """Where code is at home."""
        return "/root" if self.is_root else "/home/sandbox"

    @property
    def is_root(self) -> bool:
        """Code is root in it: it can change the image's files, in a layer without a limit."""
        return self.user.partition(":")[0] in ("root", "0")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a sandbox is isolated.

    Args:
        network: ``"all"``: the machine's; ``"none"`` and ``"allowlist"``: one of its own with a loopback, in
            which *allowed_hosts* can be reached, through a proxy.
        working_dir: where code starts, a path in the sandbox.
        program: the path of bubblewrap, if that is the method: the one that was found to work.
        python: the interpreter for what this library runs in the sandbox.
        first: the path of what runs there first, ``guest/init.py``.
        container: if that is the method.
    """

    method: Method
    mounts: tuple[Mount, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    network: Network = "all"
    allowed_hosts: tuple[str, ...] = ()
    working_dir: str = "/workspace"
    program: str = ""
    python: str = ""
    first: str = ""
    container: ContainerPlan | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        container = value["container"]
        return cls(
            **{
                **value,
                "container": container and ContainerPlan(**{**container, "gpus": tuple(container["gpus"])}),
                "mounts": tuple(Mount.from_json(mount) for mount in value["mounts"]),
                "bounds": Bounds(**value["bounds"]),
                "allowed_hosts": tuple(value["allowed_hosts"]),
            }
        )
