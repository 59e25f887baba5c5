"""A pool: sandboxes that are started before somebody asks for them, each handed out once.

One :class:`_Pool` is behind both fronts. What it keeps changes in the I/O thread only, and there starts and
ends go on by themselves, so it needs no lock, thread or task.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import TypeVar

from code_sandboxes import awaiting, blocking
from code_sandboxes.async_sandbox import _CLASSES as _ASYNC_CLASSES, AsyncSandbox
from code_sandboxes.awaiting import documented_by as _documented_by
from code_sandboxes.checks import check_seconds
from code_sandboxes.errors import (
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxNotStartedError,
    SandboxTimeoutError,
)
from code_sandboxes.front import Front, known_variant
from code_sandboxes.inbox import Inbox
from code_sandboxes.info import SandboxStatus, SandboxVariant
from code_sandboxes.operations import Core
from code_sandboxes.protocol.events import Event
from code_sandboxes.sandbox import _CLASSES, Sandbox
from code_sandboxes.steps import Operation, drive_in_loop, log_failure, next_event
from code_sandboxes.transports.loop import Timer, the_loop

__all__ = ["AsyncSandboxPool", "SandboxPool"]

AnyPool = TypeVar("AnyPool", bound="SandboxPool")
AnyAsyncPool = TypeVar("AnyAsyncPool", bound="AsyncSandboxPool")

# Seconds in which a kernel that has nothing to do runs no code, also on a machine that is busy.
_ANSWERS_WITHIN = 5.0


class SandboxPool:
    """Sandboxes that are running before they are needed; each is handed out once, then ended and replaced.

    All are started at once, in the background. ``with`` closes the pool. It may be used from many threads.

    Args:
        variant: where, as in :meth:`Sandbox.create`.
        size: how many there are in all, ready or handed out.
        options: those of :meth:`Sandbox.create`.

    Raises:
        ValueError: there is no such variant; or *size* is less than 1.
        TypeError: an option is unknown, or a parameter is of the wrong type.
        SandboxConfigurationError: the variant cannot honour a setting.
    """

    def __init__(self, variant: SandboxVariant | str | None = None, *, size: int, **options: object) -> None:
        self._class = _CLASSES[known_variant(variant)]
        self._pool = _Pool(lambda: self._class(**options)._core, size)  # type: ignore[arg-type]  # it checks

    @property
    def size(self) -> int:
        """How many sandboxes there are in all, ready or handed out."""
        return self._pool.size

    def acquire(self, timeout: float | None = None) -> Sandbox:
        """A running sandbox that nobody has used, with its whole lifetime before it.

        Who asks first gets one first. It goes back by :meth:`release`, or by ending in any other way, as
        at the end of a ``with`` over it.

        Args:
            timeout: seconds to wait while none is ready; 0 not to wait; by default there is no limit.

        Raises:
            SandboxTimeoutError: none was ready in that time.
            SandboxNotStartedError: the pool is closed.
            SandboxConnectionError: one could not be started. Each failure is told once; another start is
                on its way.
        """
        return self._class._around(blocking.drive(self._pool.acquire(timeout)))

    def release(self, sandbox: Sandbox) -> None:
        """End *sandbox* and start another one in its place; one that has ended by itself may be given, too.

        Raises:
            ValueError: it is not from this pool, or was released before.
        """
        blocking.drive(self._pool.release(sandbox))

    def close(self) -> None:
        """End all sandboxes of the pool, also those that are handed out or starting; who waits is told."""
        blocking.drive(self._pool.close())

    def __enter__(self: AnyPool) -> AnyPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool.is_of_this_process:  # a forked child leaves the block too; it ends nothing
            self.close()


class AsyncSandboxPool:
    __doc__ = (SandboxPool.__doc__ or "").replace("``with``", "``async with``")

    def __init__(self, variant: SandboxVariant | str | None = None, *, size: int, **options: object) -> None:
        self._class = _ASYNC_CLASSES[known_variant(variant)]
        self._pool = _Pool(lambda: self._class(**options)._core, size)  # type: ignore[arg-type]  # it checks

    @property
    @_documented_by(SandboxPool.size)
    def size(self) -> int:
        return self._pool.size

    @_documented_by(SandboxPool.acquire)
    async def acquire(self, timeout: float | None = None) -> AsyncSandbox:
        return self._class._around(await awaiting.drive(self._pool.acquire(timeout)))

    @_documented_by(SandboxPool.release)
    async def release(self, sandbox: AsyncSandbox) -> None:
        await awaiting.drive(self._pool.release(sandbox))

    @_documented_by(SandboxPool.close)
    async def close(self) -> None:
        await awaiting.drive(self._pool.close())

    async def __aenter__(self: AnyAsyncPool) -> AnyAsyncPool:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool.is_of_this_process:
            await self.close()


@dataclass(frozen=True, slots=True)
class _Answer(Event):
    """What somebody who waited gets."""

    core: Core | None = None
    error: Exception | None = None


class _Waiter:
    """Somebody who wants a sandbox."""

    def __init__(self, timeout: float | None) -> None:
        self.inbox = Inbox()
        self.timeout = timeout
        self.timer: Timer | None = None
        self.is_late = False
        self.answered = _Answer()

    def stop_clock(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def answer(self, answer: _Answer) -> None:
        self.stop_clock()
        self.answered = answer
        self.inbox.put(answer)


class _Pool:
    """What is ready, what is handed out, and who waits.

    A sandbox is starting, then ready, looked at, handed out. Wherever it ends, another one is made; but one
    that could not be started is made up for only when its failure has been told.
    """

    def __init__(self, make: Callable[[], Core], size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be an int, not {type(size).__name__}")
        if size < 1:
            raise ValueError(f"size must be 1 or more, not {size}")
        self.size = size
        self._make = make
        self._pid = os.getpid()
        self._loop = the_loop()
        self._closed = False
        self._alive: set[Core] = set()
        self._starting: set[Core] = set()
        self._ready: deque[Core] = deque()
        self._looked_at: set[Core] = set()
        self._out: set[Core] = set()
        self._failures: deque[Exception] = deque()
        self._waiters: deque[_Waiter] = deque()
        self._closers: list[Inbox] = []
        self._releasable: weakref.WeakSet[Core] = weakref.WeakSet()
        first = make()  # here, so that what is wrong with the arguments is raised here
        atexit.register(self._program_ends)
        self._loop.call_soon(lambda: self._start(first))
        for _ in range(size - 1):
            self._replace()

    # What any thread may call.

    @property
    def is_of_this_process(self) -> bool:
        return os.getpid() == self._pid

    def _check_process(self) -> None:
        if not self.is_of_this_process:
            raise SandboxConnectionError(
                f"the pool belongs to process {self._pid}, and this is its fork {os.getpid()};"
                " make another one here"
            )

    def acquire(self, timeout: float | None) -> Operation[Core]:
        self._check_process()
        waiter = _Waiter(None if timeout is None else check_seconds("timeout", timeout))
        try:
            self._loop.call_soon(lambda: self._ask(waiter))
            answer = yield from _answer_in(waiter.inbox)
        except BaseException:  # Ctrl-C or a cancellation: it may be handed out already, and was not seen
            self._loop.call_soon(lambda: self._withdraw(waiter))
            raise
        if answer.error is not None:
            raise answer.error
        assert answer.core is not None
        return answer.core

    def release(self, sandbox: object) -> Operation[None]:
        self._check_process()
        if not isinstance(sandbox, Front):
            raise TypeError(f"release() takes a sandbox, not {type(sandbox).__name__}")
        try:
            self._releasable.remove(sandbox._core)
        except KeyError:
            raise ValueError(f"{sandbox.id} is not from this pool, or was released before") from None
        yield from sandbox._core.terminate(orderly=False, why="it was released to its pool")

    def close(self) -> Operation[None]:
        self._check_process()
        inbox = Inbox()
        self._loop.call_soon(lambda: self._close(inbox))
        yield from _answer_in(inbox)

    def _program_ends(self) -> None:
        self._closed = True  # its sandboxes end as all others do; none is replaced

    # What happens in the I/O thread: sandboxes.

    def _replace(self) -> None:
        if not self._closed:
            self._loop.run_blocking(self._make, self._made)

    def _made(self, core: Core | None, error: Exception | None) -> None:
        if core is not None:
            self._start(core)
        elif error is not None:
            self._failed(error)

    def _start(self, core: Core) -> None:
        if self._closed:
            return
        self._alive.add(core)
        self._starting.add(core)
        core.on_end.append(lambda: self._ended(core))
        drive_in_loop(self._loop, core.start(), lambda error: self._started(core, error))

    def _started(self, core: Core, error: Exception | None) -> None:
        self._starting.discard(core)
        if error is None and core not in self._alive:
            error = SandboxNotStartedError(f"{core.id} ended as soon as it was started")
        if error is not None:
            self._alive.discard(core)  # it may never have begun, and so not end
            self._failed(error)
        elif self._closed:
            self._end(core, "its pool was closed")
        else:
            self._ready.append(core)
            self._serve()
        self._tell_if_closed()

    def _failed(self, error: Exception) -> None:
        self._failures.append(error)
        self._serve()

    def _look_at(self, core: Core) -> None:
        self._looked_at.add(core)
        drive_in_loop(self._loop, _check(core), lambda error: self._was_looked_at(core, error))

    def _was_looked_at(self, core: Core, error: Exception | None) -> None:
        self._looked_at.discard(core)
        if error is not None or core.status is not SandboxStatus.RUNNING:
            self._end(core, f"its pool found that it does not work any more: {error}")
        elif self._waiters:
            self._out.add(core)
            self._releasable.add(core)
            self._waiters.popleft().answer(_Answer(core))
        else:
            self._ready.appendleft(core)
        self._serve()

    def _end(self, core: Core, why: str) -> None:
        drive_in_loop(self._loop, core.terminate(orderly=False, why=why), log_failure)

    def _ended(self, core: Core) -> None:
        if core not in self._alive:
            return
        self._alive.discard(core)
        self._out.discard(core)
        if core in self._ready:
            self._ready.remove(core)
        if core not in self._starting:  # else its start tells
            self._replace()
        self._tell_if_closed()

    # Those who wait.

    def _ask(self, waiter: _Waiter) -> None:
        if self._closed:
            waiter.answer(_Answer(error=_closed()))
            return
        self._waiters.append(waiter)
        if waiter.timeout is not None:
            waiter.timer = self._loop.call_later(waiter.timeout, lambda: self._is_late(waiter))
        self._serve()

    def _is_late(self, waiter: _Waiter) -> None:
        waiter.is_late = True
        self._serve()

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            waiter.stop_clock()
            return
        log_failure(waiter.answered.error)
        core = waiter.answered.core
        if core is not None and core in self._out:
            self._out.discard(core)
            self._releasable.discard(core)
            self._ready.appendleft(core)
            self._serve()

    def _serve(self) -> None:
        while self._waiters and self._failures:
            self._waiters.popleft().answer(_Answer(error=self._failures.popleft()))
            self._replace()
        while self._ready and len(self._looked_at) < len(self._waiters):
            self._look_at(self._ready.popleft())
        # Who is among the first will have one of those that are being looked at in a moment.
        for waiter in [each for each in islice(self._waiters, len(self._looked_at), None) if each.is_late]:
            self._waiters.remove(waiter)
            waiter.answer(_Answer(error=self._timed_out(waiter)))

    def _timed_out(self, waiter: _Waiter) -> SandboxTimeoutError:
        return SandboxTimeoutError(
            f"no sandbox was ready within {waiter.timeout:g} s: {len(self._out)} of {self.size} are"
            f" handed out, {self.size - len(self._out)} are starting; release one, or make the pool larger"
        )

    # The end.

    def _close(self, inbox: Inbox) -> None:
        self._closed = True
        atexit.unregister(self._program_ends)
        self._closers.append(inbox)
        while self._waiters:
            self._waiters.popleft().answer(_Answer(error=_closed()))
        for core in list(self._alive):
            self._end(core, "its pool was closed")
        self._tell_if_closed()

    def _tell_if_closed(self) -> None:
        if self._closed and not self._alive and not self._starting:
            while self._closers:
                self._closers.pop().put(_Answer())


def _check(core: Core) -> Operation[None]:
    """Only the kernel itself can tell that it still answers: it runs no code, in a millisecond or two.

    A process that is there may be stuck, or have died a moment ago. It also counts as use, so that
    its idle time begins anew.
    """
    result = yield from core.run_code(
        "", language=None, context=None, timeout=_ANSWERS_WITHIN, listen=False, allow_stdin=False
    )
    result.raise_for_status()
    if not result.state_preserved:
        raise SandboxConnectionError(f"the kernel of {core.id} died and was started again")
    if core.config.max_lifetime:
        with suppress(SandboxConfigurationError):  # what is reserved for it in a cloud is all that there is
            yield from core.set_timeout(core.config.max_lifetime)


def _answer_in(inbox: Inbox) -> Operation[_Answer]:
    answer = yield from next_event(inbox)
    assert isinstance(answer, _Answer)
    return answer


def _closed() -> SandboxNotStartedError:
    return SandboxNotStartedError("the pool is closed")
