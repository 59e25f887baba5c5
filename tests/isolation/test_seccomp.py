"""The filter of system calls: read by an interpreter of its own, and by the kernel."""

from __future__ import annotations

import base64
import errno
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.guest import confine
from code_sandboxes.isolation import seccomp
from code_sandboxes.isolation.seccomp import deny_filter

ALLOWED, KILLED = 0x7FFF0000, 0x80000000
MACHINES = ("x86_64", "aarch64")
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLOSER = {**seccomp._CLOSER, **seccomp._OF_SOMEBODY}
SOCKET, SOCKETPAIR, CLONE, IOCTL, PERSONALITY = (
    dict(zip(MACHINES, CLOSER[name], strict=True))
    for name in ("socket", "socketpair", "clone", "ioctl", "personality")
)
HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}

on_linux = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in MACHINES,
    reason="a filter of system calls needs Linux on x86_64 or aarch64",
)


def refused(number: int) -> int:
    return 0x00050000 | number


def verdict(program: bytes, arch: int, number: int, *args: int) -> int:
    """What *program* says of a call, as Documentation/networking/filter.rst tells how to read it."""
    call = struct.pack("=IIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    instructions = list(struct.iter_unpack("=HBBI", program))
    word, at = 0, 0
    while True:
        code, then, otherwise, value = instructions[at]
        at += 1
        if code == 0x20:
            (word,) = struct.unpack_from("=I", call, value)
        elif code == 0x54:
            word &= value
        elif code == 0x06:
            return int(value)
        else:
            is_so = {0x15: word == value, 0x25: word > value, 0x45: bool(word & value)}[code]
            at += then if is_so else otherwise


def ask(
    machine: str,
    number: int,
    *args: int,
    block_inet: bool = False,
    block_unix: bool = False,
    block_others: bool = False,
) -> int:
    program = deny_filter(
        machine=machine, block_inet=block_inet, block_unix=block_unix, block_others=block_others
    )
    return verdict(program, AUDIT[machine], number, *args)


def calls() -> Iterator[tuple[str, str, int, int]]:
    for group in (*seccomp._REFUSED, seccomp._SYSTEM_V):
        for name, numbers in group.calls.items():
            for machine, number in zip(MACHINES, numbers, strict=True):
                if number is not None:
                    yield machine, name, number, group.answer


def header(machine: str) -> dict[str, int]:
    for path in HEADERS[machine]:
        if os.path.exists(path):
            defined = re.findall(
                r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(path).read_text(), re.MULTILINE
            )
            return {name: int(number) for name, number in defined}
    pytest.skip(f"the kernel's headers (linux-libc-dev) are not installed: {HEADERS[machine][0]}")


@pytest.mark.parametrize("machine", MACHINES)
def test_every_listed_call_has_the_number_of_the_kernels_headers(machine: str) -> None:
    known = header(machine)
    listed = {name: number for m, name, number, _ in calls() if m == machine}
    listed |= {name: numbers[MACHINES.index(machine)] for name, numbers in CLOSER.items()}
    modes = {name: numbers[MACHINES.index(machine)] for name, (numbers, _) in seccomp._WITH_MODE.items()}
    listed |= {name: number for name, number in modes.items() if number is not None}
    newer = max(known.values())

    assert {name: n for name, n in listed.items() if known.get(name, -1) != n} == {
        name: n for name, n in listed.items() if name not in known and n > newer
    }


@pytest.mark.parametrize("machine", MACHINES)
def test_listed_calls_fail_as_listed_and_all_others_pass(machine: str) -> None:
    program = deny_filter(machine=machine, block_others=True)
    answers = {number: answer for m, _, number, answer in calls() if m == machine}
    closer: set[int | None] = {numbers[MACHINES.index(machine)] for numbers in CLOSER.values()}
    closer |= {numbers[MACHINES.index(machine)] for numbers, _ in seccomp._WITH_MODE.values()}

    for number in set(range(470)) - closer:
        expected = refused(answers[number]) if number in answers else ALLOWED
        assert verdict(program, AUDIT[machine], number, 2**64 - 1) == expected, number


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "argument"), [(name, at) for name, (_, at) in seccomp._WITH_MODE.items()])
def test_no_file_gets_a_mode_with_which_others_run_it_as_its_owner(
    machine: str, name: str, argument: int
) -> None:
    number = seccomp._WITH_MODE[name][0][MACHINES.index(machine)]
    if number is None:
        return
    create = [0o100] * argument
    for mode, answer in ((0o4755, refused(errno.EPERM)), (0o2755, refused(errno.EPERM)), (0o1777, ALLOWED)):
        assert ask(machine, number, *create, mode) == answer
    if name in ("open", "openat"):
        assert ask(machine, number, *[0] * argument, 0o4755) == ALLOWED, "it is not looked at"
        assert ask(machine, number, *[0o20000000] * argument, 0o4755) == refused(errno.EPERM), "O_TMPFILE"


