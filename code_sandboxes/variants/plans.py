"""Which isolation a sandbox on this machine gets, what that enforces, and what it does not."""

from __future__ import annotations

import os
import posixpath
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.isolation import landlock
from code_sandboxes.isolation.enclosure import SCOPES
from code_sandboxes.isolation.hosts import AllowedHosts
from code_sandboxes.isolation.plan import ISOLATIONS, Bounds, Method, Mount, Network, Plan
from code_sandboxes.isolation.probe import probe
from code_sandboxes.reaper import USERS
from code_sandboxes.variants.installations import (
    NotEnclosableError,
    folders_of,
    is_public,
    mounts_of,
    own_folders,
)
from code_sandboxes.variants.kernelspecs import InstalledKernel, command_of

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["describe", "enforceable", "plan_of", "seen_as", "strongest", "why_not"]

Refuse = Callable[[str, str], SandboxConfigurationError]

PIDS = 256
DISK = 1024**3
WORKING_DIR = "/workspace"

_THINGS = ("network_none", "network_allowlist", "memory", "cpu", "pids", "disk", "mounts")

_LIMITED = {
    "memory": "the memory (memory_limit",
    "cpu": "the CPUs (cpu_limit",
    "pids": "the processes (pids",
    "disk": "what can be written (disk",
}

