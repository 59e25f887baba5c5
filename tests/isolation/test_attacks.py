"""Attempts of code to get out of its sandbox: those of ISOLATION, section E, by their row, and more.

Each is a line of code that says what became of it: the name of an error, or what came back. All run in the
same kernel, one after the other, as code would that looks for a way; the last test finds it, this machine and
a neighbour well. ``test_as_ordinary_user.py`` runs all of it a second time, where root runs it first, but for
containers: who may use an engine is as mighty as root anyway.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("isolation is Linux's", allow_module_level=True)

from code_sandboxes import Sandbox, SandboxConfig, SandboxError, SandboxVariant
from code_sandboxes.guest.confine import FIRST_WITH_SCOPES as SCOPES
from code_sandboxes.isolation.container import GUEST
from code_sandboxes.isolation.plan import Method
from code_sandboxes.isolation.probe import probe
from code_sandboxes.variants.plans import why_not
from conftest import wait_until
from tests.isolation.needs import ENCLOSURES, REQUIRED, needs_isolation, not_here
from tests.test_trust import FORGE

IS_ROOT = os.geteuid() == 0

# What every attack can use.
PREAMBLE = """
import array, ctypes, errno, fcntl, glob, mmap, os, platform, resource, select, shutil, signal, socket
import stat, struct, subprocess, sys, tempfile, threading, time
libc = ctypes.CDLL(None, use_errno=True)
COLUMN = ('x86_64', 'aarch64').index(platform.machine())

def tell(do, *args):
    try:
        value = do(*args)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    except BaseException as error:
        return type(error).__name__
    return str(value)

def call(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), '')
    return result

def syscall(x86_64, aarch64=None, *args):
    number = (x86_64, x86_64 if aarch64 is None else aarch64)[COLUMN]
    ctypes.set_errno(0)
    return call(libc.syscall(ctypes.c_long(number), *[ctypes.c_long(arg) for arg in args]))

def read(path):
    with open(path, 'rb') as file:
        return file.read(100)

def write(path, content='1'):
    with open(path, 'w') as file:
        file.write(content)

def connect(kind, address, family=socket.AF_INET):
    with socket.socket(family, kind) as s:
        s.settimeout(5)
        s.connect(address)
        s.send(b'x')

def in_a_child(do, *args):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write_end, tell(do, *args).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        said = file.read()
    status = os.waitpid(pid, 0)[1]
    return said or ('signal %d' % os.WTERMSIG(status))

