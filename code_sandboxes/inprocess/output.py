"""What a kernel in this process says, on its way to whoever listens.

Any thread may speak. Text is gathered, so that a print is no message of its own while the listener is busy;
the order is kept; and a thread that prints faster than anybody listens has to wait.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from code_sandboxes.guest.launch import publishable
from code_sandboxes.protocol.messages import Channel, Message, Session

__all__ = ["Output"]

_ROOM = 8 * 1024**2  # characters that may wait
_MESSAGE = 16 * 1024  # as how many characters a message counts: taking 500 of them takes a moment
_PATIENCE = 1.0  # seconds a writer waits at most, should nobody listen


class _Text(NamedTuple):
    name: str
    parent: Mapping[str, object]
    pieces: list[str]


class Output:
    """A queue of messages, from any thread to one listener.

    Args:
        session: makes the messages.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: deque[Message | _Text] = deque()
        self._size = 0
        # The garbage collector may come while it is held, and a __del__() print.
        self._lock = threading.RLock()
        self._has_room = threading.Condition(self._lock)
        self._wake: Callable[[], None] = _nothing
        self._awake = False
        self._closed = False

    def listen(self, wake: Callable[[], None]) -> None:
        """Call *wake* when there is something to take, in the thread that says it; *wake* must not block."""
        with self._lock:
            self._wake, self._awake = wake, False

    def say(
        self,
        channel: Channel,
        msg_type: str,
        content: Mapping[str, object],
        parent: Mapping[str, object],
        *,
        wake: bool = True,
        buffers: Sequence[bytes | memoryview] = (),
    ) -> None:
        """Send a message; without *wake* it is taken together with the next one."""
        message = self._session.message(channel, msg_type, content, parent_header=parent, buffers=buffers)
        with self._lock:
            if self._closed:
                return
            self._waiting.append(message)
            self._size += _MESSAGE
            rouse = wake and self._must_rouse()
        if rouse:
            try:
                self._wake()
            except BaseException:  # a recursion that is too deep, just here: the next one wakes the listener
                self._awake = False
                raise

    def write(self, name: str, text: str, parent: Mapping[str, object]) -> None:
        """Send *text* in a ``stream`` message of that *name*."""
        if not text.isascii():
            text = publishable(text)
        with self._lock:
            if self._closed or not text:
                return
            last = self._waiting[-1] if self._waiting else None
            if isinstance(last, _Text) and last.name == name and last.parent is parent:
                last.pieces.append(text)
            else:
                self._waiting.append(_Text(name, parent, [text]))
            self._size += len(text)
            rouse = self._must_rouse()
        if rouse:
            try:
                self._wake()
            except BaseException:  # as in say()
                self._awake = False
                raise

    def take(self, limit: int = sys.maxsize) -> list[Message]:
        """What waits, at most *limit* messages; :attr:`has_more` tells whether to come again."""
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
            self._size -= sum(map(_size, taken))
            self._awake = bool(self._waiting)
            self._has_room.notify_all()
        return [self._message(item) for item in taken]

    @property
    def has_more(self) -> bool:
        """The listener was not woken for what waits: it is expected to take on."""
        return self._awake

    def wait_for_room(self) -> None:
        """For who says much: until the listener has taken some of it, but not for ever."""
        if self._size > _ROOM:
            with self._has_room:
                self._has_room.wait_for(lambda: self._size <= _ROOM, _PATIENCE)

    def close(self) -> None:
        """Drop what waits, and all that comes."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._size = 0
            self._has_room.notify_all()

    def _must_rouse(self) -> bool:
        # The listener takes everything: it is woken once for all that is said until it does.
        asleep, self._awake = not self._awake, True
        return asleep

    def _message(self, item: Message | _Text) -> Message:
        if isinstance(item, Message):
            return item
        content = {"name": item.name, "text": "".join(item.pieces)}
        return self._session.message("iopub", "stream", content, parent_header=item.parent)


def _size(item: Message | _Text) -> int:
    return _MESSAGE if isinstance(item, Message) else sum(map(len, item.pieces))


def _nothing() -> None:
    return
