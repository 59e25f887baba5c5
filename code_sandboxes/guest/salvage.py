"""Read pickles of which not everything can be built: the rest is built, and what has no part of the other.

In the place of what cannot be built comes a :class:`Lost`; where it has got to is found out by pickling,
which meets all that matters of a value. This is slower than just reading, and for when that has failed.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any, ClassVar

_Unpickler: Any = pickle._Unpickler  # the one that is written in Python


class Unreadable(Exception):
    """A value has a part that could not be built; it says why not."""


class Lost:
    """In the place of what could not be built."""

    __slots__ = ("why",)

    def __init__(self, why: str) -> None:
        self.why = why

    def __reduce_ex__(self, protocol: object) -> Any:
        raise Unreadable(self.why)


class Salvage(_Unpickler):  # type: ignore[misc]  # it has no types
    """Reads one pickle after the other, which may refer to what is in those before.

    Args:
        file: has ``read()``, ``readinto()`` and ``readline()``.
        main: the namespace of ``__main__``.
        buffers: gives those that are not in the file.
        definitions: the module ``definitions.py``.
        reason: tells why something failed; it raises if that is not the fault of what is read.

    Attributes:
        why_not: there is such a reason to call nothing.
    """

    def __init__(
        self,
        file: Any,
        main: dict[str, Any],
        buffers: Any,
        definitions: Any,
        reason: Callable[[BaseException], str],
    ) -> None:
        super().__init__(file, buffers=buffers)
        self.why_not = ""
        self._main = main
        self._definitions = definitions
        self._reason = reason
        self._is_all_built = True
        self._half_built: dict[int, tuple[object, Lost]] = {}  # by its number

    def find_class(self, module: str, name: str) -> Any:
        return self._definitions.find(self._main, module, name, super().find_class)

    def check(self, value: object) -> None:
        """
        Raises:
            Unreadable: *value* has something that could not be built.
        """
        if self._is_all_built:
            return
        half_built = self._half_built

        class Checking(self._definitions.DefinitionPickler):  # type: ignore[misc, name-defined]  # a module
            def reducer_override(self, part: Any) -> Any:
                if id(part) in half_built:
                    raise Unreadable(half_built[id(part)][1].why)
                return super().reducer_override(part)

        with self._definitions.builders_in_reach():
            Checking(_Nowhere(), self._main, lambda buffer: None).dump(value)

    def _build(self, function: Any, *arguments: Any) -> Any:
        """What *function* returns, or what comes in the place of that."""
        lost = next(filter(None, map(self._lost_of, (function, *arguments))), None)
        try:
            made = function(*arguments) if lost is None else lost
        except BaseException as error:  # of whatever kind: code of theirs has raised it
            made = lost = self._lose(self._reason(error))
        if any(function is each for each in self._definitions.SETTERS):
            filled, (attributes, *_) = arguments
            lost = lost or next(filter(None, map(self._lost_of, attributes.values())), None)
            if lost is not None:
                self._half_built[id(filled)] = (filled, lost)
        return made

    def _lost_of(self, value: object) -> Lost | None:
        """What there is in its place, or in the place of a part of it that it needs."""
        return value if type(value) is Lost else self._half_built.get(id(value), (None, None))[1]

    def _call(self, function: Any, *arguments: Any) -> Any:
        return self._lose(self.why_not) if self.why_not else self._build(function, *arguments)

    def _lose(self, why: str) -> Lost:
        self._is_all_built = False
        return Lost(why)

    # The instructions that may fail, see pickletools. Each does what it does in an unpickler.

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self._call(function, *arguments))

    def _newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.append(self._call(_new, kind, arguments, {}))

    def _newobj_ex(self) -> None:
        options, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(self._call(_new, kind, arguments, options))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        # Somebody's module may be what takes too long.
        find = self._build if module in sys.modules else self._call
        self.append(find(self.find_class, module, name))

    def _frozenset(self) -> None:
        items = self.pop_mark()
        self.append(self._build(frozenset, items))

    def _extension(self, instruction: int) -> None:
        """One that stands for something by a number (copyreg)."""
        try:
            _Unpickler.dispatch[instruction](self)
        except BaseException as error:  # the same
            self.append(self._lose(self._reason(error)))

    def _fill(self, instruction: int) -> None:
        """One that puts something into what is there already."""
        try:
            _Unpickler.dispatch[instruction](self)
        except BaseException as error:  # the same
            lost, filled = self._lose(self._reason(error)), self.stack[-1]
            if type(filled) is dict:
                filled[lost] = lost
            elif type(filled) is set:
                filled.add(lost)
            elif type(filled) is not Lost:
                self._half_built[id(filled)] = (filled, lost)

    def _set_state(self) -> None:
        if type(self.stack[-2]) is Lost:
            self.stack.pop()
        else:
            self._fill(pickle.BUILD[0])

    dispatch: ClassVar[Any] = {
        **_Unpickler.dispatch,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.STACK_GLOBAL[0]: _stack_global,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BUILD[0]: _set_state,
        pickle.EXT1[0]: lambda self: self._extension(pickle.EXT1[0]),
        pickle.EXT2[0]: lambda self: self._extension(pickle.EXT2[0]),
        pickle.EXT4[0]: lambda self: self._extension(pickle.EXT4[0]),
        pickle.APPEND[0]: lambda self: self._fill(pickle.APPEND[0]),
        pickle.APPENDS[0]: lambda self: self._fill(pickle.APPENDS[0]),
        pickle.SETITEM[0]: lambda self: self._fill(pickle.SETITEM[0]),
        pickle.SETITEMS[0]: lambda self: self._fill(pickle.SETITEMS[0]),
        pickle.ADDITEMS[0]: lambda self: self._fill(pickle.ADDITEMS[0]),
    }


class _Nowhere:
    def write(self, data: object) -> None:
        return


def _new(kind: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return kind.__new__(kind, *arguments, **options)
