"""Text to lines, displays to results, and what is kept of both."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, strategies as st

from code_sandboxes.protocol import outputs as outputs_module
from code_sandboxes.protocol.events import Cleared, Displayed, Event, Streamed, Updated
from code_sandboxes.protocol.outputs import HOLD, Displays, LineSplitter, Outputs
from code_sandboxes.results import OutputMessage, Printed, Result
from tests.scripted import quick

LIMIT = 1000


def lines(printed: Iterable[Printed | Result]) -> list[OutputMessage]:
    return [message for each in printed if isinstance(each, Printed) for message in each]


def cut(*chunks: str) -> list[tuple[str, str]]:
    """The lines of *chunks* that come at once, and what is held at the end."""
    splitter = LineSplitter(error=False)
    printed = [each for chunk in chunks for each in splitter.feed(chunk, 0.0, 0.0)]
    return [(message.line, message.end) for message in lines(printed + splitter.flush(0.0))]


def outputs(*events: Event, limit: int = LIMIT, displays: Displays | None = None) -> Outputs:
    fed = Outputs(Displays() if displays is None else displays, limit)
    for event in events:
        fed.feed(event, 0.0, 0.0)
    return fed


def out(text: str) -> Streamed:
    return Streamed(text, error=False)


def err(text: str) -> Streamed:
    return Streamed(text, error=True)


def shown(text: str, display_id: str | None = None) -> Displayed:
    return Displayed({"text/plain": text}, {}, display_id)


def updated(text: str, display_id: str) -> Updated:
    return Updated({"text/plain": text}, {}, display_id)


def texts(results: Iterable[Result]) -> list[str | None]:
    return [result.text for result in results]


def kept(fed: Outputs, *, error: bool = False) -> str:
    fed.flush(0.0)
    logs = fed.logs()
    return "".join(message.line + message.end for message in (logs.stderr if error else logs.stdout))


# Lines.


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a", [("a", "")]),
        ("a\n", [("a", "\n")]),
        ("\n\n", [("", "\n"), ("", "\n")]),
        ("a\r\nb", [("a", "\r\n"), ("b", "")]),
        (" 1%\r50%\r", [(" 1%", "\r"), ("50%", "\r")]),
        ("\r\r\n\n\r", [("", "\r"), ("", "\r\n"), ("", "\n"), ("", "\r")]),
        ("a\x0bb\x0cc\x1cd\x85e\u2028f\n", [("a\x0bb\x0cc\x1cd\x85e\u2028f", "\n")]),
        ("\x1b[31mred\x1b[0m\n", [("\x1b[31mred\x1b[0m", "\n")]),
    ],
)
def test_only_newlines_and_carriage_returns_end_a_line(text: str, lines: list[tuple[str, str]]) -> None:
    assert cut(text) == lines


@pytest.mark.parametrize("text", ["a\r\nb\r\n", "a\rb\r", "a\n\r\r\n\n", "\r\n", "é\r😀\n"])
def test_it_does_not_matter_where_a_text_is_cut(text: str) -> None:
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            assert cut(text[:first], text[first:second], "", text[second:]) == cut(text)


def test_a_line_that_comes_in_pieces_is_given_whole_when_it_ends() -> None:
    splitter = LineSplitter(error=True)
    assert splitter.feed("a", 0.0, 7.0) == splitter.feed("b", 0.0, 8.0) == []
    assert lines(splitter.feed("c\nd", 0.0, 9.0)) == [OutputMessage("abc", "\n", 9.0, True)]


def test_a_carriage_return_is_held_for_its_newline() -> None:
    splitter = LineSplitter(error=False)
    assert splitter.feed("a\r", 0.0, 0.0) == []
    assert lines(splitter.feed("\n", 0.0, 0.0)) == [OutputMessage("a", "\r\n")]
    assert splitter.deadline is None


def test_a_carriage_return_that_was_given_is_not_joined_with_a_newline_any_more() -> None:
    splitter = LineSplitter(error=False)
    splitter.feed("a\r", 0.0, 0.0)
    assert lines(splitter.flush(0.0)) == [OutputMessage("a", "\r")]
    assert lines(splitter.feed("\n", 0.0, 0.0)) == [OutputMessage("", "\n")]


def test_an_unfinished_line_is_due_a_tenth_of_a_second_after_it_began() -> None:
    splitter = LineSplitter(error=False)
    assert splitter.deadline is None
    splitter.feed("a", 10.0, 0.0)
    splitter.feed("b", 10.05, 0.0)
    assert splitter.deadline == 10.0 + HOLD == 10.1
    splitter.feed("c\nd", 10.08, 0.0)
    assert splitter.deadline == 10.08 + HOLD
    splitter.feed("\n", 10.09, 0.0)
    assert splitter.deadline is None


def test_nothing_is_flushed_where_nothing_is_held() -> None:
    splitter = LineSplitter(error=False)
    assert splitter.flush(0.0) == []
    splitter.feed("a", 0.0, 0.0)
    splitter.flush(0.0)
    assert splitter.flush(0.0) == []


def test_each_stream_is_held_for_itself() -> None:
    fed = Outputs(Displays(), LIMIT)
    fed.feed(out("a"), 1.0, 0.0)
    fed.feed(err("b"), 1.05, 0.0)
    assert fed.deadline == 1.0 + HOLD
    assert fed.flush_due(1.0 + HOLD - 1e-9, 0.0) == []
    assert lines(fed.flush_due(1.0 + HOLD, 2.0)) == [OutputMessage("a", "", 2.0)]
    assert fed.deadline == 1.05 + HOLD
    assert lines(fed.flush_due(9.0, 3.0)) == [OutputMessage("b", "", 3.0, True)]
    assert fed.deadline is None


@pytest.mark.parametrize("event", [shown("x"), updated("x", "unknown")])
def test_what_is_held_is_shown_before_a_display(event: Event) -> None:
    fed = outputs(out("a"), err("b"))
    assert lines(fed.feed(event, 0.0, 0.0))[:2] == [
        OutputMessage("a", ""),
        OutputMessage("b", "", error=True),
    ]
    assert fed.deadline is None


# Displays.


def test_an_update_replaces_every_display_of_its_id_in_place() -> None:
    displays = shown("1", "d"), shown("2"), shown("3", "d"), shown("4", "e")
    fed = outputs(*displays, updated("new", "d"), limit=10_000)
    assert texts(fed.results) == ["new", "2", "new", "4"]


def test_an_update_is_shown_once_however_many_displays_it_replaces() -> None:
    fed = outputs(shown("1", "d"), shown("2", "d"))
    assert fed.feed(updated("new", "d"), 0.0, 0.0) == [Result({"text/plain": "new"}, {}, False, "d")]


def test_an_update_of_an_unknown_id_is_ignored() -> None:
    fed = outputs(shown("1", "d"))
    assert fed.feed(updated("new", "e"), 0.0, 0.0) == []
    assert texts(fed.results) == ["1"]


def test_an_updated_main_result_is_still_the_main_result() -> None:
    fed = outputs(Displayed({}, {}, "d", is_main_result=True), updated("new", "d"))
    assert [result.is_main_result for result in fed.results] == [True]


def test_an_update_reaches_the_results_of_earlier_runs() -> None:
    displays = Displays()
    first = outputs(shown("1", "d"), displays=displays)
    second = outputs(shown("2", "d"), displays=displays)
    outputs(updated("new", "d"), displays=displays)
    assert texts(first.results) == texts(second.results) == ["new"]


def test_displays_of_another_kernel_are_not_updated() -> None:
    first = outputs(shown("1", "d"))
    outputs(updated("new", "d"))
    assert texts(first.results) == ["1"]


def test_a_display_shown_again_by_an_update_does_not_come_back_after_it_was_cleared() -> None:
    fed = outputs(shown("1", "d"), Cleared(False), updated("new", "d"))
    assert texts(fed.results) == []


def test_displays_whose_results_nobody_holds_are_forgotten() -> None:
    displays = Displays()
    for number in range(1000):
        outputs(shown("x", str(number)), displays=displays)
    assert len(displays) <= 256


def test_displays_whose_results_are_held_are_remembered_however_many() -> None:
    displays = Displays()
    held = [outputs(shown("x", str(number)), displays=displays) for number in range(600)]
    for number in range(600):
        outputs(updated("new", str(number)), displays=displays)
    assert all(texts(fed.results) == ["new"] for fed in held)


# clear_output.


def test_a_clear_takes_the_results_at_once_and_leaves_what_was_printed() -> None:
    fed = outputs(out("a\n"), err("b"), shown("1"), Cleared(False))
    assert texts(fed.results) == []
    assert (kept(fed), kept(fed, error=True)) == ("a\n", "b")


@pytest.mark.parametrize("following", [out("x"), err("x"), shown("2")])
def test_a_clear_that_waits_comes_with_the_next_output(following: Event) -> None:
    fed = outputs(out("a\n"), shown("1"), Cleared(True))
    assert texts(fed.results) == ["1"]
    fed.feed(following, 0.0, 0.0)
    assert "1" not in texts(fed.results)
    assert kept(fed).startswith("a\n")


def test_a_clear_that_waits_for_nothing_clears_nothing() -> None:
    assert texts(outputs(shown("1"), Cleared(True)).results) == ["1"]


def test_a_clear_that_waits_clears_once() -> None:
    assert texts(outputs(shown("1"), Cleared(True), shown("2"), shown("3")).results) == ["2", "3"]


# The limit.


def test_below_the_limit_everything_is_kept() -> None:
    fed = outputs(
        *[out("123456789\n")] * 50, shown("x" * 200), *[err("y" * 99 + "\n")] * 3, limit=LIMIT + 1000
    )
    assert kept(fed) == "123456789\n" * 50
    assert kept(fed, error=True) == ("y" * 99 + "\n") * 3
    assert texts(fed.results) == ["x" * 200]
    assert not fed.truncated


def test_beyond_the_limit_head_and_tail_are_kept() -> None:
    lines = [f"{number:05}\n" for number in range(10_000)]
    fed = outputs(*map(out, lines), limit=600)
    assert kept(fed) == "".join(lines[:50] + lines[-50:])
    assert fed.truncated


def test_one_message_of_many_lines_is_cut_like_many_messages() -> None:
    lines = [f"{number:05}\n" for number in range(10_000)]
    fed = outputs(out("".join(lines)), limit=600)
    assert kept(fed) == "".join(lines[:50] + lines[-50:])
    assert fed.truncated


def test_head_and_tail_of_one_huge_line_are_kept() -> None:
    fed = outputs(out("head" + "x" * 10_000 + "tail\n"), limit=100)
    text = kept(fed)
    assert text.startswith("headx")
    assert text.endswith("xtail\n")
    assert len(text) <= 101
    assert fed.truncated


def test_the_limit_counts_bytes() -> None:
    fed = outputs(out("é" * 1000 + "\n"), limit=100)
    assert len(kept(fed).encode()) <= 101
    assert fed.truncated


def test_a_line_that_comes_in_pieces_counts_once() -> None:
    fed = outputs(out("x" * 450), out("y" * 100 + "\n"), limit=1000)
    assert kept(fed) == "x" * 450 + "y" * 100 + "\n"
    assert not fed.truncated


def test_a_line_that_never_ends_is_cut_like_any_other() -> None:
    fed = Outputs(Displays(), 1000)
    for second in range(100):
        fed.feed(out("x" * 600), float(second), 0.0)
        fed.flush_due(second + 0.5, 0.0)
    assert len(kept(fed)) <= 1000
    assert fed.truncated


def test_the_latest_displays_are_kept_beyond_the_limit() -> None:
    fed = outputs(*(shown(f"{number:0100}") for number in range(100)), limit=2000)
    numbers = [int(text or "") for text in texts(fed.results)]
    assert numbers[0] == 0
    assert numbers[-1] == 99
    assert sum(len(text or "") for text in texts(fed.results)) <= 2000
    assert fed.truncated


def test_a_display_beyond_the_limit_is_dropped() -> None:
    fed = outputs(shown("x" * 2000), shown("small"))
    assert texts(fed.results) == ["small"]
    assert fed.truncated


def test_text_and_displays_share_one_limit() -> None:
    fed = outputs(*[out("x" * 99 + "\n"), shown("y" * 100)] * 10)
    assert len(kept(fed)) + sum(len(text or "") for text in texts(fed.results)) <= LIMIT
    assert fed.truncated


def test_displays_that_were_cleared_take_no_room() -> None:
    animation = [event for number in range(100) for event in (Cleared(True), shown(f"{number:0100}"))]
    fed = outputs(out("begin\n"), *animation, out("end\n"))
    assert kept(fed) == "begin\nend\n"
    assert not fed.truncated


@pytest.mark.parametrize(
    "heavy",
    [
        {"application/json": {"rows": ["x" * 50] * 100}},
        {"application/json": [{"x" * 5000: None}]},
        {"x" * 5000: ""},
    ],
)
def test_every_part_of_a_bundle_counts(heavy: dict[str, object]) -> None:
    assert outputs(Displayed(heavy, {})).truncated
    assert outputs(Displayed({}, heavy)).truncated


def test_empty_displays_are_not_kept_without_end() -> None:
    assert len(outputs(*[Displayed({}, {})] * 10_000).results) <= LIMIT


def test_what_an_update_brings_counts_too() -> None:
    displays = [shown("x", str(number)) for number in range(20)]
    updates = [updated("y" * 900, str(number)) for number in range(20)]
    fed = outputs(*displays, *updates)
    assert sum(len(text or "") for text in texts(fed.results)) <= LIMIT
    assert fed.truncated


def test_a_bundle_may_be_nested_as_deep_as_json_can_be_read() -> None:
    nested: object = "x"
    for _ in range(450):
        nested = {"a": [nested]}
    assert len(outputs(Displayed({"application/json": nested}, {}), limit=2**20).results) == 1


_printed = st.lists(st.text("ab é\r\n", max_size=20), max_size=8)


@quick
@given(_printed)
def test_nothing_is_dropped_while_it_fits(chunks: list[str]) -> None:
    text = "".join(chunks)
    fed = outputs(*map(out, chunks), limit=max(1, len(text.encode())))
    assert kept(fed) == text
    assert not fed.truncated


@quick
@given(_printed, st.integers(1, 50))
def test_what_is_kept_is_a_head_and_a_tail_within_the_limit(chunks: list[str], limit: int) -> None:
    text = "".join(chunks)
    fed = outputs(*map(out, chunks), limit=limit)
    whole = kept(fed)
    assert len(whole.encode()) <= limit
    assert any(
        text.startswith(whole[:length]) and text.endswith(whole[length:]) for length in range(len(whole) + 1)
    )
    assert fed.truncated is (whole != text)


def test_ids_that_are_not_shown_any_more_are_forgotten() -> None:
    displays = Displays()
    fed = Outputs(displays, 100_000)
    for number in range(5000):
        fed.feed(shown("x", f"id {number}"), 0.0, 0.0)

    assert len(displays) < 1000
    fed.feed(updated("new", "id 4999"), 0.0, 0.0)
    assert texts(fed.results)[-1] == "new"


def test_pieces_of_one_character_take_no_more_memory_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module, "_FREE_PIECES", 1000)  # the same as with more
    fed = Outputs(Displays(), 100_000)
    for number in range(20_000):
        fed.feed(Streamed("x\n", error=number % 2 == 1), 0.0, 0.0)

    logs = fed.logs()
    assert len(logs.stdout) + len(logs.stderr) < 2000
    assert fed.truncated
