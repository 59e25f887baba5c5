"""Cells: what is run and what is shown of them, and how what they raise is told."""

from __future__ import annotations

import linecache
import sys
from inspect import CO_COROUTINE

import pytest

from code_sandboxes.inprocess.cells import (
    compile_cell,
    failure_content,
    forget_source,
    remember_source,
    traceback_of,
)


def run(source: str) -> tuple[object, dict[str, object]]:
    """The value that a cell shows, and its variables."""
    statements, shown = compile_cell(source, "<cell>")
    variables: dict[str, object] = {}
    if statements is not None:
        exec(statements, variables)
    return None if shown is None else eval(shown, variables), variables


# What is run.


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("1 + 1", 2),
        ("x = 1\nx + 1", 2),
        ("1; 2", 2),
        ("1; 2;", None),
        ("2  ;  # no more", None),
        ("2  # ;", 2),
        ("'a;'", "a;"),
        ("('a',\n 'b')", ("a", "b")),
        ("('a',\n 'b');", None),
        ("x = 1", None),
        ("for x in [1]: x", None),
        ("(y := 5)", 5),
        ("", None),
        ("# nothing", None),
        ("\n\n3\n\n", 3),
    ],
)
def test_the_value_of_the_expression_at_the_end_is_shown_unless_a_semicolon_follows(
    source: str, value: object
) -> None:
    assert run(source)[0] == value


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_end_as_they_like(newline: str) -> None:
    assert run(newline.join(["x = '\u00e9'", "if x:", "    y = 1", "'\u00e9;' ;"]))[0] is None
    assert run(newline.join(["x = '\u00e9'", "'\u00e9' # ;"]))[0] == "\u00e9"


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("    x = 5\n    x", 5),
        ("    if True:\n        x = 5\n    x", 5),
        ("    s = '''\n  a\n    b'''\n    s", "\n  a\n    b"),
        ("\t'tab'", "tab"),
        ("\n\n  3", 3),
    ],
)
def test_a_cell_that_is_indented_as_a_whole_means_what_it_does_without(source: str, value: object) -> None:
    assert run(source)[0] == value


@pytest.mark.parametrize(
    "source", ["  x = 1\n y = 2", "x = 1\n  y = 2", "  x = 1\nelse:\n  y = 2", "    x = ("]
)
def test_any_other_indentation_is_an_error(source: str) -> None:
    with pytest.raises(SyntaxError):
        compile_cell(source, "<cell>")


def test_an_error_in_an_indented_cell_is_on_the_line_where_it_is() -> None:
    statements, _ = compile_cell("    x = 1\n    y = x / 0", "<cell>")
    assert statements is not None
    with pytest.raises(ZeroDivisionError) as raised:
        exec(statements, {})
    assert raised.traceback[-1].lineno == 1  # from 0 on


def test_strings_are_left_alone() -> None:
    assert run("s = '''\n    if True:\n  await x'''\ns")[0] == "\n    if True:\n  await x"


@pytest.mark.parametrize(
    ("source", "awaits"),
    [
        ("s = 'await x'\ns", (False, False)),
        ("async def f(): await g()\nf", (False, False)),
        ("await_ = 1\nawait_", (False, False)),
        ("x = await f()\nx", (True, False)),
        ("x = 1\nawait f()", (False, True)),
        ("async with a: pass\n1", (True, False)),
        ("[await f() for _ in x]", (None, True)),
    ],
)
def test_only_what_awaits_is_a_coroutine(source: str, awaits: tuple[bool | None, bool | None]) -> None:
    parts = compile_cell(source, "<cell>")
    assert tuple(None if part is None else bool(part.co_flags & CO_COROUTINE) for part in parts) == awaits


def test_code_does_not_inherit_the_future_of_this_package() -> None:
    _, variables = run("def f(x: int): pass")
    assert getattr(variables["f"], "__annotations__", None) == {"x": int}


@pytest.mark.parametrize(
    "source", ["x = = 3", "return 5", "yield 5", "nonlocal x", "lambda: (await x)", "x = '"]
)
def test_what_is_no_python_is_refused(source: str) -> None:
    with pytest.raises(SyntaxError):
        compile_cell(source, "<cell>")


@pytest.mark.parametrize("source", ["x = '\0'", "x = '\ud800'", "(" * 300 + ")" * 300])
def test_what_is_hardly_text_is_refused_too(source: str) -> None:
    with pytest.raises((SyntaxError, ValueError)):
        compile_cell(source, "<cell>")