# What of an enclosure is the system's.
_RESERVED = ("/bin", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr")

_LEAST_MEMORY = 64 * 1024**2
_LEAST_DISK = 1024**2


def strongest() -> Method:
    """What ``isolation="auto"`` is here."""
    methods: tuple[Method, ...] = ("bubblewrap", "landlock")
    return next((method for method in methods if not why_not(method)), "none")


def why_not(method: Method) -> str:
    """Why there is no such isolation here; empty if there is."""
    if method == "bubblewrap":
        return probe().bubblewrap
    return probe().landlock_reason if method == "landlock" else ""


def enforceable(method: Method) -> Mapping[str, str]:
    """What *method* enforces here: for each thing nothing, or why it does not."""
    facts = probe()
    if method == "bubblewrap":
        return dict.fromkeys(_THINGS, "") | {name: facts.cgroups[name] for name in ("memory", "cpu")}
    needed = f"bubblewrap; {facts.bubblewrap}" if facts.bubblewrap else "isolation='bubblewrap'"
    reasons = dict.fromkeys(_THINGS, f"that takes {needed}")
    if method == "landlock":
        reasons["network_none"] = ""
    return reasons


def plan_of(
    config: SandboxConfig, options: Mapping[str, object], kernels: Iterable[InstalledKernel], refuse: Refuse
) -> Plan:
    """How a sandbox with these settings, in which *kernels* may run, is isolated.

    Raises:
        SandboxConfigurationError: something that was asked for cannot be enforced, or makes no sense.
    """
    method = _method(options.get("isolation"), refuse)
    reasons = enforceable(method)
    mounts = _mounts(options.get("mounts"), refuse)
    if mounts and reasons["mounts"]:
        raise refuse(f"mount {mounts[0].source!r}", reasons["mounts"])
    if method != "none":
        mounts = (*mounts_of(_installations(kernels)), *mounts)
    return Plan(
        method,
        mounts,
        _bounds(config, options, method, refuse),
        _network(config, reasons, refuse),
        tuple(config.allowed_hosts) if config.network_policy == "allowlist" else (),
        _working_dir(config, method, refuse),
        _user(method, mounts),
    )


def seen_as(folder: str, plan: Plan) -> str | None:
    """The path in a sandbox of a *folder* of this machine; None where it is not to be seen."""
    if plan.method == "none":
        return folder
    real = os.path.realpath(folder)
    above = [mount for mount in plan.mounts if f"{real}/".startswith(f"{mount.source.rstrip('/')}/")]
    if plan.method != "bubblewrap" or not above:
        return None
    mount = max(above, key=lambda mount: len(mount.source))
    return posixpath.normpath(posixpath.join(mount.target, os.path.relpath(real, mount.source)))


def describe(plan: Plan) -> str:
    """What separates a sandbox from the machine it runs on, and what does not, in a few words."""
    if plan.method == "none":
        return (
            "none: a process of this user, in a home of its own; files and network are the machine's, and"
            " a child that leaves its session (setsid) outlives it"
        )
    if plan.method == "landlock":
        return _describe_landlock(plan)
    shared = "" if probe().landlock >= SCOPES else " and abstract Unix sockets"
    network = {
        "all": f"the machine's network with its services{shared}",
        "none": "no network",
        "allowlist": f"from the network only {', '.join(plan.allowed_hosts) or 'nothing'}",
    }[plan.network]
    bounds = plan.bounds
    limits = [f"{bounds.pids} processes", f"{_mib(bounds.disk or 0)} of files"]
    limits += [] if bounds.memory is None else [f"{_mib(bounds.memory)} of memory"]
    limits += [] if bounds.cpu is None else [f"{bounds.cpu:g} CPUs"]
    missing = [name for name in ("memory", "cpu") if getattr(bounds, name) is None]
    not_limited = f"; not limited: {', '.join(missing)}" if missing else ""
    return (
        f"bubblewrap: files, processes and users of its own, {network}; at most {', '.join(limits)}"
        f"{not_limited}; the system's kernel is shared"
    )


def _describe_landlock(plan: Plan) -> str:
    network = "the machine's network" if plan.network == "all" else "no network"
    is_root = os.geteuid() == 0 and plan.user < 0
    owner = "; it is root, without privileges, since nobody else can read the installation" if is_root else ""
    return f"landlock: files of its own home only, {network}{owner}; not enforced: {landlock.not_enforced()}"


def _mib(size: int) -> str:
    return f"{size / 1024**2:g} MiB"


def _bounds(config: SandboxConfig, options: Mapping[str, object], method: Method, refuse: Refuse) -> Bounds:
    bounds = Bounds(
        memory=_at_least("memory_limit", config.memory_limit, _LEAST_MEMORY),
        cpu=_positive("cpu_limit", config.cpu_limit),
        pids=_at_least("pids", options.get("pids"), 1),
        disk=_at_least("disk", options.get("disk"), _LEAST_DISK),
    )
    reasons = enforceable(method)
    for name, what in _LIMITED.items():
        if getattr(bounds, name) is not None and reasons[name]:
            raise refuse(f"limit {what}={getattr(bounds, name)})", reasons[name])
    if method != "bubblewrap":
        return bounds
    return replace(bounds, pids=bounds.pids or PIDS, disk=bounds.disk or DISK)


def _network(config: SandboxConfig, reasons: Mapping[str, str], refuse: Refuse) -> Network:
    policy = config.network_policy
    if policy in ("inherit", "all"):
        return "all"
    setting = f"enforce network_policy={policy!r}"
    if reasons[f"network_{policy}"]:
        raise refuse(setting, reasons[f"network_{policy}"])
    if policy == "allowlist":
        AllowedHosts(config.allowed_hosts)  # which says what is wrong with them
        if not config.allowed_hosts:
            raise refuse(setting, "allowed_hosts is empty; to let nothing through there is 'none'")
    return cast(Network, policy)


def _user(method: Method, mounts: Sequence[Mount]) -> int:
    """Who the code is, where that can be somebody whom the files of this machine do not belong to."""
    can_be_another = os.geteuid() == 0 and all(is_public(mount.source) for mount in mounts)
    return secrets.choice(USERS) if method == "landlock" and can_be_another else -1


def _method(isolation: object, refuse: Refuse) -> Method:
    if isolation is None or isolation == "auto":
        return strongest()
    if isolation not in ISOLATIONS:
        known = ", ".join(repr(name) for name in ISOLATIONS)
        raise refuse(f"isolate with {isolation!r}", f"isolation takes {known}")
    method = cast(Method, isolation)
    reason = why_not(method)
    if reason:
        raise refuse(f"isolate with {isolation!r}", reason)
    return method


def _installations(kernels: Iterable[InstalledKernel]) -> list[str]:
    """Of this interpreter, and of all *kernels* that can be shown to an enclosure."""
    folders = list(own_folders())
    for kernel in kernels:
        try:
            folders += folders_of(command_of(kernel), kernel.kernel_spec.resource_dir)
        except NotEnclosableError:  # which is told when it is wanted
            continue
    return folders


def _mounts(value: object, refuse: Refuse) -> tuple[Mount, ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise refuse(f"honour mounts={value!r}", 'it takes {host: (path in the sandbox, "ro" or "rw")}')
    return tuple(_mount(source, target, refuse) for source, target in value.items())


def _mount(source: object, where: object, refuse: Refuse) -> Mount:
    setting = f"mount {source!r}: {where!r}"
    if not isinstance(source, (str, os.PathLike)):
        raise refuse(setting, "what is mounted is a path of this machine")
    if not isinstance(where, (tuple, list)) or len(where) != 2 or where[1] not in ("ro", "rw"):
        raise refuse(setting, 'how it is mounted is a path in the sandbox, and "ro" or "rw"')
    path, target, writable = os.path.realpath(os.fspath(source)), where[0], where[1] == "rw"
    if not isinstance(target, (str, os.PathLike)) or not posixpath.isabs(os.fspath(target)):
        raise refuse(setting, "the path in the sandbox must be absolute")
    target = posixpath.normpath(os.fspath(target)).replace("//", "/")
    if target == "/" or any(f"{target}/".startswith(f"{reserved}/") for reserved in _RESERVED):
        raise refuse(setting, f"{target} is the system's in the sandbox")
    if not os.path.exists(path):
        raise refuse(setting, f"there is no {path} on this machine")
    if writable and os.geteuid() == 0 and not os.stat(path).st_mode & 0o002:
        raise refuse(
            setting, "code is not root in the sandbox, and only its owner may write there; chmod o+w it"
        )
    return Mount.of(path, target, writable=writable)


def _working_dir(config: SandboxConfig, method: Method, refuse: Refuse) -> str:
    path = config.working_dir
    if method != "bubblewrap":
        if path is not None and not os.path.isdir(path):
            raise refuse(f"start in working_dir={path!r}", "there is no such directory on this machine")
        return path or ""
    if path is None:
        return WORKING_DIR
    if not posixpath.isabs(path):
        raise refuse(f"start in working_dir={path!r}", "it must be an absolute path in the sandbox")
    return posixpath.normpath(path)


def _at_least(name: str, value: object, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SandboxConfigurationError(f"{name} must be a whole number from {least} on, not {value!r}")
    return value


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < 1e6:
        raise SandboxConfigurationError(f"{name} must be a positive number, not {value!r}")
    return value
