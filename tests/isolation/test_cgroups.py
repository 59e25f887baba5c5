"""Cgroups bound what is in a sandbox, and nothing of them is left; on whatever version this machine has."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.isolation import cgroups
from code_sandboxes.isolation.cgroups import PROGRAMS, Cgroup, enforceable, folders_of, make
from code_sandboxes.isolation.plan import Bounds
from code_sandboxes.reaper import CGROUP, end_cgroups
from conftest import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has cgroups")

MAX_PIDS = 12

# Writes, one by one, how many processes it could start beside itself.
FORKS = """
    import os, time
    n = 0
    try:
        while n < 100:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            n += 1
    except BlockingIOError:
        pass
    print(n, flush=True)
"""


def needs(*controllers: cgroups.Controller) -> None:
    for controller in controllers:
        if enforceable()[controller]:
            pytest.skip(f"NO CGROUPS: {enforceable()[controller]}")


def unused_name() -> str:
    return f"test-{os.getpid()}-{secrets.token_hex(4)}"


def left() -> list[Path]:
    """The cgroups of this test, wherever they are."""
    return list(Path("/sys/fs/cgroup").rglob(f"{CGROUP}test-{os.getpid()}-*"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not left()


@pytest.fixture
def make_cgroup() -> Iterator[Callable[..., Cgroup]]:
    """``make_cgroup(memory=...)`` makes one that goes with the test."""
    made: list[Cgroup] = []

    def make_one(**bounds: float) -> Cgroup:
        needs(*bounds)  # type: ignore[arg-type]  # they have the same names
        cgroup = make(unused_name(), Bounds(**bounds))  # type: ignore[arg-type]  # and the same values
        assert cgroup is not None
        made.append(cgroup)
        return cgroup

    yield make_one
    for cgroup in made:
        cgroup.remove()


@pytest.fixture
def python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``python(code, cgroup)`` runs it in a cgroup."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, cgroup: Cgroup | None = None) -> subprocess.Popen[str]:
        lines = [line.removeprefix("    ") for line in code.splitlines()]
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", "\n".join(["input()", *lines])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdin is not None
        if cgroup is not None:
            cgroup.add(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


Run = Callable[..., "subprocess.Popen[str]"]
MakeCgroup = Callable[..., Cgroup]


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# What they bound.


def test_who_takes_more_memory_than_there_is_is_killed_and_counted(
    make_cgroup: MakeCgroup, python: Run
) -> None:
    cgroup = make_cgroup(memory=48 * 2**20)
    assert python("x = bytearray(16 * 2**20)", cgroup).wait(30) == 0
    assert cgroup.out_of_memory_kills() == 0
    assert python("x = bytearray(200 * 2**20)", cgroup).wait(30) == -signal.SIGKILL
    assert cgroup.out_of_memory_kills() == 1


def test_memory_of_no_process_counts_too(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(memory=48 * 2**20)
    code = "import os; fd = os.memfd_create('x'); [os.write(fd, bytes(2**20)) for _ in range(200)]"
    assert python(code, cgroup).wait(30) == -signal.SIGKILL


def test_children_share_the_memory(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(memory=96 * 2**20)
    code = """
    import os
    children = [os.fork() for _ in range(2)]
    x = bytearray(60 * 2**20)
    if 0 in children: os._exit(0 if not input() else 1)
    """
    python(code, cgroup)
    wait_until(lambda: cgroup.out_of_memory_kills() > 0)


def test_no_more_processes_can_be_started_than_allowed(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(pids=MAX_PIDS)
    assert int(first_line(python(FORKS, cgroup))) == MAX_PIDS - 1


@pytest.mark.slow
def test_all_that_is_in_it_shares_the_cpu(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(cpu=0.2)
    code = """
    import os, time
    begin = time.monotonic()
    children = [pid for _ in range(2) if (pid := os.fork())]
    while time.monotonic() < begin + 2: pass
    os.write(1, b'%f\\n' % (time.process_time() / (time.monotonic() - begin)))
    """
    process = python(code, cgroup)
    assert process.stdout is not None
    assert sum(float(line) for line in process.stdout) < 0.6  # unbounded it would be all CPUs that are idle
    stat = dict(line.split() for line in Path(cgroup.folders[0], "cpu.stat").read_text().splitlines())
    assert int(stat["nr_throttled"]) > 0


def test_a_fraction_of_a_cpu_that_is_too_small_is_refused_and_leaves_nothing() -> None:
    needs("memory", "cpu")
    with pytest.raises(SandboxConfigurationError, match=r"cpu=0\.001 is too little: 0\.01 is the least"):
        make(unused_name(), Bounds(memory=2**26, cpu=0.001))
    assert not left()


def test_what_is_not_bounded_needs_no_cgroup() -> None:
    assert make(unused_name(), Bounds(disk=2**30)) is None


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", "-x", "x" * 200])
def test_a_name_cannot_lead_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="a cgroup cannot have the name"):
        make(name, Bounds(pids=10))


def test_a_name_that_is_taken_is_refused_and_its_owner_unharmed(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(pids=MAX_PIDS)
    process = python("print(1, flush=True); input()", cgroup)
    first_line(process)
    name = os.path.basename(cgroup.folders[-1]).removeprefix(CGROUP)
    with pytest.raises(SandboxConfigurationError, match=r"cannot be made.*File exists"):
        make(name, Bounds(memory=2**26, pids=5))
    assert process.poll() is None
    assert len(left()) == len(cgroup.folders)


def test_where_it_will_be_is_known_before(make_cgroup: MakeCgroup) -> None:
    needs("memory", "cpu", "pids")
    name, bounds = unused_name(), Bounds(memory=2**26, cpu=0.5, pids=MAX_PIDS)
    before = folders_of(name, bounds)
    cgroup = make(name, bounds)
    assert cgroup is not None
    assert before == cgroup.folders
    cgroup.remove()
    assert folders_of(name, Bounds()) == ()


# Their end.


def is_over(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_killing_ends_whoever_is_in_it_in_whatever_session(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(pids=100)
    code = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print(os.getpid(), flush=True)
            time.sleep(60)
        os._exit(0)
    time.sleep(60)
    """
    process = python(code, cgroup)
    daemon = int(first_line(process))
    cgroup.kill()
    assert process.wait(5) == -signal.SIGKILL
    assert is_over(daemon)
    cgroup.remove()


