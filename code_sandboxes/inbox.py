"""Where the events of one request wait for whoever made it.

The I/O thread puts, one caller takes, in its own thread or task. What waits is bounded: output that nobody
takes is kept up to a limit, its beginning and its latest part, since iopub cannot be made to wait.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable

from code_sandboxes.errors import SandboxConnectionError
from code_sandboxes.protocol.events import (
    Cleared,
    Displayed,
    Event,
    Failed,
    OutputDropped,
    Started,
    Streamed,
    Updated,
    memory_size,
)

__all__ = ["Inbox"]


# Seconds. Ctrl-C ends a wait for a lock, unless a library has set a handler of its own that lets system calls
# go on (polars: SA_RESTART, sigaction(2)); then it is noticed between two waits.
_LOOK = 0.25

# What an event takes in memory besides what it carries, about: output may come in pieces of one character.
_EVENT = 150


class Inbox:
    """A queue of events, from the I/O thread to one caller.

    Args:
        limit: bytes of memory that output may take while it waits here; control events always find room. A
            kernel can cause no more of those than it is asked.
    """

    def __init__(self, limit: int = 256 * 1024**2) -> None:
        self._pid = os.getpid()
        self._limit = limit
        self._half = limit // 2
        self._head: deque[tuple[Event, int]] = deque()
        self._tail: deque[tuple[Event, int]] = deque()
        self._head_size = self._tail_size = 0
        self._dropped = False
        self._incoming: deque[tuple[Event, int]] = deque()
        self._lock = threading.Lock()
        self._arrived = threading.Lock()
        self._arrived.acquire()
        self._wake: Callable[[], None] = self._signal

    def put(self, event: Event, *, wake: bool = True) -> None:
        """Append *event*; called by the I/O thread only. Without *wake* it is found with the next one."""
        self._incoming.append((event, _size(event)))
        # The I/O thread waits for nobody: whoever has the lock (and may have been interrupted by a signal
        # handler that itself waits for the I/O thread) takes in what has come when it takes the next event.
        if self._lock.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._lock.release()
        if wake:
            self._wake()

    def take(self) -> Event | None:
        """The next event, or None if there is none now."""
        with self._lock:
            self._take_in()
            if not self._head:
                if self._dropped:
                    self._dropped = False
                    return OutputDropped()
                self._head, self._tail = self._tail, self._head
                self._head_size, self._tail_size = self._tail_size, 0
            if not self._head:
                return None
            event, size = self._head.popleft()
            self._head_size -= size
            return event

    @property
    def is_empty(self) -> bool:
        with self._lock:
            return not (self._head or self._tail or self._incoming or self._dropped)

    def wait(self, timeout: float | None) -> None:
        """Block for a while, at most *timeout* seconds; returns at once when something has been put.

        Raises:
            SandboxConnectionError: this is a forked child, in which nobody puts anything.
        """
        self._check_process()
        if timeout is None or timeout > _LOOK:
            self._arrived.acquire(timeout=_LOOK)
        elif timeout > 0:
            self._arrived.acquire(timeout=timeout)

    def notify(self, wake: Callable[[], None]) -> None:
        """Call *wake*, in the I/O thread, instead of ending a :meth:`wait`: for who must not block.

        Raises:
            SandboxConnectionError: this is a forked child.
        """
        self._check_process()
        self._wake = wake

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise SandboxConnectionError(
                f"what process {self._pid} waits for does not come to its fork {os.getpid()};"
                " reach the sandbox with Sandbox.from_id()"
            )

    def _take_in(self) -> None:
        while self._incoming:
            event, size = self._incoming.popleft()
            if not self._tail and (not self._head or self._head_size + size <= self._half):
                self._head.append((event, size))
                self._head_size += size
                continue
            self._tail.append((event, size))
            self._tail_size += size
            room = max(self._half, self._limit - self._head_size)
            if self._tail_size > room:
                self._drop_oldest(room)

    def _signal(self) -> None:
        # A lock used as a flag: only the I/O thread opens it, so nobody can come in between.
        if self._arrived.locked():
            self._arrived.release()

    def _drop_oldest(self, room: int) -> None:
        kept: deque[tuple[Event, int]] = deque()
        while self._tail and self._tail_size > room:
            event, size = self._tail.popleft()
            if size:
                self._tail_size -= size
                self._dropped = True
            else:
                kept.append((event, size))
        self._tail.extendleft(reversed(kept))


def _size(event: Event) -> int:
    if isinstance(event, Streamed):
        return _EVENT + sys.getsizeof(event.text)
    if isinstance(event, (Displayed, Updated)):
        return _EVENT + memory_size(event.data) + memory_size(event.metadata)
    if isinstance(event, Failed):
        return _EVENT + sum(map(sys.getsizeof, (event.name, event.value, event.traceback)))
    return _EVENT if isinstance(event, (Started, Cleared)) else 0
