"""Variables: what goes in comes out, what cannot is named, and nothing that comes out is believed."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import datetime
import enum
import importlib
import json
import math
import re
import struct
import threading
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import psutil
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as some_numpy

from code_sandboxes import (
    AsyncSandbox,
    Sandbox,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxSerializationError,
    VariableNotFoundError,
    arrow,
)
from code_sandboxes.blocking import drive
from code_sandboxes.errors import SandboxError
from code_sandboxes.guest import values
from code_sandboxes.guest.values import NotTransferable
from code_sandboxes.guest_link import Answered, GuestCall
from code_sandboxes.inbox import Inbox
from code_sandboxes.variable_operations import _decoded, _with_answer, received
from conftest import UNISOLATED

ISOLATED = True
EVERY_FRONT = ("blocking", "async")
IN_A_CONTAINER = True
ON_A_SERVER = True

# They have no types.
pa: Any = importlib.import_module("pyarrow")
pd: Any = importlib.import_module("pandas")

MIB = 1024**2


def there_and_back(value: object) -> Any:
    """As it comes out of the codec of the other side."""
    form, data = values.encode(value)
    return _decoded("x", json.loads(json.dumps(form)), BytesIO(bytes(data)))


def through(sandbox: Sandbox, value: object) -> Any:
    sandbox.set_variable("x", value)
    return sandbox.get_variable("x")


def same(one: Any, other: Any) -> bool:
    """Equal, of the same types, and NaN is NaN."""
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.tobytes() == other.tobytes()
        )
    return type(one) is type(other) and repr(one) == repr(other)


# What comes out is what went in.

everything_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=())), inner),
)


@settings(deadline=None, max_examples=30)
@given(everything_json)
def test_json_values_come_back_equal(value: object) -> None:
    assert same(there_and_back(value), value)


@pytest.mark.parametrize(
    "value",
    [2**10_000, -(2**10_000), 1e308, -0.0, math.inf, "\ud83d\ude00", "\udcff\0", "\u2028", {"": [{}, []]}],
    ids=lambda value: ascii(value)[:20],
)
def test_odd_json_values_come_back_equal(value: object) -> None:
    assert same(there_and_back(value), value)


class Number(enum.IntEnum):
    TWO = 2


class Word(str):
    def __str__(self) -> str:
        raise AssertionError("called")

    __repr__ = __eq__ = __str__  # type: ignore[assignment]  # whatever is called
    __hash__ = str.__hash__


class Pair(NamedTuple):
    x: int
    y: int


class Shy(dict[str, Any]):
    def __iter__(self) -> Any:
        raise AssertionError("called")

    items = keys = __len__ = __getitem__ = __iter__  # type: ignore[assignment]  # nobody is to call them


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, (2,)), [1, [2]]),
        (Number.TWO, 2),
        ([Word("a")], ["a"]),
        ({Word("a"): Word("b")}, {"a": "b"}),
        (Shy(a=1), {"a": 1}),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (Pair(1, 2), [1, 2]),
        ([np.float64(0.5)], [0.5]),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"abcd")[::2], b"ac"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_subclasses_come_as_what_they_are_made_of_and_are_not_called(value: object, plain: object) -> None:
    assert same(there_and_back(value), plain)


def test_an_ordered_dict_keeps_its_order() -> None:
    value = collections.OrderedDict(a=1, b=2)
    value.move_to_end("a")
    assert list(there_and_back(value)) == ["b", "a"]


dtypes = (
    some_numpy.scalar_dtypes()
    | some_numpy.byte_string_dtypes()
    | some_numpy.unicode_string_dtypes()
    | some_numpy.nested_dtypes(max_itemsize=200)
)


@given(some_numpy.arrays(dtypes, some_numpy.array_shapes(min_dims=0, min_side=0, max_side=4)))
@settings(deadline=None, max_examples=40)
def test_arrays_come_back_equal_and_can_be_written(array: np.ndarray[Any, Any]) -> None:
    back = there_and_back(array)
    assert same(back, array)
    assert back.flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.arange(12)[::-1],
        np.broadcast_to(np.int8(3), (4, 5)),
        np.zeros(3, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
        np.zeros(
            3, np.dtype({"names": ["b", "a"], "formats": ["i4", "i2"], "offsets": [4, 4], "itemsize": 9})
        ),
        np.array(["2020-01-01", "NaT"], "datetime64[25s]"),
        np.array([1, 2], ">m8[us]"),
        np.array([1, 2], np.longdouble),
    ],
    ids=lambda array: str(array.dtype)[:20],
)
def test_odd_arrays_come_back_equal(array: np.ndarray[Any, Any]) -> None:
    back = there_and_back(array)
    assert back.dtype == array.dtype
    assert same(back, np.ascontiguousarray(array))


def test_an_array_in_fortran_order_stays_so() -> None:
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    back = there_and_back(array)
    assert np.array_equal(back, array)
    assert back.flags.f_contiguous
    assert not back.flags.c_contiguous


@pytest.mark.parametrize(
    "scalar",
    [
        np.float32(0.5),
        np.int8(-3),
        np.bool_(True),
        np.str_("a\u00e9"),
        np.bytes_(b"a"),
        np.datetime64("2020-01"),
    ],
    ids=lambda scalar: type(scalar).__name__,
)
def test_numpy_scalars_stay_numpy_scalars(scalar: object) -> None:
    back = there_and_back(scalar)
    assert type(back) is type(scalar)
    assert back == scalar


TIMES = [datetime.datetime(2020, 1, 1), datetime.datetime(2021, 6, 1)]

PANDAS = {
    "plain": pd.DataFrame({"a": [1, 2], "b": [1.5, None], "c": [True, False]}),
    "texts": pd.DataFrame({"a": ["x", None], "b": pd.array(["y", "z"], dtype="string")}),
    "categories": pd.DataFrame({"a": pd.Categorical(["u", "v"], ["v", "u"], ordered=True)}),
    "times": pd.DataFrame(
        {"a": pd.to_datetime(TIMES), "b": pd.to_datetime(TIMES).tz_localize("Europe/Berlin")},
        index=pd.to_datetime(TIMES),
    ),
    "spans": pd.DataFrame({"a": pd.to_timedelta([1, 2], "s")}),
    "nullable": pd.DataFrame(
        {"a": pd.array([1, None], dtype="Int8"), "b": pd.array([True, None], "boolean")}
    ),
    "arrow": pd.DataFrame({"a": pd.array([1, None], dtype="int64[pyarrow]")}),
    "named": pd.DataFrame({"a": [1, 2]}, index=pd.Index(["p", "q"], name="i")),
    "levels": pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)])),
    "indices": pd.DataFrame({"a": [1]}, index=pd.MultiIndex.from_tuples([(1, "x")], names=["n", None])),
    "numbers": pd.DataFrame([[1, 2]], columns=[0, 1], index=[7]),
    "empty": pd.DataFrame(),
    "no rows": pd.DataFrame({"a": pd.array([], dtype="int64")}),
    "no columns": pd.DataFrame(index=range(3)),
    "bytes": pd.DataFrame({"a": [b"x", None]}),
    "nulls": pd.DataFrame({"a": [None, None]}),
}


@pytest.mark.parametrize("name", PANDAS)
def test_pandas_frames_come_back_equal(name: str) -> None:
    pd.testing.assert_frame_equal(there_and_back(PANDAS[name]), PANDAS[name])


POLARS = pl.DataFrame(
    {
        "i": [1, None],
        "s": ["a", None],
        "b": [b"a", b""],
        "l": [[1], [2, 3]],
        "r": [{"a": 1}, {"a": None}],
        "t": TIMES,
        "n": [None, None],
        "z": [datetime.time(1), None],
    }
).with_columns(
    pl.col("s").cast(pl.Categorical).alias("c"),
    pl.Series("e", ["x", "y"], dtype=pl.Enum(["y", "x"])),
    pl.Series("a", [[1, 2], [3, 4]], dtype=pl.Array(pl.Int8, 2)),
)


def test_polars_frames_come_back_equal() -> None:
    back = there_and_back(POLARS)
    assert back.schema == POLARS.schema
    assert back.equals(POLARS)


# What cannot be transferred is named.


def cyclic() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


class Strange:
    __class__ = property(lambda self: 1 / 0)  # nobody is to ask


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({1}, r"a value of type 'set'"),
        ({"a": [1, 2, 3, {4}]}, r"a value of type 'set' at \['a'\]\[3\]"),
        ({"a": {1: 2}}, r"a dict with a key of type 'int' at \['a'\]"),
        ([b""], r"a value of type 'bytes' at \[0\]"),
        ([np.int64(1)], r"a value of type 'numpy.int64' at \[0\]"),
        (Strange(), r"a value of type '.*test_variables.Strange'"),
        (print, r"a value of type 'builtin_function_or_method'"),
        (1j, r"a value of type 'complex'"),
        (2**20_000, r"an integer of more than 14000 bits"),
        (cyclic(), r"something that contains itself, or lies more than 200 deep, at \[0\].*"),
        (np.array([object()]), r"a numpy array of dtype 'object'"),
        (np.zeros(1, [("a", object)]), r"a numpy array of dtype 'object'"),
        (np.ma.array([1]), r"a value of type 'numpy.ma.MaskedArray'"),
        (pd.Series([1]), r"a value of type 'pandas.*Series'"),
        (pd.DataFrame({"a": [1, "x"]}), r"a pandas DataFrame that Arrow cannot hold: .*"),
        (
            pd.DataFrame({"a": pd.period_range("2020", periods=1)}),
            r"a frame with a column of the Arrow type .*",
        ),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), r"a pandas DataFrame that Arrow cannot hold: .*"),
        (pd.DataFrame({"a": [1]}, index=pd.Index([1], name=3)), r"a pandas DataFrame with an index .*"),
        (pl.DataFrame({"a": [object()]}), r"a polars DataFrame with a type of columns .*"),
        (pl.LazyFrame({"a": [1]}), r"a value of type 'polars.*LazyFrame'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_transferred_is_named(value: object, why: str) -> None:
    with pytest.raises(NotTransferable) as raised:
        values.encode(value)
    assert re.fullmatch(why, str(raised.value), re.DOTALL)


# What comes out is not believed.


def form(**changes: object) -> dict[str, object]:
    return {"kind": "array", "dtype": "<f8", "shape": [2], "order": "C", "scalar": False} | changes


HUGE = 2**50


@pytest.mark.parametrize(
    "forged",
    [
        {},
        {"kind": "pickle"},
        {"kind": ["json"]},
        form(shape=[HUGE]),
        form(shape=[-2]),
        form(shape=[-1, -2]),
        form(shape=[2, 2**62]),
        form(shape=[HUGE, 0]),
        form(shape=[0, HUGE, HUGE], dtype="<f8"),
        form(shape=[1] * 100 + [2]),
        form(shape="2"),
        form(shape=[2.0]),
        form(shape=[True, 2]),
        form(shape=None),
        form(dtype="O"),
        form(dtype="|O8"),
        form(dtype="f8,O"),
        form(dtype="<f16"),
        form(dtype="<f16/7", shape=[1]),
        form(dtype="|S99999999999"),
        form(dtype="<M8[fortnights]"),
        form(dtype=["<f8"]),
        form(dtype=None),
        form(dtype={"base": "<f8", "shape": [HUGE]}),
        form(dtype={"names": ["a"], "formats": ["<f8"], "offsets": [HUGE], "titles": [None], "itemsize": 8}),
        form(dtype={"names": [], "formats": [], "offsets": [], "titles": [], "itemsize": HUGE}),
        form(dtype={"names": ["a"], "formats": ["|O8"], "offsets": [0], "titles": [None], "itemsize": 8}),
        form(
            dtype={"names": ["a", "b"], "formats": ["<f8"], "offsets": [0], "titles": [None], "itemsize": 8}
        ),
        form(dtype={"names": [3], "formats": ["<f8"], "offsets": [0], "titles": [None], "itemsize": 8}),
        form(scalar=True),
        {"kind": "json"},
        {"kind": "pandas"},
        {"kind": "polars"},
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_forged_form_is_refused_and_makes_no_room(forged: dict[str, object]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(SandboxSerializationError):
            _decoded("x", forged, BytesIO(bytes(range(200, 216))))
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [b"", b"[", b"[1] 2", b"\xff", b"[" * 100_000, b"nul", b"9" * 5000, b'"\0"'])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(SandboxSerializationError, match="no JSON"):
        _decoded("x", {"kind": "json"}, BytesIO(text))


def stream(table: pa.Table, **options: object) -> bytearray:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytearray(sink.getvalue())


def described(**changes: object) -> bytes:
    """A frame whose description says something else."""
    table = pa.Table.from_pandas(pd.DataFrame({"a": [1]}))
    description = json.loads(table.schema.metadata[b"pandas"]) | changes
    return bytes(stream(table.replace_schema_metadata({b"pandas": json.dumps(description).encode()})))


class Exploding(pa.ExtensionType):  # type: ignore[misc]  # it has no types
    """A type whose making runs code, as a library in this process may have registered one."""

    made = 0

    def __init__(self) -> None:
        super().__init__(pa.int64(), "tests.exploding")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: object, serialized: object) -> Exploding:
        cls.made += 1
        return cls()


def test_a_type_of_its_own_is_refused_before_it_is_made() -> None:
    pa.register_extension_type(Exploding())
    try:
        array = pa.ExtensionArray.from_storage(Exploding(), pa.array([1]))
        data = bytes(stream(pa.table({"a": array})))
        Exploding.made = 0
        for kind in ("pandas", "polars"):
            with pytest.raises(NotTransferable, match="not Arrow's own"):
                arrow.frame(kind, memoryview(data))
        assert Exploding.made == 0
    finally:
        pa.unregister_extension_type("tests.exploding")


NULLS = pa.Table.from_arrays([pa.nulls(50_000_000)], ["a"])
REPEATED = pa.table(
    {"a": pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["x"]))}
)
DICTIONARY = pa.table({"a": pa.array(["x", "y"] * 1000).dictionary_encode()})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (stream(pa.table({"a": ["x" * 100] * 1000}), compression="zstd"), "compressed"),
        (stream(DICTIONARY, compression="lz4"), "compressed"),
        (stream(NULLS), "hardly anything"),
        (stream(pa.table({"a": pa.ListArray.from_arrays([0, 2**30], pa.nulls(2**30))})), "hardly anything"),
        (stream(REPEATED), "Arrow type"),
        (stream(pa.table({"a": pa.array(["x"], pa.string_view())})), "Arrow type"),
        (stream(pa.table({"a": [1]}))[:-40], "cannot be read|cut off"),
        (stream(pa.table({"a": [1]}))[:50], "cannot be read|cut off"),
        (described(columns=5), "description"),
        (described(column_indexes=[{"numpy_type": "S1000000000", "pandas_type": "unicode"}]), "dtype"),
        (described(column_indexes=[{"numpy_type": "object", "pandas_type": "S1000000000"}]), "labels"),
        (described(columns=[{"name": "a", "numpy_type": "geometry", "pandas_type": "x"}]), "dtype"),
        (described(index_columns=[{"kind": "range", "start": "0", "stop": 1, "step": 1}]), "index"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_forged_frame_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(NotTransferable, match=why):
        arrow.frame("pandas", memoryview(data))


def test_offsets_that_point_anywhere_are_found_before_they_are_followed() -> None:
    data = stream(pa.table({"a": ["ab", "cd"]}))
    offsets = struct.pack("<3i", 0, 2, 4)
    data[data.index(offsets) : data.index(offsets) + 12] = struct.pack("<3i", 0, 2, 2**30)
    with pytest.raises(NotTransferable, match="cannot be read"):
        arrow.frame("pandas", memoryview(data))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_frame_with_any_byte_changed_is_read_or_refused(data: st.DataObject) -> None:
    damaged = stream(pa.Table.from_pandas(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for kind in ("pandas", "polars"):
        with contextlib.suppress(NotTransferable):
            arrow.frame(kind, memoryview(damaged))


class Liar:
    """In the place of the guest: answers each call for a part as it likes."""

    def __init__(self, answer: Callable[[GuestCall], tuple[bytes, ...]]) -> None:
        self.asked: list[GuestCall] = []
        self._answer = answer

    def begin(self, call: GuestCall) -> None:
        self.asked.append(call)
        call.inbox.put(Answered(call, None, self._answer(call)))

    def cancel(self, call: GuestCall) -> None:
        return


@pytest.mark.parametrize("parts", [(), (b"",), (b"x",), (b"x" * 3 * MIB,), (b"x" * 2 * MIB, b"x")], ids=len)
def test_a_part_of_the_wrong_size_ends_the_transfer(parts: tuple[bytes, ...]) -> None:
    liar: Any = Liar(lambda call: parts)
    tracemalloc.start()
    try:
        with pytest.raises(SandboxConnectionError):
            drive(received(liar, 1, 2**32, GuestCall("variables.get", {}, (), Inbox())))
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()
    assert len(liar.asked) <= 4


@pytest.mark.parametrize("buffers", [(), (b"abc",), (b"ab", b"cd")], ids=len)
def test_bytes_that_are_not_as_many_as_was_said_are_refused(buffers: tuple[bytes, ...]) -> None:
    with pytest.raises(SandboxConnectionError):
        _with_answer(buffers, 4)


# In a sandbox


def test_a_variable_is_set_in_the_namespace_and_read_from_it(shared_sandbox: Sandbox) -> None:
    shared_sandbox.set_variable("x", {"a": [1, None, "\ud800"]})
    assert shared_sandbox.run_code("x['a'][0] += 1; print(ascii(x))").stdout == r"{'a': [2, None, '\ud800']}"
    assert shared_sandbox.get_variable("x") == {"a": [2, None, "\ud800"]}


@pytest.mark.not_in_a_container("its image has no such packages")
@pytest.mark.parametrize(
    "value", [b"", b"\0\xff", "", [], {}, None, 2**5000, np.zeros((0, 3)), np.arange(6.0).reshape(2, 3).T]
)
def test_values_go_through_a_kernel(shared_sandbox: Sandbox, value: object) -> None:
    assert same(through(shared_sandbox, value), value)


@pytest.mark.parametrize("size", [4 * MIB, 4 * MIB + 1, 9 * MIB])
def test_more_bytes_than_go_at_once_arrive_in_order(shared_sandbox: Sandbox, size: int) -> None:
    value = np.random.default_rng(1).bytes(size)
    assert through(shared_sandbox, value) == value


@pytest.mark.not_in_a_container("its image has no such packages")
def test_frames_go_through_a_kernel(shared_sandbox: Sandbox) -> None:
    pd.testing.assert_frame_equal(through(shared_sandbox, PANDAS["times"]), PANDAS["times"])
    assert shared_sandbox.run_code("type(x).__module__.split('.')[0]").text == "'pandas'"
    assert through(shared_sandbox, POLARS).equals(POLARS)
    assert shared_sandbox.run_code("type(x).__module__.split('.')[0]").text == "'polars'"


def test_what_is_missing_or_of_another_type_is_named(shared_sandbox: Sandbox) -> None:
    with pytest.raises(
        VariableNotFoundError, match="no variable 'nothing' in the context 'default'"
    ) as missing:
        shared_sandbox.get_variable("nothing")
    assert isinstance(missing.value, LookupError)
    shared_sandbox.run_code("class Own: pass\nx = [Own()]")
    with pytest.raises(
        SandboxSerializationError, match=r"the variable 'x' .*: a value of type '.*Own' at \[0\];"
    ):
        shared_sandbox.get_variable("x")
    with pytest.raises(SandboxSerializationError, match=r"variable 'y' .*: a value of type 'set';"):
        shared_sandbox.set_variable("y", {1})


@pytest.mark.parametrize("name", ["", "a b", "1a", "class", "None", "a.b", "x;y", "a\n"])
def test_a_name_that_is_no_identifier_is_refused(shared_sandbox: Sandbox, name: str) -> None:
    with pytest.raises(ValueError, match="a variable cannot be named"):
        shared_sandbox.get_variable(name)
    with pytest.raises(ValueError, match="a variable cannot be named"):
        shared_sandbox.set_variable(name, 1)


def test_a_name_that_is_no_str_is_refused(shared_sandbox: Sandbox) -> None:
    with pytest.raises(TypeError, match="the name of a variable must be a str, not int"):
        shared_sandbox.get_variable(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="variables must be a mapping, not list"):
        shared_sandbox.set_variables([])  # type: ignore[arg-type]


def test_a_name_means_what_it_means_in_code(shared_sandbox: Sandbox) -> None:
    shared_sandbox.run_code("\ufb01le = 5")
    assert shared_sandbox.get_variable("\ufb01le") == shared_sandbox.get_variable("file") == 5


def test_several_are_set_all_or_none(shared_sandbox: Sandbox) -> None:
    shared_sandbox.set_variables({"first": 1, "second": b"x" * 5 * MIB, "third": "c"})
    assert shared_sandbox.run_code("(first, len(second), third)").text == f"(1, {5 * MIB}, 'c')"
    with pytest.raises(SandboxSerializationError):
        shared_sandbox.set_variables({"first": 2, "second": object()})
    with pytest.raises(ValueError, match="a variable cannot be named"):
        shared_sandbox.set_variables({"first": 2, "a b": 3})
    assert shared_sandbox.get_variable("first") == 1


def test_variables_leave_nothing_else_behind(shared_sandbox: Sandbox) -> None:
    shared_sandbox.run_code("before = set(globals())")
    shared_sandbox.set_variable("x", b"x" * 5 * MIB)
    shared_sandbox.get_variable("x")
    code = "print({name for name in set(globals()) - before if not name.startswith('_i')} - {'before', 'x'})"
    assert shared_sandbox.run_code(code).stdout == "set()"


def test_variables_work_while_code_runs(sandbox: Sandbox) -> None:
    begun = threading.Event()
    results = []
    code = "print('begun', flush=True)\nimport time\nwhile 'go_on' not in globals(): time.sleep(0.01)\ngo_on"

    def run() -> None:
        results.append(sandbox.run_code(code, on_stdout=lambda _: begun.set()))

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(30)
    assert sandbox.get_variable("__name__") == "__main__"
    sandbox.set_variable("go_on", 7)
    thread.join()
    assert results[0].text == "7"


def test_each_context_has_its_own(sandbox: Sandbox) -> None:
    other = sandbox.create_context("other")
    sandbox.set_variable("x", 1)
    sandbox.set_variable("x", 2, context=other)
    assert (sandbox.get_variable("x"), sandbox.get_variable("x", context="other")) == (1, 2)


@pytest.mark.needs("languages.bash")
@pytest.mark.slow
def test_variables_of_another_language_are_refused(sandbox: Sandbox) -> None:
    context = sandbox.create_context("shell", language="bash")
    with pytest.raises(SandboxConfigurationError, match="variables are for Python, and the context 'shell'"):
        sandbox.get_variable("x", context=context)


@pytest.mark.needs("own_process")
def test_user_code_that_patches_and_breaks_modules_is_no_obstacle(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "import builtins, collections, io, json\n"
        "x = {'a': [1.5]}\n"
        "json.JSONEncoder.default = json.load = json.dump = io.BytesIO = collections.OrderedDict = None\n"
        "builtins.open = None\n"
        "bytes = len = type = list = dict = issubclass = None"
    )
    assert result.success
    assert sandbox.get_variable("x") == {"a": [1.5]}
    sandbox.set_variable("x", [b"".decode(), {"b": 2}])
    assert sandbox.get_variable("x") == ["", {"b": 2}]


@pytest.mark.needs("own_process")
def test_a_package_that_is_missing_in_the_sandbox_is_named(sandbox: Sandbox) -> None:
    sandbox.run_code("import sys; sys.modules['pyarrow'] = None")
    with pytest.raises(
        SandboxSerializationError, match=r"pyarrow is not installed in the sandbox; install_pack"
    ):
        sandbox.set_variable("x", PANDAS["plain"])


def test_a_package_that_is_missing_here_is_named(
    shared_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        SandboxSerializationError, match=r"pyarrow is not installed here; pip install 'code-sand"
    ):
        shared_sandbox.set_variable("x", PANDAS["plain"])


@pytest.mark.slow
def test_many_calls_do_not_use_anything_up(shared_sandbox: Sandbox) -> None:
    """ipykernel keeps a socket for each thread that sends something, and libzmq has a thousand."""
    for number in range(1500):
        shared_sandbox.set_variable("x", number)
    assert shared_sandbox.get_variable("x") == 1499


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_code_that_lies_about_its_variables_is_found_out(sandbox: Sandbox) -> None:
    sandbox.set_variable("x", 1)
    answers = {
        "5": SandboxConnectionError,
        "{'form': {'kind': 'bytes'}, 'size': 2**40}": SandboxSerializationError,
        "{'form': {'kind': 'bytes'}, 'size': -1}": SandboxSerializationError,
        "{'form': {'kind': 'bytes'}, 'size': 2**31}": SandboxError,
        "{'form': {'kind': 'bytes'}, 'size': 3}": SandboxConnectionError,
        "{'form': 3, 'size': 0}": SandboxConnectionError,
        "{'refused': 5}": SandboxConnectionError,
    }
    sandbox.run_code(
        "import gc\nguest = next(o for o in gc.get_objects()"
        " if type(o).__name__ == 'Guest' and hasattr(o, '_parts'))"
    )
    for answer, error in answers.items():
        sandbox.run_code(f"guest._functions['variables.get'] = lambda *a, **k: {answer}")
        with pytest.raises(error):
            sandbox.get_variable("x")
    assert sandbox.run_code("1 + 1").text == "2"


def most(sandbox: Sandbox) -> int:
    """The most bytes of memory that the process of *sandbox* has had."""
    code = "import resource; resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    return int(sandbox.run_code(code).text or 0) * 1024  # Linux counts in KiB


@pytest.mark.not_in_a_container("its image has no such packages")
@pytest.mark.slow
def test_a_large_array_takes_its_own_memory_and_little_more(sandbox: Sandbox) -> None:
    array = np.random.default_rng(1).random(25 * MIB)  # 200 MiB
    sandbox.set_variable("warm", array[: 8 * MIB])
    sandbox.get_variable("warm")
    most_before = most(sandbox)
    own = psutil.Process()
    before, peak, stop = own.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], own.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        sandbox.set_variable("x", array)
        after_set = peak[0] - before
        back = sandbox.get_variable("x")
    finally:
        stop.set()
        watcher.join()

    assert np.array_equal(back, array)
    if sandbox.capabilities.own_process:
        assert after_set < 64 * MIB
        assert peak[0] - before < array.nbytes + 96 * MIB
        assert (most(sandbox) - most_before) < array.nbytes + 96 * MIB


@pytest.mark.slow
@pytest.mark.needs("own_process")
@pytest.mark.parametrize("way", ["get", "set"])
def test_a_transfer_that_is_given_up_leaves_nothing_under_way(variant: str, way: str) -> None:
    look = (
        "import gc\n"
        "sum(len(o._under_way) for o in gc.get_objects()"
        " if type(o).__name__ == 'Variables' and hasattr(o, '_under_way'))"
    )

    async def main() -> None:
        settings: dict[str, Any] = UNISOLATED.get(variant, {})
        async with AsyncSandbox.create(variant, **settings) as sandbox:
            await sandbox.run_code(f"big = bytes({200 * MIB})")
            moving = (
                sandbox.get_variable("big") if way == "get" else sandbox.set_variable("y", bytes(200 * MIB))
            )
            task = asyncio.ensure_future(moving)
            while (await sandbox.run_code(look)).text == "0":
                assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while (await sandbox.run_code(look)).text != "0":
                await asyncio.sleep(0.01)
            assert await sandbox.get_variable("__name__") == "__main__"

    asyncio.run(asyncio.wait_for(main(), 60))


def test_items_of_no_size_are_not_any_number() -> None:
    form = {"kind": "array", "dtype": "|S0", "shape": [2**61], "order": "C", "scalar": False}

    with pytest.raises(values.NotTransferable):
        values.decode(form, BytesIO())


@pytest.mark.not_in_a_container("its image has no such packages")
def test_a_field_whose_name_is_no_text_is_refused(shared_sandbox: Sandbox) -> None:
    shared_sandbox.run_code("import numpy; odd = numpy.zeros(2, dtype=[('\\ud800', 'f8')])")

    with pytest.raises(SandboxSerializationError, match="name is no text"):
        shared_sandbox.get_variable("odd")
