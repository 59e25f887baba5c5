"""What can keep code apart here: what this process, as this user, on this machine, gets of the kernel.

It is tried, not guessed: bubblewrap is run as it is run for a sandbox. Where it fails, what it says is
translated into what the system forbids, and what would mend that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.isolation import cgroups
from code_sandboxes.isolation.bubblewrap import arguments, data_files, environment
from code_sandboxes.isolation.landlock import why_not
from code_sandboxes.isolation.memory_files import memory_file
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.isolation.seccomp import deny_filter

__all__ = ["Facts", "probe"]

# Seconds; it takes hundredths of one.
_PATIENCE = 10.0

_OLDEST = "0.7"
"""The first version of bubblewrap that knows all of the options that a sandbox is made with."""

# landlock_create_ruleset(2), of the same number on every machine, and its flag that asks for the version.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_CREATE_RULESET_VERSION = 1

_SIZE = 2**20


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is; a reason is nothing where there is no reason against it, and else a sentence.

    Args:
        bubblewrap: why it cannot be used, or not with all that is used with it.
        bubblewrap_path: where it is, "" if nowhere; the same for its version.
        landlock: its version (ABI), 0 if there is none.
        landlock_reason: why it cannot be used.
        seccomp: why system calls cannot be filtered.
        cgroups: for memory, cpu and pids, why they cannot be limited.
    """

    bubblewrap: str
    bubblewrap_path: str
    bubblewrap_version: str
    landlock: int
    landlock_reason: str
    seccomp: str
    cgroups: Mapping[cgroups.Controller, str]


@cache
def probe() -> Facts:
    """Find it out, once; it takes less than 0.1 s, and leaves nothing behind."""
    path = shutil.which("bwrap") or ""
    landlock, landlock_reason = _landlock()
    seccomp = _seccomp()
    return Facts(
        bubblewrap=_bubblewrap(path) or seccomp,
        bubblewrap_path=path,
        bubblewrap_version=_version(path) if path else "",
        landlock=landlock,
        landlock_reason=landlock_reason or seccomp,
        seccomp=seccomp,
        cgroups=cgroups.enforceable(),
    )


# Bubblewrap.


def _bubblewrap(path: str) -> str:
    if sys.platform != "linux":
        return "bubblewrap needs the namespaces of Linux"
    if not path:
        return f"bubblewrap is not installed; install it ({_package('bubblewrap')})"
    if missing := _missing_capabilities():
        return (
            f"bubblewrap cannot be used: this root has no {', '.join(missing)}, as in a container;"
            f" {_OTHER_CONTAINER}"
        )
    returned, said = _run_bubblewrap(path)
    if returned == 0:
        return ""
    return _translated(path, said or f"it ended with {returned} and said nothing")


# What root needs (capabilities(7)), and their numbers (linux/capability.h).
_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_ADMIN": 21,
}


def _missing_capabilities() -> list[str]:
    if os.geteuid() != 0:  # who makes a user namespace has all in it
        return []
    effective = int(_status("CapEff"), 16)
    return [name for name, number in _CAPABILITIES.items() if not effective >> number & 1]


def _run_bubblewrap(path: str) -> tuple[int, str]:
    """Make what is made for a sandbox, with nothing in it."""
    plan = Plan(method="bubblewrap", network="none")
    as_root = os.geteuid() == 0
    with contextlib.ExitStack() as opened:
        data = {}
        for name, content in data_files(plan, 1).items():
            data[name] = memory_file(content)
            opened.callback(os.close, data[name])
        info = memory_file(b"")
        opened.callback(os.close, info)
        command = arguments(plan, program=path, as_root=as_root, sizes=(_SIZE, _SIZE), data=data, info=info)
        return _run([*command, "true"], pass_fds=(info, *data.values()))


def _run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str]:
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            env=environment(),
            cwd="/",
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return -1, f"it did not end within {_PATIENCE:g} s"
    except OSError as error:
        return -1, f"it cannot be run: {error.strerror}"
    said = ended.stdout.decode(errors="replace").strip()
    return ended.returncode, said[-300:].removeprefix("bwrap: ")


def _version(path: str) -> str:
    """As it says, such as "0.8.0"; "" if it says nothing like it."""
    found = re.search(r"\d+(\.\d+)+", _run([path, "--version"])[1])
    return found[0] if found else ""


def _translated(path: str, said: str) -> str:
    """Why bubblewrap fails, from what it says about it (bubblewrap.c, network.c)."""
    if option := re.search(r"Unknown option (\S+)", said):
        version = _version(path) or "of no known version"
        return f"bubblewrap {version} ({path}) has no {option[1]}; install {_OLDEST} or newer"
    for pattern, reason in _REASONS.items():
        if re.search(pattern, said):
            # The rest of it is advice: for another system, or in the reason already.
            return f"bubblewrap cannot {reason()} (it says: {re.split('[,.;] ', said)[0]})"
    return f"bubblewrap does not work: {said}"


