"""The backlog of a run: in order, bounded, and never without its control events."""

from __future__ import annotations

import itertools
import threading
import tracemalloc

import pytest
from hypothesis import given, strategies as st

from code_sandboxes.inbox import Inbox
from code_sandboxes.protocol.events import (
    Cleared,
    Displayed,
    Done,
    Event,
    Failed,
    InterruptAsked,
    OutputDropped,
    Started,
    Streamed,
    TimedOut,
    Updated,
)
from tests.scripted import quick


def out(text: str) -> Streamed:
    return Streamed(text, error=False)


def taken(inbox: Inbox) -> list[Event]:
    return list(iter(inbox.take, None))


def filled(*events: Event, limit: int = 1000) -> Inbox:
    inbox = Inbox(limit)
    for event in events:
        inbox.put(event)
    return inbox


def test_an_empty_inbox_gives_nothing() -> None:
    assert Inbox().take() is None


def test_events_are_taken_in_the_order_they_were_put() -> None:
    events = [out("a"), TimedOut(1.0), Displayed({"text/plain": "b"}, {}), out("c"), Done()]
    assert taken(filled(*events)) == events


def test_beyond_the_limit_the_first_and_the_latest_output_is_kept_with_a_note_between() -> None:
    events = [out(f"{number:0100}") for number in range(100)]
    kept = taken(filled(*events))
    middle = kept.index(OutputDropped())
    assert kept == [*events[:middle], OutputDropped(), *events[middle + 1 - len(kept) :]]
    assert 0 < middle < len(kept) - 1
    assert sum(len(event.text) for event in kept if isinstance(event, Streamed)) <= 1000


def test_it_is_noted_once_that_output_was_dropped() -> None:
    inbox = filled(*[out("x" * 100)] * 100)
    assert taken(inbox).count(OutputDropped()) == 1
    inbox.put(out("y"))
    assert taken(inbox) == [out("y")]


def test_control_events_are_never_dropped_and_stay_in_order() -> None:
    controls = [TimedOut(float(number)) for number in range(50)]
    inbox = filled(*[event for control in controls for event in (out("x" * 400), control)], Done())
    assert [e for e in taken(inbox) if isinstance(e, (TimedOut, Done))] == [*controls, Done()]


def test_a_control_event_keeps_its_place_between_the_outputs() -> None:
    first, latest = out("a" * 4000), out("c" * 4000)
    inbox = filled(first, *[out("b" * 4000)] * 9, InterruptAsked(), latest, Done(), limit=10_000)
    kept = taken(inbox)
    assert kept[0] == first
    assert kept[-3:] == [InterruptAsked(), latest, Done()]


def test_an_inbox_that_was_emptied_has_room_again() -> None:
    inbox = Inbox(10_000)
    for _ in range(20):
        events = [out("x" * 2000), out("y" * 2000), out("z" * 2000)]
        for event in events:
            inbox.put(event)
        assert taken(inbox) == events


def test_output_larger_than_half_the_limit_fits() -> None:
    for events in ([out("x" * 9000)], [out("x" * 3000), out("y" * 6000)]):
        assert taken(filled(*events, limit=10_000)) == events


def test_one_output_larger_than_the_limit_is_not_lost_whole() -> None:
    assert any(isinstance(event, Streamed) and event.text for event in taken(filled(out("x" * 5000), Done())))


@pytest.mark.parametrize(
    "data", [{"text/plain": "x" * 4000}, {"application/json": {"rows": ["x" * 40] * 100}}, {"x" * 4000: ""}]
)
def test_displays_count_with_all_they_carry(data: dict[str, object]) -> None:
    for event in (Displayed(data, {}), Displayed({}, data), Updated(data, {}, "d"), Updated({}, data, "d")):
        assert OutputDropped() in taken(filled(*[event] * 20, limit=10_000))


@pytest.mark.parametrize("event", [out(""), Failed("E", "", ""), Started(1), Cleared(wait=False)], ids=repr)
def test_no_number_of_events_that_carry_nothing_finds_room(event: Event) -> None:
    assert len(taken(filled(*[event] * 5000, limit=100_000))) < 1000


def test_what_waits_takes_no_more_memory_than_the_limit() -> None:
    texts = itertools.cycle(["", "x", "\u4e2d" * 10, "\U0001f600" * 3000])
    tracemalloc.start()
    try:
        inbox = Inbox(200_000)
        for _ in range(2_000):
            inbox.put(Streamed(next(texts) + "", error=False))
            inbox.put(Failed(next(texts), "x" * 10, ""))
            inbox.put(Displayed({"application/json": [[], {}, 1.5, 10**20]}, {}))
        assert tracemalloc.get_traced_memory()[0] < 400_000
    finally:
        tracemalloc.stop()
    assert OutputDropped() in taken(inbox)


def test_a_wait_ends_when_something_was_put() -> None:
    inbox = Inbox()
    putting = threading.Thread(target=inbox.put, args=(Done(),))
    putting.start()
    inbox.wait(None)
    putting.join()
    assert inbox.take() == Done()


def test_a_wait_that_may_take_no_time_takes_none() -> None:
    Inbox().wait(0.0)
    Inbox().wait(-1.0)


def test_a_wait_may_last_longer_than_a_lock_can() -> None:
    filled(Done()).wait(1e300)


def test_putting_wakes_whoever_is_notified_unless_it_is_told_not_to() -> None:
    woken: list[str] = []
    inbox = Inbox()
    inbox.notify(lambda: woken.append("now"))
    inbox.put(out("a"), wake=False)
    assert woken == []
    inbox.put(out("b"))
    assert woken == ["now"]
    assert taken(inbox) == [out("a"), out("b")]


_texts = st.lists(st.text("ab", min_size=1, max_size=20), max_size=30)


@quick
@given(_texts)
def test_nothing_is_dropped_while_everything_fits(texts: list[str]) -> None:
    events = [out(text) for text in texts]
    assert taken(filled(*events, limit=max(1, 250 * len(texts)))) == events


@quick
@given(
    st.lists(st.text("ab", min_size=1, max_size=20) | st.just("") | st.just("take"), max_size=40),
    st.integers(1, 6000),
)
def test_any_backlog_keeps_its_order_and_its_control_events(steps: list[str], limit: int) -> None:
    inbox, put, got = Inbox(limit), list[Event](), list[Event]()
    for number, step in enumerate(steps):
        if step == "take":
            got += [event] if (event := inbox.take()) else []
        else:
            put.append(TimedOut(float(number)) if not step else out(f"{number}{step}"))
            inbox.put(put[-1])
    got += taken(inbox)
    kept = [event for event in got if not isinstance(event, OutputDropped)]
    assert kept == [event for event in put if event in kept]
    assert [e for e in kept if isinstance(e, TimedOut)] == [e for e in put if isinstance(e, TimedOut)]
    assert (OutputDropped() in got) is (kept != put)
