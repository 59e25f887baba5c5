"""Give up, for good, what code in a sandbox must not have: the process does it to itself.

Used by ``init.py`` beside it, in an enclosure. Where there are no enclosures it is run as a script,
``python -I -S confine.py <descriptor>``, and then is the program that the document behind the descriptor
names, after it has given up what the document says.

What fails raises OSError, with a sentence that says what it was. Nothing here can be undone, so whoever
catches such an error must not go on to run code.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
from struct import pack

# linux/prctl.h
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

# linux/seccomp.h; seccomp(2) has no function in the C library.
SECCOMP = {"x86_64": 317, "aarch64": 277}
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_TSYNC = 1
INSTRUCTION = 8  # bytes of a struct sock_filter

CLONE_NEWUSER = 0x10000000  # linux/sched.h

CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 (linux/capability.h)
MOST_CAPABILITIES = 64

# sys/mount.h; each of the first, where statvfs(3) has it, too, has the same number there.
MS_KEPT = 0x1 | 0x2 | 0x4 | 0x8  # MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC
MS_REMOUNT = 0x20
MS_RDONLY, MS_BIND = 0x1, 0x1000

# linux/landlock.h; these calls have one number on all machines.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_SCOPES = 0x1 | 0x2  # abstract Unix sockets, signals
FIRST_WITH_SCOPES = 6  # Linux 6.12
# Before Linux 6.2 files can be truncated that cannot be written.
FIRST_WITH_TRUNCATE = 3

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 0x1, 0x2, 0x4, 0x8
MAKE_CHAR, MAKE_BLOCK = 0x40, 0x800
TRUNCATE, IOCTL_DEV = 0x4000, 0x8000
READING = EXECUTE | READ_FILE | READ_DIR
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
# All that there are, by the version from which they do.
RIGHTS = {5: 0xFFFF, 3: 0x7FFF}

NOT_POSSIBLE = 126  # of the shell: "found, but could not be executed"

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
libc.syscall.argtypes = [ctypes.c_long] * 5
libc.syscall.restype = ctypes.c_long
libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
libc.capset.argtypes = [ctypes.c_char_p] * 2


def no_new_privileges() -> None:
    """Let no program that is executed have more rights than this process (prctl(2), PR_SET_NO_NEW_PRIVS)."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "could not give up what setuid programs gain")


def hide(hidden: bool = True) -> None:
    """Let nobody with the same user id look into this process: not its memory, descriptors or environment.

    It ends with execve(2), and goes on in a child (prctl(2), PR_SET_DUMPABLE).
    """
    check(libc.prctl(PR_SET_DUMPABLE, int(not hidden), 0, 0, 0), "could not hide from the same user")


