"""Many messages in one: what a kernel puts into envelopes comes out of them, in order, and nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st
from jupyter_client.session import Session

from code_sandboxes.guest import envelopes as guest
from code_sandboxes.guest.envelopes import ENVELOPES, Envelopes
from code_sandboxes.protocol.envelopes import opened
from code_sandboxes.protocol.messages import Message
from code_sandboxes.protocol.wire import MalformedMessageError, WireCodec
from tests.scripted import quick


def envelope(sizes: object, content: bytes = b"", **more: object) -> Message:
    data = {"messages": sizes, **more}
    return Message("iopub", {}, content={"comm_id": ENVELOPES, "data": data}, buffers=[content])


def packed(*messages: Sequence[bytes]) -> Message:
    return envelope(
        [[len(part) for part in message] for message in messages],
        b"".join(part for message in messages for part in message),
    )


# What is opened.


def test_what_is_in_an_envelope_comes_out_in_order() -> None:
    first = [b'{"msg_id":"1"}', b'{"msg_id":"0"}', b"{}", b'{"text":"\xc3\xa9"}']
    second = [b'{"msg_id":"2"}', b"{}", b'{"a":1}', b"{}", b"xyz", b""]
    assert opened(packed(first, second)) == [
        Message("iopub", {"msg_id": "1"}, {"msg_id": "0"}, {}, {"text": "é"}, []),
        Message("iopub", {"msg_id": "2"}, {}, {"a": 1}, {}, [b"xyz", b""]),
    ]


def test_an_envelope_may_be_empty() -> None:
    assert opened(envelope([])) == []


def test_what_is_left_over_in_an_envelope_is_nothing() -> None:
    assert opened(envelope([[2, 2, 2, 2]], b"{}{}{}{}more")) == [Message("iopub", {}, buffers=[])]


def test_a_message_keeps_none_of_the_others() -> None:
    (first, _) = opened(packed([b"{}"] * 4 + [b"x"], [b"{}"] * 4 + [bytes(1000)]))
    assert first.buffers == [b"x"]
    assert isinstance(first.buffers[0], bytes)


MALFORMED = {
    "no data": Message("iopub", {}, content={"comm_id": ENVELOPES}, buffers=[b""]),
    "data that is no object": Message("iopub", {}, content={"data": [1]}, buffers=[b""]),
    "no sizes": Message("iopub", {}, content={"data": {}}, buffers=[b""]),
    "sizes that are no list": envelope({"0": [0, 0, 0, 0]}),
    "no content": Message("iopub", {}, content={"data": {"messages": []}}),
    "two contents": Message("iopub", {}, content={"data": {"messages": []}}, buffers=[b"", b""]),
    "a message that is no list": envelope([4], b"{}{}{}{}"),
    "three parts": envelope([[2, 2, 2]], b"{}{}{}"),
    "a size that is negative": envelope([[2, -2, 2, 2]], b"{}{}{}{}"),
    "a size that is no integer": envelope([[2, 2.0, 2, 2]], b"{}{}{}{}"),
    "a size beyond the end": envelope([[2, 2, 2, 3]], b"{}{}{}{}"),
    "a size beyond all": envelope([[2**100, 2, 2, 2]], b"{}{}{}{}"),
    "no json": packed([b"{}", b"{}", b"{}", b"{"]),
    "no object": packed([b"[]", b"{}", b"{}", b"{}"]),
    "an empty part": packed([b"", b"{}", b"{}", b"{}"]),
    "one message of many": packed([b"{}"] * 4, [b"{}", b"{}", b"{}", b"null"]),
    "too many messages": envelope([[2, 2, 2, 2]] * 70_000, b"{}" * 280_000),
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
def test_what_does_not_fit_is_malformed(message: Message) -> None:
    with pytest.raises(MalformedMessageError):
        opened(message)


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=3),
    lambda values: st.lists(values, max_size=6) | st.dictionaries(st.sampled_from(["messages", "a"]), values),
    max_leaves=12,
)
_sizes = st.lists(st.lists(st.integers(-1, 9) | st.booleans() | st.none(), max_size=6), max_size=4)
_contents = st.lists(st.sampled_from([b"{}", b'{"a":1}', b"[]", b"x"]), max_size=12).map(b"".join)


@quick
@given(
    st.builds(envelope, _sizes | _json, _contents)
    | st.builds(
        lambda content, buffers: Message("iopub", {}, content=content, buffers=buffers),
        st.dictionaries(st.sampled_from(["data", "comm_id"]), _json),
        st.lists(st.binary(max_size=9), max_size=2),
    )
)
def test_no_envelope_raises_anything_but_a_malformed_message(message: Message) -> None:
    with contextlib.suppress(MalformedMessageError):
        assert all(each.channel == "iopub" for each in opened(message))


# What a kernel puts into them.


class Kernel:
    """Publishes through :class:`Envelopes`; what has gone out is read as a client reads it."""

    def __init__(self) -> None:
        self._session = Session(key=b"a key")
        self._codec = WireCodec(b"a key")
        self._later: list[Callable[[], None]] = []
        self.sent: list[Message] = []
        self.said: list[Message] = []
        self._envelopes = Envelopes(self._session, self._send, lambda _, call: self._later.append(call))

    def _send(self, frames: list[Any]) -> None:
        self.sent.append(self._codec.decode([bytes(frame) for frame in frames], "iopub"))

    def say(self, msg_type: str, content: dict[str, object], buffers: Sequence[bytes] = ()) -> None:
        message = self._session.msg(msg_type, content, parent={"msg_id": "1"})
        frames = [*self._session.serialize(message, b"topic"), *buffers]
        self.said.append(WireCodec(b"a key").decode([bytes(frame) for frame in frames], "iopub"))
        self._envelopes.send(frames)

    def print(self, text: str) -> None:
        self.say("stream", {"name": "stdout", "text": text})

    def wait(self) -> None:
        later, self._later = self._later, []
        for call in later:
            call()

    @property
    def envelopes(self) -> list[Message]:
        return [message for message in self.sent if message.content.get("comm_id") == ENVELOPES]

    def heard(self) -> list[Message]:
        """What a client makes of it."""
        return [
            each
            for message in self.sent
            for each in (opened(message) if message in self.envelopes else [message])
        ]


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def test_little_output_goes_out_as_it_is(kernel: Kernel) -> None:
    for number in range(100):
        kernel.print(f"{number}\n")
    assert kernel.sent == kernel.said


def test_much_output_goes_out_in_envelopes_and_all_of_it_comes_out(kernel: Kernel) -> None:
    for number in range(600):
        kernel.print("x" * 5000)
        if number % 20 == 0:
            kernel.say("display_data", {"data": {"text/plain": str(number)}}, [b"buffer", b""])
    kernel.wait()
    assert kernel.heard() == kernel.said
    assert 0 < len(kernel.envelopes) < 20
    assert len(kernel.sent) - len(kernel.envelopes) < 600


def test_many_messages_go_out_in_envelopes(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert guest._MOST_MESSAGES <= 2500
    monkeypatch.setattr(guest, "_MOST_MESSAGES", 100)  # the same as with thousands
    for number in range(500):
        kernel.say("display_data", {"data": {"text/plain": str(number)}})
    kernel.wait()
    assert kernel.heard() == kernel.said
    assert len(kernel.sent) < 200


def test_one_message_is_not_too_large_for_an_envelope(kernel: Kernel) -> None:
    kernel.print("x" * 5_000_000)
    assert kernel.heard() == kernel.said
    assert len(kernel.envelopes) == 1


def test_a_status_comes_after_all_that_was_said_before(kernel: Kernel) -> None:
    kernel.print("x" * 3_000_000)
    kernel.print("more")
    kernel.say("status", {"execution_state": "idle"})
    assert kernel.heard() == kernel.said
    assert kernel.sent[-1].msg_type == "status"
    kernel.wait()
    assert kernel.heard() == kernel.said


def test_an_envelope_is_not_kept_back_for_long(kernel: Kernel) -> None:
    kernel.print("x" * 3_000_000)
    before = len(kernel.sent)
    kernel.print("more")
    kernel.print("and more")
    assert len(kernel.sent) == before
    kernel.wait()
    assert kernel.heard() == kernel.said


def test_output_goes_out_by_itself_again_after_a_while(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(guest, "monotonic", lambda: now)
    kernel.print("x" * 3_000_000)
    assert len(kernel.envelopes) == 1
    now += 3 * guest._WINDOW
    kernel.print("more")
    assert len(kernel.envelopes) == 1
    assert kernel.heard() == kernel.said


def test_in_no_window_more_goes_out_by_itself_than_a_server_lets_through(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Jupyter Server: 1,000 messages and 1,000,000 bytes of text a second, over three seconds.
    now = 0.0
    monkeypatch.setattr(guest, "monotonic", lambda: now)
    sent: list[tuple[float, int]] = []
    for _ in range(1000):
        before = len(kernel.sent)
        kernel.print("x" * 5000)
        kernel.wait()
        sent += [(now, _text_in(message)) for message in kernel.sent[before:]]
        now += 0.01
    for start, _ in sent:
        window = [size for at, size in sent if start <= at < start + 3]
        assert len(window) <= 3000
        assert sum(window) <= 3_000_000
    assert kernel.heard() == kernel.said


def _text_in(message: Message) -> int:
    return len(json.dumps(message.content)) + 1000 if message.msg_type == "stream" else 0


@quick
@given(
    st.lists(
        st.tuples(st.sampled_from(["stream", "display_data", "status"]), st.integers(0, 400_000)), max_size=30
    )
)
def test_whatever_is_said_is_heard_in_order(said: list[tuple[str, int]]) -> None:
    kernel = Kernel()
    for kind, size in said:
        kernel.say(kind, {"name": "stdout", "text": "x" * size})
        if size % 3 == 0:
            kernel.wait()
    kernel.wait()
    assert kernel.heard() == kernel.said
