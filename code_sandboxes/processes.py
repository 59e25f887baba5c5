"""A command in a sandbox as its program sees it: its output as it comes, its end, its input, its signals.

What it prints is held in the I/O thread until somebody reads it. A stream that somebody iterates over makes
the process wait for a slow reader; one that nobody reads makes it wait for nobody, and loses its oldest part
when more than :data:`RING` of it is held.
"""

from __future__ import annotations

import codecs
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from code_sandboxes.errors import SandboxConnectionError, SandboxTimeoutError
from code_sandboxes.guest.calls import cost
from code_sandboxes.guest_calls import Guest, Window
from code_sandboxes.guest_link import Channel, ChannelEnded, GuestCall, Told
from code_sandboxes.guest_values import as_bool, as_bytes, as_float, as_int, as_object, bad_answer
from code_sandboxes.inbox import Inbox
from code_sandboxes.protocol.events import Event
from code_sandboxes.steps import Operation, Wait
from code_sandboxes.transports.loop import the_loop

__all__ = [
    "PIECE",
    "RING",
    "SIGKILL",
    "SIGTERM",
    "WINDOW",
    "End",
    "Process",
    "Stream",
    "end_of",
    "output_of",
    "pieces_of",
]

WINDOW = 2 * 1024**2
"""Bytes of output that may be on their way, or wait for a reader."""

RING = 16 * 1024**2
"""Bytes that are held of a stream that nobody reads."""

PIECE = 256 * 1024
"""Bytes of input in one message."""

# Of the sandbox, which is a POSIX system whatever this one is.
SIGKILL, SIGTERM = 9, 15

# Pieces of input that may be on their way.
_AHEAD = 4

# Characters after which a line that does not end is given in parts.
_LONGEST_LINE = 1024**2

_GRANTED_AT_ONCE = WINDOW // 8

# Seconds that whoever kills it waits for its end.
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class End:
    """How a process has ended, as it says."""

    exit_code: int
    timed_out: bool
    duration: float


@dataclass(frozen=True, slots=True)
class _Changed(Event):
    """There is more output, or its end."""


def output_of(told: Told) -> tuple[int, bytes]:
    """The stream, 0 or 1, and what was printed there.

    Raises:
        SandboxConnectionError: it is no output.
    """
    stream = as_int(as_object(told.data).get("stream"))
    if stream not in (0, 1) or len(told.buffers) != 1:
        raise bad_answer("the output of a command", told.data)
    return stream, bytes(as_bytes(told.buffers[0]))


def end_of(ended: ChannelEnded) -> End:
    """
    Raises:
        SandboxConnectionError: nobody will ever know.
    """
    if ended.error is not None:
        raise ended.error
    data = as_object(ended.data)
    exit_code = as_int(data.get("exit_code"))
    if not -128 < exit_code < 256:
        raise bad_answer("an exit code", exit_code)
    return End(exit_code, as_bool(data.get("timed_out")), max(0.0, as_float(data.get("duration"))))


