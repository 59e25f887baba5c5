"""What a kernel started ends with the kernel, in whatever session it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from code_sandboxes import Sandbox
from code_sandboxes.reaper import MARK, end_marked
from conftest import MakeSandbox, wait_until
from tests.test_keeper import Program, keeper_of, kernels_of, nothing_is_left_in

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="nobody tells what a kernel started"),
    pytest.mark.not_in_a_container("its processes have other numbers there, and end with it"),
]

FAST_VARIANT = "local-jupyter"

DAEMON = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print(os.getpid(), flush=True)
            os.closerange(0, 3)
            time.sleep(600)
        os._exit(0)
    os.wait()
"""

LEAVE = f"""
    import subprocess, sys
    print(int(subprocess.check_output([sys.executable, "-c", {textwrap.dedent(DAEMON)!r}])))
"""


def leave(sandbox: Sandbox, context: str | None = None) -> psutil.Process:
    """Have *sandbox* start a process that is in another session and has another parent."""
    said = sandbox.run_code(textwrap.dedent(LEAVE), context=context).stdout
    kernel = int(sandbox.run_code("import os; os.getpid()", context=context).text or 0)
    daemon = psutil.Process(int(said))
    assert kernel not in (os.getsid(daemon.pid), os.getpgid(daemon.pid), *(p.pid for p in daemon.parents()))
    return daemon


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.needs("own_process")
@pytest.mark.parametrize(
    "end",
    [
        Sandbox.terminate,
        Sandbox.kill,
        Sandbox.restart,
        lambda sandbox: sandbox.restart_context("default"),
        lambda sandbox: sandbox.run_code("os.kill(os.getpid(), 9)"),
        lambda sandbox: sandbox.run_code("os._exit(1)"),
    ],
    ids=["terminate", "kill", "restart", "restart_context", "killed by its code", "crash"],
)
@pytest.mark.slow
def test_it_is_gone_when_that_returns_which_ends_the_kernel(
    sandbox: Sandbox, end: Callable[[Sandbox], object]
) -> None:
    daemon = leave(sandbox)
    end(sandbox)
    assert has_ended(daemon)


@pytest.mark.needs("own_process")
def test_it_is_gone_when_its_kernel_is_killed_from_outside(sandbox: Sandbox) -> None:
    daemon = leave(sandbox)
    os.kill(int(sandbox.run_code("import os; os.getpid()").text or 0), signal.SIGKILL)
    wait_until(lambda: has_ended(daemon), seconds=5)


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_what_another_kernel_started_goes_on(make_sandbox: MakeSandbox) -> None:
    sandbox, other = make_sandbox(), make_sandbox()
    sandbox.create_context("more")
    in_context, in_other = leave(sandbox, "more"), leave(other)
    sandbox.restart_context("default")
    assert not has_ended(in_context)
    sandbox.delete_context("more")
    wait_until(lambda: has_ended(in_context), seconds=5)
    sandbox.terminate()
    assert not has_ended(in_other)


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_hundreds_are_gone_too(sandbox: Sandbox) -> None:
    pids = sandbox.run_code("""if True:
        import subprocess
        children = [subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(450)]
        print(*(child.pid for child in children))
    """).stdout
    processes = [psutil.Process(int(pid)) for pid in pids.split()]
    sandbox.terminate()
    assert len(processes) == 450
    assert all(map(has_ended, processes))


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_it_is_gone_although_it_goes_on_forking(make_sandbox: MakeSandbox) -> None:
    for i in range(20):
        sandbox = make_sandbox()
        mark = sandbox.run_code(f"import os; os.environ[{MARK!r}]").text
        sandbox.run_code("""if True:
            import os, subprocess, threading, time
            def start():
                while True:
                    subprocess.Popen(["sleep", "600"], start_new_session=True)
            def run():  # always one process, and always another one
                if os.fork() == 0:
                    os.setsid()
                    give_up = time.monotonic() + 20
                    while time.monotonic() < give_up and os.fork() == 0:
                        time.sleep(0.001)
                    os._exit(0)
            run()
            threading.Thread(target=start, daemon=True).start()
        """)
        time.sleep(i / 100)
        sandbox.terminate()
        assert mark is not None
        assert marked(eval(mark)) == []


def marked(folder: str) -> list[psutil.Process]:
    """Those that a kernel with this folder, or with one below it, started."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
        except psutil.Error:
            continue
        if mark == folder or mark.startswith(folder + "/"):
            found.append(process)
    return found


# Who is killed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder of the test's own."""
    folder = tmp_path / "r"
    monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(folder))
    yield folder
    wait_until(lambda: nothing_is_left_in(folder) and not marked(str(folder)), seconds=10)


