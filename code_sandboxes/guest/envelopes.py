"""Bring much output through a server that lets only so much of it through in a second.

Jupyter Server drops what is beyond 1,000 messages or 1,000,000 bytes of text a second, over three seconds
(``ZMQChannelsWebsocketConnection.iopub_msg_rate_limit`` and its siblings), and counts neither the bytes of
other messages than text nor what is in them. So what comes close to that is put into envelopes, many messages
into one comm message, which our programs open; others would have lost it.

An envelope: ``{"comm_id": ENVELOPES, "data": {"messages": [[sizes of header, parent header, metadata, content
and buffers], ...]}}``, and one buffer in which these are, one after the other.
"""

from __future__ import annotations

import re
from time import monotonic
from typing import Any

ENVELOPES = "code_sandboxes.envelopes"
"""The ``comm_id`` of envelopes."""

# What may go out by itself in two windows: less than what is let through in any one.
_WINDOW = 3.0
_MOST_MESSAGES = 2000
_MOST_TEXT = 2_000_000

# An envelope is closed when so much is in it, or when it has waited for so many seconds.
_FULL = 1024 * 1024
_WAIT = 0.01

_TYPE = re.compile(rb'"msg_type": ?"(\w+)"')
_DELIMITER = b"<IDS|MSG>"


class Envelopes:
    """What goes out through the sending thread of a kernel.

    Args:
        session: makes messages.
        send: ``IOPubThread._really_send`` as it was; called in that thread, as is all of this.
        call_later: calls back in it.
    """

    def __init__(self, session: Any, send: Any, call_later: Any) -> None:
        self._session = session
        self._send = send
        self._call_later = call_later
        self._window_ends = 0.0
        self._before = self._now = (0, 0)  # messages and bytes of text, in a window
        self._kept: list[list[Any]] = []
        self._size = 0
        self._is_due = False

    def send(self, frames: list[Any]) -> None:
        """Send a message, by itself or in an envelope."""
        start = frames.index(_DELIMITER) + 2  # behind the signature
        kind = _TYPE.search(bytes(frames[start]))
        if kind is None or kind[1] == b"status":  # never dropped, and waited for
            self._close()
            self._send(frames)
            return
        fits = self._count(frames[start:] if kind[1] == b"stream" else ())
        if fits and not self._kept:
            self._send(frames)
            return
        self._kept.append(frames[start:])
        self._size += sum(len(memoryview(part).cast("B")) for part in frames[start:])
        if self._size >= _FULL:
            self._close()
        elif not self._is_due:
            self._is_due = True
            self._call_later(_WAIT, self._close_when_due)

    def _count(self, text: Any) -> bool:
        """One message more; does it fit into what may go out by itself?"""
        now = monotonic()
        if now >= self._window_ends:
            just = now < self._window_ends + _WINDOW
            self._before, self._now = self._now if just else (0, 0), (0, 0)
            self._window_ends = now + _WINDOW
        self._now = self._now[0] + 1, self._now[1] + sum(len(part) for part in text)
        messages, size = self._before[0] + self._now[0], self._before[1] + self._now[1]
        return messages <= _MOST_MESSAGES and size <= _MOST_TEXT

    def _close_when_due(self) -> None:
        self._is_due = False
        self._close()

    def _close(self) -> None:
        """Send what is in the envelope."""
        if not self._kept:
            return
        kept, self._kept, self._size = self._kept, [], 0
        pieces = [[memoryview(part).cast("B") for part in message] for message in kept]
        sizes = [[len(part) for part in message] for message in pieces]
        content = {"comm_id": ENVELOPES, "data": {"messages": sizes}}
        message = self._session.msg("comm_msg", content, parent={})
        frames = self._session.serialize(message, b"comm-" + ENVELOPES.encode())
        self._send([*frames, b"".join(part for message in pieces for part in message)])


def install(kernel: Any) -> None:
    """Let *kernel* send much output in envelopes from now on."""
    thread: Any = kernel.iopub_thread
    original = thread._really_send
    envelopes = Envelopes(kernel.session, original, thread.io_loop.call_later)

    def send(frames: list[Any], *args: Any, **kwargs: Any) -> None:
        if thread.closed or not thread._is_master_process():  # a forked child sends through its parent
            original(frames, *args, **kwargs)
        else:
            envelopes.send(frames)

    thread._really_send = send
