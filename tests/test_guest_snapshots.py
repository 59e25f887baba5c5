"""The guest's side of a snapshot that goes out, or comes in: as much at a time as there is room for."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from code_sandboxes.guest.calls import Call, Channel, Guest, Link
from code_sandboxes.guest.snapshots import MESSAGE, PIECE, Closed, Sink, Source
from conftest import wait_until


class Program:
    """What is at the other end of a link."""

    def __init__(self) -> None:
        self.heard: list[Mapping[str, Any]] = []
        self.buffers: list[bytes] = []
        self.link: Link = Guest([]).open("program", self._hear)
        self._number = 0

    def _hear(self, message: Mapping[str, Any], buffers: list[Any]) -> None:
        self.buffers += buffers
        self.heard.append(message)

    def call(self, *buffers: bytes, credit: int | None = None) -> Call:
        self._number += 1
        message: dict[str, Any] = {"call": self._number}
        if credit is not None:
            message |= {"channel": self._number, "credit": credit}
        return self.link.call(message, [memoryview(buffer) for buffer in buffers])

    def channel(self, credit: int) -> Channel:
        channel = self.call(credit=credit).channel
        assert channel is not None
        return channel

    @property
    def answered(self) -> list[int]:
        return [message["answer"] for message in self.heard if "answer" in message]


def nobody(thread: int) -> None:
    raise AssertionError("nobody is to be stopped")


@pytest.fixture
def program() -> Program:
    return Program()


def test_what_is_written_goes_as_there_is_room(program: Program) -> None:
    channel = program.channel(PIECE + MESSAGE)
    sink = Sink(channel, nobody)
    data = bytes(range(256)) * (PIECE // 100)

    def write() -> None:
        sink.write(data[:100])
        sink.write(memoryview(data)[100:])
        sink.flush()

    with ThreadPoolExecutor() as threads:
        writing = threads.submit(write)
        wait_until(lambda: sink._waiting_since is not None)
        assert b"".join(program.buffers) == data[:PIECE]
        before = sink.clock()
        assert sink.clock() == before  # it stands still
        channel.grant(2 * (PIECE + MESSAGE))
        writing.result()

    assert b"".join(program.buffers) == data
    assert max(map(len, program.buffers)) == PIECE
    assert sink.clock() >= before


def test_what_was_written_before_it_began_anew_does_not_go_any_more(program: Program) -> None:
    sink = Sink(program.channel(10 * PIECE), nobody)
    sink.write(b"old")
    sink.restart()
    sink.write(b"new")
    sink.flush()

    assert program.heard == [{"channel": 1, "data": {"again": True}}, {"channel": 1, "data": {}}]
    assert program.buffers == [b"new"]


def test_who_writes_for_nobody_is_told(program: Program) -> None:
    channel = program.channel(0)
    sink = Sink(channel, nobody)
    with ThreadPoolExecutor() as threads:
        writing = threads.submit(sink.write, bytes(2 * PIECE))
        wait_until(lambda: sink._waiting_since is not None)
        channel.close()
        with pytest.raises(Closed):
            writing.result()


def test_what_has_come_is_read_and_answered_then(program: Program) -> None:
    source = Source(program.channel(0), nobody)
    calls = [program.call(b"abc"), program.call(b"defg"), program.call()]
    assert [source.put(call, False) is Call.LATER for call in calls[:2]] == [True, True]
    assert source.put(calls[2], True) is None

    assert (source.read(2), program.answered) == (b"ab", [])
    assert (source.read(2), program.answered) == (b"cd", [2])
    buffer = bytearray(5)
    assert (source.readinto(buffer), bytes(buffer[:3]), program.answered) == (3, b"efg", [2, 3])
    assert source.read(5) == b""


def test_who_reads_waits_for_what_will_come(program: Program) -> None:
    source = Source(program.channel(0), nobody)
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(source.read, 4)
        source.put(program.call(b"ab"), False)
        wait_until(lambda: program.answered == [2])
        assert not reading.done()
        source.put(program.call(b"cd"), False)
        assert reading.result() == b"abcd"


def test_what_nobody_reads_is_answered_too(program: Program) -> None:
    source = Source(program.channel(0), nobody)
    source.put(program.call(b"abc"), False)
    source.end()

    assert program.answered == [2]
    assert source.put(program.call(b"more"), False) is None


def test_who_reads_from_nobody_is_told(program: Program) -> None:
    channel = program.channel(0)
    source = Source(channel, nobody)
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(source.read, 1)
        wait_until(lambda: source._waiting_since is not None)
        channel.close()
        with pytest.raises(Closed):
            reading.result()
