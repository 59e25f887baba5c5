"""The gate: an interrupt reaches the code, once, and nothing of ours; whenever it is asked for."""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import random
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from code_sandboxes.inprocess import gate as gate_module
from code_sandboxes.inprocess.gate import Abandoned, Gate, Interrupted, uninterrupted, was_dropped

T = TypeVar("T")

ROUNDS = 500


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    # What is raised in a finalizer is raised nowhere else, and the collector finalizes what others have left
    # in whatever thread it runs.
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    sys.setswitchinterval(interval)


def in_a_thread(function: Callable[[], T]) -> T:
    """What *function* returns or raises in a thread of its own, where a stray exception harms nobody else."""
    values: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            values.append(function())
        except BaseException as error:  # it belongs to the test
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return values[0]


def run_some_bytecode() -> None:
    """Long enough that whatever is on its way to this thread arrives."""
    for number in range(300):
        str(number)


def spin() -> None:
    while True:
        pass


def ended(gate: Gate, code: Callable[[], object]) -> object:
    """What call() returned or raised, in a thread of its own."""

    def work() -> object:
        try:
            return gate.call(code)
        except BaseException as error:
            return error

    return in_a_thread(work)


def interrupt_when(event: threading.Event, gate: Gate) -> None:
    """From another thread, when *event* is set."""

    def work() -> None:
        assert event.wait(30)
        gate.interrupt()

    threading.Thread(target=work).start()


# What call() gives back.


def test_call_returns_what_the_code_returns() -> None:
    assert ended(Gate(), lambda: 42) == 42
    assert ended(Gate(), lambda: None) is None


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_call_raises_what_the_code_raises(error: BaseException) -> None:
    def code() -> None:
        raise error

    assert ended(Gate(), code) is error


def test_what_the_code_raised_is_not_kept() -> None:
    class Error(Exception):
        pass

    def code() -> None:
        error = Error()
        raised.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error  # it refers to this frame

    raised: list[weakref.ref[Error]] = []
    gc.disable()
    try:
        with pytest.raises(Error):
            Gate().call(code)
        assert raised[0]() is None
    finally:
        gc.enable()


def test_code_sees_an_interrupt_as_a_keyboard_interrupt_and_being_abandoned_as_an_exit() -> None:
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert Interrupted.__name__ == "KeyboardInterrupt"
    assert issubclass(Abandoned, SystemExit)


# When it is asked for.


def test_an_interrupt_asked_for_before_the_code_begins_is_felt_when_it_does() -> None:
    gate = Gate()
    begun: list[str] = []
    gate.interrupt()
    assert isinstance(ended(gate, lambda: begun.append("begun")), KeyboardInterrupt)
    assert begun == []


def test_an_interrupt_asked_for_after_the_end_is_felt_by_nobody() -> None:
    def work() -> None:
        gate = Gate()
        gate.call(lambda: None)
        gate.interrupt()
        gate.interrupt(Abandoned)
        run_some_bytecode()

    in_a_thread(work)


def test_an_interrupt_from_another_thread_ends_code_that_spins() -> None:
    gate = Gate()
    spinning = threading.Event()

    def code() -> None:
        spinning.set()
        spin()

    interrupt_when(spinning, gate)
    assert isinstance(ended(gate, code), KeyboardInterrupt)


def test_an_interrupt_is_felt_after_what_is_uninterrupted_not_in_it() -> None:
    gate = Gate()
    done: list[str] = []

    def code() -> None:
        with uninterrupted():
            gate.interrupt()
            run_some_bytecode()
            with uninterrupted():
                done.append("inner")
            run_some_bytecode()
            done.append("outer")
        done.append("not reached")

    assert isinstance(ended(gate, code), KeyboardInterrupt)
    assert done == ["inner", "outer"]


def test_two_requests_while_the_gate_is_shut_are_felt_as_one() -> None:
    gate = Gate()
    felt: list[BaseException] = []

    def code() -> None:
        try:
            with uninterrupted():
                gate.interrupt()
                gate.interrupt()
        except KeyboardInterrupt as error:
            felt.append(error)
        run_some_bytecode()
        with uninterrupted():
            pass

    assert ended(gate, code) is None
    assert len(felt) == 1