def run(code, *args):
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True).stdout.strip()
"""


@dataclass(frozen=True)
class Attack:
    """An expression, and what it may come to.

    Args:
        outcomes: in an enclosure, with words between blanks; what Landlock leaves is *landlocked*, and what a
            container does is *contained*, if that is something else; nothing where it is no matter there.
    """

    row: str
    what: str
    code: str
    outcomes: str
    landlocked: str | None = None
    contained: str | None = None

    def __str__(self) -> str:
        return f"row {self.row}: {self.what}"

    def allowed(self, method: Method) -> list[str]:
        other = {"landlock": self.landlocked, "container": self.contained}.get(method)
        return (self.outcomes if other is None else other).split()


OF_BUBBLEWRAP = ""  # Landlock does not do this, and nobody says it did
OF_THE_IMAGE = ""  # in a container what is there is the image's, and nothing of this machine
PERMISSIONS = "permission to write anything else of the kernel in /proc"  # which root has, to no use

ATTACKS = [
    # Files of the machine
    Attack("1", "read the shadow file", "read('/etc/shadow')", "ENOENT", "EACCES", "ENOENT EACCES"),
    Attack(
        "1", "read what tells the machine", "read('/etc/machine-id')", "ENOENT", "EACCES ENOENT", "ENOENT b''"
    ),
    Attack("2", "read a file of the host by its path", "read(SECRET)", "ENOENT", "EACCES"),
    Attack("2", "by a descriptor's directory", "os.open(SECRET_FOLDER, os.O_RDONLY)", "ENOENT", "EACCES"),
    Attack("2", "execute it", "os.execv(SECRET, ['x'])", "ENOENT", "EACCES"),
    Attack("2", "truncate it", "os.truncate(SECRET, 0)", "ENOENT", "EACCES"),
    Attack("2", "remove it", "os.remove(SECRET)", "ENOENT", "EACCES"),
    Attack("2", "rename it", "os.rename(SECRET, SECRET + 'x')", "ENOENT", "EACCES"),
    Attack("2", "link it into a folder of ours", "os.link(SECRET, 'linked')", "ENOENT", "EXDEV EACCES EPERM"),
    Attack("2", "change who may read it", "os.chmod(SECRET, 0o777)", "ENOENT", OF_BUBBLEWRAP),
    Attack("2", "write beside it", "write(SECRET_FOLDER + '/new')", "ENOENT", "EACCES"),
    Attack(
        "3",
        "list folders of the host",
        "[name for path in ('/root', '/home', '/srv', '/mnt', '/opt', '/boot', '/sys', '/var/log')"
        " if os.path.isdir(path) for name in os.listdir(path)"
        " if name not in ('sandbox', *SEEN)]",
        "[]",
        "EACCES",
        OF_THE_IMAGE,
    ),
    Attack("3", "find a folder of the host", "found(os.path.basename(SECRET_FOLDER))", "[]"),
    Attack("4", "write into the system", "write('/usr/new')", "EROFS", "EACCES"),
    Attack("4", "write a program of the system", "write('/usr/bin/env')", "EROFS", "EACCES"),
    Attack(
        "4", "write a .pth", "write(os.path.join(os.path.dirname(os.__file__), 'x.pth'))", "EROFS", "EACCES"
    ),
    Attack(
        "4", "write beside the kernel", "write(os.path.join(sys.prefix, 'lib', 'x'))", "EROFS", "EACCES EROFS"
    ),
    Attack("4", "change the guest", "write(GUEST + '/init.py')", "EROFS", "EACCES"),
    Attack("5", "remount", "call(libc.mount(b'none', b'/usr', None, 0x20, None))", "EPERM"),
    Attack("5", "mount", "call(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))", "EPERM"),
    Attack("5", "bind", "call(libc.mount(b'/', b'/tmp', None, 0x5000, None))", "EPERM"),
    Attack("5", "unmount", "call(libc.umount2(b'/usr', 2))", "EPERM"),
    Attack("5", "unmount what covers /proc/sys", "call(libc.umount2(b'/proc/sys', 2))", "EPERM"),
    Attack("5", "pivot_root", "syscall(155, 41, 0, 0)", "EPERM"),
    Attack("5", "fsopen", "syscall(430, None, 0, 0)", "ENOSYS"),
    Attack("5", "open_tree", "syscall(428, None, -100, 0, 1)", "ENOSYS"),
    Attack("5", "mount_setattr", "syscall(442, None, -100, 0, 0, 0, 0)", "EPERM ENOSYS"),
    Attack("5", "move_mount", "syscall(429, None, -100, 0, -100, 0, 0)", "ENOSYS"),
    # Namespaces and privileges
    Attack("6", "unshare a user namespace", "call(libc.unshare(0x10000000))", "EPERM"),
    Attack("6", "unshare a mount namespace", "call(libc.unshare(0x20000))", "EPERM"),
    Attack("6", "unshare a network namespace", "call(libc.unshare(0x40000000))", "EPERM"),
    Attack("6", "clone into one", "syscall(56, 220, 0x10000000 | 17, 0, 0, 0, 0)", "EPERM"),
    Attack(
        "6", "the same, with high bits", "syscall(56, 220, 1 << 32 | 0x10000000 | 17, 0, 0, 0, 0)", "EPERM"
    ),
    Attack("6", "clone3", "syscall(435, None, 0, 0)", "ENOSYS"),
    Attack(
        "6",
        "setns to the first process's",
        "call(libc.setns(os.open('/proc/1/ns/net', 0), 0))",
        "EACCES EPERM",
    ),
    Attack("6", "setns", "call(libc.setns(os.open('/proc/self', 0), 0))", "EPERM", "EPERM EACCES"),
    Attack(
        "6", "unshare(1)", "subprocess.run(['unshare', '-Ur', 'true'], capture_output=True).returncode", "1"
    ),
    Attack("7", "chroot", "os.chroot('/tmp')", "EPERM"),
    Attack("7", "open by handle", "call(libc.open_by_handle_at(3, b'\\0' * 64, 0))", "EPERM"),
    Attack(
        "7", "name to handle", "call(libc.name_to_handle_at(-100, b'/', b'\\0' * 64, b'\\0' * 8, 0))", "EPERM"
    ),
    Attack(
        "7", "make a disk's node", "os.mknod('disk', 0o60600, os.makedev(254, 0))", "EPERM", "EPERM EACCES"
    ),
    Attack(
        "7", "a character device's", "os.mknod('kmsg', 0o20600, os.makedev(1, 11))", "EPERM", "EPERM EACCES"
    ),
    Attack(
        "8",
        "devices",
        "sorted({*os.listdir('/dev')} - {'console', 'core', 'fd', 'full', 'null', 'ptmx', 'pts', 'random',"
        " 'shm', 'stderr', 'stdin', 'stdout', 'tty', 'urandom', 'zero'})",
        "[]",
        "EACCES",
        "['mqueue'] []",  # queues of its own, which are limited ("28", below)
    ),
    Attack("8", "a new device", "write('/dev/x')", "EROFS", "EACCES", "EACCES"),  # there it is root's folder
    # An engine mounts terminals without a maximum, and nobody in a container may change that. A quarter of
    # them is kept for the machine itself (sysctl kernel.pty.reserve), which has a test of its own.
    Attack("8", "all terminals of the machine", "all_terminals()", "True", contained="True False"),
    Attack("9", "the first process's root", "os.listdir('/proc/1/root/')", "EACCES"),
    Attack("9", "its memory", "read('/proc/1/mem')", "EACCES"),
    Attack("9", "to write it", "os.open('/proc/1/mem', os.O_RDWR)", "EACCES"),
    Attack("9", "its maps", "read('/proc/1/maps')", "EACCES"),
    Attack("9", "its environment", "read('/proc/1/environ')", "EACCES"),
    Attack("9", "its directory", "os.readlink('/proc/1/cwd')", "EACCES"),
    Attack("9", "its namespaces", "os.readlink('/proc/1/ns/mnt')", "EACCES"),
    Attack("9", "its descriptors", "[os.readlink(path) for path in glob.glob('/proc/1/fd/*')]", "[] EACCES"),
    Attack(
        "9", "to open one", "os.open(max(glob.glob('/proc/1/fd/*'), default='/proc/1/fd/3'), 0)", "EACCES"
    ),
    Attack("9", "its system call", "read('/proc/1/syscall')", "EACCES EPERM"),
    Attack("9", "what others are at the root", "others_at('root')", "[] EACCES"),
    Attack("10", "descriptors of folders and files that were left open", "left_open()", "[]"),
    Attack(
        "10",
        "of this machine's sockets",
        "[s for s in sockets() if s.family != socket.AF_UNIX and s.getsockname()[0] != '127.0.0.1']",
        "[]",
    ),
    Attack("11", "setuid", "os.setuid(0 if os.getuid() else 1)", "EPERM EINVAL"),
    Attack("11", "setgid and groups", "os.setgroups([0])", "EPERM"),
    Attack("11", "a setuid program", "run_setuid()", "EPERM"),
    Attack(
        "11",
        "capabilities",
        "[line for line in open('/proc/self/status') if line.startswith('Cap')"
        " and int(line.split()[1], 16) and not line.startswith('CapBnd')]",
        "[]",
    ),
    Attack(
        "11",
        "the groups of who started this",
        "[g for g in os.getgroups() if g not in (65534, os.getgid())]",
        "[]",
        OF_BUBBLEWRAP,
    ),
    Attack("11", "new privileges", "call(libc.prctl(38, 0, 0, 0, 0))", "EINVAL"),
    Attack(
        "11",
        "capabilities of a file",
        "os.setxattr('mine', 'security.capability', CAPABLE)",
        "EPERM",
        "EPERM EACCES",
    ),
    # The kernel
    Attack("12", "core_pattern", "write('/proc/sys/kernel/core_pattern', '|/tmp/x')", "EACCES EROFS"),
    Attack("12", "modprobe", "write('/proc/sys/kernel/modprobe', '/tmp/x')", "EACCES EROFS ENOENT"),
    Attack("12", "sysrq", "write('/proc/sysrq-trigger', 'h')", "EACCES EROFS ENOENT"),
    Attack("12", "anything in /proc/sys", "writable_below('/proc/sys')", "[]", "EACCES []"),
    Attack(
        "12",
        PERMISSIONS,
        "writable_below('/proc', skip=('pressure', 'self', 'sys'))",
        "[]",
        "EACCES []",
    ),
    Attack("12", "a sysctl by number", "syscall(156, 142, 0)", "ENOSYS EPERM"),
    Attack("13", "cgroups", "glob.glob('/sys/fs/cgroup/*')", "[]", "[]", contained=""),  # they can be read
    Attack(
        "13",
        "a release agent",
        "write('/sys/fs/cgroup/memory/release_agent', '/tmp/x')",
        "ENOENT",
        "EACCES",
        "EROFS ENOENT EACCES",
    ),
    Attack("13", "anything of the kernel in /sys", "writable_below('/sys')", "[]"),
    Attack("13", "mount them", "call(libc.mount(b'cgroup', b'/tmp', b'cgroup', 0, b'memory'))", "EPERM"),
    Attack("14", "the kernel's log", "call(libc.klogctl(3, ctypes.create_string_buffer(100), 100))", "EPERM"),
    Attack("14", "by a file", "read('/proc/kmsg')", "EACCES EPERM"),
    Attack("14", "memory of the machine", "read('/proc/kcore')", "EACCES ENOENT EPERM"),
    Attack(
        "14",
        "addresses of the kernel",
        "{line.split()[0].strip(b'0') for line in open('/proc/kallsyms', 'rb')}",
        "{b''} set()",
        "EACCES",
    ),
    Attack(
        "15",
        "secrets in what tells of mounts",
        "SECRET.encode() in open('/proc/self/mountinfo', 'rb').read()",
        "False",
        OF_BUBBLEWRAP,
    ),
    Attack("15", "the name of the host", "socket.gethostname()", "sandbox", OF_BUBBLEWRAP),
    # Processes
    Attack(
        "21",
        "see a process of the host",
        "os.path.exists('/proc/%d' % VICTIM) and seen(VICTIM)",
        "False",
        OF_BUBBLEWRAP,
    ),
    Attack("21", "end it", "os.kill(VICTIM, signal.SIGKILL)", "ESRCH", "EPERM"),
    Attack(
        "21", "end it by a descriptor", "signal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)", "ESRCH", "EPERM"
    ),
    Attack("21", "end its group", "os.killpg(VICTIM, signal.SIGKILL)", "ESRCH", "EPERM ESRCH"),
    Attack(
        "21",
        "have it signalled by a descriptor",
        "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, VICTIM)",
        "ESRCH",
        OF_BUBBLEWRAP,
    ),
    Attack(
        "21",
        "limit it",
        "resource.prlimit(VICTIM, resource.RLIMIT_CPU, (1, 1))",
        "ESRCH ProcessLookupError",
        "EPERM",
    ),
    Attack("21", "slow it", "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)", "ESRCH", "EPERM EACCES"),
    Attack("21", "keep it off the CPUs", "os.sched_setaffinity(VICTIM, {0})", "ESRCH", "EPERM"),
    Attack(
        "21",
        "its keeper",
        "os.kill(os.getppid(), 0) if os.getppid() > 1 else 'unseen'",
        "unseen",
        OF_BUBBLEWRAP,
    ),
    Attack("22", "end the first process", "os.kill(1, signal.SIGKILL)", "None", "EPERM"),
    Attack("22", "stop it", "os.kill(1, signal.SIGSTOP)", "None", "EPERM"),
    Attack(
        "22",
        "all signals that there are to it",
        "[os.kill(1, n) for n in range(1, 65) if n not in (32, 33)][0]",
        "None",
        "EPERM",
    ),
    Attack("22", "everybody", "os.kill(-1, signal.SIGKILL)", "None ESRCH", "EPERM"),
    Attack("23", "trace the first process", "call(libc.ptrace(16, 1, 0, 0))", "EPERM"),
    Attack("23", "read its memory", "call(libc.process_vm_readv(1, b'', 0, b'', 0, 0))", "EPERM"),
    Attack("23", "write it", "call(libc.process_vm_writev(1, b'', 0, b'', 0, 0))", "EPERM"),
    Attack("23", "be traced", "in_a_child(lambda: call(libc.ptrace(0, 0, 0, 0)))", "EPERM"),
    Attack("23", "get its descriptors", "syscall(438, None, os.pidfd_open(1), 3, 0)", "EPERM"),
    Attack("23", "compare with it", "syscall(312, 272, 1, os.getpid(), 0, 0, 0)", "EPERM"),
    Attack("23", "advise its memory", "syscall(440, None, os.pidfd_open(1), 0, 0, 0, 0)", "EPERM"),
    Attack("23", "wait for it", "os.waitid(os.P_PID, 1, os.WEXITED)", "ECHILD"),
    # Large parts of the kernel
    Attack("24", "io_uring", "syscall(425, None, 1, 0)", "EPERM"),
    Attack("24", "userfaultfd", "syscall(323, 282, 0)", "EPERM"),
    Attack("24", "its device", "os.open('/dev/userfaultfd', os.O_RDWR)", "ENOENT", "ENOENT EACCES"),
    Attack("24", "keys", "syscall(250, 219, 0, -3, 0, 0, 0)", "ENOSYS"),
    Attack("24", "a key", "syscall(248, 217, 0, 0, 0, 0, 0)", "ENOSYS"),
    Attack("24", "those that there are", "read('/proc/keys')", "b''", "EACCES"),
    Attack("24", "bpf", "syscall(321, 280, 0, 0, 0)", "EPERM"),
    Attack("24", "perf", "syscall(298, 241, 0, 0, -1, -1, 0)", "EPERM"),
    Attack("24", "fanotify", "syscall(300, 262, 0, 0)", "EPERM"),
    Attack("24", "quotas", "syscall(179, 60, 0, 0, 0, 0)", "EPERM"),
    Attack("24", "modules", "syscall(175, 105, 0, 0, 0)", "EPERM"),
    Attack("24", "another kernel", "syscall(246, 104, 0, 0, 0, 0)", "EPERM"),
    Attack("24", "reboot, without its magic numbers", "syscall(169, 142, 0, 0, 0, 0)", "EPERM"),
    Attack("24", "a call that nobody knows yet", "syscall(500, None)", "ENOSYS"),
    Attack("24", "personality", "syscall(135, 92, 0x0400000)", "EPERM"),
    Attack("25", "calls of x32", "in_a_child(lambda: syscall(0x40000000 + 39, 0x40000000 + 39))", "ENOSYS"),
    Attack("25", "calls of ia32", "in_a_child(ia32)", "signal~31"),
    Attack("26", "AF_VSOCK", "socket.socket(40, socket.SOCK_STREAM)", "EAFNOSUPPORT"),
    Attack("26", "AF_ALG", "socket.socket(38, socket.SOCK_SEQPACKET)", "EAFNOSUPPORT"),
    Attack("26", "AF_PACKET", "socket.socket(17, socket.SOCK_RAW)", "EAFNOSUPPORT"),
    Attack("26", "in the old way", "socket.socket(socket.AF_INET, 10, 768)", "EPERM", "EPERM EAFNOSUPPORT"),
    Attack("26", "raw", "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "EPERM", "EPERM EAFNOSUPPORT"),
    Attack("26", "netfilter", "socket.socket(16, socket.SOCK_RAW, 12)", "EPROTONOSUPPORT"),
    Attack("26", "uevents", "socket.socket(16, socket.SOCK_RAW, 15)", "EPROTONOSUPPORT"),
    Attack("26", "AF_UNSPEC, by socketpair", "socket.socketpair(16)", "EAFNOSUPPORT"),
    Attack("27", "a terminal", "os.open('/dev/tty', os.O_RDWR)", "ENXIO", "EACCES"),
    Attack("27", "type into one of one's own", "type_into(os.openpty()[1])", "EPERM", "EACCES"),
    Attack(
        "27",
        "its line discipline",
        "fcntl.ioctl(os.openpty()[1], 0x5423, b'\\2\\0\\0\\0')",
        "EPERM",
        "EACCES",
    ),
    # Limits
    Attack("28", "be nicer to oneself", "os.nice(-5)", "EPERM"),
    Attack("28", "real time", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", "EPERM"),
    Attack("28", "real time of the disk", "syscall(251, 30, 1, 0, 1 << 13)", "EPERM"),
    Attack("28", "never be out of memory", "write('/proc/self/oom_score_adj', '-1')", "EACCES"),
    Attack(
        "28",
        "more files",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (2 ** 20, 2 ** 20))",
        "ValueError EPERM",
    ),
    Attack(
        "28",
        "more processes",
        "resource.setrlimit(resource.RLIMIT_NPROC, (2 ** 20, 2 ** 20))",
        "ValueError EPERM",
        OF_BUBBLEWRAP,
    ),
    Attack("28", "more than a few queues", "queues() < 10", "True", OF_BUBBLEWRAP),
    Attack("12", "have its core handed to the host", "set_limit(resource.RLIMIT_CORE, 0)", "(1,~1)"),
    Attack("28", "a core", "set_limit(resource.RLIMIT_CORE, 2 ** 20)", "(1,~1)"),
    Attack(
        "28",
        "all that a user may watch",
        "[libc.inotify_init() for _ in range(64)].count(-1) > 0 or 'all'",
        "True" if not IS_ROOT else "True all",
        OF_BUBBLEWRAP,
    ),
    Attack("29", "the clock", "time.clock_settime(time.CLOCK_REALTIME, 0)", "EPERM"),
    Attack("29", "adjust it", "syscall(159, 171, 0)", "EPERM"),
    Attack("29", "the host's name", "socket.sethostname('x')", "EPERM"),
    # What is secret
    Attack(
        "30", "secrets of the program in the environment", "'SECRET_OF_THE_PROGRAM' in os.environ", "False"
    ),
    Attack("30", "in that of others", "environments()", "False"),
    Attack("30", "in command lines", "in_command_lines()", "False", OF_BUBBLEWRAP),
    Attack("32", "a neighbour's file", "read(NEIGHBOURS_FILE)", "ENOENT", "EACCES ENOENT"),
    Attack(
        "32",
        "its socket",
        "connect(socket.SOCK_STREAM, '\\0' + NEIGHBOURS_SOCKET, socket.AF_UNIX)",
        "ECONNREFUSED",
        "EAFNOSUPPORT",
    ),
    Attack("32", "its shared memory", "os.listdir('/dev/shm')", "[]", "EACCES"),
    Attack("32", "its queues", "open('/proc/sysvipc/shm').read().count('\\n')", "1", "EACCES"),
    # The network
    Attack("33", "TCP out", "connect(socket.SOCK_STREAM, ('192.0.2.1', 80))", "ENETUNREACH", "EAFNOSUPPORT"),
    Attack("33", "UDP out", "connect(socket.SOCK_DGRAM, ('192.0.2.1', 53))", "ENETUNREACH", "EAFNOSUPPORT"),
    Attack(
        "33",
        "IPv6 out",
        "connect(socket.SOCK_STREAM, ('2001:db8::1', 80), socket.AF_INET6)",
        "ENETUNREACH EADDRNOTAVAIL",
        "EAFNOSUPPORT",
    ),
    Attack(
        "33", "a multicast", "connect(socket.SOCK_DGRAM, ('224.0.0.1', 9))", "ENETUNREACH", "EAFNOSUPPORT"
    ),
    Attack(
        "33",
        "another protocol",
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)",
        "EPROTONOSUPPORT",
        "EPROTONOSUPPORT EAFNOSUPPORT",
    ),
    Attack(
        "34",
        "the metadata of a cloud",
        "connect(socket.SOCK_STREAM, ('169.254.169.254', 80))",
        "ENETUNREACH",
        "EAFNOSUPPORT",
    ),
    Attack(
        "35",
        "the host's loopback",
        "connect(socket.SOCK_STREAM, ('127.0.0.1', PORT))",
        "ECONNREFUSED",
        "EAFNOSUPPORT",
    ),
    Attack(
        "35",
        "the host's loopback, version 6",
        "connect(socket.SOCK_STREAM, ('::1', PORT), socket.AF_INET6)",
        "ECONNREFUSED EADDRNOTAVAIL ENETUNREACH",
        "EAFNOSUPPORT",
    ),
    Attack(
        "35",
        "the host's address",
        "connect(socket.SOCK_STREAM, (ADDRESS, PORT))",
        "ENETUNREACH ECONNREFUSED",
        "EAFNOSUPPORT",
    ),
    Attack(
        "35",
        "add a network device",
        "subprocess.run(['ip', 'link', 'add', 'x', 'type', 'dummy'], capture_output=True).returncode",
        "1 2 255 ENOENT",
    ),
    Attack(
        "36",
        "ask for a name",
        "socket.getaddrinfo('example.org', 80)",
        "gaierror EAI_AGAIN -2 -3 -5 "
        "[Errno~-3]~Temporary~failure~in~name~resolution [Errno~-2]~Name~or~service~not~known",
    ),
    Attack(
        "37",
        "an abstract socket of the host",
        "connect(socket.SOCK_STREAM, '\\0' + ABSTRACT, socket.AF_UNIX)",
        "ECONNREFUSED",
        "EAFNOSUPPORT",
    ),
    Attack(
        "37",
        "a socket of the host by its path",
        "connect(socket.SOCK_STREAM, SECRET_FOLDER + '/s', socket.AF_UNIX)",
        "ENOENT",
        "EAFNOSUPPORT",
    ),
    Attack(
        "37",
        "by a pair",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].connect(SECRET_FOLDER + '/s')",
        "ENOENT",
        "EPERM",
    ),
    Attack(
        "37",
        "docker's",
        "[path for path in ('/var/run/docker.sock', '/run/docker.sock',"
        " '/run/containerd/containerd.sock') if os.access(path, os.R_OK)]",
        "[]",
        OF_BUBBLEWRAP,
    ),
    Attack(
        "37",
        "the keeper's, by the paths that sockets tell",
        "[path for path in told_paths()"
        " if tell(connect, socket.SOCK_STREAM, path, socket.AF_UNIX) not in ('ENOENT', 'EAFNOSUPPORT')]",
        "[]",
    ),
    Attack(
        "40",
        "listen where the proxy does",
        "socket.create_server(('127.0.0.1', 3128))",
        "EADDRINUSE",
        "EAFNOSUPPORT",
    ),
    Attack("40", "beside it", "listen_beside()", "EADDRINUSE", "EAFNOSUPPORT"),
    Attack(
        "40",
        "find who listens there",
        "[fd for fd in sockets() if fd.family == socket.AF_INET and fd.getsockname()[1] == 3128]",
        "[]",
    ),
    Attack(
        "60", "a thread that was there before", "in_another_thread(lambda: read(SECRET))", "ENOENT", "EACCES"
    ),
    Attack(
        "60",
        "the thread of the control channel",
        "in_the_control_thread(lambda: read(SECRET))",
        "ENOENT",
        "EACCES",
    ),
    Attack("60", "a child of a child", "in_a_child(in_a_child, read, SECRET)", "ENOENT", "EACCES"),
]

# Who is root in a container has some privileges over what is the image's, and none more over this machine.
_SAME_FOR_ROOT = {2, 5, 6, 7, 9, 12, 13, 14, 21, 23, 24, 25, 26, 28, 29, 30, 33, 34, 35, 37, 40}

OF_ROOT = [
    *(
        attack
        for attack in ATTACKS
        if int(attack.row) in _SAME_FOR_ROOT and attack.allowed("container") and attack.what != PERMISSIONS
    ),
    Attack(
        "12", "write anything of the kernel", "taken_below('/proc', skip=('pressure', 'self', 'sys'))", "[]"
    ),
    Attack("3", "find a folder of the host", "found(os.path.basename(SECRET_FOLDER))", "[]"),
    Attack("4", "change the guest", "write(GUEST + '/init.py')", "EROFS"),
    Attack("4", "replace it", "os.rename(GUEST, GUEST + '-old')", "EBUSY"),
    Attack("4", "give it to somebody", "os.chown(GUEST + '/init.py', 1, 1)", "EROFS"),
    Attack("4", "leave something where the host looks", "write(os.path.dirname(GUEST) + '/host/x')", "EROFS"),
    Attack("8", "a node of a device in /dev", "os.mknod('/dev/disk', 0o60600, os.makedev(254, 0))", "EPERM"),
    Attack("10", "descriptors of folders and files that were left open", "left_open()", "[]"),
    Attack(
        "11", "capabilities but for files, users and signals", "capabilities() - {0, 1, 3, 5, 6, 7}", "set()"
    ),
    Attack(
        "11",
        "capabilities of a file",
        "in_a_child(lambda: os.setxattr('mine', 'security.capability', CAPABLE))",
        "EPERM",
    ),
    Attack("11", "new privileges", "call(libc.prctl(38, 0, 0, 0, 0))", "EINVAL"),
    Attack("11", "privileges back, once they are given up", "in_a_child(become_and_back)", "EPERM"),
    Attack("22", "end the first process", "os.kill(1, signal.SIGKILL)", "None"),
    Attack("22", "stop it", "os.kill(1, signal.SIGSTOP)", "None"),
]

# Functions that some of the attacks use.
MORE = """
CAPABLE = struct.pack('<5I', 0x2000001, 0xffffffff, 0, 0xffffffff, 0)
write('mine')
SEEN = {part for path in (sys.prefix, sys.base_prefix, GUEST, sys.executable) for part in path.split('/')}

