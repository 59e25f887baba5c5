"""Turn a cell into what can be run, and what it raised into what can be told."""

from __future__ import annotations

import ast
import contextlib
import io
import linecache
import os
import traceback
from collections.abc import Iterable, Iterator
from types import CodeType

__all__ = ["compile_cell", "failure_content", "forget_source", "remember_source"]

_FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
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
    tree = compile(source, filename, "exec", _FLAGS | ast.PyCF_ONLY_AST, dont_inherit=True)
    assert isinstance(tree, ast.Module)
    return tree


def _ends_with_semicolon(statement: ast.Expr, source: str) -> bool:
    """As in IPython: its value is not to be shown then."""
    if ";" not in source:
        return False
    end_line, end_column = statement.end_lineno, statement.end_col_offset
    assert end_line is not None
    assert end_column is not None
    lines = io.StringIO(source, newline=None).readlines()
    return lines[end_line - 1].encode()[end_column:].lstrip().startswith(b";")


def remember_source(filename: str, source: str) -> None:
    """Let tracebacks and :mod:`inspect` find *source*."""
    lines = [line + "\n" for line in source.splitlines()]
    linecache.cache[filename] = (len(source), None, lines, filename)


def forget_source(filename: str) -> None:
    """Take back :func:`remember_source`."""
    linecache.cache.pop(filename, None)


def failure_content(error: BaseException) -> dict[str, object]:
    """The content of an ``error`` message; may run code of the exception's own."""
    name = str.__str__(type(error).__name__)
    try:
        value = str.__str__(str(error))
    except Exception as broken:
        value = f"<its __str__() raised {type(broken).__name__}>"
    return {"ename": name, "evalue": value, "traceback": _traceback(error)}


def _traceback(error: BaseException) -> list[str]:
    try:
        told = traceback.TracebackException.from_exception(error)
        _leave_out_ours(told)
        return "".join(told.format()).rstrip("\n").split("\n")
    except Exception as broken:
        return [f"(its traceback cannot be shown: {type(broken).__name__})"]


def _leave_out_ours(told: traceback.TracebackException) -> None:
    waiting: list[traceback.TracebackException | None] = [told]
    while waiting:
        each = waiting.pop()
        if each is not None:
            each.stack = traceback.StackSummary.from_list(_theirs(each.stack))
            waiting += [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]


def _theirs(stack: Iterable[traceback.FrameSummary]) -> Iterator[traceback.FrameSummary]:
    ours = False
    for frame in stack:
        in_between = ours and frame.filename == contextlib.__file__  # for a with of ours
        ours = frame.filename.startswith(_OURS) or in_between
        if not ours:
            yield frame
