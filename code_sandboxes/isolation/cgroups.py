"""Cgroups: how much memory, CPU and processes all that is in a sandbox has together.

A controller is used where this machine has it: in a hierarchy of its own (version 1) or in the unified one
(version 2), and always below the cgroup that this process is in, so that what bounds that bounds the
sandboxes, too. Sources: cgroups(7); the kernel's documentation, ``cgroup-v2.rst`` and ``cgroup-v1/``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.isolation.plan import Bounds
from code_sandboxes.reaper import CGROUP, end_cgroups, kill_cgroup

__all__ = [
    "CONTROLLERS",
    "LEAST_CPU",
    "PROGRAMS",
    "Cgroup",
    "Controller",
    "enforceable",
    "folders_of",
    "make",
    "memory_of",
]

Controller = Literal["memory", "cpu", "pids"]

CONTROLLERS: tuple[Controller, ...] = ("memory", "cpu", "pids")

PROGRAMS = "code-sandboxes.programs"
"""The cgroup into which the programs of a delegated one move, so that this may have children."""

# Microseconds in which a share of the CPUs is given, the kernel's default; and the least it gives.
_PERIOD = 100_000
_LEAST_QUOTA = 1_000

LEAST_CPU = _LEAST_QUOTA / _PERIOD
"""The least that a sandbox can be limited to, as a number of CPUs."""

# How long what was killed may take to be gone, in seconds.
_PATIENCE = 5.0

# How often to try again what somebody else has just made impossible.
_TRIES = 5


class Cgroup:
    """The cgroup of one sandbox, in each hierarchy that bounds it."""

    def __init__(self, folders: Sequence[str], entered: Mapping[Controller, str]) -> None:
        self._folders = tuple(folders)
        self._entered = entered  # the folder in which each controller acts

    @property
    def folders(self) -> tuple[str, ...]:
        """All that :func:`code_sandboxes.reaper.end_cgroups` has to remove, in this order."""
        return self._folders

    def add(self, pid: int) -> None:
        """Put a process into it, and with it what it starts from now on.

        Raises:
            OSError: there is no such process, or it is another user's.
        """
        for folder in dict.fromkeys(self._entered.values()):
            _write(folder, "cgroup.procs", str(pid))

    def out_of_memory_kills(self) -> int:
        """How many processes in it the kernel has ended because memory was used up; 0 without that bound."""
        folder = self._entered.get("memory")
        if folder is None:
            return 0
        # Version 2 has it in memory.events, version 1 in memory.oom_control, both since Linux 4.13.
        name = "memory.events" if _is_unified(folder) else "memory.oom_control"
        counts = dict(line.split() for line in _read(folder, name).splitlines())
        return int(counts["oom_kill"])

    def kill(self) -> None:
        """End all that is in it, and for good: nothing may begin in it then; blocks until nothing is there.

        Raises:
            OSError: something does not end.
        """
        give_up = time.monotonic() + _PATIENCE
        while any(_read(folder, "cgroup.procs") for folder in self._folders):
            if time.monotonic() > give_up:
                raise TimeoutError(f"something in {self._folders[0]} does not end within {_PATIENCE:g} s")
            for folder in self._folders:
                kill_cgroup(folder)
            time.sleep(0.001)

    def remove(self) -> None:
        """Remove it, and end what is still in it; blocks. To do so twice is once.

        Raises:
            OSError: something in it does not end.
        """
        end_cgroups(self._folders)


def make(name: str, bounds: Bounds) -> Cgroup | None:
    """A cgroup for a sandbox, empty yet; None if *bounds* need none. It leaves nothing behind if it fails.

    ``bounds.disk`` is not its business, and neither are ``bounds.pids`` where there is no cgroup for that:
    a process can be forbidden to fork without one (setrlimit(2), ``RLIMIT_NPROC``).

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``; no other sandbox on this machine has it.

    Raises:
        SandboxConfigurationError: what is asked for cannot be enforced here.
    """
    name, wanted = _name(name), _wanted(bounds)
    return _make(name, wanted) if wanted else None


def folders_of(name: str, bounds: Bounds) -> tuple[str, ...]:
    """The ``folders`` of what :func:`make` will make, so that they can be guarded before they are there.

    Raises:
        SandboxConfigurationError: there is no place for them.
    """
    name, wanted = _name(name), _wanted(bounds)
    folders: list[str] = []
    for place in dict.fromkeys(_place_of(controller) for controller in wanted):
        folders += _folders_at(place, name)
    return tuple(folders[::-1])


def _name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", name) is None:
        raise ValueError(f"a cgroup cannot have the name {name!r}")
    return CGROUP + name


def _wanted(bounds: Bounds) -> dict[Controller, float]:
    asked: dict[Controller, float | None] = {"memory": bounds.memory, "cpu": bounds.cpu}
    if not enforceable()["pids"]:
        asked["pids"] = bounds.pids
    return {controller: value for controller, value in asked.items() if value is not None}


@cache
def enforceable() -> Mapping[Controller, str]:
    """What can be bounded here: for each controller nothing, or why not and what would mend it.

    It was tried, once: this tells what is so for this process, its user and its cgroup.
    """
    return MappingProxyType({controller: _try(controller) for controller in CONTROLLERS})


_LITTLE: Mapping[Controller, float] = {"memory": 2**24, "cpu": 0.05, "pids": 8}


def _try(controller: Controller) -> str:
    name = f"{CGROUP}try-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        made = _make(name, {controller: _LITTLE[controller]}, rearrange=False)
        made.remove()
    except SandboxConfigurationError as error:
        return str(error)
    except OSError as error:
        return f"the cgroup {error.filename} that was made to try it cannot be removed: {error.strerror}"
    return ""


def _make(name: str, wanted: Mapping[Controller, float], *, rearrange: bool = True) -> Cgroup:
    made: list[str] = []
    entered: dict[Controller, str] = {}
    try:
        places = {controller: _place_of(controller) for controller in wanted}
        for place in dict.fromkeys(places.values()):
            here = {each: value for each, value in wanted.items() if places[each] == place}
            maker = _make_unified if place.is_unified else _make_separate
            folder = maker(place, name, here, made, rearrange)
            entered |= dict.fromkeys(here, folder)
    except BaseException as error:
        end_cgroups(made[::-1])
        if isinstance(error, OSError):
            raise SandboxConfigurationError(_sentence(error)) from error
        raise
    return Cgroup(made[::-1], entered)


def _make_separate(
    place: _Place, name: str, wanted: Mapping[Controller, float], made: list[str], _rearrange: bool
) -> str:
    """In a hierarchy of version 1."""
    (folder,) = _folders_at(place, name)
    _make_folder(folder, made)
    for controller, value in wanted.items():
        _BOUND_SEPARATE[controller](folder, value)
    return folder


def _make_unified(
    place: _Place, name: str, wanted: Mapping[Controller, float], made: list[str], rearrange: bool
) -> str:
    """In the hierarchy of version 2.

    Two, one in the other: as long as the outer one hands its controllers on, nobody further up can take them
    away (cgroup-v2.rst, "Top-down Constraint"), as systemd would from what it believes not to need them.
    """
    outer, inner = _folders_at(place, name)
    has_room = _hand_on(place.folder, wanted, rearrange)
    _make_folder(outer, made)
    if not has_room:
        return outer  # more cannot be tried before the programs have made room
    _write(outer, "cgroup.subtree_control", _enabling(wanted))
    _make_folder(inner, made)
    for controller, value in wanted.items():
        _BOUND_UNIFIED[controller](inner, value)
    return inner


def _folders_at(place: _Place, name: str) -> tuple[str, ...]:
    outer = f"{place.folder}/{name}"
    return (outer, f"{outer}/{name}.code") if place.is_unified else (outer,)


def _make_folder(folder: str, made: list[str]) -> None:
    os.mkdir(folder, 0o755)
    made.append(folder)


# The bounds, in version 1 and in version 2.


def _bound_memory_separate(folder: str, value: float) -> None:
    _write(folder, "memory.limit_in_bytes", str(int(value)))
    try:
        _write(folder, "memory.memsw.limit_in_bytes", str(int(value)))
    except FileNotFoundError:  # swap is not counted (swapaccount=0): nothing of it may go there
        _write(folder, "memory.swappiness", "0")
    if "oom_kill_disable 1" in _read(folder, "memory.oom_control"):  # which is inherited
        _write(folder, "memory.oom_control", "0")


def _bound_memory_unified(folder: str, value: float) -> None:
    _write(folder, "memory.max", str(int(value)))
    try:
        _write(folder, "memory.swap.max", "0")
    except FileNotFoundError:
        if len(Path("/proc/swaps").read_text().splitlines()) > 1:
            raise SandboxConfigurationError(
                "this machine swaps, and does not count who does: memory cannot be limited; start it with"
                " the kernel parameter swapaccount=1, or swap off"
            ) from None
    _write(folder, "memory.oom.group", "0")


def _bound_cpu_separate(folder: str, value: float) -> None:
    _write(folder, "cpu.cfs_period_us", str(_PERIOD))
    _write(folder, "cpu.cfs_quota_us", str(_quota(value)))


def _bound_cpu_unified(folder: str, value: float) -> None:
    _write(folder, "cpu.max", f"{_quota(value)} {_PERIOD}")


def _quota(value: float) -> int:
    quota = round(value * _PERIOD)
    if quota < _LEAST_QUOTA:
        raise SandboxConfigurationError(
            f"cpu={value:g} is too little: {_LEAST_QUOTA / _PERIOD:g} is the least"
        )
    return quota


def _bound_pids(folder: str, value: float) -> None:
    _write(folder, "pids.max", str(int(value)))


_BOUND_SEPARATE = {"memory": _bound_memory_separate, "cpu": _bound_cpu_separate, "pids": _bound_pids}
_BOUND_UNIFIED = {"memory": _bound_memory_unified, "cpu": _bound_cpu_unified, "pids": _bound_pids}


# Where they are.


@dataclass(frozen=True, slots=True)
class _Place:
    """A cgroup below which ours are made."""

    folder: str
    is_unified: bool


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy as it is mounted (proc_pid_mountinfo(5)); *controllers* are those of version 1."""

    folder: str
    root: str
    controllers: frozenset[str]
    is_unified: bool


