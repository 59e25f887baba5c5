"""The I/O thread: one for the process, however many kernels it talks to.

It waits for every socket and process, keeps every deadline, and calls back when one is due. It runs nothing
of the user's, so that nobody's slow callback delays a time-out, loses output (iopub has no back-pressure)
or keeps another sandbox waiting. Beside it there is one thread that starts processes. It lives as long as
the program, because Linux ties what a child is told about its parent's end to the *thread* that started it
(prctl(2), PR_SET_PDEATHSIG). What else blocks, removing folders that code has filled, gets a thread of its
own for as long as it takes: nobody else's start or end waits for it.

After ``os.fork()`` the child has neither thread and owns nothing: :func:`the_loop` gives it a new one.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from code_sandboxes.forks import in_forked_child

__all__ = ["Loop", "Timer", "the_loop"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

Callback = Callable[[], None]

_FARTHEST = 3600.0


class Timer:
    """A call that is due at *when* (monotonic seconds), unless it is cancelled before."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Calls back, in one thread of its own, when something can be read or a time has come.

    :meth:`call_soon` and :meth:`run_blocking` may be called from any thread, the rest only from callbacks.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._purge_at = 64
        self._unfinished: set[Callback] = set()
        self._writers: dict[int, Callback] = {}
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._awake = False
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain_waker)
        self._blocking: queue.SimpleQueue[Callback] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="code_sandboxes-io", daemon=True)
        self._thread.start()
        self._worker = threading.Thread(target=self._work, name="code_sandboxes-worker", daemon=True)
        self._worker.start()

    def call_soon(self, callback: Callback) -> None:
        """Call *callback* in the I/O thread, after what was asked for before."""
        self._calls.append(callback)
        if not self._awake and not self.is_here():
            try:
                self._awake = True
                self._waker.send(b"\0")
            except BlockingIOError:  # so many wake-ups are waiting that it will wake anyway
                return
            except BaseException:  # Ctrl-C, here of all places: without the byte nobody would ever wake it
                self._awake = False
                raise

    def is_here(self) -> bool:
        """Is the caller a callback of this loop?"""
        return threading.get_ident() == self._thread.ident

    def run_blocking(
        self,
        function: Callable[[], _T],
        then: Callable[[_T | None, Exception | None], None],
        *,
        apart: bool = False,
    ) -> None:
        """Run *function* in the worker thread, then *then(value, error)* in the I/O thread.

        With *apart* it gets a thread of its own; without, the order of the calls is kept.
        """

        def work() -> None:
            value: _T | None = None
            failure: Exception | None = None
            try:
                value = function()
            except Exception as error:  # whatever it is belongs to the one who asked
                failure = error
            self.call_soon(lambda: then(value, failure))

        if not apart:
            self._blocking.put(work)
            return
        try:
            threading.Thread(target=work, name="code_sandboxes-apart", daemon=True).start()
        except RuntimeError:  # no more threads to be had: it takes its turn with the others
            self._blocking.put(work)

    def call_at(self, when: float, callback: Callback) -> Timer:
        if len(self._timers) >= self._purge_at:
            self._purge_timers()
        timer = Timer(when, callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def _purge_timers(self) -> None:
        # Nearly every deadline is cancelled long before it is due; what it refers to must not stay.
        self._timers = [entry for entry in self._timers if entry[2].callback is not None]
        heapq.heapify(self._timers)
        self._purge_at = max(64, 2 * len(self._timers))

    def call_later(self, delay: float, callback: Callback) -> Timer:
        return self.call_at(time.monotonic() + delay, callback)

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call *callback* whenever *fd* can be read, until :meth:`remove_reader`."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def remove_reader(self, fd: int) -> None:
        self._selector.unregister(fd)
        self._writers.pop(fd, None)

    def call_when_writable(self, fd: int, callback: Callback) -> None:
        """Call *callback* once, when *fd*, which has a reader, can be written to."""
        self._writers[fd] = callback
        self._selector.modify(
            fd, selectors.EVENT_READ | selectors.EVENT_WRITE, self._selector.get_key(fd).data
        )

    def call_again(self, callback: Callback) -> None:
        """Call *callback* in the next round too: it stopped early to let others have their turn."""
        self._unfinished.add(callback)

    def forget(self, callback: Callback) -> None:
        """Take back :meth:`call_again`."""
        self._unfinished.discard(callback)

    def _run(self) -> None:
        while True:
            ready = self._selector.select(self._patience())
            unfinished, self._unfinished = self._unfinished, set()
            for key, events in ready:
                if events & selectors.EVENT_READ:
                    self._call(key.data)
                    unfinished.discard(key.data)
                if events & selectors.EVENT_WRITE:
                    self._call_writer(key)
            for callback in unfinished:
                self._call(callback)
            self._run_timers()
            self._run_calls()

    def _call_writer(self, key: selectors.SelectorKey) -> None:
        writer = self._writers.pop(key.fd, None)
        if writer is not None:  # its reader may have removed it just now
            self._selector.modify(key.fd, selectors.EVENT_READ, key.data)
            self._call(writer)

    def _patience(self) -> float | None:
        if self._unfinished or self._calls:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        # epoll_wait(2) takes an int of milliseconds: what is farther away is looked at again.
        return min(_FARTHEST, max(0.0, self._timers[0][0] - time.monotonic()))

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._call(callback)

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):
            self._call(self._calls.popleft())

    def _drain_waker(self) -> None:
        # In this order: a call that is appended after the flag is down wakes us again.
        self._woken.recv(4096)
        self._awake = False

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception:  # one kernel's bug must not end the thread that all of them need
            _log.exception("a callback of the I/O thread failed")

    def _work(self) -> None:
        while True:
            self._blocking.get()()


_loop: Loop | None = None
_creating = threading.Lock()


def the_loop() -> Loop:
    """The loop of this process, started on first need."""
    global _loop
    if _loop is not None:
        return _loop
    with _creating:
        if _loop is None:
            _loop = Loop()
        return _loop


def _let_go() -> object:
    global _loop, _creating
    kept, _loop, _creating = _loop, None, threading.Lock()
    return kept


in_forked_child(_let_go)
