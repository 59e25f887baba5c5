"""Values as a form and bytes, and back: what one side encodes, the other decodes.

The form is a JSON object that says what the bytes are::

    {"kind": "json"}                         as UTF-8, with NaN and Infinity, lone surrogates as they are
    {"kind": "bytes"}
    {"kind": "array", "dtype": "<f8", "shape": [3, 4], "order": "C"}    numpy; "scalar": true for a scalar
    {"kind": "pandas"} or {"kind": "polars"}                            a frame as an Arrow IPC stream

Nothing is pickled or evaluated, and no method of a class of the user's is called on purpose. numpy, pandas,
polars and pyarrow are imported only where a value is theirs.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from json.decoder import JSONDecoder
from json.encoder import encode_basestring
from typing import Any

DEEPEST = 200
"""Lists and dictionaries inside each other; more is refused, and with it what contains itself."""

# Python itself writes no more than 4,300 digits (sys.set_int_max_str_digits).
LONGEST_INT = 14_000  # bits

_PLAIN_DTYPE = re.compile(
    r"[<>|=](?:b1|[iu][1248]|f(?:2|4|8)|c(?:8|16)|[SUV]\d{1,9}|[mM]8(?:\[[^\]]{1,20}\])?)"
)
_LONG_DTYPE = re.compile(r"([<>](?:f|c)\d{2})/(\d{1,3})")

# Where nothing is stored for a cell (nulls of Arrow, items of no size), no bytes could stand for any number.
_FREE_CELLS = 1_000_000


class NotTransferable(Exception):
    """A value that cannot go to the other side, or come from there; it says why."""


class NotInstalled(NotTransferable):
    """It needs a package that is not there."""

    def __init__(self, package: str) -> None:
        super().__init__(package + " is not installed")
        self.package = package


def encode(value: object) -> tuple[dict[str, Any], memoryview]:
    """The form and the bytes of *value*; those of an array are its own, not a copy, where that is possible.

    Raises:
        NotTransferable: it is of another type, or contains something that is.
    """
    kind = type(value)
    if issubclass(kind, _class("numpy", "generic")):
        return _encode_array(library("numpy").asarray(value), scalar=True)
    if kind in (_class("numpy", "ndarray"), _class("numpy", "memmap")):
        return _encode_array(value, scalar=False)
    if kind is _class("pandas", "DataFrame"):
        return {"kind": "pandas"}, _stream(_table_of_pandas(value))
    if kind is _class("polars", "DataFrame"):
        return {"kind": "polars"}, _stream(_table_of_polars(value))
    if issubclass(kind, (bytes, bytearray, memoryview)):
        return {"kind": "bytes"}, _bytes(value)
    return {"kind": "json"}, memoryview(_json(value))


def decode(form: Mapping[str, Any], data: BytesIO) -> object:
    """What :func:`encode` was given. *form* and *data* may be anything; frames are not checked here.

    Raises:
        NotTransferable: they do not fit together, or are no value at all.
    """
    kind = form.get("kind")
    if kind == "json":
        return _of_json(data)
    if kind == "bytes":
        return data.getvalue()
    if kind == "array":
        return _decode_array(form, data)
    if kind in ("pandas", "polars"):
        pyarrow = library("pyarrow")
        return frame_of(kind, pyarrow.ipc.open_stream(pyarrow.py_buffer(data.getbuffer())).read_all())
    raise NotTransferable("a value of an unknown kind")


def library(name: str) -> Any:
    """
    Raises:
        NotInstalled: it is not there.
    """
    try:
        return __import__(name)
    except ImportError:
        raise NotInstalled(name) from None


def _class(module: str, name: str) -> Any:
    """A class of a library, if that is loaded; else what no value is one of."""
    found = getattr(sys.modules.get(module), name, ())
    return found if isinstance(found, type) else ()


def _bytes(value: Any) -> memoryview:
    if type(value) is bytes:
        return memoryview(value)
    return memoryview(memoryview(value).tobytes())  # a bytearray could not grow as long as it is looked at


# JSON. It is written here, since json calls methods of subclasses and does not say where it failed.


class _Refused(Exception):
    """Something inside a value; *steps* lead there, the last one first."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.steps: list[str] = []


