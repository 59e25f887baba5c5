"""Read an Arrow IPC stream that nobody has reason to trust.

Reading one can do more than it should: types of its own bring code along that makes them (some unpickle),
compressed buffers grow, offsets point anywhere, and a pandas frame is rebuilt by what a JSON text in it says.
Source: the Arrow columnar format, sections "Serialization and Interprocess Communication" and "Extension
Types"; Message.fbs for the fields of a message; the FlatBuffers binary format for where they lie.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from code_sandboxes.guest.values import NotTransferable, check_cells, check_types, frame_of, library

__all__ = ["frame"]

_SAFE_VERSION = (14, 0, 1)  # before, types could be pickled (CVE-2023-47248)

_CONTINUATION = 0xFFFFFFFF

# Message.fbs: the fields of a Message, a DictionaryBatch and a RecordBatch.
_HEADER_TYPE, _HEADER, _BODY_LENGTH = 1, 2, 3
_DATA = 1
_COMPRESSION = 3
_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3

_PANDAS_DTYPE = re.compile(
    r"object|category|bool(ean)?|u?int\d{1,2}|U?Int\d{1,2}|[fF]loat\d{1,2}|str|string(\[(python|pyarrow(_numpy)?)\])?"
    r"|(datetime64|timedelta64)(\[(s|ms|us|ns)(, [\w/+:-]{1,64})?\])?"
    r"|\w{1,20}(\[(s|ms|us|ns)(, tz=[\w/+:-]{1,64})?\])?\[pyarrow\]"
)
_PANDAS_TYPE = re.compile(
    r"unicode|string|bytes|integer|floating|decimal|empty|object|categorical|bool(ean)?|u?int\d{1,2}|float\d{1,2}"
    r"|date|datetime|datetimetz|mixed(-integer(-float)?)?"
)


def frame(kind: str, data: memoryview) -> object:
    """The pandas or polars frame in *data*.

    Raises:
        NotTransferable: it is none, or one that could do harm.
    """
    pyarrow = library("pyarrow")
    if _version(pyarrow.__version__) < _SAFE_VERSION:
        raise NotTransferable("a frame, and reading one is not safe with this pyarrow: 14.0.1 is needed,")
    try:
        _check_messages(data)
        table = pyarrow.ipc.open_stream(pyarrow.py_buffer(data)).read_all()
        check_types(table.schema)
        table.validate(full=True)
        check_cells(table, len(data))
        if kind == "pandas":
            _check_pandas((table.schema.metadata or {}).get(b"pandas", b"null"))
        return frame_of(kind, table)
    except NotTransferable:
        raise
    except BaseException as error:  # polars panics with what is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise NotTransferable(f"a {kind} DataFrame that cannot be read: {str(error)[:300]}") from None
        raise


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _check_messages(data: memoryview) -> None:
    """
    Raises:
        NotTransferable: a type that is not Arrow's own, or something compressed.
    """
    for index, metadata in enumerate(_messages(data)):
        message = _Table.root(metadata)
        kind = message.byte(_HEADER_TYPE)
        if (kind == _SCHEMA) is not (index == 0):
            raise NotTransferable("a frame whose messages are not in order")
        if kind == _SCHEMA:
            if b"ARROW:extension" in bytes(metadata):
                raise NotTransferable("a frame with a column of a type that is not Arrow's own")
            continue
        batch = message.table(_HEADER)
        if kind == _DICTIONARY_BATCH and batch is not None:
            batch = batch.table(_DATA)
        elif kind != _RECORD_BATCH:
            raise NotTransferable("a frame with a message of an unknown kind")
        if batch is None or batch.has(_COMPRESSION):
            raise NotTransferable("a frame with a column that is compressed")


def _messages(data: memoryview) -> Iterator[memoryview]:
    """The metadata of each message; behind it lies its body."""
    position = 0
    while position < len(data):
        marker, size = _unpack("<Ii", data, position)
        if marker != _CONTINUATION or size < 0:
            raise NotTransferable("a frame that is no Arrow stream")
        if size == 0:
            return
        metadata = data[position + 8 : position + 8 + size]
        yield metadata
        body = _Table.root(metadata).long(_BODY_LENGTH)
        if body < 0:
            raise NotTransferable("a frame with a message of a negative length")
        position += 8 + size + body


class _Table:
    """A table of a FlatBuffer: its fields by number."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data = data
        self._position = position
        self._vtable = position - _unpack("<i", data, position)[0]
        self._fields = (_unpack("<H", data, self._vtable)[0] - 4) // 2

    @staticmethod
    def root(data: memoryview) -> _Table:
        return _Table(data, _unpack("<I", data, 0)[0])

    def _field(self, number: int) -> int:
        """Where it lies; 0 if it is not there."""
        if number >= self._fields:
            return 0
        offset: int = _unpack("<H", self._data, self._vtable + 4 + 2 * number)[0]
        return self._position + offset if offset else 0

    def has(self, number: int) -> bool:
        return self._field(number) != 0

    def byte(self, number: int) -> int:
        field = self._field(number)
        return int(_unpack("<B", self._data, field)[0]) if field else 0

    def long(self, number: int) -> int:
        field = self._field(number)
        return int(_unpack("<q", self._data, field)[0]) if field else 0

    def table(self, number: int) -> _Table | None:
        field = self._field(number)
        return _Table(self._data, field + _unpack("<I", self._data, field)[0]) if field else None


def _unpack(form: str, data: memoryview, position: int) -> tuple[Any, ...]:
    if position < 0:
        raise NotTransferable("a frame that is no Arrow stream")
    try:
        return struct.unpack_from(form, data, position)
    except struct.error:
        raise NotTransferable("a frame that is cut off") from None


def _check_pandas(text: bytes) -> None:
    """
    Raises:
        NotTransferable: what says how to rebuild the frame names types that pandas would have to look for.
    """
    description = json.loads(text)
    if description is None:
        return
    for index in _of(list, _of(dict, description).get("index_columns")):
        if not isinstance(index, str):
            numbers = [_of(dict, index).get(name) for name in ("start", "stop", "step")]
            if not all(type(number) is int for number in numbers) or index.get("kind") != "range":
                raise NotTransferable("a pandas DataFrame with a strange index")
    for column in _of(list, description.get("columns")):
        _check_label(_of(dict, column), is_column=True)
    for column in _of(list, description.get("column_indexes", [])):
        _check_label(_of(dict, column), is_column=False)
    _of(dict, description.get("attributes", {}))


def _check_label(column: Mapping[str, object], *, is_column: bool) -> None:
    dtype, kind = _of(str, column.get("numpy_type")), _of(str, column.get("pandas_type"))
    if not _PANDAS_DTYPE.fullmatch(dtype):
        raise NotTransferable(f"a pandas DataFrame with a column of dtype {dtype[:100]!r}")
    if not is_column and not _PANDAS_TYPE.fullmatch(kind):
        raise NotTransferable(f"a pandas DataFrame with labels of type {kind[:100]!r}")


def _of(kind: type, value: object) -> Any:
    if not isinstance(value, kind):
        raise NotTransferable("a pandas DataFrame whose description is none")
    return value