def pieces_of(data: str | bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """*data* as bytes, in pieces for one message each.

    Raises:
        TypeError: it is no text and no bytes.
    """
    if isinstance(data, str):
        view = memoryview(data.encode("utf-8", "surrogateescape"))
    elif isinstance(data, (bytes, bytearray, memoryview)):
        view = memoryview(data).cast("B")
    else:
        raise TypeError(f"input for a command must be str or bytes, not {type(data).__name__}")
    return (view[start : start + PIECE] for start in range(0, len(view), PIECE))


class Stream:
    """One of its two outputs: held in the I/O thread, taken line by line by whoever reads.

    Each counter is written by one side only, the I/O thread or the reader; so neither waits for the other.

    Attributes:
        reader: who iterates over it, if somebody does.
        lines: those that can be given at once.
        truncated: something was dropped that nobody had read.
    """

    def __init__(self, process: Process) -> None:
        self.reader: object = None
        self.lines: deque[str] = deque()
        self.truncated = False
        self._process = process
        self._chunks: deque[bytes] = deque()
        self._arrived = self._dropped = self._granted = 0  # the I/O thread's
        self._taken = self._taken_since = 0  # the reader's
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest: list[str] = []
        self._rest_size = 0
        self._reading = threading.Lock()

    # In the I/O thread.

    def arrive(self, data: bytes) -> None:
        self._arrived += cost([data])
        self._chunks.append(data)
        while self.reader is None and self._held > RING:
            try:
                dropped = self._chunks.popleft()
            except IndexError:  # somebody has just begun to read
                break
            self._dropped += cost([dropped])
            self.truncated = True
        self.settle()

    def settle(self) -> None:
        """Grant what may come in the place of what has come."""
        due = self._arrived - self._granted - (0 if self.reader is None else self._held)
        if due >= _GRANTED_AT_ONCE:
            self._granted += due
            self._process.grant(due)

    @property
    def _held(self) -> int:
        return self._arrived - self._dropped - self._taken

    # Of the reader.

    def fill(self, reader: object) -> Operation[bool]:
        """Wait until there are lines; False if none will come any more.

        Raises:
            SandboxConnectionError: the kernel was lost, and so is what the process would have printed.
        """
        self.reader = reader
        with self._process.changes() as changed:
            while not self.lines:
                while changed.take() is not None:
                    pass
                is_over = self._process.is_over  # asked first: what comes last comes before
                with self._reading:  # there may be several
                    if self._take():
                        continue
                    if is_over:
                        self._finish()
                if is_over:
                    return bool(self.lines) or self._process.check()
                yield Wait(changed)
        return True

    def ready(self) -> Iterator[str]:
        """Take the lines that can be given at once."""
        while True:
            try:
                line = self.lines.popleft()
            except IndexError:
                return
            yield line

    def release(self, reader: object) -> None:
        """Nobody reads any more: the process does not wait."""
        if self.reader is not None and self.reader == reader:
            self.reader = None
            the_loop().call_soon(self.settle)

    def _take(self) -> bool:
        try:
            data = self._chunks.popleft()
        except IndexError:
            return False
        size = cost([data])
        self._taken += size
        self._taken_since += size
        if self._taken_since >= _GRANTED_AT_ONCE:
            self._taken_since = 0
            the_loop().call_soon(self.settle)
        self._cut(self._decoder.decode(data))
        return True

    def _cut(self, text: str) -> None:
        *ended, rest = text.split("\n")
        if ended:
            self.lines.append("".join([*self._rest, ended[0], "\n"]))
            self.lines.extend([line + "\n" for line in ended[1:]])
            self._rest, self._rest_size = [], 0
        if rest:
            self._rest.append(rest)
            self._rest_size += len(rest)
        if self._rest_size >= _LONGEST_LINE:
            self._give_rest()

    def _finish(self) -> None:
        self._cut(self._decoder.decode(b"", True))
        self._give_rest()

    def _give_rest(self) -> None:
        if self._rest:
            self.lines.append("".join(self._rest))
            self._rest, self._rest_size = [], 0


class Process:
    """A command that was started, or that this program has connected to.

    Args:
        guest: where it runs.
        id: what the guest calls it.
        command: as people write it.
        pid: known when it was started.
    """

    def __init__(self, guest: Guest, id: str, command: str) -> None:
        self.guest = guest
        self.id = id
        self.command = command
        self.pid = 0
        self.channel = Channel(self._receive, WINDOW)
        self.streams = (Stream(self), Stream(self))
        self.end: End | None = None
        self._failure: Exception | None = None
        self._listeners: set[Inbox] = set()

    # In the I/O thread.

    def _receive(self, event: Event) -> None:
        try:
            if isinstance(event, Told):
                stream, data = output_of(event)
                self.streams[stream].arrive(data)
            elif isinstance(event, ChannelEnded):
                self.end = end_of(event)
        except Exception as error:  # it belongs to whoever waits
            self._fail(error)
        for listener in list(self._listeners):
            listener.put(_Changed())

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            self.guest.close_channel(self.channel)

    def grant(self, credit: int) -> None:
        if not self.is_over:
            self.guest.grant(self.channel, credit)

    # What is known.

    @property
    def is_over(self) -> bool:
        """No more will be told of it."""
        return self.end is not None or self._failure is not None

    @property
    def truncated(self) -> bool:
        return any(stream.truncated for stream in self.streams)

    def check(self) -> bool:
        """False, if it has come to its end.

        Raises:
            SandboxConnectionError: its kernel was lost, or says what cannot be.
        """
        if self._failure is not None and self.end is None:
            raise _again(self._failure)
        return False

    def poll(self) -> int | None:
        """Its exit code, None while it runs.

        Raises:
            SandboxConnectionError: its kernel was lost.
        """
        self.check()
        return None if self.end is None else self.end.exit_code

    # What can be done.

    def wait(self, timeout: float | None, reader: object) -> Operation[int]:
        """Its exit code, when it has ended.

        Args:
            reader: who waits, and so does not read now.

        Raises:
            SandboxTimeoutError: it did not end in time, and goes on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        for stream in self.streams:
            stream.release(reader)
        with self.changes() as changed:
            while True:
                while changed.take() is not None:
                    pass
                exit_code = self.poll()
                if exit_code is not None:
                    return exit_code
                if until is not None and time.monotonic() >= until:
                    raise SandboxTimeoutError(
                        f"the command {self.command[:200]!r} is still running after {timeout:g} s"
                    )
                yield Wait(changed, until)

    def write(self, data: str | bytes) -> Operation[None]:
        """Returns when the process, or its pipe, has taken all of it.

        Raises:
            BrokenPipeError: nobody reads it any more.
        """
        with Window(self.guest) as calls:
            for piece in pieces_of(data):
                if len(calls) == _AHEAD:
                    yield from calls.oldest()
                if self.is_over:
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
                calls.begin("processes.write", piece, id=self.id, end=False)
            while calls:
                yield from calls.oldest()

    def close_stdin(self) -> Operation[None]:
        """What was written comes before its end; a process that has ended has none."""
        if self.is_over:
            return
        with suppress(BrokenPipeError):  # it is closed
            yield from self.guest.call("processes.write", id=self.id, end=True)

    def signal(self, number: int) -> Operation[None]:
        """Send a signal to it and all that it has started; one that has ended gets none."""
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"a signal is an int, not {type(number).__name__}")
        if not self.is_over:
            as_bool((yield from self.guest.call("processes.signal", id=self.id, number=int(number))).value)

    def finish(self) -> Operation[None]:
        """Kill it if it runs, and wait a moment for its end."""
        if self.is_over:
            return
        for stream in self.streams:
            stream.release(stream.reader)
        self.kill_at_once()
        try:
            yield from self.wait(_PATIENCE, None)
        except (SandboxTimeoutError, SandboxConnectionError):  # it is stuck in the system, or gone anyway
            return

    def kill_at_once(self) -> None:
        """End it, without waiting for anything; from any thread."""
        if not self.is_over:
            self.guest.begin(GuestCall("processes.signal", {"id": self.id, "number": SIGKILL}, (), Inbox()))

    def changes(self) -> _Changes:
        """An inbox that gets something whenever something has changed."""
        return _Changes(self._listeners)


class _Changes:
    def __init__(self, listeners: set[Inbox]) -> None:
        self._listeners = listeners
        self._inbox = Inbox()

    def __enter__(self) -> Inbox:
        self._listeners.add(self._inbox)
        return self._inbox

    def __exit__(self, *_: object) -> None:
        self._listeners.discard(self._inbox)


def _again(error: Exception) -> Exception:
    """*error* to raise once more: it may be raised in many threads."""
    if isinstance(error, SandboxConnectionError):
        return SandboxConnectionError(str(error))
    return error