@pytest.mark.parametrize("machine", MACHINES)
def test_what_python_and_its_libraries_live_on_passes(machine: str) -> None:
    needed = """
        read write openat close mmap munmap mprotect mremap madvise brk futex execve wait4 waitid exit_group
        pipe2 dup3 fcntl epoll_create1 epoll_ctl epoll_pwait eventfd2 timerfd_create signalfd4 inotify_init1
        sched_getaffinity sched_setaffinity prctl getrandom memfd_create pidfd_open pidfd_send_signal
        connect bind listen accept4 sendmsg recvmsg sendfile splice copy_file_range statx faccessat2
        renameat2 close_range rseq membarrier set_robust_list prlimit64 kill tgkill rt_sigaction
        landlock_create_ruleset seccomp semget shmget mincore fallocate flock
    """
    known = header(machine)

    assert {n for n in needed.split() if ask(machine, known[n]) != ALLOWED} == set()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("number", [470, 547, 0x40000000, 0x40000000 + 101, 0xFFFFFFFF])
def test_calls_that_nobody_has_looked_at_do_not_exist(machine: str, number: int) -> None:
    assert ask(machine, number) == refused(errno.ENOSYS)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("arch", [0x40000003, 0x40000028, 0xC0000015, 0], ids=hex)
def test_another_abi_ends_the_process(machine: str, arch: int) -> None:
    assert verdict(deny_filter(machine=machine), arch, 0) == KILLED


@pytest.mark.parametrize("machine", MACHINES)
def test_threads_and_processes_can_be_made_and_namespaces_cannot(machine: str) -> None:
    thread, fork, vfork = 0x3D0F00, 0x01200011, 0x4111
    for flags in (thread, fork, vfork):
        assert ask(machine, CLONE[machine], flags) == ALLOWED
    for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert ask(machine, CLONE[machine], fork | bit) == refused(errno.EPERM)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("request_", [0x5412, 0x541C, 0x5423], ids=["TIOCSTI", "TIOCLINUX", "TIOCSETD"])
def test_nobody_types_for_others_whatever_the_upper_half_says(machine: str, request_: int) -> None:
    """The kernel drops it (CVE-2019-10063, CVE-2023-28100: filters that did not)."""
    for upper in (0, 1 << 32, 0xFFFFFFFF << 32):
        assert ask(machine, IOCTL[machine], 0, upper | request_) == refused(errno.EPERM)
    assert ask(machine, IOCTL[machine], 0, 0x5413) == ALLOWED  # TIOCGWINSZ


@pytest.mark.parametrize("machine", MACHINES)
def test_a_personality_can_be_asked_for_and_reset_only(machine: str) -> None:
    assert ask(machine, PERSONALITY[machine], 0xFFFFFFFF) == ALLOWED
    assert ask(machine, PERSONALITY[machine], 0) == ALLOWED
    for persona in (0x0040000, 0x0400000, 0x0100000, 0x8):
        assert ask(machine, PERSONALITY[machine], persona) == refused(errno.EPERM)


STREAM, DGRAM, RAW, SEQPACKET, DCCP, PACKET = 1, 2, 3, 5, 6, 10
CLOEXEC = 0o2000000

