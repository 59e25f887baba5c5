"""What a kernel needs of whoever starts and reaches it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from code_sandboxes.protocol.events import Streamed
from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.transports.loop import Loop

__all__ = [
    "LEAST_BACKLOG",
    "KernelInfo",
    "KernelProcess",
    "Limits",
    "Prologue",
    "Transport",
]

LEAST_BACKLOG = 16 * 1024**2
"""Bytes of output that may wait for a caller, however few its result keeps: it may just be a bit slow."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much.

    What a kernel sends can fill no more of this program's memory than: on each of its four channels one
    message that is on its way (*max_message*; a larger one is skipped as it comes, ``protocol/zmtp.py``);
    of all kernels, one that is being unpacked (256 MiB, ``protocol/wire.py``); for each run its backlog
    (*max_output*, at least :data:`LEAST_BACKLOG`, ``inbox.py``) and its result (*max_output*,
    ``protocol/outputs.py``; four times that for text with a character beyond U+FFFF in each piece). What a
    caller does not take, it does not hold up: it is dropped, and the result is ``truncated``.

    Args:
        grace: seconds an interrupted run may take to stop before its kernel is killed.
        start: seconds a kernel may take until it answers.
        max_message: bytes of one message, all its parts together.
    """

    grace: float = 5.0
    start: float = 60.0
    max_message: int = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """What the kernel says of itself (messaging documentation, section "Kernel info")."""

    language: str
    supported_features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prologue:
    """A request that comes before all others in a new kernel (messaging documentation, section "Execute")."""

    content: Mapping[str, object]
    metadata: Mapping[str, object]
    features: tuple[str, ...]
    """What the kernel has when it is done, as if it were among its ``supported_features``."""


class Transport(Protocol):
    """What moves the messages of one kernel; see ``transports/``.

    Attributes:
        dropped: how many messages were, by why.
        lost: called with the channel and how it was, when a message was dropped that was too large.
        cut: called with True when the connection is lost, and with it what was on its way; with False when
            it is there again. What is sent meanwhile waits for that.
    """

    dropped: Counter[str]
    lost: Callable[[Channel, str], None]
    cut: Callable[[bool], None]

    def open(self) -> None: ...

    def send(self, message: Message) -> None:
        """
        Raises:
            MessageTooLargeError: there is no way for one of that size.
        """

    def close(self) -> None: ...


class KernelProcess(Protocol):
    """What a kernel runs in, as far as the kernel must know. Called in the I/O thread; nothing may block."""

    def transport(
        self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
    ) -> Transport:
        """A new way to it, not opened yet."""

    @property
    def interrupt_mode(self) -> Literal["signal", "message"]: ...

    @property
    def how_killed(self) -> str:
        """What :meth:`kill` does to code that does not stop: the rest of a sentence."""

    @property
    def is_fresh(self) -> bool:
        """It was started for this kernel; False if somebody may have used it before."""

    @property
    def prologue(self) -> Prologue | None:
        """What it has to be asked first; None if it has everything."""

    @property
    def why_lost(self) -> str:
        """Why nobody knows how it ended: a sentence; empty where that is known."""

    @property
    def may_go_on(self) -> bool:
        """It is the way there that was lost; the kernel itself may be as it was."""

    @property
    def why_ended(self) -> str:
        """More than its exit code says: the end of a sentence; empty if there is no more."""

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        """Call *ended* once, when the process has ended."""

    def exit_code(self) -> int | None:
        """As in :mod:`subprocess`; None while it lives, or where nobody knows."""

    def output(self) -> str:
        """The latest of what it wrote to its standard error."""

    def written(self) -> list[int]:
        """How many bytes it has printed to standard output and error; zeros where nobody counts."""

    def unpublished(self, published: Sequence[int]) -> list[Streamed]:
        """What it printed beyond the *published* bytes of standard output and error, as far as is known."""

    def claim(self, granted: Callable[[], None]) -> None:
        """Call *granted* when a run may begin: no other program's is on."""

    def rest(self) -> None:
        """The run has ended: it is the turn of whoever waits for it."""

    def interrupt(self) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def leave(self) -> None:
        """Have no more to do with it; it goes on, and *ended* is not called."""

    def release(self) -> None:
        """Remove what is left after the end; in a thread of its own, may block."""
