"""The way to the guest of one kernel: a comm on a subshell of its own, opened when it is first needed.

It lives in the I/O thread, as part of a :class:`code_sandboxes.kernel.Kernel`, which sends for it and tells
it what has come. Nothing that comes is believed before it has the right shape, was asked for, and is no more
than there is room for. What the messages look like is written in ``guest/calls.py``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from code_sandboxes.errors import SandboxConnectionError
from code_sandboxes.guest.calls import PATIENCE, cost
from code_sandboxes.guest.comms import FEATURE, SUBSHELLS, TARGET
from code_sandboxes.guest_boot import boot_content, boot_metadata
from code_sandboxes.guest_values import error_of
from code_sandboxes.inbox import Inbox
from code_sandboxes.kernel_process import KernelInfo
from code_sandboxes.protocol.events import CommClosed, CommMessage, Event, Idle, Replied, failure, json_size
from code_sandboxes.protocol.messages import Message, Session
from code_sandboxes.transports.errors import MessageTooLargeError
from code_sandboxes.transports.loop import Loop, Timer

__all__ = ["Answered", "Channel", "ChannelEnded", "GuestCall", "GuestLink", "Refused", "Told"]

Buffers = Sequence[bytes | memoryview]

# How long a call may go on after nobody waits for it any more, before the link is taken for stuck.
_GRACE = 1.0

_ALIVE = PATIENCE / 4


@dataclass(frozen=True, slots=True)
class Answered(Event):
    """What a call has returned; its shape is not checked."""

    call: GuestCall
    value: object
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """A call has no answer, for this reason."""

    call: GuestCall
    error: Exception


@dataclass(frozen=True, slots=True)
class Told(Event):
    """Something that a call has set going tells something; its shape is not checked."""

    channel: Channel
    data: object
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class ChannelEnded(Event):
    """The last of a channel: what the guest says at its end, or why it was cut off."""

    channel: Channel
    data: object
    error: Exception | None


class Conversation:
    """What the guest keeps for the calls of one link (open files, transfers) is there as long as this.

    Attributes:
        error: why it is over.
    """

    error: Exception | None = None


class GuestCall:
    """One call of a function in the guest.

    Args:
        name: of the function.
        arguments: JSON values.
        buffers: go along; must not change before there is an answer.
        inbox: gets :class:`Answered` or :class:`Refused`; may be the inbox of many calls.
        channel: for what comes beside the answer, and after it.
        follows: the call that has made what this one names. It is not asked of a guest that never had that.
    """

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, object],
        buffers: Buffers,
        inbox: Inbox,
        channel: Channel | None = None,
        follows: GuestCall | None = None,
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.buffers = buffers
        self.inbox = inbox
        self.channel = channel
        self.follows = follows
        self.conversation: Conversation | None = None
        self.number = 0
        self.is_taken = self.is_over = self.was_sent_again = False

    @property
    def why_in_vain(self) -> Exception | None:
        """Why what it names is gone."""
        made_in = None if self.follows is None else self.follows.conversation
        return None if made_in is None else made_in.error


class Channel:
    """What a call has set going tells more on it, as much as it was granted.

    Args:
        receive: gets each :class:`Told` and one :class:`ChannelEnded`, in the I/O thread; must not block.
        credit: bytes that may come before more are granted, see :func:`code_sandboxes.guest.calls.cost`.
        most_json: bytes, about, of the JSON value of one message, which costs nothing by itself.
    """

    def __init__(self, receive: Callable[[Event], object], credit: int, most_json: int = 256) -> None:
        self.receive = receive
        self.credit = credit
        self.most_json = most_json
        self.number = 0
        self.is_over = False


class Sender(Protocol):
    """Sends a request to the kernel; with *expect*, its answers are told."""

    def __call__(self, message: Message, *, expect: bool = False) -> None: ...


_numbers = itertools.count(1)
"""Of calls and channels: no link may take another's for its own."""


class _State(Enum):
    CLOSED = "closed"
    ASKING_SUBSHELL = "asking for a subshell"
    BOOTING = "bringing the guest"
    OPENING = "opening"
    OPEN = "open"