@pytest.mark.parametrize("kinds", [(Interrupted, Abandoned), (Abandoned, Interrupted)])
def test_being_abandoned_is_more_than_being_interrupted(kinds: tuple[type[BaseException], ...]) -> None:
    gate = Gate()
    for kind in kinds:
        gate.interrupt(kind)
    assert isinstance(ended(gate, lambda: None), Abandoned)


def test_who_waits_behind_a_shut_gate_is_woken_by_a_request() -> None:
    gate = Gate()
    woken = threading.Event()
    waiting = threading.Event()
    gate.nudge = woken.set

    def code() -> None:
        with uninterrupted():
            waiting.set()
            assert woken.wait(30)
            assert gate.is_wanted

    interrupt_when(waiting, gate)
    assert isinstance(ended(gate, code), KeyboardInterrupt)


def test_code_that_catches_an_interrupt_can_be_interrupted_again() -> None:
    gate = Gate()
    spinning = threading.Semaphore(0)
    felt: list[str] = []

    def code() -> None:
        for _ in range(3):
            try:
                spinning.release()
                spin()
            except KeyboardInterrupt:
                felt.append("interrupt")

    def interrupt() -> None:
        for _ in range(3):
            assert spinning.acquire(timeout=30)
            gate.interrupt()

    threading.Thread(target=interrupt).start()
    assert ended(gate, code) is None
    assert felt == ["interrupt"] * 3


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python makes the instance before it is dropped")
def test_an_interrupt_that_c_code_has_dropped_is_felt_as_soon_as_something_of_ours_is_called() -> None:
    gate = Gate()
    spinning = threading.Event()

    class Spinning:
        def __getattr__(self, name: str) -> object:
            spinning.set()
            while True:
                pass

    def code() -> str:
        has_attribute = ctypes.pythonapi["PyObject_HasAttrString"]  # it ignores whatever is raised
        assert has_attribute(ctypes.py_object(Spinning()), b"name") == 0
        with uninterrupted():
            return "not reached"

    interrupt_when(spinning, gate)
    assert isinstance(ended(gate, code), KeyboardInterrupt)


@pytest.mark.parametrize("kind", [Interrupted, Abandoned])
def test_an_interrupt_that_was_dropped_comes_again_when_something_of_ours_is_called(
    kind: type[BaseException],
) -> None:
    gate = Gate()
    hooks: list[str] = []

    def code() -> None:
        assert was_dropped(kind)
        hooks.append("left in peace")  # here it would be dropped again
        with uninterrupted():
            hooks.append("uninterrupted")
        hooks.append("not reached")

    assert isinstance(ended(gate, code), kind)
    assert hooks == ["left in peace", "uninterrupted"]


def test_an_interrupt_that_was_dropped_comes_again_to_code_that_calls_nothing_of_ours() -> None:
    gate = Gate()
    dropped = threading.Event()

    def code() -> None:
        assert was_dropped(Interrupted)
        dropped.set()
        spin()

    def see_to_it() -> None:
        assert dropped.wait(timeout=30)
        while not gate.is_over:
            gate.interrupt_again()

    thread = threading.Thread(target=see_to_it)
    thread.start()
    assert isinstance(ended(gate, code), KeyboardInterrupt)
    thread.join()


def test_being_abandoned_is_not_forgotten_for_an_interrupt_that_was_dropped_meanwhile() -> None:
    gate = Gate()

    def code() -> None:
        with uninterrupted():
            gate.interrupt(Abandoned)
            assert was_dropped(Interrupted)

    assert isinstance(ended(gate, code), Abandoned)


def test_nothing_is_taken_for_an_interrupt_of_ours_that_is_none() -> None:
    def code() -> None:
        assert not was_dropped(KeyboardInterrupt)
        assert not was_dropped(ValueError)

    assert ended(Gate(), code) is None
    assert not was_dropped(Interrupted)  # no gate here


