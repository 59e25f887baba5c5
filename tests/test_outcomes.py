"""How a run ends, and that it is told truthfully: with the output before the end, and with a next run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest

from code_sandboxes import (
    Capabilities,
    ExecutionResult,
    ExecutionStatus,
    Sandbox,
    SandboxConfig,
    SandboxConnectionError,
    SandboxExecutionError,
    SandboxNotStartedError,
    SandboxTimeoutError,
)
from conftest import BUSY, BUSY_OR_WAITING, MakeSandbox, wait_until

IN_A_CONTAINER = True
ON_A_SERVER = True


ISOLATED = True
EVERY_FRONT = True
FAST_VARIANT = "local-jupyter"


@dataclass(frozen=True)
class Ending:
    code: str
    status: str
    error: str | None = None  # name of result.error
    exit_code: int | None = None
    state_preserved: bool = True
    timeout: float = 30.0
    waits: bool = False  # in the system, where not every variant can reach it


ENDINGS = {
    "normal": Ending("x = 1", "ok"),
    "exception": Ending("1 / 0", "error", "ZeroDivisionError"),
    "sys.exit": Ending("import sys; sys.exit(2)", "exited", exit_code=2),
    "exit": Ending("exit(3)", "exited", exit_code=3),
    "sys.exit(0)": Ending("import sys; sys.exit(0)", "exited", exit_code=0),
    "time-out in Python": Ending("while True: pass", "timed_out", "TimeoutError", timeout=0.5),
    "time-out in sleep": Ending(
        "import time; time.sleep(60)", "timed_out", "TimeoutError", timeout=0.5, waits=True
    ),
    "time-out in await": Ending(
        "import asyncio; await asyncio.sleep(60)", "timed_out", "TimeoutError", timeout=0.5
    ),
    "time-out in a child": Ending(
        "import subprocess; subprocess.run(['sleep', '60'])",
        "timed_out",
        "TimeoutError",
        timeout=0.5,
        waits=True,
    ),
    "time-out, swallowed": Ending(
        f"while True:\n    try:\n        {BUSY}\n    except KeyboardInterrupt: pass",
        "timed_out",
        "TimeoutError",
        exit_code=-9,
        state_preserved=False,
        timeout=0.5,
    ),
}


DEATHS = {
    "os._exit": Ending("import os; os._exit(3)", "kernel_died", "KernelDied", 3, False),
    "segfault": Ending("import ctypes; ctypes.string_at(0)", "kernel_died", "KernelDied", -11, False),
    "killed by itself": Ending("import os; os.kill(os.getpid(), 9)", "kernel_died", "KernelDied", -9, False),
}


RUINS_OF_A_HOME = [
    "import os, shutil; shutil.rmtree(os.environ['HOME']); os._exit(1)",
    "import os, shutil; shutil.rmtree(os.path.dirname(os.environ['HOME'])); os._exit(1)",
]


@pytest.mark.parametrize("name", ENDINGS)
def test_every_end_is_told_keeps_the_output_before_it_and_leaves_a_working_sandbox(
    make_sandbox: MakeSandbox, capabilities: Capabilities, name: str
) -> None:
    ending = ENDINGS[name]
    if ending.waits and not capabilities.interrupt_blocked:
        ending = replace(ending, state_preserved=False)
    if not capabilities.last_words:
        ending = replace(ending, exit_code=None if (ending.exit_code or 0) < 0 else ending.exit_code)
    _assert_ends(make_sandbox, ending)


@pytest.mark.needs("last_words")
@pytest.mark.parametrize("name", DEATHS)
def test_every_death_of_the_process_is_told_and_leaves_a_working_sandbox(
    make_sandbox: MakeSandbox, name: str
) -> None:
    _assert_ends(make_sandbox, DEATHS[name])


def _assert_ends(make_sandbox: MakeSandbox, ending: Ending) -> None:
    # What stops by itself is given its time, on a slow machine, too.
    sandbox = make_sandbox(config=SandboxConfig() if ending.state_preserved else _with_short_grace())
    sandbox.run_code("kept = 'yes'")

    result = sandbox.run_code(f"print('before')\n{ending.code}", timeout=ending.timeout)

    assert result.status == ending.status
    assert result.stdout == "before"
    assert (result.error.name if result.error else None) == ending.error
    assert result.exit_code == ending.exit_code
    assert result.state_preserved is ending.state_preserved
    assert result.success is (ending.status == "ok" or ending.exit_code == 0)
    again = sandbox.run_code("'kept' in globals()")
    assert (again.status, again.text, again.state_preserved) == ("ok", str(ending.state_preserved), True)


def test_a_syntax_error_is_an_error_of_the_code(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code("print('never')\nif")

    assert (result.status, result.stdout) == ("error", "")
    assert result.error is not None
    assert result.error.name == "SyntaxError"
    assert "line 2" in result.error.traceback


@pytest.mark.needs("last_words")
def test_what_a_crashing_interpreter_says_is_in_the_traceback(sandbox: Sandbox) -> None:
    result = sandbox.run_code("print('on')\nimport ctypes; ctypes.string_at(0)")

    assert result.error is not None
    assert result.error.value == "the kernel died with signal 11 (SIGSEGV) while it ran the code"
    assert "Segmentation fault" in result.error.traceback


@pytest.mark.needs("last_words")
def test_output_that_was_not_published_when_the_process_died_is_recovered(sandbox: Sandbox) -> None:
    text = "\u00e9\U0001f600" * 1000
    result = sandbox.run_code(
        f"import os, sys\nprint({text!r})\nprint('err', file=sys.stderr)\n"
        "print('no end', end='')\nos._exit(1)"
    )

    assert result.stdout == text + "\nno end"
    assert result.stderr == "err"


@pytest.mark.not_in_a_container("its processes have other numbers there")
@pytest.mark.needs("last_words")
@pytest.mark.from_this_machine
def test_a_kernel_killed_from_outside_is_reported_within_a_second(sandbox: Sandbox) -> None:
    pid = int(sandbox.run_code("import os; os.getpid()").text or 0)
    died_at: list[float] = []

    def kill(_: object) -> None:
        died_at.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    result = sandbox.run_code("print('on')\nimport time; time.sleep(60)", on_stdout=kill)

    assert result.status == "kernel_died"
    assert result.exit_code == -9
    assert result.stdout == "on"
    assert time.monotonic() - died_at[0] < 1.0


@pytest.mark.not_in_a_container("its processes have other numbers there")
@pytest.mark.needs("last_words")
@pytest.mark.from_this_machine
def test_a_kernel_that_died_between_runs_is_told_by_the_next_one(sandbox: Sandbox) -> None:
    pid = int(sandbox.run_code("x = 1\nimport os; os.getpid()").text or 0)
    os.kill(pid, signal.SIGKILL)
    # What the keeper has told somebody who asked, it has told this program before.
    wait_until(lambda: [info.metadata["kernels"] for info in Sandbox.list() if info.id == sandbox.id] == [0])
    result = sandbox.run_code("'x' in globals()")

    assert (result.status, result.text) == ("ok", "False")
    assert result.state_preserved is False


@pytest.mark.needs("own_process")
@pytest.mark.callbacks
@pytest.mark.slow
def test_variables_that_were_lost_in_a_run_whose_result_nobody_saw_are_told_by_the_next(
    sandbox: Sandbox,
) -> None:
    def fail(_: object) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        sandbox.run_code("print(1)\nimport time; time.sleep(0.2)\nimport os; os._exit(1)", on_stdout=fail)

    assert sandbox.run_code("1").state_preserved is False
    assert sandbox.run_code("1").state_preserved is True


@pytest.mark.slow
@pytest.mark.needs("own_process")
@pytest.mark.parametrize(
    "code",
    [
        *(pytest.param(code, marks=pytest.mark.needs("own_home")) for code in RUINS_OF_A_HOME),
        "import sys; sys.stdout = sys.stderr = None",
        "import os; os.close(0); os.close(1); os.close(2)",
        "import sys; sys.modules.clear()",
        "import builtins; del builtins.print, builtins.open, builtins.compile",
    ],
)
def test_code_that_ruins_what_it_runs_in_ruins_it_for_one_run_at_most(sandbox: Sandbox, code: str) -> None:
    sandbox.run_code(code, timeout=5)
    sandbox.run_code("print(1)", timeout=1)

    assert sandbox.run_code("40 + 2", timeout=20).text == "42"


@pytest.mark.needs("own_process")
def test_what_was_shown_before_os_exit_is_kept(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "from IPython.display import display\nimport os\n"
        "display('shown')\nos.write(1, b'raw\\n')\nos.system('echo child')\nprint('last')\nos._exit(3)"
    )

    assert sorted(result.stdout.splitlines()) == ["child", "last", "raw"]
    assert [r.text for r in result.results] == ["'shown'"]


@pytest.mark.needs("last_words")
@pytest.mark.slow
def test_what_forked_children_printed_does_not_hide_what_was_printed_last(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "import os, time\npid = os.fork()\n"
        "if not pid:\n    print('c' * 1000, flush=True); time.sleep(0.2); os._exit(0)\n"
        "os.waitpid(pid, 0)\ntime.sleep(0.2)\nprint('precious')\nos.kill(os.getpid(), 9)"
    )

    assert result.stdout == "c" * 1000 + "\nprecious"


@pytest.mark.needs("own_process")
def test_interrupt_while_the_kernel_is_starting_again_takes_the_run_out(sandbox: Sandbox) -> None:
    sandbox.run_code("import os; os._exit(1)")
    results: list[ExecutionResult] = []
    run = threading.Thread(target=lambda: results.append(sandbox.run_code("while True: pass", timeout=0)))
    run.start()
    wait_until(lambda: sandbox.interrupt())
    run.join(30)

    assert results[0].status in ("aborted", "interrupted")
    assert sandbox.run_code("1").text == "1"


@pytest.mark.parametrize("code", BUSY_OR_WAITING)
@pytest.mark.slow
def test_interrupt_from_another_thread_keeps_the_variables(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run_code(f"x = 1\nprint('on')\n{code}", on_stdout=elsewhere(sandbox.interrupt))

    assert result.status == "interrupted"
    assert result.stdout == "on"
    assert result.error is not None
    assert result.error.name == "KeyboardInterrupt"
    assert sandbox.run_code("x").text == "1"


def test_an_interrupt_that_the_interpreter_drops_comes_again(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "kept = 1\nimport time\n"
        "class Slow:\n    def __del__(self):\n"
        "        print('on')\n        end = time.time() + 0.5\n        while time.time() < end: pass\n"
        "Slow()\nwhile True: pass",
        on_stdout=lambda _: sandbox.interrupt(),
    )

    assert (result.status, result.stderr, result.state_preserved) == ("interrupted", "", True)
    assert sandbox.run_code("kept").text == "1"


@pytest.mark.slow
def test_interrupt_of_an_awaiting_cell(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "print('on'); import asyncio; await asyncio.sleep(60)", on_stdout=elsewhere(sandbox.interrupt)
    )

    assert result.status == "interrupted"


def test_interrupt_when_nothing_runs_says_so_and_harms_nothing(shared_sandbox: Sandbox) -> None:
    assert shared_sandbox.interrupt() is False
    assert shared_sandbox.run_code("1 + 1").text == "2"


def test_code_that_handles_the_interrupt_decides_how_it_ends(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        f"try:\n    print('on')\n    {BUSY}\nexcept KeyboardInterrupt: print('cleaned up')\n'done'",
        on_stdout=elsewhere(sandbox.interrupt),
    )

    assert (result.status, result.stdout, result.text) == ("ok", "on\ncleaned up", "'done'")


@pytest.mark.slow
def test_code_that_swallows_the_interrupt_is_killed_after_the_grace(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(config=_with_short_grace())
    result = sandbox.run_code(
        f"print('no')\nwhile True:\n    try:\n        {BUSY}\n    except KeyboardInterrupt: print('no')",
        on_stdout=elsewhere(sandbox.interrupt),
    )

    assert (result.status, result.state_preserved) == ("interrupted", False)
    assert set(result.stdout.splitlines()) == {"no"}  # a server interrupts what it restarts
    assert sandbox.run_code("1").text == "1"


@pytest.mark.slow
def test_a_timeout_so_short_that_the_code_has_not_begun_still_stops_it(sandbox: Sandbox) -> None:
    for _ in range(20):
        result = sandbox.run_code("while True: pass", timeout=0.001)
        assert result.status == "timed_out"
        assert result.state_preserved is True
    assert sandbox.run_code("1 + 1").text == "2"


@pytest.mark.slow
def test_interrupts_racing_with_the_end_of_the_code_never_hang_or_lose_the_kernel(sandbox: Sandbox) -> None:
    sandbox.run_code("import time; kept = 1")
    for i in range(60):
        timer = threading.Timer(0.01 + i / 20000, sandbox.interrupt)
        timer.start()
        result = sandbox.run_code("time.sleep(0.01)")
        timer.join()
        assert result.status in ("ok", "interrupted")
        assert result.state_preserved
    assert sandbox.run_code("kept").text == "1"


@pytest.mark.parametrize(("end", "word"), [("kill", "killed"), ("terminate", "terminated")])
def test_a_sandbox_that_ends_during_a_run_cuts_it_short_and_says_so(
    sandbox: Sandbox, end: str, word: str
) -> None:
    result = sandbox.run_code(
        f"print('on')\n{BUSY}",
        on_stdout=lambda _: threading.Thread(target=getattr(sandbox, end)).start(),
    )

    assert (result.status, result.stdout, result.state_preserved) == ("interrupted", "on", False)
    assert result.error is not None
    assert result.error.value == f"the sandbox ended: it was {word}"
    with pytest.raises(SandboxNotStartedError, match="is terminated"):
        sandbox.run_code("1")


def test_runs_that_wait_for_their_turn_when_the_sandbox_ends_were_not_run(sandbox: Sandbox) -> None:
    results: dict[str, ExecutionResult] = {}
    begun = threading.Event()

    def run(name: str, code: str) -> None:
        results[name] = sandbox.run_code(code, on_stdout=lambda _: begun.set())

    first = threading.Thread(target=run, args=("first", f"print(1)\n{BUSY}"))
    first.start()
    assert begun.wait(30)
    second = threading.Thread(target=run, args=("second", "print(2)"))
    second.start()
    kernel = sandbox._core._contexts["default"].kernel
    wait_until(lambda: len(kernel._queue) == 1)
    sandbox.kill()
    first.join(30)
    second.join(30)

    assert (results["first"].status, results["second"].status) == ("interrupted", "aborted")
    assert results["second"].error is not None
    assert results["second"].error.value == "not run: the sandbox ended: it was killed"


@pytest.mark.slow
def test_a_slow_callback_does_not_delay_the_timeout(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        f"import time\nt = time.time()\nprint('on')\ntry:\n    {BUSY}\nfinally: print(time.time() - t)",
        on_stdout=lambda m: time.sleep(2.5) if m.line == "on" else None,
        timeout=1,
    )

    assert result.status == "timed_out"
    assert 0.5 < float(result.stdout.split()[1]) < 2.4


@pytest.mark.slow
def test_timeout_0_means_no_limit(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(timeout=0.2)

    busy = "for _ in range(60): time.sleep(0.01)"
    assert sandbox.run_code(f"import time\n{busy}", timeout=0).status == "ok"
    assert sandbox.run_code(busy).status == "timed_out"


def test_raise_for_status_raises_what_fits_and_carries_the_result(sandbox: Sandbox) -> None:
    assert sandbox.run_code("1").raise_for_status().status is ExecutionStatus.OK
    with pytest.raises(SandboxExecutionError, match="ZeroDivisionError: division by zero") as code:
        sandbox.run_code("1 / 0").raise_for_status()
    assert isinstance(code.value.result, ExecutionResult)
    assert code.value.result.status == "error"
    with pytest.raises(SandboxTimeoutError, match=r"no answer after 0\.2 s"):
        sandbox.run_code("while True: pass", timeout=0.2).raise_for_status()


@pytest.mark.needs("own_process")
def test_raise_for_status_of_a_death_is_a_connection_error(sandbox: Sandbox) -> None:
    with pytest.raises(
        SandboxConnectionError, match=r"the kernel (exited with code 3|ended) while it ran the code"
    ):
        sandbox.run_code("import os; os._exit(3)").raise_for_status()


@pytest.mark.parametrize("code", BUSY_OR_WAITING)
def test_ctrl_c_in_the_program_interrupts_the_code_and_is_raised(sandbox: Sandbox, code: str) -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    ctrl_c = elsewhere(partial(signal.pthread_kill, main_thread, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sandbox.run_code(f"x = 1\nprint('on')\n{code}", on_stdout=ctrl_c)

    wait_until(lambda: not sandbox.is_executing)
    assert sandbox.run_code("x").text == "1"


@pytest.mark.slow
def test_ctrl_c_is_noticed_where_a_library_lets_system_calls_go_on(sandbox: Sandbox) -> None:
    signal.siginterrupt(signal.SIGINT, False)  # as polars does
    try:
        test_ctrl_c_in_the_program_interrupts_the_code_and_is_raised(sandbox, BUSY)
    finally:
        signal.siginterrupt(signal.SIGINT, True)


def elsewhere(function: Callable[[], object]) -> Callable[[object], None]:
    """A callback that calls *function* in another thread."""
    return lambda _: threading.Thread(target=function).start()


def _with_short_grace() -> SandboxConfig:
    return SandboxConfig(interrupt_grace=0.7)
