"""What is left where no namespaces can be made: a kernel that has itself confined before it begins.

It sees this machine's files, as far as Landlock lets it (landlock(7)), and has no root, process or network
namespace of its own. What that leaves open is said in :data:`NOT_ENFORCED`. It also takes away what code may
expect: pseudo-terminals, Unix sockets, and shared memory with a name, on which the locks and pools of
:mod:`multiprocessing` are built.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from code_sandboxes.isolation.memory_files import memory_file
from code_sandboxes.isolation.seccomp import deny_filter
from code_sandboxes.isolation.system import SYSTEM

__all__ = ["NOT_ENFORCED", "SCOPES", "landlocked", "not_enforced", "why_not"]

NOT_ENFORCED = (
    "code runs among the files and processes of this machine: of what its user can reach it can learn names, "
    "sizes, dates and that something changes, of the machine its mounts, connections and addresses, and of "
    "what its user owns it can change modes and dates; it cannot read, write, make or remove anything that "
    "is not its own or the system's"
)
"""What code can still do, a sentence for people."""

_CONFINE = str(Path(__file__).parent.parent / "guest" / "confine.py")

# The first version of Landlock's interface with which no file outside can be truncated.
_NEEDED = 3

SCOPES = 6
"""The first version with which abstract sockets and processes of others are out of reach."""

# What programs need to start, and nothing that is a secret: no shadow, no private keys, no machine-id.
# It is more than in an enclosure (bubblewrap.py): there some of these files are written for it.
_ETC = (
    "alternatives",
    "ca-certificates",
    "debian_version",
    "fonts",
    "gai.conf",
    "group",
    "host.conf",
    "hosts",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "localtime",
    "mime.types",
    "nsswitch.conf",
    "os-release",
    "passwd",
    "pki/ca-trust/extracted",
    "pki/tls/certs",
    "protocols",
    "resolv.conf",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
    "timezone",
)
_PROC = (
    "cpuinfo",
    "loadavg",
    "meminfo",
    "self",
    "stat",
    "sys/kernel/ngroups_max",
    "sys/kernel/osrelease",
    "sys/kernel/pid_max",
    "sys/vm/overcommit_memory",
    "uptime",
    "version",
)
_SYS = ("devices/system/cpu", "devices/system/node", "kernel/mm/transparent_hugepage")
_DEVICES = ("/dev/full", "/dev/null", "/dev/random", "/dev/urandom", "/dev/zero")


def why_not() -> str:
    """Why nothing can be confined like this here; empty if it can."""
    version = _version()
    if version >= _NEEDED:
        return ""
    return (
        f"version {_NEEDED} of Landlock is needed (Linux 6.2, with 'landlock' among the security modules of "
        f"its lsm= option), and this machine has {f'version {version}' if version else 'none'}"
    )


def not_enforced() -> str:
    """:data:`NOT_ENFORCED`, and what this machine's version of Landlock leaves open besides."""
    if _version() >= SCOPES:
        return NOT_ENFORCED
    return f"{NOT_ENFORCED}; it can signal and end processes of its user (this needs Linux 6.12)"


def _version() -> int:
    if sys.platform != "linux":
        return 0
    from code_sandboxes.guest import confine  # which elsewhere cannot be imported

    return confine.landlock_version()


def landlocked(
    command: Sequence[str],
    *,
    readable: Sequence[str],
    writable: Sequence[str],
    limits: Mapping[str, int],
    block_inet: bool,
    uid: int = -1,
    gid: int = -1,
) -> tuple[list[str], int]:
    """What to execute so that *command* runs confined: an argument vector, and a descriptor to hand to it.

    The descriptor is the caller's to close. The vector ends with status 126 and one line on standard error
    where something is not possible; then nothing of *command* has run.

    Args:
        command: a program, found on the ``PATH`` that the process will have, and its arguments.
        readable: files and folders, absolute, besides the system's. They must be there.
        writable: files and folders, absolute; there code can do everything. They must be there.
        limits: as in getrlimit(2): ``{"nproc": 64, "nofile": 4096, "fsize": ..., "core": 0}``.
        block_inet: refuse sockets of IPv4 and IPv6, and so the network. Unix sockets always are refused:
            by a path they would reach whoever listens on this machine.
        uid: the user to be, and *gid* the group, where this is root; -1 leaves them.
    """
    document = {
        "readable": [*_system(), *readable],
        "writable": [*_DEVICES, *writable],
        "limits": dict(limits),
        "uid": uid,
        "gid": gid,
        "filter": base64.b64encode(
            deny_filter(block_inet=block_inet, block_unix=True, block_others=True)
        ).decode(),
        "argv": list(command),
    }
    descriptor = memory_file(json.dumps(document).encode())
    return [sys.executable, "-I", "-S", _CONFINE, str(descriptor)], descriptor


def _system() -> list[str]:
    """What of the system there is on this machine."""
    below = {"/etc": _ETC, "/proc": _PROC, "/sys": _SYS}
    paths = [*SYSTEM, *(f"{folder}/{name}" for folder, names in below.items() for name in names)]
    return [path for path in paths if os.path.exists(path)]
