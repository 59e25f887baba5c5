"""What a process gives up: tried by real ones, of root, of an ordinary user and in a user namespace."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("giving up privileges as Linux has them needs Linux", allow_module_level=True)

from code_sandboxes.guest import confine
from code_sandboxes.isolation.seccomp import deny_filter

NOBODY = 65534
IS_ROOT = os.geteuid() == 0

as_root = pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
with_landlock = pytest.mark.skipif(
    confine.landlock_version() < confine.FIRST_WITH_TRUNCATE,
    reason="Landlock (Linux 6.2) is not enabled here",
)
with_scopes = pytest.mark.skipif(
    confine.landlock_version() < confine.FIRST_WITH_SCOPES,
    reason="Landlock with scopes (Linux 6.12) is not enabled here",
)

# Each program begins with it; *tell* says what became of something: "ok", or the name of the error.
PREAMBLE = """
import base64, ctypes, errno, os, resource, signal, socket, subprocess, sys, threading
sys.path.insert(0, sys.argv[1])
import confine
def tell(do, *args):
    try: do(*args)
    except OSError as error: print(errno.errorcode[error.errno])
    else: print('ok')
"""


def python_of_everybody() -> str:
    """An interpreter that an ordinary user can run."""
    for path in (sys.executable, "/usr/bin/python3"):
        real = Path(path).resolve()
        if real.exists() and all(parent.stat().st_mode & 0o001 for parent in real.parents):
            return path
    pytest.skip("no Python here that an ordinary user can run (this one is in a folder that is root's)")


@pytest.fixture(scope="module")
def everybody() -> Iterator[Path]:
    """A folder that everybody can read, with the module in it."""
    folder = Path(tempfile.mkdtemp(prefix="cf"))
    folder.chmod(0o755)
    shutil.copy(confine.__file__, folder)
    yield folder
    shutil.rmtree(folder)


def run(
    everybody: Path, code: str, *args: str, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, python_of_everybody(), "-I", "-S", "-c", PREAMBLE + code, str(everybody), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/")


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.stderr == ""
    return done.stdout.splitlines()


def ordinary() -> tuple[str, ...]:
    """What makes a command an ordinary user's."""
    return ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups") if IS_ROOT else ()


def in_user_namespace() -> tuple[str, ...]:
    """What makes an ordinary user's command one with every capability in a namespace of its own.

    It is user 0 there: for another one bubblewrap makes a second namespace, in which no mount can be changed.
    """
    inside = (*ordinary(), "bwrap", "--unshare-user", "--uid", "0", "--gid", "0", "--cap-add", "ALL")
    prefix = (*inside, "--bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/mnt", "--")
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespace can be made here (as in a container, or by a sysctl)")
    return prefix


# Privileges


@as_root
def test_root_becomes_another_user_and_nothing_brings_it_back(everybody: Path) -> None:
    done = run(
        everybody,
        "os.setgroups([4, 6])\n"
        "confine.drop_privileges(10001, 10002)\n"
        "print(os.getresuid(), os.getresgid(), os.getgroups())\n"
        "status = confine.read_status()\n"
        "print({status[name][0] for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')})\n"
        "tell(os.setuid, 0); tell(os.setgroups, [0]); tell(open, '/etc/shadow'); tell(os.chroot, '/')",
    )

    assert lines(done) == [
        "(10001, 10001, 10001) (10002, 10002, 10002) []",
        "{'0000000000000000'}",
        *("EPERM", "EPERM", "EACCES", "EPERM"),
    ]


