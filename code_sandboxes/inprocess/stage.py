"""What code that runs in this process finds there: streams and functions that know for whom they work.

While a run is on, ``sys.stdout`` and its like have stand-ins. A stand-in asks at each use who is calling: the
code of some kernel, told by a context variable that its tasks inherit, and the threads it starts too; or
the rest of the program, which gets what was there before. When the last run is over, that is there again.
"""

from __future__ import annotations

import functools
import getpass
import sys
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from code_sandboxes.forks import in_forked_child

if TYPE_CHECKING:
    from code_sandboxes.inprocess.actor import Actor

__all__ = ["Performance", "acting", "is_set"]

acting: ContextVar[Actor | None] = ContextVar("acting", default=None)
"""The kernel, as its code sees it, whose code is running."""

_STREAMS = ("stdin", "stdout", "stderr")

# IPython's functions that need an IPython: here they would print, or show in the program's own notebook.
_SHOWING = "IPython.core.display_functions"
_SHOWING_TOO = "IPython.display"
_SHOW = ("clear_output", "display", "publish_display_data")


class Performance:
    """One run that is on: the stage is set as long as there is any."""

    def __init__(self) -> None:
        self._over = False
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


class _Place:
    """A name in a module or class, and who stands there while the stage is set."""

    def __init__(self, owner: Any, name: str, understudy: Callable[[str, Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._understudy = understudy
        self._original: object = None
        self._stand_in: object = None

    def take(self) -> None:
        found = getattr(self._owner, self._name)
        # Who left a redirect_stdout() late has put back the stand-in of an earlier run.
        if found is not self._stand_in and found is not self._original:
            self._original, self._stand_in = found, self._understudy(self._name, found)
        setattr(self._owner, self._name, self._stand_in)

    def give_back(self) -> None:
        # Whatever is there now: what code leaves in sys.stdout is not left to the program.
        setattr(self._owner, self._name, self._original)


class _StreamStandIn:
    """Is, for each caller, the stream that is theirs."""

    def __init__(self, name: str, original: Any) -> None:
        self.__dict__["_of"] = lambda: original if (who := acting.get()) is None else getattr(who, name)

    def write(self, text: str) -> Any:  # print() uses it, also where the program has no stream (None)
        stream = self._of()
        return len(text) if stream is None else stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"](), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._of(), name, value)

    def __iter__(self) -> Any:
        return iter(self._of())

    def __enter__(self) -> Any:
        return self._of().__enter__()

    def __exit__(self, *raised: object) -> Any:
        return self._of().__exit__(*raised)

    def __repr__(self) -> str:
        return repr(self._of())

    @property  # type: ignore[misc]  # so that isinstance() sees what is behind, as with any proxy
    def __class__(self) -> Any:
        return type(self._of())


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
        if who is not None:
            _let_inherit(thread, who)
        original(thread)

    return start


def _let_inherit(thread: threading.Thread, who: Actor) -> None:
    run = thread.run

    def inheriting_run() -> None:
        vars(thread).pop("run", None)  # no cycle is to keep it
        acting.set(who)
        run()

    thread.run = inheriting_run  # type: ignore[method-assign]  # the thread is not started yet


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
    *(_Place(sys, name, _StreamStandIn) for name in _STREAMS),
    _Place(threading.Thread, "start", _inheriting_start),
    _Place(getpass, "getpass", _function_stand_in),
]
_finder = _ShowingFinder()


def _set() -> None:
    for place in _places:
        place.take()
    module = sys.modules.get(_SHOWING)
    if module is None:
        sys.meta_path.insert(0, _finder)
    else:
        _replace_showing(module)


def _strike() -> None:
    for place in _places:
        place.give_back()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _let_go() -> object:
    """The child has the thread that forked, and that alone; what it prints is the program's."""
    global _lock
    _lock = threading.RLock()
    if _on:
        _on.clear()
        _strike()
    return None


in_forked_child(_let_go)
