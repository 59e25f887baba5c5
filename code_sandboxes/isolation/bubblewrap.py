"""The command line of bubblewrap that makes an enclosure (bwrap(1)): what is in it, and what is not.

The root is a tmpfs of limited size, in which everything can be written that is not mounted; the system and
the Python installations are there read-only; of the rest of this machine nothing is.
"""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from code_sandboxes.guest.init import SHARED_MEMORY
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.isolation.system import MERGED, UNMERGED, is_below

__all__ = [
    "HOME",
    "INIT",
    "USER",
    "arguments",
    "data_files",
    "environment",
    "init_command",
    "owned",
    "users",
]

INIT = str(Path(__file__).parent.parent / "guest" / "init.py")

HOME = "/home/sandbox"

USER = 10001
"""Who code is where it has a user namespace; on this machine it is the caller."""

_DATA = "/data"

# What is the code's own; all of it in the tmpfs that is the root.
_FOLDERS = ("/tmp", "/var/tmp", "/run", HOME, _DATA)

# A name here is the start of a path there: what programs need to start, and nothing that says much. It is
# less than where there is no enclosure (landlock.py): who there is, and how names are resolved, is written.
_ETC = (
    "alternatives",
    "ca-certificates",
    "debian_version",
    "fonts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "os-release",
    "pki/ca-trust/extracted",
    "pki/tls",
    "protocols",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
    "timezone",
)

# Who resolves names needs these, and they tell about the machine's network.
_RESOLVING = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf")

# The second so that in a namespace below this one somebody can be who is root here (user_namespaces(7)), the
# third so that what there may be of some things can be limited there.
_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETFCAP", "CAP_SYS_RESOURCE")
_CAPABILITIES_OF_ROOT = ("CAP_CHOWN", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN")


def environment() -> dict[str, str]:
    """Bubblewrap's own: the first process of the enclosure has it, too."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def users(uid: int) -> dict[str, bytes]:
    """The files that say who there is in a sandbox in which code is *uid*."""
    passwd = f"root:x:0:0::/root:/usr/sbin/nologin\nsandbox:x:{uid}:{uid}::{HOME}:/bin/sh\n"
    group = f"root:x:0:\nsandbox:x:{uid}:\n"
    return {"/etc/passwd": passwd.encode(), "/etc/group": group.encode()}


def data_files(plan: Plan, uid: int) -> dict[str, bytes]:
    """Files that are not this machine's, by their path in the enclosure."""
    files = users(uid)
    if plan.network == "all":
        return files | {path: Path(path).read_bytes() for path in _RESOLVING if os.path.isfile(path)}
    return files | {"/etc/hosts": b"127.0.0.1 localhost sandbox\n::1 localhost\n"}


def arguments(
    plan: Plan, *, program: str, as_root: bool, sizes: tuple[int, int], data: dict[str, int], info: int
) -> list[str]:
    """What to execute, up to the ``--`` after which the first process of the enclosure comes.

    Args:
        program: the path of bubblewrap.
        as_root: it is run by root, so that there is no user namespace, and who is inside gives up being root.
        sizes: bytes of the root and of the shared memory.
        data: descriptors of :func:`data_files`, by path.
        info: a descriptor to which it writes the first process's number.
    """
    return [
        program,
        *_namespaces(plan, as_root),
        *("--info-fd", str(info), "--new-session", "--die-with-parent", "--as-pid-1", "--clearenv"),
        *("--setenv", "PATH", environment()["PATH"]),
        *_root(*sizes),
        *_system(data),
        *_mounts(plan),
        *("--perms", "0755", "--dir", plan.working_dir),
        *("--remount-ro", "/dev", "--chdir", "/"),
        "--",
    ]


def _namespaces(plan: Plan, as_root: bool) -> Iterator[str]:
    yield from ("--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--hostname", "sandbox")
    if plan.network != "all":
        yield "--unshare-net"
    if not as_root:
        yield from ("--unshare-user", "--uid", "0", "--gid", "0")
    for capability in _CAPABILITIES_OF_ROOT if as_root else _CAPABILITIES:
        yield from ("--cap-add", capability)


def _root(size: int, shared_memory: int) -> Iterator[str]:
    yield from ("--size", str(size), "--perms", "0755", "--tmpfs", "/")  # the default has no size
    yield from ("--proc", "/proc", "--dev", "/dev")
    yield from ("--size", str(shared_memory), "--perms", "1777", "--tmpfs", SHARED_MEMORY)
    for folder in _FOLDERS:
        yield from _parents(folder)
        yield from ("--perms", "1777" if folder in ("/tmp", "/var/tmp") else "0755", "--dir", folder)


def _system(data: dict[str, int]) -> Iterator[str]:
    for folder in UNMERGED:
        if os.path.isdir(folder):
            yield from _parents(folder)
            yield from ("--ro-bind", folder, folder)
    for folder in MERGED:
        if os.path.islink(folder):
            yield from ("--symlink", os.readlink(folder), folder)
        elif os.path.isdir(folder):
            yield from ("--ro-bind", folder, folder)
    for name in _ETC:
        path = f"/etc/{name}"
        if os.path.exists(path):
            yield from _parents(path)
            yield from ("--ro-bind", os.path.realpath(path), path)
    for path, descriptor in data.items():
        yield from ("--perms", "0644", "--ro-bind-data", str(descriptor), path)


def _mounts(plan: Plan) -> Iterator[str]:
    for mount in sorted(plan.mounts, key=lambda mount: mount.target):  # what is further down comes later
        yield from _parents(mount.target)
        yield from ("--bind" if mount.writable else "--ro-bind", mount.source, mount.target)


def _parents(path: str) -> Iterator[str]:
    # Those that bubblewrap makes by itself only root could enter, where root makes them.
    folders = []
    while (path := posixpath.dirname(path)) != "/":
        folders.append(path)
    for folder in reversed(folders):
        yield from ("--perms", "0755", "--dir", folder)


def owned(plan: Plan) -> list[str]:
    """Folders for the code's user, where that is another one than who makes them; none of this machine's."""
    folders = ["/", SHARED_MEMORY, *_FOLDERS, plan.working_dir]
    return [f for f in folders if not any(is_below(f, mount.target) for mount in plan.mounts)]


def init_command(plan: Plan, control: int) -> Sequence[str]:
    """The first process of an enclosure; *control* is its end of the socket to the host."""
    # The program's: the keeper may be another installation's, which is not to be seen in there.
    return (plan.python or sys.executable, "-I", "-S", plan.first or INIT, str(control))