def _place_of(controller: Controller) -> _Place:
    """
    Raises:
        SandboxConfigurationError: it is nowhere.
    """
    if sys.platform != "linux":
        raise SandboxConfigurationError(f"{controller} is limited by cgroups, which only Linux has")
    mounts = _mounts()
    for mount in mounts:
        if controller in mount.controllers:
            return _Place(_own_cgroup(mount, controller), is_unified=False)
    for mount in mounts:
        if mount.is_unified:
            place = _unified_place(_own_cgroup(mount, ""))
            if controller in _controllers(place.folder):
                return place
            if controller in _controllers(mount.folder):
                raise SandboxConfigurationError(_not_handed_on(controller, place.folder))
    raise SandboxConfigurationError(_nowhere(controller, mounts))


def _unified_place(own: str) -> _Place:
    # A program that has made room, and whoever it starts, is further down than what it has made room in.
    return _Place(os.path.dirname(own) if os.path.basename(own) == PROGRAMS else own, is_unified=True)


def _mounts() -> list[_Mount]:
    mounts = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines():
        left, _, right = line.partition(" - ")
        (_, _, _, root, folder, *_), (kind, _, options) = left.split(), right.split(maxsplit=2)
        if kind in ("cgroup", "cgroup2") and os.path.exists(f"{_unescaped(folder)}/cgroup.procs"):
            controllers = frozenset(options.split(",")) if kind == "cgroup" else frozenset[str]()
            mounts.append(_Mount(_unescaped(folder), _unescaped(root), controllers, kind == "cgroup2"))
    return mounts


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)


