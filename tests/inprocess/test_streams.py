"""Streams of a kernel: text goes out at once and exactly, bytes too, and lines come in one by one."""

from __future__ import annotations

import io

import pytest

from code_sandboxes.inprocess.streams import AskingStream, TellingStream


class Told(list[str]):
    """What a stream told, and the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = TellingStream("stdout", self.append)


@pytest.fixture
def told() -> Told:
    return Told()


def test_text_is_told_as_it_is_written(told: Told) -> None:
    assert told.stream.write("a\n") == 2
    print("b", "c", file=told.stream, flush=True)
    told.stream.writelines(["d", "e"])

    assert "".join(told) == "a\nb c\nde"


def test_only_text_can_be_written(told: Told) -> None:
    with pytest.raises(TypeError, match="must be str, not bytes"):
        told.stream.write(b"a")  # type: ignore[arg-type]  # as code may
    assert told == []


def test_text_of_a_subclass_is_told_as_plain_text(told: Told) -> None:
    class Text(str):
        def __str__(self) -> str:
            return "another"

        def __len__(self) -> int:
            return -5

        def isascii(self) -> bool:
            raise AssertionError("code of the text's own was run")

    assert told.stream.write(Text("text")) == 4
    assert told == ["text"]
    assert type(told[0]) is str


def test_bytes_are_told_as_text_also_if_a_character_comes_in_pieces(told: Told) -> None:
    for octets in (b"caf\xc3", memoryview(b"\xa9"), bytearray(b"!")):
        assert told.stream.buffer.write(octets) == len(octets)
    told.stream.buffer.write(b"\xff")

    assert "".join(told) == "caf\u00e9!\ufffd"


@pytest.mark.parametrize("data", [5, "text"])
def test_only_bytes_can_be_written_to_the_buffer(told: Told, data: object) -> None:
    with pytest.raises(TypeError):
        told.stream.buffer.write(data)  # type: ignore[arg-type]  # as code may
    assert told == []


def test_a_stream_stays_open_for_the_next_run(told: Told) -> None:
    told.stream.close()
    told.stream.buffer.close()
    io.TextIOWrapper(told.stream.buffer).close()  # type: ignore[type-var]  # as code may
    with told.stream:
        pass
    told.stream.write("a")
    told.stream.buffer.write(b"b")

    assert "".join(told) == "ab"


def test_a_stream_is_one_to_write_to_and_no_terminal(told: Told) -> None:
    stream = told.stream
    assert isinstance(stream, io.TextIOBase)
    assert (stream.writable(), stream.readable(), stream.isatty(), stream.seekable()) == (True, *[False] * 3)
    assert (stream.name, stream.encoding, stream.errors) == ("<stdout>", "utf-8", "replace")
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()


def test_each_line_is_asked_for() -> None:
    answers = iter(["a", ""])
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return next(answers)

    stream = AskingStream(answer)
    assert [stream.readline(), stream.readline()] == ["a\n", "\n"]
    assert asked == ["", ""]
    assert (stream.readable(), stream.writable(), stream.isatty()) == (True, False, False)


def test_who_cannot_be_asked_is_an_error_of_the_reader() -> None:
    def refuse(prompt: str) -> str:
        raise NotImplementedError

    stream = AskingStream(refuse)
    with pytest.raises(NotImplementedError):
        next(stream)
    stream.close()
    with pytest.raises(NotImplementedError):
        stream.readline()