def test_in_a_user_namespace_one_becomes_another_user_and_loses_every_capability(everybody: Path) -> None:
    done = run(
        everybody,
        "confine.map_user(10001, 10002)\n"
        "print(confine.read_status()['CapEff'][0] != '0000000000000000')\n"
        "confine.drop_privileges(-1, -1)\n"
        "status = confine.read_status()\n"
        "print(os.getresuid(), os.getresgid())\n"
        "print({status[name][0] for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')})\n"
        "tell(confine.bound_files, '/mnt', 4096, 10)",
        prefix=in_user_namespace(),
    )

    assert lines(done) == [
        "True",
        "(10001, 10001, 10001) (10002, 10002, 10002)",
        "{'0000000000000000'}",
        "EPERM",
    ]


def test_capabilities_that_a_program_may_gain_are_left_only_where_none_can_be_gained(everybody: Path) -> None:
    """An ordinary user cannot empty the bounding set; no_new_privs makes it mean nothing."""
    done = run(
        everybody,
        "tell(confine.drop_privileges, -1, -1)\n"
        "confine.no_new_privileges()\n"
        "tell(confine.drop_privileges, -1, -1)",
        prefix=ordinary(),
    )

    assert lines(done) == ["EPERM", "ok"]


def test_an_ordinary_user_cannot_become_another_and_is_told(everybody: Path) -> None:
    done = run(
        everybody,
        "confine.no_new_privileges()\ntell(confine.drop_privileges, 10001, 10001)",
        prefix=ordinary(),
    )

    assert lines(done) == ["EPERM"]


