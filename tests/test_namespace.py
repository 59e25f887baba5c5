"""Variables as bytes, and back, in this process: what the guest does for a snapshot, without any kernel."""

from __future__ import annotations

import copyreg
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from code_sandboxes.guest import definitions, namespace, salvage
from code_sandboxes.guest.namespace import Damaged, users_variables
from tests.memory import Memory

Main = dict[str, Any]


@pytest.fixture(autouse=True)
def main_module() -> Iterator[None]:
    """Whatever ``__main__`` is here, it comes back."""
    kept = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = kept


def new_main(source: str = "", **names: object) -> Main:
    """The namespace of a ``__main__`` in which *source* has run."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    main = vars(module)
    main["__builtins__"] = __builtins__
    main |= names
    exec(compile(source, "<cell>", "exec", dont_inherit=True), main)
    return main


def saved(main: Main, sink: Memory | None = None) -> tuple[bytes, dict[str, str], Memory]:
    """All variables of *main* as bytes, and what is left out."""
    sink = sink or Memory()
    left = namespace.save(users_variables(main, {}), main, sink, definitions)
    return bytes(sink.data), left, sink


def loaded(data: bytes) -> tuple[Main, dict[str, str]]:
    """What is in another namespace then; as ``snapshot_operations.py`` goes about it."""
    main, without = new_main(), set[str]()
    left, again, slow = namespace.load(main, Memory(data), definitions, None)
    while again:
        without |= {slow} if slow is not None else set()
        left, again, slow = namespace.load(main, Memory(data), definitions, salvage, without)
    return main, left


def carried(source: str, **names: object) -> Main:
    """What *source* has defined, in another namespace; all of it."""
    data, left, _ = saved(new_main(source, **names))
    assert left == {}
    main, left = loaded(data)
    assert left == {}
    return main


# What is carried is as it was.

# What it is, what defines it, and after "?" what is true of that, before and afterwards.
DEFINITIONS = """
== a function with its defaults, annotations and global names
def f(x, y=1, *, z: int = 2):
    'doc'
    return x + y + z + w
w = 10
? f(1) == 14 and f.__doc__ == 'doc' and f.__annotations__ == {'z': int} and f.__globals__ is globals()

== a function that sees its global names change
def f(): return w
w = 1
? [f(), exec('w = 5'), f()] == [1, None, 5]

== a lambda
f = lambda v: v * v
? f(3) == 9 and f.__name__ == '<lambda>'

== recursion
def f(n): return 1 if n < 2 else n * f(n - 1)
? f(5) == 120

== functions that call each other
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
? even(10) and not odd(10)

== what two closures share
def make():
    n = 0
    def up():
        nonlocal n
        n += 1
    def get(): return n
    return up, get
up, get = make()
? [up(), get()] == [None, 1]

== a closure that contains itself
def make():
    def f(n): return 0 if n == 0 else f(n - 1)
    return f
f = make()
? f(3) == 0 and f.__closure__[0].cell_contents is f

== a closure with nothing in it yet
def make():
    def f(): return later
    return f
    later = 1
f = make()
? len(f.__closure__) == 1

== attributes of a function
def f(): pass
f.extra = [f]
? f.extra[0] is f

== a decorated function
import functools
def g(): return 5
@functools.wraps(g)
def f(): return g() + 1
? f() == 6 and f.__wrapped__ is g and f.__name__ == 'g'

== generator and coroutine functions
def f():
    yield 1
    yield 2
async def g(): return 3
? list(f()) == [1, 2] and g.__code__.co_flags & 128

== a function that remembers its results
import functools
@functools.lru_cache(maxsize=3)
def f(n): return n + 1
? f(1) == 2 and f.cache_info().maxsize == 3

== a partial
import functools
def g(a, b): return a - b
f = functools.partial(g, 5)
? f(2) == 3