def found(name):
    paths = []
    for path, folders, _ in os.walk('/'):
        if name in folders:
            paths.append(path)
        if path.count('/') > 2 or path in ('/proc', '/sys', '/usr'):
            folders.clear()
    return paths

def queues():
    opened = []
    while len(opened) < 100:
        name = b'/queue-%d' % len(opened)
        fd = libc.mq_open(name, os.O_RDWR | os.O_CREAT, 0o600, None)
        if fd == -1: break
        libc.mq_unlink(name)
        opened.append(fd)
    for fd in opened: os.close(fd)
    return len(opened)

def set_limit(which, limit):
    resource.setrlimit(which, (limit, limit))
    return resource.getrlimit(which)

def all_terminals():
    opened = []
    try:
        while len(opened) < 600:
            opened += os.openpty()
    except OSError:
        return len(opened) < 600
    finally:
        for fd in opened: os.close(fd)
    return False

def others_at(name):
    here = os.readlink('/proc/self/' + name)
    paths = [path for path in glob.glob('/proc/[0-9]*/' + name) if '/1/' not in path]
    found = []
    for path in paths:
        try: found.append(os.readlink(path))
        except OSError: pass
    return [path for path in found if path != here]

def left_open():
    found = []
    for fd in os.listdir('/proc/self/fd'):
        try: path, mode = os.readlink('/proc/self/fd/' + fd), os.stat('/proc/self/fd/' + fd).st_mode
        except OSError: continue
        if path.startswith('/memfd:') or path == '/dev/null' or path.startswith('/proc/'): continue
        if not (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)) and not path.startswith('anon_inode'):
            found.append(path)
    return found

