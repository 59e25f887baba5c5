"""Refuse system calls that code in a sandbox has no need of: a filter that the kernel runs at each call.

It refuses what is listed here and lets the rest pass, but for calls that are newer than the list: what they
are good for nobody has looked at, and every libc goes on without them. What is listed is what Docker's
profile refuses to a process without privileges (moby/profiles, seccomp/default.json), and more where nobody
who works with data would miss it.

The filter is a program of the classic BPF (Linux, Documentation/networking/filter.rst), which sees the
number of the call and its arguments, and not what they point to (seccomp(2)). The kernel keeps a table of
the calls that always pass (since 5.11), so that these cost nothing.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from code_sandboxes.errors import SandboxConfigurationError

__all__ = ["CORE", "deny_filter"]

CORE = 1
"""Bytes that a core file may have: the limit (``RLIMIT_CORE``) with which nobody is handed one."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Calls that are refused for one reason.

    Args:
        answer: the error they fail with. ENOSYS, "there is no such call", where kernels are built without it
            and programs are prepared for that; EPERM where it is a matter of privilege.
        calls: their numbers on x86_64 and aarch64; None where there is no such call.
    """

    why: str
    answer: int
    calls: Mapping[str, tuple[int, int | None]]


_REFUSED = (
    _Group(
        "reads or steers another process, or tells the addresses of the kernel",
        errno.EPERM,
        {
            "kcmp": (312, 272),
            "perf_event_open": (298, 241),
            "pidfd_getfd": (438, 438),
            "process_madvise": (440, 440),
            "process_vm_readv": (310, 270),
            "process_vm_writev": (311, 271),
            "ptrace": (101, 117),
        },
    ),
    _Group(
        "is a large part of the kernel where the ways out have been found, year after year",
        errno.EPERM,
        {
            "bpf": (321, 280),
            "io_uring_enter": (426, 426),
            "io_uring_register": (427, 427),
            "io_uring_setup": (425, 425),
            "userfaultfd": (323, 282),
            "vmsplice": (278, 75),
        },
    ),
    _Group(
        "gives a file a mode that stands in memory, where nobody can look at it before",
        errno.ENOSYS,
        {"openat2": (437, 437)},
    ),
    _Group(
        "is shared by everybody on the machine: keys, and the number of pending asynchronous reads",
        errno.ENOSYS,
        {
            "add_key": (248, 217),
            "io_setup": (206, 0),
            "keyctl": (250, 219),
            "request_key": (249, 218),
        },
    ),
    _Group(
        "changes what is seen of the file systems",
        errno.EPERM,
        {
            "chroot": (161, 51),
            "mount": (165, 40),
            "pivot_root": (155, 41),
            "quotactl": (179, 60),
            "quotactl_fd": (443, 443),
            "umount2": (166, 39),
        },
    ),
    _Group(
        "does the same in the newer way: whoever wants it tries the older then, and is told EPERM",
        errno.ENOSYS,
        {
            "fsconfig": (431, 431),
            "fsmount": (432, 432),
            "fsopen": (430, 430),
            "fspick": (433, 433),
            "listmount": (458, 458),
            "mount_setattr": (442, 442),
            "move_mount": (429, 429),
            "open_tree": (428, 428),
            "open_tree_attr": (467, 467),
            "statmount": (457, 457),
        },
    ),
    _Group(
        "reaches files by other ways than their paths, or watches those of everybody",
        errno.EPERM,
        {
            "fanotify_init": (300, 262),
            "name_to_handle_at": (303, 264),
            "open_by_handle_at": (304, 265),
        },
    ),
    _Group(
        "enters or makes namespaces, in which code has privileges again; see also clone() below",
        errno.EPERM,
        {
            "setns": (308, 268),
            "unshare": (272, 97),
        },
    ),
    _Group(
        "has its flags in memory, where a filter cannot read them: every libc falls back to clone()",
        errno.ENOSYS,
        {
            "clone3": (435, 435),
        },
    ),
    _Group(
        "is the administrator's",
        errno.EPERM,
        {
            "acct": (163, 89),
            "adjtimex": (159, 171),
            "clock_adjtime": (305, 266),
            "clock_settime": (227, 112),
            "delete_module": (176, 106),
            "finit_module": (313, 273),
            "init_module": (175, 105),
            "ioperm": (173, None),
            "iopl": (172, None),
            "kexec_file_load": (320, 294),
            "kexec_load": (246, 104),
            "modify_ldt": (154, None),
            "reboot": (169, 142),
            "setdomainname": (171, 162),
            "sethostname": (170, 161),
            "settimeofday": (164, 170),
            "swapoff": (168, 225),
            "swapon": (167, 224),
            "syslog": (103, 116),
            "vhangup": (153, 58),
        },
    ),
    _Group(
        "places memory on the nodes of a machine, which its neighbours feel; libnuma then says: no nodes",
        errno.ENOSYS,
        {
            "get_mempolicy": (239, 236),
            "mbind": (237, 235),
            "migrate_pages": (256, 238),
            "move_pages": (279, 239),
            "set_mempolicy": (238, 237),
            "set_mempolicy_home_node": (450, 450),
        },
    ),
    _Group(
        "is of use to few, or to nobody any more",
        errno.ENOSYS,
        {
            "_sysctl": (156, None),
            "lookup_dcookie": (212, 18),
            "lsm_get_self_attr": (459, 459),
            "lsm_list_modules": (461, 461),
            "lsm_set_self_attr": (460, 460),
            "memfd_secret": (447, 447),
            "nfsservctl": (180, 42),
            "remap_file_pages": (216, 234),
            "sysfs": (139, None),
            "uselib": (134, None),
            "ustat": (136, None),
        },
    ),
)

_SYSTEM_V = _Group(
    "reaches whoever shares the namespace of these, whatever the files say: the identifiers can be guessed",
    errno.ENOSYS,
    {
        "mq_open": (240, 180),
        "mq_unlink": (241, 181),
        "msgctl": (71, 187),
        "msgget": (68, 186),
        "msgrcv": (70, 188),
        "msgsnd": (69, 189),
        "semctl": (66, 191),
        "semget": (64, 190),
        "semop": (65, 193),
        "semtimedop": (220, 192),
        "shmat": (30, 196),
        "shmctl": (31, 195),
        "shmget": (29, 194),
    },
)

# These are looked at more closely, at a label each.
_CLOSER = {
    "clone": (56, 220),
    "ioctl": (16, 29),
    "personality": (135, 92),
    "prlimit64": (302, 261),
    "setrlimit": (160, 164),
    "socket": (41, 198),
    "socketpair": (53, 199),
}
# And these where others can be meant.
# These give a file a mode, by the argument of this number.
_WITH_MODE: Mapping[str, tuple[tuple[int | None, int | None], int]] = {
    "chmod": ((90, None), 1),
    "creat": ((85, None), 1),
    "fchmod": ((91, 52), 1),
    "fchmodat": ((268, 53), 2),
    "fchmodat2": ((452, 452), 2),
    "mknod": ((133, None), 1),
    "mknodat": ((259, 33), 2),
    "open": ((2, None), 2),
    "openat": ((257, 56), 3),
}

_OF_SOMEBODY = {
    "ioprio_set": (251, 30),
    "kill": (62, 129),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119),
    "setpriority": (141, 140),
}

# file_setattr(), of Linux 6.17. Whoever raises it has read what came since. All calls of the x32 ABI, whose
# numbers begin at 2**30, are above it.
_NEWEST = 469

_NAMESPACES = 0x7E02_0000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID and NET (linux/sched.h)

# What is written to a terminal's input, or pasted there, runs as whoever reads it (ioctl_tty(2)); a line
# discipline is a driver that anybody may load.
_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423

_ASK_PERSONALITY = 0xFFFF_FFFF  # personality(2): tells it and changes nothing

# By a file with one of these others are who owns it (inode(7)): in a folder of this machine, its user.
_SET_ID = 0o6000

_CREATES = 0o100 | 0o20000000  # O_CREAT, O_TMPFILE: without them open(2) does not look at its mode

_RLIMIT_CORE = 4  # asm-generic/resource.h

_EVERYBODY = 0xFFFF_FFFF  # -1, of kill(2)
_SCHED_OTHER = 0  # the policy that nearly all have, and that changes nothing for those

_TYPE_MASK = 0xF  # of the second argument of socket(2); the rest are SOCK_CLOEXEC and SOCK_NONBLOCK
_NETLINK_ROUTE = 0  # what getifaddrs(3) asks
# Others are modules that are loaded when first asked for: SCTP, DCCP, L2TP, SMC... 0 is the type's own.
_INET_PROTOCOLS = (
    0,
    socket.IPPROTO_TCP,
    socket.IPPROTO_UDP,
    socket.IPPROTO_ICMP,
    socket.IPPROTO_ICMPV6,
    262,  # IPPROTO_MPTCP, which Go asks for first
)

_MACHINES = ("x86_64", "aarch64")
_ARCHITECTURES = (0xC000_003E, 0xC000_00B7)  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64 (linux/audit.h)


def deny_filter(
    *,
    block_inet: bool = False,
    block_unix: bool = False,
    block_others: bool = False,
    machine: str | None = None,
) -> bytes:
    """The filter, as an array of ``struct sock_filter`` (linux/filter.h) in this machine's byte order.

    Args:
        block_inet: refuse sockets of IPv4 and IPv6.
        block_unix: refuse Unix sockets, but for pairs that know each other from the start and cannot reach
            anybody else.
        block_others: refuse what reaches other processes of the same user where they have no namespaces
            between them: memory, semaphores and queues that are no files; their limits, priorities and CPUs;
            a signal to everybody.
        machine: as in :func:`os.uname`; None for this one.

    Raises:
        SandboxConfigurationError: there is no list of calls for the machine.
    """
    machine = os.uname().machine if machine is None else machine
    if machine not in _MACHINES:
        known = ", ".join(sorted(_MACHINES))
        raise SandboxConfigurationError(
            f"no filter of system calls for the machine {machine!r} (known: {known}); use isolation='none'"
        )
    column = _MACHINES.index(machine)
    program = _Program()
    refused, closer = list(_REFUSED), dict(_CLOSER)
    if block_others:
        refused.append(_SYSTEM_V)
        closer.update(_OF_SOMEBODY)
    _check_the_number(program, column, refused, closer)
    _check_modes(program)
    _check_clone(program)
    _check_ioctl(program)
    _check_personality(program)
    _check_limit(program, block_others=block_others)
    _check_socket(program, block_inet=block_inet, block_unix=block_unix)
    _check_socketpair(program, block_unix=block_unix)
    if block_others:
        _check_who_is_meant(program)
    return program.assembled()


def _check_the_number(
    program: _Program,
    column: int,
    refused: Collection[_Group],
    closer: Mapping[str, tuple[int, int]],
) -> None:
    program.load(_ARCHITECTURE)
    program.unless_equal(_ARCHITECTURES[column], _KILL)  # the same number is another call there
    program.load(_NUMBER)
    program.if_above(_NEWEST, _error(errno.ENOSYS))
    for label, numbers in closer.items():
        program.if_equal(numbers[column], label)
    for name, (of_machines, argument) in _WITH_MODE.items():
        its_number = of_machines[column]
        if its_number is not None:
            program.if_equal(its_number, "open" if name == "open" else f"mode {argument}")
    for group in refused:
        for listed in group.calls.values():
            number = listed[column]
            if number is not None:
                program.if_equal(number, _error(group.answer))
    program.answer(_ALLOW)


def _check_modes(program: _Program) -> None:
    program.label("mode 3")  # openat
    program.load(_argument(2))
    program.unless_any_bit(_CREATES, _ALLOW)
    program.load(_argument(3))
    program.if_any_bit(_SET_ID, _error(errno.EPERM))
    program.answer(_ALLOW)
    program.label("open")
    program.load(_argument(1))
    program.unless_any_bit(_CREATES, _ALLOW)
    program.label("mode 2")
    program.load(_argument(2))
    program.if_any_bit(_SET_ID, _error(errno.EPERM))
    program.answer(_ALLOW)
    program.label("mode 1")
    program.load(_argument(1))
    program.if_any_bit(_SET_ID, _error(errno.EPERM))
    program.answer(_ALLOW)


def _check_clone(program: _Program) -> None:
    program.label("clone")
    program.load(_argument(0))
    program.if_any_bit(_NAMESPACES, _error(errno.EPERM))
    program.answer(_ALLOW)


def _check_ioctl(program: _Program) -> None:
    program.label("ioctl")
    program.load(_argument(1))
    for request in (_TIOCSTI, _TIOCLINUX, _TIOCSETD):
        program.if_equal(request, _error(errno.EPERM))
    program.answer(_ALLOW)


def _check_personality(program: _Program) -> None:
    # Others make memory executable, or its addresses known.
    program.label("personality")
    program.load(_argument(0))
    for persona in (0, _ASK_PERSONALITY):
        program.if_equal(persona, _ALLOW)
    program.answer(_error(errno.EPERM))


def _check_limit(program: _Program, *, block_others: bool) -> None:
    # The limit of a core file is a byte, and must stay that: with it, and with no other, not even none, the
    # system hands no core to the program that /proc/sys/kernel/core_pattern may name, which runs on the
    # machine as root (core(5); fs/coredump.c). Whoever asks for none has none: that is no error.
    program.label("setrlimit")
    program.load(_argument(0))
    program.if_equal(_RLIMIT_CORE, _error(0))
    program.answer(_ALLOW)
    program.label("prlimit64")
    program.load(_argument(1))
    program.unless_equal(_RLIMIT_CORE, "whose limit")
    for half in (_argument(2), _argument(2) + 4):
        program.load(half)
        program.unless_equal(0, _error(0))  # where the new limit is; without one it is only told
    program.label("whose limit")
    if block_others:
        program.load(_argument(0))
        program.unless_equal(0, _error(errno.EPERM))
    program.answer(_ALLOW)


def _check_socket(program: _Program, *, block_inet: bool, block_unix: bool) -> None:
    # A family that is not listed, AF_VSOCK for one, may belong to no network namespace at all.
    program.label("socket")
    program.load(_argument(0))
    if not block_unix:
        program.if_equal(socket.AF_UNIX, _ALLOW)
    if not block_inet:
        program.if_equal(socket.AF_INET, "inet")
        program.if_equal(socket.AF_INET6, "inet")
    program.if_equal(socket.AF_NETLINK, "netlink")
    program.answer(_error(errno.EAFNOSUPPORT))

    # An AF_INET socket of type SOCK_PACKET would be one of AF_PACKET (packet(7), "Compatibility").
    program.label("inet")
    program.load(_argument(1))
    program.keep_bits(_TYPE_MASK)
    program.if_equal(socket.SOCK_STREAM, "protocol")
    program.if_equal(socket.SOCK_DGRAM, "protocol")
    program.answer(_error(errno.EPERM))
    program.label("protocol")
    program.load(_argument(2))
    for protocol in _INET_PROTOCOLS:
        program.if_equal(protocol, _ALLOW)
    program.answer(_error(errno.EPROTONOSUPPORT))

    program.label("netlink")
    program.load(_argument(2))
    program.if_equal(_NETLINK_ROUTE, _ALLOW)
    program.answer(_error(errno.EPROTONOSUPPORT))


def _check_socketpair(program: _Program, *, block_unix: bool) -> None:
    program.label("socketpair")
    program.load(_argument(0))
    program.unless_equal(socket.AF_UNIX, _error(errno.EAFNOSUPPORT))
    if block_unix:
        # One for datagrams can be connected anew, to any path, and SOCK_RAW is another name for it.
        program.load(_argument(1))
        program.keep_bits(_TYPE_MASK)
        program.if_equal(socket.SOCK_STREAM, _ALLOW)
        program.if_equal(socket.SOCK_SEQPACKET, _ALLOW)
        program.answer(_error(errno.EPERM))
    program.answer(_ALLOW)


def _check_who_is_meant(program: _Program) -> None:
    """Let it be the caller, who is 0."""
    program.label("sched_setscheduler")
    program.load(_argument(1))
    program.if_equal(_SCHED_OTHER, _ALLOW)  # of whomever: libzmq asks for it, for a thread, or ends itself
    for label in ("sched_setaffinity", "sched_setattr"):
        program.label(label)
    program.load(_argument(0))
    program.if_equal(0, _ALLOW)
    program.answer(_error(errno.EPERM))

    # Their first argument says what the second is: a process, or else a group of them, or a user.
    for label, of_a_process in (("ioprio_set", 1), ("setpriority", 0)):
        program.label(label)
        program.load(_argument(0))
        program.unless_equal(of_a_process, _error(errno.EPERM))
        program.load(_argument(1))
        program.if_equal(0, _ALLOW)
        program.answer(_error(errno.EPERM))

    program.label("kill")
    program.load(_argument(0))
    program.if_equal(_EVERYBODY, _error(errno.EPERM))
    program.answer(_ALLOW)


# The assembler


# Where struct seccomp_data (linux/seccomp.h) has what; of an argument its lower half, on these machines
# first. The kernel, too, looks at no more than that half of those that are checked here.
_NUMBER, _ARCHITECTURE = 0, 4


def _argument(index: int) -> int:
    return 16 + 8 * index


# How a program can end: SECCOMP_RET_ALLOW, _KILL_PROCESS and _ERRNO (linux/seccomp.h).
_ALLOW, _KILL = 0x7FFF_0000, 0x8000_0000


def _error(number: int) -> int:
    return 0x0005_0000 | number


# linux/bpf_common.h
_LOAD, _AND, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06


class _Program:
    """Instructions, which go on to the next, to a label further down, or end with an answer."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, str | int | None, str | int | None]] = []
        self._places: dict[str | int, int] = {}

    def label(self, name: str) -> None:
        self._places[name] = len(self._instructions)

    def load(self, offset: int) -> None:
        """Make the word at *offset* of the call the one that is looked at."""
        self._add(_LOAD, offset)

    def keep_bits(self, mask: int) -> None:
        self._add(_AND, mask)

    def if_equal(self, value: int, target: str | int) -> None:
        self._add(_EQUAL, value, then=target)

    def unless_equal(self, value: int, target: str | int) -> None:
        self._add(_EQUAL, value, otherwise=target)

    def if_above(self, value: int, target: str | int) -> None:
        self._add(_GREATER, value, then=target)

    def if_any_bit(self, mask: int, target: str | int) -> None:
        self._add(_ANY_BIT, mask, then=target)

    def unless_any_bit(self, mask: int, target: str | int) -> None:
        self._add(_ANY_BIT, mask, otherwise=target)

    def answer(self, answer: int) -> None:
        """End here."""
        self._add(_RETURN, answer)

    def assembled(self) -> bytes:
        """The program; the answers that are jumped to stand at its end."""
        for _, _, *targets in list(self._instructions):
            for target in targets:
                if isinstance(target, int) and target not in self._places:
                    self._places[target] = len(self._instructions)
                    self.answer(target)
        return b"".join(
            struct.pack("=HBBI", code, self._distance(at, then), self._distance(at, otherwise), value)
            for at, (code, value, then, otherwise) in enumerate(self._instructions)
        )

    def _add(
        self, code: int, value: int, then: str | int | None = None, otherwise: str | int | None = None
    ) -> None:
        self._instructions.append((code, value, then, otherwise))

    def _distance(self, at: int, target: str | int | None) -> int:
        """How many instructions a jump from *at* leaves out; there is room for 255 (else struct.error)."""
        return 0 if target is None else self._places[target] - at - 1
