"""The guest's part of commands by itself: who is told what, when, and that nothing is left."""

from __future__ import annotations

import importlib.util
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import psutil
import pytest

from code_sandboxes.guest import processes
from code_sandboxes.guest.calls import Guest, Link
from code_sandboxes.guest.processes import Processes
from conftest import open_descriptors, wait_until

PLENTY = 2**40


class Program:
    """A program that is connected to a guest, and what it has been sent."""

    def __init__(self, guest: Guest, name: str) -> None:
        self.messages: list[tuple[Mapping[str, Any], list[Any]]] = []
        self.guest = guest
        self.link: Link = guest.open(name, lambda data, buffers: self.messages.append((data, buffers)))
        self._numbers = 0

    def call(self, name: str, *buffers: bytes, credit: int | None = None, **arguments: object) -> int:
        self._numbers += 1
        message: dict[str, object] = {"call": self._numbers, "name": name, "args": arguments}
        if credit is not None:
            message |= {"channel": self._numbers, "credit": credit}
        self.guest.receive(self.link, message, list(buffers))
        return self._numbers

    def start(self, line: str, *buffers: bytes, credit: int = PLENTY, **arguments: object) -> int:
        settings: dict[str, object] = {
            "id": f"id{self._numbers}",
            "argv": ["/bin/sh", "-c", line],
            "shown": line,
            "cwd": None,
            "env": [],
            "base": None,
            "timeout": None,
            "stdin": None,
            "is_owner": False,
        }
        return self.call("processes.start", *buffers, credit=credit, **(settings | arguments))

    def answer(self, number: int) -> Any:
        wait_until(lambda: self._of("answer", number) or self._of("failure", number))
        return self._of("answer", number)[0][0]["value"]

    def failure(self, number: int) -> Any:
        wait_until(lambda: self._of("failure", number))
        return self._of("failure", number)[0][0]["error"]

    def output(self, channel: int) -> bytes:
        return b"".join(b for m, buffers in self._of("channel", channel) if "data" in m for b in buffers)

    def end(self, channel: int) -> Any:
        wait_until(lambda: self.has_ended(channel))
        return next(m["end"] for m, _ in self._of("channel", channel) if "end" in m)

    def has_ended(self, channel: int) -> bool:
        return any("end" in m for m, _ in self._of("channel", channel))

    def has_more_than(self, channel: int, size: int) -> bool:
        return len(self.output(channel)) > size or self.has_ended(channel)

    def cancel(self, call: int) -> None:
        self.guest.receive(self.link, {"cancel": call}, [])

    def grant(self, channel: int, credit: int) -> None:
        self.guest.receive(self.link, {"grant": channel, "bytes": credit}, [])

    def _of(self, kind: str, number: int) -> list[tuple[Mapping[str, Any], list[Any]]]:
        return [(m, b) for m, b in list(self.messages) if m.get(kind) == number]


@pytest.fixture
def told() -> list[int]:
    """What was told of how many are running."""
    return []


@pytest.fixture
def guest(told: list[int]) -> Iterator[Guest]:
    guest = Guest([Processes(lambda: os.environ, told.append)])
    yield guest
    guest.close()


@pytest.fixture
def program(guest: Guest) -> Program:
    return Program(guest, "one")


@pytest.fixture(params=["pidfd", "polling"], autouse=True)
def how_the_end_is_noticed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "polling":
        monkeypatch.delattr(os, "pidfd_open", raising=False)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_end_is_told_after_all_output(program: Program) -> None:
    started = program.start("seq 10000; exit 3")
    assert program.end(started)["exit_code"] == 3
    assert program.output(started) == b"".join(b"%d\n" % i for i in range(1, 10001))


def test_nothing_is_read_without_credit_and_no_more_than_the_credit(program: Program) -> None:
    credit = 10_000
    started = program.start("head -c 300000 /dev/zero", credit=credit)
    program.answer(started)
    while not program.has_ended(started):
        sent = len(program.output(started))
        program.grant(started, 100_000)
        credit += 100_000
        wait_until(partial(program.has_more_than, started, sent))
        messages = len(program._of("channel", started))
        assert len(program.output(started)) + processes.MESSAGE * (messages - 1) <= credit
    assert len(program.output(started)) == 300_000


def test_a_descendant_that_prints_for_ever_does_not_keep_the_end_from_being_told(program: Program) -> None:
    started = program.start("yes & echo $!")
    try:
        assert program.end(started)["exit_code"] == 0
        yes = int(program.output(started).replace(b"y\n", b"").split()[0])
        assert is_alive(yes)
    finally:
        program.guest.close()
    wait_until(lambda: not is_alive(yes))