class GuestLink:
    """Calls functions of the guest, and hears from it.

    Args:
        loop: the I/O thread.
        session: makes the messages.
        info: what the kernel can do.
        send: sends them.
        listen: told the id of a comm whose messages are to come here.
        forget: told the id of a request for which nothing more is expected.
    """

    def __init__(
        self,
        loop: Loop,
        session: Session,
        info: KernelInfo,
        send: Sender,
        listen: Callable[[str], None],
        forget: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._session = session
        self._has_subshells = SUBSHELLS in info.supported_features
        self._has_guest = FEATURE in info.supported_features
        self._can_boot = info.language == "python"
        self._send = send
        self._listen = listen
        self._forget = forget
        self._state = _State.CLOSED
        self._comm_id = ""
        self._subshell_id: str | None = None
        self._suspected: GuestCall | None = None
        self._probe_id = ""
        self._waiting: list[GuestCall] = []
        self._calls: dict[int, GuestCall] = {}
        self._channels: dict[int, Channel] = {}
        self._conversation = Conversation()
        self._carriers: dict[str, GuestCall | None] = {}
        self._opening_id = ""
        self._alive: Timer | None = None

    # What operations ask.

    def call(self, call: GuestCall) -> None:
        call.number = next(_numbers)
        if call.channel is not None:
            call.channel.number = call.number
        self._call(call)

    def _call(self, call: GuestCall) -> None:
        if (error := call.why_in_vain) is not None:
            self._refuse(call, error)
            return
        if self._state is _State.OPEN:
            self._send_call(call)
            return
        self._waiting.append(call)
        if self._state is _State.CLOSED:
            self._open()

    def cancel(self, call: GuestCall) -> None:
        """Nobody waits for its answer any more."""
        if call in self._waiting:
            self._waiting.remove(call)
        elif call.number in self._calls:
            self._tell({"cancel": call.number})
            if call.is_taken:  # its answer is not sent any more
                del self._calls[call.number]
            elif self._subshell_id is not None:  # else it is behind the cell that runs
                self._loop.call_later(_GRACE, lambda: self._suspect(call))
        call.is_over = True

    def grant(self, channel: Channel, credit: int) -> None:
        if not channel.is_over:
            channel.credit += credit
            self._tell({"grant": channel.number, "bytes": credit})

    def close_channel(self, channel: Channel) -> None:
        """Nobody listens any more."""
        if self._channels.get(channel.number) is channel:
            del self._channels[channel.number]
            channel.is_over = True
            self._tell({"close": channel.number})

    def lost(self, error: Exception) -> None:
        """The kernel is gone, and all that was going on in it."""
        self._reset()
        calls = [*self._calls.values(), *self._waiting]
        self._calls.clear()
        self._waiting.clear()
        for call in calls:
            self._refuse(call, error)
        self._end_conversation(error)

    def close(self) -> None:
        """Have no more to do with the guest, which may go on."""
        if self._state is _State.OPEN:
            content = {"comm_id": self._comm_id, "data": {}}
            self._send(self._session.message("shell", "comm_close", content, subshell_id=self._subshell_id))
        self._delete_subshell()
        self.lost(SandboxConnectionError("this program has let go of the sandbox"))

    def _delete_subshell(self) -> None:
        if self._subshell_id is not None:
            content = {"subshell_id": self._subshell_id}
            self._send(self._session.message("control", "delete_subshell_request", content))
            self._subshell_id = None

    # The way there.

    def _open(self) -> None:
        if not (self._has_guest or self._can_boot):
            self.lost(SandboxConnectionError("this kernel has nothing that serves files and commands"))
        elif self._has_subshells and self._subshell_id is None:
            self._state = _State.ASKING_SUBSHELL
            self._ask(self._session.message("control", "create_subshell_request"))
        elif not self._has_guest:
            self._boot()
        else:
            self._open_comm()

    def _ask(self, request: Message) -> None:
        self._opening_id = request.msg_id
        self._send(request, expect=True)

    def _subshell_replied(self, content: Mapping[str, object]) -> None:
        subshell_id = content.get("subshell_id")
        # Without one, its calls are answered all the same, when no cell runs.
        self._has_subshells = isinstance(subshell_id, str)
        self._subshell_id = subshell_id if isinstance(subshell_id, str) else None
        self._open()

    def _not_replied(self, request_id: str) -> None:
        """Code in the kernel may have taken away what replies."""
        if self._opening_id == request_id and self._state is _State.ASKING_SUBSHELL:
            self._subshell_replied({})
        elif self._opening_id == request_id and self._state is _State.BOOTING:
            error = "files and commands could not be set up: the kernel did not answer"
            self.lost(SandboxConnectionError(error))

    def _boot(self) -> None:
        self._state = _State.BOOTING
        self._ask(
            self._session.message(
                "shell",
                "execute_request",
                boot_content(),
                metadata=boot_metadata(),
                subshell_id=self._subshell_id,
            )
        )

    def _booted(self, reply: Replied) -> None:
        if reply.status == "ok":
            self._has_guest = True
            self._open_comm()
        else:
            why = failure(reply.content)
            self.lost(
                SandboxConnectionError(
                    f"files and commands could not be set up in this kernel: {why.name}: {why.value}"
                )
            )

    def _open_comm(self) -> None:
        self._state = _State.OPENING
        self._comm_id = os.urandom(16).hex()
        self._listen(self._comm_id)
        content = {"comm_id": self._comm_id, "target_name": TARGET, "data": {}}
        self._ask(self._session.message("shell", "comm_open", content, subshell_id=self._subshell_id))

    def _not_opened(self) -> None:
        if self._can_boot:  # the code in the kernel may have taken away what was there
            self._can_boot = False
            self._boot()
        else:
            self.lost(SandboxConnectionError("the kernel did not open a way for files and commands"))

    def _opened(self) -> None:
        self._state = _State.OPEN
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            self._send_call(call)

    def _send_call(self, call: GuestCall) -> None:
        message: dict[str, object] = {"call": call.number, "name": call.name, "args": call.arguments}
        if call.channel is not None:
            message |= {"channel": call.number, "credit": call.channel.credit}
            self._channels[call.number] = call.channel
            self._stay_alive()
        call.conversation = self._conversation
        self._calls[call.number] = call
        try:
            self._carriers[self._tell(message, call.buffers)] = call
        except MessageTooLargeError as error:
            del self._calls[call.number]
            self._channels.pop(call.number, None)
            self._refuse(call, error)

    def _tell(self, data: Mapping[str, object], buffers: Buffers = ()) -> str:
        content = {"comm_id": self._comm_id, "data": data}
        request = self._session.message(
            "shell", "comm_msg", content, buffers=buffers, subshell_id=self._subshell_id
        )
        self._send(request, expect=True)
        self._carriers[request.msg_id] = None
        return request.msg_id

    def _stay_alive(self) -> None:
        if self._alive is None:
            self._alive = self._loop.call_later(_ALIVE, self._is_alive)

    def _is_alive(self) -> None:
        self._alive = None
        if self._channels and self._state is _State.OPEN:
            self._tell({"alive": True})
            self._stay_alive()

    # What comes.

    def receive(self, recipient: str, event: Event) -> bool:
        """Take *event*, if it is for this; returns whether it was."""
        if recipient == self._comm_id and self._comm_id:
            if isinstance(event, CommMessage):
                self._received(event)
            elif isinstance(event, CommClosed) and self._state is _State.OPEN:
                self._reopen()
            return True
        if recipient == self._opening_id and self._opening_id:
            if self._state is _State.ASKING_SUBSHELL and isinstance(event, Replied):
                self._forget(recipient)
                self._subshell_replied(event.content)
            elif self._state is _State.BOOTING and isinstance(event, Replied):
                self._forget(recipient)
                self._booted(event)
            elif self._state is not _State.OPENING and isinstance(event, Idle):
                # The reply comes on another socket, and may be later.
                self._loop.call_later(_GRACE, lambda: self._not_replied(recipient))
            elif isinstance(event, Idle):
                self._forget(recipient)
                self._not_opened()
            return True
        if recipient == self._probe_id and self._probe_id:
            if isinstance(event, Replied):
                self._forget(recipient)
                self._probed(event.content)
            return True
        if recipient in self._carriers:
            if isinstance(event, Idle):
                self._delivered(recipient)
            return True
        return False

    def _delivered(self, msg_id: str) -> None:
        """The kernel has done all it does for this message: what has no answer by now has not been heard."""
        self._forget(msg_id)
        call = self._carriers.pop(msg_id)
        if call is not None and call.number in self._calls and not call.is_taken:
            self._reopen()

    def _reopen(self) -> None:
        """What the kernel had of this link is gone; what had not been begun is asked once more."""
        calls = list(self._calls.values())
        self._reset()
        self._delete_subshell()  # nor is it known what has become of that
        self._calls.clear()
        error = SandboxConnectionError("the code in the kernel has cut off what serves files and commands")
        self._end_conversation(error)
        for call in calls:
            if call.is_taken or call.was_sent_again or call.channel is not None:
                self._refuse(call, error)
            elif not call.is_over:
                call.was_sent_again = True
                self._call(call)

    def _suspect(self, call: GuestCall) -> None:
        """A call that nobody waits for goes on: is it stuck, or does nobody in the kernel get a turn?"""
        if self._is_going_on(call) and not self._probe_id:
            probe = self._session.message("control", "create_subshell_request")
            self._probe_id, self._suspected = probe.msg_id, call
            self._send(probe, expect=True)

    def _probed(self, content: Mapping[str, object]) -> None:
        """Others get their turn: so will the call, if it is not stuck."""
        call, self._suspected = self._suspected, None
        subshell_id = content.get("subshell_id")
        if call is not None and isinstance(subshell_id, str):
            self._loop.call_later(_GRACE, lambda: self._get_unstuck(call, subshell_id))
        else:
            self._probe_id = ""

    def _get_unstuck(self, call: GuestCall, subshell_id: str) -> None:
        """Leave the call alone with its subshell; whatever waits behind it is asked again in another one."""
        self._probe_id = ""
        if not self._is_going_on(call):
            content = {"subshell_id": subshell_id}
            self._send(self._session.message("control", "delete_subshell_request", content))
            return
        self._subshell_id = subshell_id
        del self._calls[call.number]
        self._tell({"cancel": call.number})
        for waiting in list(self._calls.values()):
            if not waiting.is_taken:  # the guest knows it by its number, should it have come through
                self._send_call(waiting)
        # Of two messages for one call, the guest does not care for the second.
        self._carriers = dict.fromkeys(self._carriers)

    def _is_going_on(self, call: GuestCall) -> bool:
        return self._state is _State.OPEN and self._calls.get(call.number) is call and not call.is_taken

    def _received(self, event: CommMessage) -> None:
        data = event.data if isinstance(event.data, dict) else {}
        if "channel" in data:
            self._told(data, event.buffers)
        elif "open" in data:
            if self._state is _State.OPENING:
                self._opened()
        elif "closed" in data:
            self._reopen()
        else:
            self._answered(data, event.buffers)

    def _answered(self, data: Mapping[str, object], buffers: Buffers) -> None:
        kind = next((kind for kind in ("answer", "failure", "taken") if kind in data), "")
        number = data.get(kind)
        call = self._calls.get(number) if isinstance(number, int) else None
        if call is None:  # nobody has asked, or does not want to know any more
            return
        if kind == "taken":
            call.is_taken = True
            if call.is_over:
                del self._calls[call.number]
            return
        del self._calls[call.number]
        if kind == "failure":
            self._refuse(call, error_of(data.get("error"), call.name))
            if call.channel is not None:
                self._channels.pop(call.number, None)
        elif not call.is_over:
            call.is_over = True
            call.inbox.put(Answered(call, data.get("value"), buffers))

    def _refuse(self, call: GuestCall, error: Exception) -> None:
        if not call.is_over:
            call.is_over = True
            call.inbox.put(Refused(call, error))

    def _told(self, data: Mapping[str, object], buffers: Buffers) -> None:
        number = data.get("channel")
        channel = self._channels.get(number) if isinstance(number, int) else None
        if channel is None:
            return
        if "end" in data:
            self._end_channel(channel, data["end"], None)
            return
        channel.credit -= cost(buffers)
        if channel.credit < 0 or json_size(data.get("data")) > channel.most_json:
            error = SandboxConnectionError("the sandbox sent more than it was granted")
            self._tell({"close": channel.number})
            self._end_channel(channel, None, error)
        else:
            channel.receive(Told(channel, data.get("data"), buffers))

    def _end_channel(self, channel: Channel, data: object, error: Exception | None) -> None:
        self._channels.pop(channel.number, None)
        channel.is_over = True
        channel.receive(ChannelEnded(channel, data, error))

    def _end_conversation(self, error: Exception) -> None:
        self._conversation.error = error
        self._conversation = Conversation()
        for channel in list(self._channels.values()):
            self._end_channel(channel, None, error)

    def _reset(self) -> None:
        self._state = _State.CLOSED
        self._comm_id = self._opening_id = self._probe_id = ""
        for msg_id in self._carriers:
            self._forget(msg_id)
        self._carriers.clear()
