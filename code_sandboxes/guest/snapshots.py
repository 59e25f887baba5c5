"""Send what a sandbox has, its files and variables, to a program that keeps it; take that in another one.

It goes on the channel of a call, in pieces, as there is room for them. It comes with calls that name that
channel, each of which is answered when there is room for more.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from threading import Condition
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from code_sandboxes.guest.calls import Call, Channel

PIECE = 1024**2
"""Bytes in one message."""

# What a message costs beside its buffers; see cost() in calls.py.
MESSAGE = 256

# Of the system's folders, what is there as long as it runs.
_OF_THE_SYSTEM = ("dev", "proc", "run", "sys")


class Closed(Exception):
    """The other side is gone."""


class _Stream:
    """What one call sends, or what comes for it."""

    def __init__(self, channel: Channel, stop: Callable[[int], object]) -> None:
        self.stop = stop
        self._channel = channel
        self._changed = Condition()
        self._waited = 0.0
        self._waiting_since: float | None = None
        channel.on_change = self._wake

    @property
    def is_closed(self) -> bool:
        return self._channel.is_closed

    def clock(self) -> float:
        since = self._waiting_since
        return (monotonic() if since is None else since) - self._waited

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait_until(self, condition: Callable[[], object]) -> None:
        """In the lock.

        Raises:
            Closed: it will not be.
        """
        if not (condition() or self.is_closed):
            self._waiting_since = monotonic()
            self._changed.wait_for(lambda: condition() or self.is_closed)
            self._waited += monotonic() - self._waiting_since
            self._waiting_since = None
        if self.is_closed:
            raise Closed


class Sink(_Stream):
    """Sends what is written on the channel."""

    def __init__(self, channel: Channel, stop: Callable[[int], object]) -> None:
        super().__init__(channel, stop)
        self._pending = bytearray()

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while len(view) > PIECE - len(self._pending):
            part = view[: PIECE - len(self._pending)]
            self._pending += part
            view = view[len(part) :]
            self.flush()
        self._pending += view

    def flush(self) -> None:
        """Send what is left."""
        if self._pending:
            piece, self._pending = bytes(self._pending), bytearray()
            self._send({}, piece)

    def restart(self) -> None:
        """What was written is worth nothing."""
        self._pending = bytearray()
        self._send({"again": True})

    def _send(self, data: Mapping[str, object], *buffers: bytes) -> None:
        cost = MESSAGE + sum(map(len, buffers))
        with self._changed:
            self._wait_until(lambda: self._channel.credit >= cost)
        self._channel.send(data, buffers)


class Source(_Stream):
    """Gives what comes for a call."""

    def __init__(self, channel: Channel, stop: Callable[[int], object]) -> None:
        super().__init__(channel, stop)
        self._pieces: deque[tuple[memoryview, Call]] = deque()
        self._is_whole = self._is_over = False

    def put(self, call: Call, is_last: bool) -> object:
        """Take what *call* brings; it is answered when somebody has read that."""
        with self._changed:
            if self._is_over:
                return None
            pieces = [(memoryview(buffer), call) for buffer in call.buffers if len(buffer)]
            self._pieces.extend(pieces)
            self._is_whole = is_last
            self._changed.notify_all()
        return call.LATER if pieces else None

    def read(self, size: int) -> bytes:
        pieces = []
        while size and (piece := self._next(size)):
            pieces.append(bytes(piece))
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and (piece := self._next(len(view) - done)):
            view[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def end(self) -> None:
        """Nobody reads any more."""
        with self._changed:
            self._is_over = True
            while self._pieces:
                self._pieces.popleft()[1].answer(None)

    def _next(self, most: int) -> memoryview:
        """The next bytes; none at the end."""
        with self._changed:
            self._wait_until(lambda: self._pieces or self._is_whole)
            if not self._pieces:
                return memoryview(b"")
            piece, call = self._pieces.popleft()
            if len(piece) > most:
                self._pieces.appendleft((piece[most:], call))
            else:
                call.answer(None)
            return piece[:most]


class Snapshots:
    """Send and take what a sandbox has.

    Args:
        namespace: gives that of ``__main__``.
        hidden: gives what of it is not the user's, as IPython knows it.
        parts: the modules of the guest, by name.
    """

    in_threads = (
        *("snapshots.save_files", "snapshots.save_variables"),
        *("snapshots.load_files", "snapshots.load_variables"),
    )

    def __init__(
        self,
        namespace: Callable[[], dict[str, Any]],
        hidden: Callable[[], Mapping[str, Any]],
        parts: Mapping[str, Any],
    ) -> None:
        self.functions: Mapping[str, Callable[..., object]] = {
            "snapshots.save_files": self._save_files,
            "snapshots.save_variables": self._save_variables,
            "snapshots.open": self._open,
            "snapshots.put": self._put,
            "snapshots.load_files": self._load_files,
            "snapshots.load_variables": self._load_variables,
        }
        self._namespace = namespace
        self._hidden = hidden
        self._archive, self._variables = parts["archive"], parts["namespace"]
        self._definitions, self._salvage = parts["definitions"], parts["salvage"]
        self._home = os.environ.get("HOME", os.curdir)  # before code can say something else
        self._sources: dict[Channel, Source] = {}

    def close(self) -> None:
        self._sources.clear()

    # What is sent, on the channel of the call.

    def _save_files(self, call: Call, folders: list[str]) -> object:
        """Send what is in *folders*; what was left out is told, and where the home is."""
        sink = self._sink(call)
        root, names, left = self._places(folders)
        self._archive.save(root, names, _OF_THE_SYSTEM if root == "/" else (), sink.write, left)
        sink.flush()
        return {"left": left.reasons, "home": call.wire(self._home)}

    def _save_variables(self, call: Call) -> object:
        """Send the user's variables; which they are, and which of them were left out, is told."""
        sink, main = self._sink(call), self._namespace()
        users = self._variables.users_variables(main, self._hidden())
        left = self._variables.save(users, main, sink, self._definitions)
        sink.flush()
        told = self._variables.told
        return {
            "names": [told(name) for name in users if name not in left],
            "left": {told(name): why for name, why in left.items()},
        }

    def _sink(self, call: Call) -> Sink:
        assert call.channel is not None
        return Sink(call.channel, call.stop_thread)

    # What is taken, as long as the channel is open that names it.

    def _open(self, call: Call) -> None:
        """There will be something to take."""
        channel = call.channel
        assert channel is not None
        self._sources[channel] = Source(channel, call.stop_thread)
        wake = channel.on_change

        def changed() -> None:
            wake()
            if channel.is_closed:
                self._sources.pop(channel, None)

        channel.on_change = changed
        changed()

    def _put(self, call: Call, handle: int, last: bool) -> object:
        """The next bytes; the answer comes when somebody has read them."""
        return self._source(call, handle).put(call, last)

    def _load_files(self, call: Call, handle: int, folders: list[str]) -> object:
        """Make what comes in *folders*; what was left out is told, and where the home is."""
        source = self._source(call, handle)
        root, names, left = self._places(folders)
        try:
            self._archive.load(root, names, source, left)
        finally:
            source.end()
        return {"left": left.reasons, "home": call.wire(self._home)}

    def _load_variables(self, call: Call, handle: int, careful: bool, without: list[str]) -> object:
        """Set the variables that come; which were left out is told, and whether they must come once more."""
        source = self._source(call, handle)
        salvage = self._salvage if careful else None
        try:
            left, again, slow = self._variables.load(
                self._namespace(), source, self._definitions, salvage, without
            )
        finally:
            source.end()
        told = self._variables.told
        return {
            "left": {told(name): why for name, why in left.items()},
            "again": again,
            "slow": None if slow is None else told(slow),
        }

    def _source(self, call: Call, handle: int) -> Source:
        channel = call.link.channel(handle)
        source = None if channel is None else self._sources.get(channel)
        if source is None:
            raise LookupError("nothing is taken here any more")
        return source

    def _places(self, folders: list[str]) -> tuple[str, list[str], Any]:
        """Where names begin, the folders from there, and what takes names of what is left out."""
        if folders == ["~"]:
            return self._home, [""], self._archive.Left("~/", self._variables.told)
        names = [folder.strip("/") for folder in folders]
        return "/", names, self._archive.Left("/", self._variables.told)
