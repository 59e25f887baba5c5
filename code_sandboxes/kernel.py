"""One kernel: a process somebody started, a transport to it, and an inbox for each run.

It lives in the I/O thread: there it sends one request at a time, keeps deadlines, interrupts what is late,
kills what does not stop, notices death, and starts afresh when the next run comes. It does not assume that
it is the parent of the process: all it knows of that is :class:`KernelProcess`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from enum import Enum

from code_sandboxes.errors import SandboxConnectionError, SandboxError, SandboxNotStartedError
from code_sandboxes.guest.comms import FEATURE
from code_sandboxes.guest_boot import why_prologue_failed
from code_sandboxes.guest_link import Channel, GuestCall, GuestLink, Refused
from code_sandboxes.inbox import Inbox
from code_sandboxes.kernel_process import (
    KernelInfo,
    KernelProcess,
    Limits,
    Transport,
)
from code_sandboxes.protocol.events import (
    ConnectionLost,
    Died,
    Done,
    Event,
    Idle,
    InputAsked,
    InterruptAsked,
    KernelReplaced,
    KernelStatus,
    NotRun,
    OthersRun,
    OutputDropped,
    Replied,
    Started,
    Terminated,
    TimedOut,
    Welcomed,
)
from code_sandboxes.protocol.messages import Channel as MessageChannel, Message, Session
from code_sandboxes.protocol.outputs import Displays, Outputs
from code_sandboxes.protocol.router import Router
from code_sandboxes.results import Logs
from code_sandboxes.runs import Run, Turn
from code_sandboxes.transports.errors import MessageTooLargeError
from code_sandboxes.transports.loop import Loop, Timer

__all__ = ["Ended", "Kernel", "Ready", "StartFailed"]

_log = logging.getLogger(__name__)

# Seconds without any message after which the missing half of an answer is not waited for any more.
_SETTLE = 5.0

# A signal that comes before the code has begun is ignored by ipykernel: wait for its execute_input, but
# not for long, since some kernels send none.
_START_OF_CODE = 0.5

# What a dead process had sent is still on its way through libzmq's own thread for a moment.
_DRAIN_QUIET = 0.03
_DRAIN_MOST = 0.5

# How long a kernel that was there may take to answer on a new connection.
_RECONNECT = 10.0

# A question comes on a socket of its own, and may overtake what was printed before it.
_OVERTAKEN = 0.005

# How long an orderly end may take before it becomes a kill.
_FAREWELL = 1.0

# So many questions a run may have asked and not been answered: code asks one, and after an interrupt another.
_MOST_QUESTIONS = 16

# What a kernel says of itself is kept as long as it lives: so many features, of so many characters.
_MOST_FEATURES, _LONGEST_FEATURE = 100, 200

_HANDSHAKE_RETRY = 0.25
_BACKGROUND_LIMIT = 1024**2


@dataclass(frozen=True, slots=True)
class Ready(Event):
    """The kernel answers, and nothing that it publishes is missed."""


@dataclass(frozen=True, slots=True)
class StartFailed(Event):
    """There is no kernel, for this reason."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """The kernel is closed and nothing is left of it."""


class _State(Enum):
    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"
    CLOSED = "closed"


class Kernel:
    """A kernel that is started, used, restarted after its death, and closed; from any thread.

    Args:
        loop: the I/O thread.
        launch: starts the process; called in the worker thread, may block and raise.
        name: what messages about it call it.
        limits: see there.
    """

    def __init__(self, loop: Loop, launch: Callable[[], KernelProcess], name: str, limits: Limits) -> None:
        self.displays = Displays()
        self.info: KernelInfo | None = None
        self._dropped: Counter[str] = Counter()
        self._loop = loop
        self._launch_process = launch
        self._name = name
        self._limits = limits
        self._state = _State.NEW
        self._closing = False
        self._process: KernelProcess | None = None
        self._transport: Transport | None = None
        self._session = _new_session()
        self._router = Router(self._session)
        self._queue: deque[Run] = deque()
        self._current: Run | None = None
        self._waiting_for_start: list[Inbox] = []
        self._waiting_for_end: list[Inbox] = []
        self._handshake_ids: set[str] = set()
        self._prologue_id = ""
        self._heard_iopub = self._welcomed = self._is_set_up = False
        self._start_timer: Timer | None = None
        self._last_message = 0.0
        self._restarting = self._dying = self._reconnecting = self._loss_told = self._is_held = False
        self._claiming = self._leaving = self._others_run = self._too_late = False
        self._is_to_begin_again = False
        self._may_be_there = True  # what is reached next is what was to be restarted, and not its successor
        self._is_away = self._is_missing = False
        self._loss_to_tell: Died | None = None
        self._releasing = 0
        self._link: GuestLink | None = None
        self._calls_waiting: list[GuestCall] = []
        self._death_unreported = False
        self._background = Outputs(self.displays, _BACKGROUND_LIMIT)
        self._background_lock = threading.Lock()

    # What any thread may call.

    @property
    def is_executing(self) -> bool:
        """A run is on, or waits for its turn."""
        return self._current is not None or bool(self._queue)

    @property
    def dropped(self) -> Counter[str]:
        """How many messages were not believed, or not taken in, by why."""
        transport, router = self._transport, self._router
        return self._dropped if transport is None else self._dropped + transport.dropped + router.dropped

    @property
    def background_output(self) -> Logs:
        """What was printed while no run was on."""
        with self._background_lock:
            self._background.flush(time.time())
            return self._background.logs()

    def start(self, inbox: Inbox) -> None:
        """Start it; *inbox* gets :class:`Ready` or :class:`StartFailed`."""
        self._loop.call_soon(lambda: self._start(inbox))

    def restart(self, inbox: Inbox) -> None:
        """Start it afresh; *inbox* gets :class:`Ready` or :class:`StartFailed`."""
        self._loop.call_soon(lambda: self._restart(inbox))

    def execute(self, run: Run) -> None:
        """Run it when its turn has come; its inbox gets events up to a final one."""
        self._loop.call_soon(lambda: self._enqueue(run))

    def answer(self, run: Run, asked: InputAsked, value: str) -> None:
        """Answer an ``input_request``; the clock of the run goes on."""
        self._loop.call_soon(lambda: self._answer(run, asked, value))

    def interrupt(self) -> bool:
        """Interrupt the run that is on, or the one that another program has on; False if there was none."""
        if not self.is_executing and not self._others_run:
            return False
        self._loop.call_soon(self._interrupt_current)
        return True

    def cancel(self, run: Run) -> None:
        """Interrupt *run*, or take it out of the queue."""
        self._loop.call_soon(lambda: self._cancel(run))

    def abandon(self, run: Run) -> None:
        """Nobody will see the result of *run*: if variables were lost in it, the next one tells."""
        self._loop.call_soon(lambda: self._abandon(run))

    def end_turn(self, turn: Turn) -> None:
        """End *turn*, which was executed: runs go on that have waited for that; or it does not begin."""
        self._loop.call_soon(lambda: self._end_turn(turn))

    def hold(self, *, on: bool) -> None:
        """Its process has been stopped, or goes on: the clock of its run does the same."""
        self._loop.call_soon(lambda: self._hold(on=on))

    def call(self, call: GuestCall) -> None:
        """Call a function of its guest; the inbox of the call gets what it returns."""
        self._loop.call_soon(lambda: self._call(call))

    def cancel_call(self, call: GuestCall) -> None:
        """Nobody waits for its answer any more."""
        self._loop.call_soon(lambda: self._cancel_call(call))

    def grant(self, channel: Channel, credit: int) -> None:
        """So many more bytes may come on *channel*."""
        self._loop.call_soon(lambda: self._link.grant(channel, credit) if self._link else None)

    def close_channel(self, channel: Channel) -> None:
        """Nobody listens to *channel* any more."""
        self._loop.call_soon(lambda: self._link.close_channel(channel) if self._link else None)

    def close(self, inbox: Inbox, sentence: str, *, orderly: bool) -> None:
        """End it for good; *inbox* gets :class:`Ended`. Runs are cut short, *sentence* tells them why."""
        self._loop.call_soon(lambda: self._close(inbox, sentence, orderly))

    def leave(self, inbox: Inbox, sentence: str) -> None:
        """Have no more to do with it, and let it go on; *inbox* gets :class:`Ended`."""
        self._loop.call_soon(lambda: self._leave(inbox, sentence))

    # Start.

    def _start(self, inbox: Inbox) -> None:
        if self._state is _State.READY:
            inbox.put(Ready())
            return
        if self._closing:
            inbox.put(StartFailed(SandboxNotStartedError(f"{self._name} was terminated")))
            return
        self._waiting_for_start.append(inbox)
        if self._state is not _State.STARTING:
            self._launch()

    def _restart(self, inbox: Inbox) -> None:
        if self._closing:
            self._start(inbox)
            return
        process = self._process
        self._loss_to_tell = None
        self._waiting_for_start.append(inbox)
        if process is None or self._dying:
            self._is_to_begin_again = True
            if process is None and self._state is not _State.STARTING:
                self._launch()
            return
        is_new = self._state is _State.STARTING and not self._reconnecting and process.is_fresh
        if not is_new and not self._restarting:
            self._begin_again(process)

    def _begin_again(self, process: KernelProcess) -> None:
        self._cut_short(f"{self._name} was restarted")
        self._state = _State.STARTING
        self._restarting, self._reconnecting = True, False
        self._handshake_ids.clear()  # what is still asked of the one that goes says nothing of the next
        _cancel(self._start_timer)
        process.kill()

    def _launch(self) -> None:
        self._state = _State.STARTING
        self._too_late = False
        # What it is started in may take its time, which others should not have to wait for.
        self._loop.run_blocking(self._launch_process, self._launched, apart=True)

    def _launched(self, process: KernelProcess | None, error: Exception | None) -> None:
        if process is None:
            if not isinstance(error, (SandboxError, ValueError)):
                error = SandboxConnectionError(f"{self._name} could not be started: {error}")
            self._fail_to_start(error)
            return
        if self._leaving:
            process.leave()
            self._closed()
            return
        self._process = process
        self._death_unreported |= self._is_missing and process.is_fresh
        self._is_missing = False
        is_to_begin_again, self._is_to_begin_again = self._is_to_begin_again, False
        if process.is_fresh:  # else it answers when what others run in it is over
            self._start_timer = self._loop.call_later(self._limits.start, self._start_took_too_long)
        try:
            process.watch(self._loop, lambda: self._process_ended(process))
            if self._closing:
                process.kill()
            elif is_to_begin_again and self._may_be_there and not process.is_fresh:
                self._begin_again(process)
            else:
                self._last_message = time.monotonic()
                self._connect()
        except Exception as reason:  # too few descriptors, mostly: there is no kernel then
            self._give_up_start(process, f"it could not be reached: {reason}")

    def _give_up_start(self, process: KernelProcess, sentence: str) -> None:
        _cancel(self._start_timer)
        self._close_transport()
        self._process = None
        self._dying = False
        process.kill()
        self._release(process)
        self._fail_to_start(SandboxConnectionError(f"{self._name} could not be started: {sentence}"))

    def _connect(self) -> None:
        assert self._process is not None
        self._session = _new_session()
        known = None if self._process.is_fresh else self._router.kernel_session
        self._router = Router(self._session, known)
        self._welcomed = self._others_run = False
        self._transport = self._process.transport(
            self._loop, self._session.session_id, self._receive, self._limits.max_message
        )
        self._transport.lost, self._transport.cut = self._lost, self._was_cut
        self._transport.open()
        self._begin_to_shake_hands()

    def _begin_to_shake_hands(self) -> None:
        self._heard_iopub = self._is_set_up = False
        self._handshake_ids.clear()
        self._prologue_id = ""
        self.info = None
        self._shake_hands()

    def _shake_hands(self) -> None:
        request = self._session.message("shell", "kernel_info_request")
        self._ask_who_it_is(request)
        if self._process is not None and not self._process.is_fresh:
            # It may be busy with what others run in it; on control it answers nevertheless, if it can.
            self._ask_who_it_is(self._session.message("control", "kernel_info_request"))
        self._loop.call_later(_HANDSHAKE_RETRY, lambda: self._shake_hands_again(request))

    def _ask_who_it_is(self, request: Message) -> None:
        self._handshake_ids.add(request.msg_id)
        self._send(request, expect=True)

    def _shake_hands_again(self, request: Message) -> None:
        # A kernel without iopub_welcome: ask until what it publishes about that is heard.
        waiting = self._state is _State.STARTING and request.msg_id in self._handshake_ids
        if waiting and self.info is not None:
            self._shake_hands()
        elif waiting:
            self._loop.call_later(_HANDSHAKE_RETRY, lambda: self._shake_hands_again(request))

    def _shaken_hands(self, event: Event) -> None:
        if isinstance(event, Replied) and self.info is None:
            self.info = _kernel_info(event.content)
        self._ready_if_complete()

    def _ready_if_complete(self) -> None:
        if self._state is not _State.STARTING or self._restarting or self._dying:
            return
        if self.info is None or not self._heard_iopub:
            return
        assert self._process is not None
        if not self._is_set_up and not self._set_up(self._process, self.info):
            return
        self._state = _State.READY
        self._reconnecting = False
        # What was printed before there was a subscription is nobody's.
        self._router.published = self._process.written()
        _cancel(self._start_timer)
        self._link = GuestLink(
            self._loop, self._session, self.info, self._send, self._router.comm_opened, self._router.forget
        )
        for inbox in self._take_waiting_for_start():
            inbox.put(Ready())
        for call in self._take_calls():
            self._link.call(call)
        self._advance()

    def _set_up(self, process: KernelProcess, info: KernelInfo) -> bool:
        """Send what comes before all else; False if that has to be done first."""
        if self._prologue_id:
            return self._is_set_up
        prologue = process.prologue
        if prologue is None or set(prologue.features) <= set(info.supported_features):
            self._is_set_up = True
            return True
        self._is_set_up = not process.is_fresh
        request = self._session.message(
            "shell", "execute_request", prologue.content, metadata=prologue.metadata
        )
        self._prologue_id = request.msg_id
        self._send(request, expect=True)
        # In one that others have used it is done when its turn comes, which is before ours.
        self.info = replace(info, supported_features=(*info.supported_features, *prologue.features))
        return self._is_set_up

    def _told_of_prologue(self, event: Event) -> None:
        if not isinstance(event, Replied) or self._is_set_up:
            return
        why = why_prologue_failed(event.content)
        if not why:
            self._is_set_up = True
            self._ready_if_complete()
        elif self._process is not None:
            self._give_up_start(self._process, f"it could not be set up: {why}")

    def _start_took_too_long(self) -> None:
        if self._state is _State.STARTING and self._process is not None:
            self._too_late = self._dying = True  # if it answers now, it is too late all the same
            self._process.kill()

    def _fail_to_start(self, error: Exception) -> None:
        self._state = _State.DEAD
        self._is_to_begin_again = False
        for inbox in self._take_waiting_for_start():
            inbox.put(StartFailed(error))
        for run in self._take_queue():
            run.inbox.put(NotRun(f"not run: {error}"))
        self._refuse_calls(error)
        if self._closing:
            self._closed()

    # Calls of the guest.

    def _call(self, call: GuestCall) -> None:
        if self._closing:
            call.inbox.put(Refused(call, SandboxNotStartedError(f"{self._name} was terminated")))
        elif self._loss_to_tell is not None:
            loss, self._loss_to_tell = self._loss_to_tell, None
            self._death_unreported = True
            call.inbox.put(Refused(call, SandboxConnectionError(loss.sentence)))
        elif self._link is not None and not (self._dying or self._restarting):
            self._link.call(call)
        else:
            self._calls_waiting.append(call)
            if self._state in (_State.NEW, _State.DEAD):
                self._launch()

    def _cancel_call(self, call: GuestCall) -> None:
        if call in self._calls_waiting:
            self._calls_waiting.remove(call)
        elif self._link is not None:
            self._link.cancel(call)

    def _refuse_calls(self, error: Exception) -> None:
        for call in self._take_calls():
            call.inbox.put(Refused(call, error))

    def _unlink(self, error: Exception) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.lost(error)

    # Runs.

    def _enqueue(self, run: Run) -> None:
        if self._closing:
            run.inbox.put(NotRun(f"not run: {self._name} was terminated"))
            return
        self._queue.append(run)
        self._advance()

    def _advance(self) -> None:
        if self._current is not None or not self._queue or self._dying or self._claiming or self._is_away:
            return
        if self._loss_to_tell is not None:
            self._tell_of_loss(self._queue.popleft(), self._loss_to_tell)
        elif self._state is _State.READY:
            assert self._process is not None
            self._claiming = True
            process = self._process
            process.claim(lambda: self._my_turn(process))
        elif self._state in (_State.NEW, _State.DEAD):
            self._launch()

    def _my_turn(self, process: KernelProcess) -> None:
        if process is not self._process:  # it died meanwhile
            return
        self._claiming = False
        if self._queue and self._state is _State.READY and not (self._dying or self._is_away):
            self._begin(self._queue.popleft())
        else:
            process.rest()

    def _tell_of_loss(self, run: Run, loss: Died) -> None:
        """Nothing tells it better than a run that was not begun."""
        self._loss_to_tell = None
        run.lost_state = True
        run.inbox.put(loss)
        self._advance()

    def _begin(self, run: Run) -> None:
        if isinstance(run, Turn):
            self._current = run
            run.inbox.put(Started(None))
            return
        if run.metadata and (self.info is None or FEATURE not in self.info.supported_features):
            # It would run the code and leave out what was asked for with it.
            run.inbox.put(NotRun(f"not run: {self._name} cannot set environment variables for one run"))
            self._rest()
            self._advance()
            return
        self._current = run
        if self._death_unreported:
            self._death_unreported = False
            run.inbox.put(KernelReplaced(), wake=False)
            run.lost_state = True
        request = self._session.message("shell", "execute_request", run.content, metadata=run.metadata)
        run.msg_id = request.msg_id
        try:
            self._send(request, expect=True)
        except MessageTooLargeError as error:
            self._finish(run, NotRun(f"not run: the code is too long: {error}"))
            self._advance()
            return
        run.time_left = run.timeout
        self._start_clock(run)

    def _over(self, run: Run) -> None:
        self._finish(run, Done())
        self._advance()

    def _end_turn(self, turn: Turn) -> None:
        if turn is self._current:
            self._over(turn)
        elif turn in self._queue:
            self._queue.remove(turn)

    def _over_without_reply(self, run: Run) -> None:
        if run.replied or (run.started and not run.idle_by_itself):
            self._over(run)
        elif run.started:
            self._replace(run)
        else:  # it could not even begin with the code
            self._kill_under(run)

    def _replace(self, run: Run) -> None:
        """The kernel went idle and did not reply: it would not reply to the next one either."""
        assert self._process is not None
        sentence = "the kernel went idle without a reply; it was ended, and its variables are gone"
        self._dying = run.lost_state = True
        self._loss_told = not run.abandoned
        self._finish(run, ConnectionLost(sentence, state_preserved=False))
        self._process.kill()

    def _finish(self, run: Run, event: Event) -> None:
        """Nothing more comes for *run*: *event* is its last."""
        _cancel(run.deadline)
        _cancel(run.settling)
        for msg_id in (run.msg_id, run.checked_by, *run.poke_ids):
            self._router.forget(msg_id)
        self._current = None
        run.inbox.put(event)
        self._rest()

    def _rest(self) -> None:
        if self._process is not None:
            self._process.rest()

    def _ask(self, run: Run, asked: InputAsked) -> None:
        if run is self._current:
            run.inbox.put(asked)

    def _answer(self, run: Run, asked: InputAsked, value: str) -> None:
        if run is not self._current:
            return
        run.unanswered = 0  # it was the latest that was answered
        content = {"value": value}
        self._send(self._session.message("stdin", "input_reply", content, parent_header=asked.header))
        self._start_clock(run)

    def _hold(self, *, on: bool) -> None:
        self._is_held = on
        run = self._current
        if run is not None and on:
            self._pause_clock(run)
        elif run is not None and not run.unanswered:  # else it waits for an answer
            self._start_clock(run)

    def _start_clock(self, run: Run) -> None:
        if run.time_left is not None and not run.stopping and not self._is_held:
            run.deadline = self._loop.call_later(run.time_left, lambda: self._time_out(run))
            run.time_left = None

    def _pause_clock(self, run: Run) -> None:
        if run.deadline is not None and not run.stopping and run.time_left is None:
            run.time_left = max(0.0, run.deadline.when - time.monotonic())
            run.deadline.cancel()

    # The end of a run that does not end by itself: interrupt, wait, kill.

    def _time_out(self, run: Run) -> None:
        if run is self._current and not run.stopping:
            run.inbox.put(TimedOut(run.timeout or 0.0))
            self._stop(run)

    def _interrupt_current(self) -> None:
        if self._current is not None:
            self._cancel(self._current)
        elif self._others_run and self._process is not None:
            self._process.interrupt()
        elif self._queue:  # its kernel is starting
            self._cancel(self._queue[0])

    def _cancel(self, run: Run) -> None:
        if run is self._current:
            run.inbox.put(InterruptAsked())
            self._stop(run)
        elif run in self._queue:
            self._queue.remove(run)
            run.inbox.put(NotRun("not run: it was interrupted while it waited for its turn"))

    def _abandon(self, run: Run) -> None:
        run.abandoned = True
        self._death_unreported |= run.lost_state

    def _stop(self, run: Run) -> None:
        if run.stopping or isinstance(run, Turn):
            return
        run.stopping = True
        _cancel(run.deadline)
        run.deadline = self._loop.call_later(self._limits.grace, lambda: self._kill_under(run))
        if run.started:
            self._signal(run)
        else:
            self._loop.call_later(_START_OF_CODE, lambda: self._signal(run))

    def _signal(self, run: Run) -> None:
        if run is not self._current or run.signalled or self._process is None:
            return
        run.signalled = True
        if self._process.interrupt_mode == "message":
            self._send(self._session.message("control", "interrupt_request"))
        else:
            self._process.interrupt()
        self._poke(run)
        self._loop.call_later(_START_OF_CODE, lambda: self._poke(run))

    def _poke(self, run: Run) -> None:
        # A cell that awaits is not woken by the signal alone (ipykernel's handler only leaves a note for an
        # event loop that sleeps): any message on the shell channel wakes it. And when this one is answered
        # after the run went idle, the run's own reply will not come: an interrupt that meets the end of the
        # code can cost it (ipykernel).
        if run is self._current:
            request = self._session.message("shell", "kernel_info_request")
            run.poke_ids.append(request.msg_id)
            self._send(request, expect=True)

    def _kill_under(self, run: Run) -> None:
        if run is self._current and self._process is not None:
            self._dying = True  # should the run end by itself now, the next one is for another kernel
            self._process.kill()

    # What comes from the kernel.

    def _receive(self, message: Message) -> None:
        self._last_message = time.monotonic()
        for recipient, event in self._router.receive(message):
            run = self._current
            if recipient is None:
                self._of_the_kernel(event)
            elif run is not None and recipient == run.msg_id:
                self._of_the_run(run, event)
            elif run is not None and recipient in run.poke_ids:
                if isinstance(event, Done) and run.settling is not None:
                    self._over_without_reply(run)
            elif run is not None and recipient == run.checked_by:
                if isinstance(event, Done):
                    self._over_unheard(run)
            elif recipient in self._handshake_ids:
                self._shaken_hands(event)
            elif recipient == self._prologue_id:
                self._told_of_prologue(event)
            elif self._link is not None:
                self._link.receive(recipient, event)
        if message.channel == "iopub" and not self._heard_iopub:
            self._heard_iopub = True
            self._ready_if_complete()

    def _of_the_kernel(self, event: Event) -> None:
        if isinstance(event, Welcomed):
            # A second one means that the connection was lost in between, and output with it.
            if self._welcomed:
                self._tell_of_lost_output()
            self._welcomed = True
        elif isinstance(event, KernelReplaced):
            if self._current is None:
                self._death_unreported = True
            elif not self._current.lost_state:
                self._current.lost_state = True
                self._current.inbox.put(event)
        elif isinstance(event, OthersRun):
            self._others_run = event.is_on
        elif not isinstance(event, KernelStatus):
            now = time.time()
            with self._background_lock:
                self._background.feed(event, now, now)

    def _tell_of_lost_output(self) -> None:
        if self._current is not None and not self._current.loss_told:
            self._current.loss_told = True
            self._current.inbox.put(OutputDropped())

    def _lost(self, channel: MessageChannel, how: str) -> None:
        """A message was too large. Whose it was is not known, but only one run is on."""
        run = self._current
        if run is None:
            return
        if channel != "shell":
            if not run.loss_told:
                _log.warning("output was lost: a message of %s was %s", self._name, how)
            self._tell_of_lost_output()
        elif not run.replied:
            run.reply_lost = how
            if run.settling is not None:  # it is idle already
                self._over_with_reply_lost(run)

    def _over_with_reply_lost(self, run: Run) -> None:
        sentence = f"the kernel's reply was {run.reply_lost}, so nobody knows how the code ended"
        self._finish(run, ConnectionLost(sentence))
        self._advance()

    def _was_cut(self, is_away: bool) -> None:
        """The connection is lost, or there again; then comes what the kernel has sent, if it was kept."""
        self._is_away = is_away
        if not is_away:
            self._last_message = time.monotonic()  # for so long nothing could come
            self._advance()
        elif self._state is _State.STARTING:  # whatever was answered may be lost
            self._begin_to_shake_hands()
        else:
            self._miss_what_was_on_its_way()

    def _miss_what_was_on_its_way(self) -> None:
        if self._link is not None:
            error = (
                "the connection to the kernel was lost meanwhile, so it is not known whether that was done"
            )
            self._link.lost(SandboxConnectionError(error))
        run = self._current
        if run is None or isinstance(run, Turn):
            return
        self._tell_of_lost_output()
        self._check(run)

    def _check(self, run: Run) -> None:
        """When this is answered, all that came before it has been: what is missing by then, does not come."""
        request = self._session.message("shell", "kernel_info_request")
        run.checked_by = request.msg_id
        self._send(request, expect=True)

    def _over_unheard(self, run: Run) -> None:
        if run.replied:
            self._tell_of_lost_output()
            self._over(run)
            return
        if run.reply_lost:
            self._over_with_reply_lost(run)
            return
        what = "how the code ended" if run.started else "whether the code was run"
        sentence = f"the connection to the kernel was lost for a while, and with it {what}"
        self._finish(run, ConnectionLost(sentence))
        self._advance()

    def _of_the_run(self, run: Run, event: Event) -> None:
        if isinstance(event, Idle):
            run.idle_by_itself = not run.signalled
            if run.reply_lost and not run.replied:
                self._over_with_reply_lost(run)
            else:
                self._settle(run)
            return
        if isinstance(event, KernelStatus):
            return
        if isinstance(event, Done):
            self._over(run)
            return
        if isinstance(event, InputAsked):
            if not run.content.get("allow_stdin"):
                return  # a kernel that asks all the same waits for nobody: the deadline ends it
            if run.unanswered >= _MOST_QUESTIONS:
                self._dropped["too many questions"] += 1
                return
            run.unanswered += 1
            self._pause_clock(run)
            self._loop.call_later(_OVERTAKEN, lambda: self._ask(run, event))
            return
        if isinstance(event, Replied):
            run.replied = True
            self._settle(run)
        run.inbox.put(event, wake=not isinstance(event, run.quiet))
        if isinstance(event, Started):
            run.started = True
            if run.stopping:
                self._signal(run)

    def _settle(self, run: Run) -> None:
        """One half of the answer is there: expect the other, but not for ever."""
        if run.settling is None:
            run.settling = self._loop.call_later(_SETTLE, lambda: self._settle_if_quiet(run))

    def _settle_if_quiet(self, run: Run) -> None:
        if run is not self._current:
            return
        quiet_for = 0.0 if self._is_away else time.monotonic() - self._last_message
        if quiet_for < _SETTLE:
            patience = _SETTLE - quiet_for
            run.settling = self._loop.call_later(patience, lambda: self._settle_if_quiet(run))
            return
        if not run.replied:
            self._replace(run)
            return
        if not run.checked_by:  # is it only slow? What it answers now comes behind all that it has published
            self._check(run)
            run.settling = self._loop.call_later(_SETTLE, lambda: self._settle_if_quiet(run))
            return
        # Not the kernel's habit: something that it had published was lost, its status with it.
        self._tell_of_lost_output()
        self._finish(run, Done())
        self._reconnect()

    def _reconnect(self) -> None:
        self._unlink(SandboxConnectionError("the connection to the kernel was lost"))
        self._close_transport()
        self._state = _State.STARTING
        self._reconnecting = True
        patience = min(_RECONNECT, self._limits.start)
        self._start_timer = self._loop.call_later(patience, self._start_took_too_long)
        self._connect()

    def _send(self, message: Message, *, expect: bool = False) -> None:
        if self._transport is not None:
            if expect:
                self._router.sent(message)
            self._transport.send(message)

    # Death.

    def _process_ended(self, process: KernelProcess) -> None:
        if process is not self._process:  # it was given up, and its end has taken its time
            return
        now = time.monotonic()
        self._dying = True  # what is sent from now on would reach nobody
        self._last_message = max(self._last_message, now)
        self._drain(process, now)

    def _drain(self, process: KernelProcess, ended_at: float) -> None:
        now = time.monotonic()
        quiet_at = min(self._last_message + _DRAIN_QUIET, ended_at + _DRAIN_MOST)
        if now < quiet_at and not self._closing:
            self._loop.call_at(quiet_at, lambda: self._drain(process, ended_at))
        elif process is self._process:
            self._bury(process)

    def _bury(self, process: KernelProcess) -> None:
        self._process = None
        self._dying = self._claiming = self._others_run = False
        loss_told, self._loss_told = self._loss_told, False
        self._may_be_there = process.may_go_on
        _cancel(self._start_timer)
        if self._state is _State.READY:
            self._recover_output(process)
        sentence = process.why_lost or f"the kernel {_how_it_died(process)}"
        self._unlink(SandboxConnectionError(sentence))
        self._close_transport()
        self._release(process)
        if self._closing:
            return
        started = self._state is not _State.STARTING or self._reconnecting
        self._state, self._reconnecting = _State.DEAD, False
        if self._restarting:
            self._restarting = False
            self._is_missing = process.may_go_on
            if process.may_go_on:
                self._fail_to_start(self._error_of_start(process))
            else:
                self._launch()
        elif not started and process.may_go_on:
            self._is_missing = not process.is_fresh
            self._fail_to_start(self._error_of_start(process))
        elif not started and not process.is_fresh:  # it had work to do, and variables
            self._death_unreported = True
            self._launch()
        elif not started:
            self._fail_to_start(self._error_of_start(process))
        else:
            self._died(process, loss_told)

    def _recover_output(self, process: KernelProcess) -> None:
        for event in process.unpublished(self._router.published):
            if self._current is not None:
                self._current.started = True
                self._current.inbox.put(event, wake=False)
            else:
                self._of_the_kernel(event)

    def _died(self, process: KernelProcess, loss_told: bool) -> None:
        code = process.exit_code()
        if process.may_go_on:
            if self._current is not None:
                self._finish(self._current, ConnectionLost(process.why_lost, state_preserved=False))
            else:
                self._is_missing = True
        elif self._current is None and self._is_to_begin_again:
            pass  # whoever asked for that knows
        elif self._current is None and process.why_lost:
            self._loss_to_tell = Died(process.why_lost)
        elif self._current is None:
            self._death_unreported |= not loss_told
        else:
            began = self._current.started
            when = "while it ran the code" if began else "before it told that it had begun with the code"
            sentence = process.why_lost or f"the kernel {_how_it_died(process, when)}"
            self._current.lost_state = True
            self._death_unreported = self._current.abandoned
            self._finish(self._current, Died(sentence, code, process.output(), process.how_killed))
        if self._waiting_for_start or self._calls_waiting:
            self._launch()
        else:
            self._advance()

    def _error_of_start(self, process: KernelProcess) -> SandboxConnectionError:
        if process.why_lost:
            what = "started" if process.is_fresh else "reached"
            return SandboxConnectionError(f"{self._name} could not be {what}: {process.why_lost}")
        if self._too_late:
            what = f"did not answer within {self._limits.start:g} s"
        else:
            what = f"{_how_it_died(process, 'before it answered')}"
        said = process.output().strip()
        return SandboxConnectionError(
            f"{self._name} {what}; {f'it said: {said}' if said else 'it said nothing'}"
        )

    def _release(self, process: KernelProcess) -> None:
        self._releasing += 1
        self._loop.run_blocking(process.release, lambda _, error: self._released(error), apart=True)

    def _released(self, error: Exception | None) -> None:
        self._releasing -= 1
        if error is not None:
            _log.warning("could not remove what %s left: %s", self._name, error)
        if self._closing:
            self._closed()

    # The end.

    def _close(self, inbox: Inbox, sentence: str, orderly: bool) -> None:
        if self._state is _State.CLOSED:
            inbox.put(Ended())
            return
        self._waiting_for_end.append(inbox)
        first, self._closing = not self._closing, True
        if first:
            self._cut_short(sentence)
            for run in self._take_queue():
                run.inbox.put(NotRun(f"not run: {sentence}"))
            for waiting in self._take_waiting_for_start():
                waiting.put(StartFailed(SandboxNotStartedError(sentence)))
            self._refuse_calls(SandboxNotStartedError(sentence))
            self._unlink(SandboxNotStartedError(sentence))
        if self._process is not None:
            self._end_process(self._process, orderly)
        elif self._state is not _State.STARTING:
            self._closed()

    def _leave(self, inbox: Inbox, sentence: str) -> None:
        if self._process is None:
            self._leaving = self._leaving or not self._closing
            self._close(inbox, sentence, orderly=True)
            return
        process, self._process = self._process, None
        _cancel(self._start_timer)
        if self._current is not None:
            self._finish(self._current, ConnectionLost(sentence))
        if self._link is not None:
            self._link.close()
        process.leave()
        self._state = _State.DEAD
        self._close(inbox, sentence, orderly=True)

    def _end_process(self, process: KernelProcess, orderly: bool) -> None:
        if orderly:
            process.terminate()
            self._loop.call_later(_FAREWELL, process.kill)
        else:
            process.kill()

    def _cut_short(self, sentence: str) -> None:
        if self._current is not None:
            self._finish(self._current, Terminated(sentence))

    def _closed(self) -> None:
        if self._releasing:
            return
        self._close_transport()
        self._state = _State.CLOSED
        for inbox in self._waiting_for_end:
            inbox.put(Ended())
        self._waiting_for_end.clear()

    def _close_transport(self) -> None:
        if self._transport is not None:
            transport, self._transport = self._transport, None
            self._is_away = False
            transport.close()
            self._dropped += transport.dropped + self._router.dropped

    def _take_queue(self) -> list[Run]:
        runs = list(self._queue)
        self._queue.clear()
        return runs

    def _take_calls(self) -> list[GuestCall]:
        calls, self._calls_waiting = self._calls_waiting, []
        return calls

    def _take_waiting_for_start(self) -> list[Inbox]:
        inboxes, self._waiting_for_start = self._waiting_for_start, []
        return inboxes


def _new_session() -> Session:
    return Session(os.urandom(16).hex(), lambda: datetime.now(timezone.utc).isoformat())


def _cancel(timer: Timer | None) -> None:
    if timer is not None:
        timer.cancel()


def _kernel_info(content: Mapping[str, object]) -> KernelInfo:
    language_info = content.get("language_info")
    language = language_info.get("name") if isinstance(language_info, dict) else None
    features = content.get("supported_features")
    told = features if isinstance(features, list) else []
    return KernelInfo(
        language[:_LONGEST_FEATURE] if isinstance(language, str) else "",
        tuple(feature[:_LONGEST_FEATURE] for feature in told[:_MOST_FEATURES] if isinstance(feature, str)),
    )


def _how_it_died(process: KernelProcess, when: str = "") -> str:
    how = f"{_as_words(process.exit_code())} {when}".rstrip()
    return f"{how}: {process.why_ended}" if process.why_ended else how


def _as_words(exit_code: int | None) -> str:
    if exit_code is None:
        return "ended"
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = "no name"
    return f"died with signal {-exit_code} ({name})"
