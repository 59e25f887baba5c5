"""Which isolation a sandbox on this machine gets, what that enforces, and what it does not."""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.isolation import landlock
from code_sandboxes.isolation.bubblewrap import INIT
from code_sandboxes.isolation.cgroups import LEAST_CPU
from code_sandboxes.isolation.hosts import AllowedHosts
from code_sandboxes.isolation.plan import ISOLATIONS, Bounds, Method, Mount, Network, Plan
from code_sandboxes.isolation.probe import probe
from code_sandboxes.isolation.system import is_below
from code_sandboxes.variants.installations import (
    NotEnclosableError,
    folders_of,
    mounts_of,
    own_folders,
)
from code_sandboxes.variants.kernelspecs import InstalledKernel, command_of
from code_sandboxes.variants.launches import check_variables
from code_sandboxes.variants.mounts import Refuse, asked_mounts, check_keeper_is_hidden, check_start

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = [
    "DISK",
    "PIDS",
    "bounds_of",
    "describe",
    "enforceable",
    "network_of",
    "plan_of",
    "seen_as",
    "strongest",
    "told_bounds",
    "told_mounts",
    "why_not",
]

PIDS = 256
DISK = 1024**3
_DEFAULTS = Bounds(pids=PIDS, disk=DISK)

WORKING_DIR = "/workspace"

_THINGS = ("network_none", "network_allowlist", "memory", "cpu", "pids", "disk", "mounts")

_LIMITED = {
    "memory": "the memory (memory_limit",
    "cpu": "the CPUs (cpu_limit",
    "pids": "the processes (pids",
    "disk": "what can be written (disk",
}

_MIB = 1024**2
_PIB = 1024**5


@dataclass(frozen=True, slots=True)
class _Range:
    """What a limit can be; *told* says it as who sets it would, with a value that is not in it."""

    least: float
    most: float
    told: str

    def check(self, value: float) -> None:
        """
        Raises:
            SandboxConfigurationError: it is none of these.
        """
        if not self.least <= value <= self.most:
            raise SandboxConfigurationError(self.told.format(value=value, mib=_in_mib(value)))


_RANGES = {
    "memory": _Range(
        64 * _MIB,
        _PIB,
        "memory must be from 64 MiB to 1 PiB, not {mib} MiB (memory={mib}, or memory_limit={value} of a"
        " config)",
    ),
    "cpu": _Range(  # the most that Linux can have (CONFIG_NR_CPUS)
        LEAST_CPU, 8192, f"cpu (cpu_limit of a config) must be from {LEAST_CPU:g} to 8192 CPUs, not {{value}}"
    ),
    # A Python kernel has 11 threads; the rest is for the first process, and for a command with its shell. The
    # most is the system's (proc_sys_kernel(5), pid_max).
    "pids": _Range(16, 2**22, f"pids must be a whole number from 16 to {2**22}, not {{value}}"),
    "disk": _Range(_MIB, _PIB, f"disk must be a whole number of bytes from {_MIB} to {_PIB}, not {{value}}"),
}


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
    check_variables("env", config.env_vars)
    method = _method(options.get("isolation"), refuse)
    reasons = enforceable(method)
    mounts = _mounts(options.get("mounts"), kernels, method, refuse)
    return Plan(
        method,
        mounts,
        bounds_of(config, options, reasons, _DEFAULTS if method == "bubblewrap" else Bounds(), refuse),
        network_of(config, reasons, refuse),
        tuple(config.allowed_hosts) if config.network_policy == "allowlist" else (),
        _working_dir(config, method, mounts, refuse),
        os.path.realpath(probe().bubblewrap_path) if method == "bubblewrap" else "",
        sys.executable,
        INIT,
    )


def seen_as(folder: str, plan: Plan) -> str | None:
    """The path in a sandbox of a *folder* of this machine; None where it is not to be seen."""
    if plan.method == "none":
        return folder
    real = os.path.realpath(folder)
    above = [mount for mount in plan.mounts if is_below(real, mount.source)]
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
    shared = "" if probe().landlock >= landlock.SCOPES else " and abstract Unix sockets"
    network = {
        "all": f"the machine's network with its services{shared}",
        "none": "no network",
        "allowlist": f"from the network only {', '.join(plan.allowed_hosts) or 'nothing'}",
    }[plan.network]
    return (
        f"bubblewrap: files, processes and users of its own, {network}; {told_bounds(plan.bounds)}"
        f"{told_mounts(plan.mounts)}; the system's kernel is shared"
    )


