"""Whoever is killed, whenever: of an enclosure no process, no mount, no cgroup and no folder is left."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

if sys.platform != "linux":
    pytest.skip("isolation is Linux's", allow_module_level=True)

from code_sandboxes import Sandbox, SandboxConnectionError
from code_sandboxes.keeper import client
from code_sandboxes.variants.plans import enforceable
from conftest import processes_of, wait_until
from tests.isolation.needs import needs_isolation
from tests.test_keeper import is_keeper

pytestmark = pytest.mark.slow

# Of root more, as the second run of all this is to be short.
TIMES = 8 if os.geteuid() == 0 else 3

PROGRAM = """
import sys
from code_sandboxes import Sandbox
sandbox = Sandbox.create("local-jupyter", **eval(sys.argv[1]))
print(sandbox.run_code(sys.argv[2]).stdout, flush=True)
sys.stdin.read()
"""

# Processes that are hard to find: in another session, with another parent, and without an environment.
DAEMON = """
import os, subprocess
subprocess.run(["sh", "-c", "env -i setsid sleep 1000 >/dev/null 2>&1 </dev/null &"])
print("started")
"""


class Place:
    """A runtime folder, and something that can be seen of each enclosure in it: what is mounted there.

    Args:
        folder: for the test alone.
    """

    def __init__(self, folder: Path) -> None:
        self.runtime = folder / "r"
        self.mark = folder / f"mark-{random.randrange(10**9)}"
        self.mark.mkdir()
        limits = {"memory": 512} if not enforceable("bubblewrap")["memory"] else {}
        self.options = {"isolation": "bubblewrap", "mounts": {str(self.mark): ("/mark", "ro")}, **limits}

    def create(self) -> Sandbox:
        return Sandbox.create("local-jupyter", **self.options)  # type: ignore[arg-type]  # any

    def start_program(self, code: str = "print('started')") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, repr(self.options), code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def processes(self) -> list[psutil.Process]:
        """Those in enclosures, those that make them, and their keepers."""
        enclosed = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                # The mounts of one that has just begun, and hides, are not to be seen by an ordinary user.
                if self.mark.name in str(process.cmdline()) or self.mark.name in mounts_of(process):
                    enclosed.append(process)
        return [*enclosed, *processes_of(self.runtime)]

    def keeper(self) -> psutil.Process | None:
        return next(filter(is_keeper, processes_of(self.runtime)), None)

    def bubblewrap(self) -> psutil.Process | None:
        """The one that is outside of its enclosure."""
        return self._child_of(self.keeper(), "bwrap")

    def first_process(self) -> psutil.Process | None:
        return self._child_of(self.bubblewrap(), "")

    def kernel(self) -> psutil.Process | None:
        return self._child_of(self.first_process(), "")

    @staticmethod
    def _child_of(process: psutil.Process | None, name: str) -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):
            for child in process.children() if process else ():
                if name in child.name():
                    return child
        return None

    def cgroups(self) -> list[str]:
        log = self.runtime / "keeper.log"
        keepers = set(re.findall(r" keeper (\d+): ", log.read_text())) if log.exists() else set()
        found = glob.glob("/sys/fs/cgroup/**/code-sandboxes-*", recursive=True)
        return [path for path in found if any(f"code-sandboxes-{keeper}-" in path for keeper in keepers)]

    def left(self) -> list[object]:
        folders = [p for p in self.runtime.glob("*") if not p.name.startswith("keeper.log")]
        mounts = [self.mark.name] if self.mark.name in Path("/proc/self/mountinfo").read_text() else []
        return [*self.processes(), *self.cgroups(), *folders, *mounts]

    def assert_nothing_is_left(self) -> None:
        client.the_keeper(self.runtime).close()
        try:
            wait_until(lambda: not self.left(), seconds=20)
        except AssertionError:
            said = (self.runtime / "keeper.log").read_text()
            left = [each.cmdline() if isinstance(each, psutil.Process) else each for each in self.left()]
            pytest.fail(f"{left} is left; {said[-3000:]}")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    needs_isolation("bubblewrap")
    folder = tempfile.mkdtemp(prefix="cs")  # whose path is short enough for sockets
    place = Place(Path(folder))
    monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(place.runtime))
    monkeypatch.setattr(client, "_LINGER", 0.1)
    yield place
    place.assert_nothing_is_left()
    shutil.rmtree(folder)


def mounts_of(process: psutil.Process) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/mountinfo").read_text()
    return ""


VICTIMS: dict[str, Callable[[Place], psutil.Process | None]] = {
    "keeper": Place.keeper,
    "bubblewrap": Place.bubblewrap,
    "first process": Place.first_process,
}


def kill_when_it_is_there(find: Callable[[], psutil.Process | None], later: float) -> None:
    give_up = time.monotonic() + 20
    while (process := find()) is None and time.monotonic() < give_up:
        time.sleep(0.0005)
    time.sleep(later)
    with contextlib.suppress(psutil.NoSuchProcess):
        if process is not None:
            process.kill()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", VICTIMS)
def test_one_that_is_killed_while_a_sandbox_starts_leaves_nothing(place: Place, victim: str) -> None:
    for _ in range(TIMES):
        made: list[Sandbox] = []

        def start(made: list[Sandbox] = made) -> None:
            with contextlib.suppress(SandboxConnectionError):
                made.append(place.create())
                made[0].run_code("1")

        thread = threading.Thread(target=start)
        thread.start()
        kill_when_it_is_there(lambda: VICTIMS[victim](place), later=random.random() ** 2 * 0.2)
        thread.join()
        for sandbox in made:
            with contextlib.suppress(SandboxConnectionError):
                sandbox.kill()
        place.assert_nothing_is_left()
        if victim != "keeper":
            assert place.create().terminate()  # the keeper is as able as before


def children_of(process: psutil.Process) -> set[int]:
    """As the system lists them, which is quick."""
    found: set[int] = set()
    for path in glob.glob(f"/proc/{process.pid}/task/*/children"):
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in Path(path).read_text().split()}
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["bubblewrap", "its keeper"])
def test_one_that_is_killed_in_the_first_moments_of_bubblewrap_leaves_nothing(
    place: Place, victim: str
) -> None:
    """Bubblewrap's child, when it has just begun, waits for it and does not notice its end."""
    for _ in range(2 * TIMES):
        with Sandbox.create("local-jupyter", isolation="none") as other:
            other.run_code("1")
            keeper = place.keeper()
            assert keeper is not None
            before = children_of(keeper)

            def start() -> None:
                with contextlib.suppress(SandboxConnectionError):
                    place.create().kill()

            thread = threading.Thread(target=start)
            thread.start()
            give_up = time.monotonic() + 20
            while not (new := children_of(keeper) - before) and time.monotonic() < give_up:
                pass
            time.sleep(random.random() * 0.008)
            kill_all([keeper.pid] if victim == "its keeper" else list(new))
            thread.join()
            with contextlib.suppress(SandboxConnectionError):
                other.kill()
    place.assert_nothing_is_left()