def test_an_interrupt_of_the_code_s_own_making_does_not_hide_one_that_is_on_its_way() -> None:
    gate = Gate()
    seen: list[BaseException] = []

    def code() -> None:
        try:
            gate.interrupt()
        except KeyboardInterrupt as error:
            seen.append(type(error)("another"))  # as who copies or pickles it does
        gate.interrupt()

    assert isinstance(ended(gate, code), KeyboardInterrupt)
    assert len(seen) == 1


def test_threads_that_the_code_starts_are_not_held_up_by_its_gate() -> None:
    def code() -> str:
        with uninterrupted():
            return in_a_thread(elsewhere)

    def elsewhere() -> str:
        with uninterrupted():
            return "there"

    assert ended(Gate(), code) == "there"


# Races.


class HesitantGate(Gate):
    """Threads may change, and an interrupt may arrive, whenever anything of it is looked at or set.

    With a GIL the interpreter does either at calls and jumps backwards only.
    """

    def __getattribute__(self, name: str) -> Any:
        hesitate()
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: object) -> None:
        hesitate()
        super().__setattr__(name, value)
        hesitate()


def hesitate() -> None:
    if random.random() < 0.2:
        os.sched_yield()


class Books:
    """Something of ours: two sums that agree, whatever happens to the code that calls."""

    def __init__(self) -> None:
        self.a = 0
        self.b = 0
        self.entries: list[int] = []

    def book(self, amount: int) -> None:
        with uninterrupted():
            self.a += amount
            for _ in range(random.randrange(8)):  # jumps back: there an interrupt would come in
                str(amount)
            with uninterrupted():
                self.entries.append(amount)
            self.b += amount

    def agree(self) -> bool:
        return self.a == self.b == sum(self.entries)


class Felt(Exception):
    """Raised by code that was interrupted, to say how often."""

    def __init__(self, times: int) -> None:
        self.times = times


def spins(books: Books) -> object:
    while True:
        books.book(1)


def spins_alone(books: Books) -> object:
    while True:
        pass


def returns_soon(books: Books) -> object:
    for _ in range(random.randrange(20)):
        books.book(1)
    return "value"


def raises_soon(books: Books) -> object:
    returns_soon(books)
    raise ValueError


def catches_and_goes_on(books: Books) -> object:
    times = 0
    for _ in range(2):
        try:
            while not times:
                books.book(1)
            run_some_bytecode()
            returns_soon(books)
        except KeyboardInterrupt:
            times += 1
    return times


def catches_and_raises(books: Books) -> object:
    raise Felt(int(str(catches_and_goes_on(books))))


def catches_and_spins(books: Books) -> object:
    while True:
        try:
            spins(books)
        except KeyboardInterrupt:
            books.book(2)


class Interrupter:
    """A thread that interrupts at random moments, as often as it is asked to."""

    def __init__(self) -> None:
        self._gates: queue.SimpleQueue[tuple[Gate, tuple[type[BaseException], ...]] | None]
        self._gates = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def interrupt(self, gate: Gate, *kinds: type[BaseException]) -> None:
        """Ask *gate* for each of *kinds*, each after a while."""
        self._gates.put((gate, kinds))

    def stop(self) -> None:
        self._gates.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (asked := self._gates.get()) is not None:
            gate, kinds = asked
            for kind in kinds:
                dawdle()
                gate.interrupt(kind)


def dawdle() -> None:
    """Nothing, for a few bytecodes or some thousand."""
    for _ in range(int(10 ** random.uniform(0, 4))):
        pass


@pytest.fixture
def interrupter(restless: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Interrupter]:
    send = gate_module._set_async_exc

    def hesitate_and_send(*arguments: object) -> object:
        hesitate()
        return send(*arguments)

    monkeypatch.setattr(gate_module, "_set_async_exc", hesitate_and_send)
    interrupter = Interrupter()
    yield interrupter
    interrupter.stop()


def outcome_of(gate: Gate, code: Callable[[Books], object], books: Books) -> object:
    """What call() returned or raised, once nothing can be on its way any more."""
    outcomes: list[object] = []
    strays: list[BaseException] = []
    try:
        try:
            outcomes.append(gate.call(lambda: code(books)))
        except BaseException as error:
            outcomes.append(error)
        run_some_bytecode()
    except BaseException as error:
        strays.append(error)
    assert strays == [], "something was raised after the end"
    (outcome,) = outcomes
    return outcome