@pytest.mark.parametrize("field", ["Uid", "Gid", "Groups", "CapEff", "CapInh", "CapAmb"])
def test_what_was_not_dropped_is_an_error_that_names_it(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"Uid": ["7"] * 4, "Gid": ["8"] * 4, "Groups": [], "NoNewPrivs": ["1"], "CapBnd": ["1"]}
    status |= {name: ["0000"] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")}
    monkeypatch.setattr(confine, "read_status", lambda: status)
    confine.check_privileges(7, 8)
    status[field] = ["7", "7", "0", "7"] if field in ("Uid", "Gid") else ["4"]

    with pytest.raises(OSError, match=f"there is still {field}="):
        confine.check_privileges(7, 8)


@as_root
def test_a_setuid_program_gains_nothing(everybody: Path) -> None:
    program = shutil.copy(shutil.which("id") or "/usr/bin/id", everybody / "id")
    os.chmod(program, 0o4755)
    code = f"print(subprocess.check_output([{str(program)!r}, '-u'], text=True).strip())\n"
    done = run(everybody, f"{code}confine.no_new_privileges()\n{code}", prefix=ordinary())
    os.unlink(program)

    if lines(done)[0] != "0":
        pytest.skip("set-user-ID programs gain nothing here anyway: the file system is mounted nosuid")
    assert lines(done) == ["0", str(NOBODY)]


LOOK = """
import os, sys
for name in ("environ", "fd", "root"):
    path = f"/proc/{sys.argv[1]}/{name}"
    try: os.listdir(path) if name != "environ" else open(path).close()
    except OSError as error: print(error.errno, end=" ")
    else: print(0, end=" ")
"""


@pytest.mark.parametrize("who", ["root", "ordinary"])
def test_a_hidden_process_is_closed_to_its_own_user_and_what_it_executes_is_not(
    who: str, everybody: Path
) -> None:
    if who == "root" and not IS_ROOT:
        pytest.skip("only root can become another user")
    done = run(
        everybody,
        "if os.geteuid() == 0: confine.drop_privileges(10001, 10001)\n"
        "confine.hide(False)\n"
        f"look = {LOOK!r}\n"
        "def seen(pid): print(subprocess.check_output([sys.executable, '-ISc', look, pid], text=True))\n"
        "seen(str(os.getpid())); confine.hide(); seen(str(os.getpid())); seen('self')",
        prefix=() if who == "root" else ordinary(),
    )

    assert lines(done) == ["0 0 0 ", "13 13 13 ", "0 0 0 "]


# Resources


def test_limits_hold_for_good_and_are_never_raised(everybody: Path) -> None:
    done = run(
        everybody,
        "confine.limit_resources({'nofile': 64, 'core': 0, 'fsize': 4096})\n"
        "confine.limit_resources({'nofile': 128})\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))\n"
        "tell(lambda: [os.dup(0) for _ in range(64)])\n"
        "os.closerange(3, 64)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "file = os.memfd_create('file')\n"
        "tell(os.ftruncate, file, 4096); tell(os.ftruncate, file, 4097)\n"
        "tell(confine.limit_resources, {'nothing': 1}); tell(confine.limit_resources, {'core': -1})",
        prefix=ordinary(),
    )

    assert lines(done) == ["(64, 64) (0, 0)", "EMFILE", "ok", "EFBIG", "EINVAL", "EINVAL"]


def test_a_user_that_is_at_its_limit_of_processes_starts_no_more(everybody: Path) -> None:
    done = run(
        everybody,
        "confine.limit_resources({'nproc': 5})\n"
        "children = []\n"
        "def fork():\n"
        "    while len(children) < 20:\n"
        "        child = os.fork()\n"
        "        if child == 0: signal.pause()\n"
        "        children.append(child)\n"
        "tell(fork)\n"
        "print(len(children) <= 4)\n"
        "for child in children: os.kill(child, 9)",
        prefix=in_user_namespace(),
    )

    assert lines(done) == ["EAGAIN", "True"]


@pytest.mark.parametrize("who", ["root", "ordinary"])
def test_a_bounded_tmpfs_takes_so_many_bytes_and_files_and_keeps_what_it_forbids(
    who: str, everybody: Path
) -> None:
    if who == "root":
        if not IS_ROOT or shutil.which("bwrap") is None:
            pytest.skip("needs root and bubblewrap")
        binds = ("--bind", "/", "/", "--dev", "/dev", "--tmpfs", "/mnt", "--")
        prefix: tuple[str, ...] = ("bwrap", "--cap-add", "CAP_SYS_ADMIN", *binds)
    else:
        prefix = in_user_namespace()
    done = run(
        everybody,
        "flags = os.statvfs('/mnt').f_flag\n"
        "confine.bound_files('/mnt', 1 << 20, 20)\n"
        "print(os.statvfs('/mnt').f_flag == flags, bool(flags & os.ST_NOSUID), bool(flags & os.ST_NODEV))\n"
        "def write(): open('/mnt/big', 'wb', 0).write(bytes(1 << 20))\n"
        "def more(): open('/mnt/big', 'ab', 0).write(b'x')\n"
        "def files(): [open(f'/mnt/{i}', 'w').close() for i in range(20)]\n"
        "tell(write); tell(more); tell(files)\n"
        "tell(confine.bound_files, '/usr', 1 << 20, 20); tell(confine.bound_files, '/proc', 1 << 20, 20)",
        prefix=prefix,
    )

    assert lines(done) == ["True True True", "ok", "ENOSPC", "ENOSPC", "EINVAL", "EINVAL"]


# System calls


def test_a_filter_that_is_none_or_that_may_not_be_is_an_error(everybody: Path) -> None:
    program = base64.b64encode(deny_filter()).decode()
    done = run(
        everybody,
        f"program = base64.b64decode({program!r})\n"
        "tell(confine.filter_system_calls, program)\n"  # without no_new_privs
        "confine.no_new_privileges()\n"
        "tell(confine.filter_system_calls, b''); tell(confine.filter_system_calls, program[:-1])\n"
        "tell(confine.filter_system_calls, program[:-8])\n"  # does not end
        "tell(confine.filter_system_calls, program); tell(os.chroot, '/')\n"
        "print(confine.read_status()['Seccomp'])",
        prefix=ordinary(),
    )

    assert lines(done) == ["EACCES", "EINVAL", "EINVAL", "EINVAL", "ok", "EPERM", "['2']"]


def test_threads_that_run_already_are_filtered_too(everybody: Path) -> None:
    program = base64.b64encode(deny_filter()).decode()
    done = run(
        everybody,
        "go, ready = threading.Event(), threading.Event()\n"
        "def other():\n"
        "    ready.set(); go.wait(); tell(os.chroot, '/')\n"
        "    print(confine.libc.syscall(435, 0, 0, 0, 0), ctypes.get_errno())\n"
        "thread = threading.Thread(target=other); thread.start(); ready.wait()\n"
        "confine.no_new_privileges()\n"
        f"confine.filter_system_calls(base64.b64decode({program!r}))\n"
        "go.set(); thread.join()",
    )

    assert lines(done) == ["EPERM", "-1 38"]  # clone3(): ENOSYS


# Landlock


@pytest.fixture
def tree(everybody: Path) -> Iterator[Path]:
    """``own``, an ordinary user's, and ``other``, that anybody may write as far as modes say."""
    tree = Path(tempfile.mkdtemp(dir=everybody))
    for folder in (tree, tree / "own", tree / "other"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    (tree / "other" / "file").write_text("secret")
    (tree / "other" / "file").chmod(0o666)
    if IS_ROOT:
        os.chown(tree / "other" / "file", NOBODY, NOBODY)
    yield tree
    shutil.rmtree(tree)


RESTRICT = (
    "tree = sys.argv[2]\n"
    "confine.no_new_privileges()\n"
    "confine.restrict_files(['/usr', '/lib', '/bin', '/etc/passwd'], [tree + '/own', '/dev/null'])\n"
    "own, other = tree + '/own/', tree + '/other/'\n"
)


@with_landlock
@pytest.mark.parametrize("who", ["root", "ordinary"])
def test_files_outside_are_not_read_written_made_or_removed(who: str, tree: Path, everybody: Path) -> None:
    if who == "root" and not IS_ROOT:
        pytest.skip("only root is root")
    done = run(
        everybody,
        "os.symlink(sys.argv[2] + '/other/file', sys.argv[2] + '/own/link')\n"
        + RESTRICT
        + "tell(open, own + 'a', 'w'); tell(os.mkdir, own + 'b'); tell(os.rename, own + 'a', own + 'b/c')\n"
        "tell(open, '/etc/passwd'); tell(open, '/dev/null', 'w'); tell(subprocess.run, ['/bin/true'])\n"
        "print('outside')\n"
        "for do in (lambda: open(other + 'file'), lambda: open(own + 'link'), lambda: os.listdir(other),\n"
        "           lambda: open(own + '../other/file'), lambda: open(other + 'file', 'r+'),\n"
        "           lambda: os.open(other + 'file', os.O_RDONLY | os.O_TRUNC),\n"
        "           lambda: os.truncate(other + 'file', 0), lambda: os.unlink(other + 'file'),\n"
        "           lambda: open(other + 'new', 'w'), lambda: os.mkdir(other + 'new'),\n"
        "           lambda: os.symlink('x', other + 'new'), lambda: os.mkfifo(other + 'new'),\n"
        "           lambda: open('/etc/passwd', 'a'), lambda: open('/etc/hostname'),\n"
        "           lambda: open('/dev/zero'), lambda: os.listdir('/proc')): tell(do)\n"
        "print('across')\n"
        "tell(os.rename, own + 'b/c', other + 'c'); tell(os.rename, other + 'file', own + 'file')\n"
        "tell(os.link, other + 'file', own + 'file')",
        str(tree),
        prefix=() if who == "root" else ordinary(),
    )

    assert lines(done) == [*["ok"] * 6, "outside", *["EACCES"] * 16, "across", *["EACCES", "EACCES", "EXDEV"]]
    assert (tree / "other" / "file").read_text() == "secret"


@with_landlock
@as_root
def test_not_even_root_makes_a_device_or_mounts_something(tree: Path, everybody: Path) -> None:
    done = run(
        everybody,
        RESTRICT + "import stat\n"
        "tell(os.mknod, own + 'disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))\n"
        "tell(os.mknod, own + 'tty', stat.S_IFCHR | 0o600, os.makedev(4, 0))\n"
        "confine.libc.mount(b'none', (tree + '/own').encode(), b'tmpfs', 0, None); print(ctypes.get_errno())",
        str(tree),
    )

    assert lines(done) == ["EACCES", "EACCES", "1"]


@with_landlock
def test_what_landlock_leaves_open_is_what_is_said_of_it(tree: Path, everybody: Path) -> None:
    """Should one of these be refused some day, ``NOT_ENFORCED`` says too much, and this test tells."""
    path = str(tree / "other" / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        os.chmod(path, 0o777)
        listening.listen()
        done = run(
            everybody,
            RESTRICT + "tell(os.stat, other + 'file'); tell(os.chmod, other + 'file', 0o600)\n"
            "tell(os.utime, other + 'file', (1, 1)); tell(os.chdir, other)\n"
            "watch = confine.libc.inotify_init1(0)\n"
            "print(confine.libc.inotify_add_watch(watch, other.encode(), 0x100) > 0)\n"
            "tell(socket.socket(socket.AF_UNIX).connect, other + 'socket')\n"
            "tell(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect, ('127.0.0.1', 9))",
            str(tree),
            prefix=ordinary(),
        )

    assert lines(done) == ["ok", "ok", "ok", "ok", "True", "ok", "ok"]


@with_landlock
def test_rules_that_would_not_bind_every_thread_are_not_made(tree: Path, everybody: Path) -> None:
    done = run(
        everybody,
        "go = threading.Event()\n"
        "thread = threading.Thread(target=go.wait); thread.start()\n"
        "confine.no_new_privileges()\n"
        "tell(confine.restrict_files, ['/usr'], []); tell(confine.scope_out)\n"
        "go.set(); thread.join()\n"
        "tell(confine.restrict_files, ['/usr', '/nowhere'], [])",
    )

    assert lines(done)[0] == "EBUSY"
    assert lines(done)[2] == "ENOENT"


def test_a_kernel_without_landlock_is_an_error_that_says_what_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(confine, "landlock_version", lambda: 2)

    with pytest.raises(OSError, match=r"version 3 of Landlock is needed \(Linux 6\.2, .* has 2"):
        confine.restrict_files([], [])
    with pytest.raises(OSError, match=r"version 6 of Landlock is needed \(Linux 6\.12, .* has 2"):
        confine.scope_out()


@with_scopes
@pytest.mark.parametrize("who", ["root", "ordinary"])
def test_processes_outside_are_not_signalled_and_abstract_sockets_not_reached(
    who: str, everybody: Path
) -> None:
    if who == "root" and not IS_ROOT:
        pytest.skip("only root is root")
    name = f"\0code-sandboxes-{os.getpid()}-{who}"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(name)
        listening.listen()
        done = run(
            everybody,
            "outside = subprocess.Popen(['/bin/cat'], stdin=-1, stdout=-3)  # ends with this\n"
            "confine.no_new_privileges(); confine.scope_out()\n"
            "tell(os.kill, outside.pid, 0); tell(os.kill, outside.pid, 9); tell(os.kill, os.getppid(), 0)\n"
            f"tell(socket.socket(socket.AF_UNIX).connect, {name!r})\n"
            "child = subprocess.Popen(['/bin/cat'], stdin=-1)\n"
            "tell(os.kill, child.pid, 9); print(child.wait())\n"
            "inside = socket.socket(socket.AF_UNIX); inside.bind(''); inside.listen()\n"
            "tell(socket.socket(socket.AF_UNIX).connect, inside.getsockname())\n"
            "print(outside.poll())",
            prefix=() if who == "root" else ordinary(),
        )

    assert lines(done) == ["EPERM", "EPERM", "EPERM", "EPERM", "ok", "-9", "ok", "None"]