def sockets():
    found = []
    for fd in os.listdir('/proc/self/fd'):
        try: found.append(socket.socket(fileno=os.dup(int(fd))))
        except OSError: pass
    return found

def told_paths():
    paths = {s.getsockname() for s in sockets() if s.family == socket.AF_UNIX and s.getsockname()}
    folders = {os.path.dirname(path) for path in paths if isinstance(path, str)}
    return {*paths} | {folder + '/../../s' for folder in folders}

def capabilities():
    sets = [int(line.split()[1], 16) for line in open('/proc/self/status') if line.startswith('Cap')]
    return {number for number in range(64) for each in sets if each >> number & 1}

def become_and_back():
    os.setresuid(1, 1, 1)
    os.setresuid(0, 0, 0)

def run_setuid():
    shutil.copy('/usr/bin/id', 'id')
    os.chmod('id', 0o6755)
    uids = [subprocess.check_output([program, '-u'], text=True) for program in ('./id', 'id')]
    return sum(uid.strip() != str(os.getuid()) for uid in uids)

def writable_below(folder, skip=(), takes=lambda fd: True):
    found = []
    for path, folders, files in os.walk(folder):
        if path == '/proc':
            skip = ('thread-self', *skip)
            folders[:] = [name for name in folders if not name.isdigit() and name not in skip]
        for name in files:
            if name in ('ns_last_pid',): continue  # everybody has the permission; the kernel asks for more
            try: fd = os.open(os.path.join(path, name), os.O_WRONLY)
            except OSError: continue
            # With which engines cover some files.
            is_null = os.fstat(fd).st_rdev == os.stat('/dev/null').st_rdev
            if takes(fd) and not is_null:
                found.append(os.path.join(path, name))
            os.close(fd)
    return found

