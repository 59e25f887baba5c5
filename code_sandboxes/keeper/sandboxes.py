"""The sandboxes that a keeper keeps: their contexts and kernels, whose turn it is, and when they end.

Everything here is called in the I/O thread. What is in ``about`` is the programs' business; the keeper hands
it on as it was given.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.keeper.kernels import HostedKernel, Observer, descriptors_left
from code_sandboxes.keeper.leftovers import Leftovers
from code_sandboxes.keeper.quarters import Host as QuartersHost, Quarters
from code_sandboxes.reaper import remove_tree
from code_sandboxes.transports.loop import Timer

__all__ = ["Host", "KeptSandbox", "Program", "RefusedError", "Reply"]

_log = logging.getLogger(__name__)

# What a kernel takes, and what must never be missing.
_SPARE_DESCRIPTORS = 40

# How long an orderly end may take before it becomes a kill.
_FAREWELL = 1.0

# How long a kernel may take to show that it does nothing, before what it does is interrupted.
_A_MOMENT = 0.1

# How long a program may take to give its turn when it has no run on.
_UNHEARD = 2.0

# How long what is interrupted may take to stop, before its kernel is killed.
_GRACE = 5.0

_SIGNALS: Mapping[str, Callable[[HostedKernel], None]] = {
    "interrupt": HostedKernel.interrupt,
    "terminate": HostedKernel.terminate,
    "kill": HostedKernel.kill,
}

Reply = Callable[[Mapping[str, object]], None]


class RefusedError(Exception):
    """A request that is not granted; *kind* tells programs which of their errors to raise."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Program(Protocol):
    """A program that is connected."""

    def tell(self, event: Mapping[str, object]) -> None: ...


class Host(QuartersHost, Protocol):
    """What a sandbox needs of the keeper it is in."""

    leftovers: Leftovers

    def forget(self, sandbox: KeptSandbox) -> None: ...


class _Nobody:
    """Has the turn of a program that is not there any more, as long as its run is on."""

    def tell(self, event: Mapping[str, object]) -> None:
        return