def test_a_fork_bomb_ends(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(pids=200)
    code = """
    import os, signal
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"\\n")
    while True:
        try:
            if os.fork() == 0 and os.fork() != 0: os._exit(0)
        except BlockingIOError: pass
    """
    first_line(python(code, cgroup))
    before = time.monotonic()
    cgroup.remove()
    assert time.monotonic() - before < 3


def test_to_remove_it_twice_is_once(make_cgroup: MakeCgroup) -> None:
    cgroup = make_cgroup(memory=2**26, cpu=0.5, pids=MAX_PIDS)
    assert all(os.path.isdir(folder) for folder in cgroup.folders)
    cgroup.remove()
    assert not any(os.path.exists(folder) for folder in cgroup.folders)
    cgroup.remove()


def test_who_has_ended_cannot_be_added(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(pids=MAX_PIDS)
    process = python("pass")
    process.wait()
    with pytest.raises(ProcessLookupError):
        cgroup.add(process.pid)


def test_they_are_gone_when_the_program_is_killed(make_cgroup: MakeCgroup, python: Run) -> None:
    cgroup = make_cgroup(memory=2**27, pids=MAX_PIDS)
    process = python("print(1, flush=True); input()", cgroup)
    first_line(process)
    program = (
        "import os; from code_sandboxes.reaper import Reaper;"
        f"reaper = Reaper(); reaper.guard_cgroups({cgroup.folders}); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert process.wait(30) == -signal.SIGKILL
    wait_until(lambda: not left())


def test_what_is_released_stays_when_the_program_is_killed(make_cgroup: MakeCgroup, python: Run) -> None:
    kept, gone = make_cgroup(pids=MAX_PIDS), make_cgroup(pids=MAX_PIDS)
    program = (
        "import os; from code_sandboxes.reaper import Reaper; reaper = Reaper();"
        f"reaper.guard_cgroups({kept.folders}); reaper.guard_cgroups({gone.folders});"
        f"reaper.release_cgroups({kept.folders}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program])
    wait_until(lambda: not os.path.exists(gone.folders[0]))
    assert os.path.exists(kept.folders[0])


def freezer() -> tuple[str, str, str]:
    """Where a frozen cgroup can be, what freezes it, and what thaws it."""
    if os.path.exists("/sys/fs/cgroup/freezer/cgroup.procs"):
        return "/sys/fs/cgroup/freezer", "freezer.state", "FROZEN"
    return "/sys/fs/cgroup", "cgroup.freeze", "1"


def test_what_is_frozen_ends(python: Run) -> None:
    needs("pids")
    above, file, frozen = freezer()
    folder = Path(above, CGROUP + unused_name())
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"NOTHING CAN BE FROZEN HERE: {error}")
    process = python("print(1, flush=True); input()")
    first_line(process)
    (folder / "cgroup.procs").write_text(str(process.pid))
    (folder / file).write_text(frozen)
    end_cgroups([str(folder)])
    assert process.wait(5) == -signal.SIGKILL


def test_somebody_elses_cgroup_is_left_alone(make_cgroup: MakeCgroup, python: Run) -> None:
    folder = Path(make_cgroup(pids=MAX_PIDS).folders[0], "another")
    folder.mkdir()
    end_cgroups([str(folder)])
    assert folder.is_dir()
    folder.rmdir()


def test_a_folder_that_looks_like_a_cgroup_kills_nobody(tmp_path: Path, python: Run) -> None:
    victim = python("print(1, flush=True); input()")
    first_line(victim)
    fake = tmp_path / f"{CGROUP}x"
    fake.mkdir()
    (fake / "cgroup.procs").write_text(f"{victim.pid}\n")
    with pytest.raises(OSError, match="not empty"):
        end_cgroups([str(fake)])
    assert victim.poll() is None


# Who may have them.


def as_ordinary_user(code: str, uid: int = 65534) -> str:
    """What *code* prints; what it imports, this user cannot read everywhere."""
    program = (
        "import os\nfrom code_sandboxes.isolation import cgroups\n"
        "from code_sandboxes.isolation.plan import Bounds\n"
        f"os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})\n{code}"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_who_may_not_make_any_is_told_what_would_help() -> None:
    reason = as_ordinary_user("print(cgroups.enforceable()['memory'])")
    assert "this user may not make cgroups in /sys/fs/cgroup" in reason
    assert "as root" in reason or "systemd-run --user --scope -p Delegate=yes" in reason


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_who_may_not_make_any_gets_none() -> None:
    refused = as_ordinary_user(
        "try:\n    cgroups.make('x', Bounds(memory=2**26))\nexcept ValueError as error: print(error)"
    )
    assert "this user may not make cgroups" in refused
    # Where there is no cgroup for that, a process can be forbidden to fork in another way.
    assert as_ordinary_user("print(cgroups.make('x', Bounds(pids=10)))") == "None"


WHERE = "from code_sandboxes.isolation.cgroups import enforceable; print(enforceable()['memory'])"


def asked_after(shell: str) -> str:
    """What is told against limiting memory by a process for which *shell* has changed things."""
    if os.geteuid() != 0:
        pytest.skip("NOT ROOT: only root has mounts of its own without a user namespace")
    command = ["unshare", "-m", "sh", "-c", f'{shell} "$@"', "sh", sys.executable, "-c", WHERE]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_cgroups_that_are_read_only_are_told() -> None:
    needs("memory")
    folder = cgroups._place_of("memory").folder
    above = next(mount.folder for mount in cgroups._mounts() if folder.startswith(mount.folder))
    said = asked_after(f"mount -o remount,bind,ro {above}; exec")
    assert said.startswith(f"the cgroups in {folder} are read-only, as in a container")


def test_cgroups_that_are_not_mounted_are_told() -> None:
    said = asked_after("mount -t tmpfs none /sys/fs/cgroup; exec")
    assert said.startswith("no cgroups with the memory controller are mounted here")
    assert "mount -t cgroup2" in said


def test_those_of_the_machine_are_not_taken_for_those_of_a_container(make_cgroup: MakeCgroup) -> None:
    inner = make_cgroup(memory=2**27).folders[0]
    said = asked_after(f"echo $$ > {inner}/cgroup.procs; exec unshare -C")
    assert said.startswith("the cgroup of this process is not among those mounted at ")


def test_to_ask_leaves_nothing() -> None:
    enforceable.cache_clear()
    enforceable()
    assert not list(Path("/sys/fs/cgroup").rglob(f"{CGROUP}try-{os.getpid()}-*"))


# Version 2, where a cgroup with processes in it can have no bounded children.


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A cgroup that somebody else may be given."""
    tops = [mount.folder for mount in cgroups._mounts() if mount.is_unified]
    if os.geteuid() != 0 or not tops or not cgroups._controllers(tops[0]):
        pytest.skip("NO CGROUPS OF VERSION 2: they have no controllers here, or this is not root")
    controllers = cgroups._controllers(tops[0])
    folder = Path(tops[0], f"{unused_name()}.scope")
    folder.mkdir()
    enabled = Path(tops[0], "cgroup.subtree_control").read_text().split()
    cgroups._write(tops[0], "cgroup.subtree_control", " ".join(f"+{each}" for each in controllers))
    yield folder
    end_cgroups(sorted(map(str, folder.rglob(f"{CGROUP}*")), reverse=True))
    for each in (folder / PROGRAMS, folder):
        if each.exists():
            wait_until(lambda each=each: not (each / "cgroup.procs").read_text())  # type: ignore[misc]
            each.rmdir()
    disabled = " ".join(f"-{each}" for each in controllers if each not in enabled)
    with contextlib.suppress(OSError):  # somebody else needs them since
        cgroups._write(tops[0], "cgroup.subtree_control", disabled)


MAKE_ROOM = """
import os, sys
from code_sandboxes.isolation import cgroups
folder, controller, uid = sys.argv[1], sys.argv[2], int(sys.argv[3])
cgroups._write(folder, "cgroup.procs", str(os.getpid()))
os.setgroups([]); os.setresuid(uid, uid, uid)
try:
    print(cgroups._hand_on(folder, {controller: 1}, False))
    print(cgroups._hand_on(folder, {controller: 1}, True))
    print([line for line in open("/proc/self/cgroup") if line.startswith("0:")][0].strip().rpartition("/")[2])
    print(open(folder + "/cgroup.subtree_control").read().strip())
    place = [m for m in cgroups._mounts() if m.is_unified][0]
    print(cgroups._unified_place(cgroups._own_cgroup(place, "")).folder)
except ValueError as error:
    print(error)
"""


def make_room(folder: Path, uid: int) -> list[str]:
    controller = cgroups._controllers(str(folder))[0]
    result = subprocess.run(
        [sys.executable, "-c", MAKE_ROOM, str(folder), controller, str(uid)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def give(folder: Path, uid: int) -> None:
    for path in (
        folder,
        folder / "cgroup.procs",
        folder / "cgroup.threads",
        folder / "cgroup.subtree_control",
    ):
        os.chown(path, uid, uid)


@pytest.mark.parametrize("uid", [0, 12345])
def test_programs_make_room_in_a_cgroup_that_is_theirs(delegated: Path, uid: int) -> None:
    give(delegated, uid)
    os.setxattr(delegated, "user.delegate", b"1")
    controller = cgroups._controllers(str(delegated))[0]
    assert make_room(delegated, uid) == ["False", "True", PROGRAMS, controller, str(delegated)]


def test_a_cgroup_with_somebody_elses_processes_is_not_rearranged(delegated: Path, python: Run) -> None:
    give(delegated, 12345)
    os.setxattr(delegated, "user.delegate", b"1")
    other = python("print(1, flush=True); input()")
    first_line(other)
    (delegated / "cgroup.procs").write_text(str(other.pid))
    (reason,) = make_room(delegated, 12345)
    other.kill()
    assert f"there are processes of others in the cgroup {delegated} (process {other.pid})" in reason
    assert not (delegated / PROGRAMS).exists()


MAKE = """
import os, subprocess, sys
from code_sandboxes.isolation import cgroups
from code_sandboxes.isolation.plan import Bounds
folder, uid = sys.argv[1], int(sys.argv[2])
child = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, user=uid)
for process in (os.getpid(), child.pid):
    cgroups._write(folder, "cgroup.procs", str(process))
os.setgroups([]); os.setresuid(uid, uid, uid)
print(dict(cgroups.enforceable()))
print(os.listdir(folder).count(cgroups.PROGRAMS))
cgroup = cgroups.make(sys.argv[3], Bounds(memory=2**26, cpu=0.5, pids=20))
cgroup.add(child.pid)
inner, outer = cgroup.folders
for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max"):
    if os.path.exists(f"{inner}/{name}"):
        print(open(f"{inner}/{name}").read().strip())
try:
    cgroups._write(folder, "cgroup.subtree_control", "-memory")
except OSError as error:
    print("kept:", error.strerror)
cgroup.remove()
print(child.wait(), os.path.exists(outer))
"""


@pytest.mark.parametrize("uid", [0, 12345])
def test_a_delegated_cgroup_gives_all_bounds(delegated: Path, uid: int) -> None:
    if not set(cgroups.CONTROLLERS) <= set(cgroups._controllers(str(delegated))):
        pytest.skip("THE CONTROLLERS ARE NOT IN VERSION 2 HERE")
    give(delegated, uid)
    os.setxattr(delegated, "user.delegate", b"1")
    result = subprocess.run(
        [sys.executable, "-c", MAKE, str(delegated), str(uid), unused_name()], capture_output=True, text=True
    )
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "{'memory': '', 'cpu': '', 'pids': ''}",
        "0",  # to ask moves nobody
        *("67108864", "0", "50000 100000", "20"),
        "kept: Device or resource busy",
        "-9 False",
    ]
