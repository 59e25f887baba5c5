"""Code that is interrupted at random moments, hundreds of times: each result is true, and nothing breaks."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from code_sandboxes import ExecutionResult, Sandbox

ROUNDS = 60

END = Callable[[Sandbox, str], ExecutionResult]


@contextlib.contextmanager
def after_all() -> Iterator[None]:
    """What is done here leaves no trace in the program: neither streams nor threads."""
    threads, streams = set(threading.enumerate()), _streams()
    yield
    end = time.monotonic() + 30
    while any(t.name == "code_sandboxes-eval" for t in set(threading.enumerate()) - threads):
        assert time.monotonic() < end, "a thread of the code is left"
        time.sleep(0.01)
    assert _streams() == streams


def _streams() -> list[object]:
    return [vars(sys)[name] for name in ("stdin", "stdout", "stderr", "__stdout__")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with after_all(), Sandbox.create("local-eval") as sandbox:
        sandbox.run_code("import asyncio, itertools, sys, threading\nkept = 'yes'")
        yield sandbox


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def moment() -> float:
    """Seconds; mostly very few."""
    return 10 ** random.uniform(-3.3, -2)


def timed_out(sandbox: Sandbox, code: str) -> ExecutionResult:
    return sandbox.run_code(code, on_input=lambda request: request.prompt, timeout=moment())


def interrupted(sandbox: Sandbox, code: str) -> ExecutionResult:
    threading.Timer(moment(), interrupt_until_heard, [sandbox]).start()
    return sandbox.run_code(code, on_input=lambda request: request.prompt)


def interrupt_until_heard(sandbox: Sandbox) -> None:
    while not sandbox.interrupt():
        pass


def check(result: ExecutionResult) -> None:
    """It tells what happened, and nothing that is none of the code's business."""
    assert result.status in ("timed_out", "interrupted")
    assert result.state_preserved
    assert result.error is not None
    assert "code_sandboxes" not in result.error.traceback
    assert "contextlib" not in result.error.traceback
    assert vars(sys)["stdout"] is sys.stdout


def printed(result: ExecutionResult) -> str:
    return "".join(message.line + message.end for message in result.logs.stdout)


def counted(up_to: int, line: str = "{}\n") -> str:
    return "".join(line.format(number) for number in range(up_to))


@pytest.mark.slow
@pytest.mark.parametrize("end", [timed_out, interrupted])
class TestEachIsCutShortCleanly:
    def test_what_prints(self, sandbox: Sandbox, end: END) -> None:
        for _ in range(ROUNDS):
            result = end(sandbox, "assert kept == 'yes'\nfor n in itertools.count(): print(n)")
            check(result)
            assert printed(result) == counted(printed(result).count("\n"))

    def test_what_writes_in_pieces(self, sandbox: Sandbox, end: END) -> None:
        for _ in range(ROUNDS):
            result = end(
                sandbox,
                "for n in itertools.count():\n"
                "    for piece in (str(n), ' ', 'and', '\\n'): sys.stdout.write(piece)",
            )
            check(result)
            text = printed(result)
            assert counted(text.count("\n") + 1, "{} and\n").startswith(text)

    def test_what_displays(self, sandbox: Sandbox, end: END) -> None:
        for _ in range(ROUNDS):
            result = end(sandbox, "for n in itertools.count(): display(n)")
            check(result)
            assert [each.text for each in result.results] == [str(n) for n in range(len(result.results))]

    def test_what_asks(self, sandbox: Sandbox, end: END) -> None:
        for _ in range(ROUNDS):
            result = end(
                sandbox,
                "for n in itertools.count():\n    answer = input(str(n))\n    assert answer == str(n)",
            )
            check(result)

    def test_what_starts_threads_that_print(self, sandbox: Sandbox, end: END) -> None:
        for _ in range(ROUNDS):
            result = end(
                sandbox,
                "for n in itertools.count():\n"
                "    thread = threading.Thread(target=print, args=(n,)); thread.start(); thread.join()",
            )
            check(result)
            sandbox.run_code("thread.join()")
            assert printed(result) == counted(printed(result).count("\n"))

    def test_what_awaits(self, sandbox: Sandbox, end: END) -> None:
        for _ in range(ROUNDS):
            result = end(sandbox, "for n in itertools.count():\n    await asyncio.sleep(0)\n    print(n)")
            check(result)
            assert printed(result) == counted(printed(result).count("\n"))

    def test_what_raises_and_catches(self, sandbox: Sandbox, end: END) -> None:
        for _ in range(ROUNDS):
            result = end(
                sandbox,
                "def fail(depth): return fail(depth - 1) if depth else 1 / 0\n"
                "for n in itertools.count():\n"
                "    try: fail(20)\n"
                "    except ZeroDivisionError: print(n)",
            )
            check(result)
            assert printed(result) == counted(printed(result).count("\n"))


@pytest.mark.slow
def test_what_catches_the_interrupt_goes_on(sandbox: Sandbox) -> None:
    caught = 0
    for _ in range(ROUNDS):
        result = interrupted(
            sandbox,
            "try:\n"
            "    for n in itertools.count(): print(n)\n"
            "except KeyboardInterrupt: print('caught')\n"
            "for n in range(100): sys.stdout.flush()\n"
            "print('went on')",
        )
        text = printed(result).removesuffix("caught\nwent on\n")
        assert text == counted(text.count("\n"))
        if result.status == "ok":
            caught += 1
            assert printed(result).endswith("caught\nwent on\n")
        else:  # it came before the code had begun to catch it, or once it had caught it
            check(result)
    assert caught > ROUNDS / 2


@pytest.mark.slow
def test_sandboxes_that_are_cut_short_side_by_side_never_mix() -> None:
    codes = (
        "for n in itertools.count(): print('{0}', n)",
        "for n in itertools.count():\n"
        "    thread = threading.Thread(target=print, args=('{0}', n)); thread.start(); thread.join()",
        "import logging\nlogging.basicConfig()\nfor n in itertools.count(): logging.warning('{0} %s', n)",
    )

    def run(name: str) -> None:
        with Sandbox.create("local-eval") as sandbox:
            sandbox.run_code("import itertools, sys, threading")
            for round_ in range(ROUNDS):
                result = timed_out(sandbox, codes[round_ % len(codes)].format(name))
                check_side_by_side(result, name)

    failures: list[BaseException] = []

    def run_and_tell(name: str) -> None:
        try:
            run(name)
        except BaseException as error:  # it belongs to the test
            failures.append(error)

    threads = [threading.Thread(target=run_and_tell, args=(name,)) for name in "abc"]
    with after_all():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def check_side_by_side(result: ExecutionResult, name: str) -> None:
    assert (result.status, result.state_preserved) == ("timed_out", True)
    for line in (result.stdout + "\n" + result.stderr).split("\n"):
        assert line.removeprefix("WARNING:root:").startswith(name) or not line