@pytest.mark.timeout(300)
def test_a_program_that_is_killed_while_a_sandbox_starts_leaves_nothing(place: Place) -> None:
    for _ in range(TIMES // 3):
        programs = [place.start_program() for _ in range(3)]
        wait_until(lambda: place.keeper() is not None)
        for program in random.sample(programs, 3):
            time.sleep(random.random() * 0.4)
            program.kill()
        for program in programs:
            program.communicate()
        place.assert_nothing_is_left()


@pytest.mark.parametrize("victim", [*VICTIMS, "program"])
def test_one_that_is_killed_while_code_runs_leaves_nothing(place: Place, victim: str) -> None:
    program = place.start_program(DAEMON)
    assert program.stdout is not None
    assert program.stdout.readline() == "started\n"
    wait_until(lambda: any(process.cmdline()[:1] == ["sleep"] for process in place.processes()))

    if victim != "program":
        kill_all([pid_of(VICTIMS[victim](place))])
    program.kill()
    program.communicate()


def test_all_of_them_at_once(place: Place) -> None:
    """Nobody is there to see it but who watches the keeper; what that cannot do the next keeper does."""
    for victims in (("program", "bubblewrap", "keeper"), ("program", "keeper"), ("keeper", "bubblewrap")):
        program = place.start_program(DAEMON)
        assert program.stdout is not None
        assert program.stdout.readline() == "started\n"
        pids = [program.pid if name == "program" else pid_of(VICTIMS[name](place)) for name in victims]
        kill_all(pids)
        program.kill()
        program.communicate()
        place.assert_nothing_is_left()


def pid_of(process: psutil.Process | None) -> int:
    assert process is not None
    return process.pid


def kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
