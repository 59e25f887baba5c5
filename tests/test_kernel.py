"""What a kernel makes of ends, restarts and cuts that nobody expects just then, by a scripted process."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

import pytest

from code_sandboxes import kernel as kernel_module
from code_sandboxes.inbox import Inbox
from code_sandboxes.kernel import Kernel, Ready, StartFailed
from code_sandboxes.kernel_process import Limits, Prologue
from code_sandboxes.protocol.events import (
    ConnectionLost,
    Died,
    Done,
    Event,
    KernelReplaced,
    NotRun,
    TimedOut,
)
from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.remote.kernels import RemoteContext, RemoteKernel
from code_sandboxes.remote.server import KernelModel
from code_sandboxes.runs import Run
from code_sandboxes.transports.loop import Loop, the_loop
from conftest import wait_until
from tests.scripted import QuietProcess, ScriptedKernel

FINAL = (Ready, StartFailed, Done, NotRun, Died, ConnectionLost)

_NUMBERS = itertools.count(1)


class ScriptedProcess(QuietProcess):
    """It ends when told; it answers and runs code at once, unless it is to do that when told, too."""

    interrupt_mode: Literal["signal"] = "signal"
    how_killed = "it was killed"

    def __init__(
        self,
        *,
        is_fresh: bool = True,
        mute: bool = False,
        runs: bool = True,
        prologue: Prologue | None = None,
    ) -> None:
        self.is_fresh = is_fresh
        self.prologue = prologue
        self.mute = mute
        self.runs = runs
        self.kills = 0
        self.asked: list[Message] = []  # all kernel_info requests
        self.begun: list[Message] = []  # all execute requests
        self.cut: Callable[[bool], None] = lambda is_away: None
        self.dropped: Counter[str] = Counter()
        self.lost: Callable[[Channel, str], None] = lambda channel, how: None
        self._kernel = ScriptedKernel(f"kernel-{next(_NUMBERS)}")
        self._receive: Callable[[Message], None] | None = None
        self._ended: Callable[[], None] = lambda: None

    # What the test does.

    def ends(self) -> None:
        in_loop(self._ended)

    def loses(self, why: str) -> None:
        self.why_lost, self.may_go_on = why, True
        self.ends()

    def is_cut(self, is_away: bool) -> None:
        in_loop(lambda: self.cut(is_away))

    def answers(self) -> None:
        """What it was asked first."""
        self._tell(self._kernel.status("idle", to=self.asked[0]), self._kernel.reply(to=self.asked[0]))

    def says(self, *what: str) -> None:
        """About the latest code: ``busy``, ``reply``, ``idle``."""
        code = self.begun[-1]
        for each in what:
            if each == "reply":
                self._tell(self._kernel.reply(to=code, execution_count=1))
            else:
                self._tell(self._kernel.status(each, to=code))
            if each == "busy":
                self._tell(self._kernel.says("execute_input", {"code": "", "execution_count": 1}, to=code))

    def _tell(self, *messages: Message) -> None:
        def tell() -> None:
            for message in messages:
                if self._receive is not None:
                    self._receive(message)

        the_loop().call_soon(tell)

    # A transport.

    def open(self) -> None:
        return

    def close(self) -> None:
        self._receive = None

    def send(self, message: Message) -> None:
        if message.msg_type == "kernel_info_request":
            self.asked.append(message)
            if not self.mute:
                self._tell(self._kernel.reply(to=message), self._kernel.status("idle", to=message))
        elif message.msg_type == "execute_request":
            self.begun.append(message)
            if self.runs:
                self.says("busy", "reply", "idle")

    # A process.

    def transport(
        self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
    ) -> ScriptedProcess:
        self._receive = receive
        return self

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        self._ended = ended

    def interrupt(self) -> None:
        return

    def terminate(self) -> None:
        self.kills += 1

    def kill(self) -> None:
        self.kills += 1

    def release(self) -> None:
        return


def in_loop(function: Callable[[], None]) -> None:
    """Call it there, and come back when all that was to be done before has been."""
    done = threading.Event()
    the_loop().call_soon(function)
    the_loop().call_soon(done.set)
    assert done.wait(10)


def of(*processes: ScriptedProcess, **limits: float) -> Kernel:
    """A kernel that is these, one after the other."""
    coming = iter(processes)
    return Kernel(the_loop(), lambda: next(coming), "the kernel", Limits(**limits))  # type: ignore[arg-type]  # floats


def outcome(inbox: Inbox) -> tuple[Event, list[Event]]:
    """The last event, and those before it."""
    events: list[Event] = []
    give_up = time.monotonic() + 10
    while not (events and isinstance(events[-1], FINAL)):
        assert time.monotonic() < give_up, f"nothing came after {events}"
        event = inbox.take()
        if event is None:
            inbox.wait(0.1)
        else:
            events.append(event)
    return events[-1], events[:-1]


def starting(kernel: Kernel) -> Inbox:
    inbox = Inbox()
    kernel.start(inbox)
    return inbox


def start(kernel: Kernel) -> Event:
    return outcome(starting(kernel))[0]


def restarting(kernel: Kernel) -> Inbox:
    inbox = Inbox()
    kernel.restart(inbox)
    return inbox


def running(kernel: Kernel, timeout: float | None = None) -> Run:
    run = Run(kernel, {"code": "x", "allow_stdin": False}, timeout, Inbox())
    kernel.execute(run)
    return run


def run(kernel: Kernel) -> tuple[Event, bool]:
    """How a run has ended, and whether variables were lost."""
    made = running(kernel)
    last, before = outcome(made.inbox)
    return last, any(isinstance(event, KernelReplaced) for event in before)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_module, "_SETTLE", 0.1)


# A start that was given up.


FAILS = Prologue({"code": ""}, {}, ("a feature",))


def test_the_late_end_of_a_process_that_was_given_up_holds_nobody_up() -> None:
    given_up, other = ScriptedProcess(prologue=FAILS, runs=True), ScriptedProcess()
    kernel = of(given_up, other)
    assert isinstance(start(kernel), StartFailed)
    assert given_up.kills == 1
    given_up.ends()
    assert isinstance(run(kernel)[0], Done)


def test_the_late_end_of_a_process_that_was_given_up_is_not_the_next_ones() -> None:
    given_up, other = ScriptedProcess(prologue=FAILS), ScriptedProcess(mute=True)
    kernel = of(given_up, other)
    assert isinstance(start(kernel), StartFailed)
    inbox = starting(kernel)
    wait_until(lambda: other.asked)
    given_up.ends()
    other.answers()
    assert isinstance(outcome(inbox)[0], Ready)
    assert isinstance(run(kernel)[0], Done)
    assert other.kills == 0


def test_who_answers_when_it_is_too_late_is_not_ready() -> None:
    late = ScriptedProcess(mute=True)
    kernel = of(late, start=0.1)
    inbox = starting(kernel)
    wait_until(lambda: late.kills)
    late.answers()
    late.ends()
    last, _ = outcome(inbox)
    assert isinstance(last, StartFailed)
    assert "did not answer within 0.1 s" in str(last.error)


def test_the_patience_with_one_start_is_not_that_with_the_next() -> None:
    lost, slow = ScriptedProcess(mute=True), ScriptedProcess(mute=True)
    kernel = of(lost, slow, start=0.5)
    inbox = starting(kernel)
    wait_until(lambda: lost.asked)
    began = time.monotonic()
    lost.loses("the connection was lost")
    assert isinstance(outcome(inbox)[0], StartFailed)
    inbox = starting(kernel)
    wait_until(lambda: slow.kills)
    assert time.monotonic() > began + 0.5
    slow.ends()
    assert isinstance(outcome(inbox)[0], StartFailed)


# A restart.


def test_a_restart_waits_for_the_new_one() -> None:
    old, new = ScriptedProcess(), ScriptedProcess(mute=True)
    kernel = of(old, new)
    assert isinstance(start(kernel), Ready)
    inbox = restarting(kernel)
    in_loop(lambda: None)
    old.answers()
    old.ends()
    wait_until(lambda: new.asked)
    assert inbox.take() is None
    new.answers()
    assert isinstance(outcome(inbox)[0], Ready)


@pytest.mark.parametrize("before", ["nothing", "lost"])
def test_a_restart_of_one_that_is_to_be_reached_first_restarts_it(before: str) -> None:
    lost, there, new = ScriptedProcess(), ScriptedProcess(is_fresh=False), ScriptedProcess()
    kernel = of(*([lost] if before == "lost" else []), there, new)
    if before == "lost":
        assert isinstance(start(kernel), Ready)
        lost.loses("the connection was lost")
    inbox = restarting(kernel)
    wait_until(lambda: there.kills)
    there.ends()
    assert isinstance(outcome(inbox)[0], Ready)
    assert isinstance(run(kernel)[0], Done)
    assert (len(there.begun), len(new.begun)) == (0, 1)


def test_a_restart_of_one_that_was_never_started_starts_it_once() -> None:
    only = ScriptedProcess()
    kernel = of(only)
    assert isinstance(outcome(restarting(kernel))[0], Ready)
    assert only.kills == 0


def test_a_restart_that_fails_is_told_and_so_is_what_is_lost_later() -> None:
    old, new = ScriptedProcess(), ScriptedProcess()
    kernel = of(old, new)
    assert isinstance(start(kernel), Ready)
    inbox = restarting(kernel)
    wait_until(lambda: old.kills)
    old.loses("it could not be restarted: no")
    last, _ = outcome(inbox)
    assert isinstance(last, StartFailed)
    assert "it could not be restarted: no" in str(last.error)
    final, variables_were_lost = run(kernel)
    assert isinstance(final, Done)
    assert variables_were_lost


def test_a_restart_after_a_death_takes_the_one_that_somebody_else_has_started_since() -> None:
    dead, others = ScriptedProcess(), ScriptedProcess(is_fresh=False)
    kernel = of(dead, others)
    assert isinstance(start(kernel), Ready)
    dead.ends()
    assert isinstance(outcome(restarting(kernel))[0], Ready)
    assert others.kills == 0


def test_a_death_before_a_restart_is_not_told_after_it() -> None:
    dead, new = ScriptedProcess(), ScriptedProcess()
    kernel = of(dead, new)
    assert isinstance(start(kernel), Ready)
    dead.why_lost = "who had it is gone"
    dead.ends()
    assert isinstance(outcome(restarting(kernel))[0], Ready)
    assert run(kernel) == (Done(), False)


def test_after_a_restart_a_death_is_told_as_before(impatient: None) -> None:
    silent, second, third = ScriptedProcess(runs=False), ScriptedProcess(), ScriptedProcess()
    kernel = of(silent, second, third)
    assert isinstance(start(kernel), Ready)
    lost = running(kernel)
    wait_until(lambda: silent.begun)
    silent.says("busy", "idle")  # without a reply
    assert isinstance(outcome(lost.inbox)[0], ConnectionLost)
    inbox = restarting(kernel)
    in_loop(lambda: None)
    silent.ends()
    assert isinstance(outcome(inbox)[0], Ready)
    second.ends()
    wait_until(lambda: kernel._process is None)
    last, variables_were_lost = run(kernel)
    assert isinstance(last, Done)
    assert variables_were_lost


# A run that does not end as it should.


def test_what_an_abandoned_run_has_cost_is_told_to_the_next(impatient: None) -> None:
    silent, other = ScriptedProcess(runs=False), ScriptedProcess()
    kernel = of(silent, other)
    assert isinstance(start(kernel), Ready)
    lost = running(kernel)
    kernel.abandon(lost)
    wait_until(lambda: silent.begun)
    silent.says("busy", "idle")
    assert isinstance(outcome(lost.inbox)[0], ConnectionLost)
    silent.ends()
    last, variables_were_lost = run(kernel)
    assert isinstance(last, Done)
    assert variables_were_lost


def test_nothing_begins_in_a_kernel_that_is_being_killed() -> None:
    dying, other = ScriptedProcess(runs=False), ScriptedProcess()
    kernel = of(dying, other, grace=0.05)
    assert isinstance(start(kernel), Ready)
    first, second = running(kernel, timeout=0.05), running(kernel)
    wait_until(lambda: dying.kills)
    dying.says("busy", "reply", "idle")
    last, before = outcome(first.inbox)
    assert isinstance(last, Done)
    assert any(isinstance(event, TimedOut) for event in before)
    dying.ends()
    last, before = outcome(second.inbox)
    assert isinstance(last, Done)
    assert any(isinstance(event, KernelReplaced) for event in before)
    assert (len(dying.begun), len(other.begun)) == (1, 1)


@pytest.mark.parametrize("half", ["reply", "idle"])
def test_who_is_cut_off_waits_longer_for_the_other_half_of_an_answer(impatient: None, half: str) -> None:
    process = ScriptedProcess(runs=False)
    kernel = of(process)
    assert isinstance(start(kernel), Ready)
    cut = running(kernel)
    wait_until(lambda: process.begun)
    process.says("busy", half)
    process.mute = True
    process.is_cut(True)
    time.sleep(0.4)  # four times as long as the other half is waited for otherwise
    process.is_cut(False)
    process.says("idle" if half == "reply" else "reply")
    assert isinstance(outcome(cut.inbox)[0], Done)
    assert process.kills == 0


def test_a_run_that_begins_while_its_process_is_held_has_all_its_time() -> None:
    process = ScriptedProcess(runs=False)
    kernel = of(process)
    assert isinstance(start(kernel), Ready)
    kernel.hold(on=True)
    held = running(kernel, timeout=0.1)
    wait_until(lambda: process.begun)
    time.sleep(0.3)
    kernel.hold(on=False)
    process.says("busy", "reply", "idle")
    last, before = outcome(held.inbox)
    assert isinstance(last, Done)
    assert not any(isinstance(event, TimedOut) for event in before)


# A server's kernel.


class ScriptedServer:
    """It interrupts when it is told."""

    def __init__(self) -> None:
        self.interrupting, self.go_on = threading.Event(), threading.Event()

    def kernel(self, kernel_id: str) -> KernelModel:
        return KernelModel(kernel_id, "python3", "idle", 1)

    def interrupt(self, kernel_id: str) -> None:
        self.interrupting.set()
        assert self.go_on.wait(10)


def test_an_interrupt_that_is_on_its_way_to_a_server_is_not_felt_by_the_next_run() -> None:
    server, process = ScriptedServer(), ScriptedProcess(runs=False)

    class Reached(RemoteKernel):
        def transport(  # type: ignore[override]  # what is scripted is the process's own transport
            self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
        ) -> ScriptedProcess:
            return process.transport(loop, identity, receive, max_message)

    context = RemoteContext(server, lambda: server.kernel("id"))  # type: ignore[arg-type]  # as much as is asked
    kernel = Kernel(the_loop(), lambda: Reached(context, "id", is_fresh=True), "the kernel", Limits())
    assert isinstance(start(kernel), Ready)
    first, second = running(kernel, timeout=0.05), running(kernel)
    assert server.interrupting.wait(10)
    process.says("busy", "reply", "idle")
    assert isinstance(outcome(first.inbox)[0], Done)
    in_loop(lambda: None)
    assert len(process.begun) == 1
    server.go_on.set()
    wait_until(lambda: len(process.begun) == 2)
    process.says("busy", "reply", "idle")
    assert isinstance(outcome(second.inbox)[0], Done)
