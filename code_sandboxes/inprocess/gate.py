"""Interrupt the code that runs in a thread, and nothing else there.

``PyThreadState_SetAsyncExc`` (Python/C API, "Initialization, Finalization, and Threads") raises an exception
in another thread at whatever bytecode that has reached: in the code it is meant for, or in the lines of ours
around it, which hold locks and have promises to keep. So those pass a gate. Nothing is sent while it is
shut; what was sent just before arrives while it is being shut, when nothing of ours has happened yet; and
what was asked for meanwhile is raised when it opens again.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Abandoned", "Gate", "Interrupted", "look_no_more", "uninterrupted", "was_dropped"]

T = TypeVar("T")

# An item of pythonapi is a function object of our own, an attribute would be everybody's.
_set_async_exc = ctypes.pythonapi["PyThreadState_SetAsyncExc"]
_set_async_exc.argtypes = (ctypes.c_ulong, ctypes.py_object)

_here = threading.local()


def _note_arrival(kind: type[BaseException]) -> None:
    gate: Gate | None = getattr(_here, "gate", None)
    if gate is not None and gate._pending is kind:
        gate._pending = None


class Interrupted(KeyboardInterrupt):
    """What the code sees of an interrupt; it cannot tell it from Ctrl-C."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        _note_arrival(Interrupted)  # the interpreter makes the instance before any handler of the code runs


Interrupted.__name__ = Interrupted.__qualname__ = "KeyboardInterrupt"
Interrupted.__module__ = "builtins"


class Abandoned(SystemExit):
    """Ends a thread whose code nobody waits for any more, if the code lets it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        _note_arrival(Abandoned)


class Gate:
    """Around one run of some code in one thread.

    ``with gate:`` is for what the code calls of ours: it is not interrupted there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0
        self._shut = 1  # how many have shut it; only 0 lets anything through
        self._wanted: type[BaseException] | None = None  # asked for while it was shut, or dropped
        self._pending: type[BaseException] | None = None  # sent, and not seen yet
        self._sent = False  # there may be one on its way
        self._over = False
        self.nudge: Callable[[], object] = _nothing
        """Called when something is asked for while the gate is shut; wakes whoever waits there."""

    @property
    def is_under_way(self) -> bool:
        """Something was sent, and the code has not seen it yet."""
        return self._pending is not None and not self._over

    @property
    def is_wanted(self) -> bool:
        """Something was asked for while the gate was shut, or was dropped, and is still to be sent."""
        return self._wanted is not None and not self._over

    @property
    def is_over(self) -> bool:
        """The code has ended: nothing can be sent any more."""
        return self._over

    def interrupt(self, kind: type[BaseException] = Interrupted) -> None:
        """Raise *kind* in the code, now, or when it comes to run (again); from any thread."""
        with self._lock:
            under_way = (self._wanted, self._pending)
            if self._over or kind in under_way or Abandoned in under_way:
                return
            if self._shut:
                self._wanted = kind
                self.nudge()
            else:
                self._send(kind)

    def interrupt_again(self) -> None:
        """Raise once more what was dropped, if it was; from any thread."""
        with self._lock:
            wanted = self._wanted
            if wanted is not None and not (self._shut or self._over):
                self._wanted = None
                self._send(wanted)

    def dropped(self, kind: type[BaseException]) -> None:
        """*kind* was raised in vain: it is wanted again, when the gate opens or :meth:`interrupt_again`."""
        try:
            with self._lock:
                if Abandoned not in (self._wanted, self._pending):
                    self._wanted = kind
        except (Interrupted, Abandoned) as another:  # just now, and would be dropped too
            self._wanted = type(another)

    def call(self, code: Callable[[], T]) -> T:
        """Call *code*, which may be interrupted; when this returns or raises, nothing can arrive any more."""
        self._thread = threading.get_ident()
        _here.gate = self
        watchers = sys.gettrace(), sys.getprofile()
        value: T | _Nothing = _NOTHING
        raised: list[BaseException] = []
        try:
            try:
                try:
                    self._open()
                    value = code()
                except BaseException as error:  # whatever it is, it is what became of the code
                    raised.append(error)
                self._end()
            except BaseException as late:  # it was on its way when the code ended
                # At once, since the interpreter looks for the next one at every call: then there is but one.
                with self._lock:
                    self._over = True
                raised.append(late)
                self._end()
        except BaseException as last:
            raised.append(last)
        _here.gate = None
        _watched_by(watchers)
        if isinstance(value, _Nothing):
            try:
                raise raised[0]
            finally:
                raised.clear()  # they refer to this frame
        return value

    def __enter__(self) -> None:
        if self._shut:
            self._shut += 1
        else:
            self._close()

    def __exit__(self, *_: object) -> None:
        if self._shut > 1:
            self._shut -= 1
        else:
            self._open()

    def _open(self) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, None
            self._shut = 0
            if wanted is not None:
                self._pending = wanted
        if wanted is not None:
            raise wanted

    def _send(self, kind: type[BaseException]) -> None:
        self._pending, self._sent = kind, True
        _set_async_exc(self._thread, kind)

    def _close(self) -> None:
        try:
            with self._lock:
                self._shut = 1
            if self._sent:
                self._let_it_arrive()
        except BaseException:  # it arrived, and nothing of ours has happened yet
            self._shut = 0
            self._open()  # what was asked for in between takes its place
            raise

    def _end(self) -> None:
        _unwatched()  # whom the code has set
        with self._lock:
            self._over = True
        if self._sent:
            self._let_it_arrive()

    def _let_it_arrive(self) -> None:
        _look_for_it()
        if self._pending is not None:
            # The interpreter has forgotten to look (two threads were sent one at once), or C code of
            # somebody's has dropped it.
            _set_async_exc(self._thread, self._pending)
            _look_for_it()
        self._sent = False


