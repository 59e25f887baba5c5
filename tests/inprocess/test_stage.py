"""The stage: code finds streams and functions of its own there, the program its own, now and afterwards."""

from __future__ import annotations

import contextlib
import contextvars
import getpass
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TextIO, TypeVar

import pytest

from code_sandboxes.inprocess import stage
from code_sandboxes.inprocess.actor import Actor
from code_sandboxes.inprocess.stage import Performance, acting

T = TypeVar("T")


class Listener:
    """An audience that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.seen: list[tuple[str, Mapping[str, object]]] = []

    def hear(self, stream: str, text: str) -> None:
        self.heard.append((stream, text))

    def see(self, msg_type: str, content: Mapping[str, object]) -> None:
        self.seen.append((msg_type, content))

    def answer(self, prompt: str, *, password: bool) -> str:
        return f"{prompt} {password}"

    def text(self, stream: str = "stdout") -> str:
        return "".join(text for name, text in self.heard if name == stream)


class Code:
    """What runs on behalf of an actor of its own."""

    def __init__(self) -> None:
        self.listener = Listener()
        self.actor = Actor(self.listener)
        self._context = contextvars.copy_context()
        self._context.run(acting.set, self.actor)

    def run(self, function: Callable[[], T]) -> T:
        return self._context.run(function)

    @property
    def printed(self) -> str:
        return self.listener.text()


@pytest.fixture
def code() -> Code:
    return Code()


@pytest.fixture
def performance() -> Iterator[Performance]:
    performance = Performance()
    yield performance
    performance.end()


class Program:
    """What the program prints, and the stream to which it does."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured

    @property
    def printed(self) -> str:
        return self._captured.readouterr().out


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


def hello() -> None:
    print("hello")


def in_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


# When it is set.


def test_it_is_set_from_the_first_performance_to_the_end_of_the_last() -> None:
    before = sys.stdout
    first, second = Performance(), Performance()
    assert stage.is_set()
    first.end()
    first.end()
    assert stage.is_set()
    second.end()

    assert not stage.is_set()
    assert vars(sys)["stdout"] is before
    assert sys.stdout is before


def test_what_was_there_is_there_again() -> None:
    def found() -> list[object]:
        streams = [vars(sys)[name] for name in ("stdin", "stdout", "stderr", "__stdout__")]
        return [*streams, threading.Thread.start, getpass.getpass, sys.unraisablehook, *sys.meta_path]

    before = found()
    Performance().end()
    assert all(mine is same for mine, same in zip(before, found(), strict=True))


# Whose streams they are.


@pytest.mark.usefixtures("performance")
def test_each_prints_to_their_own(code: Code, program: Program) -> None:
    other = Code()
    print("program")
    code.run(hello)
    other.run(lambda: print("other", file=sys.stdout))
    in_a_thread(lambda: print("thread of the program"))

    assert (code.printed, other.printed) == ("hello\n", "other\n")
    assert program.printed == "program\nthread of the program\n"


@pytest.mark.usefixtures("performance")
def test_the_program_reads_what_it_has_set(code: Code, program: Program) -> None:
    before = sys.stdout
    assert "TellingStream" not in repr(before)
    with contextlib.redirect_stdout(io.StringIO()) as mine:
        assert sys.stdout is mine
        hello()
        code.run(hello)
    assert sys.stdout is before
    assert (mine.getvalue(), program.printed, code.printed) == ("hello\n", "", "hello\n")


def test_what_the_program_sets_while_code_runs_stays_when_that_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    performance, mine = Performance(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    performance.end()
    hello()

    assert sys.stdout is mine
    assert mine.getvalue() == "hello\n"


def test_a_redirection_may_begin_before_a_run_and_end_in_it(code: Code, program: Program) -> None:
    before = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()) as mine:
        performance = Performance()
    hello()
    code.run(hello)
    performance.end()

    assert sys.stdout is before
    assert (mine.getvalue(), program.printed, code.printed) == ("", "hello\n", "hello\n")


@pytest.mark.usefixtures("performance")
def test_code_redirects_what_it_prints_itself(code: Code) -> None:
    other = Code()
    mine = io.StringIO()

    def redirect() -> None:
        with contextlib.redirect_stdout(mine):
            hello()
            other.run(hello)
        print("again")

    code.run(redirect)
    assert (mine.getvalue(), code.printed, other.printed) == ("hello\n", "again\n", "hello\n")


def test_code_that_redirects_for_good_does_so_for_itself(code: Code, program: Program) -> None:
    before, performance, mine = sys.stdout, Performance(), io.StringIO()
    code.run(lambda: setattr(sys, "stdout", mine))
    hello()
    code.run(hello)
    performance.end()

    assert sys.stdout is before
    assert (mine.getvalue(), program.printed, code.printed) == ("hello\n", "hello\n", "")


@pytest.mark.usefixtures("performance")
def test_code_finds_its_own_stream_again_under_the_name_it_has_for_that(code: Code) -> None:
    def restore() -> None:
        sys.stdout = io.StringIO()
        sys.stdout = sys.__stdout__
        hello()

    code.run(restore)
    assert code.printed == "hello\n"


@pytest.mark.usefixtures("performance")
def test_a_stream_may_write_to_the_one_that_it_replaces(code: Code) -> None:
    class Louder:
        def __init__(self, stream: TextIO) -> None:
            self._stream = stream

        def write(self, text: str) -> None:
            self._stream.write(text.upper())

    def replace() -> None:
        sys.stdout = Louder(sys.stdout)
        hello()

    code.run(replace)
    assert code.printed == "HELLO\n"