def test_source_is_remembered_line_by_line_until_it_is_forgotten() -> None:
    remember_source("<one cell>", "a = '\u2028'\r\nb\fc\nlast")
    lines = linecache.getlines("<one cell>")
    forget_source("<one cell>")

    assert lines == ["a = '\u2028'\n", "b\fc\n", "last\n"]
    assert linecache.getlines("<one cell>") == []


# What it raises.


def failure_of(source: str) -> dict[str, object]:
    """What is told of the exception that *source* raises."""
    remember_source("<cell>", source)
    try:
        statements, _ = compile_cell(source + "\npass", "<cell>")
        assert statements is not None
        exec(statements, {"__name__": "__main__"})
    except BaseException as error:
        return failure_content(error)
    finally:
        forget_source("<cell>")
    raise AssertionError("it raised nothing")


def text_of(failure: dict[str, object]) -> str:
    lines = failure["traceback"]
    assert isinstance(lines, list)
    return "\n".join(lines)


def test_an_exception_is_told_by_name_value_and_traceback() -> None:
    failure = failure_of("def f(x):\n    return 1 / x\nf(0)")

    assert (failure["ename"], failure["evalue"]) == ("ZeroDivisionError", "division by zero")
    assert "line 3, in <module>\n    f(0)" in text_of(failure)
    assert "line 2, in f\n    return 1 / x" in text_of(failure)


def test_frames_of_this_package_are_left_out_and_those_below_them_are_kept() -> None:
    failure = failure_of(
        "from code_sandboxes.inprocess.gate import Gate, uninterrupted\n"
        "def mine():\n    with uninterrupted(): 1 / 0\n"
        "def call(): Gate().call(mine)\ncall()"
    )

    assert "code_sandboxes" not in text_of(failure).split("Gate().call(mine)")[-1]
    assert "contextlib" not in text_of(failure)
    assert "in mine" in text_of(failure)


def test_causes_contexts_and_groups_are_told_with_it() -> None:
    failure = failure_of("try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError('because') from e")
    assert "ZeroDivisionError" in text_of(failure)
    assert "direct cause" in text_of(failure)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no exception groups yet")
def test_groups_are_told_with_what_is_in_them() -> None:
    failure = failure_of("raise ExceptionGroup('both', [ValueError('one'), TypeError('two')])")
    assert "ValueError: one" in text_of(failure)
    assert "TypeError: two" in text_of(failure)


EVIL = {
    "fails": "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
    "raises itself": "class E(Exception):\n    def __str__(self): raise self\nraise E",
    "exits": "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E",
    "interrupts": "class E(Exception):\n    def __str__(self): raise KeyboardInterrupt\nraise E",
    "is no text": "class E(Exception):\n    def __str__(self): return 5\nraise E",
    "hides its name too": (
        "class M(type):\n    __name__ = property(lambda self: 1 / 0)\n"
        "class E(BaseException, metaclass=M):\n    def __str__(self): raise self\nraise E"
    ),
}


@pytest.mark.parametrize("message", EVIL)
def test_an_exception_that_will_not_be_told_is_told_by_name(message: str) -> None:
    failure = failure_of(EVIL[message])

    assert failure["ename"] == "E"
    assert str(failure["evalue"]).startswith("<its __str__() raised ")
    assert type(failure["evalue"]) is str
    assert text_of(failure)


def test_a_message_is_text_and_none_of_a_subclass() -> None:
    failure = failure_of(
        "class S(str):\n    def __str__(self): return S('inner')\n    def __len__(self): return -5\n"
        "class E(Exception):\n    def __str__(self): return S('value')\nraise E"
    )
    assert type(failure["evalue"]) is str
    assert failure["evalue"] == "value"


@pytest.mark.parametrize(
    "source",
    [
        "a, b = ValueError('a'), ValueError('b')\na.__context__, b.__context__ = b, a\nraise a",
        "a = ValueError('a')\na.__cause__ = a\nraise a",
        "e = None\nfor i in range(3000):\n    n = ValueError(i)\n    n.__context__ = e\n    e = n\nraise e",
        "def f(): f()\nf()",
    ],
)
def test_chains_that_never_end_are_told(source: str) -> None:
    assert text_of(failure_of(source))


def test_a_traceback_is_made_of_lines() -> None:
    assert traceback_of(ValueError("one\ntwo")) == ["ValueError: one", "two"]