def taken_below(folder, skip=()):
    return writable_below(folder, skip, lambda fd: tell(os.write, fd, b'') == '0')

def seen(pid):
    return VICTIMS_NAME in open('/proc/%d/cmdline' % pid).read()

def ia32():
    if COLUMN: os.kill(os.getpid(), 31)
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')  # mov eax, 20; int 0x80; ret
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()

def type_into(fd):
    fcntl.ioctl(fd, 0x5412, b'x')

def environments():
    for path in glob.glob('/proc/[0-9]*/environ'):
        try: text = open(path, 'rb').read()
        except OSError: continue
        if b'SECRET_OF_THE_PROGRAM' in text: return True
    return False

def in_command_lines():
    return any(SECRET in open(path, errors='replace').read() for path in glob.glob('/proc/[0-9]*/cmdline'))

def listen_beside():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(('127.0.0.1', 3128))
    s.listen()

def in_another_thread(do):
    told = []
    thread = threading.Thread(target=lambda: told.append(tell(do)))
    thread.start(); thread.join()
    raise OSError(getattr(errno, told[0]), '') if told[0].startswith('E') else ValueError(told[0])

def in_the_control_thread(do):
    told, done = [], threading.Event()
    def there():
        told.append(tell(do)); done.set()
    get_ipython().kernel.control_thread.io_loop.add_callback(there)
    done.wait(10)
    raise OSError(getattr(errno, told[0]), '') if told[0].startswith('E') else ValueError(told[0])
