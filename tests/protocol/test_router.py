"""Whose is a message? Each case of a kernel's legal, and less legal, behaviour."""

from __future__ import annotations

import pytest

from code_sandboxes.protocol.events import (
    CommClosed,
    CommMessage,
    CommOpened,
    Displayed,
    Done,
    Event,
    Failed,
    Idle,
    InputAsked,
    KernelReplaced,
    KernelStatus,
    OthersRun,
    Replied,
    Started,
    Streamed,
    Updated,
    Welcomed,
)
from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.protocol.router import Routed
from tests.scripted import ScriptedClient, ScriptedKernel

HELLO = Streamed("hello\n", False)


def events(routed: list[Routed]) -> list[Event]:
    return [event for _, event in routed]


def finishes(client: ScriptedClient, kernel: ScriptedKernel, request: Message) -> None:
    client.routes(kernel.reply(to=request), kernel.status("idle", to=request))


def test_request_is_done_only_when_reply_and_idle_have_both_come(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    for request in (client.sends("execute_request"), client.sends("kernel_info_request")):
        assert Done() not in events(client.routes(kernel.reply(to=request)))
        assert events(client.routes(kernel.status("idle", to=request))) == [Idle(), Done()]


def test_idle_may_come_before_the_reply(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    assert events(client.routes(kernel.status("idle", to=request))) == [Idle()]
    assert client.routes(kernel.reply(to=request))[-1] == (request.msg_id, Done())


def test_the_reply_may_come_before_the_execute_input(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    routed = client.routes(
        kernel.reply(to=request),
        kernel.status("busy", to=request),
        kernel.says("execute_input", {"execution_count": 3}, to=request),
        kernel.stream("hello\n", to=request),
        kernel.status("idle", to=request),
    )
    assert {recipient for recipient, _ in routed} == {request.msg_id}
    assert events(routed)[1:] == [KernelStatus("busy"), Started(3), HELLO, Idle(), Done()]


def test_a_request_is_done_once(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    finishes(client, kernel, request)
    assert client.routes(kernel.reply(to=request), kernel.status("idle", to=request)) == []


def test_busy_is_not_idle(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    routed = client.routes(kernel.reply(to=request), kernel.status("busy", to=request))
    assert Done() not in events(routed)


def test_a_control_reply_answers_as_a_shell_reply_does(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    request = client.sends("kernel_info_request")
    reply = kernel.says("kernel_info_reply", {"status": "ok"}, to=request, channel="control")
    assert events(client.routes(reply)) == [Replied("ok", {"status": "ok"})]


@pytest.mark.parametrize("msg_type", ["stream", "error", "display_data", "clear_output"])
def test_what_answers_another_client_is_nothing_to_us(
    client: ScriptedClient, kernel: ScriptedKernel, msg_type: str
) -> None:
    ours = client.sends("execute_request")
    foreign = ScriptedClient("somebody else").sends("execute_request")
    content = {"name": "stdout", "text": "x", "execution_state": "idle", "data": {}}
    assert client.routes(kernel.says(msg_type, content, to=foreign)) == []
    assert client.routes(kernel.reply(to=foreign)) == []
    finishes(client, kernel, ours)
    assert client.routes(kernel.says(msg_type, content, to=foreign)) == []
    assert not client.router.dropped


def test_of_another_clients_runs_it_is_told_that_they_are_on(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    run = ScriptedClient("somebody else").sends("execute_request")
    question = ScriptedClient("somebody else").sends("kernel_info_request")
    told = client.routes(
        *(kernel.status(state, to=to) for to in (question, run) for state in ("busy", "idle"))
    )
    assert told == [(None, OthersRun(True)), (None, OthersRun(False))]


def test_output_without_parent_belongs_to_the_run_that_is_on(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    assert client.routes(kernel.stream("hello\n")) == [(None, HELLO)]
    request = client.sends("execute_request")
    assert client.routes(kernel.stream("hello\n")) == [(request.msg_id, HELLO)]
    finishes(client, kernel, request)
    assert client.routes(kernel.stream("hello\n")) == [(None, HELLO)]


def test_only_an_execution_is_a_run(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    client.sends("kernel_info_request")
    assert client.routes(kernel.stream("hello\n")) == [(None, HELLO)]


def test_a_status_without_parent_is_of_the_kernel(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    client.sends("execute_request")
    for state in ("starting", "restarting", "dead"):
        assert client.routes(kernel.status(state)) == [(None, KernelStatus(state))]


def test_the_idle_of_a_start_ends_no_run(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    assert Done() not in events(client.routes(kernel.status("idle"), kernel.reply(to=request)))


def test_the_welcome_is_of_the_kernel(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    client.sends("execute_request")
    assert client.routes(kernel.says("iopub_welcome", {"subscription": ""})) == [(None, Welcomed())]


def test_output_of_a_task_of_an_earlier_run_is_background_even_while_another_runs(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    earlier = client.sends("execute_request")
    finishes(client, kernel, earlier)
    assert client.routes(kernel.stream("hello\n", to=earlier)) == [(None, HELLO)]
    client.sends("execute_request")
    assert client.routes(kernel.stream("hello\n", to=earlier)) == [(None, HELLO)]


def test_output_of_a_thread_that_names_a_finished_kernel_info_belongs_to_the_run_that_is_on(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    asked = client.sends("kernel_info_request")
    finishes(client, kernel, asked)
    assert client.routes(kernel.stream("hello\n", to=asked)) == [(None, HELLO)]
    run = client.sends("execute_request")
    assert client.routes(kernel.stream("hello\n", to=asked)) == [(run.msg_id, HELLO)]


def test_output_that_names_a_kernel_info_under_way_belongs_to_the_run_that_is_on(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    run = client.sends("execute_request")
    asked = client.sends("kernel_info_request")
    assert client.routes(kernel.stream("hello\n", to=asked)) == [(run.msg_id, HELLO)]
    finishes(client, kernel, run)
    assert client.routes(kernel.stream("hello\n", to=asked)) == [(None, HELLO)]


def test_output_that_names_a_request_nobody_waits_for_belongs_to_the_run_that_is_on(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    poke = client.session.message("shell", "kernel_info_request")  # sent without expecting the answer
    run = client.sends("execute_request")
    assert client.routes(kernel.stream("hello\n", to=poke)) == [(run.msg_id, HELLO)]
    assert client.routes(kernel.reply(to=poke), kernel.status("idle", to=poke)) == []


def test_late_replies_and_statuses_are_ignored(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    client.router.forget(request.msg_id)
    late = kernel.reply(to=request), kernel.status("idle", to=request)
    assert client.routes(*late) == []
    assert client.routes(kernel.stream("hello\n", to=request)) == [(None, HELLO)]


def test_a_late_update_is_told_to_the_kernel(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    finishes(client, kernel, request)
    updated = Updated({"text/plain": "new"}, {}, "d")
    assert client.routes(kernel.update("new", to=request, display_id="d")) == [(None, updated)]


def test_input_is_asked_of_the_run_with_the_header_to_answer_to(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    request = client.sends("execute_request")
    asked = kernel.says("input_request", {"prompt": "? ", "password": True}, to=request, channel="stdin")
    assert client.routes(asked) == [(request.msg_id, InputAsked("? ", True, asked.header))]


def test_an_input_request_that_says_nothing_asks_without_prompt(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    asked = kernel.says("input_request", to=client.sends("execute_request"), channel="stdin")
    assert events(client.routes(asked)) == [InputAsked("", False, asked.header)]


def test_input_for_a_run_that_is_over_is_not_asked(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    finishes(client, kernel, request)
    assert client.routes(kernel.says("input_request", {"prompt": ""}, to=request, channel="stdin")) == []


def test_a_comm_message_belongs_to_its_comm_whatever_its_parent(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    client.router.comm_opened("c")
    ours, over = client.sends("execute_request"), client.sends("execute_request")
    finishes(client, kernel, over)
    foreign = ScriptedClient("somebody else").sends("execute_request")
    for parent in (ours, over, foreign, None):
        message = kernel.says("comm_msg", {"comm_id": "c", "data": {"n": 1}}, to=parent, buffers=[b"x"])
        assert client.routes(message) == [("c", CommMessage("c", {"n": 1}, [b"x"]))]


def test_a_closed_comm_hears_nothing_more(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    client.router.comm_opened("c")
    closed = kernel.says("comm_close", {"comm_id": "c", "data": {}})
    assert client.routes(closed) == [("c", CommClosed("c", {}))]
    assert client.routes(closed, kernel.says("comm_msg", {"comm_id": "c"})) == []


def test_messages_of_a_comm_nobody_wants_are_ignored(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    run = client.sends("execute_request")
    assert client.routes(kernel.says("comm_msg", {"comm_id": "widget"}, to=run)) == []
    assert not client.router.dropped


def test_a_comm_that_the_kernel_opens_is_told(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    content = {"comm_id": "c", "target_name": "t", "data": {"n": 1}}
    opened = kernel.says("comm_open", content, to=client.sends("execute_request"), buffers=[b"x"])
    assert client.routes(opened) == [(None, CommOpened("c", "t", {"n": 1}, [b"x"]))]


def test_another_session_of_the_kernel_means_that_it_was_replaced(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    other = ScriptedKernel("another process")
    assert client.routes(kernel.status("starting"), kernel.status("starting"))[1:] == [
        (None, KernelStatus("starting"))
    ]
    assert client.routes(other.status("starting")) == [
        (None, KernelReplaced()),
        (None, KernelStatus("starting")),
    ]
    assert client.routes(other.status("starting")) == [(None, KernelStatus("starting"))]


def test_a_replaced_kernel_is_noticed_by_any_message(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    client.routes(kernel.status("starting"))
    foreign = ScriptedClient("somebody else").sends("execute_request")
    replaced = ScriptedKernel("another process").status("busy", to=foreign)
    assert client.routes(replaced) == [(None, KernelReplaced()), (None, OthersRun(True))]


@pytest.mark.parametrize("session", [None, 1, ["kernel"], ""])
def test_a_header_without_session_replaces_no_kernel(
    client: ScriptedClient, kernel: ScriptedKernel, session: object
) -> None:
    client.routes(kernel.status("starting"))
    header = {"msg_type": "status", "msg_id": "1", "session": session}
    message = Message("iopub", header, content={"execution_state": "starting"})
    assert client.routes(message, kernel.status("starting")) == [(None, KernelStatus("starting"))] * 2


def test_a_kernel_that_echoes_the_session_of_whoever_asked_is_not_replaced(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    # IJulia does: msg_pub() and msg_reply() in its src/msg.jl.
    others = ScriptedClient("somebody else")
    client.routes(kernel.status("starting"))
    for asking in (client, others, client, others):
        request = asking.sends("execute_request")
        echo = ScriptedKernel(asking.session.session_id).status("busy", to=request)
        assert KernelReplaced() not in events(client.routes(echo))


def test_a_kernel_may_leave_out_what_a_client_can_do_without(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    request = client.sends("execute_request")
    assert events(
        client.routes(
            kernel.says("execute_input", to=request),
            kernel.says("stream", {"text": "hello\n"}, to=request),
            kernel.says("display_data", {"data": {"text/plain": "1"}}, to=request),
            kernel.says("execute_result", {"data": {"text/plain": "2"}}, to=request),
            kernel.says("error", to=request),
            kernel.says("execute_reply", to=request, channel="shell"),
        )
    ) == [
        Started(None),
        HELLO,
        Displayed({"text/plain": "1"}, {}),
        Displayed({"text/plain": "2"}, {}, is_main_result=True),
        Failed("Error", "", ""),
        Replied("ok", {}),
    ]


def test_the_old_name_of_aborted_is_understood(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    reply = kernel.reply(to=client.sends("execute_request"), status="abort")
    assert events(client.routes(reply)) == [Replied("aborted", {"status": "abort"})]


def test_lone_surrogates_become_question_marks(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    request = client.sends("execute_request")
    failed = {"ename": "\ud800E", "evalue": "\udfff", "traceback": ["é\udc80"]}
    asked = kernel.says("input_request", {"prompt": "\ud800? "}, to=request, channel="stdin")
    assert events(
        client.routes(kernel.stream("é\ud800\n", to=request), kernel.says("error", failed, to=request), asked)
    ) == [Streamed("é?\n", False), Failed("?E", "?", "é?"), InputAsked("?? ", False, asked.header)]


@pytest.mark.parametrize(
    ("channel", "msg_type", "content"),
    [
        ("iopub", "status", {}),
        ("iopub", "status", {"execution_state": 1}),
        ("iopub", "stream", {}),
        ("iopub", "stream", {"name": "stdout", "text": None}),
        ("iopub", "stream", {"name": "stdout", "text": ["x"]}),
        ("iopub", "stream", {"name": "stdin", "text": "x"}),
        ("iopub", "stream", {"name": None, "text": "x"}),
        ("iopub", "display_data", {"data": []}),
        ("iopub", "display_data", {"data": None}),
        ("iopub", "display_data", {"data": {}, "metadata": "x"}),
        ("iopub", "execute_result", {"data": "x"}),
        ("iopub", "update_display_data", {"data": 1, "transient": {"display_id": "d"}}),
        ("iopub", "comm_open", {"comm_id": 1}),
        ("iopub", "comm_open", {"comm_id": "c", "target_name": None}),
        ("iopub", "comm_msg", {}),
        ("iopub", "comm_close", {"comm_id": {}}),
        ("stdin", "input_request", {"prompt": 1}),
        ("shell", "execute_reply", {"status": "fine"}),
        ("shell", "execute_reply", {"status": None}),
        ("control", "kernel_info_reply", {"status": {"ok": True}}),
    ],
)
def test_malformed_content_is_dropped_and_counted(
    client: ScriptedClient,
    kernel: ScriptedKernel,
    channel: Channel,
    msg_type: str,
    content: dict[str, object],
) -> None:
    request = client.sends("execute_request")
    for parent in (request, None):
        assert client.routes(kernel.says(msg_type, content, to=parent, channel=channel)) == []
    assert client.router.dropped == {"malformed": 2}


@pytest.mark.parametrize(
    ("msg_type", "content", "event"),
    [
        ("execute_input", {"execution_count": "1"}, Started(None)),
        ("execute_input", {"execution_count": True}, Started(None)),
        ("execute_result", {"data": {}, "execution_count": []}, Displayed({}, {}, is_main_result=True)),
        ("display_data", {"data": {}, "transient": None}, Displayed({}, {})),
        ("display_data", {"data": {}, "transient": {"display_id": 1}}, Displayed({}, {})),
        ("error", {"ename": 1, "evalue": [], "traceback": "x"}, Failed("Error", "", "")),
        ("error", {"ename": "E", "traceback": ["a", "b"]}, Failed("E", "", "a\nb")),
    ],
)
def test_a_field_that_says_nothing_leaves_the_rest_of_its_message_valid(
    client: ScriptedClient, kernel: ScriptedKernel, msg_type: str, content: dict[str, object], event: Event
) -> None:
    message = kernel.says(msg_type, content, to=client.sends("execute_request"))
    assert events(client.routes(message)) == [event]


def test_an_update_that_names_no_display_updates_none(client: ScriptedClient, kernel: ScriptedKernel) -> None:
    message = kernel.says("update_display_data", {"data": {}}, to=client.sends("execute_request"))
    assert client.routes(message) == []


@pytest.mark.parametrize("channel", ["iopub", "shell", "control", "stdin"])
@pytest.mark.parametrize("msg_type", ["", "debug_event", "shutdown_request", "of_the_future"])
def test_unknown_message_types_are_ignored(
    client: ScriptedClient, kernel: ScriptedKernel, channel: Channel, msg_type: str
) -> None:
    request = client.sends("execute_request")
    for parent in (request, None):
        assert client.routes(kernel.says(msg_type, {"status": "ok"}, to=parent, channel=channel)) == []
    assert not client.router.dropped


@pytest.mark.parametrize("parent_header", [{"msg_id": 1}, {"msg_id": []}, {"session": "client"}, {"x": None}])
def test_a_parent_that_names_nothing_raises_nothing(
    client: ScriptedClient, kernel: ScriptedKernel, parent_header: dict[str, object]
) -> None:
    client.sends("execute_request")
    for message in (kernel.stream("x"), kernel.status("idle"), kernel.says("execute_reply", channel="shell")):
        client.routes(Message(message.channel, message.header, parent_header, {}, message.content))


def test_every_published_byte_is_counted_whoever_it_is_for(
    client: ScriptedClient, kernel: ScriptedKernel
) -> None:
    foreign = ScriptedClient("somebody else").sends("execute_request")
    for parent in (client.sends("execute_request"), foreign, None):
        client.routes(kernel.stream("é\n", to=parent), kernel.stream("x", to=parent, name="stderr"))
    assert client.router.published == [9, 3]


def test_message_ids_are_never_used_twice(client: ScriptedClient) -> None:
    assert len({client.sends("kernel_info_request").msg_id for _ in range(10)}) == 10
