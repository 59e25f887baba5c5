"""The kernels of a Jupyter server, as this program has them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from code_sandboxes.errors import SandboxConnectionError
from code_sandboxes.guest.envelopes import ENVELOPES
from code_sandboxes.kernel_process import Prologue
from code_sandboxes.protocol.envelopes import opened
from code_sandboxes.protocol.events import Streamed
from code_sandboxes.protocol.messages import Message
from code_sandboxes.protocol.wire import MalformedMessageError
from code_sandboxes.remote.server import JupyterServer, KernelModel
from code_sandboxes.transports.loop import Loop, Timer
from code_sandboxes.transports.websocket import WebSocketTransport

__all__ = ["RemoteContext", "RemoteKernel"]

_log = logging.getLogger(__name__)

# Seconds between two questions to the server while it starts or a run is on: its own word is the last resort.
_ASK_EVERY = 20.0

_DIED = "the server says that it died, and has started it again"
_DEAD = "the server says that it is dead, and could not start it again"
_REPLACED = "somebody has restarted it"
_RENEWED = "it was restarted: by somebody, or by the server when it had died"
_DELETED = (
    "it is not on the server any more: somebody has deleted it, it was culled for being idle, or the server"
    " was started anew"
)

# Seconds: one that somebody ends is on the server for so long, at most, and is looked for so often.
_TO_END, _LOOK = 10.0, 0.1

# At least so many of the latest messages are known again.
_REMEMBERED = 4096

# What Jupyter Server says for output that it has dropped, in a stream of its own.
_LIMITED = ("IOPub data rate exceeded", "IOPub message rate exceeded")


class RemoteContext:
    """What one context has on the server: a kernel, by its id there, in one life after the other.

    Args:
        start: makes a new kernel there; blocks.
        kernel_id: of one that is there already.
        is_given: it is somebody else's, and is not ended.
        prologue: what a new one has to be asked first.

    Attributes:
        kernel_id: which it is now; None before it was started.
        is_over: it is not needed any more: what ends it ends it for good.
        was_left_running: what it runs, nobody waits for.
        was_shut_down: somebody is ending it.
        why_died: tells more than the server does of a kernel that has died, if there is more; blocks.
    """

    def __init__(
        self,
        server: JupyterServer,
        start: Callable[[], KernelModel],
        *,
        kernel_id: str | None = None,
        is_given: bool = False,
        prologue: Prologue | None = None,
    ) -> None:
        self.server = server
        self.kernel_id = kernel_id
        self.is_given = is_given
        self.is_over = False
        self.prologue = prologue
        self.is_fresh = kernel_id is None
        self.was_left_running = self.was_shut_down = False
        self.why_died: Callable[[], str] | None = None
        self._start = start
        self._changing = threading.Lock()  # one is not to be restarted while it is deleted

    def launch(self) -> RemoteKernel:
        """The kernel as it is now, or a new one if it is gone; blocks.

        Raises:
            SandboxError: there is none to be had.
        """
        with self._changing:
            return self._launch()

    def _launch(self) -> RemoteKernel:
        if self.kernel_id is not None and not self._is_there(self.kernel_id):
            if self.is_given:
                raise SandboxConnectionError(f"the kernel {self.kernel_id} is gone: {_DELETED}")
            self.kernel_id, self.is_fresh = None, True
        if self.kernel_id is None:
            self.kernel_id = self._start().id
        elif self.was_left_running:
            # A run that nobody hears of any more would keep the next one waiting.
            self.server.interrupt(self.kernel_id)
        self.was_left_running = False
        kernel = RemoteKernel(self, self.kernel_id, is_fresh=self.is_fresh)
        self.is_fresh = False
        return kernel

    def _is_there(self, kernel_id: str) -> bool:
        """Is it still there? Servers have one that they are ending for a while, and let nobody to it."""
        model = self.server.kernel(kernel_id)
        give_up = time.monotonic() + _TO_END
        while self.was_shut_down and model is not None and time.monotonic() < give_up:
            if model.state in ("starting", "restarting"):  # the server did not mean it to end
                break
            time.sleep(_LOOK)
            model = self.server.kernel(kernel_id)
        self.was_shut_down = False
        if model is not None and model.state == "dead":
            self.server.restart(kernel_id)
            self.is_fresh = True
        return model is not None

    def delete(self) -> None:
        """End it for good, unless it is somebody else's; may be called again, blocks.

        Raises:
            SandboxError: the server does not do it.
        """
        with self._changing:
            if self.kernel_id is not None and not self.is_given:
                self.server.delete(self.kernel_id)
                self.kernel_id = None

    def restart(self) -> None:
        """Let it begin again; blocks. What is gone is started anew when it is needed."""
        with self._changing:
            if self.kernel_id is None or self.is_over or self.server.kernel(self.kernel_id) is None:
                return
            self.server.restart(self.kernel_id)
            self.is_fresh = True


class RemoteKernel:
    """One life of a server's kernel; a :class:`code_sandboxes.kernel_process.KernelProcess`."""

    how_killed = "its kernel was restarted; its variables are gone"
    interrupt_mode: Literal["signal", "message"] = "signal"  # how, is the server's business

    def __init__(self, context: RemoteContext, kernel_id: str, *, is_fresh: bool) -> None:
        self._context = context
        self._kernel_id = kernel_id
        self._is_fresh = is_fresh
        self._loop: Loop | None = None
        self._ended: Callable[[], None] = _nothing
        self._is_over = self._is_running = self._is_ending = False
        self._why_ended = self._why_lost = ""
        self._identity = ""
        self._kernel_session = ""
        self._recent: set[int] = set()
        self._older: set[int] = set()
        self._transport: WebSocketTransport | None = None
        self._asking: Timer | None = None
        self._interrupts = 0  # that the server has not answered
        self._claimed: Callable[[], None] | None = None

    def transport(
        self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
    ) -> WebSocketTransport:
        self._identity = identity
        address = self._context.server.channels(self._kernel_id, identity)
        transport = WebSocketTransport(
            loop, address, lambda message: self._received(message, receive), max_message
        )
        transport.broken = self._broken
        self._transport = transport
        return transport

    @property
    def is_fresh(self) -> bool:
        return self._is_fresh

    @property
    def prologue(self) -> Prologue | None:
        return self._context.prologue

    @property
    def why_lost(self) -> str:
        return self._why_lost

    @property
    def may_go_on(self) -> bool:
        return bool(self._why_lost)

    @property
    def why_ended(self) -> str:
        return self._why_ended

    def exit_code(self) -> int | None:
        return None  # no server tells it

    def output(self) -> str:
        return ""

    def written(self) -> list[int]:
        return [0, 0]

    def unpublished(self, published: Sequence[int]) -> list[Streamed]:
        return []

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        self._loop, self._ended = loop, ended
        self._ask_later()

    def claim(self, granted: Callable[[], None]) -> None:
        if self._interrupts:  # else it might be felt by the next run
            self._claimed = granted
            return
        self._is_running = True
        self._ask_later()
        granted()

    def rest(self) -> None:
        self._is_running = False
        self._ask_no_more()

    def interrupt(self) -> None:
        if self._loop is not None:
            self._interrupts += 1
            self._loop.run_blocking(
                lambda: self._context.server.interrupt(self._kernel_id), self._interrupted, apart=True
            )

    def _interrupted(self, _: object, error: Exception | None) -> None:
        self._interrupts -= 1
        if error is not None:  # the deadline of whoever wanted that goes on
            _log.warning("the kernel %s could not be interrupted: %s", self._kernel_id, error)
        granted, self._claimed = self._claimed, None
        if granted is not None and not self._is_over:
            self.claim(granted)

    def terminate(self) -> None:
        self._end_for_good()

    def kill(self) -> None:
        if self._context.is_over:
            self._end_for_good()
        elif not self._is_ending and self._loop is not None:
            self._is_ending = True
            self._loop.run_blocking(self._context.restart, self._restarted, apart=True)

    def leave(self) -> None:
        self._is_over = True
        self.rest()

    def release(self) -> None:
        return

    def _restarted(self, _: object, error: Exception | None) -> None:
        if error is None:
            self._end("it was restarted")
        else:
            self._lose(f"it could not be restarted: {error}")

    def _end_for_good(self) -> None:
        self._context.is_over = True
        if self._is_ending or self._loop is None:
            return
        self._is_ending = True
        self._loop.run_blocking(self._context.delete, self._deleted, apart=True)

    def _deleted(self, _: object, error: Exception | None) -> None:
        if error is not None:  # whoever ends the sandbox tries again, and tells
            _log.info("a kernel could not be deleted: %s", error)
        self._end("it was ended")

    # How it goes: the server's messages, the connection, and in the end a question.

    def _received(self, message: Message, receive: Callable[[Message], None]) -> None:
        if self._is_over or self._is_known(message):
            return
        if message.channel == "iopub" and self._is_of_the_server(message):
            return
        if message.msg_type == "comm_msg" and message.content.get("comm_id") == ENVELOPES:
            self._open_envelope(message, receive)
            return
        session = message.header.get("session")
        if isinstance(session, str) and session not in ("", self._identity):
            if self._kernel_session not in ("", session):
                if not self._is_ending:
                    self._end_anew(_RENEWED)
                return
            self._kernel_session = session
        receive(message)

    def _is_known(self, message: Message) -> bool:
        """Did it come before? Whoever keeps messages for those who are away may give one twice."""
        if not message.msg_id:
            return False
        # Threads of a kernel may give the same id to two messages (jupyter_client), but not at one time.
        name = hash((message.msg_id, message.msg_type, str(message.header.get("date"))))
        if name in self._recent or name in self._older:
            if self._transport is not None:
                self._transport.dropped["repeated"] += 1
            return True
        self._recent.add(name)
        if len(self._recent) >= _REMEMBERED:
            self._older, self._recent = self._recent, set()
        return False

    def _open_envelope(self, envelope: Message, receive: Callable[[Message], None]) -> None:
        try:
            messages = opened(envelope)
        except MalformedMessageError as error:
            _log.debug("dropped an envelope: %s", error)
            if self._transport is not None:
                self._transport.dropped[error.reason] += 1
            return
        for message in messages:
            if not self._is_over:
                receive(message)

    def _is_of_the_server(self, message: Message) -> bool:
        """Does it tell of the kernel, and is nobody's output? Then it is heeded here."""
        kind, content = message.msg_type, message.content
        if kind == "iopub_welcome":  # the server's subscription, not ours
            return True
        if kind == "shutdown_reply":
            if not self._is_ending and content.get("restart") is True:
                self._end_anew(_REPLACED)
            elif not self._is_ending:
                self._context.was_shut_down = self._context.is_fresh = True
                self._end(_DELETED)
            return True
        if message.header.get("session") != self._identity:
            return False
        if kind == "status" and not message.parent_header:
            state = content.get("execution_state")
            if state == "restarting":
                self._died()
            elif state == "dead":
                self._end_anew(_DEAD)
            return True
        if kind == "stream" and str(content.get("text", "")).lstrip().startswith(_LIMITED):
            if self._transport is not None:
                self._transport.dropped["rate limit"] += 1
                self._transport.lost("iopub", "beyond the rate that the server lets through")
            return True
        return False

    def _broken(self, why: str, status: int | None) -> None:
        if self._is_ending:  # what has been asked for tells how it ends
            return
        server = self._context.server
        if status in (401, 403):
            self._lose(f"{server.place.url} does not let this token to the kernel: {why}")
        elif status is not None and self._loop is not None:
            sentence = f"there is no websocket to the kernel at {server.place.url}: {why}"
            self._loop.run_blocking(
                lambda: server.kernel(self._kernel_id),
                lambda model, error: self._looked_for(model, error, sentence),
                apart=True,
            )
        else:
            self._lose(f"the connection to {server.place.url} was lost: {why}")

    def _looked_for(self, model: KernelModel | None, error: Exception | None, sentence: str) -> None:
        """There is no websocket to it: because there is no kernel, or because something is in between."""
        if self._is_ending:
            return
        if model is None and error is None:
            self._end(_DELETED)
        else:
            self._lose(sentence)

    @property
    def _is_awaited(self) -> bool:
        return not self._is_over and (self._is_running or not self._kernel_session)

    def _ask_later(self) -> None:
        self._ask_no_more()
        if self._loop is not None:
            self._asking = self._loop.call_later(_ASK_EVERY, self._ask)

    def _ask_no_more(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _ask(self) -> None:
        loop = self._loop
        assert loop is not None
        self._asking = None
        if not self._is_awaited:
            return
        loop.run_blocking(lambda: self._context.server.kernel(self._kernel_id), self._answered, apart=True)

    def _answered(self, model: KernelModel | None, error: Exception | None) -> None:
        if not self._is_awaited or self._asking is not None:  # it was for a run that is over
            return
        if error is not None:  # the websocket has its own patience with the server
            _log.debug("no answer about the kernel %s: %s", self._kernel_id, error)
        elif model is None:
            self._end(_DELETED)
            return
        elif model.state == "dead":
            self._end_anew(_DEAD)
            return
        self._ask_later()

    def _died(self) -> None:
        if self._context.why_died is None or self._loop is None or self._is_ending:
            self._end_anew(_DIED)
            return
        self._is_ending = True

        def told(more: str | None, _: object) -> None:  # who cannot tell more, does not
            self._end_anew(f"{more}; {_DIED}" if more else _DIED)

        self._loop.run_blocking(self._context.why_died, told, apart=True)

    def _end_anew(self, why: str) -> None:
        """This life is over; there is another one of the same id."""
        self._context.is_fresh = True
        self._end(why)

    def _lose(self, why: str) -> None:
        if self._is_over:
            return
        self._why_lost = why
        self._context.was_left_running = self._is_running
        self._end("")

    def _end(self, why: str) -> None:
        if self._is_over:
            return
        self.leave()
        self._why_ended = why
        self._ended()


def _nothing() -> None:
    return