SOCKETS = [  # family, type, protocol; what becomes of it; and with inet and unix blocked
    ((1, STREAM, 0), 0, errno.EAFNOSUPPORT),
    ((1, DGRAM | CLOEXEC, 0), 0, errno.EAFNOSUPPORT),
    ((2, STREAM, 0), 0, errno.EAFNOSUPPORT),
    ((2, STREAM | CLOEXEC, 6), 0, errno.EAFNOSUPPORT),
    ((2, STREAM, 262), 0, errno.EAFNOSUPPORT),
    ((2, DGRAM, 17), 0, errno.EAFNOSUPPORT),
    ((10, DGRAM, 58), 0, errno.EAFNOSUPPORT),
    ((2, RAW, 1), errno.EPERM, errno.EAFNOSUPPORT),
    ((2, PACKET, 0x300), errno.EPERM, errno.EAFNOSUPPORT),
    ((2, SEQPACKET, 132), errno.EPERM, errno.EAFNOSUPPORT),
    ((2, STREAM, 132), errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT),
    ((10, DGRAM, 115), errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT),
    ((2, DCCP, 33), errno.EPERM, errno.EAFNOSUPPORT),
    ((16, RAW, 0), 0, 0),
    ((16, RAW, 12), errno.EPROTONOSUPPORT, errno.EPROTONOSUPPORT),
    ((16, DGRAM, 15), errno.EPROTONOSUPPORT, errno.EPROTONOSUPPORT),
    *(
        ((family, STREAM, 0), errno.EAFNOSUPPORT, errno.EAFNOSUPPORT)
        for family in (0, 17, 31, 38, 40, 44, 99)
    ),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("args", "by_default", "blocked"), SOCKETS, ids=str)
def test_sockets(machine: str, args: tuple[int, int, int], by_default: int, blocked: int) -> None:
    upper = [value | 0xABCD << 32 for value in args]  # the kernel takes ints
    for given in (args, upper):
        assert ask(machine, SOCKET[machine], *given) == (refused(by_default) if by_default else ALLOWED)
        assert ask(machine, SOCKET[machine], *given, block_inet=True, block_unix=True) == (
            refused(blocked) if blocked else ALLOWED
        )


@pytest.mark.parametrize("machine", MACHINES)
def test_either_family_can_be_blocked_without_the_other(machine: str) -> None:
    no_unix, no_inet = refused(errno.EAFNOSUPPORT), refused(errno.EAFNOSUPPORT)

    assert ask(machine, SOCKET[machine], 1, STREAM, block_unix=True) == no_unix
    assert ask(machine, SOCKET[machine], 2, STREAM, block_unix=True) == ALLOWED
    assert ask(machine, SOCKET[machine], 1, STREAM, block_inet=True) == ALLOWED
    assert ask(machine, SOCKET[machine], 2, STREAM, block_inet=True) == no_inet


@pytest.mark.parametrize("machine", MACHINES)
def test_a_pair_that_could_be_connected_to_somebody_else_is_a_unix_socket_too(machine: str) -> None:
    for kind in (STREAM, SEQPACKET):
        assert ask(machine, SOCKETPAIR[machine], 1, kind | CLOEXEC, block_unix=True) == ALLOWED
    for kind in (DGRAM, RAW):
        assert ask(machine, SOCKETPAIR[machine], 1, kind) == ALLOWED
        assert ask(machine, SOCKETPAIR[machine], 1, kind, block_unix=True) == refused(errno.EPERM)
    assert ask(machine, SOCKETPAIR[machine], 30, STREAM) == refused(errno.EAFNOSUPPORT)  # TIPC


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "of_oneself", "of_others"),
    [
        ("prlimit64", (0, 7), [(4711, 7), (1 << 32 | 4711, 7)]),
        ("sched_setaffinity", (0, 8), [(4711, 8)]),
        ("sched_setattr", (0,), [(4711,)]),
        ("sched_setscheduler", (0, 5), [(4711, 5), (4711, 1 << 30)]),
        ("sched_setscheduler", (4711, 0), []),
        ("setpriority", (0, 0, 19), [(0, 4711, 19), (1, 0, 19), (2, 0, 19)]),
        ("ioprio_set", (1, 0, 0), [(1, 4711, 0), (2, 0, 0), (3, 0, 0)]),
        ("kill", (4711, 9), [(2**32 - 1, 9), (2**64 - 1, 9)]),
    ],
)
def test_without_namespaces_one_steers_oneself_only(
    machine: str, name: str, of_oneself: tuple[int, ...], of_others: list[tuple[int, ...]]
) -> None:
    number = CLOSER[name][MACHINES.index(machine)]

    assert ask(machine, number, *of_oneself, block_others=True) == ALLOWED
    for args in of_others:
        assert ask(machine, number, *args, block_others=True) == refused(errno.EPERM)
        assert ask(machine, number, *args) == ALLOWED


def test_an_unknown_machine_is_refused_by_name() -> None:
    with pytest.raises(SandboxConfigurationError, match=r"'riscv64' \(known: aarch64, x86_64\)"):
        deny_filter(machine="riscv64")


