"""Start and end: what is made, what is left, and what the sandbox says of itself meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

import code_sandboxes
from code_sandboxes import (
    Capabilities,
    LocalJupyterSandbox,
    Sandbox,
    SandboxConfig,
    SandboxConnectionError,
    SandboxIsolationWarning,
    SandboxNotStartedError,
)
from conftest import BUSY, UNISOLATED, MakeSandbox, processes_of, sandbox_folders, wait_until
from tests.fronts import create

IN_A_CONTAINER = True


def test_create_gives_a_running_sandbox_that_tells_about_itself(make_sandbox: MakeSandbox) -> None:
    before = time.time()
    sandbox = make_sandbox(name="mine", tags={"a": "b"}, timeout=12)
    info = sandbox.info

    assert sandbox.is_running
    assert sandbox.status == "running"
    assert sandbox.id == sandbox.sandbox_id == info.id
    assert sandbox.id.startswith(f"{sandbox.variant}:")
    assert (info.name, info.tags, info.config.timeout) == ("mine", {"a": "b"}, 12)
    assert info.created_at is not None
    assert info.end_at is not None
    assert before <= info.created_at <= time.time()
    assert info.end_at == pytest.approx(info.created_at + 86400, abs=5)
    sandbox.set_tags({"c": "d"})
    assert sandbox.tags == {"c": "d"}
    assert repr(sandbox) == f"<{type(sandbox).__name__} {sandbox.id} running>"


def test_the_end_is_told_once_and_use_after_it_is_refused(sandbox: Sandbox) -> None:
    assert sandbox.terminate() is True
    assert (sandbox.terminate(), sandbox.kill(), sandbox.stop(), sandbox.close()) == (False,) * 4
    assert sandbox.status == "stopped"
    for use in (
        lambda: sandbox.run_code("1"),
        sandbox.interrupt,
        sandbox.list_contexts,
        sandbox.create_context,
        sandbox.restart,
        lambda: sandbox.run_code_streaming("1"),
    ):
        with pytest.raises(SandboxNotStartedError, match="is terminated: it was terminated"):
            use()


def test_use_before_the_start_is_refused_and_the_sandbox_can_still_be_started() -> None:
    sandbox = LocalJupyterSandbox(isolation="none")
    assert sandbox.status == "created"
    with pytest.raises(
        SandboxNotStartedError, match=r"was not started: call start\(\), or use it with 'with'"
    ):
        sandbox.run_code("1")
    with sandbox:
        assert sandbox.run_code("1").text == "1"
        with pytest.raises(SandboxNotStartedError, match="cannot be started: it is running"):
            sandbox.start()
    with pytest.raises(SandboxNotStartedError, match="cannot be started: it is stopped"):
        sandbox.start()


def test_with_ends_it_also_when_the_block_raises(variant: str) -> None:
    sandbox = create("blocking", variant, **UNISOLATED.get(variant, {}))
    with pytest.raises(KeyError), sandbox:
        raise KeyError
    assert sandbox.status == "stopped"


@pytest.mark.parametrize("end", ["terminate", "kill"])
@pytest.mark.slow
def test_no_thread_is_left_of_a_sandbox_that_ended(make_sandbox: MakeSandbox, end: str) -> None:
    make_sandbox()  # the threads that all sandboxes share are there then
    before = set(threading.enumerate())
    sandbox = make_sandbox()
    sandbox.create_context("other")
    sandbox.run_code("x = 1")
    getattr(sandbox, end)()

    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.mark.needs("own_home")
@pytest.mark.not_in_a_container("its processes have other numbers there")
@pytest.mark.needs("own_process")
@pytest.mark.parametrize("end", ["terminate", "kill"])
@pytest.mark.slow
def test_nothing_is_left_of_a_sandbox_that_ended(
    make_sandbox: MakeSandbox, runtime_folder: Path, end: str
) -> None:
    before = sandbox_folders(runtime_folder)
    sandbox = make_sandbox()
    sandbox.create_context("other")
    sandbox.run_code(
        "import subprocess, os; p = subprocess.Popen(['sleep', '600'])\n"
        "os.makedirs('locked/inside'); open('locked/inside/file', 'w').close(); os.chmod('locked', 0)"
    )
    pids = [_pid(sandbox), int(sandbox.run_code("p.pid").text or 0)]
    assert sandbox_folders(runtime_folder) - before
    getattr(sandbox, end)()

    assert sandbox_folders(runtime_folder) == before
    wait_until(lambda: not any(_lives(pid) for pid in pids))


@pytest.mark.needs("own_home")
@pytest.mark.not_in_a_container("there is no file with a connection")
@pytest.mark.needs("own_process")
def test_the_folder_of_a_sandbox_is_closed_to_other_users(sandbox: Sandbox, runtime_folder: Path) -> None:
    for folder in runtime_folder.iterdir():
        assert folder.stat().st_mode & 0o077 == 0
    connection_files = list(runtime_folder.rglob("connection.json"))
    assert connection_files
    assert all(path.stat().st_mode & 0o077 == 0 for path in connection_files)


@pytest.mark.needs("own_home")
@pytest.mark.not_in_a_container("it starts elsewhere than at home")
@pytest.mark.needs("environment")
def test_the_environment_is_not_the_programs_own(
    make_sandbox: MakeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "xyz")
    monkeypatch.setenv("LC_TIME", "C")
    sandbox = make_sandbox(env={"GIVEN": "1"})
    environment = json.loads(sandbox.run_code("import json, os; print(json.dumps(dict(os.environ)))").stdout)

    assert "A_SECRET" not in environment
    assert "xyz" not in json.dumps(environment)
    assert (environment["GIVEN"], environment["LC_TIME"]) == ("1", "C")
    assert environment["HOME"] != os.environ.get("HOME")
    assert sandbox.run_code("import os; os.getcwd()").text == repr(environment["HOME"])


@pytest.mark.needs("own_home")
@pytest.mark.needs("environment")
def test_code_finds_the_interpreter_it_runs_in_on_its_path(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "import os, shutil, sys; os.path.samefile(shutil.which('python'), sys.executable)"
    )
    assert result.text == "True"


@pytest.mark.needs("magics")
def test_the_user_namespace_is_as_in_a_fresh_notebook(sandbox: Sandbox) -> None:
    names = sandbox.run_code("sorted(n for n in globals() if not n.startswith('_'))").text
    assert names == "['In', 'Out', 'exit', 'get_ipython', 'open', 'quit']"
    assert sandbox.run_code("import sys; [p for p in sys.path if 'code_sandboxes' in p]").text == "[]"
    assert sandbox.run_code("import debugpy; debugpy.__name__").text == "'debugpy'"


@pytest.mark.not_in_a_container("it may take longer to start")
@pytest.mark.slow
def test_max_lifetime_ends_it(make_sandbox: MakeSandbox, runtime_folder: Path) -> None:
    before = sandbox_folders(runtime_folder)
    sandbox = make_sandbox(config=SandboxConfig(max_lifetime=2.0))
    result = sandbox.run_code(BUSY)

    assert result.status == "interrupted"
    assert result.error is not None
    assert result.error.value == "the sandbox ended: it reached its max_lifetime of 2 s"
    assert sandbox.status == "stopped"
    wait_until(lambda: sandbox_folders(runtime_folder) == before)


def test_a_lifetime_of_years_is_only_a_long_one(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(config=SandboxConfig(max_lifetime=1e10))
    for _ in range(3):
        assert sandbox.run_code("1 + 1", timeout=1e9).text == "2"


@pytest.mark.slow
def test_ctrl_c_while_it_is_terminated_does_not_keep_it_from_ending(
    runtime_folder: Path, variant: str
) -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    before = sandbox_folders(runtime_folder)
    for delay in (0.0005, 0.001, 0.002, 0.004):
        sandbox = create("blocking", variant, **UNISOLATED.get(variant, {}))
        timer = threading.Timer(delay, signal.pthread_kill, (main_thread, signal.SIGINT))
        try:
            timer.start()
            sandbox.terminate()
            timer.join()
            time.sleep(0.1)  # the signal that is on its way
        except KeyboardInterrupt:
            assert sandbox.status in ("running", "stopped")
        if sandbox.is_running:
            sandbox.terminate()
    wait_until(lambda: sandbox_folders(runtime_folder) == before)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.2])
def test_the_end_may_come_while_it_starts(runtime_folder: Path, delay: float) -> None:
    before = sandbox_folders(runtime_folder)
    sandboxes = [LocalJupyterSandbox(isolation="none") for _ in range(5)]
    outcomes: list[object] = []

    def start(sandbox: Sandbox) -> None:
        try:
            outcomes.append(sandbox.start())
        except SandboxNotStartedError as error:
            outcomes.append(error)

    starts = [threading.Thread(target=start, args=[sandbox]) for sandbox in sandboxes]
    for thread in starts:
        thread.start()
    time.sleep(delay)
    ends = [threading.Thread(target=sandbox.kill) for sandbox in sandboxes]
    for thread in ends:
        thread.start()
    for thread in (*starts, *ends):
        thread.join(30)
        assert not thread.is_alive()
    assert len(outcomes) == 5
    wait_until(lambda: sandbox_folders(runtime_folder) == before)


def test_auto_isolation_warns_once_in_a_program_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from code_sandboxes.variants import jupyter, plans

    monkeypatch.setattr(plans, "why_not", lambda method: "" if method == "none" else "not on this machine")
    monkeypatch.setattr(jupyter, "why_not", plans.why_not)
    jupyter._warn_once.cache_clear()
    with pytest.warns(SandboxIsolationWarning, match=r"but a process of its own.*not on this machine"):
        first = LocalJupyterSandbox().start()
    second = LocalJupyterSandbox().start()  # a second warning would be an error here

    assert first.info.isolation.startswith("none:")
    assert second.info.isolation == first.info.isolation
    first.kill()
    second.kill()


@pytest.mark.needs("own_home")  # a server says only when asked what it can do
@pytest.mark.not_in_a_container("root, as who the test is there, can do more")
def test_capabilities_say_what_can_be_done_and_why_not_the_rest(shared_sandbox: Sandbox) -> None:
    capabilities = shared_sandbox.capabilities

    if shared_sandbox.info.isolation.startswith("none"):
        assert not capabilities.network_none
        assert str(capabilities.network_none).startswith("no: ")
    else:
        assert capabilities == Sandbox.capabilities_of(shared_sandbox.variant)
    assert {"python", "python3"} <= set(capabilities.languages)
    assert capabilities.contexts
    assert str(capabilities.contexts) == "yes"


def test_local_jupyter_and_local_eval_say_how_they_differ() -> None:
    kernel = Sandbox.capabilities_of("local-jupyter")
    here = Sandbox.capabilities_of("local-eval")

    assert {"bash", "python", "python3"} <= set(kernel.languages)
    assert set(here.languages) == {"python", "python3"}
    differ = {
        name for name in Capabilities.__slots__ if bool(getattr(kernel, name)) != bool(getattr(here, name))
    }
    isolated = {"network_none", "network_allowlist", "memory_limit", "cpu_limit", "pids_limit", "disk_limit"}
    differ -= isolated | {"mounts", "pause"}  # which depend on this machine
    assert differ == {
        *("own_process", "own_home", "last_words", "environment", "magics", "interrupt_blocked"),
        *("idle_timeout", "snapshots"),
    }


# Programs


@pytest.mark.slow
def test_it_works_inside_a_running_event_loop_of_a_notebook(runtime_folder: Path) -> None:
    code = [
        "import asyncio; asyncio.get_running_loop()\n"
        "from code_sandboxes import Sandbox\n"
        "sandbox = Sandbox.create(isolation='none')\n"
        "r = sandbox.run_code('print(1)\\n1 + 1', on_stdout=lambda m: print('live', m.line))\nr.text",
        "sandbox.terminate()",
    ]
    cells = [
        nbformat.NotebookNode(cell_type="code", metadata=nbformat.NotebookNode(), outputs=[], source=source)
        for source in code
    ]
    notebook = nbformat.NotebookNode(
        nbformat=4, nbformat_minor=4, metadata=nbformat.NotebookNode(), cells=cells
    )
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    first, second = notebook.cells

    assert [output.get("text") for output in first.outputs] == ["live 1\n", None]
    assert first.outputs[1]["data"]["text/plain"] == "'2'"
    assert second.outputs[0]["data"]["text/plain"] == "True"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that it is multi-threaded is the point
@pytest.mark.slow
def test_a_forked_child_neither_uses_disturbs_nor_ends_the_sandbox(sandbox: Sandbox) -> None:
    sandbox.run_code("x = 1")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        told = "nothing was raised"
        try:
            sandbox.run_code("x = 2")
        except SandboxConnectionError as error:
            told = str(error)
        try:
            sandbox.terminate()
        except SandboxConnectionError:
            told += "|refused"
        # Its own sandbox works, and the exit handlers run as in a child that leaves by sys.exit().
        with Sandbox.create(isolation="none") as own:
            told += "|" + str(own.run_code("20 + 1").text)
        os.write(write, told.encode())
        code_sandboxes.sandbox._end_all()
        os._exit(0)
    os.close(write)
    with open(read) as answer:
        message, *rest = answer.read().split("|")
    os.waitpid(pid, 0)

    assert f"belongs to process {os.getpid()}" in message
    assert f"Sandbox.from_id('{sandbox.id}')" in message
    assert rest == ["refused", "21"]
    assert sandbox.run_code("x").text == "1"


PROGRAM = """
    import os, sys, threading
    from code_sandboxes import Sandbox
    sandbox = Sandbox.create(isolation="none")
    sandbox.run_code("import subprocess; child = subprocess.Popen(['sleep', '600'])")
    print(os.getpid(), sandbox.run_code("import os; os.getpid()").text, sandbox.run_code("child.pid").text)
    sys.stdout.flush()
