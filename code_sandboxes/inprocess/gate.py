"""Interrupt the code that runs in a thread, and nothing else there.

``PyThreadState_SetAsyncExc`` (Python/C API, "Initialization, Finalization, and Threads") raises an exception
in another thread at whatever bytecode that has reached: in the code it is meant for, or in the lines of ours
around it, which hold locks and have promises to keep. So those pass a gate. Nothing is sent while it is
shut; what was sent just before arrives while it is being shut, when nothing of ours has happened yet; and
what was asked for meanwhile is raised when it opens again.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

__all__ = ["Abandoned", "Gate", "Interrupted", "uninterrupted"]

T = TypeVar("T")

# An item of pythonapi is a function object of our own, an attribute would be everybody's.
_set_async_exc = ctypes.pythonapi["PyThreadState_SetAsyncExc"]
_set_async_exc.argtypes = (ctypes.c_ulong, ctypes.py_object)

_here = threading.local()


def _note_arrival() -> None:
    gate: Gate | None = getattr(_here, "gate", None)
    if gate is not None:
        gate._arrived = True


class Interrupted(KeyboardInterrupt):
    """What the code sees of an interrupt; it cannot tell it from Ctrl-C."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        _note_arrival()  # the interpreter makes the instance before any handler of the code runs


Interrupted.__name__ = Interrupted.__qualname__ = "KeyboardInterrupt"


class Abandoned(SystemExit):
    """Ends a thread whose code nobody waits for any more, if the code lets it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        _note_arrival()


class Gate:
    """Around one run of some code in one thread.

    ``with gate:`` is for what the code calls of ours: it is not interrupted there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0
        self._shut = 1  # how many have shut it; only 0 lets anything through
        self._wanted: type[BaseException] | None = None
        self._sent: type[BaseException] | None = None
        self._arrived = False
        self._over = False
        self.nudge: Callable[[], object] = _nothing
        """Called when something is asked for while the gate is shut; wakes whoever waits there."""

    def interrupt(self, kind: type[BaseException] = Interrupted) -> None:
        """Raise *kind* in the code, now, or when it comes to run (again); from any thread."""
        with self._lock:
            if self._over:
                return
            if self._shut:
                self._wanted = kind
                self.nudge()
            elif self._sent is not kind or self._arrived:
                self._sent, self._arrived = kind, False
                _set_async_exc(self._thread, kind)

    def call(self, code: Callable[[], T]) -> T:
        """Call *code*, which may be interrupted; when this returns or raises, nothing can arrive any more."""
        self._thread = threading.get_ident()
        _here.gate = self
        value: T | _Nothing = _NOTHING
        error: BaseException | None = None
        try:
            try:
                self._open()
                value = code()
            except BaseException as raised:  # whatever it is, it is what became of the code
                error = raised
            self._close()
        except BaseException as late:  # it arrived between the end of the code and here; there is but one
            if error is None and value is _NOTHING:
                error = late
            self._close()
        self._over = True
        _here.gate = None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame
        assert not isinstance(value, _Nothing)
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
                self._sent = wanted
        if wanted is not None:
            raise wanted

    def _close(self) -> None:
        try:
            with self._lock:
                self._shut = 1
            if self._sent is not None and not self._arrived:
                self._let_it_arrive()
        except BaseException:  # it arrived, and nothing of ours has happened yet
            self._shut = 0
            raise

    def _let_it_arrive(self) -> None:
        for _ in range(100):  # a jump backwards is where the interpreter looks for it
            pass
        # Not there: the interpreter has forgotten to look (two threads were sent one at once), or C code of
        # somebody's has dropped it.
        _set_async_exc(self._thread, ctypes.py_object())
        if self._sent is not None and not self._arrived:
            raise self._sent


def uninterrupted() -> AbstractContextManager[object]:
    """What code of ours enters that the code of a user may have called: it is not interrupted in there."""
    gate: Gate | None = getattr(_here, "gate", None)
    return _NO_GATE if gate is None else gate


_NO_GATE = nullcontext()


class _Nothing:
    """No value: the code has not ended."""


_NOTHING = _Nothing()


def _nothing() -> None:
    return
