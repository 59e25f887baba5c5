"""Frames: what a kernel sends is believed only when it is signed, new, and a message."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from code_sandboxes.protocol import wire
from code_sandboxes.protocol.messages import Message
from code_sandboxes.protocol.wire import (
    ForgedMessageError,
    MalformedMessageError,
    ReplayedMessageError,
    WireCodec,
    WireError,
)
from tests.scripted import quick

KEY = b"a key"
DELIMITER = b"<IDS|MSG>"
EMPTY = (b"{}", b"{}", b"{}", b"{}")
MESSAGE = Message(
    "shell",
    {"msg_id": "1", "msg_type": "comm_msg"},
    {"msg_id": "0"},
    {"tag": "é 😀"},
    {"data": [1, 2.5, None, "\x00\r\n"]},
    [b"", b"\x00\xff", DELIMITER],
)


def signed(*parts: bytes, key: bytes = KEY) -> list[bytes]:
    """Frames, signed as the messaging documentation says, without the codec."""
    return [DELIMITER, hmac.new(key, b"".join(parts), hashlib.sha256).hexdigest().encode(), *parts]


def numbered(count: int) -> Iterator[list[bytes]]:
    return (signed(b"{}", b"{}", b"{}", b'{"n":%d}' % n) for n in range(count))


def decoded_content(content: bytes) -> object:
    return WireCodec(KEY).decode(signed(b"{}", b"{}", b"{}", content), "iopub").content


@pytest.mark.parametrize("key", [KEY, b""])
def test_a_message_with_buffers_comes_back_as_it_was(key: bytes) -> None:
    codec = WireCodec(key)
    assert codec.decode([bytes(frame) for frame in codec.encode(MESSAGE)], "shell") == MESSAGE


def test_identities_before_the_delimiter_are_skipped() -> None:
    assert WireCodec(KEY).decode([b"one", b"\x00two", *signed(*EMPTY)], "iopub") == Message(
        "iopub", {}, buffers=[]
    )


def test_the_signature_is_the_hmac_of_all_four_parts() -> None:
    delimiter, signature, *parts = WireCodec(KEY).encode(MESSAGE)[:6]
    assert [delimiter, signature] == signed(*map(bytes, parts))[:2]


def test_the_signature_fits_a_vector_computed_elsewhere() -> None:
    # printf '{}{}{}{}' | openssl dgst -sha256 -hmac 'a key'
    empty = Message("shell", {})
    assert (
        WireCodec(KEY).encode(empty)[1] == b"e2c27855d41353957c8555d30463a97e6a6ea497e6ebb3f7824503c3b64f2c0b"
    )


def test_buffers_are_not_signed() -> None:
    assert WireCodec(KEY).decode([*signed(*EMPTY), b"anything"], "iopub").buffers == [b"anything"]


def test_an_empty_key_turns_signing_off() -> None:
    codec = WireCodec(b"")
    assert codec.encode(MESSAGE)[1] == b""
    for _ in range(2):
        assert codec.decode([DELIMITER, b"no matter what", *EMPTY], "iopub").content == {}


@pytest.mark.parametrize("position", [2, 3, 4, 5])
def test_a_change_in_any_part_is_noticed(position: int) -> None:
    frames = signed(*EMPTY)
    frames[position] = b'{"code": "other"}'
    with pytest.raises(ForgedMessageError):
        WireCodec(KEY).decode(frames, "shell")


@pytest.mark.parametrize("signature", [b"", b"0" * 64, b"\xff" * 64, signed(*EMPTY, key=b"other")[1]])
def test_a_wrong_signature_is_a_forgery(signature: bytes) -> None:
    with pytest.raises(ForgedMessageError):
        WireCodec(KEY).decode([DELIMITER, signature, *EMPTY], "shell")


def test_a_message_sent_twice_is_a_replay() -> None:
    codec = WireCodec(KEY)
    codec.decode(signed(*EMPTY), "shell")
    with pytest.raises(ReplayedMessageError):
        codec.decode(signed(*EMPTY), "shell")


def test_a_forgery_does_not_make_the_true_message_a_replay() -> None:
    codec = WireCodec(KEY)
    delimiter, signature, *parts = signed(*EMPTY)
    with pytest.raises(ForgedMessageError):
        codec.decode([delimiter, signature, *parts[:3], b"[]"], "shell")
    assert codec.decode(signed(*EMPTY), "shell").content == {}


def test_a_replay_is_caught_however_old_as_long_as_it_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_REMEMBERED", 8)  # the same as with thousands
    for before in range(9):
        codec = WireCodec(KEY)
        messages = numbered(before + 7)
        for frames in itertools.islice(messages, before):
            codec.decode(frames, "shell")
        codec.decode(signed(*EMPTY), "shell")
        for frames in messages:
            codec.decode(frames, "shell")
        with pytest.raises(ReplayedMessageError):
            codec.decode(signed(*EMPTY), "shell")


def test_the_memory_for_replays_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_REMEMBERED", 8)
    codec = WireCodec(KEY)
    for frames in numbered(100):
        codec.decode(frames, "shell")
        assert len(codec._recent) + len(codec._older) <= 16
    assert codec.decode(next(numbered(1)), "shell").content == {"n": 0}


def test_thousands_of_messages_are_remembered() -> None:
    assert wire._REMEMBERED >= 4096


@pytest.mark.parametrize("length", range(6))
@pytest.mark.parametrize("key", [KEY, b""])
def test_a_truncated_message_is_malformed(length: int, key: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        WireCodec(key).decode(signed(*EMPTY)[:length], "shell")


@pytest.mark.parametrize("frames", [[], [b""], [b"{}"] * 6, [b"<IDS|MSG", b">", *EMPTY]])
def test_frames_without_a_delimiter_are_malformed(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessageError):
        WireCodec(KEY).decode(frames, "shell")


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"NaN",
        b"{",
        b"{}{}",
        b"{'a': 1}",
        b"\xef\xbb\xbf{}",
        b"\x00",
        b"\xff",
    ],
)
@pytest.mark.parametrize("position", range(4))
def test_a_part_that_is_no_object_is_malformed(part: bytes, position: int) -> None:
    parts = [*EMPTY]
    parts[position] = part
    with pytest.raises(MalformedMessageError):
        WireCodec(KEY).decode(signed(*parts), "shell")


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_json_nested_too_deeply_is_malformed(opening: bytes, closing: bytes) -> None:
    depth = 200_000
    with pytest.raises(MalformedMessageError):
        decoded_content(b'{"a":' + opening * depth + b"1" + closing * depth + b"}")


def test_bytes_that_are_not_utf_8_become_replacement_characters() -> None:
    assert decoded_content(b'{"text": "caf\xe9 \xed\xa0\x80"}') == {"text": "caf\ufffd \ufffd\ufffd\ufffd"}


def test_a_lone_surrogate_is_received_and_is_not_sent() -> None:
    assert decoded_content(b'{"text": "\\ud800"}') == {"text": "\ud800"}
    message = Message("shell", {}, content={"code": "print('\ud800 é')"})
    assert WireCodec(KEY).encode(message)[5] == '{"code":"print(\'? é\')"}'.encode()


def test_a_huge_integer_raises_nothing_but_a_wire_error() -> None:
    with contextlib.suppress(WireError):
        decoded_content(b'{"n": ' + b"9" * 10_000 + b"}")


def test_nan_and_infinity_are_numbers_as_python_kernels_send_them() -> None:
    content = decoded_content(b'{"numbers": [NaN, Infinity, -Infinity, 1e999]}')
    assert isinstance(content, dict)
    assert math.isnan(content["numbers"][0])
    assert content["numbers"][1:] == [math.inf, -math.inf, math.inf]


_frames = st.lists(
    st.sampled_from([DELIMITER, b"", b"{}", b'{"a":1}', b"[]", b"nul"]) | st.binary(max_size=8), max_size=9
)


@quick
@given(frames=_frames, key=st.sampled_from([KEY, b""]))
def test_no_frames_raise_anything_but_a_wire_error(frames: list[bytes], key: bytes) -> None:
    codec = WireCodec(key)
    for _ in range(2):
        with contextlib.suppress(WireError):
            codec.decode(frames, "iopub")


@quick
@given(parts=st.lists(st.sampled_from(EMPTY) | st.binary(max_size=8), min_size=4, max_size=6))
def test_no_signed_parts_raise_anything_but_a_malformed_message(parts: list[bytes]) -> None:
    with contextlib.suppress(MalformedMessageError):
        WireCodec(KEY).decode([*signed(*parts[:4]), *parts[4:]], "iopub")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("aé\x00\r\n\u2028😀"),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from("abc"), values),
    max_leaves=5,
)


@quick
@given(st.dictionaries(st.text("aé\n"), _json, max_size=3), st.lists(st.binary(), max_size=2))
def test_any_content_comes_back_as_it_was(content: dict[str, object], buffers: list[bytes]) -> None:
    message, codec = Message("control", {}, {}, {}, content, buffers), WireCodec(KEY)
    assert codec.decode([bytes(frame) for frame in codec.encode(message)], "control") == message