def filter_system_calls(program: bytes) -> None:
    """Let the kernel ask *program*, an array of ``struct sock_filter``, at each system call of any thread.

    It needs :func:`no_new_privileges` (seccomp(2)).
    """
    number = SECCOMP.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"cannot filter system calls on the machine {os.uname().machine!r}")
    if not program or len(program) % INSTRUCTION:
        raise OSError(errno.EINVAL, f"cannot filter system calls: {len(program)} bytes are no program")
    instructions = ctypes.create_string_buffer(program, len(program))
    description = pack("@HP", len(program) // INSTRUCTION, ctypes.addressof(instructions))
    buffer = ctypes.create_string_buffer(description, len(description))
    check(
        libc.syscall(
            number, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, ctypes.addressof(buffer), 0
        ),  # more than 0: the thread that has another filter
        "could not filter system calls",
    )


def drop_privileges(uid: int, gid: int) -> None:
    """Be the user *uid* and no member of any other group than *gid*, without capabilities.

    With -1 for both only the capabilities are dropped, as in a user namespace, where there is no other user.
    """
    drop_bounding_set()
    check(
        libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "could not drop ambient capabilities"
    )
    if uid >= 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    check(libc.capset(pack("@Ii", CAPABILITY_VERSION, 0), bytes(24)), "could not drop capabilities")
    check_privileges(uid, gid)


def map_user(uid: int, gid: int) -> None:
    """Be *uid* and *gid* in a user namespace below the present one; it owns nothing (user_namespaces(7))."""
    outside = os.geteuid(), os.getegid()
    check(libc.unshare(CLONE_NEWUSER), "could not enter a user namespace")
    for name, content in (
        ("setgroups", "deny"),
        ("gid_map", f"{gid} {outside[1]} 1"),
        ("uid_map", f"{uid} {outside[0]} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def drop_bounding_set() -> None:
    """Of the capabilities that an executed program may gain leave none, where none could be gained anyway."""
    for capability in range(MOST_CAPABILITIES):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            continue
        if ctypes.get_errno() == errno.EINVAL:  # there is no such capability
            return
        if libc.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1:
            return
        check(-1, "could not drop the capabilities that programs may gain")


def check_privileges(uid: int, gid: int) -> None:
    """
    Raises:
        OSError: there are more than :func:`drop_privileges` leaves.
    """
    status = read_status()
    capabilities = ["CapInh", "CapPrm", "CapEff", "CapAmb"]
    if status["NoNewPrivs"] != ["1"]:
        capabilities.append("CapBnd")
    left = [f"{name}={status[name][0]}" for name in capabilities if int(status[name][0], 16)]
    if uid >= 0:
        identity = {"Uid": [str(uid)] * 4, "Gid": [str(gid)] * 4, "Groups": []}
        left += [f"{name}={' '.join(status[name])}" for name in identity if status[name] != identity[name]]
    if left:
        raise OSError(errno.EPERM, f"could not drop privileges: there is still {', '.join(left)}")


def read_status() -> dict[str, list[str]]:
    """What proc(5) says of this process in ``/proc/self/status``, by name."""
    with open("/proc/self/status") as file:
        lines = [line.partition(":") for line in file]
    return {name: value.split() for name, _, value in lines}


def limit_resources(limits: dict[str, int]) -> None:
    """Set limits as getrlimit(2) has them, ``{"nproc": 64, ...}``, once for all; what is lower stays."""
    for name, wanted in limits.items():
        which = getattr(resource, f"RLIMIT_{name.upper()}", None)
        if which is None or wanted < 0:
            raise OSError(errno.EINVAL, f"no such limit: {name!r}, {wanted}")
        present = resource.getrlimit(which)[1]
        limit = wanted if present == resource.RLIM_INFINITY else min(wanted, present)
        try:
            resource.setrlimit(which, (limit, limit))
        except ValueError as error:  # EINVAL, too
            raise OSError(errno.EINVAL, f"could not limit {name!r} to {limit}: {error}") from error


def bound_files(path: str, size: int, inodes: int) -> None:
    """Leave the tmpfs that is mounted at *path* room for *size* bytes and *inodes* files (tmpfs(5))."""
    kept = os.statvfs(path).f_flag & MS_KEPT
    what = f"could not limit what can be written to {path!r} to {size} bytes and {inodes} files"
    options = f"size={size},nr_inodes={inodes}".encode()
    check(libc.mount(b"none", os.fsencode(path), None, MS_REMOUNT | kept, options), what)
    check_files(path, size, inodes)
    if os.statvfs(path).f_flag & MS_KEPT != kept:
        raise OSError(errno.EINVAL, f"{what}: it is mounted otherwise now")


def check_files(path: str, size: int, inodes: int) -> None:
    """
    Raises:
        OSError: the tmpfs that is mounted at *path* is not of that size.
    """
    status = os.statvfs(path)
    blocks = -(-size // status.f_frsize)
    if (status.f_blocks, status.f_files) != (blocks, inodes):
        raise OSError(
            errno.EINVAL,
            f"what can be written to {path!r} is not limited to {size} bytes and {inodes} files: it is"
            f" {status.f_blocks * status.f_frsize}, {status.f_files}",
        )


def bound_terminals(path: str, most: int) -> None:
    """Leave the devpts that is mounted at *path* no more than *most* terminals (devpts.rst)."""
    kept = os.statvfs(path).f_flag & MS_KEPT
    options = f"mode=620,ptmxmode=666,max={most}".encode()  # what is not said would be as by default
    what = f"could not limit the terminals of {path!r} to {most}"
    check(libc.mount(b"none", os.fsencode(path), None, MS_REMOUNT | kept, options), what)


def make_read_only(path: str) -> None:
    """Let nothing at and below *path* be written, whatever its permissions say (mount(2))."""
    what = f"could not make {path!r} read-only"
    name = os.fsencode(path)
    kept = os.statvfs(path).f_flag & MS_KEPT
    check(libc.mount(name, name, None, MS_BIND, None), what)
    check(libc.mount(b"none", name, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept, None), what)
    if not os.statvfs(path).f_flag & MS_RDONLY:
        raise OSError(errno.EROFS, f"{what}: it is not")


def bound_user(limits: dict[str, int]) -> None:
    """Let a user have no more in this user namespace and those below, ``{"max_inotify_instances": 16}``."""
    for name, limit in limits.items():
        with open(f"/proc/sys/user/{name}", "w") as file:
            file.write(str(limit))


# Landlock (landlock(7)), which any process may use


def landlock_version() -> int:
    """Of the interface (its "ABI"); 0 where there is none, or it is not enabled."""
    version: int = libc.syscall(LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION, 0)
    return max(version, 0)


def restrict_files(readable: list[str], writable: list[str]) -> None:
    """Let files be read and executed below *readable* only, and changed below *writable* only.

    What is open stays open. Not covered are names, sizes and dates, and who may do what with a file:
    stat(2), chmod(2), chown(2), utime(2), setxattr(2); nor connecting to a Unix socket by its path.
    """
    version = landlock_version()
    if version < FIRST_WITH_TRUNCATE:
        raise OSError(
            errno.EOPNOTSUPP,
            f"cannot restrict files: version {FIRST_WITH_TRUNCATE} of Landlock is needed (Linux 6.2, and "
            f"'landlock' among the kernel's lsm=), this kernel has {version or 'none'}",
        )
    handled = next(rights for since, rights in RIGHTS.items() if version >= since)
    ruleset = make_ruleset(pack("@Q", handled))
    try:
        for path in readable:
            allow(ruleset, path, handled & READING)
        for path in writable:
            allow(ruleset, path, handled & ~(MAKE_CHAR | MAKE_BLOCK))
        restrict(ruleset)
    finally:
        os.close(ruleset)


def scope_out() -> None:
    """Reach no abstract Unix socket, and signal no process, of those that have not done this with us."""
    version = landlock_version()
    if version < FIRST_WITH_SCOPES:
        raise OSError(
            errno.EOPNOTSUPP,
            f"cannot shut off other processes: version {FIRST_WITH_SCOPES} of Landlock is needed (Linux "
            f"6.12, and 'landlock' among the kernel's lsm=), this kernel has {version or 'none'}",
        )
    ruleset = make_ruleset(pack("@QQQ", 0, 0, LANDLOCK_SCOPES))
    try:
        restrict(ruleset)
    finally:
        os.close(ruleset)


def make_ruleset(attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset: int = libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.addressof(buffer), len(attributes), 0, 0)
    check(min(ruleset, 0), "could not make Landlock rules")
    return ruleset


def allow(ruleset: int, path: str, rights: int) -> None:
    """Allow *rights* below the folder *path*, or those of them that files have, for a file."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            rights &= OF_FILES
        rule = pack("=Qi", rights, descriptor)
        buffer = ctypes.create_string_buffer(rule, len(rule))
        result = libc.syscall(
            LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, ctypes.addressof(buffer), 0
        )
        check(result, f"could not allow the use of {path!r}")
    finally:
        os.close(descriptor)


def restrict(ruleset: int) -> None:
    """From now on, in this thread and its children: so there must be no other."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise OSError(
            errno.EBUSY, "could not apply Landlock rules: other threads run that would be free of them"
        )
    check(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0, 0, 0), "could not apply Landlock rules")


def check(result: int, what: str) -> None:
    """
    Raises:
        OSError: a function of the C library returned something else than 0.
    """
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


# The script


def confine(descriptor: int) -> list[str]:
    """Do what the document behind *descriptor* says; returns the program to be, and its arguments."""
    import json
    import signal
    from binascii import a2b_base64

    with os.fdopen(descriptor, "rb") as file:
        document = json.load(file)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python; what is ignored is inherited
        signal.signal(ignored, signal.SIG_DFL)
    limit_resources(document["limits"])
    no_new_privileges()
    drop_privileges(document["uid"], document["gid"])
    hold(document["readable"])
    restrict_files(document["readable"], document["writable"])
    if landlock_version() >= FIRST_WITH_SCOPES:
        scope_out()
    filter_system_calls(a2b_base64(document["filter"]))
    argv: list[str] = document["argv"]
    return argv


def hold(paths: list[str]) -> None:
    """Keep those of *paths* open that are procfs's, here and in the program that this will be.

    What is allowed is allowed of an inode, and of those procfs makes another whenever the name of one was
    dropped from the kernel's cache, which it is not while a descriptor refers to it.
    """
    for path in paths:
        if path.startswith("/proc/"):
            os.set_inheritable(os.open(path, os.O_PATH), True)


def find(program: str) -> str:
    """The path of *program*, as execvp(3) finds it; :func:`os.execvp` would import, which may fail by now."""
    if "/" in program:
        return program
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(folder, program)
        if os.access(path, os.X_OK):
            return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)


def main() -> int:
    try:
        argv = confine(int(sys.argv[1]))
        os.execv(find(argv[0]), argv)
    except Exception as error:  # whatever it is, the program must not start
        reason = " ".join(str(error).split())
        os.write(2, f"the sandbox could not be made: {reason}\n".encode("utf-8", "replace"))
        return NOT_POSSIBLE


if __name__ == "__main__":
    sys.exit(main())