"""


@dataclass
class Surroundings:
    """What code must not reach: a secret file beside a listening socket, a process, services, a neighbour."""

    folder: Path
    victim: subprocess.Popen[bytes]
    port: int
    heard: list[bytes]
    names: Mapping[str, object]

    @property
    def are_well(self) -> bool:
        untouched = (self.folder / "secret").read_text() == "secret" and len(os.listdir(self.folder)) == 2
        return untouched and self.victim.poll() is None and not self.heard


def listening(heard: list[bytes], family: int, address: object) -> socket.socket:
    server = socket.socket(family)
    server.bind(address)  # type: ignore[arg-type]  # of the family
    server.listen()

    def hear() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # it was closed
                return
            heard.append(connection.recv(1))
            connection.close()

    threading.Thread(target=hear, daemon=True).start()
    return server


def own_address() -> str:
    """Of this machine in its network; where it has none, one that is nobody's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))
        except OSError:
            return "192.0.2.2"
        return str(asked.getsockname()[0])


@pytest.fixture(scope="module")
def surroundings(runtime_folder: Path) -> Iterator[Surroundings]:
    folder = Path(tempfile.mkdtemp(prefix="cs-secret"))
    folder.chmod(0o755)
    (folder / "secret").write_text("secret")
    (folder / "secret").chmod(0o644)
    name = secrets.token_hex(16)
    heard: list[bytes] = []
    os.environ["SECRET_OF_THE_PROGRAM"] = name
    servers = [
        listening(heard, socket.AF_INET, ("0.0.0.0", 0)),
        listening(heard, socket.AF_UNIX, f"\0{name}"),
        listening(heard, socket.AF_UNIX, str(folder / "s")),
    ]
    victim = subprocess.Popen(["sleep", "100000"], start_new_session=True)
    port = int(servers[0].getsockname()[1])
    names = {
        "SECRET": str(folder / "secret"),
        "SECRET_FOLDER": str(folder),
        "ABSTRACT": name,
        "ADDRESS": own_address(),
        "GUEST": str(Path(__file__).parent.parent.parent / "code_sandboxes/guest"),
        "NEIGHBOURS_FILE": f"/tmp/{name}",
        "NEIGHBOURS_SOCKET": f"{name}-neighbour",
        "PORT": port,
        "VICTIM": victim.pid,
        "VICTIMS_NAME": "100000",
    }
    yield Surroundings(folder, victim, port, heard, names)
    del os.environ["SECRET_OF_THE_PROGRAM"]
    victim.kill()
    victim.wait()
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    shutil.rmtree(folder)


def create(method: Method, **options: object) -> Sandbox:
    needs_isolation(method)
    if method == "container":
        return Sandbox.create("local-docker", **options)  # type: ignore[arg-type]  # any
    return Sandbox.create("local-jupyter", isolation=method, **options)  # type: ignore[arg-type]  # any


@pytest.fixture(scope="module", params=ENCLOSURES)
def method(request: pytest.FixtureRequest) -> Method:
    """How sandboxes are enclosed."""
    method: Method = request.param
    return method


@pytest.fixture(scope="module")
def neighbour(method: Method, surroundings: Surroundings) -> Iterator[Sandbox]:
    """An enclosed sandbox with a file, shared memory and a socket."""
    with create(method) as sandbox:
        given(sandbox, surroundings.names)
        done = sandbox.run_code(
            "import os, socket\nopen(NEIGHBOURS_FILE, 'w').close(); open('/dev/shm/x', 'w').close()\n"
            "server = socket.socket(socket.AF_UNIX); server.bind('\\0' + NEIGHBOURS_SOCKET); server.listen()"
        )
        assert done.error is None, done.error
        yield sandbox


def given(sandbox: Sandbox, names: Mapping[str, object]) -> None:
    """Let code in *sandbox* have these."""
    done = sandbox.run_code("\n".join(f"{name} = {value!r}" for name, value in names.items()))
    assert done.error is None, done.error


@pytest.fixture(scope="module")
def enclosed(method: Method, surroundings: Surroundings, neighbour: Sandbox) -> Iterator[Sandbox]:
    with create(method, network_policy="none") as sandbox:
        prepare(sandbox, surroundings)
        yield sandbox


@pytest.fixture(scope="module")
def root_contained(surroundings: Surroundings) -> Iterator[Sandbox]:
    with create("container", network_policy="none", user="root") as sandbox:
        prepare(sandbox, surroundings)
        yield sandbox


@pytest.fixture(scope="module")
def landlocked(surroundings: Surroundings) -> Iterator[Sandbox]:
    with create("landlock", network_policy="none") as sandbox:
        prepare(sandbox, surroundings)
        yield sandbox


def prepare(sandbox: Sandbox, surroundings: Surroundings) -> None:
    given(sandbox, surroundings.names)
    if sandbox.variant == SandboxVariant.LOCAL_DOCKER:
        given(sandbox, {"GUEST": GUEST})
    for code in (PREAMBLE, MORE):
        done = sandbox.run_code(code)
        assert done.error is None, done.error


def outcome(sandbox: Sandbox, code: str) -> str:
    # With a child there may be two who come to the end of the line.
    result = sandbox.run_code(f"told = tell(lambda: {code})\nprint(told, flush=True)")
    assert result.error is None, result.error
    return result.stdout.strip().replace(" ", "~") or "nothing"


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_in_an_enclosure(attack: Attack, method: Method, enclosed: Sandbox) -> None:
    allowed = attack.allowed(method)
    assert outcome(enclosed, attack.code) in allowed or not allowed


@pytest.mark.slow
@pytest.mark.parametrize("attack", OF_ROOT, ids=str)
def test_in_a_container_in_which_code_is_root(attack: Attack, root_contained: Sandbox) -> None:
    assert outcome(root_contained, attack.code) in attack.allowed("container")


@pytest.mark.slow
@pytest.mark.parametrize("attack", [each for each in ATTACKS if each.landlocked != OF_BUBBLEWRAP], ids=str)
def test_where_there_is_only_landlock(attack: Attack, landlocked: Sandbox) -> None:
    assert outcome(landlocked, attack.code) in attack.allowed("landlock")


def test_isolation_is_there_where_it_is_required() -> None:
    if os.environ.get(REQUIRED) == "1":
        assert (why_not("bubblewrap"), why_not("landlock")) == ("", "")


def test_after_all_of_it_the_sandbox_the_machine_and_a_neighbour_are_well(
    enclosed: Sandbox, neighbour: Sandbox, surroundings: Surroundings
) -> None:
    for sandbox in (enclosed, neighbour):
        assert sandbox.run_code("40 + 2").text == "42"
    assert neighbour.files.exists(str(surroundings.names["NEIGHBOURS_FILE"]))
    assert surroundings.are_well