@pytest.mark.usefixtures("performance")
def test_nobody_stands_in_for_themselves(code: Code, program: Program) -> None:
    def set_what_the_interpreter_sees() -> None:
        sys.stdout = vars(sys)["stdout"]
        hello()

    before = sys.stdout
    set_what_the_interpreter_sees()
    code.run(set_what_the_interpreter_sees)
    assert sys.stdout is before
    assert (program.printed, code.printed) == ("hello\n", "hello\n")


@pytest.mark.usefixtures("performance")
def test_what_code_keeps_of_its_streams_is_for_whoever_writes(code: Code, program: Program) -> None:
    """A handler of logging, mostly, which the whole program shares."""
    other = Code()
    kept = code.run(lambda: sys.stdout)
    for run in (code.run, other.run, lambda function: function()):
        run(lambda: kept.write("kept"))

    assert (code.printed, other.printed, program.printed) == ("kept", "kept", "kept")


def test_a_program_may_have_no_streams(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = code.actor.stdout
    monkeypatch.setattr(sys, "stdout", None)
    performance = Performance()
    print("nowhere", flush=True)
    kept.write("nowhere")
    code.run(lambda: print("hello", flush=True))
    performance.end()

    assert sys.stdout is None
    assert code.printed == "hello\n"


@pytest.mark.usefixtures("performance")
def test_code_may_want_no_streams(code: Code, program: Program) -> None:
    code.run(lambda: setattr(sys, "stdout", None))
    code.run(lambda: print("nowhere", flush=True))

    assert (code.printed, program.printed) == ("", "")


@pytest.mark.usefixtures("performance")
def test_what_the_interpreter_prints_is_for_whom_it_works(
    code: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        def __del__(self) -> None:
            raise ZeroDivisionError

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    code.run(lambda: (Dying(), None)[1])
    assert "ZeroDivisionError" in code.listener.text("stderr")


@pytest.mark.usefixtures("performance")
def test_a_password_is_asked_of_whom_it_concerns(code: Code) -> None:
    assert code.run(getpass.getpass) == "Password:  True"


# Threads


@pytest.mark.usefixtures("performance")
def test_a_thread_works_for_whom_the_one_that_started_it_does(code: Code, program: Program) -> None:
    code.run(lambda: in_a_thread(lambda: in_a_thread(hello)))
    in_a_thread(hello)

    assert (code.printed, program.printed) == ("hello\n", "hello\n")


@pytest.mark.usefixtures("performance")
def test_threads_of_every_make_inherit(code: Code) -> None:
    class Own(threading.Thread):
        def __init__(self) -> None:
            super().__init__()
            self.said = "own"

        def start(self) -> None:
            print("start")
            super().start()

        def run(self) -> None:
            print(self.said)

    def start_all() -> None:
        given = threading.Thread()
        setattr(given, "run", lambda: print("given"))  # noqa: B010  (mypy: a method)
        for thread in (Own(), threading.Timer(0, print, ["timer"]), given):
            thread.start()
            thread.join()

    code.run(start_all)
    assert code.printed == "start\nown\ntimer\ngiven\n"


def test_a_thread_may_outlive_its_run(code: Code, program: Program) -> None:
    performance = Performance()
    over = threading.Event()
    theirs = code.actor.namespace()["__builtins__"]
    assert isinstance(theirs, ModuleType)

    def wait_and_print() -> None:
        over.wait()
        print("library", file=sys.stdout)
        theirs.print("code")
        in_a_thread(lambda: theirs.print("grandchild"))

    thread = threading.Thread(target=wait_and_print)
    code.run(thread.start)
    performance.end()
    over.set()
    thread.join()

    assert (code.printed, program.printed) == ("library\ncode\ngrandchild\n", "")


# Children


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that it is multi-threaded is the point
@pytest.mark.usefixtures("performance")
def test_a_forked_child_prints_for_the_program(code: Code) -> None:
    reading, writing = os.pipe()
    kept = code.actor.stdout

    def fork() -> int:
        child = os.fork()
        if not child:
            sys.stdout = os.fdopen(writing, "w")
            hello()
            kept.write("kept")
            sys.stdout.flush()
            os._exit(stage.is_set())
        return child

    child = code.run(fork)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "hello\nkept"
    assert os.waitpid(child, 0)[1] == 0
    assert stage.is_set()
    assert code.printed == ""


# IPython's functions


@pytest.mark.parametrize("when", ["before", "in", "after"])
@pytest.mark.slow
def test_ipython_shows_for_whom_it_works_whenever_it_was_imported(when: str) -> None:
    program = (
        f"when = {when!r}\n"
        "if when == 'before': from IPython.display import display\n"
        "from tests.inprocess.test_stage import Code, Performance\n"
        "code, performance = Code(), Performance()\n"
        "if when == 'in': from IPython.display import display\n"
        "def show():\n    from IPython.display import display\n    display(5)\n"
        "if when != 'after': code.run(show)\n"
        "performance.end()\n"
        "from IPython.display import display\n"
        "if when == 'after':\n    performance = Performance(); code.run(show); performance.end()\n"
        "display('program')\n"
        "print([content['data'] for _, content in code.listener.seen])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=os.getcwd()
    )
    assert (done.stderr, done.stdout) == ("", "program\n[{'text/plain': '5'}]\n")
