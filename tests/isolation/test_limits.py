"""Code that takes all it can get: that is told truthfully, and its sandbox, others and the machine are well.

Limits of memory and CPU take cgroups; where there are none, these tests are skipped. Those of processes, disk
and open files hold for everybody. In a container all of it is the engine's to enforce.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("isolation is Linux's", allow_module_level=True)

from code_sandboxes import ExecutionResult, Sandbox, SandboxConfig, SandboxError
from code_sandboxes.isolation.plan import Method
from conftest import wait_until
from tests.isolation.needs import ENCLOSURES, needs_isolation, needs_limit

MEGABYTE = 1024**2

MEMORY, DISK, PIDS = 200, 64 * MEGABYTE, 64


@contextmanager
def enclosed(method: Method, **options: object) -> Iterator[Sandbox]:
    needs_isolation(method)
    variant, own = ("local-docker", {}) if method == "container" else ("local-jupyter", {"isolation": method})
    config = SandboxConfig(network_policy="none", interrupt_grace=0.2)
    settings = {"config": config, **own, **options}
    with Sandbox.create(variant, **settings) as sandbox:  # type: ignore[arg-type]  # any
        yield sandbox


@pytest.fixture(scope="module", params=ENCLOSURES)
def method(request: pytest.FixtureRequest) -> Method:
    """How sandboxes are enclosed."""
    method: Method = request.param
    return method


@pytest.fixture(scope="module")
def neighbour(method: Method, runtime_folder: Path) -> Iterator[Sandbox]:
    with enclosed(method) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def bounded(method: Method, neighbour: Sandbox) -> Iterator[Sandbox]:
    """A sandbox with little of everything that everybody can limit; code may leave nothing in it."""
    with enclosed(method, disk=DISK, pids=PIDS) as sandbox:
        yield sandbox


@pytest.fixture
def all_well(neighbour: Sandbox) -> Iterator[None]:
    """After the test the neighbour answers at once, and the machine has not lost what was taken."""
    yield
    began = time.monotonic()
    assert neighbour.run_code("40 + 2").text == "42"
    assert neighbour.commands.run("true").exit_code == 0
    assert time.monotonic() - began < 5


pytestmark = pytest.mark.usefixtures("all_well")


def take(sandbox: Sandbox, code: str, timeout: float | None = None) -> ExecutionResult:
    """The result of *code*; that there is something printed first lets it print without a descriptor left."""
    ready = sandbox.run_code("import os, resource, stat, subprocess, sys, threading, time; print('ready')")
    assert ready.stdout == "ready"
    return sandbox.run_code(code, timeout=timeout)


def works(sandbox: Sandbox) -> bool:
    return sandbox.run_code("40 + 2").text == "42"


# Memory

NEEDS_MORE = {
    "a bytearray": "x = bytearray(10 ** 9)",
    "many children": (
        "code = 'import time; x = bytearray(60 * 10 ** 6); time.sleep(20)'\n"
        "children = [subprocess.Popen([sys.executable, '-S', '-c', code]) for _ in range(8)]\n"
        "x = bytearray(10 ** 9)"
    ),
    "a file without a name": "fd = os.memfd_create('x')\nwhile True: os.write(fd, b'x' * 10 ** 6)",
    "files": "file = open('x', 'wb')\nwhile True: file.write(b'x' * 10 ** 6)",
    "shared memory": (
        "import ctypes\n"
        "libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p\n"
        "while True:\n"
        " number = libc.shmget(0, 50 * 10 ** 6, 0o1600)\n"
        " ctypes.memset(libc.shmat(number, None, 0), 1, 50 * 10 ** 6)\n"
        " libc.shmctl(number, 0, None)"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("code", NEEDS_MORE.values(), ids=NEEDS_MORE)
def test_row_53_a_kernel_that_uses_up_the_memory_dies_and_says_so(method: Method, code: str) -> None:
    needs_limit(method, "memory")
    with enclosed(method, memory=MEMORY, disk=1024 * MEGABYTE) as sandbox:
        result = take(sandbox, code, timeout=60)

        assert (result.status, result.exit_code) == ("kernel_died", -9)
        assert f"the sandbox used up its memory of {MEMORY} MiB" in str(result.error)
        assert works(sandbox)


@pytest.mark.slow
def test_row_53_a_child_that_uses_it_up_dies_alone(method: Method) -> None:
    needs_limit(method, "memory")
    with enclosed(method, memory=MEMORY) as sandbox:
        code = "x = 1; print(subprocess.run([sys.executable, '-c', 'x = bytearray(10 ** 9)']).returncode)"
        assert take(sandbox, code).stdout == "-9"
        assert sandbox.run_code("x").text == "1"


@pytest.mark.slow
def test_row_53_files_without_content_do_not_use_up_the_memory(method: Method) -> None:
    needs_limit(method, "memory")
    with enclosed(method, memory=MEMORY, disk=1024 * MEGABYTE) as sandbox:
        told = take(
            sandbox,
            "count = 0\n"
            "try:\n"
            " while count < 10 ** 6: open(f'{count}', 'w').close(); count += 1\n"
            "except OSError as error: print(error.strerror)",
            timeout=100,
        )
        assert told.stdout == "No space left on device"
        assert works(sandbox)


@pytest.mark.slow
def test_a_death_that_is_not_of_memory_is_not_said_to_be(method: Method) -> None:
    needs_limit(method, "memory")
    with enclosed(method, memory=MEMORY) as sandbox:
        result = take(sandbox, "os.kill(os.getpid(), 9)")
        assert "memory" not in str(result.error)


# CPU


@pytest.mark.slow
def test_row_54_all_that_is_in_a_sandbox_has_no_more_than_its_share_of_the_cpus(method: Method) -> None:
    needs_limit(method, "cpu")
    with enclosed(method, cpu=0.5) as sandbox:
        result = take(
            sandbox,
            "code = 'import time\\nend = time.monotonic() + 2\\nwhile time.monotonic() < end: pass'\n"
            "began = time.monotonic()\n"
            "children = [subprocess.Popen([sys.executable, '-S', '-c', code]) for _ in range(3)]\n"
            "[child.wait() for child in children]\n"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
            "print((used.ru_utime + used.ru_stime) / (time.monotonic() - began))",
            timeout=60,
        )
        # As often in a tenth of a second as its part of that: at the ends there may be one more.
        assert float(result.stdout) < 0.65


# Processes

MULTIPLY = {
    "processes": (
        "count = 0\n"
        "try:\n"
        " while True:\n"
        "  if os.fork() == 0: time.sleep(100); os._exit(0)\n"
        "  count += 1\n"
        "except OSError as error: print(error.strerror)",
        "Resource temporarily unavailable",
    ),
    "threads": (
        "stop = threading.Event()\n"
        "try:\n"
        " while True: threading.Thread(target=stop.wait).start()\n"
        "except RuntimeError as error: print(error)\n"
        "stop.set()",
        "can't start new thread",
    ),
    "zombies": (
        "count = 0\n"
        "try:\n"
        " while True:\n"
        "  if os.fork() == 0: os._exit(0)\n"
        "  count += 1\n"
        "except OSError as error: print(error.strerror)",
        "Resource temporarily unavailable",
    ),
}


@pytest.mark.parametrize(("code", "told"), MULTIPLY.values(), ids=MULTIPLY)
@pytest.mark.slow
def test_row_52_there_can_be_only_so_many(bounded: Sandbox, code: str, told: str) -> None:
    result = take(bounded, code, timeout=30)

    assert result.stdout == told
    bounded.restart()
    assert works(bounded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "while True:\n try: os.fork()\n except OSError: pass",
        "subprocess.Popen(['bash', '-c', ':(){ :|:& };:'], start_new_session=True); time.sleep(100)",
        "if os.fork() == 0:\n"
        " while True:\n"
        "  os.setsid() if os.getsid(0) != os.getpid() else None\n"
        "  try: os.fork()\n"
        "  except OSError: pass",
    ],
    ids=["of the kernel", "of a shell", "that leaves its session"],
)
def test_row_52_a_fork_bomb_ends_with_its_sandbox_at_once(
    method: Method, neighbour: Sandbox, code: str
) -> None:
    with enclosed(method, pids=PIDS) as sandbox:
        take(sandbox, code, timeout=0.5)
        assert works(neighbour)
        began = time.monotonic()
        sandbox.terminate()
        assert time.monotonic() - began < 5  # it is 0.1 here


@pytest.mark.slow
def test_row_52_after_a_fork_bomb_the_sandbox_can_be_used_again(method: Method) -> None:
    with enclosed(method, pids=PIDS) as sandbox:
        take(sandbox, "while True:\n try: os.fork()\n except OSError: pass", timeout=0.5)
        sandbox.restart()
        wait_until(lambda: works(sandbox))


# Files


OF_A_CONTAINER = ("/data", "/dev/shm", "/home/sandbox", "/tmp", "/workspace")


@pytest.mark.parametrize("folder", ["/", "/remote", "/run", "/var/tmp", *OF_A_CONTAINER])
def test_row_55_all_folders_together_have_no_more_room_than_was_said(
    method: Method, bounded: Sandbox, folder: str
) -> None:
    if method == "container" and folder not in OF_A_CONTAINER:
        with pytest.raises(OSError, match="Read-only file system"):
            bounded.files.write(f"{folder}/x", "")
        return
    free = os.statvfs("/tmp").f_bavail
    result = take(
        bounded,
        f"os.makedirs({folder!r}, exist_ok=True)\n"
        "written = 0\n"
        "try:\n"
        f" with open(os.path.join({folder!r}, 'x'), 'wb', buffering=0) as file:\n"
        "  while True: written += file.write(b'x' * 2 ** 20)\n"
        "except OSError as error: print(error.strerror)\n"
        f"print(written <= {DISK})",
    )
    with pytest.raises(OSError, match="No space left on device"):
        bounded.files.write_bytes(os.path.join(folder, "y"), bytes(MEGABYTE))
    bounded.run_code(f"[os.path.exists(p) and os.remove(p) for p in ({folder!r} + '/x', {folder!r} + '/y')]")

    assert result.stdout == "No space left on device\nTrue"
    assert works(bounded)
    assert os.statvfs("/tmp").f_bavail > free - 1024**3 // os.statvfs("/tmp").f_frsize


def test_row_55_a_file_of_a_terabyte_of_nothing_takes_no_room(bounded: Sandbox) -> None:
    code = (
        "with open('/tmp/huge', 'wb') as file: file.truncate(2 ** 40)\nprint(os.stat('/tmp/huge').st_blocks)"
    )
    assert take(bounded, code).stdout == "0"
    bounded.files.rm("/tmp/huge")


@pytest.mark.parametrize("folder", OF_A_CONTAINER)
def test_row_55_there_can_be_only_so_many_files(bounded: Sandbox, folder: str) -> None:
    result = take(
        bounded,
        "count = 0\n"
        f"os.mkdir('{folder}/many')\n"
        "try:\n"
        f" while count < 10 ** 6: open(f'{folder}/many/{{count}}', 'w').close(); count += 1\n"
        "except OSError as error: print(error.strerror)\n"
        f"import shutil; shutil.rmtree('{folder}/many')",
    )
    assert result.stdout == "No space left on device"
    assert works(bounded)


def test_row_55_nothing_else_can_be_written_and_all_together_is_no_more_than_was_said(
    method: Method, bounded: Sandbox
) -> None:
    skipped = "('/proc', '/sys')"
    if method == "bubblewrap":  # of this machine, and there is much of it
        skipped += " + ('/usr', sys.prefix, sys.base_prefix)"
    told = take(
        bounded,
        "places = {}\n"
        "for path, folders, files in os.walk('/'):\n"
        f" if path in {skipped}: folders.clear()\n"
        " for each in (path, *(os.path.join(path, name) for name in files)):\n"
        "  about = os.lstat(each)\n"
        "  if stat.S_ISCHR(about.st_mode) or stat.S_ISLNK(about.st_mode): continue\n"
        "  if os.access(each, os.W_OK): places[about.st_dev] = each\n"
        "queues = os.lstat('/dev/mqueue').st_dev if os.path.exists('/dev/mqueue') else None\n"
        "places.pop(queues, None)\n"  # which have a limit of their own
        "sizes = [os.statvfs(place) for place in places.values()]\n"
        "sizes = [size for size in sizes if size.f_blocks]\n"  # not that of terminals
        f"print(sum(size.f_blocks * size.f_frsize for size in sizes) <= {DISK}, len(sizes))\n"
        f"print(sum(size.f_files for size in sizes) <= {DISK} // 1024)",
    )
    assert told.stdout.split() == ["True", "5" if method == "container" else "2", "True"]


def test_row_56_a_kernel_without_descriptors_answers(bounded: Sandbox) -> None:
    result = take(
        bounded,
        "held = []\n"
        "try:\n"
        " while True: held.append(open('/dev/null'))\n"
        "except OSError as error: print(error.strerror, len(held) < 4096)",
    )
    assert result.stdout == "Too many open files True"
    assert works(bounded)
    bounded.run_code("[file.close() for file in held]")


# What is refused before


@pytest.mark.parametrize("option", ["memory", "cpu"])
def test_what_cannot_be_limited_here_is_refused(option: str, without_cgroups: Callable[[], None]) -> None:
    needs_isolation("bubblewrap")
    without_cgroups()
    value, what = {"memory": (256, "memory"), "cpu": (1.0, "CPUs")}[option]
    with pytest.raises(SandboxError, match=f"cannot limit the {what}"):
        Sandbox.create("local-jupyter", isolation="bubblewrap", **{option: value})  # type: ignore[arg-type]  # any


@pytest.fixture
def without_cgroups(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """As on a machine that has none."""
    from dataclasses import replace

    from code_sandboxes.isolation.probe import probe
    from code_sandboxes.variants import plans

    facts = replace(probe(), cgroups=dict.fromkeys(("memory", "cpu", "pids"), "there are no cgroups"))
    return lambda: monkeypatch.setattr(plans, "probe", lambda: facts)
