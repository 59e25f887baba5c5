"""Answer calls by name: what stands between a connection to a program and the functions it may call.

A call has a name, JSON values as arguments and binary buffers; its answer is a JSON value and binary buffers.
What moves them is the business of others: a :class:`Link` is given what sends, and told what has come.

To the guest::

    {"call": 7, "name": "files.stat", "args": {...}}    and buffers; "channel" and "credit" if it opens one
    {"cancel": 7}
    {"grant": 3, "bytes": 65536}                        so much more may be sent on a channel
    {"close": 3}                                        nobody listens to this channel any more
    {"alive": true}                                     the program is there, and has something open

From the guest::

    {"answer": 7, "value": ...}                          and buffers
    {"failure": 7, "error": {"kind": "OSError", "errno": "ENOENT", "message": ..., "path": ...}}
    {"taken": 7}                                         its answer comes later
    {"closed": true}                                    the program was not heard for long, and is forgotten
    {"channel": 3, "data": ...}                         and buffers: what a call has set going; costs credit
    {"channel": 3, "end": ...}                          its last message
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from queue import SimpleQueue
from threading import Lock, Thread, get_ident
from time import monotonic
from typing import Any, Protocol

# A program that has something open here is heard every few seconds; see Link.is_forsaken.
PATIENCE = 60.0

IDLE_WORKERS = 8


def _current() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed, or nobody may look into it
        return os.sep


STARTED_IN = _current()
"""The working directory of the kernel at its start."""

REMEMBERED = 256
"""How many of the latest calls are known again."""

LATER: Any = object()
"""What a function returns that answers its call later."""


class Stopped(BaseException):
    """Raised in a call that nobody waits for any more."""


class Call:
    """One call, on its way through a function.

    Attributes:
        buffers: what came with it.
        channel: opened with it, for what comes beside the answer and after it; None if there is none.
        is_stopped: nobody waits for it any more.
        LATER: what a function returns that answers its call later.
    """

    LATER = LATER

    def __init__(self, link: Link, number: int, buffers: list[Any], channel: Channel | None) -> None:
        self.link = link
        self.buffers = buffers
        self.channel = channel
        self._number = number
        self._attached: list[Any] = []
        self._thread = 0
        self._is_taken = False
        self.is_stopped = False

    @staticmethod
    def path(value: Any, base: Any = None) -> str:
        """What :func:`wire_path` made *value* of; where a relative one starts, see ``Guest.base``."""
        path = path_of(value)
        return path if base is None else os.path.join(STARTED_IN, path_of(base), path)

    @staticmethod
    def wire(path: object) -> object:
        """*path* as a JSON value."""
        return wire_path(path)

    @staticmethod
    def absolute(path: str) -> str:
        """*path* from the root; links and ``..`` in it stay as they are."""
        whole = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        if os.sep != "/":
            return whole
        return "/" + "/".join(part for part in whole.split("/") if part not in ("", "."))

    @staticmethod
    def wire_error(error: BaseException) -> dict[str, object]:
        """*error* as a JSON value."""
        return error_value(error)

    def attach(self, buffer: Any) -> None:
        """Let *buffer*, which must not change any more, go with the answer."""
        self._attached.append(buffer)

    def answer(self, value: object) -> None:
        """Its one answer; from any thread."""
        if self.link.forget(self._number):
            try:
                self.link.send({"answer": self._number, "value": value}, self._attached)
            except Exception as error:  # it cannot be written as JSON, say
                self.link.send({"failure": self._number, "error": error_value(error)}, [])

    def fail(self, error: BaseException) -> None:
        """Instead of an answer; from any thread."""
        if self.channel is not None:
            self.link.forget_channel(self._number)
            self.channel.close()
        if self.link.forget(self._number):
            self.link.send({"failure": self._number, "error": error_value(error)}, [])

    def perform(self, function: Callable[..., object], arguments: Mapping[str, Any]) -> bool:
        """Call *function* in this thread and answer with what it returns or raises.

        Returns:
            Whether the thread is good for more: a :class:`Stopped` may still be on its way into it.
        """
        self._thread = get_ident()
        try:
            value = function(self, **arguments)
        except BaseException as error:  # whatever it is, the program is to know
            self.fail(error)
            return not self.is_stopped
        finally:
            self._thread = 0
        if value is not LATER:
            self.answer(value)
        elif not self._is_taken:
            self.take()
        return not self.is_stopped

    def take(self) -> None:
        """Say that its answer comes later."""
        self._is_taken = True
        self.link.send({"taken": self._number}, [])

    def stop(self) -> None:
        """Nobody waits for it any more."""
        self.link.forget(self._number)
        self.is_stopped = True
        if self._thread:
            self.stop_thread(self._thread)

    @staticmethod
    def stop_thread(number: int) -> None:
        """Raise :class:`Stopped` in a thread; one that is blocked in the system notices when it is back."""
        import ctypes

        raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
        raise_in(ctypes.c_ulong(number), ctypes.py_object(Stopped))


def cost(buffers: Iterable[Any]) -> int:
    """What a message on a channel costs: its buffers, and something for itself."""
    return 256 + sum(len(buffer) for buffer in buffers)


class Channel:
    """A way for many messages to the program, of which there may be only as many as it has room for.

    Attributes:
        on_change: called, in some thread, when there is new credit, and when nobody listens any more.
    """

    def __init__(self, link: Link, number: int, credit: int) -> None:
        self.is_closed = False
        self.on_change: Callable[[], object] = _nothing
        self._link = link
        self._number = number
        self._credit = credit
        self._lock = Lock()

    @property
    def credit(self) -> int:
        """So much may be sent, see :func:`cost`; what is no more than that may be sent whole."""
        return self._credit

    def send(self, data: object, buffers: Iterable[Any] = ()) -> None:
        """Send a message; the caller has looked that there is credit."""
        kept = list(buffers)
        with self._lock:
            self._credit -= cost(kept)
        if not self.is_closed:
            self._link.send({"channel": self._number, "data": data}, kept)

    def end(self, data: object) -> None:
        """Send the last message; it costs nothing."""
        if not self.is_closed:
            self._link.send({"channel": self._number, "end": data}, [])
            self._link.forget_channel(self._number)
            self.is_closed = True

    def grant(self, credit: int) -> None:
        with self._lock:
            self._credit += credit
        self.on_change()

    def close(self) -> None:
        """Nobody listens any more."""
        self.is_closed = True
        self.on_change()


def _nothing() -> None:
    return


class Link:
    """One connection to a program: what it has asked, and what it has open here.

    Args:
        send: sends a message, a JSON object and buffers, to the program; may be called in any thread.

    Attributes:
        on_close: called when the program is gone, to close what it has open.
    """

    def __init__(self, send: Callable[[Mapping[str, object], list[Any]], None]) -> None:
        self.send = send
        self.is_closed = False
        self.on_close: list[Callable[[], object]] = []
        self._calls: dict[int, Call] = {}
        self._channels: dict[int, Channel] = {}
        self._begun: deque[int] = deque(maxlen=REMEMBERED)
        self._heard_at = monotonic()

    def call(self, message: Mapping[str, Any], buffers: list[Any]) -> Call:
        """A call has come."""
        channel = None
        if "channel" in message:
            channel = Channel(self, message["channel"], message["credit"])
            self._channels[message["channel"]] = channel
        made = self._calls[message["call"]] = Call(self, message["call"], buffers, channel)
        return made

    def is_new(self, number: int) -> bool:
        """It has not come before: what waits behind a call that is stuck is asked once more."""
        if number in self._begun:
            return False
        self._begun.append(number)
        return True

    def channel(self, number: int) -> Channel | None:
        """One that is open."""
        return self._channels.get(number)

    def forget_channel(self, number: int) -> None:
        self._channels.pop(number, None)

    def heard(self) -> None:
        """The program is there."""
        self._heard_at = monotonic()

    def cancel(self, number: int) -> None:
        """The program does not wait for this call any more."""
        call = self._calls.get(number)
        if call is not None:
            call.stop()

    def forget(self, number: int) -> bool:
        """It is over with this call; False if it was before."""
        return self._calls.pop(number, None) is not None and not self.is_closed

    @property
    def has_something_open(self) -> bool:
        """Something that would stay open for nobody, should its program have died."""
        return bool(self._channels or self.on_close)

    @property
    def is_forsaken(self) -> bool:
        """Its program was not heard of for so long that it must have died: it would have closed it."""
        return monotonic() - self._heard_at > PATIENCE

    def close(self) -> None:
        """Stop what it has asked, close what it has open; it is not heard any more."""
        if self.is_closed:
            return
        self.is_closed = True
        for call in list(self._calls.values()):
            call.stop()
        for channel in list(self._channels.values()):
            channel.close()
        for close in self.on_close:
            close()


class Part(Protocol):
    """Some of the functions that can be called.

    Attributes:
        functions: by name; they get the :class:`Call` and its arguments by name, and return the value of the
            answer.
        in_threads: the names of those that may take long: each of their calls has a thread for itself.
    """

    @property
    def functions(self) -> Mapping[str, Callable[..., object]]: ...

    @property
    def in_threads(self) -> Iterable[str]: ...

    def close(self) -> None:
        """End whatever they have started."""


class Workers:
    """Threads, each used again and again.

    For each thread that has sent something, ipykernel keeps a socket until seconds after its end
    (``IOPubThread._event_pipe``): with a thread for each call, a thousand calls in a row make a kernel mute.
    """

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[Callable[[], bool] | None]] = []
        self._is_closed = False

    def run(self, work: Callable[[], bool]) -> None:
        """Do *work* in one of them; it says whether the thread is good for more."""
        try:
            queue = self._idle.pop()
        except IndexError:
            queue = SimpleQueue()
            Thread(target=self._serve, args=(queue,), daemon=True).start()
        queue.put(work)

    def close(self) -> None:
        """End those that have nothing to do, the others after what they do."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().put(None)

    def _serve(self, queue: SimpleQueue[Callable[[], bool] | None]) -> None:
        while True:
            work = queue.get()
            if work is None or not work() or self._is_closed or len(self._idle) >= IDLE_WORKERS:
                return
            self._idle.append(queue)