def _look_for_it() -> None:
    for _ in range(100):  # a jump backwards is where the interpreter looks for it
        pass


class _Seen(BaseException):
    """Sent to oneself, to be dropped."""


def look_no_more() -> None:
    """Let the threads of this process go on as if nothing were on its way to any of them.

    Before CPython 3.13 they all look for it, at every call, as long as it waits for its thread to come out of
    C: that takes time, and in 3.11 a thread that is being traced (by a debugger, for coverage) never gets
    beyond the look. Whoever sees one of their own ends that for all. What is still on its way is found all
    the same when the threads take turns, or by the gate.
    """
    if sys.version_info >= (3, 13):
        return
    try:
        _set_async_exc(threading.get_ident(), _Seen)
        _look_for_it()
    except _Seen:
        return


def was_dropped(kind: type[BaseException]) -> bool:
    """*kind* was raised where the interpreter drops it (``__del__()``): if it is ours, it comes once more."""
    gate: Gate | None = getattr(_here, "gate", None)
    if gate is None or not issubclass(kind, (Interrupted, Abandoned)):
        return False
    gate.dropped(kind)
    return True


class uninterrupted:
    """``with uninterrupted():`` is for what code of a user calls of ours: it is not interrupted in there.

    Nor is it watched (:func:`sys.settrace`): whoever watches runs code of theirs between lines of ours, which
    hold locks.
    """

    def __enter__(self) -> None:
        self._gate: Gate | None = getattr(_here, "gate", None)
        self._watchers = _unwatched()
        if self._gate is not None:
            try:
                self._gate.__enter__()
            except BaseException:
                _watched_by(self._watchers)
                raise

    def __exit__(self, *raised: object) -> None:
        try:
            if self._gate is not None:
                self._gate.__exit__(*raised)
        finally:
            _watched_by(self._watchers)


def _unwatched() -> tuple[Any, Any]:
    """From now on nobody watches this thread; gives those who did."""
    watchers = sys.gettrace(), sys.getprofile()
    _watched_by((None, None))
    return watchers


def _watched_by(watchers: tuple[Any, Any]) -> None:
    trace, profile = watchers
    if sys.gettrace() is not trace:
        sys.settrace(trace)
    if sys.getprofile() is not profile:
        sys.setprofile(profile)


class _Nothing:
    """No value: the code has not ended."""


_NOTHING = _Nothing()


def _nothing() -> None:
    return