== functions with global names of their own
own = {'hidden': 99}
exec('def f(): return hidden', own)
exec('def g(value): global hidden; hidden = value', own)
f, g = own['f'], own['g']
? [f() in (1, 99), g(1), f()] == [True, None, 1]

== a class
class C:
    'doc'
    n = [1]
    def m(self): return self.n
c = C()
? c.m() is C.n and type(c) is C and C.__doc__ == 'doc' and C.__module__ == '__main__'

== a subclass that uses super()
class A:
    def m(self): return 'a'
class B(A):
    def m(self): return 'b' + super().m()
b = B()
? b.m() == 'ba' and B.__bases__ == (A,)

== a class that refers to itself
class C: pass
C.own = [C(), C]
? C.own[1] is C and type(C.own[0]) is C

== a class in a function
def make():
    class C: pass
    return C
c = make()()
? type(c).__qualname__ == 'make.<locals>.C'

== all sorts of methods
import functools
class C:
    def __init__(self): self.v = 2
    @property
    def p(self): return self.v
    @p.setter
    def p(self, v): self.v = v
    @staticmethod
    def s(): return 's'
    @classmethod
    def k(cls): return cls.__name__
    @functools.cached_property
    def c(self): return [self.v]
c = C()
? c.p == 2 and c.s() == 's' and c.k() == 'C' and c.c is c.c
? [setattr(c, 'p', 3), c.v] == [None, 3]

== slots
class C:
    __slots__ = ('a', '__b')
    def __init__(self): self.a, self.__b = 1, 2
    def b(self): return self.__b
c = C()
? (c.a, c.b()) == (1, 2) and not hasattr(c, '__dict__')

== what a class is registered in by its base
class A:
    known = {}
    def __init_subclass__(cls): A.known[cls.__name__] = cls
class B(A): pass
? A.known == {'B': B}

== a metaclass, which is not asked again
class M(type):
    made = []
    def __new__(meta, name, bases, names):
        meta.made.append(name)
        return super().__new__(meta, name, bases, names)
    def shout(cls): return cls.__name__.upper()
class c(metaclass=M): pass
? c.shout() == 'C' and M.made == ['c'] and type(c) is M

== an abstract class
import abc
class A(abc.ABC):
    @abc.abstractmethod
    def f(self): ...
class B(A):
    def f(self): return 7
class V: pass
A.register(V)
? B().f() == 7 and isinstance(V(), A) and A.__abstractmethods__ == {'f'}

== a dataclass
import dataclasses
@dataclasses.dataclass(order=True)
class P:
    x: int
    y: list = dataclasses.field(default_factory=list)
p = P(1)
? p == P(1) and P(1).y == [] and P(1) < P(2) and dataclasses.replace(p, x=5).x == 5
? dataclasses.fields(P)[0].default is dataclasses.MISSING

== a frozen dataclass with slots
import dataclasses
@dataclasses.dataclass(frozen=True, slots=True)
class P:
    x: int = 3
p = P()
? p.x == 3 and hash(p) == hash(P()) and not hasattr(p, '__dict__')

== a dataclass that others are made of
import dataclasses
@dataclasses.dataclass
class P:
    x: int
    y: int = 2
def derive():
    @dataclasses.dataclass
    class Q(P):
        z: int = 4
    return Q(1)
? (derive().x, derive().y, derive().z) == (1, 2, 4)

== an enumeration
import enum
class C(enum.Enum):
    RED = 1
    BLUE = 'b'
    SAME = 1
    def hi(self): return self.name.lower()
red = C.RED
? red is C.RED is C.SAME and C('b').hi() == 'blue' and list(C) == [C.RED, C.BLUE]

== an enumeration whose members have attributes
import enum
class P(enum.Enum):
    EARTH = (5.9, 6.3)
    def __init__(self, m, r): self.m, self.r = m, r
? P.EARTH.m == 5.9 and P((5.9, 6.3)) is P.EARTH