def race(
    make_gate: Callable[[], Gate],
    code: Callable[[Books], object],
    interrupter: Interrupter,
    *kinds: type[BaseException],
) -> Counter[str]:
    """Run *code* in many rounds while it is interrupted at random moments; how often it ended how."""

    def rounds() -> Counter[str]:
        ended: Counter[str] = Counter()
        for _ in range(ROUNDS):
            gate, books = make_gate(), Books()
            interrupter.interrupt(gate, *kinds)
            dawdle()
            outcome = outcome_of(gate, code, books)
            assert books.agree()
            if isinstance(outcome, Felt):
                outcome = outcome.times
            ended[type(outcome).__name__ if isinstance(outcome, BaseException) else str(outcome)] += 1
        return ended

    return in_a_thread(rounds)


GATES = pytest.mark.parametrize("make_gate", [Gate, HesitantGate])


@GATES
@pytest.mark.parametrize("code", [spins, spins_alone])
@pytest.mark.slow
def test_code_that_spins_is_interrupted_wherever_it_is(
    interrupter: Interrupter, make_gate: Callable[[], Gate], code: Callable[[Books], object]
) -> None:
    assert race(make_gate, code, interrupter, Interrupted) == {"KeyboardInterrupt": ROUNDS}


@pytest.mark.slow
@GATES
@pytest.mark.parametrize(("code", "end"), [(returns_soon, "value"), (raises_soon, "ValueError")])
def test_code_that_ends_by_itself_has_one_outcome(
    interrupter: Interrupter, make_gate: Callable[[], Gate], code: Callable[[Books], object], end: str
) -> None:
    ended = race(make_gate, code, interrupter, Interrupted)

    assert set(ended) == {end, "KeyboardInterrupt"}


@pytest.mark.slow
@GATES
@pytest.mark.parametrize("code", [catches_and_goes_on, catches_and_raises])
def test_an_interrupt_is_felt_exactly_once(
    interrupter: Interrupter, make_gate: Callable[[], Gate], code: Callable[[Books], object]
) -> None:
    ended = race(make_gate, code, interrupter, Interrupted)

    assert set(ended) == {"1", "KeyboardInterrupt"}  # it may come before the code begins to catch it


@pytest.mark.slow
@GATES
def test_code_that_was_abandoned_ends_whatever_it_has_caught_before(
    interrupter: Interrupter, make_gate: Callable[[], Gate]
) -> None:
    ended = race(make_gate, catches_and_spins, interrupter, Interrupted, Abandoned)

    assert set(ended) <= {"Abandoned", "KeyboardInterrupt"}  # it may come before the code begins to catch it
    assert ended["Abandoned"] > ROUNDS / 2


@pytest.mark.slow
@GATES
def test_two_requests_about_the_end_of_the_code_leave_one_outcome(
    interrupter: Interrupter, make_gate: Callable[[], Gate]
) -> None:
    ended = race(make_gate, returns_soon, interrupter, Interrupted, Abandoned)

    assert set(ended) <= {"value", "KeyboardInterrupt", "Abandoned"}


@pytest.mark.slow
def test_many_requests_about_the_end_of_the_code_leave_one_outcome(interrupter: Interrupter) -> None:
    ended = race(Gate, returns_soon, interrupter, *[Interrupted] * 3, *[Abandoned] * 3)

    assert set(ended) <= {"value", "KeyboardInterrupt", "Abandoned"}


@pytest.mark.slow
def test_two_threads_are_interrupted_at_the_same_time(interrupter: Interrupter) -> None:
    other = Interrupter()
    try:
        with ThreadPoolExecutor(2) as pool:
            races = [pool.submit(race, Gate, spins, each, Interrupted) for each in (interrupter, other)]
        assert [each.result() for each in races] == [{"KeyboardInterrupt": ROUNDS}] * 2
    finally:
        other.stop()
