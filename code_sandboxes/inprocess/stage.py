"""What code that runs in this process finds there: streams and functions that know for whom they work.

While a run is on, ``sys.stdout`` and its like have stand-ins. A stand-in asks at each use who is calling: the
code of some kernel, told by a context variable that its tasks inherit, and the threads it starts too; or
the rest of the program, which gets its own. When the last run is over, that is there again.

The stand-ins are for the interpreter itself (``print()``, tracebacks). Whoever reads ``sys.stdout`` gets what
is behind them, and whoever sets it sets that: so code that redirects its output, for a while or for good,
does so for its own kernel, and the program for all the rest.
"""

from __future__ import annotations

import functools
import getpass
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from code_sandboxes.forks import in_forked_child
from code_sandboxes.inprocess.gate import uninterrupted, was_dropped

if TYPE_CHECKING:
    from code_sandboxes.inprocess.actor import Actor

__all__ = ["Performance", "acting", "is_set"]

acting: ContextVar[Actor | None] = ContextVar("acting", default=None)
"""The kernel, as its code sees it, whose code is running."""

_STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")

# IPython's functions that need an IPython: here they would print, or show in the program's own notebook.
_SHOWING = "IPython.core.display_functions"
_SHOWING_TOO = "IPython.display"
_SHOW = ("clear_output", "display", "publish_display_data")


class Performance:
    """One run that is on: the stage is set as long as there is any."""

    def __init__(self) -> None:
        with _lock:
            _on.add(self)
            if len(_on) == 1:
                _set()

    def end(self) -> None:
        """From now on it does not count; may be called again, from any thread."""
        with _lock:
            if self in _on:
                _on.remove(self)
                if not _on:
                    _strike()


def is_set() -> bool:
    """Is any run on?"""
    return bool(_on)


class _StreamStandIn:
    """Is, for each caller, the stream that is theirs."""

    def __init__(self, name: str, original: Any) -> None:
        self.original = original
        self._name = name

    def write(self, text: str) -> Any:
        stream = self._theirs()
        return len(text) if stream is None else stream.write(text)  # None: nobody wants it

    def flush(self) -> None:
        stream = self._theirs()
        if stream is not None:
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs(), name)

    def _theirs(self) -> Any:
        who = acting.get()
        return self.original if who is None else getattr(who, self._name)


def _stream_of_caller(name: str) -> property:
    def get(module: ModuleType) -> object:
        who = acting.get()
        if who is not None:
            return getattr(who, name)
        if name not in vars(module):
            raise AttributeError(f"module 'sys' has no attribute {name!r}")
        return _behind(vars(module)[name])

    def set(module: ModuleType, stream: object) -> None:
        who = acting.get()
        if type(stream) is _StreamStandIn:  # somebody has found it in sys.__dict__, as unittest.mock does
            stream = stream.original if who is None else getattr(who, f"__{name.strip('_')}__")
        if who is not None:
            setattr(who, name, stream)
            return
        with _lock:
            vars(module)[name] = _StreamStandIn(name, stream) if _on else stream

    def delete(module: ModuleType) -> None:
        if acting.get() is not None:
            raise AttributeError(f"sys.{name} belongs to the whole process, in which the code runs")
        with _lock:
            del vars(module)[name]

    return property(get, set, delete)


class _Sys(type(sys)):  # type: ignore[misc]  # ModuleType, unless somebody had the same idea
    """:mod:`sys` as a module with properties (Python reference, "Customizing module attribute access").

    For good: code that was abandoned may put back, at any time, what it had found.
    """

    stdin = _stream_of_caller("stdin")
    stdout = _stream_of_caller("stdout")
    stderr = _stream_of_caller("stderr")
    # Where code looks for what was there before it has redirected anything.
    __stdin__ = _stream_of_caller("__stdin__")
    __stdout__ = _stream_of_caller("__stdout__")
    __stderr__ = _stream_of_caller("__stderr__")


def _behind(stream: object) -> object:
    return stream.original if type(stream) is _StreamStandIn else stream