def _json(value: object) -> bytes:
    pieces: list[str] = []
    try:
        _write(value, pieces.append, 0)
    except _Refused as refused:
        at = "".join(reversed(refused.steps))
        at = at if len(at) < 200 else at[:50] + "..." + at[-50:]
        raise NotTransferable(str(refused) + (" at " + at if at else "")) from None
    except RecursionError:
        raise NotTransferable("it is nested too deeply") from None
    return "".join(pieces).encode("utf-8", "surrogatepass")


def _write(value: Any, write: Callable[[str], object], depth: int) -> None:
    kind = type(value)
    if value is None:
        write("null")
    elif kind is bool:
        write("true" if value else "false")
    elif issubclass(kind, str):
        write(encode_basestring(value))
    elif issubclass(kind, int):
        write(_digits(value))
    elif issubclass(kind, float):
        write(_number(value))
    elif depth >= DEEPEST:
        raise _Refused("something that contains itself, or lies more than " + str(DEEPEST) + " deep,")
    elif issubclass(kind, list):
        _write_items(list.copy(value), write, depth)  # in one go: code may be changing it
    elif issubclass(kind, tuple):
        _write_items(tuple.__getitem__(value, slice(None)), write, depth)
    elif issubclass(kind, dict):
        _write_dict(value, write, depth)
    else:
        raise _Refused("a value of type " + type_name(kind))


def _write_items(items: Any, write: Callable[[str], object], depth: int) -> None:
    before, index = "[", 0
    try:
        for item in items:
            write(before)
            _write(item, write, depth + 1)
            before = ","
            index += 1
    except _Refused as refused:
        refused.steps.append("[" + str(index) + "]")
        raise
    write("]" if items else "[]")


def _write_dict(value: Any, write: Callable[[str], object], depth: int) -> None:
    items = OrderedDict.items(value) if issubclass(type(value), OrderedDict) else dict.items(value)
    pairs = list(items)
    before, key = "{", None
    names = set()
    try:
        for key, item in pairs:
            if not issubclass(type(key), str):
                raise _Refused("a dict with a key of type " + type_name(type(key)))
            name = encode_basestring(key)
            names.add(name)
            write(before + name + ":")
            _write(item, write, depth + 1)
            before = ","
    except _Refused as refused:
        if issubclass(type(key), str):
            refused.steps.append("[" + str.__repr__(key)[:100] + "]")
        raise
    if len(names) != len(pairs):
        raise _Refused("a dict with keys that are the same text")
    write("}" if names else "{}")


def _digits(value: int) -> str:
    if int.bit_length(value) > LONGEST_INT:
        raise _Refused("an integer of more than " + str(LONGEST_INT) + " bits")
    try:
        return int.__repr__(value)
    except ValueError:  # the code has set the limit lower
        raise _Refused("an integer with more digits than sys.get_int_max_str_digits() allows") from None


def _number(value: float) -> str:
    text = float.__repr__(value)
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)


# Bound to this one: json's functions can be replaced by the user's code.
_decoder: Any = JSONDecoder()
_scan: Callable[[str, int], tuple[object, int]] = _decoder.scan_once


def _of_json(data: BytesIO) -> object:
    try:
        text = str(data.getbuffer(), "utf-8", "surrogatepass")
        value, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError) as error:
        raise NotTransferable("no JSON: " + type(error).__name__) from None
    if end != len(text):
        raise NotTransferable("no JSON: there is more behind it")
    return value


def type_name(kind: type) -> str:
    """As an error quotes it."""
    module, name = kind.__module__, kind.__qualname__
    return repr((name if module == "builtins" else str(module) + "." + str(name))[:200])


# numpy


def _encode_array(value: Any, scalar: bool) -> tuple[dict[str, Any], memoryview]:
    numpy = library("numpy")
    array = value.view(numpy.ndarray)
    dtype = _dtype_form(array.dtype, numpy)
    is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    form = {
        "kind": "array",
        "dtype": dtype,
        "shape": list(array.shape),
        "order": "F" if is_fortran else "C",
        "scalar": scalar,
    }
    laid_out = array.T if is_fortran else array if array.flags.c_contiguous else array.copy(order="C")
    if not laid_out.nbytes:
        return form, memoryview(b"")
    return form, memoryview(laid_out.reshape(-1).view(numpy.uint8))


