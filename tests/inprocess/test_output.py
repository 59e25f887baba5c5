"""The queue of what a kernel says: whole, in order, from any thread, to one listener who is woken once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping

import pytest

from code_sandboxes.inprocess import output as output_module
from code_sandboxes.inprocess.output import Output
from code_sandboxes.protocol.messages import Message, Session

FIRST: Mapping[str, object] = {"msg_id": "1"}
SECOND: Mapping[str, object] = {"msg_id": "2"}


@pytest.fixture
def output() -> Output:
    return Output(Session("kernel", lambda: "now"))


def taken(output: Output) -> list[Message]:
    """All that waits."""
    return output.take(1_000_000)


def told(messages: list[Message]) -> list[tuple[str, object]]:
    """What they are, and their text where they have any."""
    return [(message.msg_type, message.content.get("text")) for message in messages]


def test_what_is_said_is_taken_once_and_in_order(output: Output) -> None:
    output.say("iopub", "status", {"execution_state": "busy"}, FIRST)
    output.write("stdout", "text", FIRST)
    output.say("shell", "execute_reply", {}, FIRST)

    assert told(taken(output)) == [("status", None), ("stream", "text"), ("execute_reply", None)]
    assert taken(output) == []


def test_text_is_one_message_as_long_as_nothing_comes_in_between(output: Output) -> None:
    for text in "ab":
        output.write("stdout", text, FIRST)
    output.write("stderr", "c", FIRST)
    output.write("stdout", "d", FIRST)
    output.say("iopub", "display_data", {}, FIRST)
    output.write("stdout", "e", FIRST)

    messages = taken(output)
    assert [message.content.get("text") for message in messages] == ["ab", "c", "d", None, "e"]
    assert [message.content.get("name") for message in messages] == [
        "stdout",
        "stderr",
        "stdout",
        None,
        "stdout",
    ]


def test_text_of_two_requests_is_told_apart(output: Output) -> None:
    output.write("stdout", "a", FIRST)
    output.write("stdout", "b", SECOND)

    assert [(m.content["text"], m.parent_id) for m in taken(output)] == [("a", "1"), ("b", "2")]


def test_no_text_is_no_message(output: Output) -> None:
    output.write("stdout", "", FIRST)
    assert taken(output) == []


def test_what_is_no_unicode_text_is_replaced(output: Output) -> None:
    output.write("stdout", "a\ud800b", FIRST)
    assert told(taken(output)) == [("stream", "a?b")]


def test_the_listener_is_woken_once_until_it_takes(output: Output) -> None:
    woken: list[str] = []
    output.listen(lambda: woken.append("woken"))
    output.write("stdout", "a", FIRST)
    output.say("iopub", "status", {}, FIRST)
    assert woken == ["woken"]

    taken(output)
    output.write("stdout", "b", FIRST)
    assert woken == ["woken"] * 2


def test_what_may_wait_for_the_next_message_wakes_nobody(output: Output) -> None:
    woken: list[str] = []
    output.listen(lambda: woken.append("woken"))
    output.say("shell", "execute_reply", {}, FIRST, wake=False)
    assert woken == []

    output.say("iopub", "status", {}, FIRST)
    assert woken == ["woken"]
    assert len(taken(output)) == 2


@pytest.mark.parametrize(
    "say", [lambda o: o.write("stdout", "a", FIRST), lambda o: o.say("iopub", "a", {}, {})]
)
def test_a_listener_that_could_not_be_woken_is_by_the_next_message(
    output: Output, say: Callable[[Output], None]
) -> None:
    woken: list[str] = []
    output.listen(lambda: woken.append("woken") if len(woken) else raise_recursion_error(woken))
    with pytest.raises(RecursionError):
        say(output)
    say(output)

    assert woken == ["failed", "woken"]


def raise_recursion_error(woken: list[str]) -> None:
    woken.append("failed")
    raise RecursionError


def test_a_listener_may_take_some_of_it_and_come_back(output: Output) -> None:
    woken: list[str] = []
    output.listen(lambda: woken.append("woken"))
    for number in range(5):
        output.say("iopub", str(number), {}, FIRST)

    assert [message.msg_type for message in output.take(3)] == ["0", "1", "2"]
    output.say("iopub", "5", {}, FIRST)
    assert [message.msg_type for message in output.take(9)] == ["3", "4", "5"]
    assert woken == ["woken"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is little room, and much patience."""
    monkeypatch.setattr(output_module, "_ROOM", 10)
    monkeypatch.setattr(output_module, "_PATIENCE", 30.0)


@pytest.mark.usefixtures("small")
def test_who_says_more_than_there_is_room_for_waits_for_the_listener(output: Output) -> None:
    woken = threading.Semaphore(0)
    output.listen(lambda: woken.release())

    def write() -> None:
        for _ in range(5):
            output.write("stdout", "x" * 11, FIRST)
            output.wait_for_room()

    writer = threading.Thread(target=write)
    writer.start()
    heard: list[object] = []
    while len(heard) < 5:
        assert woken.acquire(timeout=30)
        heard += [message.content["text"] for message in taken(output)]
    writer.join()

    assert heard == ["x" * 11] * 5


@pytest.mark.usefixtures("small")
def test_who_says_more_than_there_is_room_for_does_not_wait_for_ever(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "_PATIENCE", 0.001)
    output.write("stdout", "x" * 11, FIRST)
    output.wait_for_room()

    assert told(taken(output)) == [("stream", "x" * 11)]


@pytest.mark.usefixtures("small")
def test_after_the_end_nothing_is_kept_and_nobody_waits(output: Output) -> None:
    output.write("stdout", "x" * 11, FIRST)
    waiting = threading.Thread(target=output.wait_for_room)
    waiting.start()
    output.close()
    waiting.join(10)
    assert not waiting.is_alive()

    output.write("stdout", "more", FIRST)
    output.say("iopub", "status", {}, FIRST)
    assert taken(output) == []


def test_threads_lose_nothing_and_tear_nothing(output: Output) -> None:
    over = threading.Event()

    def write(name: str) -> None:
        for number in range(500):
            output.write("stdout", f"{name}{number}\n", FIRST)

    heard: list[str] = []

    def listen() -> None:
        while not over.is_set():
            heard.extend(str(message.content["text"]) for message in taken(output))

    listener = threading.Thread(target=listen)
    writers = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in (listener, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    listener.join()
    heard.extend(str(message.content["text"]) for message in taken(output))

    lines = "".join(heard).splitlines()
    for name in "abcd":
        assert [line for line in lines if line.startswith(name)] == [f"{name}{n}" for n in range(500)]
    assert len(lines) == 2000


def test_garbage_that_writes_when_it_is_collected_holds_nobody_up(output: Output) -> None:
    class Garbage:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            output.write("stderr", "collected", FIRST)

    def write_and_take() -> None:
        for more in range(100):
            Garbage()
            gc.set_threshold(gc.get_count()[0] + more % 10)  # it comes after that many more objects
            output.write("stdout", "written", FIRST)
            output.say("iopub", "status", {}, FIRST)
            taken(output)

    before = gc.get_threshold()
    thread = threading.Thread(target=write_and_take, daemon=True)
    thread.start()
    thread.join(30)
    gc.set_threshold(*before)

    assert not thread.is_alive()