class _Turn:
    """Whose run may be on in a kernel. A program keeps its turn until another one wants it."""

    def __init__(self, sandbox_id: str, kernel_number: int) -> None:
        self._sandbox_id = sandbox_id
        self._number = kernel_number
        self.holder: Program | None = None
        self._waiting: deque[tuple[Program, Reply]] = deque()

    def ask(self, program: Program, reply: Reply) -> None:
        if self.holder is None or self.holder is program:
            self.holder = program
            reply({})
            return
        self._waiting.append((program, reply))
        if len(self._waiting) == 1:
            self._tell_that_it_is_wanted()

    def give(self) -> None:
        """It is over; who has waited longest gets it."""
        self.holder = None
        if self._waiting:
            self.holder, reply = self._waiting.popleft()
            reply({})
        if self._waiting:
            self._tell_that_it_is_wanted()

    def forget(self, program: Program) -> None:
        """*program* does not wait any more."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not program)

    @property
    def is_wanted(self) -> bool:
        return bool(self._waiting)

    def take_away(self) -> None:
        """Whoever has it does not hear that it is wanted."""
        if self.holder is not None:
            self.holder.tell({"event": "turn_lost", "sandbox": self._sandbox_id, "kernel": self._number})
        self.give()

    def close(self) -> None:
        """The kernel has ended: nobody need wait."""
        waiting, self._waiting = self._waiting, deque()
        for _, reply in waiting:
            reply({"error": {"kind": "gone", "text": "the kernel has ended"}})

    def _tell_that_it_is_wanted(self) -> None:
        if self.holder is not None:
            self.holder.tell({"event": "turn_wanted", "sandbox": self._sandbox_id, "kernel": self._number})


class _Kept:
    """A running kernel of a context, and who uses it."""

    def __init__(self, sandbox_id: str, number: int, kernel: HostedKernel) -> None:
        self.number = number
        self.kernel = kernel
        self.turn = _Turn(sandbox_id, number)
        self.users: set[Program] = set()
        self.observer: Observer | None = None

    def close_observer(self) -> None:
        observer, self.observer = self.observer, None
        if observer is not None:
            observer.close()


class _Context:
    def __init__(self, about: Mapping[str, Any]) -> None:
        self.about = about
        self.kept: _Kept | None = None
        self.is_launching = False
        self.interrupt_mode = ""
        self.starting: list[tuple[Program, Reply]] = []


class KeptSandbox:
    """One sandbox.

    Args:
        host: the keeper.
        sandbox_id: of the programs' making.
        record: ``about``, ``tags`` and the ``plan`` of its isolation; and if it has such limits ``lifetime``
            with a ``reason``, and ``idle_timeout``; seconds.
        folder: its own; made and removed here.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, host: Host, sandbox_id: str, record: Mapping[str, Any], folder: Path) -> None:
        self.id = sandbox_id
        self.tags: dict[str, str] = record["tags"]
        self._host = host
        self._loop = host.loop
        self._about = record["about"]
        self._folder = folder
        folder.mkdir(mode=0o700)
        self._quarters = Quarters(host, sandbox_id, Plan.from_json(record["plan"]), folder, self._check_end)
        self._programs: set[Program] = set()
        self._contexts: dict[str, _Context] = {}
        self._deleted: set[str] = set()
        self._running: dict[int, _Kept] = {}
        self._launching = 0
        self._ended: dict[int, _Kept] = {}  # what programs have not let go of yet
        self._detached = False
        self._why_ending = ""
        self._removing = False
        self._waiting_for_end: list[Reply] = []
        self._idle_timeout: float | None = record.get("idle_timeout")
        self._idle_since = time.monotonic()
        self._idle_timer: Timer | None = None
        self._has_begun = False  # some kernel was started
        self._asked: set[_Kept] = set()  # whether they are idle
        self._asked_at = 0.0
        self._end_timer: Timer | None = None
        if record.get("lifetime") is not None:
            self._expire_in(record["lifetime"], record["reason"])
        if self._idle_timeout is not None:
            self._look_whether_idle()
        self._quarters.prepare()  # while the program is busy with other things

    # What it is.

    @property
    def is_ending(self) -> bool:
        return bool(self._why_ending)

    def description(self) -> dict[str, object]:
        left = None if self._end_timer is None else self._end_timer.when - time.monotonic()
        return {
            "sandbox": self.id,
            "about": self._about,
            "tags": self.tags,
            "plan": self._quarters.plan.as_json(),
            "time_left": left,
            "contexts": [context.about for context in self._contexts.values()],
            "home": str(self._quarters.home),
            "programs": len(self._programs),
            "detached": self._detached,
            "paused": self._quarters.is_paused,
            "kernels": len(self._running),
            "container": self._quarters.container,
            "jupyter_server": self._quarters.server_url,
        }

    def network_log(self) -> list[dict[str, object]]:
        """What was tried to reach, as far as a proxy was asked."""
        return self._quarters.network_log()

    def pause(self, program: Program, reply: Reply, *, on: bool) -> None:
        """Stop all its processes, or let them go on."""

        def done(_: None, error: Exception | None) -> None:
            if error is not None:
                reply({"error": {"kind": "connection", "text": f"not all of it stopped: {error}"}})
                return
            self._tell_others(program, {"event": "paused", "sandbox": self.id, "on": on})
            reply({})

        (self._quarters.pause if on else self._quarters.resume)(done)

    def set_tags(self, program: Program, tags: dict[str, str]) -> None:
        self.tags = tags
        self._tell_others(program, {"event": "tags", "sandbox": self.id, "tags": tags})

    # Who uses it.

    def attach(self, program: Program) -> None:
        self._programs.add(program)

    def is_used_by(self, program: Program) -> bool:
        return program in self._programs

    def detach(self, program: Program, *, keep: bool) -> None:
        """*program* lets go of it; with *keep* it goes on although nobody is attached."""
        self._detached |= keep
        self._leave(program, interrupt=False)

    def gone(self, program: Program) -> None:
        """*program* has ended."""
        self._leave(program, interrupt=True)

    def _leave(self, program: Program, *, interrupt: bool) -> None:
        if program not in self._programs:
            return
        self._programs.discard(program)
        if not self._programs and not self._detached:
            self.end("the last program that was attached to it ended", orderly=False)
        for context in self._contexts.values():
            context.starting = [waiting for waiting in context.starting if waiting[0] is not program]
        for kept in list(self._running.values()):
            if not self.is_ending:
                self._leave_kernel(kept, program, interrupt=interrupt)
        for number in list(self._ended):
            self.release(program, number)

    def _leave_kernel(self, kept: _Kept, program: Program, *, interrupt: bool) -> None:
        kept.users.discard(program)
        kept.turn.forget(program)
        if kept.turn.holder is not program:
            return
        nobody = kept.turn.holder = _Nobody()

        def if_not_settled(act: Callable[[], None]) -> Callable[[], None]:
            return lambda: act() if kept.turn.holder is nobody else None

        # For all we know a run of it is on.
        self._when_done(kept, if_not_settled(kept.turn.give))
        if interrupt:
            self._loop.call_later(_A_MOMENT, if_not_settled(kept.kernel.interrupt))
            self._loop.call_later(_A_MOMENT + _GRACE, if_not_settled(kept.kernel.kill))

    def _tell_others(self, program: Program | None, event: Mapping[str, object]) -> None:
        for other in list(self._programs):  # one that does not listen is hung up on, and leaves
            if other is not program:
                other.tell(event)

    # Its contexts and kernels.

    def kernel(self, program: Program, request: Mapping[str, Any], reply: Reply) -> None:
        """The kernel of a context, which is started if there is none; the context, too, if it is new.

        Raises:
            RefusedError: another context has that name.
        """
        about = request["context"]
        context = self._contexts.get(about["id"])
        if context is None:
            if about["id"] in self._deleted:
                raise RefusedError("gone", "it was deleted")
            if any(
                about["name"] in (each.about["name"], each.about["id"]) for each in self._contexts.values()
            ):
                raise RefusedError("value", f"there is a context {about['name']!r} already")
            context = self._contexts[about["id"]] = _Context(about)
            self._tell_others(program, {"event": "context", "sandbox": self.id, "context": about})
        if context.kept is not None:
            reply(self._handed_out(context, context.kept, program, fresh=False))
            return
        if not context.is_launching and request["launch"] is None:
            raise RefusedError("gone", "it does not run, and who asks cannot start it")
        left = descriptors_left()
        if left is not None and left < _SPARE_DESCRIPTORS:
            raise RefusedError("connection", f"the keeper has only {left} file descriptors left")
        context.starting.append((program, reply))
        if not context.is_launching:
            self._start(context, request["launch"])

    def _start(self, context: _Context, launch: Mapping[str, Any]) -> None:
        number = self._host.next_number()
        context.is_launching = True
        self._launching += 1
        context.interrupt_mode = launch["interrupt_mode"]
        self._quarters.start(
            number,
            {**launch, "key": context.about.get("key")},
            lambda kernel, error: self._started(context, number, kernel, error),
        )

    def _started(
        self, context: _Context, number: int, kernel: HostedKernel | None, error: Exception | None
    ) -> None:
        waiting, context.starting = context.starting, []
        context.is_launching = False
        self._launching -= 1
        if kernel is None:
            why = f"the kernel {context.about['kernel_name']!r} could not be started: {error}"
            kind = "configuration" if isinstance(error, SandboxConfigurationError) else "connection"
            for _, reply in waiting:
                reply({"error": {"kind": kind, "text": why}})
            self._check_end()
            return
        context.kept = kept = self._running[number] = _Kept(self.id, number, kernel)
        self._has_begun = True
        self._touch()
        why_not = ""
        try:
            kernel.watch(self._loop, lambda: self._process_ended(context, kept))
            if self._idle_timeout is not None:
                self._observe(kept)
        except Exception as failure:  # too few descriptors, mostly
            why_not = f"the kernel could not be watched: {failure}"
            _log.error("%s", why_not)
            kernel.abort()
            self._process_ended(context, kept)
        if self.is_ending:
            why_not = f"the sandbox ended: {self._why_ending}"
        elif self._contexts.get(context.about["id"]) is not context:
            why_not = "it was deleted"
        if why_not:
            kernel.kill()
            for _, reply in waiting:
                reply({"error": {"kind": "gone", "text": why_not}})
            return
        fresh = True
        for program, reply in waiting:
            reply(self._handed_out(context, kept, program, fresh=fresh))
            fresh = False

    def _handed_out(
        self, context: _Context, kept: _Kept, program: Program, *, fresh: bool
    ) -> dict[str, object]:
        kept.users.add(program)
        if fresh:
            kept.turn.holder = program
        return {
            "kernel": kept.number,
            "connection": kept.kernel.connection,
            "folder": str(kept.kernel.folder),
            "journal": kept.kernel.journal,
            "interrupt_mode": context.interrupt_mode,
            "fresh": fresh,
        }

    def _process_ended(self, context: _Context, kept: _Kept) -> None:
        """A kernel's end is the end of all that it started."""
        if kept.kernel.leaves_nothing:
            self._kernel_ended(context, kept)
        else:
            self._host.leftovers.end(kept.kernel.folder, lambda: self._kernel_ended(context, kept))

    def _kernel_ended(self, context: _Context, kept: _Kept) -> None:
        if kept.number not in self._running:  # told already: it could not be watched
            return
        context.kept = None
        del self._running[kept.number]
        kept.close_observer()
        kept.turn.close()
        event = {
            "event": "kernel_ended",
            "sandbox": self.id,
            "kernel": kept.number,
            "exit_code": kept.kernel.exit_code(),
            "output": kept.kernel.output(),
            "why": kept.kernel.why_ended(),
        }
        for program in list(kept.users):
            program.tell(event)
        self._ended[kept.number] = kept
        if not kept.users:
            self._remove_kernel(kept)
        self._touch()
        self._answered(kept)
        self._check_end()

    def release(self, program: Program, number: int) -> None:
        """*program* has no more use for what is left of a kernel that has ended."""
        kept = self._ended.get(number)
        if kept is not None:
            kept.users.discard(program)
            if not kept.users:
                self._remove_kernel(kept)

    def _remove_kernel(self, kept: _Kept) -> None:
        del self._ended[kept.number]
        kept.kernel.close()
        if not self._removing:
            folder = str(kept.kernel.folder)
            self._loop.run_blocking(lambda: remove_tree(folder), _log_failure, apart=True)

    def signal(self, number: int, what: str) -> None:
        """``interrupt``, ``terminate`` or ``kill`` a kernel; one that has ended is left in peace."""
        kept = self._running.get(number)
        if kept is not None and not self.is_ending:
            _SIGNALS[what](kept.kernel)

    def ask_for_turn(self, program: Program, number: int, reply: Reply) -> None:
        """*reply* when a run of *program* may begin in that kernel.

        Raises:
            RefusedError: it has ended.
        """
        kept = self._running.get(number)
        if kept is None:
            raise RefusedError("gone", "the kernel has ended")
        kept.turn.ask(program, reply)
        holder = kept.turn.holder
        if kept.turn.is_wanted:
            self._loop.call_later(_UNHEARD, lambda: self._look_whether_it_hears(kept, holder))

    def _look_whether_it_hears(self, kept: _Kept, holder: Program | None) -> None:
        """A program that is stopped, say in a debugger, gives no turn, although its run is over."""

        def is_unheard() -> bool:
            return kept.turn.is_wanted and kept.turn.holder is holder and kept.number in self._running

        def look_again() -> None:
            if is_unheard():
                kept.turn.take_away()

        if is_unheard():
            self._when_done(kept, lambda: self._loop.call_later(_UNHEARD, look_again))

    def give_turn(self, program: Program, number: int) -> None:
        kept = self._running.get(number)
        if kept is not None and kept.turn.holder is program:
            kept.turn.give()

    def delete_context(self, program: Program, context_id: str) -> None:
        context = self._contexts.pop(context_id, None)
        if context is None:
            return
        if not context_id.startswith("default"):  # those of runs that name none come again
            self._deleted.add(context_id)
        self._tell_others(program, {"event": "context_deleted", "sandbox": self.id, "context": context_id})
        if context.kept is not None:
            context.kept.kernel.kill()

    # When it is idle, and when it ends.

    def _when_done(self, kept: _Kept, then: Callable[[], object]) -> None:
        """Call *then* when the kernel has done everything that it was asked so far."""

        def done() -> None:
            if self._idle_timeout is None and not observer.is_asked:
                kept.close_observer()
            then()

        observer = self._observe(kept)
        observer.when_done(done)

    def _observe(self, kept: _Kept) -> Observer:
        if kept.observer is None:
            kept.observer = Observer(self._loop, kept.kernel, self._touch)
        return kept.observer

    def _touch(self) -> None:
        self._idle_since = time.monotonic()

    def _look_whether_idle(self) -> None:
        assert self._idle_timeout is not None
        if self._launching or not self._has_begun or self._runs_commands():
            self._touch()
        left = self._idle_since + self._idle_timeout - time.monotonic()
        if left > 0:
            self._idle_timer = self._loop.call_later(left, self._look_whether_idle)
        else:
            self._ask_whether_idle()

    def _runs_commands(self) -> bool:
        observers = (kept.observer for kept in self._running.values())
        return any(observer is not None and observer.runs_commands for observer in observers)

    def _ask_whether_idle(self) -> None:
        """No use was heard of for so long: a kernel that answers at once confirms it."""
        self._asked_at = time.monotonic()
        self._asked = set(self._running.values())
        for kept in list(self._asked):
            self._observe(kept).when_done(lambda kept=kept: self._answered(kept))  # type: ignore[misc]
        if not self._asked:
            self._end_if_idle()

    def _answered(self, kept: _Kept) -> None:
        """It does nothing, or has ended."""
        if kept not in self._asked:
            return
        self._asked.discard(kept)
        if not self._asked and not self.is_ending:
            if time.monotonic() - self._asked_at > _A_MOMENT:
                self._touch()
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        assert self._idle_timeout is not None
        if time.monotonic() - self._idle_since < self._idle_timeout:
            self._look_whether_idle()
        else:
            self.end(f"it was idle for {self._idle_timeout:g} s", orderly=True)

    def set_lifetime(self, program: Program, seconds: float, reason: str) -> None:
        self._expire_in(seconds, reason)
        self._tell_others(program, {"event": "lifetime", "sandbox": self.id, "time_left": seconds})

    def _expire_in(self, seconds: float, reason: str) -> None:
        """End it that long from now, whatever was said before."""
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._end_timer = self._loop.call_later(seconds, lambda: self.end(reason, orderly=True))

    def end(self, why: str, *, orderly: bool, by: Program | None = None) -> None:
        """End its kernels, then remove all that is left; the programs but *by* are told *why*."""
        if not self.is_ending:
            _log.info("%s ends: %s", self.id, why)
            self._why_ending = why
            for timer in (self._end_timer, self._idle_timer):
                if timer is not None:
                    timer.cancel()
            self._tell_others(by, {"event": "ending", "sandbox": self.id, "why": why})
        orderly = orderly and not self._quarters.is_paused  # what is stopped does nothing in an orderly way
        for kept in self._running.values():
            _SIGNALS["terminate" if orderly else "kill"](kept.kernel)
        if orderly:
            self._loop.call_later(_FAREWELL, lambda: self.end(why, orderly=False))
        else:
            self._quarters.end()
        self._check_end()

    def when_ended(self, reply: Reply) -> None:
        self._waiting_for_end.append(reply)

    def _check_end(self) -> None:
        if not self.is_ending or self._running or self._launching or self._removing:
            return
        if not self._quarters.are_empty:
            self._quarters.end()  # and this comes again
            return
        self._removing = True
        for kept in self._ended.values():
            kept.kernel.close()
        self._ended.clear()
        self._loop.run_blocking(self._quarters.remove, lambda _, error: self._removed(error), apart=True)

    def _removed(self, error: Exception | None) -> None:
        answer: dict[str, object] = {}
        if error is not None:
            _log.error("could not remove all of %s: %s", self.id, error)
            answer = {"error": {"kind": "connection", "text": f"not all could be removed: {error}"}}
        self._host.forget(self)
        for reply in self._waiting_for_end:
            reply(answer)


def _log_failure(_: object, error: Exception | None) -> None:
    if error is not None:
        _log.error("could not remove what a kernel left: %s", error)