def _decode_array(form: Mapping[str, Any], data: BytesIO) -> object:
    numpy = library("numpy")
    try:
        dtype = _dtype_of(form.get("dtype"), numpy, 0)
        shape = tuple(_count(length) for length in _list(form.get("shape")))
        cells = 1
        for length in shape:
            cells *= length
        nbytes = dtype.itemsize * cells
        if not dtype.itemsize and cells > _FREE_CELLS:
            raise NotTransferable("an array of so many items of no size")
        buffer = data.getbuffer()
        if nbytes != len(buffer) or (form.get("scalar") and shape):
            raise NotTransferable("an array whose shape and bytes do not fit")
        order = "F" if form.get("order") == "F" else "C"
        array = numpy.ndarray(shape, dtype, buffer=buffer if nbytes else None, order=order)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise NotTransferable("an array that cannot be: " + str(error)[:200]) from None
    return array[()] if form.get("scalar") else array


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _dtype_form(dtype: Any, numpy: Any) -> object:
    if dtype.subdtype is not None:
        return {"base": _dtype_form(dtype.subdtype[0], numpy), "shape": list(dtype.subdtype[1])}
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        titles = [field[2] if len(field) > 2 else None for field in fields]
        for name in dtype.names:
            if not _is_text(name):
                raise NotTransferable("an array with a field whose name is no text: " + ascii(name))
        if not all(title is None or type(title) is str for title in titles):
            raise NotTransferable("a numpy array with titles in its dtype that are no texts")
        return {
            "names": list(dtype.names),
            "formats": [_dtype_form(field[0], numpy) for field in fields],
            "offsets": [field[1] for field in fields],
            "titles": titles,
            "itemsize": dtype.itemsize,
        }
    text = dtype.str
    if dtype.kind in "fc" and not _PLAIN_DTYPE.fullmatch(text):
        # Its bytes mean something else on another kind of machine.
        text += "/" + str(numpy.finfo(dtype).nmant)
        is_known = _LONG_DTYPE.fullmatch(text) is not None
    else:
        # Others have types of their own that look like some bytes (bfloat16), or refer to memory.
        is_known = _PLAIN_DTYPE.fullmatch(text) is not None and bool(numpy.dtype(text) == dtype)
    if not is_known:
        raise NotTransferable("a numpy array of dtype " + repr(str(dtype)[:100]))
    return text


def _dtype_of(form: Any, numpy: Any, depth: int) -> Any:
    if depth > 20:
        raise NotTransferable("a dtype that is nested too deeply")
    if isinstance(form, dict) and "base" in form:
        shape = tuple(_count(length) for length in _list(form.get("shape")))
        return numpy.dtype((_dtype_of(form["base"], numpy, depth + 1), shape))
    if isinstance(form, dict):
        names, titles = _list(form.get("names")), _list(form.get("titles"))
        named = all(isinstance(name, str) for name in names)
        if not named or not all(title is None or isinstance(title, str) for title in titles):
            raise NotTransferable("a dtype whose names are no texts")
        fields = {
            "names": names,
            "formats": [_dtype_of(each, numpy, depth + 1) for each in _list(form.get("formats"))],
            "offsets": [_count(each) for each in _list(form.get("offsets"))],
            "titles": titles,
            "itemsize": _count(form.get("itemsize")),
        }
        return numpy.dtype(fields)
    if isinstance(form, str) and _PLAIN_DTYPE.fullmatch(form):
        return numpy.dtype(form)
    long = _LONG_DTYPE.fullmatch(form) if isinstance(form, str) else None
    if long is None:
        raise NotTransferable("a numpy array of an unknown dtype")
    dtype = numpy.dtype(long[1])
    if str(numpy.finfo(dtype).nmant) != long[2]:
        raise NotTransferable("a numpy array of dtype " + str(dtype) + " from another kind of machine")
    return dtype


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise NotTransferable("a form with something else in the place of a list")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise NotTransferable("a form with something else in the place of a size")
    return value


