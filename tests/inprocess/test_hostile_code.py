"""local-eval against code that means it no good, and against what it may meet in a program."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from code_sandboxes import Sandbox, SandboxConfig
from conftest import wait_until
from tests.inprocess.test_races import after_all

IN_TIME = 30.0


# Code that is interrupted while it opens an event loop leaves that to the garbage collector, which tells.
may_leave_things_open = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
    "ignore:coroutine:RuntimeWarning",
)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with after_all(), Sandbox.create("local-eval", config=SandboxConfig(interrupt_grace=0.5)) as sandbox:
        yield sandbox


# What it raises


def test_an_exception_that_exits_when_it_is_told_is_no_exit(sandbox: Sandbox) -> None:
    result = sandbox.run_code("class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E")

    assert (result.status, result.success, result.exit_code) == ("error", False, None)
    assert result.error is not None
    assert result.error.name == "E"


def test_a_class_that_will_not_say_its_name_holds_up_nothing(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "class M(type):\n    __name__ = property(lambda self: 1 / 0)\n"
        "class E(BaseException, metaclass=M):\n    def __str__(self): raise self\nraise E"
    )

    assert result.status == "error"
    assert sandbox.run_code("1").text == "1"


@pytest.mark.parametrize(
    "code",
    [
        "class E(Exception):\n    def __str__(self):\n        while True: pass\n"
        "try: raise E\nexcept E: raise ValueError",
        "class E(Exception):\n    def __repr__(self):\n        while True: pass\nE()",
    ],
)
def test_an_exception_that_takes_for_ever_to_be_told_is_timed_out(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run_code(code, timeout=0.2)

    assert (result.status, result.state_preserved) == ("timed_out", True)
    assert sandbox.run_code("E.__name__").text == "'E'"


def test_who_prints_where_the_stack_ends_gets_an_error_and_nobody_waits(sandbox: Sandbox) -> None:
    sandbox.run_code(
        "import sys, time\n"
        "def frames():\n    frame, count = sys._getframe(), 0\n"
        "    while frame: frame, count = frame.f_back, count + 1\n    return count\n"
        "def dive(depth):\n    if depth: return dive(depth - 1)\n"
        "    time.sleep(0.01)\n"  # so that the first message is long gone
        "    try: print('deep')\n    except RecursionError: return 'too deep'"
    )
    for left in range(3, 40):
        result = sandbox.run_code(f"dive(sys.getrecursionlimit() - frames() - {left})", timeout=IN_TIME)
        assert result.status in ("ok", "error")
        assert result.text == "'too deep'" or result.stdout == "deep" or result.error is not None
        assert result.duration < IN_TIME / 10


# What it prints


def test_garbage_that_prints_when_it_is_collected_holds_up_nobody(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "import gc\n"
        "class Garbage:\n"
        "    def __init__(self): self.cycle = self\n"
        "    def __del__(self): print('collected'); display('collected')\n"
        "before = gc.get_threshold()\n"
        "try:\n"
        "    for i in range(300):\n"
        "        Garbage()\n"
        "        gc.set_threshold(gc.get_count()[0] + i % 30)\n"
        "        print(i); display(i)\n"
        "finally: gc.set_threshold(*before)",
        timeout=IN_TIME,
    )

    assert result.status == "ok"
    assert [line for line in result.stdout.split() if line != "collected"] == [str(i) for i in range(300)]


def test_a_log_is_written_where_its_writer_prints_whoever_has_set_it_up(
    sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("a log of the program")
    log.propagate = False
    try:
        with Sandbox.create("local-eval") as other:
            first = sandbox.run_code(
                "import logging\nlog = logging.getLogger('a log of the program')\n"
                "log.addHandler(logging.StreamHandler())\nlog.warning('first')"
            )
            second = other.run_code(
                "import logging\nlogging.getLogger('a log of the program').warning('other')"
            )
        log.warning("program")
        third = sandbox.run_code("log.warning('third')")
    finally:
        log.handlers.clear()
        log.propagate = True

    assert (first.stderr, second.stderr, third.stderr) == ("first", "other", "third")
    assert capsys.readouterr().err == "program\n"


def test_threads_that_outlive_their_run_print_in_the_background(sandbox: Sandbox) -> None:
    sandbox.run_code(
        "import sys, threading\nbegin = threading.Event()\n"
        "def work():\n    begin.wait()\n    print('printed')\n    sys.stdout.write('written\\n')\n"
        "    thread = threading.Thread(target=print, args=('started',)); thread.start(); thread.join()\n"
        "thread = threading.Thread(target=work); thread.start()"
    )
    sandbox.run_code("threading.Timer(0.05, begin.set).start()")
    wait_until(lambda: len(sandbox.background_output.stdout) >= 3)

    assert [m.line for m in sandbox.background_output.stdout] == ["printed", "written", "started"]
    assert sandbox.run_code("thread.join()").stdout == ""


def test_a_display_is_updated_from_a_later_run_and_from_a_thread(sandbox: Sandbox) -> None:
    result = sandbox.run_code("handle = display('a', display_id=True)")
    assert [each.text for each in result.results] == ["'a'"]
    sandbox.run_code("handle.update('b')")
    assert [each.text for each in result.results] == ["'b'"]
    sandbox.run_code(
        "import threading\nt = threading.Thread(target=handle.update, args=('c',)); t.start(); t.join()"
    )
    assert [each.text for each in result.results] == ["'c'"]


# Children


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that it is multi-threaded is the point
@pytest.mark.parametrize(
    ("in_child", "code", "said"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(-1)", 255, ""),
        ("sys.exit(True)", 1, ""),
        ("sys.exit('bye')", 1, "bye\n"),
        ("sys.exit('\u00b2')", 1, "\u00b2\n"),
        ("exec('class E(Exception):\\n def __str__(self): raise self\\nraise E')", 1, None),
        ("sys.stdout = None", 0, ""),
        ("await asyncio.sleep(0); sys.exit(5)", 5, ""),
        ("display('nobody sees it')", 0, ""),
        ("kept.write('kept')", 0, "kept"),
    ],
)
def test_a_forked_child_ends_as_a_program_would(
    sandbox: Sandbox, capfd: pytest.CaptureFixture[str], in_child: str, code: int, said: str | None
) -> None:
    result = sandbox.run_code(
        "import asyncio, os, sys\nkept = sys.stderr\n"
        f"child = os.fork()\nif not child:\n    {in_child}\n"
        "if child: print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )

    assert result.stdout == str(code)
    assert said is None or capfd.readouterr().err == said


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the same
def test_multiprocessing_works_with_what_can_be_forked(
    sandbox: Sandbox, capfd: pytest.CaptureFixture[str]
) -> None:
    result = sandbox.run_code(
        "import multiprocessing\ncontext = multiprocessing.get_context('fork')\nqueue = context.Queue()\n"
        "def work():\n    print('in the child', flush=True)\n    queue.put(42)\n"
        "child = context.Process(target=work)\nchild.start()\n"
        "answer = queue.get(timeout=30)\nchild.join()\nanswer, child.exitcode"
    )

    assert (result.text, result.stdout) == ("(42, 0)", "")
    assert capfd.readouterr().out == "in the child\n"


# await


@may_leave_things_open
@pytest.mark.parametrize(
    "code",
    [
        "asyncio.run(asyncio.sleep(60))",
        "loop = asyncio.new_event_loop()\ntry: loop.run_forever()\nfinally: loop.close()",
        "async def f():\n    while True: pass\ntask = asyncio.create_task(f())\nawait asyncio.sleep(60)",
        "await asyncio.gather(asyncio.sleep(60), asyncio.sleep(0))",
        "await asyncio.to_thread(threading.Event().wait, 0.3)\nwhile True: pass",
    ],
)
@pytest.mark.slow
def test_a_timeout_reaches_whatever_event_loop_the_code_waits_in(sandbox: Sandbox, code: str) -> None:
    sandbox.run_code("import asyncio, threading\nkept = 1")
    result = sandbox.run_code(code, timeout=0.2)

    assert (result.status, result.state_preserved) == ("timed_out", True)
    assert sandbox.run_code("await asyncio.sleep(0, kept)").text == "1"


@pytest.mark.slow
def test_a_cell_that_was_interrupted_does_not_go_on_in_a_later_one(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "import asyncio\nasync def spin():\n    while True: pass\ntask = asyncio.create_task(spin())\n"
        "try:\n    await asyncio.sleep(0.3)\n    print('went on')\nfinally: print('cleaned up')",
        timeout=0.2,
    )
    later = sandbox.run_code("await asyncio.sleep(0.3)")

    assert (result.status, result.stdout, result.state_preserved) == ("timed_out", "cleaned up", True)
    assert (later.status, later.stdout) == ("ok", "")


@pytest.mark.slow
def test_code_that_swallows_its_cancellation_is_timed_out_or_abandoned(sandbox: Sandbox) -> None:
    once = "import asyncio\ntry: await asyncio.sleep(60)\nexcept asyncio.CancelledError: print('swallowed')"
    result = sandbox.run_code(once, timeout=0.2)
    assert (result.status, result.stdout, result.state_preserved) == ("timed_out", "swallowed", True)

    for_ever = "while True:\n    try: await asyncio.sleep(60)\n    except asyncio.CancelledError: pass"
    result = sandbox.run_code(for_ever, timeout=0.2)
    assert (result.status, result.state_preserved) == ("timed_out", False)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("async def f(): sys.exit(3)\ntask = asyncio.create_task(f())\nawait asyncio.sleep(60)", "exited"),
        ("asyncio.get_running_loop().stop()\nawait asyncio.sleep(60)", "error"),
        ("asyncio.current_task().cancel()\nawait asyncio.sleep(60)", "error"),
        ("asyncio.get_event_loop().close()\nawait asyncio.sleep(60)", "error"),
        ("async def f(): 1 / 0\ntask = asyncio.create_task(f())\nawait asyncio.sleep(0)\ndel task", "ok"),
    ],
)
def test_whatever_becomes_of_its_event_loop_the_next_cell_has_one(
    sandbox: Sandbox, code: str, status: str
) -> None:
    result = sandbox.run_code(f"import asyncio, sys\n{code}")

    assert result.status == status
    assert sandbox.run_code("await asyncio.sleep(0.01, 'awaited')").text == "'awaited'"


# The end


BUSY = {
    "spins": "while True: pass",
    "sleeps": "import time\ntime.sleep(1)",
    "asks": "input()",
    "awaits": "import asyncio\nawait asyncio.sleep(60)",
    "runs an event loop": "import asyncio\nasyncio.run(asyncio.sleep(60))",
    "swallows a cancellation": (
        "import asyncio\nwhile True:\n"
        "    try: await asyncio.sleep(60)\n    except asyncio.CancelledError: pass"
    ),
}


@pytest.mark.slow
@may_leave_things_open
@pytest.mark.parametrize("end", ["terminate", "kill", "restart"])
@pytest.mark.parametrize("busy", BUSY)
def test_a_run_is_cut_short_whatever_it_does_and_leaves_no_thread(busy: str, end: str) -> None:
    begun, over = threading.Event(), threading.Event()

    def answer(_: object) -> str:
        begun.set()
        assert over.wait(IN_TIME)
        return "too late"

    def end_it() -> None:
        assert begun.wait(IN_TIME)
        getattr(sandbox, end)()
        over.set()

    with after_all(), Sandbox.create("local-eval") as sandbox:
        ending = threading.Thread(target=end_it)
        ending.start()
        result = sandbox.run_code(
            f"print('on')\n{BUSY[busy]}",
            on_stdout=lambda _: None if busy == "asks" else begun.set(),
            on_input=answer,
        )
        ending.join()
        assert (result.status, result.stdout, result.state_preserved) == ("interrupted", "on", False)
        if end == "restart":
            assert sandbox.run_code("print('again')").stdout == "again"


@pytest.mark.slow
@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_code_may_end_the_sandbox_that_it_runs_in(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with after_all(), Sandbox.create("local-eval") as sandbox:
        monkeypatch.setattr(sys.modules[__name__], "mine", sandbox, raising=False)
        result = sandbox.run_code(f"import sys\nprint(1)\nsys.modules[{__name__!r}].mine.{end}()\nprint(2)")

    assert (result.status, result.stdout) == ("interrupted", "1")


def test_a_callback_may_end_the_sandbox(sandbox: Sandbox) -> None:
    result = sandbox.run_code("print(1)\nwhile True: pass", on_stdout=lambda _: sandbox.terminate())

    assert (result.status, result.stdout) == ("interrupted", "1")
    assert not sandbox.is_running


@pytest.mark.parametrize("busy", ["while True: pass", "import time; time.sleep(60)", "input()"])
@pytest.mark.slow
def test_a_program_may_end_while_code_runs(busy: str) -> None:
    program = (
        "import threading\nfrom code_sandboxes import Sandbox\n"
        "sandbox, on, never = Sandbox.create('local-eval'), threading.Event(), threading.Event()\n"
        f"code = 'print(1)\\n{busy}'\n"
        "def run(): sandbox.run_code(code, on_stdout=lambda _: on.set(), on_input=lambda _: never.wait())\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "on.wait()\nprint('over')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=IN_TIME)

    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


# What stays


@pytest.mark.slow
def test_thousands_of_runs_leave_nothing(sandbox: Sandbox) -> None:
    code = (
        "import sys\ndef f(depth):\n    return f(depth - 1) if depth else 1 / 0\n"
        "print('a', file=sys.stderr); display([1])\nbig = bytearray(10_000)\n{}"
    )

    def objects_after(runs: int) -> int:
        for number in range(runs):
            sandbox.run_code(code.format(("[1]", "f(20)", "await g(", "sys.exit(1)")[number % 4]))
        gc.collect()
        return len(gc.get_objects())

    objects_after(1200)  # source is remembered for the last thousand
    before = objects_after(40)
    assert objects_after(2000) - before < 500


class Kept:
    """Tells whether any of its kind is alive."""

    alive = 0

    def __init__(self) -> None:
        Kept.alive += 1

    def __del__(self) -> None:
        Kept.alive -= 1


@pytest.mark.slow
def test_what_code_has_made_is_let_go_of_with_its_sandbox() -> None:
    with after_all(), Sandbox.create("local-eval") as sandbox:
        sandbox.run_code(
            f"import asyncio, sys\nkept = sys.modules[{__name__!r}].Kept()\n"
            "async def wait():\n    try: await asyncio.sleep(60)\n    finally: kept\n"
            "task = asyncio.create_task(wait())\nawait asyncio.sleep(0)\nkept"
        )
        sandbox.run_code("def fail(): raise ValueError(kept)\nfail()")
        assert Kept.alive == 1

    def is_gone() -> bool:
        gc.collect()
        return Kept.alive == 0

    wait_until(is_gone)
