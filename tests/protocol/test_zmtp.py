"""Bytes to messages: however they are cut, however large what a peer sends, and whatever it is."""

from __future__ import annotations

import contextlib
import itertools
import struct
import tracemalloc
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, strategies as st

from code_sandboxes.protocol.zmtp import MessageReader, ZmtpError, framed, hello
from tests.scripted import quick

HELLO = hello("XPUB", b"")
LIMIT = 100_000
LARGE = bytes(40_000)
MORE, LONG, COMMAND = 1, 2, 4


def sent(*messages: Sequence[bytes | memoryview]) -> bytes:
    return b"".join(bytes(piece) for message in messages for piece in framed(message))


def ready_reader(limit: int = LIMIT) -> MessageReader:
    reader = MessageReader(limit)
    assert reader.feed(HELLO) == []
    return reader


def frame(flags: int, size: int) -> bytes:
    """The beginning of a frame, as long as it says."""
    return struct.pack(">BQ", flags | LONG, size)


def test_a_client_says_what_the_rfc_demands() -> None:
    said = hello("DEALER", b"me")

    assert said[:64] == b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(1) + bytes(31)
    assert said[64:66] == bytes([COMMAND, len(said) - 66])
    assert said[66:] == b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x02me"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ([b""], b"\x00\x00"),
        ([b"a", b"bc"], b"\x01\x01a\x00\x02bc"),
        ([b"x" * 255], b"\x00\xff" + b"x" * 255),
        ([b"x" * 256], b"\x02\x00\x00\x00\x00\x00\x00\x01\x00" + b"x" * 256),
        ([memoryview(LARGE), b"z"], b"\x03\x00\x00\x00\x00\x00\x00\x9c\x40" + LARGE + b"\x00\x01z"),
    ],
    ids=["empty", "two frames", "short", "long", "large"],
)  # fmt: skip
def test_a_message_is_framed_as_the_rfc_demands(message: list[bytes], expected: bytes) -> None:
    assert sent(message) == expected


_frames = st.binary(max_size=3) | st.just(b"x" * 300)
_messages = st.lists(st.lists(_frames, min_size=1, max_size=4), max_size=5)


@quick
@given(_messages, st.data())
def test_no_cut_changes_a_message(messages: list[list[bytes]], data: st.DataObject) -> None:
    said = HELLO + sent(*messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=6)))
    reader = MessageReader(LIMIT)
    read = [
        message
        for start, end in itertools.pairwise([0, *cuts, len(said)])
        for message in reader.feed(said[start:end])
    ]
    assert read == messages
    assert reader.is_ready


@quick
@given(_messages, st.integers(1, 2000), st.integers(1, 500))
def test_what_is_larger_than_the_limit_is_left_out_and_counted(
    messages: list[list[bytes]], limit: int, cut: int
) -> None:
    reader = ready_reader(limit)
    said = sent(*messages)
    read = [m for start in range(0, len(said), cut) for m in reader.feed(said[start : start + cut])]
    fitting = [message for message in messages if sum(len(part) + 64 for part in message) <= limit]
    assert read == fitting
    assert reader.skipped == len(messages) - len(fitting)


def endless_frame() -> Iterator[bytes]:
    yield frame(0, 2**63)
    yield from itertools.repeat(bytes(50_000))


def endless_frames(size: int) -> Iterator[bytes]:
    each = frame(MORE, size) + bytes(size)
    return itertools.repeat(each * (50_000 // len(each) or 1))


@pytest.mark.parametrize(
    ("flood", "count"),
    [
        (endless_frame(), 200),
        (endless_frames(0), 5),
        (endless_frames(1000), 200),
        (endless_frames(90_000), 200),
        (endless_frames(10**6), 50),
    ],
    ids=["one frame", "empty frames", "frames", "large frames", "frames beyond the limit"],
)
def test_an_endless_message_takes_no_more_memory_than_the_limit(flood: Iterator[bytes], count: int) -> None:
    reader = ready_reader()
    chunks = list(itertools.islice(flood, 2))
    tracemalloc.start()
    try:
        for number in range(count):
            assert reader.feed(chunks[min(number, 1)]) == []
        assert tracemalloc.get_traced_memory()[1] < 10 * LIMIT + 4 * len(chunks[1])
    finally:
        tracemalloc.stop()
    assert reader.skipped == 1


def test_after_a_message_that_was_left_out_the_next_one_is_read() -> None:
    reader = ready_reader()
    large = [b"topic", b"x" * (2 * LIMIT), b"more", b""]
    assert reader.feed(sent([b"before"], large, [b"after"])) == [[b"before"], [b"after"]]
    assert reader.skipped == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n",
        b"\xff" + bytes(8) + b"\x7e",
        HELLO[:10] + b"\1\0" + HELLO[12:],  # ZMTP 1
        HELLO[:12] + b"CURVE" + HELLO[17:],
        HELLO[:64] + sent([b"a message before READY"]),
        HELLO[:64] + b"\x04\x06\x05ERROR",
        HELLO + b"\x05\x00",  # a command is alone
        HELLO + b"\x08\x00",
        HELLO + frame(COMMAND, 10**6),
    ],
)
def test_what_is_no_zmtp_is_refused(garbage: bytes) -> None:
    with pytest.raises(ZmtpError):
        MessageReader(LIMIT).feed(garbage)


def test_commands_that_mean_nothing_to_a_client_are_ignored() -> None:
    reader = ready_reader()
    assert reader.feed(b"\x04\x07\x04PING\x00\x00" + sent([b"message"])) == [[b"message"]]


@quick
@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_raise_anything_but_an_error_of_zmtp(said: bytes, is_ready: bool) -> None:
    reader = ready_reader() if is_ready else MessageReader(LIMIT)
    with contextlib.suppress(ZmtpError):
        reader.feed(said)