@pytest.mark.slow
def test_the_machine_is_well_where_code_was_root_in_a_container(
    root_contained: Sandbox, surroundings: Surroundings
) -> None:
    assert root_contained.run_code("40 + 2").text == "42"
    assert surroundings.are_well


@pytest.mark.slow
def test_the_machine_is_well_where_there_is_only_landlock(
    landlocked: Sandbox, surroundings: Surroundings
) -> None:
    assert landlocked.run_code("40 + 2").text == "42"
    assert surroundings.are_well


# Files, as the program asks for them


def test_row_16_and_17_what_a_link_leads_to_is_the_sandboxs(
    enclosed: Sandbox, surroundings: Surroundings, tmp_path: Path
) -> None:
    secret = str(surroundings.names["SECRET"])
    enclosed.run_code(f"os.makedirs('links', exist_ok=True); os.symlink({secret!r}, 'links/link')")
    up = "../" * 20 + secret.lstrip("/")
    for path in ("links/link", f"/proc/self/root{secret}", f"/proc/1/root{secret}", up, f"/workspace/{up}"):
        with pytest.raises(OSError, match=r"No such file|Permission denied"):
            enclosed.files.read(path)
        with pytest.raises(OSError, match=r"No such file|Permission denied"):
            enclosed.files.download(path, tmp_path / "file")
    with pytest.raises(OSError, match="lead out of the folder"):
        enclosed.files.download("links", tmp_path / "folder")
    assert os.listdir(tmp_path) == []
    assert surroundings.are_well


def test_row_18_what_is_no_file_is_an_error_and_keeps_nobody(enclosed: Sandbox, tmp_path: Path) -> None:
    enclosed.run_code(
        "os.makedirs('odd', exist_ok=True); os.mkfifo('odd/pipe')\n"
        "server = socket.socket(socket.AF_UNIX); server.bind('odd/socket')"
    )
    for path in ("odd/pipe", "odd/socket", "/dev/zero", "/dev/ptmx"):
        with pytest.raises(OSError, match=path):
            enclosed.files.download(path, tmp_path / "x")
    with pytest.raises(OSError, match="odd"):
        enclosed.files.download("odd", tmp_path / "odd")
    assert os.listdir(tmp_path) == []


def test_row_19_a_setuid_program_is_none_when_it_has_come_out(enclosed: Sandbox, tmp_path: Path) -> None:
    enclosed.run_code(
        "os.makedirs('su', exist_ok=True); shutil.copy('/usr/bin/id', 'su/id'); os.chmod('su/id', 0o6755)"
    )
    enclosed.files.download("su", tmp_path / "su")
    enclosed.files.download("su/id", tmp_path / "id")
    for path in (tmp_path / "su/id", tmp_path / "id"):
        status = path.stat()
        assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID)
        assert status.st_uid == os.geteuid()


def test_row_20_names_that_lead_out_are_refused(enclosed: Sandbox, tmp_path: Path) -> None:
    enclosed.run_code("os.makedirs('slip', exist_ok=True); write('slip/x'); os.symlink('../..', 'slip/up')")
    with pytest.raises(OSError, match="lead out of the folder"):
        enclosed.files.download("slip", tmp_path / "slip")
    assert os.listdir(tmp_path) == []


# What a kernel says; more of it is in test_trust.py


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (41, "reply('execute_reply', {'status': 'ok'}); forge('status', {'execution_state': 'idle'})"),
        (41, "forge('execute_result', {'data': {'text/plain': 'x'}, 'metadata': {}, 'execution_count': 1})"),
        (42, "forge('stream', {'name': 'stdout', 'text': 'x'}, parent={'header': {'msg_id': 'another'}})"),
        (43, "send(b'junk'); send(b'', b''); say('stream', '[' * 50000); say('stream', '{', key=b'wrong')"),
        (45, "[display(i) for i in range(500)]; print('x\\n' * 10000)"),
        (46, "os.write(1, b'x' * 10 ** 7); os.write(2, b'x' * 10 ** 7)"),
        (48, "[os.remove(path) for path in glob.glob('/run/*') if os.path.isfile(path)]"),
        (49, "display({'text/html': '<script>', 'image/png': '!', 'text/plain': 5}, raw=True)"),
        (50, "print('\\ud800')"),
        (51, "input()"),
    ],
)
@pytest.mark.slow
def test_rows_41_to_51_what_an_enclosed_kernel_says_does_no_harm(
    enclosed: Sandbox, neighbour: Sandbox, row: int, code: str
) -> None:
    enclosed.run_code(FORGE + code)
    wait_until(lambda: enclosed.run_code("40 + 2").text == "42")
    assert neighbour.run_code("40 + 2").text == "42"


def test_row_47_where_a_kernel_listens_is_not_in_its_file_system(enclosed: Sandbox) -> None:
    assert (
        outcome(enclosed, "[p for p in told_paths() if p[0] == '/' and os.path.lexists(os.path.dirname(p))]")
        == "[]"
    )


@pytest.mark.slow
def test_row_8_terminals_that_code_in_a_container_opens_are_none_of_those_kept_for_this_machine() -> None:
    with create("container", network_policy="none") as sandbox:
        code = (
            "import os\nheld = []\ntry:\n while True: held += os.openpty()\nexcept OSError: pass\nlen(held)"
        )
        assert int(sandbox.run_code(code).text or 0) > 64
        for descriptor in os.openpty():
            os.close(descriptor)


# Whatever ends its own sandbox, and no other


@pytest.fixture(scope="module")
def sturdy(method: Method, runtime_folder: Path) -> Iterator[Sandbox]:
    config = SandboxConfig(interrupt_grace=0.2, network_policy="none")
    with create(method, config=config) as sandbox:
        yield sandbox


@pytest.fixture
def prepared(sturdy: Sandbox, surroundings: Surroundings) -> Sandbox:
    """A sandbox whose kernel an attack may ruin."""
    wait_until(lambda: sturdy.run_code("40 + 2").text == "42")
    prepare(sturdy, surroundings)
    return sturdy


@pytest.fixture
def own(method: Method, surroundings: Surroundings) -> Iterator[Sandbox]:
    """A sandbox for one attack."""
    config = SandboxConfig(timeout=0.5, interrupt_grace=0.2, network_policy="none")
    with create(method, config=config) as sandbox:
        prepare(sandbox, surroundings)
        yield sandbox


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import re; re.match(r'(a?){40}a{40}', 'a' * 40)",
        "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)",
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "os.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_row_57_what_does_not_let_itself_be_interrupted_is_ended(prepared: Sandbox, code: str) -> None:
    result = prepared.run_code(code, timeout=0.5)
    assert result.status in ("timed_out", "kernel_died")
    wait_until(lambda: prepared.run_code("40 + 2").text == "42")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("ctypes.string_at(0)", -signal.SIGSEGV),
        ("os._exit(7)", 7),
        ("os.abort()", -signal.SIGABRT),
        (
            "import functools; sys.setrecursionlimit(10 ** 9)\n"
            "repr(functools.reduce(lambda inner, _: [inner], range(10 ** 6), []))",
            -signal.SIGSEGV,
        ),
    ],
)
def test_row_58_a_crash_is_told_with_its_signal(prepared: Sandbox, code: str, exit_code: int) -> None:
    result = prepared.run_code(code, timeout=30)
    assert (result.status, result.exit_code) == ("kernel_died", exit_code)
    assert prepared.run_code("40 + 2").text == "42"


