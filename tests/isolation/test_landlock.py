"""Programs that confine themselves before they begin, where there is nothing stronger."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import zmq

if sys.platform != "linux":
    pytest.skip("Landlock is Linux's", allow_module_level=True)

from code_sandboxes.isolation import landlock
from code_sandboxes.isolation.landlock import landlocked, not_enforced, why_not

IS_ROOT = os.geteuid() == 0
PYTHON = "/usr/bin/python3"  # one that every user can run, and that needs nothing but the system

needs_landlock = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
needs_python = pytest.mark.skipif(not os.path.exists(PYTHON), reason=f"there is no {PYTHON}")

LIMITS = {"nofile": 256, "core": 0}

PREAMBLE = """
import ctypes, errno, os, resource, socket, subprocess, sys
def tell(do, *args):
    try: do(*args)
    except OSError as error: print(errno.errorcode[error.errno])
    else: print('ok')
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder for the program, in one that everybody can enter."""
    folder = Path(tempfile.mkdtemp(prefix="cf"))
    folder.chmod(0o755)
    home = folder / "home"
    home.mkdir(mode=0o700)
    if IS_ROOT:
        os.chown(home, 65534, 65534)
    yield home
    shutil.rmtree(folder)


def run(
    command: list[str],
    home: Path,
    *,
    readable: tuple[str, ...] = (),
    limits: Mapping[str, int] = LIMITS,
    block_inet: bool = True,
    user: int = 65534 if IS_ROOT else -1,
) -> subprocess.CompletedProcess[str]:
    argv, descriptor = landlocked(
        command,
        readable=readable,
        writable=[str(home)],
        limits=limits,
        block_inet=block_inet,
        uid=user,
        gid=user,
    )
    try:
        return subprocess.run(
            argv,
            pass_fds=[descriptor],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=home,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(home)},
        )
    finally:
        os.close(descriptor)


def run_python(code: str, home: Path, *, block_inet: bool = True) -> list[str]:
    done = run([PYTHON, "-c", PREAMBLE + code], home, block_inet=block_inet)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.splitlines()


@needs_landlock
@needs_python
def test_a_program_has_its_folder_and_the_system_and_nothing_else_of_the_files(home: Path) -> None:
    (home.parent / "mine").write_text("secret")

    told = run_python(
        "import json, ssl, zoneinfo, ctypes.util\n"
        "tell(open, 'file', 'w'); tell(subprocess.run, ['sh', '-c', 'cat file | cat > other'])\n"
        "tell(open, '/etc/passwd'); tell(open, '/proc/self/maps'); tell(open, '/proc/cpuinfo')\n"
        "tell(open, '/dev/null', 'w'); tell(open, '/dev/urandom', 'rb'); tell(os.listdir, '/usr/lib')\n"
        "print('outside')\n"
        "parent = f'/proc/{os.getppid()}/status'\n"
        "for path in ('/etc/shadow', '/etc/machine-id', '../mine', parent): tell(open, path)\n"
        "for path in ('/', '/root', '/home', '/tmp', '/proc', '/dev', '/run', '..'): tell(os.listdir, path)\n"
        "for path in ('/tmp/new', '/dev/shm/new', '../mine', '/usr/new', '/dev/ptmx', '/dev/tty'):\n"
        "    tell(open, path, 'w')",
        home,
    )

    assert told == [*["ok"] * 8, "outside", *["EACCES"] * 18]
    assert (home.parent / "mine").read_text() == "secret"


@needs_landlock
@needs_python
def test_without_network_no_socket_leads_out_and_pairs_work(home: Path) -> None:
    code = (
        "import asyncio, socket\n"
        "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 40): tell(socket.socket, family)\n"
        "tell(socket.socketpair); tell(asyncio.run, asyncio.sleep(0))\n"
        "tell(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM)"
    )

    assert run_python(code, home) == [*["EAFNOSUPPORT"] * 4, "ok", "ok", "EPERM"]
    assert run_python(code, home, block_inet=False) == [
        *["ok"] * 2,
        *["EAFNOSUPPORT"] * 2,
        *["ok"] * 2,
        "EPERM",
    ]


@needs_landlock
@needs_python
def test_a_program_has_no_privileges_gains_none_and_is_limited(home: Path) -> None:
    told = run_python(
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print({name: status[name].split() for name in ('CapEff', 'CapPrm', 'NoNewPrivs', 'Seccomp')})\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))\n"
        "tell(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (1, 1))\n"
        "tell(os.sched_setaffinity, os.getppid(), {0}); tell(os.setpriority, os.PRIO_USER, 0, 19)\n"
        "tell(os.nice, 1); tell(os.kill, os.getppid(), 0); tell(os.chroot, '/'); tell(os.setuid, 0)\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.shmget(0, 4096, 0o1600), ctypes.get_errno() == errno.ENOSYS)",
        home,
    )

    zeros = ["0" * 16]
    assert told[0] == str({"CapEff": zeros, "CapPrm": zeros, "NoNewPrivs": ["1"], "Seccomp": ["2"]})
    assert told[1] == "(256, 256) (0, 0)"
    assert told[2:] == ["EPERM", "EPERM", "EPERM", "ok", "EPERM", "EPERM", "EPERM", "-1 True"]


@needs_landlock
def test_sockets_of_zeromq_work_on_what_listens_already(home: Path) -> None:
    """Its threads set their own scheduling, and it ends the process where that is refused."""
    path = str(home.parent / "socket")
    code = (
        "import sys, zmq\n"
        "context = zmq.Context(); answering = context.socket(zmq.REP)\n"
        "answering.setsockopt(zmq.USE_FD, int(sys.argv[1])); answering.bind('ipc:///none')\n"
        "answering.send(answering.recv()[::-1])\n"
        "context.destroy(linger=5000)"
    )
    prefixes = tuple({os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)})
    with socket.socket(socket.AF_UNIX) as listening, zmq.Context() as context:
        listening.bind(path)
        listening.listen()
        argv, descriptor = landlocked(
            [sys.executable, "-c", code, str(listening.fileno())],
            readable=prefixes,
            writable=[str(home)],
            limits=LIMITS,
            block_inet=True,
        )
        process = subprocess.Popen(argv, pass_fds=[descriptor, listening.fileno()], cwd=home)
        os.close(descriptor)
        with context.socket(zmq.REQ) as asking:
            asking.linger = 0
            asking.connect(f"ipc://{path}")
            asking.send(b"abc")
            assert asking.poll(30_000)
            assert asking.recv() == b"cba"
        assert process.wait(30) == 0


@needs_landlock
def test_what_procfs_tells_is_held_open_so_that_it_stays_allowed(home: Path) -> None:
    """Seen otherwise: after the kernel had dropped names from its cache, ``/proc/self`` was refused."""
    done = run(["ls", "-l", "/proc/self/fd"], home)

    assert "-> /proc/cpuinfo\n" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.split("-> /proc/")[-1].isdigit()]) == 1


@needs_landlock
def test_the_program_is_itself_with_signals_as_usual_and_its_status_is_the_process_s(home: Path) -> None:
    assert run(["sh", "-c", "exit 7"], home).returncode == 7
    assert run(["sh", "-c", "kill -PIPE $$; exit 1"], home).returncode == -13


@needs_landlock
@pytest.mark.parametrize(
    ("command", "settings", "reason"),
    [
        (["no-such-program"], {}, "No such file or directory"),
        (["true"], {"readable": ("/nowhere",)}, "No such file or directory: '/nowhere'"),
        (["true"], {"limits": {"nothing": 1}}, "no such limit: 'nothing'"),
    ],
)
def test_what_is_not_possible_is_one_line_and_nothing_runs(
    command: list[str], settings: dict[str, tuple[str, ...]], reason: str, home: Path
) -> None:
    done = run(command, home, **settings)  # type: ignore[arg-type]  # one of several

    assert done.returncode == 126
    assert done.stderr.startswith("the sandbox could not be made: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


@pytest.mark.parametrize("document", [b"", b"{}", b"[]", json.dumps({"limits": {}}).encode()])
def test_a_document_that_is_none_ends_it(document: bytes, home: Path) -> None:
    argv, descriptor = landlocked(["true"], readable=[], writable=[], limits={}, block_inet=True)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, document, 0)
    done = subprocess.run(argv, pass_fds=[descriptor], capture_output=True, text=True, check=False)
    os.close(descriptor)

    assert done.returncode == 126
    assert done.stderr.startswith("the sandbox could not be made: ")


@pytest.mark.parametrize(
    ("version", "why", "more"),
    [(0, "has none", True), (2, "has version 2", True), (5, "", True), (6, "", False)],
)
def test_what_this_machine_lacks_is_told_beforehand(
    version: int, why: str, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landlock, "_version", lambda: version)

    assert why_not().endswith(why)
    assert bool(why_not()) == bool(why)
    assert ("signal" in not_enforced()) == more
