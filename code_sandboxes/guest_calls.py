"""Call functions of the guest, and wait for what they return.

The functions stand in ``guest/``, and are called by name with JSON values and binary buffers. They answer
while a cell runs, where the kernel has subshells; else when it is over.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from code_sandboxes.errors import SandboxConnectionError
from code_sandboxes.guest_link import Answered, Buffers, Channel, GuestCall, Refused
from code_sandboxes.inbox import Inbox
from code_sandboxes.kernel import Kernel
from code_sandboxes.protocol.events import Event
from code_sandboxes.steps import Operation, next_event

__all__ = ["Answer", "Guest", "Window", "answer_of"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call has returned; nothing of it is checked yet."""

    value: object
    buffers: Buffers


class Guest:
    """The guest in one kernel.

    Args:
        base: where relative paths start, if that is not the working directory of the kernel.
    """

    def __init__(self, kernel: Kernel, base: str | None) -> None:
        self.base = base
        self._kernel = kernel
        self._pid = os.getpid()

    def call(self, name: str, *buffers: bytes | memoryview, **arguments: object) -> Operation[Answer]:
        """Call a function and wait for what it returns; whoever gives up waiting stops it.

        Raises:
            OSError: of the system, as it was raised in the sandbox.
            SandboxConnectionError: there is no answer: the kernel died, say.
        """
        return (yield from self.ask(GuestCall(name, arguments, buffers, Inbox())))

    def ask(self, call: GuestCall) -> Operation[Answer]:
        """The same, for a *call* that is made already; its inbox is for it alone."""
        self.begin(call)
        try:
            event = yield from next_event(call.inbox)
        except BaseException:  # nobody waits any more, whatever the reason
            self.cancel(call)
            raise
        return answer_of(event)

    def begin(self, call: GuestCall) -> None:
        """Call a function and do not wait: its inbox gets an :class:`Answered` or :class:`Refused`.

        Raises:
            SandboxConnectionError: this is a forked child, to which nothing is answered.
        """
        if os.getpid() != self._pid:
            raise SandboxConnectionError(
                f"it belongs to process {self._pid}, and this is its fork {os.getpid()};"
                " reach the sandbox with Sandbox.from_id()"
            )
        self._kernel.call(call)

    def cancel(self, call: GuestCall) -> None:
        """Nobody waits for its answer any more."""
        self._kernel.cancel_call(call)

    def grant(self, channel: Channel, credit: int) -> None:
        """So many more bytes may come on *channel*; from any thread."""
        self._kernel.grant(channel, credit)

    def close_channel(self, channel: Channel) -> None:
        """Nobody listens to *channel* any more; from any thread."""
        self._kernel.close_channel(channel)


class Window:
    """Calls that are under way side by side, and are answered in turn; at the end of ``with``, no more.

    Args:
        follows: what all of them follow.
    """

    def __init__(self, guest: Guest, follows: GuestCall | None = None) -> None:
        self.follows = follows
        self._guest = guest
        self._inbox = Inbox()
        self._calls: deque[GuestCall] = deque()
        self._answers: dict[GuestCall, Event] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def begin(self, name: str, *buffers: bytes | memoryview, **arguments: object) -> GuestCall:
        call = GuestCall(name, arguments, buffers, self._inbox, follows=self.follows)
        self._calls.append(call)
        self._guest.begin(call)
        return call

    def oldest(self) -> Operation[Answer]:
        """The answer to the call that was begun first."""
        call = self._calls[0]
        while call not in self._answers:
            event = yield from next_event(self._inbox)
            assert isinstance(event, (Answered, Refused))
            self._answers[event.call] = event
        self._calls.popleft()
        return answer_of(self._answers.pop(call))

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        for call in self._calls:
            if call not in self._answers:
                self._guest.cancel(call)
        self._calls.clear()


def answer_of(event: Event) -> Answer:
    """What *event* brings.

    Raises:
        Exception: why there is no answer.
    """
    if isinstance(event, Refused):
        raise event.error
    assert isinstance(event, Answered)
    return Answer(event.value, event.buffers)