class _Place:
    """A function's name in a module or class, and who stands there while the stage is set."""

    def __init__(self, owner: Any, name: str, understudy: Callable[[str, Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._understudy = understudy
        self._original: object = None
        self._stand_in: object = None

    def take(self) -> None:
        found = getattr(self._owner, self._name)
        if found is not self._original:
            self._original, self._stand_in = found, self._understudy(self._name, found)
        setattr(self._owner, self._name, self._stand_in)

    def give_back(self) -> None:
        if getattr(self._owner, self._name) is self._stand_in:
            setattr(self._owner, self._name, self._original)


def _function_stand_in(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        who = acting.get()
        return (original if who is None else getattr(who, name))(*args, **kwargs)

    return stand_in


def _inheriting_start(_: str, original: Any) -> Any:
    """``Thread.start()``, after which the new thread works for whom the one that started it does."""

    @functools.wraps(original)
    def start(thread: threading.Thread) -> None:
        who = acting.get()
        if who is None:
            original(thread)
            return
        _let_inherit(thread, who)
        # Until a new thread runs, the interpreter knows it under the name of the one that starts it: it could
        # get the interrupt that is meant for that.
        with uninterrupted():
            original(thread)

    return start


def _let_inherit(thread: threading.Thread, who: Actor) -> None:
    run = thread.run

    def inheriting_run() -> None:
        vars(thread).pop("run", None)  # no cycle is to keep it
        acting.set(who)
        run()

    thread.run = inheriting_run  # type: ignore[method-assign]  # the thread is not started yet


def _patient_unraisablehook(_: str, original: Any) -> Any:
    """``sys.unraisablehook()`` that lets no interrupt get lost."""

    def report(unraisable: Any) -> None:
        if not was_dropped(unraisable.exc_type):
            original(unraisable)

    return report


def _undisturbed(_: str, original: Any) -> Any:
    """A function that would keep a lock of the whole program's for ever if it were interrupted."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with uninterrupted():
            return original(*args, **kwargs)

    return call


class _ShowingFinder:
    """Finds IPython's functions as soon as code that is running imports them, and replaces them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _SHOWING else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_replace(module: ModuleType) -> None:
                execute(module)
                _replace_showing(module)

            setattr(spec.loader, "exec_module", execute_and_replace)  # noqa: B010  (mypy: a method)
        return spec


def _replace_showing(module: ModuleType) -> None:
    """For good: others take these functions into modules of their own, where they could not be given back."""
    owners = [owner for owner in (module, sys.modules.get(_SHOWING_TOO)) if owner is not None]
    for name in _SHOW:
        original = getattr(module, name)
        if not hasattr(original, "__wrapped__"):
            stand_in = _function_stand_in(name, original)
            for owner in owners:
                setattr(owner, name, stand_in)


_lock = threading.RLock()
_on: set[Performance] = set()
_places = [
    _Place(sys, "unraisablehook", _patient_unraisablehook),
    _Place(threading.Thread, "start", _inheriting_start),
    _Place(getpass, "getpass", _function_stand_in),
]
if sys.version_info < (3, 13):  # from then on it takes its locks by with, which lets go of them in any case
    _places += [
        _Place(logging.Handler, "handle", _undisturbed),
        _Place(logging.Manager, "getLogger", _undisturbed),
    ]
_finder = _ShowingFinder()


def _set() -> None:
    if type(sys) is not _Sys:
        setattr(sys, "__class__", _Sys)  # noqa: B010  (mypy: not assignable)
    for name in _STREAMS:
        vars(sys)[name] = _StreamStandIn(name, vars(sys).get(name))
    for place in _places:
        place.take()
    module = sys.modules.get(_SHOWING)
    if module is None:
        sys.meta_path.insert(0, _finder)
    else:
        _replace_showing(module)


def _strike() -> None:
    for name in _STREAMS:
        vars(sys)[name] = _behind(vars(sys)[name])
    for place in _places:
        place.give_back()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _let_go() -> object:
    """The child has the thread that forked, and that alone; what it prints is the program's."""
    global _lock
    _lock = threading.RLock()
    acting.set(None)
    if _on:
        _on.clear()
        _strike()
    return None


in_forked_child(_let_go)