def memory_of(process: int) -> Cgroup:
    """The cgroup that bounds the memory of a process, to be read; somebody else has made it.

    Raises:
        OSError: there is no such process.
        SandboxConfigurationError: it is not to be seen from here.
    """
    mounts = _mounts()
    separate = [mount for mount in mounts if "memory" in mount.controllers]
    for mount in separate or [mount for mount in mounts if mount.is_unified]:
        return Cgroup((), {"memory": _own_cgroup(mount, "memory" if separate else "", str(process))})
    raise SandboxConfigurationError(_nowhere("memory", mounts))


def _own_cgroup(mount: _Mount, controller: str, process: str = "self") -> str:
    """The folder of the cgroup in which this process is."""
    for line in os.fsdecode(Path(f"/proc/{process}/cgroup").read_bytes()).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and not f"{path}/".startswith("/../"):
            # Either begins with "/.." where it is above the cgroup namespace (cgroup_namespaces(7)).
            root = mount.root.rstrip("/")
            if f"{path}/".startswith(f"{root}/"):
                return f"{mount.folder}{path.removeprefix(root)}".rstrip("/")
    raise SandboxConfigurationError(
        f"the cgroup of this process is not among those mounted at {mount.folder}, as in a container that has"
        " those of the machine; start the container with cgroups of its own (Docker: --cgroupns=private)"
    )