== flags, and numbers that are an enumeration
import enum
class F(enum.Flag):
    R = enum.auto()
    W = enum.auto()
class N(enum.IntEnum):
    ONE = 1
rw = F.R | F.W
? rw == F.R | F.W and F.R in rw and N.ONE + 1 == 2

== named tuples
import collections, typing
P = collections.namedtuple('P', 'x y')
class T(typing.NamedTuple):
    x: int
    y: str = 'z'
p, t = P(1, 2), T(1)
? p._replace(x=5) == P(5, 2) and type(p) is P and t._asdict() == {'x': 1, 'y': 'z'} and type(t) is T

== types of typing
import typing
T = typing.TypeVar('T', bound=int)
S = typing.TypeVar('S', int, str)
U = typing.NewType('U', int)
class B(typing.Generic[T]):
    def __init__(self, v): self.v = v
class D(typing.TypedDict):
    k: int
class P(typing.Protocol):
    def f(self) -> int: ...
b, alias = B[int](4), B[T]
? b.v == 4 and B.__parameters__ == (T,) and T.__bound__ is int and alias.__args__ == (T,)
? S.__constraints__ == (int, str) and U(3) == 3 and U.__supertype__ is int and D(k=1) == {'k': 1}

== an exception
class E(ValueError): pass
e = E(3)
e.more = 4
? e.args == (3,) and e.more == 4 and isinstance(e, ValueError)

== a bound method
class C:
    def m(self): return self
c = C()
m = c.m
? m() is c

== modules
import json as j, os.path as p, collections.abc
? j.loads('1') == 1 and p.join('a', 'b') == 'a/b' and collections.abc.Mapping

== code
code = compile('1 + 1', 'x', 'eval')
? eval(code) == 2

== what there is only one of
one = [None, ..., NotImplemented, True, type(None), type(...), type(lambda: 0), int, len]
? all(a is b for a, b in zip(one, [None, ..., NotImplemented, True, type(None), type(...)]))
? one[6] is type(lambda: 0) and one[7] is int and one[8] is len

== an object that stands for nothing
nothing = object()
def f(x=nothing): return x
? f() is nothing

== a read-only view, and an iterator where it stands
import types
v = types.MappingProxyType({'a': 1})
i = iter([1, 2, 3])
next(i)
? v['a'] == 1 and type(v) is types.MappingProxyType and (list(i) in ([2, 3], []))

