"""The way to a guest, message by message: a kernel that says what a test tells it to say, and no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import pytest
from hypothesis import given, strategies as st

from code_sandboxes.errors import SandboxConnectionError, SandboxExecutionError
from code_sandboxes.guest.comms import FEATURE, SUBSHELLS, TARGET
from code_sandboxes.guest_link import Answered, Channel, ChannelEnded, GuestCall, GuestLink, Refused, Told
from code_sandboxes.inbox import Inbox
from code_sandboxes.kernel_process import KernelInfo
from code_sandboxes.protocol.events import Event
from code_sandboxes.protocol.messages import Message, Session
from code_sandboxes.protocol.router import Router
from code_sandboxes.transports.loop import Loop
from tests.scripted import ScriptedKernel, quick


class Clock:
    """In the place of the I/O thread: what is to happen later happens when a test says so."""

    def __init__(self) -> None:
        self._later: list[Callable[[], object]] = []

    def call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        self._later.append(callback)

    def passes(self) -> None:
        later, self._later = self._later, []
        for callback in later:
            callback()


class ScriptedGuest:
    """A link, and the kernel that it leads to."""

    def __init__(self, *features: str, language: str = "python") -> None:
        self.sent: list[Message] = []
        self.clock = Clock()
        self.kernel = ScriptedKernel()
        session = Session("client", lambda: "2030-01-01T00:00:00Z")
        self.router = Router(session)
        self.link = GuestLink(
            cast(Loop, self.clock),
            session,
            KernelInfo(language, features),
            self._send,
            self.router.comm_opened,
            self.router.forget,
        )

    def _send(self, message: Message, *, expect: bool = False) -> None:
        self.sent.append(message)
        if expect:
            self.router.sent(message)

    def receives(self, *messages: Message) -> None:
        for message in messages:
            for recipient, event in self.router.receive(message):
                if recipient is not None:
                    self.link.receive(recipient, event)

    def latest(self, msg_type: str) -> Message:
        return [message for message in self.sent if message.msg_type == msg_type][-1]

    def calls(
        self, name: str = "files.stat", channel: Channel | None = None, follows: GuestCall | None = None
    ) -> GuestCall:
        call = GuestCall(name, {"path": "x"}, (), Inbox(), channel, follows)
        self.link.call(call)
        return call

    @property
    def comm_id(self) -> object:
        return self.latest("comm_open").content["comm_id"]

    def says(self, data: object, *buffers: bytes) -> None:
        content = {"comm_id": self.comm_id, "data": data}
        self.receives(self.kernel.says("comm_msg", content, buffers=buffers))

    def gives_subshell(self, subshell_id: str = "S") -> None:
        request = self.latest("create_subshell_request")
        self.receives(self.kernel.reply(to=request, subshell_id=subshell_id))
        self.is_idle(request)

    def opens(self) -> None:
        """Whatever it takes until calls go out."""
        if self.sent[-1].msg_type == "create_subshell_request":
            self.gives_subshell()
        self.says({"open": True})
        self.is_idle(self.latest("comm_open"))

    def is_idle(self, request: Message) -> None:
        self.receives(self.kernel.status("idle", to=request))

    @property
    def told(self) -> list[object]:
        """The data of all that was sent on comms."""
        return [message.content["data"] for message in self.sent if message.msg_type == "comm_msg"]


def outcome(call: GuestCall) -> object:
    event = call.inbox.take()
    return (
        event.value if isinstance(event, Answered) else event.error if isinstance(event, Refused) else event
    )


@pytest.fixture
def guest() -> ScriptedGuest:
    """One whose link is open."""
    guest = ScriptedGuest(SUBSHELLS, FEATURE)
    call = guest.calls()
    guest.opens()
    guest.says({"answer": call.number, "value": None})
    guest.is_idle(guest.sent[-1])
    return guest


# The way there


def test_a_subshell_is_asked_for_and_named_in_every_message() -> None:
    guest = ScriptedGuest(SUBSHELLS, FEATURE)
    guest.calls()
    guest.calls()
    assert [message.msg_type for message in guest.sent] == ["create_subshell_request"]
    guest.opens()

    assert [message.msg_type for message in guest.sent[1:]] == ["comm_open", "comm_msg", "comm_msg"]
    assert guest.latest("comm_open").content["target_name"] == TARGET
    assert all(message.header["subshell_id"] == "S" for message in guest.sent[1:])


def test_without_subshells_the_main_shell_is_asked() -> None:
    guest = ScriptedGuest(FEATURE)
    guest.calls()
    guest.opens()

    assert [message.msg_type for message in guest.sent] == ["comm_open", "comm_msg"]
    assert not any("subshell_id" in message.header for message in guest.sent)


def test_a_subshell_that_is_refused_is_done_without() -> None:
    guest = ScriptedGuest(SUBSHELLS, FEATURE)
    guest.calls()
    request = guest.latest("create_subshell_request")
    guest.receives(guest.kernel.reply(to=request, status="error"), guest.kernel.status("idle", to=request))
    guest.opens()

    assert "subshell_id" not in guest.latest("comm_msg").header


def test_a_request_for_a_subshell_that_nobody_answers_is_not_waited_for() -> None:
    guest = ScriptedGuest(SUBSHELLS, FEATURE)
    guest.calls()
    guest.is_idle(guest.latest("create_subshell_request"))
    guest.clock.passes()
    guest.opens()

    assert "subshell_id" not in guest.latest("comm_msg").header


def test_the_guest_is_brought_to_a_python_kernel_that_has_none() -> None:
    guest = ScriptedGuest(SUBSHELLS)
    guest.calls()
    guest.gives_subshell()
    boot = guest.latest("execute_request")
    assert boot.content["silent"] is True
    assert boot.content["store_history"] is False
    assert boot.header["subshell_id"] == "S"
    guest.receives(guest.kernel.reply(to=boot), guest.kernel.status("idle", to=boot))
    guest.opens()

    assert len(guest.told) == 1


def test_what_keeps_the_guest_from_being_brought_is_told() -> None:
    guest = ScriptedGuest()
    call = guest.calls()
    boot = guest.latest("execute_request")
    guest.receives(guest.kernel.reply(to=boot, status="error", ename="ImportError", evalue="no IPython"))

    assert "ImportError: no IPython" in str(outcome(call))


def test_a_kernel_of_another_language_has_no_guest() -> None:
    call = ScriptedGuest(SUBSHELLS, language="bash").calls()

    assert isinstance(outcome(call), SandboxConnectionError)


def test_a_target_that_was_taken_away_is_brought_once_more_and_not_for_ever() -> None:
    guest = ScriptedGuest(FEATURE)
    call = guest.calls()
    guest.is_idle(guest.latest("comm_open"))
    boot = guest.latest("execute_request")
    guest.receives(guest.kernel.reply(to=boot), guest.kernel.status("idle", to=boot))
    guest.is_idle(guest.latest("comm_open"))

    assert isinstance(outcome(call), SandboxConnectionError)
    assert [message.msg_type for message in guest.sent] == ["comm_open", "execute_request", "comm_open"]


# Answers


def test_an_answer_is_that_of_the_call_that_it_names(guest: ScriptedGuest) -> None:
    calls = [guest.calls() for _ in range(3)]
    for call in reversed(calls):
        guest.says({"answer": call.number, "value": f"of {call.number}"}, b"x" * call.number)

    for call in calls:
        event = call.inbox.take()
        assert isinstance(event, Answered)
        assert event.value == f"of {call.number}"
        assert event.buffers == (b"x" * call.number,)


def test_only_the_first_answer_counts(guest: ScriptedGuest) -> None:
    call = guest.calls()
    guest.says({"answer": call.number, "value": 1})
    guest.says({"answer": call.number, "value": 2})
    guest.says({"failure": call.number, "error": {}})

    assert outcome(call) == 1
    assert call.inbox.take() is None


json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["answer", "failure", "taken", "channel", "end", "open", "error", "kind", "errno"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@quick
@given(st.lists(json, max_size=6))
def test_no_message_of_the_guest_disturbs_the_link(messages: list[object]) -> None:
    guest = ScriptedGuest(FEATURE)
    told: list[Event] = []
    call = guest.calls(channel=Channel(told.append, 10_000))
    guest.opens()
    for data in messages:
        guest.says(data, b"buffer")

    assert call.inbox.take() is None or call.inbox.take() is None  # one answer at most
    assert sum(isinstance(event, ChannelEnded) for event in told) <= 1
    another = guest.calls()
    guest.says({"answer": another.number, "value": "works"})
    assert outcome(another) == "works"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (
            {"kind": "OSError", "errno": "ENOENT", "message": "?", "path": "x"},
            FileNotFoundError(2, "No such file or directory", "x"),
        ),
        ({"kind": "OSError", "errno": "EACCES"}, PermissionError(13, "Permission denied")),
        (
            {"kind": "OSError", "errno": "ENOENT", "path": {"hex": "61ff"}},
            FileNotFoundError(2, "?", "a\udcff"),
        ),
        ({"kind": "OSError", "errno": "EWHAT", "message": "m"}, OSError("EWHAT: m")),
        ({"kind": "ValueError", "message": "m"}, ValueError("m")),
        ({"kind": "SystemExit", "message": "m"}, SandboxExecutionError("?")),
        ({"kind": "OSError", "errno": "ENOENT", "path": {"hex": "?"}}, SandboxConnectionError("?")),
        ({"kind": 3}, SandboxExecutionError("?")),
        ("nonsense", SandboxExecutionError("?")),
    ],
)
def test_a_failure_is_raised_as_pythons_own_error(
    guest: ScriptedGuest, error: object, raised: Exception
) -> None:
    call = guest.calls()
    guest.says({"failure": call.number, "error": error})
    failure = outcome(call)

    assert type(failure) is type(raised)
    if isinstance(raised, OSError) and not isinstance(raised, SandboxConnectionError):
        assert isinstance(failure, OSError)
        assert (failure.errno, failure.filename) == (raised.errno, raised.filename)


# What is named by a later call


def test_what_an_earlier_kernel_had_open_is_not_asked_of_the_next(guest: ScriptedGuest) -> None:
    opening = guest.calls(channel=Channel(print, 0))
    guest.says({"answer": opening.number, "value": None})
    death = SandboxConnectionError("the kernel died")
    guest.link.lost(death)
    next_one = ScriptedGuest(FEATURE)
    late = GuestCall("files.read_on", {"handle": opening.number}, (), Inbox(), follows=opening)
    next_one.link.call(late)

    assert outcome(late) is death
    assert next_one.sent == []


def test_what_was_open_before_the_link_was_cut_off_is_not_asked_again(guest: ScriptedGuest) -> None:
    opening = guest.calls()
    guest.says({"answer": opening.number, "value": None})
    under_way = guest.calls(follows=opening)
    guest.says({"closed": True})
    late = guest.calls(follows=opening)

    assert [type(outcome(call)) for call in (under_way, late)] == [SandboxConnectionError] * 2


def test_what_is_open_is_named_by_any_number_of_calls(guest: ScriptedGuest) -> None:
    opening = guest.calls()
    early = guest.calls(follows=opening)
    for call in (opening, early):
        guest.says({"answer": call.number, "value": "works"})
    late = guest.calls(follows=opening)
    guest.says({"answer": late.number, "value": "works"})

    assert [outcome(call) for call in (early, late)] == ["works"] * 2


# What is not answered


def test_a_call_that_was_not_heard_is_made_once_more_on_a_new_way(guest: ScriptedGuest) -> None:
    call = guest.calls()
    guest.is_idle(guest.sent[-1])
    guest.opens()
    guest.says({"answer": call.number, "value": "heard"})

    assert outcome(call) == "heard"
    assert len({str(m.content["comm_id"]) for m in guest.sent if m.msg_type == "comm_open"}) == 2


def test_a_call_that_is_not_heard_the_second_time_is_given_up(guest: ScriptedGuest) -> None:
    call = guest.calls()
    guest.is_idle(guest.sent[-1])
    guest.opens()
    guest.is_idle(guest.latest("comm_msg"))

    assert isinstance(outcome(call), SandboxConnectionError)


def test_a_call_that_was_begun_is_not_made_again(guest: ScriptedGuest) -> None:
    begun, not_heard = guest.calls(), guest.calls()
    guest.says({"taken": begun.number})
    guest.is_idle(guest.sent[-2])
    assert begun.inbox.take() is None
    guest.is_idle(guest.sent[-1])
    guest.opens()

    assert isinstance(outcome(begun), SandboxConnectionError)
    assert not_heard.inbox.take() is None


def test_the_death_of_the_kernel_ends_every_call_and_channel(guest: ScriptedGuest) -> None:
    told: list[Event] = []
    calls = [guest.calls(), guest.calls(channel=Channel(told.append, 1000))]
    guest.link.lost(SandboxConnectionError("it died"))

    assert [str(outcome(call)) for call in calls] == ["it died", "it died"]
    (ended,) = told
    assert isinstance(ended, ChannelEnded)
    assert str(ended.error) == "it died"


def test_a_call_nobody_waits_for_is_stopped_and_its_answer_dropped(guest: ScriptedGuest) -> None:
    call = guest.calls()
    guest.link.cancel(call)
    assert guest.told[-1] == {"cancel": call.number}
    guest.says({"answer": call.number, "value": 1})
    guest.clock.passes()

    assert call.inbox.take() is None
    assert guest.sent[-1].msg_type == "comm_msg"  # no new way was needed


def test_a_call_that_does_not_stop_is_left_behind_with_its_subshell(guest: ScriptedGuest) -> None:
    told, channel = listening(guest, 1000)
    guest.says({"answer": channel.number, "value": "begun"})
    stuck, behind_it = guest.calls(), guest.calls()
    guest.link.cancel(stuck)
    guest.clock.passes()
    guest.gives_subshell("another")
    guest.clock.passes()

    cancelling, again = [message for message in guest.sent if message.header.get("subshell_id") == "another"]
    assert cancelling.content["data"] == {"cancel": stuck.number}
    assert again.content["data"] == {"call": behind_it.number, "name": "files.stat", "args": {"path": "x"}}
    for message in guest.sent[-4:]:  # whichever of the two was not cared for
        guest.is_idle(message)
    guest.says({"answer": behind_it.number, "value": "works"})
    assert outcome(behind_it) == "works"
    guest.says({"channel": channel.number, "data": "still"})
    assert shown(told) == ["still"]


def test_a_call_that_is_late_since_nobody_got_a_turn_is_not_stuck(guest: ScriptedGuest) -> None:
    late = guest.calls()
    guest.link.cancel(late)
    guest.clock.passes()
    guest.gives_subshell("another")  # now others get theirs again
    guest.says({"answer": late.number, "value": 1})
    guest.clock.passes()

    assert guest.sent[-1].msg_type == "delete_subshell_request"
    guest.calls()
    assert guest.sent[-1].header["subshell_id"] == "S"


def test_without_subshells_a_call_behind_a_cell_is_not_stuck() -> None:
    guest = ScriptedGuest(FEATURE)
    call = guest.calls()
    guest.opens()
    guest.link.cancel(call)
    before = len(guest.sent)
    guest.clock.passes()

    assert len(guest.sent) == before


def test_a_link_that_the_guest_has_forgotten_ends_what_was_open_on_it(guest: ScriptedGuest) -> None:
    told, _ = listening(guest, 1000)
    guest.says({"closed": True})

    (ended,) = told
    assert isinstance(ended, ChannelEnded)


# Channels


def listening(guest: ScriptedGuest, credit: int) -> tuple[list[Event], Channel]:
    told: list[Event] = []
    channel = Channel(told.append, credit)
    guest.calls(channel=channel)
    return told, channel


def shown(told: Sequence[Event]) -> list[object]:
    return [event.data if isinstance(event, (Told, ChannelEnded)) else event for event in told]


def test_a_channel_brings_what_the_guest_tells_up_to_its_end(guest: ScriptedGuest) -> None:
    told, channel = listening(guest, 10_000)
    for message in ({"data": 1}, {"data": 2}, {"end": "over"}, {"data": 3}, {"end": "again"}):
        guest.says({"channel": channel.number, **message})

    assert shown(told) == [1, 2, "over"]


def test_more_than_was_granted_ends_a_channel(guest: ScriptedGuest) -> None:
    told, channel = listening(guest, 1000)
    guest.link.grant(channel, 1000)
    for _ in range(3):
        guest.says({"channel": channel.number, "data": "flood"}, b"x" * 700)

    assert shown(told) == ["flood", "flood", None]
    assert isinstance(told[-1], ChannelEnded)
    assert "more than it was granted" in str(told[-1].error)
    assert guest.told[-1] == {"close": channel.number}


def test_a_channel_brings_no_more_beside_the_buffers_than_was_agreed(guest: ScriptedGuest) -> None:
    told, channel = listening(guest, 10_000)
    guest.says({"channel": channel.number, "data": "x" * 300})

    assert shown(told) == [None]


def test_while_a_channel_is_open_the_guest_is_told_that_somebody_is_there(guest: ScriptedGuest) -> None:
    _, channel = listening(guest, 1000)
    guest.clock.passes()
    assert guest.told[-1] == {"alive": True}
    guest.link.close_channel(channel)
    guest.clock.passes()

    assert guest.told[-1] == {"close": channel.number}
