"""Drive an operation by awaiting where it waits: nothing blocks the event loop."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from code_sandboxes.inbox import Inbox
from code_sandboxes.steps import SILENT, Ask, Handlers, Operation, Step, Tell, Wait, inside

__all__ = ["documented_by", "drive", "resumption"]

T = TypeVar("T")
AnyCallable = TypeVar("AnyCallable", bound=Callable[..., object])


def documented_by(original: object) -> Callable[[AnyCallable], AnyCallable]:
    """Takes over the documentation of the blocking twin."""

    def document(method: AnyCallable) -> AnyCallable:
        method.__doc__ = original.__doc__
        return method

    return document


async def drive(operation: Operation[T], handlers: Handlers = SILENT) -> T:
    """Run *operation* to its end, awaiting where it waits."""
    try:
        step = next(operation)
        while True:
            step = (await resumption(step, handlers))(operation)
    except StopIteration as stop:
        value: T = stop.value
        return value


async def resumption(step: Step, handlers: Handlers) -> Callable[[Operation[T]], Step]:
    """How an operation goes on after *step*; not done here, since its end cannot leave a coroutine."""
    try:
        answer = await _perform(step, handlers)
    except BaseException as error:  # the operation decides what becomes of it, a cancellation too
        return partial(_throw, error)
    return lambda operation: operation.send(answer)


def _throw(error: BaseException, operation: Operation[T]) -> Step:
    return operation.throw(error)


async def _perform(step: Step, handlers: Handlers) -> object:
    if isinstance(step, Wait):
        await _wait(step.inbox, step.until)
        return None
    if isinstance(step, Tell):
        told = step.call()
        return await told if inspect.isawaitable(told) else told
    with inside(step.run):
        answer = handlers.call(step.request if isinstance(step, Ask) else step.output)
        return await answer if inspect.isawaitable(answer) else answer


async def _wait(inbox: Inbox, until: float | None) -> None:
    """Return when something may have been put into *inbox*, or at *until*."""
    loop = asyncio.get_running_loop()
    arrived = loop.create_future()

    def wake() -> None:
        if not arrived.done():
            arrived.set_result(None)

    def wake_from_io_thread() -> None:
        if not arrived.done():
            try:
                loop.call_soon_threadsafe(wake)
            except RuntimeError:  # the event loop is closed: nobody waits any more
                return

    inbox.notify(wake_from_io_thread)
    timer = None if until is None else loop.call_later(max(0.0, until - time.monotonic()), wake)
    try:
        # What was put before notify() has woken nobody.
        if inbox.is_empty:
            await arrived
    finally:
        if timer is not None:
            timer.cancel()
