"""Pickle what was defined in ``__main__`` by what it is made of, where pickle itself has but its name.

Functions go with their code, in Python's own format for that, which the next minor version of Python does not
read; classes with their bases and attributes; both may refer to themselves and to each other. What can be
imported goes by its name, as ever. A function finds its global names in the namespace that it comes to.
"""

from __future__ import annotations

import abc
import builtins
import dataclasses
import functools
import marshal
import sys
import types
import typing
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import EnumMeta
from importlib import import_module
from importlib.util import MAGIC_NUMBER
from pickle import Pickler, PicklingError, Unpickler, UnpicklingError
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any, TypeVar

MAIN = "__main__"

PYTHON = ".".join(map(str, sys.version_info[:2]))

# The module that pickles say the functions are in by which they are built again. It is there only while
# something is pickled.
_MODULE = "_code_sandboxes_builders"
_BUILDERS: dict[str, Callable[..., object]] = {}

_OF_FUNCTIONS = (
    *("__module__", "__qualname__", "__doc__", "__defaults__", "__kwdefaults__", "__type_params__"),
    # Since Python 3.14 annotations are made when somebody asks for them.
    "__annotate__" if hasattr(FunctionType, "__annotate__") else "__annotations__",
)

# Of a class: what it has to be made with, and what is there then.
_MADE_WITH = ("__module__", "__doc__", "__slots__", "__orig_bases__")
_MADE_BY_PYTHON = ("__dict__", "__weakref__", "_abc_impl")

# Of an enumeration: by what it knows its members, and what these have then.
_MADE_BY_ENUM = (
    *("_member_names_", "_member_map_", "_value2member_map_", "_unhashable_values_", "_hashable_values_"),
    *("_unhashable_values_map_", "_new_member_", "__new_member__", "__new__"),
)
_OF_MEMBERS = ("_name_", "_value_", "__objclass__", "_sort_order_")

_OF_TYPE_VARIABLES = ("bound", "covariant", "contravariant", "infer_variance")

# Types for which pickle has names that nobody else has.
_KNOWN_TO_PICKLE = (type(None), type(NotImplemented), type(...))

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE (object.h); what is none was not made by a class statement

AnyBuilder = TypeVar("AnyBuilder", bound=Callable[..., object])


class OtherPython(Exception):
    """Code of another version of Python."""


# With what it is built again.


def _builder(function: AnyBuilder) -> AnyBuilder:
    _BUILDERS[function.__name__] = function
    function.__module__ = _MODULE
    return function


@contextmanager
def builders_in_reach() -> Iterator[None]:
    """As pickle wants to see that there is what it names."""
    module = ModuleType(_MODULE)
    vars(module).update(_BUILDERS)
    sys.modules[_MODULE] = module
    try:
        yield
    finally:
        if sys.modules.get(_MODULE) is module:  # else somebody else pickles by now
            del sys.modules[_MODULE]


@_builder
def make_code(magic: bytes, python: str, data: bytes) -> CodeType:
    if magic != MAGIC_NUMBER:
        raise OtherPython("it has code of Python " + python + ", which Python " + PYTHON + " does not read")
    code: CodeType = marshal.loads(data)
    return code


@_builder
def make_cell() -> CellType:
    return CellType()


@_builder
def make_globals() -> dict[str, Any]:
    return {"__builtins__": builtins}


@_builder
def make_function(
    main: dict[str, Any], code: CodeType, names: Any, name: str, cells: tuple[CellType, ...]
) -> FunctionType:
    """A function that has nothing but its code; :func:`set_function` gives it the rest.

    Args:
        names: its global names: a dictionary, a module whose they are, or None for those of *main*.
    """
    found = main if names is None else vars(names) if isinstance(names, ModuleType) else names
    return FunctionType(code, found, name, None, cells)


@_builder
def set_function(function: FunctionType, state: tuple[Any, ...]) -> None:
    attributes, own, contents = state
    for index, content in enumerate(contents):
        if content and function.__closure__ is not None:
            function.__closure__[index].cell_contents = content[0]
    for name, value in attributes.items():
        setattr(function, name, value)
    vars(function).update(own)


@_builder
def make_class(metaclass: Any, name: str, bases: tuple[Any, ...], content: dict[str, Any]) -> type:
    """A class without its attributes.

    What a metaclass does was done when the class was first made, and is among these.
    """
    make: Any = ABCMeta.__new__ if issubclass(metaclass, ABCMeta) else type.__new__
    made: type = make(metaclass, name, bases, content)
    return made


@_builder
def set_class(made: Any, state: tuple[Any, ...]) -> None:
    attributes, registered = state
    for name, value in attributes.items():
        type.__setattr__(made, name, value)
    for each in registered:
        ABCMeta.register(made, each)


