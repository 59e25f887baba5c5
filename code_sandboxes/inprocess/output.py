"""What a kernel in this process says, on its way to whoever listens.

Any thread may speak. Text is gathered, so that a print is no message of its own while the listener is busy;
the order is kept; and a thread that prints faster than anybody listens has to wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from code_sandboxes.guest.launch import publishable
from code_sandboxes.protocol.messages import Channel, Message, Session

__all__ = ["Output"]

_ROOM = 8 * 1024**2  # characters that may wait
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
        self._lock = threading.Lock()
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
    ) -> None:
        """Send a message; without *wake* it is taken together with the next one."""
        message = self._session.message(channel, msg_type, content, parent_header=parent)
        with self._lock:
            if self._closed:
                return
            self._waiting.append(message)
            rouse = wake and self._must_rouse()
        if rouse:
            self._wake()

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
            self._wake()
        if self._size > _ROOM:
            with self._has_room:
                self._has_room.wait_for(lambda: self._size <= _ROOM, _PATIENCE)

    def take(self) -> list[Message]:
        """Everything that waits."""
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            self._size, self._awake = 0, False
            self._has_room.notify_all()
        return [self._message(item) for item in waiting]

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


def _nothing() -> None:
    return