def _no_user_namespace() -> str:
    what = "make namespaces" if os.geteuid() == 0 else "make a user namespace"
    if _sysctl("kernel/unprivileged_userns_clone") == "0" and os.geteuid() != 0:
        return f"{what}: only root may; as root: sysctl -w kernel.unprivileged_userns_clone=1"
    if _is_restricted_by_apparmor() and os.geteuid() != 0:
        return f"{what}: {_APPARMOR}"
    if _is_filtered():
        return f"{what}: a filter of system calls forbids it, as in a container; {_OTHER_CONTAINER}"
    return f"{what}: the system forbids it to this user, such as by its security module, or in a chroot"


def _no_more_namespaces() -> str:
    kinds = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
    for kind in kinds:
        if _sysctl(f"user/max_{kind}_namespaces") == "0":
            return (
                f"make a namespace: there may be none (user.max_{kind}_namespaces is 0);"
                f" as root: sysctl -w user.max_{kind}_namespaces=10000"
            )
    return (
        "make a namespace: there are too many, or too many in one another, as in another sandbox"
        " (user.max_*_namespaces, namespaces(7))"
    )


def _no_rights_inside() -> str:
    if _is_restricted_by_apparmor():
        return f"use the namespace that it made: {_APPARMOR}"
    return "use the namespace that it made: a security module of the system forbids it"


def _capabilities_of_a_user() -> str:
    return (
        "be run by a user who has capabilities without being root; start the program without them"
        " (capabilities(7), ambient; setpriv --ambient-caps=-all --inh-caps=-all PROGRAM)"
    )


def _no_proc() -> str:
    return (
        "mount /proc: parts of that of this machine are covered, as in a container; start the container with"
        " all of it (Docker: --security-opt systempaths=unconfined)"
    )


_OTHER_CONTAINER = (
    "run it outside of it, or start the container so that it may (Docker: --security-opt seccomp=unconfined"
    " --security-opt apparmor=unconfined --security-opt systempaths=unconfined, as root also"
    " --cap-add SYS_ADMIN --cap-add NET_ADMIN)"
)
_APPARMOR = (
    "AppArmor forbids it (kernel.apparmor_restrict_unprivileged_userns is 1); give bwrap a profile that"
    " allows userns, or as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
)

# In this order.
_REASONS: Mapping[str, Callable[[], str]] = {
    r"\(ENOSPC\)": _no_more_namespaces,
    r"kernel does not support user namespaces": lambda: (
        "make a user namespace: the kernel was built without them (CONFIG_USER_NS)"
    ),
    r"No permissions to creat|Creating new namespace failed: (Operation not perm|Permission den)": (
        _no_user_namespace
    ),
    r"setting up [ug]id map|loopback: Failed|Failed to make / slave": _no_rights_inside,
    r"Can't mount proc": _no_proc,
    r"Unexpected capabilities": _capabilities_of_a_user,
}


def _sysctl(name: str) -> str:
    """ "" where there is none of that name."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def _is_restricted_by_apparmor() -> bool:
    return _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1"


def _is_filtered() -> bool:
    """Does a filter of system calls apply to this process (proc_pid_status(5))?"""
    return _status("Seccomp") == "2"


def _status(name: str) -> str:
    """What the system says about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def _package(name: str) -> str:
    for installer, command in _INSTALLERS.items():
        if shutil.which(installer, path=f"{os.defpath}:/usr/sbin:/sbin"):
            return f"as root: {command} {name}"
    return f"the package {name}"


_INSTALLERS = {
    "apt-get": "apt-get install",
    "dnf": "dnf install",
    "zypper": "zypper install",
    "pacman": "pacman -S",
    "apk": "apk add",
}


# The kernel's own.


def _landlock() -> tuple[int, str]:
    if sys.platform != "linux":
        return 0, "Landlock is Linux's"
    libc = ctypes.CDLL(None, use_errno=True)
    version = int(libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION))
    if version > 0:
        return version, why_not()
    why = ctypes.get_errno()
    if why == errno.EOPNOTSUPP:
        return 0, "Landlock is switched off; put landlock into the kernel parameter lsm= of the machine"
    if why == errno.ENOSYS and not _is_filtered():
        return 0, "the kernel has no Landlock; it takes Linux 5.13 or newer, with CONFIG_SECURITY_LANDLOCK"
    return 0, f"a filter of system calls forbids Landlock, as in a container ({os.strerror(why)})"


def _seccomp() -> str:
    if sys.platform != "linux":
        return "only Linux filters system calls"
    if sys.maxsize < 2**32:
        return f"no filter is known for a 32-bit Python (on {platform.machine()})"
    if not os.path.exists("/proc/sys/kernel/seccomp/actions_avail"):  # seccomp(2), "/proc interfaces"
        return "the kernel does not filter system calls; it takes Linux 4.14 with CONFIG_SECCOMP_FILTER"
    try:
        deny_filter()
    except SandboxConfigurationError as error:
        return str(error)
    return ""
