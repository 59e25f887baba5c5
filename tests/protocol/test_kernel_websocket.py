"""The frames of a kernel's websocket: as Jupyter Server makes and takes them, and whatever else may come."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, strategies as st
from jupyter_client.session import Session, json_packer
from jupyter_server.services.kernels.connection import base

from code_sandboxes.protocol.kernel_websocket import SUBPROTOCOL, decode, encode
from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.protocol.wire import MalformedMessageError
from tests.scripted import quick

jupyter: Any = base  # it has no types

MESSAGE = Message(
    "shell",
    {"msg_id": "1", "msg_type": "comm_msg"},
    {"msg_id": "0"},
    {"tag": "é 😀"},
    {"data": [1, 2.5, None, "\x00\r\n"]},
    [b"", b"\x00\xff", memoryview(b"abc")],
)
BARE = Message("control", {"msg_id": "1"})

BOTH = pytest.mark.parametrize("is_v1", [True, False], ids=["v1", "legacy"])


def again(message: Message, *, is_v1: bool) -> Message:
    """*message* after it was sent and received."""
    received = decode(encode(message, is_v1=is_v1), is_v1=is_v1)
    return replace(received, buffers=type(message.buffers)(received.buffers))  # type: ignore[call-arg]  # a list or a tuple


def v1(*parts: bytes) -> bytes:
    """A frame as the documentation describes it, made without the code that is tested."""
    first = 8 * (len(parts) + 2)
    offsets = list(accumulate(map(len, parts), initial=first))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(parts)


def legacy(*parts: bytes) -> bytes:
    first = 4 * (len(parts) + 1)
    offsets = list(accumulate(map(len, parts[:-1]), initial=first))
    return struct.pack(f">{len(parts) + 1}I", len(parts), *offsets) + b"".join(parts)


# What goes out and comes back.


@BOTH
@pytest.mark.parametrize("message", [MESSAGE, BARE], ids=["with buffers", "bare"])
def test_a_message_comes_back_as_it_was(message: Message, is_v1: bool) -> None:
    assert again(message, is_v1=is_v1) == message


@BOTH
@pytest.mark.parametrize("channel", ["shell", "iopub", "stdin", "control"])
def test_the_channel_is_part_of_the_frame(channel: Channel, is_v1: bool) -> None:
    assert again(Message(channel, {}), is_v1=is_v1).channel == channel


def test_the_layout_of_a_frame_is_the_documented_one_byte_for_byte() -> None:
    frame = encode(Message("shell", {"a": 1}, {}, {}, {"b": "é"}, [b"xyz"]), is_v1=True)
    assert frame == (
        b"\x07\0\0\0\0\0\0\0"  # seven offsets: of six parts, and of the end
        b"\x40\0\0\0\0\0\0\0"  # the first part begins behind them
        b"\x45\0\0\0\0\0\0\0"
        b"\x4c\0\0\0\0\0\0\0"
        b"\x4e\0\0\0\0\0\0\0"
        b"\x50\0\0\0\0\0\0\0"
        b"\x5a\0\0\0\0\0\0\0"
        b"\x5d\0\0\0\0\0\0\0"
        b'shell{"a":1}{}{}{"b":"\xc3\xa9"}xyz'
    )


def test_a_frame_without_buffers_has_five_parts_behind_byte_56() -> None:
    frame = encode(BARE, is_v1=True)
    assert isinstance(frame, bytes)
    count, first = struct.unpack_from("<QQ", frame)
    assert (count, first) == (6, 56)
    assert struct.unpack_from("<Q", frame, 8 * count) == (len(frame),)


def test_an_older_server_gets_text_for_a_message_without_buffers() -> None:
    frame = encode(BARE, is_v1=False)
    assert isinstance(frame, str)
    assert json.loads(frame) == {
        "channel": "control",
        "header": {"msg_id": "1"},
        "parent_header": {},
        "metadata": {},
        "content": {},
        "buffers": [],
    }


def test_an_older_server_gets_bytes_for_a_message_with_buffers() -> None:
    frame = encode(Message("shell", {}, buffers=[b"xyz", b"!"]), is_v1=False)
    assert isinstance(frame, bytes)
    head = b'{"channel":"shell","header":{},"parent_header":{},"metadata":{},"content":{}}'
    size = len(head)
    assert frame == struct.pack(">IIII", 3, 16, 16 + size, 19 + size) + head + b"xyz!"


def test_a_lone_surrogate_is_not_sent() -> None:
    for is_v1 in (True, False):
        assert again(Message("shell", {}, content={"code": "\ud800"}), is_v1=is_v1).content == {"code": "?"}


@pytest.mark.parametrize(
    "buffer", [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(bytes(8)).cast("d")]
)
def test_any_bytes_can_be_a_buffer(buffer: bytes | memoryview) -> None:
    for is_v1 in (True, False):
        (received,) = again(Message("shell", {}, buffers=[buffer]), is_v1=is_v1).buffers
        assert bytes(received) == bytes(buffer)


# The other side is Jupyter's own.


def test_jupyter_server_reads_what_is_sent() -> None:
    channel, parts = jupyter.deserialize_msg_from_ws_v1(encode(MESSAGE, is_v1=True))
    assert channel == "shell"
    assert [json.loads(part) for part in parts[:4]] == [
        MESSAGE.header,
        MESSAGE.parent_header,
        MESSAGE.metadata,
        MESSAGE.content,
    ]
    assert [bytes(part) for part in parts[4:]] == [bytes(part) for part in MESSAGE.buffers]


def test_an_older_jupyter_server_reads_what_is_sent() -> None:
    told = jupyter.deserialize_binary_message(encode(MESSAGE, is_v1=False))
    assert [bytes(part) for part in told.pop("buffers")] == [bytes(part) for part in MESSAGE.buffers]
    assert told == {
        "channel": "shell",
        "header": MESSAGE.header,
        "parent_header": MESSAGE.parent_header,
        "metadata": MESSAGE.metadata,
        "content": MESSAGE.content,
    }


def test_what_jupyter_server_sends_is_read() -> None:
    parts = [json_packer(part) for part in ({"msg_id": "1"}, {}, {}, {"text": "é"})]
    frame = jupyter.serialize_msg_to_ws_v1([*parts, b"xyz", b""], "iopub")
    assert decode(frame, is_v1=True) == Message(
        "iopub", {"msg_id": "1"}, content={"text": "é"}, buffers=[b"xyz", b""]
    )


def test_what_jupyter_server_says_itself_is_read() -> None:
    told = Session().msg("stream", {"text": "IOPub data rate exceeded.", "name": "stderr"}, parent={})
    frame = jupyter.serialize_msg_to_ws_v1(told, "iopub", json_packer)
    message = decode(frame, is_v1=True)
    assert (message.channel, message.msg_type, message.msg_id) == ("iopub", "stream", told["msg_id"])
    assert message.content == told["content"]


def test_what_an_older_jupyter_server_sends_is_read() -> None:
    told = {"channel": "iopub", "header": {"msg_id": "1"}, "content": {"text": "é"}, "buffers": [b"xyz", b""]}
    frame = jupyter.serialize_binary_message(told)
    assert decode(frame, is_v1=False) == Message(
        "iopub", {"msg_id": "1"}, content={"text": "é"}, buffers=[b"xyz", b""]
    )


def test_the_subprotocol_is_the_one_that_jupyter_server_selects() -> None:
    assert SUBPROTOCOL == "v1.kernel.websocket.jupyter.org"


# What is let pass.


@pytest.mark.parametrize("value", ["null", "{}", '""', "0", "false"])
def test_what_is_missing_in_a_text_frame_is_empty(value: str) -> None:
    message = decode(f'{{"header": {{"msg_id": "1"}}, "content": {value}, "more": [1]}}', is_v1=False)
    assert message == Message("shell", {"msg_id": "1"})


def test_a_message_that_says_no_channel_is_of_the_shell() -> None:
    assert decode('{"header": {}, "channel": null}', is_v1=False).channel == "shell"


def test_the_last_offset_may_be_beyond_the_end() -> None:
    frame = bytearray(v1(b"shell", b"{}", b"{}", b"{}", b"{}"))
    struct.pack_into("<Q", frame, 48, len(frame) + 100)
    assert decode(bytes(frame), is_v1=True) == Message("shell", {}, buffers=[])


# What is not a message.


MALFORMED_V1 = {
    "nothing": b"",
    "half a number": b"\x06\0\0",
    "no offsets": struct.pack("<Q", 0),
    "too few offsets": struct.pack("<Q", 5) + bytes(100),
    "more offsets than bytes": struct.pack("<Q", 6) + bytes(40),
    "offsets without end": struct.pack("<Q", 2**64 - 1) + bytes(100),
    "offsets that go back": struct.pack("<7Q", 6, 56, 61, 60, 62, 64, 66) + b"shell{}{}{}",
    "offsets among the offsets": struct.pack("<7Q", 6, 0, 8, 16, 24, 32, 56) + b"shell{}{}{}{}",
    "offsets beyond the end": struct.pack("<7Q", 6, 56, 600, 600, 600, 600, 600) + b"shell{}{}{}{}",
    "a channel that there is not": v1(b"heartbeat", b"{}", b"{}", b"{}", b"{}"),
    "a channel that is no text": v1(b"\xff", b"{}", b"{}", b"{}", b"{}"),
    "no channel": v1(b"", b"{}", b"{}", b"{}", b"{}"),
    "no json": v1(b"shell", b"{", b"{}", b"{}", b"{}"),
    "no object": v1(b"shell", b"{}", b"{}", b"{}", b"[]"),
    "a long header": v1(b"shell", b'{"a":"' + b"x" * 70_000 + b'"}', b"{}", b"{}", b"{}"),
    "nested deeply": v1(b"shell", b"{}", b"{}", b"{}", b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
}

MALFORMED_LEGACY = {
    "nothing": b"",
    "nothing at all": "",
    "half a number": b"\0\0",
    "no parts": struct.pack(">I", 0),
    "more parts than bytes": struct.pack(">I", 9) + bytes(8),
    "parts without end": b"\xff\xff\xff\xff" + bytes(100),
    "offsets that go back": struct.pack(">III", 2, 14, 12) + b"{}",
    "offsets among the offsets": struct.pack(">II", 1, 4) + b"{}",
    "offsets beyond the end": struct.pack(">III", 2, 12, 100) + b"{}",
    "a channel that there is not": '{"channel": "heartbeat"}',
    "a channel that is no text": '{"channel": 7}',
    "no json": "{",
    "no object": "[]",
    "a header that is no object": '{"header": [1]}',
    "a content that is no object": '{"content": "text"}',
    "bytes that are no json": legacy(b"\xff\xfe"),
    "nested deeply": '{"content": {"a": ' + "[" * 5000 + "]" * 5000 + "}}",
}


@pytest.mark.parametrize("data", MALFORMED_V1.values(), ids=MALFORMED_V1)
def test_a_frame_that_is_no_message_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        decode(data, is_v1=True)


@pytest.mark.parametrize("data", MALFORMED_LEGACY.values(), ids=MALFORMED_LEGACY)
def test_a_frame_of_an_older_server_that_is_no_message_is_malformed(data: bytes | str) -> None:
    with pytest.raises(MalformedMessageError):
        decode(data, is_v1=False)


def test_text_is_malformed_where_all_is_binary() -> None:
    with pytest.raises(MalformedMessageError):
        decode(encode(BARE, is_v1=False), is_v1=True)


@BOTH
def test_no_part_of_a_frame_is_a_message(is_v1: bool) -> None:
    whole = encode(Message("shell", {"msg_id": "1"}, content={"a": 1}, buffers=[b"x"]), is_v1=is_v1)
    for length in range(len(whole) - 1):
        with pytest.raises(MalformedMessageError):
            decode(whole[:length], is_v1=is_v1)


# Whatever may come.


_parts = st.sampled_from([b"shell", b"iopub", b"{}", b'{"a":1}', b"[]", b"nul", b""]) | st.binary(max_size=8)

_frames = st.one_of(
    st.binary(max_size=80),
    st.lists(_parts, max_size=8).map(lambda parts: v1(*parts)),
    st.lists(_parts, min_size=1, max_size=8).map(lambda parts: legacy(*parts)),
    st.lists(st.integers(0, 120), min_size=1, max_size=12).map(
        lambda numbers: struct.pack(f"<{len(numbers)}Q", *numbers) + b"shell{}{}{}{}"
    ),
    st.lists(st.integers(0, 80), min_size=1, max_size=12).map(
        lambda numbers: struct.pack(f">{len(numbers)}I", *numbers) + b"{}{}{}{}"
    ),
    st.tuples(st.binary(max_size=8), st.integers(0, 90)).map(
        lambda change: _changed(v1(b"shell", b'{"msg_id":"1"}', b"{}", b"{}", b"{}"), *change)
    ),
)

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("aé\x00\r\n\u2028😀"),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from("abc"), values),
    max_leaves=5,
)

_texts = st.text(max_size=40) | st.dictionaries(
    st.sampled_from(["channel", "header", "parent_header", "metadata", "content", "buffers"]), _json
).map(json.dumps)


def _changed(frame: bytes, piece: bytes, position: int) -> bytes:
    return frame[:position] + piece + frame[position + len(piece) :]


@quick
@given(_frames | _texts, st.booleans())
def test_no_frame_raises_anything_but_a_malformed_message(data: bytes | str, is_v1: bool) -> None:
    with contextlib.suppress(MalformedMessageError):
        message = decode(data, is_v1=is_v1)
        assert message.channel in ("shell", "iopub", "stdin", "control")
        assert all(
            isinstance(part, dict)
            for part in (message.header, message.parent_header, message.metadata, message.content)
        )


_dictionaries = st.dictionaries(st.text("aé\n", max_size=3), _json, max_size=3)


@quick
@given(
    channel=st.sampled_from(["shell", "iopub", "stdin", "control"]),
    header=_dictionaries,
    content=_dictionaries,
    buffers=st.lists(st.binary(max_size=20), max_size=3),
    is_v1=st.booleans(),
)
def test_any_message_comes_back_as_it_was(
    channel: Channel,
    header: dict[str, object],
    content: dict[str, object],
    buffers: list[bytes],
    is_v1: bool,
) -> None:
    message = Message(channel, header, header, content, content, buffers)
    assert again(message, is_v1=is_v1) == message