"""


@pytest.fixture
def run_program(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], list[int], Path]]:
    """Starts a program that has made a sandbox; gives it, the processes of the sandbox, and its folder."""
    folder = tmp_path / "r"

    def run(then: str) -> tuple[subprocess.Popen[str], list[int], Path]:
        program = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(then)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CODE_SANDBOXES_RUNTIME_DIR": str(folder)},
        )
        assert program.stdout is not None
        _, *pids = (int(word) for word in program.stdout.readline().split())
        assert sandbox_folders(folder)
        return program, pids, folder

    return run


RunProgram = Callable[..., tuple["subprocess.Popen[str]", "list[int]", Path]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "then",
    [
        "import time; time.sleep(600)",
        "threading.Timer(0.2, lambda: (print('go'), sys.stdout.flush())).start()\n"
        "sandbox.run_code('while True: print(1)', timeout=0)",
        "print('go'); sys.stdout.flush()\nwhile True: Sandbox.create(isolation='none').terminate()",
    ],
    ids=["idle", "while it runs code", "while it creates and terminates"],
)
def test_a_program_killed_with_sigkill_leaves_nothing(run_program: RunProgram, then: str) -> None:
    program, pids, folder = run_program(then)
    assert program.stdout is not None
    if "go" in then:
        program.stdout.readline()
    program.kill()
    program.wait()
    program.stdout.close()

    wait_until(lambda: not any(_lives(pid) for pid in pids), seconds=5)
    wait_until(lambda: not sandbox_folders(folder), seconds=5)
    wait_until(lambda: not processes_of(folder), seconds=5)


@pytest.mark.slow
def test_a_forked_child_that_lives_on_does_not_keep_the_sandbox_of_a_killed_program(
    run_program: RunProgram,
) -> None:
    program, pids, folder = run_program(
        "child = os.fork()\nif child: print(child); sys.stdout.flush()\nimport time; time.sleep(600)"
    )
    assert program.stdout is not None
    child = int(program.stdout.readline())
    program.kill()
    program.wait()
    try:
        wait_until(lambda: not any(_lives(pid) for pid in pids), seconds=5)
        wait_until(lambda: not sandbox_folders(folder), seconds=5)
        assert psutil.pid_exists(child)
    finally:
        os.kill(child, signal.SIGKILL)
        program.stdout.close()


@pytest.mark.parametrize(
    "then",
    [
        "",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("sys.exit(3)", "1 / 0", "os.kill(os.getpid(), 2)")
        ),
    ],
)
def test_a_program_that_just_ends_leaves_nothing_and_says_nothing_of_it(
    run_program: RunProgram, then: str, capfd: pytest.CaptureFixture[str]
) -> None:
    program, pids, folder = run_program(then)
    rest, _ = program.communicate(timeout=30)

    assert rest == ""
    assert sandbox_folders(folder) == set()
    wait_until(lambda: not any(_lives(pid) for pid in pids))
    said = capfd.readouterr().err
    assert "code_sandboxes" not in said
    assert "ResourceWarning" not in said


@pytest.mark.slow
def test_the_program_ends_in_time_with_a_run_on_in_another_thread(run_program: RunProgram) -> None:
    program, _, folder = run_program(
        "run = lambda: print(sandbox.run_code('import time; time.sleep(600)', timeout=0).status)\n"
        "threading.Thread(target=run, daemon=True).start()"
    )
    program.communicate(timeout=20)

    assert program.returncode == 0
    assert sandbox_folders(folder) == set()


def _lives(pid: int) -> bool:
    """It is there, and not only because its new parent has not asked yet how it ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _pid(sandbox: Sandbox) -> int:
    return int(sandbox.run_code("import os; os.getpid()").text or 0)