@pytest.fixture
def program(folder: Path) -> Iterator[Program]:
    program = Program(folder)
    yield program
    program.kill()


def leave_by(program: Program) -> psutil.Process:
    program.tell("sandbox = create()")
    return psutil.Process(
        int(program.tell(f"print(int(sandbox.run_code({textwrap.dedent(LEAVE)!r}).stdout))"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("who", ["program", "keeper", "both"])
def test_it_is_gone_when_somebody_is_killed(folder: Path, program: Program, who: str) -> None:
    daemon = leave_by(program)
    keeper = keeper_of(folder)
    if who != "program":
        keeper.kill()
    if who != "keeper":
        program.kill()
    wait_until(lambda: has_ended(daemon), seconds=5)


@pytest.mark.slow
def test_when_keeper_and_watcher_are_killed_at_once_the_next_keeper_ends_it(
    folder: Path, program: Program
) -> None:
    daemon = leave_by(program)
    keeper = keeper_of(folder)
    watchers = [child for child in keeper.children() if "reaper.py" in " ".join(child.cmdline())]
    assert watchers
    for process in (*watchers, keeper):
        process.suspend()
    for process in (*watchers, keeper):
        process.kill()
    wait_until(lambda: has_ended(keeper))
    assert not has_ended(daemon)
    program.tell("with create() as another: another.run_code('1')")
    assert has_ended(daemon)


@pytest.mark.slow
def test_a_keeper_that_a_kernel_started_ends_with_it_and_cleans_up(
    folder: Path, program: Program, tmp_path: Path
) -> None:
    inner = tmp_path / "i"
    code = f"""
        import os, sys
        os.environ["CODE_SANDBOXES_RUNTIME_DIR"] = {str(inner)!r}
        sys.path[:] = {sys.path!r}
        from code_sandboxes import Sandbox
        sandbox = Sandbox.create("local-jupyter", isolation="none")
        print(int(sandbox.run_code({textwrap.dedent(LEAVE)!r}).stdout))
        sandbox.detach()
    """
    program.tell("sandbox = create()")
    said = program.tell(f"print(int(sandbox.run_code({textwrap.dedent(code)!r}).stdout))")
    daemon = psutil.Process(int(said))
    (kernel,) = kernels_of(inner)
    keeper = keeper_of(inner)
    program.tell("sandbox.terminate()")
    assert has_ended(keeper)
    wait_until(lambda: has_ended(kernel) and has_ended(daemon) and nothing_is_left_in(inner), seconds=5)


# The look


@pytest.fixture
def start_marked() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(mark: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "600"], env={"A": f"{MARK}=/x/1", MARK: mark, "Z": ""}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_mark_is_a_folder_or_one_below_it(
    start_marked: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    found = [start_marked(mark) for mark in ("/x/1", "/x/1/2", "/y")]
    others = [start_marked(mark) for mark in ("/x/10", "/x", "", "/z/x/1", "x/1")]
    end_marked(["/x/1", "/y"])
    assert [process.poll() for process in found] == [-signal.SIGKILL] * 3
    assert [process.poll() for process in others] == [None] * 5


def test_who_looks_does_not_find_itself() -> None:
    code = "from code_sandboxes.reaper import end_marked; end_marked(['/x/1']); print('lives')"
    environment = {**os.environ, MARK: "/x/1"}
    looking = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert looking.stdout == b"lives\n"


def test_what_is_marked_late_in_a_large_environment_is_found() -> None:
    environment = {**{f"V{i}": "x" * 100_000 for i in range(5)}, MARK: "/x/1"}
    process = subprocess.Popen(["sleep", "600"], env=environment)
    end_marked(["/x/1"])
    assert process.wait() == -signal.SIGKILL


def test_too_few_descriptors_are_told() -> None:
    code = """if True:
        import resource
        from code_sandboxes.reaper import end_marked
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        try:
            end_marked(['/x/1'])
        except OSError as error:
            print(error.strerror)
    """
    looking = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert looking.stdout == "Too many open files\n"


@pytest.mark.slow
def test_commands_of_code_that_has_cleared_its_environment_are_gone_too() -> None:
    with Sandbox.create("local-jupyter", isolation="none") as sandbox:
        sandbox.run_code("import os; os.environ.clear(); os.unsetenv('CODE_SANDBOXES_KERNEL')")
        process = psutil.Process(sandbox.commands.spawn(["/bin/sleep", "600"]).pid)
        sandbox.run_code("import os; os._exit(1)")
        sandbox.run_code("1")

    assert has_ended(process)