class Guest:
    """All the functions, and the programs that call them."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = list(parts)
        self._functions: dict[str, Callable[..., object]] = {}
        self._in_threads: set[str] = set()
        for part in self._parts:
            self._functions.update(part.functions)
            self._in_threads.update(part.in_threads)
        self._links: dict[str, Link] = {}
        self._workers = Workers()

    def open(self, name: str, send: Callable[[Mapping[str, object], list[Any]], None]) -> Link:
        """A program has connected; those that are gone are forgotten."""
        for link_name, link in list(self._links.items()):
            if link.is_forsaken and link.has_something_open:
                link.send({"closed": True}, [])  # it may only have slept
                self.close_link(link_name)
        link = self._links[name] = Link(send)
        return link

    def close_link(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link is not None:
            link.close()

    def close(self) -> None:
        """End everything."""
        for name in list(self._links):
            self.close_link(name)
        for part in self._parts:
            part.close()
        self._workers.close()

    def receive(self, link: Link, message: Mapping[str, Any], buffers: list[Any]) -> None:
        """A message of the program has come."""
        if link.is_closed:
            return
        link.heard()
        if "call" in message:
            if link.is_new(message["call"]):
                self._call(link.call(message, buffers), message["name"], message["args"])
        elif "cancel" in message:
            link.cancel(message["cancel"])
        elif "grant" in message:
            channel = link.channel(message["grant"])
            if channel is not None:
                channel.grant(message["bytes"])
        elif "close" in message:
            channel = link.channel(message["close"])
            if channel is not None:
                link.forget_channel(message["close"])
                channel.close()

    def _call(self, call: Call, name: str, arguments: Mapping[str, Any]) -> None:
        function = self._functions.get(name)
        if function is None:
            call.fail(LookupError("the guest has no function " + name))
        elif name in self._in_threads:
            call.take()
            try:
                self._workers.run(lambda: call.perform(function, arguments))
            except Exception as error:  # there may be no more threads
                call.fail(error)
        else:
            call.perform(function, arguments)


def error_value(error: BaseException) -> dict[str, object]:
    """An exception as a JSON value."""
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno
        return {
            "kind": "OSError",
            "errno": errno.errorcode.get(number, str(number)),
            "message": error.strerror or os.strerror(number),
            "path": None if error.filename is None else wire_path(error.filename),
        }
    text = str(error)[:10_000].encode("utf-8", "backslashreplace").decode("utf-8")
    return {"kind": type(error).__name__, "message": text}


def wire_path(path: object) -> object:
    """A path as a JSON value: a str, or ``{"hex": ...}`` where its bytes are no UTF-8."""
    name = os.fsdecode(path) if isinstance(path, (str, bytes)) else str(path)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return {"hex": os.fsencode(name).hex()}
    return name


def path_of(value: Any) -> str:
    """The path that :func:`wire_path` made *value* of."""
    return os.fsdecode(bytes.fromhex(value["hex"])) if isinstance(value, dict) else str(value)
