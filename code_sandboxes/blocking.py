"""Drive an operation by blocking the caller's thread where it waits.

It needs no event loop and disturbs none, so it works in a notebook cell and from any thread.
"""

from __future__ import annotations

import time
from typing import TypeVar

from code_sandboxes.steps import SILENT, Ask, Handlers, Operation, Step, Tell, Wait, inside

__all__ = ["advance", "drive"]

T = TypeVar("T")


def drive(operation: Operation[T], handlers: Handlers = SILENT) -> T:
    """Run *operation* to its end, blocking this thread where it waits."""
    try:
        step = next(operation)
        while True:
            step = advance(operation, step, handlers)
    except StopIteration as stop:
        value: T = stop.value
        return value


def advance(operation: Operation[T], step: Step, handlers: Handlers) -> Step:
    """Do what *step* asks; the next step."""
    try:
        answer = _perform(step, handlers)
    except BaseException as error:  # the operation decides what becomes of it
        return operation.throw(error)
    return operation.send(answer)


def _perform(step: Step, handlers: Handlers) -> object:
    if isinstance(step, Wait):
        step.inbox.wait(None if step.until is None else step.until - time.monotonic())
        return None
    if isinstance(step, Tell):
        return step.call()
    with inside(step.run):
        return handlers.call(step.request if isinstance(step, Ask) else step.output)
