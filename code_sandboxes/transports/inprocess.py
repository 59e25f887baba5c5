"""Messages to a kernel in this process, and back: no wire, no copy, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.transports.loop import Loop, Timer

__all__ = ["InProcessTransport", "Peer"]

# Seconds that a first message about a request may take if nothing follows it: it costs a change of threads.
_LATEST = 0.005

_BATCH = 100


class Peer(Protocol):
    """The kernel, as far as a transport must know it."""

    def connect(self, wake: Callable[[], None]) -> None:
        """Call *wake*, in any thread, when there is something to take."""

    def accept(self, message: Message) -> None:
        """Take a request; in the I/O thread, must not block."""

    def take(self, limit: int) -> list[Message]:
        """What it has said since the last time, at most *limit* messages of it."""

    @property
    def has_more(self) -> bool:
        """There is more to take, for which nobody is woken."""


class InProcessTransport:
    """One connection to a kernel in this process.

    Args:
        loop: where *receive* is called.
        peer: the kernel.
        receive: gets each message.
    """

    def __init__(self, loop: Loop, peer: Peer, receive: Callable[[Message], None]) -> None:
        self.dropped: Counter[str] = Counter()
        self.lost: Callable[[Channel, str], None] = lambda channel, how: None  # nothing is too large for it
        self.cut: Callable[[bool], None] = lambda _: None  # nor can it go away
        self._loop = loop
        self._peer = peer
        self._receive = receive
        self._open = False
        self._late: Timer | None = None

    def open(self) -> None:
        self._open = True
        self._peer.connect(lambda: self._loop.call_soon(self._deliver))

    def send(self, message: Message) -> None:
        self._peer.accept(message)
        if self._late is None:
            self._late = self._loop.call_later(_LATEST, self._deliver)

    def close(self) -> None:
        self._open = False

    def _deliver(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if not self._open:
            return
        for message in self._peer.take(_BATCH):
            self._receive(message)
        if self._peer.has_more:  # after the others have had their turn
            self._loop.call_soon(self._deliver)
