"""Turn kernel messages into events, request by request.

No socket, clock or thread: give it messages in any order a kernel may send them.
A request is over when its reply (shell) and its idle status (iopub) have both come;
they travel on different sockets, so either may be first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from code_sandboxes.protocol.events import (
    Cleared,
    CommClosed,
    CommMessage,
    CommOpened,
    Displayed,
    Done,
    Event,
    Failed,
    Idle,
    KernelReplaced,
    KernelStatus,
    MalformedContentError,
    OthersRun,
    Replied,
    Streamed,
    Updated,
    Welcomed,
    event_of,
    utf8_size,
)
from code_sandboxes.protocol.messages import Message, Session

__all__ = ["Routed", "Router"]

_OUTPUT = (Streamed, Displayed, Updated, Cleared, Failed)
_OF_THE_KERNEL = (KernelStatus, Welcomed)
_COMM = (CommOpened, CommMessage, CommClosed)


class Routed(NamedTuple):
    """An event, and whom it concerns: a request by its msg_id, a comm by its id, or None: the kernel.

    Output for None is background output: it appeared while none of our runs was on.
    """

    recipient: str | None
    event: Event


@dataclass(slots=True)
class _Pending:
    is_execution: bool
    replied: bool = False
    idle: bool = False


class Router:
    """Knows which requests of *session* are under way, and whose each message is.

    Args:
        kernel_session: under which the kernel spoke when it was last heard, if it has been.

    Attributes:
        kernel_session: under which the kernel speaks; None before it is heard.
        dropped: how many messages made no sense, by why.
        published: bytes of standard output and of standard error that the kernel has published.
    """

    def __init__(self, session: Session, kernel_session: object = None) -> None:
        self.kernel_session = kernel_session
        self.dropped: Counter[str] = Counter()
        self.published = [0, 0]
        self._session = session
        self._pending: dict[str, _Pending] = {}
        self._comms: set[str] = set()

    def sent(self, request: Message) -> None:
        """*request* goes out: from now on its answers are expected."""
        runs_code = request.msg_type == "execute_request" and request.content.get("silent") is not True
        self._pending[request.msg_id] = _Pending(runs_code)

    def forget(self, msg_id: str) -> None:
        """Nothing more is expected for this request; what still comes is late output."""
        self._pending.pop(msg_id, None)

    def comm_opened(self, comm_id: str) -> None:
        """We opened a comm, or want the messages of one that the kernel opened."""
        self._comms.add(comm_id)

    def receive(self, message: Message) -> Iterator[Routed]:
        """What *message* means, and for whom; a message that makes no sense is dropped and counted."""
        try:
            event = event_of(message)
        except MalformedContentError:
            self.dropped["malformed"] += 1
            return
        if self._is_replaced(message):
            yield Routed(None, KernelReplaced())
        if isinstance(event, Streamed):
            self.published[event.error] += utf8_size(event.text)
        if event is not None:
            yield from self._route(message, event)

    def _is_replaced(self, message: Message) -> bool:
        session = message.header.get("session")
        if not session or not isinstance(session, str) or session == self.kernel_session:
            return False
        if session == message.parent_header.get("session"):  # IJulia answers under the session of the asker
            return False
        known, self.kernel_session = self.kernel_session, session
        return known is not None

    def _route(self, message: Message, event: Event) -> Iterator[Routed]:
        if isinstance(event, _COMM):
            yield from self._comm_event(event)
            return
        msg_id = message.parent_id
        pending = self._pending.get(msg_id)
        if pending is not None:
            yield from self._answer(msg_id, pending, event)
        elif not message.parent_header:
            yield from self._unparented(event)
        elif isinstance(event, (Idle, KernelStatus)):
            if message.parent_header.get("msg_type") == "execute_request" and not self._session.made(message):
                yield Routed(None, OthersRun(isinstance(event, KernelStatus)))
        elif isinstance(event, _OUTPUT) and self._session.made(message):
            yield Routed(self._owner_of_late_output(message), event)

    def _answer(self, msg_id: str, pending: _Pending, event: Event) -> Iterator[Routed]:
        if (pending.replied and isinstance(event, Replied)) or (pending.idle and isinstance(event, Idle)):
            self.dropped["repeated"] += 1  # whoever waits for it has it, and must not be given thousands
            return
        recipient: str | None = msg_id
        if isinstance(event, _OUTPUT) and not pending.is_execution:
            recipient = self._current_run()
        yield Routed(recipient, event)
        pending.replied |= isinstance(event, Replied)
        pending.idle |= isinstance(event, Idle)
        if pending.replied and pending.idle:
            self.forget(msg_id)
            yield Routed(msg_id, Done())

    def _unparented(self, event: Event) -> Iterator[Routed]:
        if isinstance(event, _OF_THE_KERNEL):
            yield Routed(None, event)
        elif isinstance(event, _OUTPUT):
            yield Routed(self._current_run(), event)

    def _comm_event(self, event: CommOpened | CommMessage | CommClosed) -> Iterator[Routed]:
        # The parent of a comm message is whatever runs at that moment: only the comm id says whose it is.
        if isinstance(event, CommOpened):
            yield Routed(None, event)
        elif event.comm_id in self._comms:
            yield Routed(event.comm_id, event)
            if isinstance(event, CommClosed):
                self._comms.discard(event.comm_id)

    def _owner_of_late_output(self, message: Message) -> str | None:
        """Whose is output that names a request of ours which is over?

        A task of an earlier run still names that run: it is nobody's now. But a thread names the last
        request of any kind that the kernel took (ipykernel), even one that only asked how it is: such
        output belongs to the run that is on.
        """
        if message.parent_header.get("msg_type") == "execute_request":
            return None
        return self._current_run()

    def _current_run(self) -> str | None:
        return next((msg_id for msg_id, pending in self._pending.items() if pending.is_execution), None)