def _is_unified(folder: str) -> bool:
    return os.path.exists(f"{folder}/cgroup.controllers")


# Version 2: who has processes in it hands on no controllers to others (cgroup-v2.rst, "No Internal Process
# Constraint"), but for the root. Some are handed on all the same, and then nobody can enter what is below
# ("Threads").


def _hand_on(folder: str, controllers: Mapping[Controller, float], rearrange: bool) -> bool:
    """Have the children of a cgroup bounded; False if they could be after its processes have made room.

    Nothing takes that back later: others may have come to rely on it.
    """
    is_root = not os.path.exists(f"{folder}/cgroup.type")
    for _ in range(_TRIES):
        if not is_root and _read(folder, "cgroup.procs"):
            processes = _movable_processes(folder)
            if not rearrange:
                return False
            _move(processes, folder)
        try:
            _write(folder, "cgroup.subtree_control", _enabling(controllers))
        except OSError as error:
            if error.errno != errno.EBUSY:  # of what has begun there just now
                raise
        else:
            return True
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), f"{folder}/cgroup.subtree_control")


def _enabling(controllers: Mapping[Controller, float]) -> str:
    return " ".join(f"+{controller}" for controller in controllers)


def _movable_processes(folder: str) -> list[int]:
    """
    Raises:
        SandboxConfigurationError: it is not for us to rearrange it.
    """
    if not _is_delegated(folder):
        raise SandboxConfigurationError(
            f"there are processes in the cgroup {folder}, so it can have no bounded ones below it, and it"
            f" is not ours to rearrange; {_advice(folder)}"
        )
    processes = [int(process) for process in _read(folder, "cgroup.procs").split()]
    foreign = [process for process in processes if not _is_ours(process)]
    if foreign:
        raise SandboxConfigurationError(
            f"there are processes of others in the cgroup {folder} (process {foreign[0]}), so it can have no"
            f" bounded ones below it; {_advice(folder)}"
        )
    return processes