# What the kernel makes of it

PROGRAM = """
import base64, ctypes, errno, json, os, sys
sys.path.insert(0, sys.argv[1])
import confine
confine.no_new_privileges()
confine.filter_system_calls(base64.b64decode(sys.argv[2]))
libc = ctypes.CDLL(None, use_errno=True)
def error(number, *args):
    done = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args))
    return 0 if done >= 0 else ctypes.get_errno()
exec(sys.argv[3])
"""


def run_filtered(
    code: str, *, block_unix: bool = False, block_others: bool = False
) -> subprocess.CompletedProcess[str]:
    program = base64.b64encode(deny_filter(block_unix=block_unix, block_others=block_others)).decode()
    guest = os.path.dirname(confine.__file__)
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, guest, program, code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@on_linux
def test_the_kernel_refuses_every_listed_call_and_python_works_on() -> None:
    listed = [
        (number, answer)
        for machine, name, number, answer in calls()
        if machine == os.uname().machine and name != "vhangup"  # it takes no argument that could be wrong
    ]
    done = run_filtered(
        f"wrong = [n for n, answer in {listed!r} if error(n, -1, -1, -1, -1, -1) != answer]\n"
        "import asyncio, subprocess, threading, socket\n"
        "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "async def command():\n"
        "    process = await asyncio.create_subprocess_exec('/bin/echo', 'command', stdout=-1)\n"
        "    return (await process.communicate())[0].decode()\n"
        "print(asyncio.run(command()), end='')\n"
        "print(subprocess.check_output(['/bin/sh', '-c', 'echo shell | cat'], text=True), end='')\n"
        "if os.fork() == 0: os._exit(0)\n"
        "print('child', os.wait()[1]); print(wrong)",
        block_others=True,
    )

    assert (done.stdout, done.stderr) == ("thread\ncommand\nshell\nchild 0\n[]\n", "")


@on_linux
def test_the_kernel_reads_the_arguments_as_the_filter_does() -> None:
    done = run_filtered(
        f"machine = {os.uname().machine!r}\n"
        "sockets = ((40, 1, 0), (2, 10, 3), (2, 3, 1), (16, 3, 9), (2, 1, 0))\n"
        f"print([error({SOCKET}[machine], *arguments) for arguments in sockets])\n"
        f"print([error({IOCTL}[machine], 0, r) for r in (0x5412, 1 << 32 | 0x5412)])\n"
        f"print([error({CLONE}[machine], f) for f in (0x10000011, 0x20011)])\n"
        "print([error(470), error(0x40000000 + 39)])"
    )

    assert done.stdout.splitlines() == [
        f"[{errno.EAFNOSUPPORT}, {errno.EPERM}, {errno.EPERM}, {errno.EPROTONOSUPPORT}, 0]",
        f"[{errno.EPERM}, {errno.EPERM}]",
        f"[{errno.EPERM}, {errno.EPERM}]",
        f"[{errno.ENOSYS}, {errno.ENOSYS}]",
    ], done.stderr


@on_linux
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86_64 has a second way into the kernel")
def test_the_ia32_way_into_the_kernel_ends_the_process() -> None:
    done = run_filtered(
        "import mmap\n"
        "code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "code.write(bytes.fromhex('b814000000cd80c3'))  # getpid() by int 0x80\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(code))\n"
        "print('before', flush=True)\n"
        "print('pid', ctypes.CFUNCTYPE(ctypes.c_int)(address)())"
    )

    assert done.stdout == "before\n"
    assert -done.returncode in (signal.SIGSYS, signal.SIGSEGV)  # the latter where the kernel has no such way


@on_linux
def test_without_unix_sockets_a_pair_reaches_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(path)
        code = (
            "import socket\n"
            "for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):\n"
            "    try:\n"
            "        pair = socket.socketpair(socket.AF_UNIX, kind)\n"
            f"        pair[0].connect({path!r})\n"
            "    except OSError as error: print(error.errno)\n"
            "    else: print('connected')"
        )

        assert run_filtered(code).stdout.split()[:2] == ["connected", "connected"]
        assert run_filtered(code, block_unix=True).stdout.split() == [
            str(number) for number in (errno.EPERM, errno.EPERM, errno.EPROTOTYPE, errno.EPROTOTYPE)
        ]