== names with underscores
_private, __version__, _1st, _id = 1, '2', 3, 4
? (_private, __version__, _1st, _id) == (1, '2', 3, 4)
"""

CASES = [case.partition("\n")[::2] for case in DEFINITIONS.split("\n== ")[1:]]


@pytest.mark.parametrize(("what", "definition"), CASES, ids=[what for what, _ in CASES])
def test_what_is_carried_is_as_it_was(what: str, definition: str) -> None:
    source = "\n".join(line for line in definition.splitlines() if not line.startswith("? "))
    checks = [line[2:] for line in definition.splitlines() if line.startswith("? ")]
    main = new_main(source)
    assert all(eval(check, main) for check in checks), "the test is wrong"

    restored = carried(source)
    for check in checks:
        assert eval(check, restored), check


def test_what_variables_share_they_share_again() -> None:
    main = carried("a = [1]\nb = a\nc = {'a': a}\nclass C: pass\nd = (C(), C)\ne = lambda x=a: x")

    assert main["a"] is main["b"] is main["c"]["a"] is main["e"]()
    assert type(main["d"][0]) is main["d"][1] is main["C"]


def test_arrays_come_with_their_bytes_and_are_shared() -> None:
    main = carried(
        "import numpy as np\na = np.arange(200_000.0).reshape(2, -1).T\nb = {'a': a}\nr = np.zeros(3)\n"
        "r.flags.writeable = False\no = np.array([[], {}], dtype=object)\ne = np.zeros((0, 4))\ns = a[::7]"
    )

    assert main["b"]["a"] is main["a"]
    assert main["a"].shape == (100_000, 2)
    assert main["a"].sum() == sum(range(200_000))
    assert main["a"].flags.writeable
    assert not main["r"].flags.writeable
    assert main["o"].tolist() == [[], {}]
    assert main["e"].shape == (0, 4)
    assert (main["s"] == main["a"][::7]).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 7), max_size=6), min_size=8, max_size=8))
def test_any_graph_of_objects_has_its_shape_again(edges: list[list[int]]) -> None:
    kinds: list[Callable[[], Any]] = [list, dict]
    nodes: list[Any] = [kinds[number % 2]() for number in range(8)]
    for node, targets in zip(nodes, edges, strict=True):
        for place, target in enumerate(targets):
            node.append(nodes[target]) if isinstance(node, list) else node.update({place: nodes[target]})

    main = carried("", **{f"n{number}": node for number, node in enumerate(nodes)})

    for number, targets in enumerate(edges):
        node = main[f"n{number}"]
        inside = node if isinstance(node, list) else list(node.values())
        assert [id(each) for each in inside] == [id(main[f"n{target}"]) for target in targets]


everything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner) | st.frozensets(st.text())
    ),
)


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), everything))
def test_values_come_back_equal(values: dict[str, Any]) -> None:
    main = carried("", **values)

    assert {name: main[name] for name in values} == values


def test_what_is_ipythons_is_left_where_it_is() -> None:
    hidden = {"exit": object(), "open": object()}
    own = dict.fromkeys(
        ("In", "Out", "_", "__", "___", "_i", "_ii", "_12", "_i7", "_dh", "_oh", "_exit_code")
    )
    module = dict.fromkeys(("__name__", "__builtins__", "__doc__", "__annotations__"))
    users = {"x": 1, "_x": 2, "open": 3, "__all__": [], 5: 6}

    found = users_variables({**own, **module, **hidden, **users}, hidden)

    assert found == {"x": 1, "_x": 2, "open": 3, "__all__": []}


def test_nothing_is_left_behind_where_it_was_carried_from() -> None:
    main = new_main("class C: pass\nc = C()\ndef f(): pass")
    before, modules = dict(main), set(sys.modules)

    saved(main)

    assert main == before
    assert set(sys.modules) == modules


# What cannot be carried is named, with its reason.

HOSTILE = """
import itertools, os, socket, sys, threading, time, types
class Hostile:
    def __init__(self, do): self.do = do
    def __reduce__(self): return self.do(self)
def raising(error):
    def do(self): raise error
    return Hostile(do)
class Mute(Exception):
    def __str__(self): raise SystemExit
def nonsense(self): return 5
def endless(self): return list, (), None, iter(lambda: 0, 1)
def deeper(self): return list, ([Hostile(deeper)],)
def stuck(self):
    while True:
        try:
            while True: time.sleep(0.001)
        except BaseException:
            if len(gave_up) > 2: raise
            gave_up.append(1)
