"""Turn a cell into what can be run, and what it raised into what can be told."""

from __future__ import annotations

import ast
import io
import linecache
import os
import traceback
from types import CodeType
from typing import Any

from code_sandboxes.inprocess.gate import Abandoned, Interrupted

__all__ = ["compile_cell", "failure_content", "forget_source", "name_of", "remember_source", "traceback_of"]

_NAME: Any = vars(type)["__name__"]  # that no metaclass has a say in

_FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
# CPython up to 3.11.7 loses count if another thread comes in between ("AST constructor recursion depth
# mismatch", gh-106905).
_ATTEMPTS = 10

_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep


def compile_cell(source: str, filename: str) -> tuple[CodeType | None, CodeType | None]:
    """The statements of *source*, and the expression at its end if its value is to be shown.

    Either may be a coroutine (``CO_COROUTINE``).

    Raises:
        SyntaxError, ValueError: it is no Python.
    """
    tree = _parse(source, filename)
    shown = None
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not _ends_with_semicolon(tree.body[-1], source):
        expression = ast.Expression(tree.body[-1].value)
        del tree.body[-1]
        shown = compile(expression, filename, "eval", _FLAGS, dont_inherit=True)
    statements = compile(tree, filename, "exec", _FLAGS, dont_inherit=True) if tree.body else None
    return statements, shown


def _parse(source: str, filename: str) -> ast.Module:
    try:
        return _parse_exactly(source, filename)
    except IndentationError:
        # A cell may be indented as a whole, as in a notebook. A block around it makes that valid, and
        # leaves what stands in its strings alone.
        try:
            around = _parse_exactly("if True:\n" + source, filename).body
        except SyntaxError:
            around = []
        if len(around) != 1 or not isinstance(around[0], ast.If) or around[0].orelse:
            raise
        module = ast.Module(around[0].body, [])
        ast.increment_lineno(module, -1)
        return module


def _parse_exactly(source: str, filename: str) -> ast.Module:
    for attempt in range(_ATTEMPTS):
        try:
            tree = compile(source, filename, "exec", _FLAGS | ast.PyCF_ONLY_AST, dont_inherit=True)
            break
        except SystemError:
            if attempt == _ATTEMPTS - 1:
                raise
    assert isinstance(tree, ast.Module)
    return tree


def _ends_with_semicolon(statement: ast.Expr, source: str) -> bool:
    """As in IPython: its value is not to be shown then."""
    if ";" not in source:
        return False
    end_line, end_column = statement.end_lineno, statement.end_col_offset
    assert end_line is not None
    assert end_column is not None
    return _lines_of(source)[end_line - 1].encode()[end_column:].lstrip().startswith(b";")


def _lines_of(source: str) -> list[str]:
    """As the parser counts them; for str.splitlines() there are more ends of lines."""
    return io.StringIO(source, newline=None).readlines()


def remember_source(filename: str, source: str) -> None:
    """Let tracebacks and :mod:`inspect` find *source*."""
    lines = [line.rstrip("\n") + "\n" for line in _lines_of(source)]
    linecache.cache[filename] = (len(source), None, lines, filename)


def forget_source(filename: str) -> None:
    """Take back :func:`remember_source`."""
    linecache.cache.pop(filename, None)


def failure_content(error: BaseException) -> dict[str, object]:
    """The content of an ``error`` message; may run code of the exception's own."""
    try:
        value = str.__str__(str(error))
    except (Interrupted, Abandoned):
        raise
    except BaseException as broken:  # even SystemExit: that is not what became of the code
        value = f"<its __str__() raised {name_of(broken)}>"
    return {"ename": name_of(error), "evalue": value, "traceback": traceback_of(error)}


def name_of(error: BaseException) -> str:
    """The name of its class, whatever the class says."""
    return str(_NAME.__get__(type(error)))


def traceback_of(error: BaseException) -> list[str]:
    """Its traceback, line by line, without frames of this package; may run code of the exception's own."""
    try:
        told = traceback.TracebackException.from_exception(error)
        _leave_out_ours(told)
        return "".join(told.format()).rstrip("\n").split("\n")
    except (Interrupted, Abandoned):
        raise
    except BaseException as broken:
        return [f"(its traceback cannot be shown: {name_of(broken)})"]


def _leave_out_ours(told: traceback.TracebackException) -> None:
    waiting: list[traceback.TracebackException | None] = [told]
    while waiting:
        each = waiting.pop()
        if each is not None:
            frames = [frame for frame in each.stack if not frame.filename.startswith(_OURS)]
            each.stack = traceback.StackSummary.from_list(frames)
            waiting += [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]
