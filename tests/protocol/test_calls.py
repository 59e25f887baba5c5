"""How a run ended, what it showed on the way, and what its result says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from code_sandboxes.protocol.calls import Execution
from code_sandboxes.protocol.events import (
    Cleared,
    ConnectionLost,
    Died,
    Displayed,
    Done,
    Event,
    Failed,
    Idle,
    InputAsked,
    InterruptAsked,
    KernelReplaced,
    NotRun,
    OutputDropped,
    Replied,
    Started,
    Streamed,
    Terminated,
    TimedOut,
    Updated,
)
from code_sandboxes.protocol.outputs import HOLD
from code_sandboxes.results import (
    ExecutionError,
    ExecutionResult,
    ExecutionStatus,
    InputRequest,
    OutputMessage,
    Result,
)
from tests.scripted import Output, ScriptedClient, ScriptedKernel, ScriptedRun, errors, results, text, told

OK = Replied("ok", {"status": "ok"})
ABORTED = Replied("aborted", {"status": "aborted"})
DIED = Died("the kernel was killed by signal 9 while it ran the code", -9)
LOST = ConnectionLost("the kernel tells nothing any more")


def ran(*events: Event) -> tuple[ExecutionResult, list[Output]]:
    """The result of a run of these events, and what it showed."""
    execution = Execution("")
    shown = [output for event in events for output in told(execution.feed(event, 0.0))]
    assert execution.done
    return execution.result(), shown


def failed(name: str = "ValueError", value: str = "no", traceback: str = "Traceback ...") -> Failed:
    return Failed(name, value, traceback)


def error_reply(name: str = "ValueError", value: str = "no", traceback: str = "Traceback ...") -> Replied:
    return Replied(
        "error", {"status": "error", "ename": name, "evalue": value, "traceback": traceback.split("\n")}
    )


def page(content: str) -> Replied:
    payload = [{"source": "page", "data": {"text/plain": content}, "start": 0}]
    return Replied("ok", {"status": "ok", "payload": payload})


def shown(content: str) -> Displayed:
    return Displayed({"text/plain": content}, {})


# A whole conversation, message by message.


def test_a_run_shows_what_happens_as_it_happens_and_the_result_has_it_all(
    client: ScriptedClient, kernel: ScriptedKernel, run: ScriptedRun
) -> None:
    request = run.request
    client.receives(
        kernel.status("busy", to=request),
        kernel.says("execute_input", {"code": "", "execution_count": 3}, to=request),
        kernel.stream("out\n", to=request),
        kernel.stream("err\n", to=request, name="stderr"),
        kernel.display("a display", to=request),
        kernel.display("the value", to=request, msg_type="execute_result"),
        kernel.reply(to=request, execution_count=3),
    )
    assert run.shown == [
        OutputMessage("out", "\n"),
        OutputMessage("err", "\n", error=True),
        Result({"text/plain": "a display"}),
        Result({"text/plain": "the value"}, is_main_result=True),
    ]
    assert not run.execution.done
    client.receives(kernel.status("idle", to=request))
    result = run.execution.result()
    assert (result.status, result.stdout, result.stderr, result.text) == ("ok", "out", "err", "the value")
    assert (list(result.results), result.execution_count) == (run.shown[2:], 3)
    assert (result.error, result.exit_code, result.truncated, result.state_preserved) == (
        None,
        None,
        False,
        True,
    )


def test_output_after_the_reply_and_before_the_idle_is_not_lost(
    client: ScriptedClient, kernel: ScriptedKernel, run: ScriptedRun
) -> None:
    client.receives(
        kernel.reply(to=run.request),
        kernel.stream("late", to=run.request),
        kernel.status("idle", to=run.request),
    )
    assert run.execution.result().stdout == "late"


def test_a_bare_kernel_is_understood(
    client: ScriptedClient, kernel: ScriptedKernel, run: ScriptedRun
) -> None:
    # No execute_input, no metadata, no stream name, an empty parent, no iopub error.
    client.receives(
        kernel.says("stream", {"text": "out\n"}),
        kernel.says("display_data", {"data": {"text/plain": "1"}}),
        kernel.reply(to=run.request, status="error", ename="E", evalue="v", traceback=["at", "line"]),
        kernel.status("idle", to=run.request),
    )
    result = run.execution.result()
    assert (result.stdout, [r.text for r in result.results], result.execution_count) == ("out", ["1"], None)
    assert result.error == ExecutionError("E", "v", "at\nline")
    assert errors(run.shown) == [result.error]


def test_an_update_changes_the_results_of_an_earlier_run_in_place(
    client: ScriptedClient, kernel: ScriptedKernel, run: ScriptedRun
) -> None:
    client.receives(
        kernel.display("old", to=run.request, display_id="d"),
        kernel.display("other", to=run.request, display_id="e"),
        kernel.display("old", to=run.request, display_id="d"),
        kernel.reply(to=run.request),
        kernel.status("idle", to=run.request),
    )
    earlier = run.execution.result()
    seen = earlier.results
    later = client.executes()
    client.receives(kernel.update("new", to=later.request, display_id="d"))
    assert [result.text for result in seen] == ["new", "other", "new"]
    assert earlier.results is seen
    assert results(later.shown) == ["new"]
    client.receives(kernel.reply(to=later.request), kernel.status("idle", to=later.request))
    assert len(later.execution.result().results) == 0


def test_an_update_without_a_run_changes_it_too(
    client: ScriptedClient, kernel: ScriptedKernel, run: ScriptedRun
) -> None:
    client.receives(
        kernel.display("old", to=run.request, display_id="d"),
        kernel.reply(to=run.request),
        kernel.status("idle", to=run.request),
        kernel.update("new", to=run.request, display_id="d"),
    )
    (event,) = client.of_the_kernel
    assert isinstance(event, Updated)
    client.displays.update(event)
    assert [result.text for result in run.execution.result().results] == ["new"]


def test_a_kernel_that_was_replaced_under_a_run_has_lost_its_variables(
    client: ScriptedClient, kernel: ScriptedKernel, run: ScriptedRun
) -> None:
    client.receives(kernel.status("busy", to=run.request))
    other = ScriptedKernel("another process")
    client.receives(other.reply(to=run.request), other.status("idle", to=run.request))
    assert not run.execution.result().state_preserved


# Held lines.


def test_an_unfinished_line_is_shown_by_tick_a_tenth_of_a_second_after_it_began() -> None:
    execution = Execution("", now=100.0, started_at=5000.0)
    assert execution.next_deadline() is None
    assert execution.feed(Streamed("half", False), 101.0) == []
    deadline = execution.next_deadline()
    assert deadline == 101.0 + HOLD
    assert execution.tick(deadline - 0.001) == []
    (message,) = told(execution.tick(deadline))
    assert isinstance(message, OutputMessage)
    assert (message.line, message.end) == ("half", "")
    assert message.timestamp == pytest.approx(5001.1)
    assert execution.next_deadline() is None


def test_a_line_that_is_due_is_shown_before_what_comes_after_it() -> None:
    execution = Execution("")
    execution.feed(Streamed("half", False), 0.0)
    assert told(execution.feed(Streamed(" more\n", False), 1.0)) == [
        OutputMessage("half", "", 1.0),
        OutputMessage(" more", "\n", 1.0),
    ]


@pytest.mark.parametrize("event", [Done(), failed(), shown("x"), InputAsked("", False, {}), DIED])
def test_what_is_held_comes_before_what_it_belongs_before(event: Event) -> None:
    execution = Execution("")
    execution.feed(Streamed("half", False), 0.0)
    assert told(execution.feed(event, 0.0))[0] == OutputMessage("half", "")


def test_input_is_asked_after_the_prompt_that_was_printed() -> None:
    execution = Execution("", allow_stdin=True)
    execution.feed(Streamed("your name", False), 0.0)
    asked = InputAsked("? ", True, {"msg_id": "1"})
    assert told(execution.feed(asked, 0.0)) == [OutputMessage("your name", ""), InputRequest("? ", True)]
    assert execution.input_asked is asked


@pytest.mark.parametrize("allow_stdin", [True, False])
def test_the_request_says_whether_somebody_answers(allow_stdin: bool) -> None:
    content = Execution("1 + 1", allow_stdin=allow_stdin).content
    assert (content["code"], content["allow_stdin"], content["silent"]) == ("1 + 1", allow_stdin, False)


# Status.


@pytest.mark.parametrize(
    ("events", "status", "error_name"),
    [
        ([OK, Done()], "ok", None),
        ([error_reply(), Done()], "error", "ValueError"),
        ([failed(), error_reply(), Done()], "error", "ValueError"),
        ([error_reply(), failed(), Done()], "error", "ValueError"),
        ([Replied("error", {}), Done()], "error", "Error"),
        ([failed(), Replied("error", {}), Done()], "error", "ValueError"),
        ([failed("SystemExit", "0"), error_reply("SystemExit", "0"), Done()], "exited", None),
        ([ABORTED, Done()], "aborted", "Aborted"),
        ([NotRun("not run: terminated")], "aborted", "NotRun"),
        ([error_reply("KeyboardInterrupt"), Done()], "interrupted", "KeyboardInterrupt"),
        ([InterruptAsked(), error_reply("KeyboardInterrupt"), Done()], "interrupted", "KeyboardInterrupt"),
        ([InterruptAsked(), error_reply("CancelledError"), Done()], "interrupted", "KeyboardInterrupt"),
        ([InterruptAsked(), error_reply(), Done()], "error", "ValueError"),
        ([InterruptAsked(), OK, Done()], "ok", None),
        ([InterruptAsked(), Done()], "interrupted", "KeyboardInterrupt"),
        ([InterruptAsked(), DIED], "interrupted", "KeyboardInterrupt"),
        ([InterruptAsked(), LOST], "interrupted", "KeyboardInterrupt"),
        ([error_reply("CancelledError"), Done()], "error", "CancelledError"),
        ([TimedOut(1.0), error_reply("KeyboardInterrupt"), Done()], "timed_out", "TimeoutError"),
        ([TimedOut(1.0), OK, Done()], "timed_out", "TimeoutError"),
        ([TimedOut(1.0), Done()], "timed_out", "TimeoutError"),
        ([TimedOut(1.0), DIED], "timed_out", "TimeoutError"),
        ([TimedOut(1.0), LOST], "timed_out", "TimeoutError"),
        ([TimedOut(1.0), Terminated("was terminated")], "interrupted", "Interrupted"),
        ([Terminated("was terminated")], "interrupted", "Interrupted"),
        ([OK, Terminated("was terminated")], "interrupted", "Interrupted"),
        ([DIED], "kernel_died", "KernelDied"),
        ([failed(), error_reply(), DIED], "kernel_died", "KernelDied"),
        ([LOST], "connection_lost", "ConnectionLost"),
        ([Done()], "connection_lost", "ConnectionLost"),
        ([failed(), Done()], "connection_lost", "ConnectionLost"),
        ([Replied("ok", {"payload": [{"source": "ask_exit", "keepkernel": False}]}), Done()], "exited", None),
    ],
)  # fmt: skip
def test_status_and_error_say_how_it_ended(events: list[Event], status: str, error_name: str | None) -> None:
    result, outputs = ran(Started(1), *events)
    assert result.status == status
    assert isinstance(result.status, ExecutionStatus)
    assert (result.error.name if result.error else None) == error_name
    assert (result.error is None) is (status in ("ok", "exited"))
    if result.error is not None:
        assert errors(outputs)[-1] == result.error


@pytest.mark.parametrize(
    ("event", "preserved"),
    [
        (Done(), True),
        (LOST, True),
        (NotRun("not run"), True),
        (DIED, False),
        (Terminated("was terminated"), False),
    ],
)
def test_variables_are_gone_with_their_kernel(event: Event, preserved: bool) -> None:
    assert ran(event)[0].state_preserved is preserved
    assert ran(KernelReplaced(), event)[0].state_preserved is False


def test_a_dead_kernel_tells_its_exit_code_and_its_last_words() -> None:
    result, _ = ran(Died("the kernel was killed by signal 11", -11, "Fatal Python error: Segmentation fault"))
    assert result.exit_code == -11
    assert result.error == ExecutionError(
        "KernelDied", "the kernel was killed by signal 11", "Fatal Python error: Segmentation fault"
    )


def test_an_error_that_was_shown_before_does_not_hide_the_last_words_of_the_kernel() -> None:
    result, _ = ran(failed(), Died("the kernel was killed by signal 11", -11, "Fatal Python error"))
    assert result.error is not None
    assert result.error.traceback == "Fatal Python error"


def test_a_timeout_says_how_long_it_waited_and_what_became_of_the_code() -> None:
    interrupted, killed = ran(TimedOut(1.5), Done())[0].error, ran(TimedOut(60.0), DIED)[0].error
    assert interrupted is not None
    assert killed is not None
    assert (
        interrupted.value == "no answer after 1.5 s; the code was interrupted (pass timeout= to wait longer)"
    )
    assert killed.value.startswith("no answer after 60 s; the code did not stop when it was interrupted")
    assert "variables are gone" in killed.value


@pytest.mark.parametrize("asked", [TimedOut(1.0), InterruptAsked()])
@pytest.mark.parametrize("published", [True, False])
def test_the_traceback_says_where_the_code_was_interrupted(asked: Event, published: bool) -> None:
    told = [failed("KeyboardInterrupt", "", "at line 3")] if published else []
    result, _ = ran(asked, *told, error_reply("KeyboardInterrupt", "", "at line 3"), Done())
    assert result.error is not None
    assert result.error.traceback == "at line 3"


@pytest.mark.parametrize("sentence", ["the sandbox was terminated"])
def test_a_run_that_was_cut_short_says_by_what(sentence: str) -> None:
    for event in (Terminated(sentence), NotRun(sentence), Died(sentence), ConnectionLost(sentence)):
        error = ran(event)[0].error
        assert error is not None
        assert error.value == sentence


def test_output_before_the_end_is_kept_however_it_ends() -> None:
    for end in (DIED, LOST, Terminated("x"), Done()):
        result, _ = ran(Streamed("a\nb", False), Streamed("c", True), shown("d"), TimedOut(1.0), end)
        assert (result.stdout, result.stderr, [r.text for r in result.results]) == ("a\nb", "c", ["d"])


# Errors are shown once.


@pytest.mark.parametrize(
    "events",
    [
        [failed(), error_reply(), Done()],
        [error_reply(), failed(), Done()],
        [error_reply(), Done()],
        [failed(), Replied("error", {}), Done()],
        [failed("KeyboardInterrupt"), error_reply("KeyboardInterrupt"), Done()],
        [error_reply("KeyboardInterrupt"), failed("KeyboardInterrupt"), Done()],
        [InterruptAsked(), failed("KeyboardInterrupt"), error_reply("KeyboardInterrupt"), Done()],
        [InterruptAsked(), failed("CancelledError"), error_reply("CancelledError"), Done()],
        [InterruptAsked(), failed(), error_reply(), Done()],
        [TimedOut(1.0), failed("KeyboardInterrupt"), error_reply("KeyboardInterrupt"), Done()],
        [TimedOut(1.0), failed("KeyboardInterrupt"), DIED],
        [TimedOut(1.0), Done()],
        [ABORTED, Done()],
        [NotRun("not run")],
        [Terminated("was terminated")],
        [DIED],
        [LOST],
        [Done()],
    ],
)
def test_an_error_is_shown_exactly_once(events: list[Event]) -> None:
    result, outputs = ran(*events)
    assert errors(outputs) == [result.error]


def test_an_error_is_shown_when_it_is_published() -> None:
    execution = Execution("")
    assert execution.feed(failed(), 0.0) == [ExecutionError("ValueError", "no", "Traceback ...")]
    execution.feed(error_reply(), 0.0)
    assert execution.feed(Done(), 0.0) == []


def test_an_error_that_the_code_showed_and_survived_is_not_its_result() -> None:
    result, outputs = ran(failed(), OK, Done())  # get_ipython().showtraceback()
    assert (result.status, result.error) == ("ok", None)
    assert errors(outputs) == [ExecutionError("ValueError", "no", "Traceback ...")]


def test_an_error_that_was_not_published_is_shown_after_another_one_that_was() -> None:
    result, outputs = ran(failed("First"), error_reply("Second"), Done())
    assert [error.name for error in errors(outputs)] == ["First", "Second"]
    assert errors(outputs)[-1] == result.error


@pytest.mark.parametrize(
    "reply", [error_reply(traceback=""), Replied("error", {"ename": "ValueError", "evalue": "no"})]
)
def test_a_traceback_that_only_iopub_told_is_in_the_result(reply: Replied) -> None:
    result, outputs = ran(failed(), reply, Done())
    assert result.error == ExecutionError("ValueError", "no", "Traceback ...")
    assert errors(outputs) == [result.error]


def test_an_error_in_code_that_calls_exit_is_no_error_of_the_run() -> None:
    _, outputs = ran(failed("SystemExit", "2"), error_reply("SystemExit", "2"), Done())
    assert errors(outputs) == []


# sys.exit().


@pytest.mark.parametrize(
    ("value", "exit_code", "stderr"),
    [
        ("2", 2, ""),
        ("0", 0, ""),
        ("-1", -1, ""),
        ("1", 1, ""),
        ("256", 256, ""),
        ("", 0, ""),
        ("None", 0, ""),
        ("False", 0, ""),
        ("True", 1, ""),
        ("no such file", 1, "no such file\n"),
        ("1.5", 1, "1.5\n"),
        ("9" * 10_000, 1, "9" * 10_000 + "\n"),
        ("two\nlines", 1, "two\nlines\n"),
        ("\r\n", 1, "\r\n\n"),
    ],
)
@pytest.mark.parametrize("published", [True, False])
def test_sys_exit_gives_its_code_or_prints_its_message(
    value: str, exit_code: int, stderr: str, published: bool
) -> None:
    told = [failed("SystemExit", value)] if published else []
    result, outputs = ran(*told, error_reply("SystemExit", value), Done())
    assert (result.status, result.exit_code, result.error) == ("exited", exit_code, None)
    assert text(outputs, error=True) == stderr
    assert text(result.logs.stderr, error=True) == stderr
    assert not any("\n" in o.line or "\r" in o.line for o in outputs if isinstance(o, OutputMessage))
    assert result.success is (exit_code == 0)


def test_the_message_of_an_exit_comes_last() -> None:
    _, outputs = ran(Streamed("warn", True), error_reply("SystemExit", "bye"), Done())
    assert outputs == [OutputMessage("warn", "", error=True), OutputMessage("bye", "\n", error=True)]


def test_asking_the_frontend_to_exit_is_exit_code_0() -> None:
    result, outputs = ran(Replied("ok", {"payload": [{"source": "ask_exit"}]}), Done())
    assert (result.status, result.exit_code, result.success, outputs) == ("exited", 0, True, [])


# What else is in a reply.


def test_a_page_is_a_result() -> None:
    result, outputs = ran(page("help"), Done())
    assert [r.text for r in result.results] == results(outputs) == ["help"]


def test_a_page_comes_last_wherever_the_reply_came() -> None:
    before, _ = ran(page("help"), Cleared(False), shown("1"), Done())
    after, _ = ran(Cleared(False), shown("1"), page("help"), Done())
    assert before.results == after.results == [Result({"text/plain": "1"}), Result({"text/plain": "help"})]


@pytest.mark.parametrize(
    "payload",
    [None, 1, "page", {}, {"source": "page"}, [None], [[]], [{}], [{"source": "page"}], [{"source": []}],
     [{"source": "page", "data": "text"}], [{"source": "set_next_input", "text": "x"}]],
)  # fmt: skip
def test_a_payload_that_says_nothing_is_ignored(payload: object) -> None:
    result, outputs = ran(Replied("ok", {"payload": payload}), Done())
    assert (result.status, list(result.results), outputs) == ("ok", [], [])


@pytest.mark.parametrize(
    ("events", "count"),
    [
        ([Started(2), OK], 2),
        ([Started(None), OK], None),
        ([Replied("ok", {"execution_count": 2})], 2),
        ([Started(2), Replied("ok", {"execution_count": 3})], 2),
        ([Replied("ok", {"execution_count": 3}), Started(2)], 2),
        ([Started(None), Replied("ok", {"execution_count": 2})], 2),
        ([Replied("ok", {"execution_count": 2}), Started(None)], 2),
        ([Displayed({}, {}, execution_count=2), OK], 2),
        ([Replied("ok", {"execution_count": "2"})], None),
        ([Replied("ok", {"execution_count": True})], None),
    ],
)
def test_the_execution_count_is_the_published_one_or_else_that_of_the_reply(
    events: list[Event], count: int | None
) -> None:
    found = ran(*events, Done())[0].execution_count
    assert found == count
    assert type(found) is type(count)


@pytest.mark.parametrize(
    "content",
    [
        {"ename": 1, "evalue": 2, "traceback": 3},
        {"ename": None},
        {"ename": [], "evalue": {}, "traceback": [None, 1, {}]},
        {"evalue": "only"},
        {"payload": {"source": "page"}, "execution_count": []},
    ],
)
def test_an_error_reply_of_any_shape_is_an_error(content: Mapping[str, object]) -> None:
    result, outputs = ran(Replied("error", content), Done())
    assert result.status == "error"
    assert result.error is not None
    assert errors(outputs) == [result.error]


# Clearing, dropping, times.


@pytest.mark.parametrize("waits", [True, False])
def test_an_error_is_output_that_a_clear_waits_for(waits: bool) -> None:
    result, _ = ran(shown("1"), Cleared(waits), failed(), error_reply(), Done())
    assert list(result.results) == []


def test_a_clear_that_waits_does_not_wait_for_the_end() -> None:
    result, _ = ran(shown("1"), Cleared(True), OK, Done())
    assert [r.text for r in result.results] == ["1"]


def test_dropped_output_makes_the_result_truncated() -> None:
    assert not ran(OK, Done())[0].truncated
    assert ran(OutputDropped(), OK, Done())[0].truncated


def test_max_output_bounds_what_the_result_keeps_and_not_what_is_shown() -> None:
    execution = Execution("", max_output=100)
    outputs = [o for _ in range(50) for o in told(execution.feed(Streamed("123456789\n", False), 0.0))]
    execution.feed(Done(), 0.0)
    assert text(outputs) == "123456789\n" * 50
    assert execution.result().stdout == ("123456789\n" * 10)[:-1]
    assert execution.result().truncated


def test_an_execution_knows_when_and_where_it_ran() -> None:
    execution = Execution("", context_id="c", now=10.0, started_at=1000.0)
    execution.feed(Done(), 12.5)
    result = execution.result()
    assert (result.started_at, result.completed_at, result.context_id) == (1000.0, 1002.5, "c")
    assert result.duration == 2.5


@pytest.mark.parametrize("event", [Idle(), Event(), OutputDropped()])
def test_other_events_show_nothing(event: Event) -> None:
    assert Execution("").feed(event, 0.0) == []