@pytest.mark.slow
def test_what_holds_up_the_start_of_a_kernel_holds_up_no_other_sandbox_for_long(
    own: Sandbox, neighbour: Sandbox
) -> None:
    """Any process of a sandbox can stop one that is only about to be a kernel."""
    own.run_code(
        "def stop():\n"
        " while True:\n"
        "  for name in os.listdir('/proc'):\n"
        "   if name.isdigit() and int(name) not in (1, os.getpid()):\n"
        "    tell(os.kill, int(name), signal.SIGSTOP)\n"
        "threading.Thread(target=stop, daemon=True).start()"
    )
    failed = []

    def start_another() -> None:
        try:
            own.create_context("held up")
            own.run_code("1", context="held up").raise_for_status()
        except SandboxError as error:
            failed.append(error)

    thread = threading.Thread(target=start_another)
    thread.start()
    neighbour.create_context("not held up")
    assert neighbour.run_code("40 + 2", context="not held up", timeout=60).text == "42"
    thread.join(60)
    assert len(failed) <= 1  # it may have been quick enough


@pytest.mark.slow
def test_the_first_process_can_be_kept_from_its_work_only_for_ones_own_sandbox(
    own: Sandbox, neighbour: Sandbox
) -> None:
    own.run_code("tell(resource.prlimit, 1, resource.RLIMIT_NOFILE, (0, 0))")
    with contextlib.suppress(SandboxError):
        own.create_context("another")
        own.run_code("1", context="another")
    assert neighbour.run_code("40 + 2").text == "42"
    wait_until(lambda: own.run_code("40 + 2").text == "42")


# Mounts


def mounted(folder: Path) -> Path:
    """A folder below *folder* that code may write."""
    for each in (folder, *folder.parents):
        if str(each).startswith(tempfile.gettempdir() + "/"):
            each.chmod(0o755)
    (folder / "project").mkdir()
    (folder / "project").chmod(0o777)
    return folder / "project"


def end_enclosure(sandbox: Sandbox) -> None:
    """As code can do it; the next run makes another one."""
    sandbox.run_code("import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))")
    with contextlib.suppress(SandboxError):
        sandbox.create_context("another")
        sandbox.run_code("1", context="another")


@pytest.mark.slow
def test_what_code_puts_in_the_place_of_something_mounted_is_not_mounted_next_time(
    method: Method, surroundings: Surroundings, tmp_path: Path
) -> None:
    project = mounted(tmp_path)
    (project / "data").mkdir(mode=0o755)
    mounts = {project: ("/project", "rw"), project / "data": ("/data", "ro")}
    with create(method, mounts=mounts) as sandbox:
        done = sandbox.run_code(
            "import os; os.rename('/project/data', '/project/old')\n"
            f"os.symlink({str(surroundings.folder)!r}, '/project/data')"
        )
        assert done.error is None, done.error
        end_enclosure(sandbox)

        after = sandbox.run_code("print(open('/data/secret').read())")

        assert after.stdout == ""
        assert after.error is not None
        assert "replaced since the sandbox was made" in after.error.value


@pytest.mark.slow
def test_a_link_in_a_mounted_folder_leads_no_other_mount_out(method: Method, tmp_path: Path) -> None:
    project, other = mounted(tmp_path), tmp_path / "other"
    other.mkdir(mode=0o755)
    (tmp_path / "outside").mkdir(mode=0o755)
    (project / "link").symlink_to("/oldroot" + str(tmp_path / "outside"))  # where bubblewrap has this machine
    mounts = {project: ("/project", "ro"), other: ("/project/link/new", "ro")}
    if method == "bubblewrap":
        with pytest.raises(SandboxError, match="lies behind a link"):
            create(method, mounts=mounts)
    else:  # to an engine it leads to where it does in the container
        create(method, mounts=mounts).kill()
    assert os.listdir(tmp_path / "outside") == []


# Networks


@pytest.mark.slow
def test_row_37_with_the_machines_network_its_abstract_sockets_are_out_of_reach(
    method: Method, surroundings: Surroundings
) -> None:
    if method == "bubblewrap" and probe().landlock < SCOPES:
        not_here(f"Landlock {SCOPES} keeps code from abstract sockets, and this is {probe().landlock}")
    with create(method, network_policy="inherit") as sandbox:
        prepare(sandbox, surroundings)
        code = "connect(socket.SOCK_STREAM, '\\0' + ABSTRACT, socket.AF_UNIX)"
        assert outcome(sandbox, code) == ("EPERM" if method == "bubblewrap" else "ECONNREFUSED")
        assert outcome(sandbox, "os.kill(VICTIM, 9)") == "ESRCH"
    assert surroundings.are_well


@pytest.mark.slow
def test_rows_33_to_40_with_an_allowlist_there_is_no_way_but_the_proxy(
    method: Method, surroundings: Surroundings
) -> None:
    with create(method, network_policy="allowlist", allowed_hosts=["example.org"]) as sandbox:
        prepare(sandbox, surroundings)
        for attack in ATTACKS:
            if attack.row in ("33", "34", "35", "36", "37"):
                assert outcome(sandbox, attack.code) in attack.allowed(method), str(attack)
        for target in (
            f"127.0.0.1:{surroundings.port}",
            "169.254.169.254:80",
            "2130706433:80",
            "0x7f.1:80",
            "localhost:80",
            "evilexample.org:443",
            "example.org:22",
            "example.org@127.0.0.1:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
        ):
            answer = (
                "(lambda s: (s.sendall(b'CONNECT %s HTTP/1.1\\r\\n\\r\\n' % TARGET), s.recv(12)))"
                "(socket.create_connection(('127.0.0.1', 3128)))[1].split()[1]"
            )
            given(sandbox, {"TARGET": target.encode()})
            assert outcome(sandbox, answer) in ("b'403'", "b'400'"), target
    assert surroundings.are_well


@pytest.mark.slow
def test_connections_to_the_proxy_that_say_nothing_keep_neither_it_nor_a_neighbour(
    method: Method, neighbour: Sandbox
) -> None:
    with create(method, network_policy="allowlist", allowed_hosts=["example.org"]) as sandbox:
        taken = sandbox.run_code(
            "import socket\nheld = []\n"
            "try:\n"
            " for _ in range(3000):\n"
            "  s = socket.socket(); s.settimeout(0.2); held.append(s); s.connect(('127.0.0.1', 3128))\n"
            "except OSError as error: print(len(held), error)",
            timeout=60,
        )
        assert taken.error is None, taken.error
        neighbour.create_context("meanwhile")
        assert neighbour.run_code("40 + 2", context="meanwhile").text == "42"