def test_a_process_waits_for_the_slowest_of_its_listeners(program: Program, guest: Guest) -> None:
    other = Program(guest, "two")
    started = program.start("read go; head -c 1000000 /dev/zero", stdin="open")
    pid = program.answer(started)["pid"]
    connected = other.call("processes.connect", credit=50_000, pid=pid)
    assert other.answer(connected)["shown"].startswith("read go")
    program.call("processes.write", b"go\n", id="id0", end=True)
    wait_until(lambda: len(other.output(connected)) > 40_000)
    assert not program.has_ended(started)
    other.grant(connected, PLENTY)
    assert program.end(started) == other.end(connected)
    assert len(program.output(started)) == len(other.output(connected)) == 1_000_000


def test_a_listener_whose_program_is_gone_keeps_nobody_waiting(
    program: Program, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LISTENERS_LOOKED_AFTER", 0.05)
    other = Program(guest, "two")
    started = program.start("read go; head -c 1000000 /dev/zero", stdin="open")
    connected = other.call("processes.connect", credit=50_000, pid=program.answer(started)["pid"])
    other.answer(connected)
    other.link._heard_at -= 1000
    program.call("processes.write", b"go\n", id="id0", end=True)
    assert program.end(started)["exit_code"] == 0
    assert len(program.output(started)) == 1_000_000
    assert other.end(connected) is None


def test_a_command_that_is_there_for_one_program_ends_with_it(program: Program, guest: Guest) -> None:
    started = program.start("sleep 100 & sleep 100", is_owner=True)
    pid = program.answer(started)["pid"]
    guest.close_link("one")
    wait_until(lambda: not is_alive(pid))


def test_a_command_that_was_started_for_longer_outlives_the_program(program: Program, guest: Guest) -> None:
    pid = program.answer(program.start("while :; do echo x; done", credit=5000))["pid"]
    guest.close_link("one")
    other = Program(guest, "two")
    connected = other.call("processes.connect", credit=PLENTY, pid=pid)
    wait_until(lambda: len(other.output(connected)) > 200_000)
    assert other.answer(other.call("processes.kill", pid=pid)) is True
    assert other.end(connected)["exit_code"] == -signal.SIGKILL


def test_a_status_that_somebody_else_has_taken_is_not_invented(program: Program) -> None:
    started = program.start("read go; exit 3", stdin="open")
    pid = program.answer(started)["pid"]
    stolen: list[int] = []
    taken = threading.Thread(target=lambda: stolen.append(_wait_for(pid)))
    taken.start()
    program.call("processes.write", b"go\n", id="id0", end=True)
    end = program.end(started)
    taken.join()
    assert end["exit_code"] == (processes.UNKNOWN if stolen == [3] else 3)


def _wait_for(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return -1


def test_who_runs_is_told_when_the_first_begins_and_the_last_ends(program: Program, told: list[int]) -> None:
    first = program.start("read go", stdin="open", id="first")
    second = program.start("read go", stdin="open", id="second")
    assert len(program.answer(program.call("processes.list"))) == 2
    program.call("processes.write", id="first", end=True)
    program.end(first)
    assert told == [1]
    program.call("processes.write", id="second", end=True)
    program.end(second)
    wait_until(lambda: told == [1, 0])


def test_numbers_of_others_are_nobody_s_to_kill(program: Program) -> None:
    assert program.failure(program.call("processes.kill", pid=os.getpid()))["errno"] == "ESRCH"
    ended = program.start("true")
    pid = program.answer(ended)["pid"]
    program.end(ended)
    assert program.answer(program.call("processes.kill", pid=pid)) is False
    assert program.answer(program.call("processes.signal", id="id0", number=9)) is False


def test_all_of_them_end_with_the_kernel_and_nothing_stays_open(told: list[int]) -> None:
    before = open_descriptors()
    guest = Guest([Processes(lambda: os.environ, told.append)])
    program = Program(guest, "one")
    started = program.start("sleep 100 & sleep 100")
    group = program.answer(started)["pid"]
    left = program.start("sleep 100 >/dev/null 2>&1 & echo $!")
    program.end(left)
    survivor = int(program.output(left))
    scripted = program.start("", b"sleep 100", argv=["/bin/sh"], script=True)
    program.answer(scripted)
    guest.close()
    wait_until(lambda: not any(is_alive(pid) for pid in (group, survivor)))
    wait_until(lambda: not any(is_alive(p.pid) for p in psutil.process_iter() if _group(p.pid) == group))
    assert open_descriptors() == before
    refused = program.call("processes.list")
    assert [m for m, _ in program._of("answer", refused)] == []


def test_a_fork_of_the_kernel_holds_no_pipe_open(program: Program) -> None:
    started = program.start("cat", stdin="open")
    program.answer(started)
    goes_on, stop = os.pipe()
    child = os.fork()
    if not child:
        os.close(stop)
        os.read(goes_on, 1)
        os._exit(0)
    try:
        os.close(goes_on)
        program.call("processes.write", b"x", id="id0", end=True)
        assert program.end(started)["exit_code"] == 0
    finally:
        os.close(stop)
        os.waitpid(child, 0)


def test_a_script_is_a_file_of_its_own_that_is_gone_afterwards(program: Program) -> None:
    started = program.start("", b"echo $0; stat -c %a $0", argv=["/bin/sh"], script=True)
    program.end(started)
    path, mode = program.output(started).decode().split()
    assert (mode, os.path.exists(path)) == ("600", False)


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


@pytest.mark.parametrize("argv", [["no-such-program"], ["/bin/sh", "-c", "x\0y"]])
def test_what_cannot_be_started_leaves_nothing(
    program: Program, argv: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program.end(program.start("true"))  # the thread has its descriptors by now
    before = open_descriptors()
    program.failure(program.start("", b"script", argv=argv, script=True))
    assert list(tmp_path.iterdir()) == []
    assert open_descriptors() <= before  # others' may be closed meanwhile


def test_a_time_out_is_kept_while_nobody_reads(program: Program) -> None:
    started = program.start("yes", credit=5000, timeout=0.2)
    begun = time.monotonic()
    pid = program.answer(started)["pid"]
    wait_until(lambda: not is_alive(pid))
    assert time.monotonic() - begun < 10
    program.grant(started, PLENTY)
    assert program.end(started) == {
        "exit_code": -signal.SIGKILL,
        "timed_out": True,
        "duration": pytest.approx(0.2, abs=5),
    }


@pytest.mark.parametrize("timeout", [2.0**31, float("inf")])
def test_a_time_out_may_be_as_long_as_one_likes(program: Program, timeout: float) -> None:
    started = program.start("read line; exit 5", timeout=timeout, stdin="open", id="x")
    assert program.answer(program.call("processes.list")) == [program.answer(started)]
    program.call("processes.write", b"\n", id="x", end=True)
    assert program.end(started)["exit_code"] == 5


def test_a_wait_that_fails_ends_nothing(
    program: Program, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "WAIT_FAILED", 0.01)
    program.end(program.start("true"))
    select, failures = selectors.DefaultSelector.select, [OSError("cannot wait")]

    def fail_once(self: Any, timeout: float | None = None) -> Any:
        if failures:
            raise failures.pop()
        return select(self, timeout)

    monkeypatch.setattr(selectors.DefaultSelector, "select", fail_once)
    for _ in range(2):
        assert program.end(program.start("exit 5"))["exit_code"] == 5
    assert "cannot wait" in capfd.readouterr().err


def test_a_thread_that_cannot_be_started_leaves_nothing_and_the_next_call_tries_again(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = open_descriptors(), psutil.Process().children()
    with monkeypatch.context() as patched:
        patched.setattr(processes, "start_new_thread", refuse)
        for number in (program.start("sleep 1000"), program.call("processes.list")):
            assert program.failure(number)["message"] == "can't start new thread"
    assert (open_descriptors(), psutil.Process().children()) == before
    assert program.end(program.start("exit 5"))["exit_code"] == 5


def test_input_that_was_given_up_does_not_come(program: Program, tmp_path: Any) -> None:
    line = "while [ ! -e go ]; do sleep 0.01; done; wc -c"
    started = program.start(line, stdin="open", id="x", cwd=str(tmp_path))
    fills = program.call("processes.write", b"-" * 2**20, id="x", end=False)
    for _ in range(2):
        program.cancel(program.call("processes.write", b"-" * 1000, id="x", end=False))
    ended = program.call("processes.write", b"123", id="x", end=True)
    (tmp_path / "go").touch()
    assert (program.answer(fills), program.answer(ended)) == (None, None)
    program.end(started)
    assert int(program.output(started)) == 2**20 + 3


def test_where_there_are_no_such_processes_only_starting_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fcntl", "termios"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("processes_of_windows", processes.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    guest = Guest([module.Processes(lambda: os.environ, lambda count: None)])
    program = Program(guest, "one")
    error = program.failure(program.start("true"))
    assert "commands need Linux or macOS" in error["message"]
    guest.close()