def blocked(self): threading.Event().wait(5)
gave_up = []
fine = {'a': [1]}
"""


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("(i for i in 'ab')", "cannot pickle 'generator' object"),
        ("open(os.devnull)", r"cannot pickle .*TextIOWrapper.*"),
        ("threading.Lock()", "cannot pickle '_thread.lock' object"),
        ("socket.socket()", "cannot pickle 'socket' object"),
        ("sys._getframe()", "cannot pickle 'frame' object"),
        ("types.ModuleType('made')", "a module that nobody can import: made"),
        ("[{'deep': (threading.Lock(),)}]", "cannot pickle '_thread.lock' object"),
        ("(lambda: (lambda: gone).__closure__[0] if (gone := 1) else 0)()", "cannot pickle 'cell' object"),
        ("raising(ValueError('no'))", "ValueError: no"),
        ("raising(KeyboardInterrupt())", "KeyboardInterrupt"),
        ("raising(SystemExit(3))", "SystemExit: 3"),
        ("raising(Mute())", "an error that cannot be told"),
        ("raising(ValueError(chr(0xdcff) * 1000))", r"ValueError: (\\udcff)+"),
        ("Hostile(nonsense)", "__reduce__ must return a string or tuple"),
        ("Hostile(endless)", "it takes more than 100000 bytes; use files for that"),
        ("Hostile(deeper)", "RecursionError: .*"),
        ("Hostile(stuck)", "it takes longer than 0 s"),
        ("Hostile(blocked)", "it takes longer than 0 s"),
    ],
)
def test_what_cannot_be_carried_is_named_with_its_reason(
    code: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespace, "LARGEST", 100_000)
    if "longer" in why:
        monkeypatch.setattr(namespace, "PATIENCE", 0.3)
    main = new_main(f"{HOSTILE}\nbad = {code}\nholds, last = [fine, bad], [fine]")

    data, left, sink = saved(main)
    restored, lost = loaded(data)

    assert set(left) == {"bad", "holds"}
    for each in left.values():
        assert re.fullmatch(why, each), each
    assert lost == {}
    assert restored["last"][0] is restored["fine"]
    assert sink.restarts >= 1
    if hasattr(main["bad"], "close"):
        main["bad"].close()


def test_all_that_fail_are_found_at_once() -> None:
    source = "".join(f"x{number} = (i for i in 'ab') if {number} % 2 else {number}\n" for number in range(20))

    _, left, sink = saved(new_main(source))

    assert len(left) == 10
    assert sink.restarts == 1


def test_what_fails_only_the_second_time_is_named() -> None:
    source = (
        "class Fickle:\n def __reduce__(self):\n  seen.append(1)\n"
        "  if len(seen) > 1: raise ValueError('again')\n  return int, ()\n"
        "seen = []\na, b, c = Fickle(), (i for i in 'ab'), 5"
    )

    data, left, sink = saved(new_main(source))

    assert left == {"a": "ValueError: again", "b": "cannot pickle 'generator' object"}
    assert sink.restarts == 2
    assert loaded(data)[0]["c"] == 5


def test_there_is_a_time_after_which_nothing_is_begun() -> None:
    sink = Memory()

    def wait() -> None:
        sink.ahead += namespace.ALTOGETHER

    source = (
        "class Slow:\n def __reduce__(self):\n  wait.pop()() if wait else None\n  return int, ()\n"
        "a, b, c = 1, Slow(), 3"
    )
    data, left, _ = saved(new_main(source, wait=[wait]), sink)

    assert left == {"c": "there was no time left for it"}
    assert loaded(data)[0]["a"] == 1


def test_a_sink_that_is_gone_ends_it() -> None:
    class Gone(Memory):
        def write(self, data: Any) -> None:
            self.is_closed = True
            raise ValueError("gone")

    main = new_main("a, b = 1, 2")
    with pytest.raises(BaseException, match=r"^$"):
        namespace.save(users_variables(main, {}), main, Gone(), definitions)


# What cannot be built again is named, too, and the rest is there.


def test_what_another_python_has_compiled_is_named_and_data_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import numpy as np\ndata = np.arange(3.0)\ndef f(d=data): return d\nclass C: pass\nclass M:\n"
        " def m(self): pass\nm, c = M(), C()\nm.frame, m.c = {'late': np.ones(2)}, c\nlate = m.frame\n"
        "held = {'f': f}\nlist_of = [m]\nloop = []\nloop.append(loop)\nempty = C"
    )
    monkeypatch.setattr(definitions, "MAGIC_NUMBER", b"another")
    monkeypatch.setattr(definitions, "PYTHON", "2.7")
    data, _, _ = saved(new_main(source))
    monkeypatch.undo()

    main, left = loaded(data)

    why = f"it has code of Python 2.7, which Python {definitions.PYTHON} does not read"
    assert left == dict.fromkeys(("f", "M", "m", "held", "list_of"), why)
    assert not set(left) & set(main)
    assert main["data"].tolist() == [0, 1, 2]
    assert main["late"]["late"].tolist() == [1, 1]
    assert main["loop"][0] is main["loop"]
    assert type(main["c"]) is main["C"] is main["empty"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("class Bad:\n def __setstate__(self, state): raise ValueError('no')", "ValueError: no"),
        ("class Bad:\n def __setstate__(self, state): raise SystemExit", "SystemExit"),
        (
            "class Bad:\n def __setstate__(self, state):\n  while True: pass",
            "it takes longer than 0 s",
        ),
        (
            "class Bad(dict):\n def __setitem__(self, key, value): raise ValueError('no')",
            "ValueError: no",
        ),
        (
            "class Bad(list):\n def append(self, value): raise ValueError('no')\n extend = append",
            "ValueError: no",
        ),
        (
            "class Bad:\n def __reduce__(self): return Bad.make, ()\n @staticmethod\n"
            " def make(): raise OSError('no')",
            "OSError: no",
        ),
        (
            "class Bad:\n def __new__(cls): 1 / 0",
            "ZeroDivisionError: division by zero",
        ),
    ],
)
def test_what_cannot_be_built_again_is_named(code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "PATIENCE", 0.3)
    source = (
        f"{code}\nshared = [1]\nmaking = dict.__new__ if issubclass(Bad, dict) else list.__new__ if"
        " issubclass(Bad, list) else object.__new__\nbad = making(Bad)\ndel making\n"
        "if isinstance(bad, dict): dict.__setitem__(bad, 1, 2)\n"
        "if isinstance(bad, list): list.append(bad, 1)\n"
        "bad.shared, bad.later = shared, [2]\nlater = bad.later\n"
        "holds, last = {'bad': [bad]}, [shared, later]"
    )

    data, left, _ = saved(new_main(source))
    assert left == {}
    main, left = loaded(data)

    assert set(left) == {"bad", "holds"}
    assert left["bad"] == why
    assert main["last"][0] is main["shared"]
    assert main["last"][1] is main["later"]
    assert main["later"] == [2]
    assert "bad" not in main


def test_a_module_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ModuleType("gone")
    exec("class C: pass", vars(gone))
    gone.C.__module__ = "gone"
    monkeypatch.setitem(sys.modules, "gone", gone)
    data, _, _ = saved(new_main("import gone\nc, x = gone.C(), 1"))
    monkeypatch.undo()

    main, left = loaded(data)

    assert left == dict.fromkeys(("gone", "c"), "ModuleNotFoundError: No module named 'gone'")
    assert main["x"] == 1


def test_what_is_registered_nowhere_is_named() -> None:
    copyreg.add_extension("collections", "deque", 1001)
    try:
        data, _, _ = saved(new_main("import collections\nd, x = collections.deque([1]), 2"))
    finally:
        copyreg.remove_extension("collections", "deque", 1001)
        copyreg.clear_extension_cache()

    main, left = loaded(data)

    assert left == {"d": "ValueError: unregistered extension code 1001"}
    assert main["x"] == 2


def test_what_was_cut_off_is_damaged() -> None:
    data, _, _ = saved(new_main("a, b = [1], 'text' * 100\nimport numpy\nc = numpy.zeros(10)"))

    for size in range(len(data)):
        with pytest.raises(Damaged):
            namespace.load(new_main(), Memory(data[:size]), definitions, None)


@pytest.mark.parametrize("garbage", [b"", b"Z", b"X" * 100, b"V" + b"\xff" * 8, b"V" + b"\0" * 8 + b"X" * 20])
def test_what_was_not_written_here_is_damaged(garbage: bytes) -> None:
    for careful in (None, salvage):
        with pytest.raises(Damaged):
            namespace.load(new_main(), Memory(garbage), definitions, careful)
