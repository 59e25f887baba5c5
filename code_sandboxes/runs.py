"""One execution on its way through a kernel, as the I/O thread sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from code_sandboxes.inbox import Inbox
from code_sandboxes.protocol.events import Displayed, Failed, Replied, Started
from code_sandboxes.transports.loop import Timer

if TYPE_CHECKING:
    from code_sandboxes.kernel import Kernel

__all__ = ["Run", "Turn"]

# What a caller need not be woken for: it comes with the next event, and the last one always wakes. Streams
# do always, so that the caller takes them while they come.
_QUIET = (Started, Replied)
_QUIET_WITHOUT_LISTENER = (Started, Replied, Displayed, Failed)


class Run:
    """One execution on its way through a kernel; the I/O thread's side of it.

    Args:
        kernel: where it runs.
        content: of the ``execute_request``.
        timeout: seconds from when the kernel gets it; None waits for ever.
        inbox: where its events go.
        metadata: of the ``execute_request``; only for a kernel that has the guest.
        listen: whether somebody wants to see its results as they come.
    """

    def __init__(
        self,
        kernel: Kernel,
        content: Mapping[str, object],
        timeout: float | None,
        inbox: Inbox,
        *,
        metadata: Mapping[str, object] | None = None,
        listen: bool = True,
    ) -> None:
        self.kernel = kernel
        self.content = content
        self.metadata = metadata or {}
        self.quiet = _QUIET if listen else _QUIET_WITHOUT_LISTENER
        self.timeout = timeout
        self.inbox = inbox
        self.msg_id = ""
        self.started = False
        self.stopping = False
        self.signalled = False
        self.deadline: Timer | None = None
        self.time_left: float | None = None
        self.settling: Timer | None = None
        self.poke_ids: list[str] = []
        self.replied = False
        self.idle_by_itself = False
        self.lost_state = False
        self.abandoned = False
        self.told = False
        self.loss_told = False
        self.reply_lost = ""  # what has become of it
        self.checked_by = ""  # the request whose answer says that nothing of this run comes any more
        self.unanswered = 0


class Turn(Run):
    """Has its turn as a run has, and runs nothing; nor does anybody else, in any program, until it ends.

    Its inbox gets :class:`Started` when its turn has come; else what a run gets that is not begun.
    """

    def __init__(self, kernel: Kernel, inbox: Inbox) -> None:
        super().__init__(kernel, {}, None, inbox)
        self.abandoned = True  # if variables are lost meanwhile, the next run tells