def told_bounds(bounds: Bounds) -> str:
    """What is limited, and what is not, in a few words."""
    limits = {
        "processes": bounds.pids and f"{bounds.pids} processes",
        "files": bounds.disk and f"{_mib(bounds.disk)} of files",
        "memory": bounds.memory and f"{_mib(bounds.memory)} of memory",
        "cpu": bounds.cpu and f"{bounds.cpu:g} CPUs",
    }
    missing = [name for name, limit in limits.items() if not limit]
    not_limited = f"; not limited: {', '.join(missing)}" if missing else ""
    return f"at most {', '.join(limit for limit in limits.values() if limit)}{not_limited}"


def told_mounts(mounts: Sequence[Mount]) -> str:
    """What was asked for to be seen of this machine, in a few words; nothing if that is nothing."""
    asked = [mount for mount in mounts if mount.is_asked_for]
    kinds = {False: "read-only", True: "writable, without a limit"}
    told = [f"{mount.target} ({mount.source!r}, {kinds[mount.writable]})" for mount in asked]
    return f"; of this machine it has {', '.join(told)}" if told else ""


def _describe_landlock(plan: Plan) -> str:
    network = "the machine's network" if plan.network == "all" else "no network"
    is_root = os.geteuid() == 0
    owner = "; it is root, without privileges: of root's files it can change modes" if is_root else ""
    return (
        f"landlock: files of its own home only, {network}{owner}; not limited:"
        f" processes, disk, memory, cpu; not enforced: {landlock.not_enforced()}"
    )


def _mib(size: int) -> str:
    return f"{_in_mib(size)} MiB"


def _in_mib(size: float) -> str:
    return f"{size / _MIB:g}" if size < _PIB else str(size // _MIB)  # there are integers that are no float


def bounds_of(
    config: SandboxConfig,
    options: Mapping[str, object],
    reasons: Mapping[str, str],
    defaults: Bounds,
    refuse: Refuse,
) -> Bounds:
    """The limits that were asked for, and *defaults* for what was not.

    Args:
        reasons: for each limit nothing, or why it is not enforced.

    Raises:
        SandboxConfigurationError: one cannot be enforced, or makes no sense.
    """
    bounds = Bounds(
        memory=config.memory_limit,
        cpu=config.cpu_limit,
        pids=_whole("pids", options.get("pids")),
        disk=_whole("disk", options.get("disk")),
    )
    for name, what in _LIMITED.items():
        value = getattr(bounds, name)
        if value is None:
            continue
        if reasons[name]:
            raise refuse(f"limit {what}={value})", reasons[name])
        _RANGES[name].check(value)
    return replace(bounds, pids=bounds.pids or defaults.pids, disk=bounds.disk or defaults.disk)


def network_of(config: SandboxConfig, reasons: Mapping[str, str], refuse: Refuse) -> Network:
    """What of the network there is, by the policy that was asked for.

    Raises:
        SandboxConfigurationError: it cannot be enforced, or makes no sense.
    """
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


def _mounts(
    value: object, kernels: Iterable[InstalledKernel], method: Method, refuse: Refuse
) -> tuple[Mount, ...]:
    """What is shown of this machine: what kernels are installed in, and what was asked for."""
    if value and enforceable(method)["mounts"]:
        what = next(iter(value)) if isinstance(value, Mapping) else value
        raise refuse(f"mount {what!r}", enforceable(method)["mounts"])
    installed = mounts_of(_installations(kernels)) if method != "none" else ()
    mounts = (*installed, *asked_mounts(value, installed, refuse))
    if method != "none":
        check_keeper_is_hidden(mounts, refuse)
    return mounts


def _working_dir(config: SandboxConfig, method: Method, mounts: Sequence[Mount], refuse: Refuse) -> str:
    path = config.working_dir
    if method == "bubblewrap":
        return check_start(WORKING_DIR if path is None else path, mounts, refuse)
    if path is None:
        return ""
    if method == "landlock":
        raise refuse(
            f"start in working_dir={path!r}", "with isolation='landlock' code has nothing but its home"
        )
    if not os.path.isdir(path):
        raise refuse(f"start in working_dir={path!r}", "there is no such directory on this machine")
    return path


def _whole(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise SandboxConfigurationError(f"{name} must be a whole number, not {value!r}")
    return value