@_builder
def make_enum(
    metaclass: Any, name: str, bases: tuple[Any, ...], content: dict[str, Any], members: dict[str, Any]
) -> type:
    """An enumeration with its members, without its other attributes."""
    names = metaclass.__prepare__(name, bases)
    for each, value in (*content.items(), *members.items()):
        names[each] = value
    made: type = metaclass.__new__(metaclass, name, bases, names)
    return made


@_builder
def set_enum(made: Any, state: tuple[Any, ...]) -> None:
    attributes, of_members = state
    for name, value in attributes.items():
        type.__setattr__(made, name, value)
    for name, values in of_members.items():
        vars(made.__members__[name]).update(values)


@_builder
def make_cached_property(function: Any, name: str | None) -> object:
    made: Any = functools.cached_property(function)
    made.attrname = name
    return made


@_builder
def make_lru_cache(function: Any, maxsize: int | None, typed: bool) -> object:
    return functools.lru_cache(maxsize, typed)(function)


@_builder
def make_type_variable(kind: Any, module: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> object:
    made = kind(*arguments, **options)
    made.__module__ = module
    return made


# Of these, the first argument is not what it should be if they fail.
SETTERS = (set_function, set_class, set_enum)


# What it is made of.


class _Cell:
    """A cell of closures; what is in it is told by the functions that have it."""


class _Globals:
    """The global names of functions that are neither those of ``__main__`` nor a module's."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names


class DefinitionPickler(Pickler):
    """Pickles definitions, too.

    Args:
        file: has ``write()``.
        main: the namespace of ``__main__``.
        give: is given the buffers of arrays and the like, which do not go to *file*.
    """

    def __init__(self, file: Any, main: Mapping[str, Any], give: Callable[[Any], None]) -> None:
        super().__init__(file, 5, buffer_callback=give)
        self._main = main
        # What each stands for is kept with it: nothing else can have its number.
        self._cells: dict[int, tuple[CellType, _Cell]] = {}
        self._globals: dict[int, _Globals] = {}

    def reducer_override(self, value: Any) -> Any:
        """See pickle, "Custom Reduction for Types, Functions, and Other Objects"."""
        kind = type(value)
        reduce = _REDUCERS.get(kind)
        if reduce is not None:
            return reduce(self, value)
        if issubclass(kind, type):
            return self.reduce_class(value)
        if issubclass(kind, ModuleType):
            return self.reduce_module(value)
        return NotImplemented

    def reduce_module(self, module: ModuleType) -> Any:
        if sys.modules.get(module.__name__) is not module:
            raise PicklingError("a module that nobody can import: " + module.__name__)
        return import_module, (module.__name__,)

    def reduce_function(self, function: FunctionType) -> Any:
        if is_importable(function):
            return NotImplemented
        cells = function.__closure__ or ()
        stand_ins = tuple(self._cells.setdefault(id(cell), (cell, _Cell()))[1] for cell in cells)
        arguments = (function.__code__, self._names_of(function), function.__name__, stand_ins)
        attributes = {name: getattr(function, name) for name in _OF_FUNCTIONS if hasattr(function, name)}
        state = (attributes, vars(function), [_content(cell) for cell in cells])
        return make_function, arguments, state, None, None, set_function

    def _names_of(self, function: FunctionType) -> object:
        names = function.__globals__
        if names is self._main:
            return None
        module = sys.modules.get(names.get("__name__", ""))
        if module is not None and vars(module) is names:
            return module
        return self._globals.setdefault(id(names), _Globals(names))

    def reduce_class(self, kind: Any) -> Any:
        if kind in _KNOWN_TO_PICKLE or is_importable(kind):
            return NotImplemented
        if not kind.__flags__ & _HEAP_TYPE:
            return _as_attribute(types, kind)
        attributes = {
            name: value for name, value in vars(kind).items() if not _is_made_by_python(kind, name, value)
        }
        content = {name: attributes.pop(name) for name in _MADE_WITH if name in attributes}
        content["__qualname__"] = kind.__qualname__
        arguments = (type(kind), kind.__name__, kind.__bases__, content)
        if issubclass(type(kind), EnumMeta):
            return _reduce_enum(kind, arguments, attributes)
        return make_class, arguments, (attributes, _registered(kind)), None, None, set_class


def _reduce_enum(kind: Any, arguments: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    members = kind.__members__
    others = {
        name: value for name, value in attributes.items() if name not in members and name not in _MADE_BY_ENUM
    }
    of_members = {
        name: {key: value for key, value in vars(member).items() if key not in _OF_MEMBERS}
        for name, member in members.items()
    }
    values = {name: member._value_ for name, member in members.items()}
    return make_enum, (*arguments, values), (others, of_members), None, None, set_enum


def _reduce_code(pickler: DefinitionPickler, code: CodeType) -> Any:
    return make_code, (MAGIC_NUMBER, PYTHON, marshal.dumps(code))


def _reduce_globals(pickler: DefinitionPickler, own: _Globals) -> Any:
    usual = own.names.get("__builtins__")
    left_out = ("__builtins__",) if usual is builtins or usual is vars(builtins) else ()
    items = [(name, value) for name, value in own.names.items() if name not in left_out]
    return make_globals, (), None, None, iter(items)


def _reduce_lru_cache(pickler: DefinitionPickler, function: Any) -> Any:
    if is_importable(function):
        return NotImplemented
    options = function.cache_parameters()
    return make_lru_cache, (function.__wrapped__, options["maxsize"], options["typed"])


def _reduce_type_variable(pickler: DefinitionPickler, variable: Any) -> Any:
    if is_importable(variable):
        return NotImplemented
    given = {name: getattr(variable, "__" + name + "__", None) for name in _OF_TYPE_VARIABLES}
    options = {name: value for name, value in given.items() if value}
    if hasattr(variable, "has_default") and variable.has_default():
        options["default"] = variable.__default__
    constraints = getattr(variable, "__constraints__", ())
    arguments = (variable.__name__, *constraints)
    return make_type_variable, (type(variable), variable.__module__, arguments, options)


def _reduce_new_type(pickler: DefinitionPickler, variable: Any) -> Any:
    if is_importable(variable):
        return NotImplemented
    arguments = (variable.__name__, variable.__supertype__)
    return make_type_variable, (type(variable), variable.__module__, arguments, {})


def _as_attribute(module: ModuleType, value: object) -> Any:
    name = next((name for name, each in vars(module).items() if each is value), None)
    return NotImplemented if name is None else (getattr, (module, name))


def _content(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def _is_made_by_python(kind: Any, name: str, value: Any) -> bool:
    if name in _MADE_BY_PYTHON:
        return True
    return type(value) is types.MemberDescriptorType and value.__objclass__ is kind  # one of the slots


def _registered(kind: Any) -> list[Any]:
    """The classes that were registered as subclasses of an abstract one."""
    dump_of = getattr(abc, "_get_dump", None)  # CPython's
    if dump_of is None or not issubclass(type(kind), ABCMeta):
        return []
    found = [reference() for reference in dump_of(kind)[0]]
    return [each for each in found if each is not None]


def is_importable(value: Any) -> bool:
    """*value* is what is found under its name in its module, which is there elsewhere, too."""
    module = getattr(value, "__module__", None)
    if not isinstance(module, str) or module == MAIN:
        return False
    found: Any = sys.modules.get(module)
    for part in getattr(value, "__qualname__", value.__name__).split("."):
        found = getattr(found, part, None)
    return found is value


_REDUCERS: dict[Any, Callable[[DefinitionPickler, Any], Any]] = {
    FunctionType: DefinitionPickler.reduce_function,
    CodeType: _reduce_code,
    _Cell: lambda pickler, cell: (make_cell, ()),
    _Globals: _reduce_globals,
    staticmethod: lambda pickler, value: (staticmethod, (value.__func__,)),
    classmethod: lambda pickler, value: (classmethod, (value.__func__,)),
    property: lambda pickler, value: (property, (value.fget, value.fset, value.fdel, value.__doc__)),
    functools.cached_property: lambda pickler, value: (make_cached_property, (value.func, value.attrname)),
    type(functools.lru_cache(maxsize=0)(len)): _reduce_lru_cache,
    MappingProxyType: lambda pickler, value: (MappingProxyType, (dict(value),)),
    TypeVar: _reduce_type_variable,
}

# Of these, what they are is that they are the same.
for _kind in {type(value) for value in vars(dataclasses).values()}:
    if _kind.__module__ == dataclasses.__name__:
        _REDUCERS[_kind] = lambda pickler, value: _as_attribute(dataclasses, value)

if hasattr(typing, "ParamSpec"):
    _REDUCERS[typing.ParamSpec] = _reduce_type_variable
    _REDUCERS[typing.NewType] = _reduce_new_type  # which was a function before


# And back.


class DefinitionUnpickler(Unpickler):
    """Reads what :class:`DefinitionPickler` has written.

    Args:
        file: has ``read()``, ``readinto()`` and ``readline()``.
        main: the namespace of ``__main__``.
        buffers: gives those that did not go to the file.
    """

    def __init__(self, file: Any, main: dict[str, Any], buffers: Iterable[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._main = main

    def find_class(self, module: str, name: str) -> Any:
        return find(self._main, module, name, super().find_class)


def find(main: dict[str, Any], module: str, name: str, elsewhere: Callable[[str, str], Any]) -> Any:
    """What a pickle names."""
    if module == _MODULE:
        return functools.partial(make_function, main) if name == "make_function" else _BUILDERS[name]
    if module != MAIN:
        return elsewhere(module, name)
    if name not in main:
        raise UnpicklingError("it needs " + MAIN + "." + name + ", which is not there")
    return main[name]
