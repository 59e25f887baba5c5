"""local-eval: what is its own, since the code shares the process with the program that runs it."""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from unittest import mock

import pytest

from code_sandboxes import ExecutionResult, OutputMessage, Sandbox, SandboxConfig, SandboxConfigurationError
from conftest import BUSY


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    before = sys.stdin, sys.stdout, sys.stderr, threading.Thread.start, sys.unraisablehook
    with Sandbox.create("local-eval", config=SandboxConfig(interrupt_grace=0.5)) as sandbox:
        yield sandbox
    after = sys.stdin, sys.stdout, sys.stderr, threading.Thread.start, sys.unraisablehook
    assert all(mine is same for mine, same in zip(before, after, strict=True))


@pytest.fixture
def patient_sandbox() -> Iterator[Sandbox]:
    """Gives code that can be stopped all the time that a busy machine takes for it."""
    with Sandbox.create("local-eval", config=SandboxConfig(interrupt_grace=20)) as sandbox:
        yield sandbox


def run_program(code: str) -> subprocess.CompletedProcess[str]:
    """Run *code* as a program of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


# Code


def test_code_whose_last_expression_raises_runs_once(sandbox: Sandbox) -> None:
    sandbox.run_code("calls = []\ndef fail():\n    calls.append(1)\n    raise ValueError")
    result = sandbox.run_code("print('once')\nfail()")

    assert (result.status, result.stdout) == ("error", "once")
    assert sandbox.run_code("calls").text == "[1]"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("s = 'await x'\ns", "'await x'"),
        ("# await nothing\n1", "1"),
        ("s = '''\n    indented\n        more'''\ns", "'\\n    indented\\n        more'"),
        ("    s = '''\n  a\n    b'''\n    s", "'\\n  a\\n    b'"),
        ("    if True:\n        x = 5\n    x", "5"),
        ("x = 1\r\nx", "1"),
        ("5;", None),
        ("'a;'", "'a;'"),
        ("5  # ;", "5"),
        ("x = 5", None),
        ("None", None),
        ("", None),
        ("def f(): return await_\nawait_ = 3\nf()", "3"),
    ],
)
def test_code_means_what_it_says(sandbox: Sandbox, code: str, text: str | None) -> None:
    result = sandbox.run_code(code)

    assert (result.status, result.text) == ("ok", text)


def test_the_last_value_is_underscore_unless_the_code_uses_that_name(sandbox: Sandbox) -> None:
    sandbox.run_code("41")
    assert sandbox.run_code("_ + 1").text == "42"
    sandbox.run_code("_ = 'mine'")
    sandbox.run_code("5")
    assert sandbox.run_code("_").text == "'mine'"


def test_a_traceback_shows_the_code_and_nothing_of_this_package(sandbox: Sandbox) -> None:
    sandbox.run_code("def f(x):\n    return 1 / x")
    error = sandbox.run_code("display(1)\nf(0)").error

    assert error is not None
    assert "return 1 / x" in error.traceback
    assert "f(0)" in error.traceback
    assert "code_sandboxes" not in error.traceback


@pytest.mark.parametrize(
    ("code", "value"),
    [
        (
            "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
            "<its __str__() raised RuntimeError>",
        ),
        ("a, b = ValueError('a'), ValueError('b')\na.__context__, b.__context__ = b, a\nraise a", "a"),
        (
            "def f(n):\n    try: f(n - 1) if n else 1 / 0\n    except Exception: raise ValueError(n)\nf(200)",
            "200",
        ),
        ("def f(): f()\nf()", "maximum recursion depth exceeded"),
        ("class S(str):\n    def __str__(self): return S('s')\nraise ValueError(S('x'))", "s"),
    ],
)
def test_an_exception_is_told_however_it_is_made(sandbox: Sandbox, code: str, value: str) -> None:
    result = sandbox.run_code(code)

    assert result.status == "error"
    assert result.error is not None
    assert result.error.value == value
    assert type(result.error.value) is str


@pytest.mark.parametrize(
    "code",
    [
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "class R:\n    def __repr__(self):\n        while True: pass\nR()",
        "async def f():\n    while True: pass\nawait f()",
        "import asyncio\nasync def f():\n    while True: await asyncio.sleep(0)\nawait f()",
        "import asyncio\nasync def f():\n    while True: await asyncio.sleep(0)\nasyncio.run(f())",
        "while True: print(1)",
        "while True: display(1)",
        "import threading\nwhile True:\n    t = threading.Thread(target=int); t.start(); t.join()",
        "while True:\n    try: import this_is_missing\n    except ImportError: pass",
    ],
)
@pytest.mark.slow
def test_a_timeout_reaches_the_code_wherever_it_is(patient_sandbox: Sandbox, code: str) -> None:
    sandbox = patient_sandbox
    sandbox.run_code("kept = 1")
    result = sandbox.run_code(code, timeout=0.2)

    assert (result.status, result.state_preserved) == ("timed_out", True)
    assert sandbox.run_code("kept").text == "1"


@pytest.mark.slow
def test_interrupts_at_random_moments_break_nothing(patient_sandbox: Sandbox) -> None:
    sandbox = patient_sandbox
    sandbox.run_code("import threading\nkept = 1")
    code = (
        "n = 0\nwhile True:\n    print(n)\n    display(n)\n"
        "    t = threading.Thread(target=int); t.start(); t.join()\n    n += 1"
    )
    for i in range(150):
        result = sandbox.run_code(code, timeout=0.0005 + (i % 50) / 5000)
        assert (result.status, result.state_preserved) == ("timed_out", True)
        assert result.stdout.split() == [str(n) for n in range(len(result.stdout.split()))]
        assert len(result.results) in (len(result.stdout.split()), len(result.stdout.split()) - 1)
        assert result.error is not None
        assert "code_sandboxes" not in result.error.traceback
    assert sandbox.run_code("kept").text == "1"


def test_source_is_remembered_for_tracebacks_while_the_sandbox_lives(sandbox: Sandbox) -> None:
    before = set(linecache.cache)
    with Sandbox.create("local-eval") as other:
        other.run_code("def f(): return 1")
        assert other.run_code("import inspect; inspect.getsource(f)").text == "'def f(): return 1\\n'"
        for _ in range(1100):
            other.run_code("1")
        assert len(set(linecache.cache) - before) <= 1010
    assert not any(name.startswith("<cell") for name in set(linecache.cache) - before)


# What it prints, and what the program prints


def test_the_program_sees_its_own_streams_also_while_code_runs(sandbox: Sandbox) -> None:
    before, seen = sys.stdout, []

    def look(message: OutputMessage) -> None:
        seen.append((message.line, sys.stdout))
        sandbox.interrupt()

    result = sandbox.run_code(f"import sys; print(sys.stdout.name)\n{BUSY}", on_stdout=look)

    assert result.status == "interrupted"
    assert seen == [("<stdout>", before)]


def test_other_threads_of_the_program_never_notice(sandbox: Sandbox) -> None:
    printed, stop = io.StringIO(), threading.Event()

    def print_on() -> None:
        count = 0
        while not stop.is_set():
            print(count, file=sys.stdout)
            count += 1
            time.sleep(0)

    with contextlib.redirect_stdout(printed):
        thread = threading.Thread(target=print_on)
        thread.start()
        results = [sandbox.run_code("for i in range(50): print('mine', i)") for _ in range(50)]
        stop.set()
        thread.join()

    lines = printed.getvalue().split()
    assert lines == [str(i) for i in range(len(lines))]
    assert lines
    assert all(result.stdout.splitlines() == [f"mine {i}" for i in range(50)] for result in results)


def test_a_redirection_of_the_programs_during_a_run_gets_what_the_program_prints(sandbox: Sandbox) -> None:
    before, mine = sys.stdout, io.StringIO()
    stack = contextlib.ExitStack()

    def redirect(_: object) -> None:
        stack.enter_context(contextlib.redirect_stdout(mine))
        print("from the program")

    result = sandbox.run_code("print(1)\nimport time; time.sleep(0.1)\nprint(2)", on_stdout=redirect)
    assert sys.stdout is mine
    stack.close()

    assert sys.stdout is before
    assert result.stdout == "1\n2"
    assert set(mine.getvalue().splitlines()) == {"from the program"}


def test_code_redirects_its_own_output_and_nobody_elses(sandbox: Sandbox) -> None:
    redirecting = (
        "import contextlib, io, time\nmine = io.StringIO()\nwith contextlib.redirect_stdout(mine):\n"
    )
    inner = "    print('caught')\n    with contextlib.redirect_stdout(io.StringIO()): print('deeper')\n"
    waiting = "    time.sleep(0.2)\nprint('free', mine.getvalue().split())"
    with Sandbox.create("local-eval") as other:
        results: list[ExecutionResult] = []
        thread = threading.Thread(
            target=lambda: results.append(sandbox.run_code(redirecting + inner + waiting))
        )
        thread.start()
        prints = [other.run_code("print('other')").stdout for _ in range(50)]
        thread.join()

    assert results[0].stdout == "free ['caught']"
    assert prints == ["other"] * 50


def test_streams_that_the_code_leaves_replaced_are_its_own(sandbox: Sandbox) -> None:
    before = sys.stdout
    sandbox.run_code("import io, sys\nkept, sys.stdout = sys.stdout, io.StringIO()\nprint('lost')")
    assert sys.stdout is before
    with Sandbox.create("local-eval") as other:
        assert other.run_code("print('here')").stdout == "here"
    assert sandbox.run_code("print('lost')").stdout == ""
    assert sandbox.run_code("sys.stdout = kept\nprint('back')").stdout == "back"


def test_a_stream_that_is_patched_by_way_of_the_dictionary_of_sys_comes_back(sandbox: Sandbox) -> None:
    patching = (
        "import io\nfrom unittest import mock\nwith mock.patch('sys.stdout', io.StringIO()): print('lost')"
    )
    before = sys.stdout
    assert sandbox.run_code(patching).stdout == ""
    assert sandbox.run_code("print('there')").stdout == "there"

    def patch(_: object) -> None:
        with mock.patch("sys.stdout", io.StringIO()):
            print("mine")

    for _ in range(2):
        assert sandbox.run_code("print(1)\nprint(2)", on_stdout=patch).stdout == "1\n2"
        assert sys.stdout is before
        assert vars(sys)["stdout"] is before


def test_garbage_that_prints_when_it_is_collected_stops_nobody(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "import gc\ngc.set_threshold(5)\n"
        "class Garbage:\n    def __init__(self): self.me = self\n    def __del__(self): print('gone')\n"
        "try:\n    for i in range(5000): Garbage(); print('here')\n"
        "finally: gc.set_threshold(700)",
        timeout=60,
    )

    assert result.status == "ok"
    assert result.stdout.splitlines().count("here") == 5000


def test_a_stream_is_as_much_of_one_as_code_needs(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "import sys\n"
        "sys.stdout.buffer.write(b'caf\\xc3'); sys.stdout.buffer.write(b'\\xa9\\n'); sys.stdout.flush()\n"
        "sys.stdout.writelines(['a\\n', 'b\\n']); sys.stdout.close(); print('open')\n"
        "print('error', file=sys.stderr)\n"
        "sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.writable(), sys.stdin.isatty()"
    )

    assert result.stdout == "caf\u00e9\na\nb\nopen"
    assert result.stderr == "error"
    assert result.text == "(False, 'utf-8', True, False)"


def test_two_sandboxes_with_threads_of_their_own_never_mix() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\nimport sys, threading\n"
        "def say(i):\n    print('{0}', i); print('{0}', i, file=sys.stderr)\n"
        "with ThreadPoolExecutor(4) as pool: list(pool.map(say, range(100)))\n"
        "timer = threading.Timer(0.001, say, [100]); timer.start(); timer.join()"
    )
    results: dict[str, list[ExecutionResult]] = {"a": [], "b": []}

    def run(name: str) -> None:
        with Sandbox.create("local-eval") as sandbox:
            results[name] += [sandbox.run_code(code.format(name)) for _ in range(10)]

    before = sys.stdout, sys.stderr
    threads = [threading.Thread(target=run, args=(name,)) for name in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (sys.stdout, sys.stderr) == before
    for name, runs in results.items():
        for result in runs:
            for text in (result.stdout, result.stderr):
                assert sorted(text.splitlines()) == sorted(f"{name} {i}" for i in range(101))


def test_a_pool_of_threads_prints_for_the_run_that_is_on(sandbox: Sandbox) -> None:
    sandbox.run_code("from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1)")
    first = sandbox.run_code("list(pool.map(print, 'ab'));")
    second = sandbox.run_code("list(pool.map(print, 'cd')); pool.shutdown()")

    assert (first.stdout, second.stdout) == ("a\nb", "c\nd")


def test_a_program_without_streams_can_use_it() -> None:
    done = run_program(
        "import sys, os\nsys.stdout = None\nfrom code_sandboxes import Sandbox\n"
        "with Sandbox.create('local-eval') as s: r = s.run_code('print(1)\\n2')\n"
        "assert sys.stdout is None\nos.write(2, f'{r.stdout} {r.text}'.encode())"
    )

    assert (done.stdout, done.stderr) == ("", "1 2")


def test_ipython_that_the_program_has_imported_shows_in_the_sandbox_too() -> None:
    done = run_program(
        "from IPython.display import display\nfrom code_sandboxes import Sandbox\n"
        "with Sandbox.create('local-eval') as s:\n"
        "    r = s.run_code('from IPython.display import display; display(5)')\n"
        "print([x.text for x in r.results], repr(r.stdout))\ndisplay(7)"
    )

    assert done.stdout == "['5'] ''\n7\n"


# Code that does not stop


@pytest.mark.slow
def test_abandoned_code_is_told_loses_its_output_and_leaves_a_fresh_namespace(
    sandbox: Sandbox, capfd: pytest.CaptureFixture[str]
) -> None:
    result = sandbox.run_code(
        "x = 1\nimport sys, time\nprint('before')\n"
        "end = time.time() + 2\n"
        "while time.time() < end:\n"
        "    try:\n"
        "        while True: print('zombie'); sys.stdout.write('zombie'); time.sleep(0.01)\n"
        "    except BaseException: pass",
        timeout=0.3,
    )
    again = [sandbox.run_code("import time; time.sleep(0.1); print('x' in globals())") for _ in range(5)]

    assert (result.status, result.state_preserved, result.stdout[:6]) == ("timed_out", False, "before")
    assert result.error is not None
    assert "so it was abandoned: its thread goes on in this process" in result.error.value
    assert [r.stdout for r in again] == ["False"] * 5
    assert "zombie" not in capfd.readouterr().out


def test_code_that_waits_in_the_system_for_less_than_the_grace_keeps_its_variables(sandbox: Sandbox) -> None:
    result = sandbox.run_code("x = 1\nimport time; time.sleep(0.6)\nprint('not reached')", timeout=0.3)

    assert (result.status, result.state_preserved, result.stdout) == ("timed_out", True, "")
    assert sandbox.run_code("x").text == "1"


@pytest.mark.slow
def test_a_terminated_sandbox_does_not_wait_for_code_that_waits(sandbox: Sandbox) -> None:
    def run() -> None:
        results.append(
            sandbox.run_code("print(1)\nimport time; time.sleep(30)", on_stdout=lambda _: on.set())
        )

    results: list[ExecutionResult] = []
    on = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    assert on.wait(30)
    began = time.monotonic()
    sandbox.terminate()
    thread.join()

    assert results[0].status == "interrupted"
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_traced_program_goes_on_while_the_code_waits() -> None:
    """CPython 3.11 would not: see ``look_no_more()``."""
    done = run_program(
        "import sys, threading\nfrom code_sandboxes import Sandbox, SandboxConfig\n"
        "def trace(*_): return trace\n"
        "with Sandbox.create('local-eval', config=SandboxConfig(interrupt_grace=0.3)) as s:\n"
        "    sys.settrace(trace); threading.settrace(trace)\n"
        "    r = s.run_code('import time; time.sleep(20)', timeout=0.2)\n"
        "    print(r.status, r.state_preserved, s.run_code('1').text)\n"
        "    assert sys.gettrace() is trace\n"
        "    sys.settrace(None)"
    )

    assert done.stdout == "timed_out False 1\n"


def test_code_that_watches_itself_does_not_watch_what_it_calls_of_ours(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "import sys\ndef watch(*_):\n    print('watching')\n    return watch\n"
        "sys.settrace(watch)\nprint('hello')",
        timeout=10,
    )

    assert result.status == "ok"
    assert set(result.stdout.splitlines()) == {"hello", "watching"}
    assert sandbox.run_code("import sys; print(sys.gettrace())").stdout == "None"


# await


def test_a_task_goes_on_when_a_later_cell_awaits(sandbox: Sandbox) -> None:
    sandbox.run_code(
        "import asyncio\n"
        "async def work():\n    await asyncio.sleep(0.01)\n    print('worked')\n    return 3\n"
        "task = asyncio.create_task(work())\nawait asyncio.sleep(0)"
    )
    result = sandbox.run_code("await task")

    assert (result.stdout, result.text) == ("worked", "3")
    assert sandbox.run_code("asyncio.run(asyncio.sleep(0, 'run'))").text == "'run'"
    assert sandbox.run_code("await asyncio.sleep(0, 'slept')").text == "'slept'"


def test_code_that_awaits_cleans_up_when_it_is_interrupted(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "import asyncio\ntry: await asyncio.sleep(60)\nfinally: print('cleaned up')", timeout=0.2
    )

    assert (result.status, result.stdout, result.state_preserved) == ("timed_out", "cleaned up", True)


# The rest of the process


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that it is multi-threaded is the point
@pytest.mark.parametrize(
    ("in_child", "code"),
    [("pass", 0), ("import sys; sys.exit(4)", 4), ("1 / 0", 1), ("import os; os._exit(7)", 7)],
)
def test_a_forked_child_ends_where_the_code_ends(
    sandbox: Sandbox, capfd: pytest.CaptureFixture[str], in_child: str, code: int
) -> None:
    result = sandbox.run_code(
        "import os\nchild = os.fork()\n"
        f"if not child:\n    print('of the child', flush=True)\n    {in_child}\n"
        "if child: print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )

    assert result.stdout == str(code)
    assert "of the child" in capfd.readouterr().out


def test_what_would_hold_for_the_whole_process_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(
        SandboxConfigurationError, match=r"local-eval cannot start in the working directory '/'"
    ):
        sandbox.create_context(cwd="/")
    with pytest.raises(SandboxConfigurationError, match=r"local-eval cannot set environment variables \(A\)"):
        sandbox.create_context(env={"A": "1"})
    assert [context.name for context in sandbox.list_contexts()] == ["default"]


def test_code_may_make_sandboxes_itself(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "from code_sandboxes import Sandbox\nwith Sandbox.create('local-eval') as inner:\n"
        "    said = inner.run_code('print(1)\\n2', on_stdout=lambda m: print('inner', m.line))\n"
        "print('outer'); said.text"
    )

    assert (result.stdout, result.text) == ("inner 1\nouter", "'2'")


def test_nothing_is_left_of_many_sandboxes() -> None:
    with Sandbox.create("local-eval") as sandbox:
        sandbox.run_code("1")
    threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
    for _ in range(50):
        with Sandbox.create("local-eval") as sandbox:
            assert sandbox.run_code("[1]").text == "[1]"
    give_up = time.monotonic() + 30
    while threading.active_count() > threads or len(os.listdir("/dev/fd")) > descriptors:
        assert time.monotonic() < give_up
        time.sleep(0.01)