# Frames


def _table_of_pandas(frame: Any) -> Any:
    pyarrow = library("pyarrow")
    if not all(name is None or isinstance(name, str) for name in frame.index.names):
        raise NotTransferable("a pandas DataFrame with an index whose name is no text")
    if frame.attrs:
        _json(frame.attrs)
    try:
        table = pyarrow.Table.from_pandas(frame)
        empty = table.slice(0, 0).to_pandas()
        is_same = empty.columns.equals(frame.columns) and empty.index.names == frame.index.names
    except Exception as error:  # whatever it raises says what Arrow cannot hold
        raise NotTransferable("a pandas DataFrame that Arrow cannot hold: " + str(error)[:300]) from None
    if not is_same:
        raise NotTransferable("a pandas DataFrame whose labels of columns Arrow cannot hold")
    return table


def _table_of_polars(frame: Any) -> Any:
    library("pyarrow")
    polars = library("polars")
    try:
        table = frame.to_arrow(compat_level=polars.CompatLevel.oldest())
        is_same = polars.from_arrow(table.slice(0, 0)).schema == frame.schema
    except Exception as error:  # whatever it raises says what Arrow cannot hold
        raise NotTransferable("a polars DataFrame that Arrow cannot hold: " + str(error)[:300]) from None
    if not is_same:  # it gives addresses of objects for bytes
        raise NotTransferable("a polars DataFrame with a type of columns that Arrow cannot hold")
    return table


def _stream(table: Any) -> memoryview:
    pyarrow = library("pyarrow")
    check_types(table.schema)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stream = memoryview(sink.getvalue())
    check_cells(table, len(stream))
    return stream


def frame_of(kind: str, table: Any) -> object:
    """The frame that *table* was made of."""
    if kind == "pandas":
        library("pandas")
        return table.to_pandas()
    return library("polars").from_arrow(table)


def check_types(schema: Any) -> None:
    """
    Raises:
        NotTransferable: a column is of a type that not every Arrow has, or that could be more than data.
    """
    for field in schema:
        kind = field.type
        is_dictionary = library("pyarrow").types.is_dictionary(kind)
        _check_type(kind.value_type if is_dictionary else kind, 0)


# Views and run ends are left out: a few bytes of them can stand for very many.
_LEAVES = (
    *("null", "boolean", "integer", "floating", "decimal", "string", "large_string", "binary"),
    *("large_binary", "fixed_size_binary", "date", "time", "timestamp", "duration"),
)
_LISTS = ("list", "large_list", "fixed_size_list", "map", "struct")


def _check_type(kind: Any, depth: int) -> None:
    types = library("pyarrow").types
    if any(getattr(types, "is_" + name)(kind) for name in _LEAVES):
        return
    if depth > 50 or not any(getattr(types, "is_" + name)(kind) for name in _LISTS):
        raise NotTransferable("a frame with a column of the Arrow type " + repr(str(kind)[:100]))
    for index in range(kind.num_fields):
        _check_type(kind.field(index).type, depth + 1)


def check_cells(table: Any, size: int) -> None:
    """
    Raises:
        NotTransferable: it has far more cells than *size* bytes can hold.
    """
    cells = sum(_cells(chunk) for column in table.columns for chunk in column.chunks)
    if max(cells, table.num_rows) > 8 * size + _FREE_CELLS:
        raise NotTransferable("a frame of " + str(cells) + " cells with hardly anything in them")


def _cells(array: Any) -> int:
    types = library("pyarrow").types
    kind, count = array.type, len(array)
    if types.is_struct(kind):
        return count + sum(_cells(array.field(index)) for index in range(kind.num_fields))
    if types.is_map(kind):
        return count + _cells(array.keys) + _cells(array.items)
    if any(getattr(types, "is_" + name)(kind) for name in _LISTS):
        return count + _cells(array.values)
    if types.is_dictionary(kind) and types.is_null(kind.value_type):
        return count + len(array.dictionary)
    return count
