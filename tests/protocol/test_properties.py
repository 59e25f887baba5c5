"""What holds for every run, however its messages are cut and ordered, and for every kind of garbage."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import pytest
from hypothesis import given, strategies as st

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
from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.protocol.wire import MalformedMessageError, WireCodec
from code_sandboxes.results import ExecutionResult, ExecutionStatus, OutputMessage
from tests.scripted import Output, ScriptedClient, ScriptedKernel, errors, quick, text, told

KERNEL = ScriptedKernel()
FOREIGN = ScriptedClient("somebody else").sends("execute_request")

Say = Callable[[Message], Message]
"""Makes a message that answers the request it is given."""


@dataclass(frozen=True)
class Script:
    """What a kernel publishes for one run, and how it replies."""

    published: list[tuple[str, str]]  # (what, text); what is the name of a stream or of something else
    status: str

    def published_text(self, stream: str) -> str:
        return "".join(text for what, text in self.published if what == stream)

    def iopub(self) -> list[Say]:
        ends = [_error] if self.status == "error" else []
        return [_busy, *(_said(what, text) for what, text in self.published), *ends, _idle]


def _busy(request: Message) -> Message:
    return KERNEL.status("busy", to=request)


def _idle(request: Message) -> Message:
    return KERNEL.status("idle", to=request)


def _error(request: Message) -> Message:
    return KERNEL.says("error", {"ename": "E", "evalue": "v", "traceback": ["t"]}, to=request)


def _foreign(_: Message) -> Message:
    return KERNEL.stream("not ours\n", to=FOREIGN)


def _said(what: str, text: str) -> Say:
    if what in ("stdout", "stderr"):
        return lambda request: KERNEL.stream(text, to=request, name=what)
    if what == "clear_output":
        return lambda request: KERNEL.says(what, {"wait": bool(text)}, to=request)
    display_id = text[:1] or None
    if what == "update_display_data":
        return lambda request: KERNEL.update(text, to=request, display_id=display_id or "unknown")
    return lambda request: KERNEL.display(text, to=request, display_id=display_id, msg_type=what)


def _reply(script: Script) -> Say:
    failure = {"ename": "E", "evalue": "v", "traceback": ["t"]} if script.status == "error" else {}
    return lambda request: KERNEL.reply(to=request, status=script.status, **failure)


def played(messages: list[Say], pauses: list[float]) -> tuple[ExecutionResult, list[Output]]:
    """The result of a run that gets *messages*, with *pauses* between them, and what it showed."""
    client = ScriptedClient()
    run = client.executes()
    times = [*accumulate(pauses)][: len(messages)]
    times += [times[-1] if times else 0.0] * (len(messages) - len(times))
    for say, now in zip(messages, times, strict=True):
        client.receives(say(run.request), now=now)
    assert run.execution.done
    return run.execution.result(), run.shown


_lines = st.text("ab\r\né", max_size=8)
_whats = st.sampled_from(
    ["stdout", "stdout", "stderr", "display_data", "execute_result", "update_display_data", "clear_output"]
)
_scripts = st.builds(
    Script, st.lists(st.tuples(_whats, _lines), max_size=8), st.sampled_from(["ok", "error", "aborted"])
)


@st.composite
def disturbed(draw: st.DrawFn, script: Script) -> list[Say]:
    """The messages of *script*: streams cut anywhere, foreign messages between, the reply anywhere."""
    published = [piece for what, text in script.published for piece in draw(pieces(what, text))]
    messages = Script(published, script.status).iopub()
    messages.insert(draw(st.integers(0, len(messages))), _reply(script))
    for position in draw(st.lists(st.integers(0, len(messages)), max_size=3)):
        messages.insert(position, _foreign)
    return messages


@st.composite
def pieces(draw: st.DrawFn, what: str, text: str) -> list[tuple[str, str]]:
    if what not in ("stdout", "stderr"):
        return [(what, text)]
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [(what, text[start:end]) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


_pauses = st.lists(st.sampled_from([0.0, 0.01, 0.06, 0.2]), max_size=20)


@quick
@given(st.data(), _scripts, _pauses)
def test_no_cut_and_no_legal_order_of_messages_changes_what_a_run_was(
    data: st.DataObject, script: Script, pauses: list[float]
) -> None:
    expected, _ = played([*script.iopub(), _reply(script)], [])
    result, outputs = played(data.draw(disturbed(script)), pauses)
    assert result.status == expected.status == script.status
    assert result.results == expected.results
    assert result.error == expected.error
    assert errors(outputs) == ([result.error] if result.error else [])
    assert text(outputs) == script.published_text("stdout")
    assert text(outputs, error=True) == script.published_text("stderr")


@quick
@given(st.data(), _scripts, _pauses)
def test_lines_have_no_line_ends_and_logs_are_what_was_shown(
    data: st.DataObject, script: Script, pauses: list[float]
) -> None:
    result, outputs = played(data.draw(disturbed(script)), pauses)
    messages = [output for output in outputs if isinstance(output, OutputMessage)]
    assert not any("\n" in message.line or "\r" in message.line for message in messages)
    assert {message.end for message in messages} <= {"\n", "\r\n", "\r", ""}
    assert [message for message in messages if not message.error] == result.logs.stdout
    assert [message for message in messages if message.error] == result.logs.stderr
    assert not result.truncated


# Garbage.

_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "d", "stdout", "a\r\n\ud800"]),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.sampled_from("abc"), values, max_size=2),
    max_leaves=4,
)
# fmt: off
_fields = [
    "status", "execution_state", "name", "text", "data", "metadata", "transient", "display_id", "wait",
    "ename", "evalue", "traceback", "prompt", "password", "comm_id", "target_name", "execution_count",
    "payload", "source",
]
_types = st.sampled_from([
    "status", "stream", "execute_input", "execute_result", "display_data", "update_display_data",
    "clear_output", "error", "iopub_welcome", "comm_open", "comm_msg", "comm_close", "input_request",
    "execute_reply", "kernel_info_reply", "debug_event", "",
])
# fmt: on
_known = st.sampled_from(
    ["ok", "error", "aborted", "idle", "busy", "stdout", "stderr", "c", "SystemExit", "page"]
)
_contents = st.dictionaries(
    st.sampled_from(_fields),
    _known | _json | st.just({"display_id": "d"}) | st.just([{"source": "page", "data": {"text/plain": 1}}]),
    max_size=6,
)
_channels: st.SearchStrategy[Channel] = st.sampled_from(["shell", "iopub", "stdin", "control"])
_headers = st.dictionaries(st.sampled_from(["msg_id", "msg_type", "session"]), _json, max_size=3)


@st.composite
def garbage(draw: st.DrawFn, request: Message) -> Message:
    """JSON of the right kind at most."""
    header = draw(
        st.fixed_dictionaries({"msg_type": _types, "session": st.sampled_from(["k", "l"])}) | _headers
    )
    parent = draw(st.sampled_from([request.header, FOREIGN.header, {}]) | _headers)
    return Message(draw(_channels), header, parent, draw(_headers), draw(_contents))


@quick
@given(st.data(), st.integers(0, 12))
@pytest.mark.slow
def test_no_message_of_any_shape_raises(data: st.DataObject, count: int) -> None:
    client = ScriptedClient()
    client.router.comm_opened("c")
    run = client.executes()
    for now in range(count):
        client.receives(data.draw(garbage(run.request)), now=now / 20)
    assert not any("\n" in o.line or "\r" in o.line for o in run.shown if isinstance(o, OutputMessage))
    run.feed(Done())
    assert isinstance(run.execution.result().status, ExecutionStatus)


_names = st.sampled_from(["E", "SystemExit", "KeyboardInterrupt", "CancelledError"])
_events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Started, st.none() | st.integers()),
    st.builds(Streamed, _lines, st.booleans()),
    st.builds(Displayed, _contents, _contents, st.none() | st.just("d"), st.booleans()),
    st.builds(Updated, _contents, _contents, st.just("d")),
    st.builds(Cleared, st.booleans()),
    st.builds(Failed, _names, _lines, _lines),
    st.builds(InputAsked, _lines, st.booleans(), _headers),
    st.builds(Replied, st.sampled_from(["ok", "error", "aborted"]), _contents),
    st.builds(Replied, st.just("error"), st.fixed_dictionaries({"ename": _names, "evalue": _lines})),
    st.builds(TimedOut, st.floats(0, 1e9)),
    st.sampled_from([Idle(), KernelReplaced(), InterruptAsked(), OutputDropped()]),
)
_ends: st.SearchStrategy[Event] = st.sampled_from(
    [Done(), Died("died", -9, "words"), ConnectionLost("lost"), NotRun("not run"), Terminated("terminated")]
)


@quick
@given(st.lists(_events, max_size=8), _ends, st.integers(1, 40))
def test_any_events_end_in_a_result_whose_error_fits_its_status(
    events: list[Event], end: Event, max_output: int
) -> None:
    execution = Execution("", max_output=max_output)
    outputs = [output for event in [*events, end] for output in told(execution.feed(event, 0.0))]
    result = execution.result()
    assert execution.done
    assert (result.error is None) is (result.status in (ExecutionStatus.OK, ExecutionStatus.EXITED))
    if result.error is not None:
        assert errors(outputs)[-1:] == [result.error]
    assert not any("\n" in o.line or "\r" in o.line for o in outputs if isinstance(o, OutputMessage))
    assert (
        sum(len((m.line + m.end).encode()) for m in [*result.logs.stdout, *result.logs.stderr]) <= max_output
    )


@pytest.mark.parametrize(
    ("channel", "msg_type", "content"),
    [
        ("iopub", "display_data", b'{"data": {"application/json": @}}'),
        ("iopub", "display_data", b'{"data": {}, "metadata": {"a": @}}'),
        ("iopub", "error", b'{"ename": "E", "traceback": [@]}'),
        ("iopub", "status", b'{"execution_state": @}'),
        ("iopub", "stream", b'{"name": @, "text": ""}'),
        ("shell", "execute_reply", b'{"status": @}'),
        ("shell", "execute_reply", b'{"status": "error", "ename": "E", "traceback": [@]}'),
        ("shell", "execute_reply", b'{"payload": [{"source": "page", "data": {"a": @}}]}'),
    ],
)
@pytest.mark.slow
def test_nesting_that_can_be_read_can_be_routed_and_shown(
    channel: Channel, msg_type: str, content: bytes
) -> None:
    client, codec = ScriptedClient(), WireCodec(b"")
    run = client.executes()
    header = json.dumps({"msg_type": msg_type}).encode()
    parent = json.dumps(dict(run.request.header)).encode()
    shown = 0
    for depth in range(1000, 0, -1):
        nested = content.replace(b"@", b"[" * depth + b"]" * depth)
        with contextlib.suppress(MalformedMessageError):  # deeper than this Python reads from here
            client.receives(codec.decode([b"<IDS|MSG>", b"", header, parent, b"{}", nested], channel))
            shown += 1
        if shown == 8:
            break
    run.feed(Done())
    run.execution.result()