def _is_delegated(folder: str) -> bool:
    """Is this cgroup given to us, to do with it as we like (cgroup-v2.rst, "Delegation")?"""
    # systemd does not leave to a user all that it makes him the owner of. What it does leave, it marks since
    # its version 251 ("Control Group APIs and Delegation").
    if any(_attribute(folder, name) == b"1" for name in ("user.delegate", "trusted.delegate")):
        return True
    is_unit = folder.endswith((".scope", ".service", ".slice"))
    return os.stat(folder).st_uid == os.geteuid() and not (is_unit and _has_systemd())


def _attribute(folder: str, name: str) -> bytes:
    try:
        return os.getxattr(folder, name)
    except OSError:  # not there, or only root sees it
        return b""


def _is_ours(process: int) -> bool:
    try:
        return process != 0 and os.stat(f"/proc/{process}").st_uid == os.geteuid()
    except FileNotFoundError:  # it has ended
        return True


def _move(processes: Sequence[int], folder: str) -> None:
    programs = f"{folder}/{PROGRAMS}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(programs)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            _write(programs, "cgroup.procs", str(process))


# Why not.


def _sentence(error: OSError) -> str:
    where = os.path.dirname(error.filename)
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not make cgroups in {where}; {_advice(where)}"
    if error.errno == errno.EROFS:
        return (
            f"the cgroups in {where} are read-only, as in a container; start the container with cgroups that"
            " can be written (such as with --privileged), or limit the container itself"
        )
    if error.errno == errno.EINVAL:
        return f"{os.path.basename(error.filename)} cannot be set: what {where} is in may not have so much"
    return f"a cgroup cannot be made: {error.filename}: {error.strerror}"


def _advice(folder: str) -> str:
    is_root = os.geteuid() == 0
    if not is_root and not _is_unified(folder):  # version 1 is root's alone
        return "run the program as root"
    if _has_systemd():
        run = "systemd-run --scope" if is_root else "systemd-run --user --scope"
        return f"start the program with `{run} -p Delegate=yes PROGRAM`"
    if is_root:
        return "start the program in a cgroup of its own"
    return "run the program as root, or have root give this user a cgroup (cgroups(7), Delegation)"


def _not_handed_on(controller: Controller, folder: str) -> str:
    what = f"the {controller} controller is not handed on to the cgroup {folder}"
    if not os.access(folder, os.W_OK) or (_has_systemd() and os.geteuid() == 0):
        return f"{what}; {_advice(folder)}"
    if _has_systemd():
        return (
            f"{what}; have root write `[Service]` and `Delegate=cpu memory pids` into the file"
            " /etc/systemd/system/user@.service.d/delegate.conf, log in again, and start the program with"
            " `systemd-run --user --scope -p Delegate=yes PROGRAM`"
        )
    return f"{what}; write +{controller} to cgroup.subtree_control in all cgroups that this one is in"


def _nowhere(controller: Controller, mounts: Sequence[_Mount]) -> str:
    known = {name: rest for name, *rest in map(str.split, Path("/proc/cgroups").read_text().splitlines())}
    hierarchy, _, enabled = known.get(controller, ("0", "", "1"))
    if enabled == "0":
        return (
            f"the {controller} controller is switched off; start the machine with the kernel parameter"
            f" cgroup_enable={controller}"
        )
    # Version 1 has it, elsewhere; or version 2 is nowhere.
    if hierarchy != "0" or not any(mount.is_unified for mount in mounts):
        return (
            f"no cgroups with the {controller} controller are mounted here; have root mount them, usually"
            " with mount -t cgroup2 cgroup2 /sys/fs/cgroup"
        )
    return f"the kernel of this machine has no {controller} controller"


def _has_systemd() -> bool:
    return os.path.exists("/run/systemd/system")  # sd_booted(3)


# Their files.


def _controllers(folder: str) -> list[str]:
    return _read(folder, "cgroup.controllers").split()


def _read(folder: str, name: str) -> str:
    return Path(folder, name).read_text()


def _write(folder: str, name: str, value: str) -> None:
    path = f"{folder}/{name}"
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:  # which does not know what it was about
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)
