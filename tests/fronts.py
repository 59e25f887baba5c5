"""The other fronts, behind the names of the blocking one, so that one test of behaviour serves them all."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, cast

from code_sandboxes import AsyncSandbox, ExecutionError, ExecutionResult, OutputMessage, Result, Sandbox

__all__ = ["FRONTS", "create"]

T = TypeVar("T")

FRONTS = ("blocking", "async", "iterator")


def create(front: str, variant: str, **settings: object) -> Sandbox:
    """A running sandbox of *variant* whose methods go through *front*."""
    if front == "async":
        sandbox = _block_on(_awaited(AsyncSandbox.create(variant, **settings)))  # type: ignore[arg-type]  # any
        return cast(Sandbox, _ThroughAsync(sandbox))
    sandbox_ = Sandbox.create(variant, **settings)  # type: ignore[arg-type]  # whatever the test asks for
    return cast(Sandbox, _ThroughIterator(sandbox_)) if front == "iterator" else sandbox_


class _ThroughAsync:
    """Each call is awaited in an event loop of its own, in the caller's thread."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    def __getattr__(self, name: str) -> object:
        member = getattr(self._sandbox, name)
        if not asyncio.iscoroutinefunction(member):
            return _blocking(member)
        return lambda *args, **kwargs: _blocking(_block_on(member(*args, **kwargs)))

    def __repr__(self) -> str:
        return repr(self._sandbox)

    def run_code_streaming(self, code: str, **settings: object) -> _AsyncStream:
        return _AsyncStream(self._sandbox, code, settings)


class _Blocking:
    """Something of the asyncio front (files, commands, and what they open), as the blocking one has it."""

    def __init__(self, subject: Any) -> None:
        self._subject = subject

    def __getattr__(self, name: str) -> object:
        member = getattr(self._subject, name)
        if not callable(member):
            return _blocking(member)

        def call(*args: object, **kwargs: object) -> object:
            result = member(*args, **kwargs)
            if inspect.isawaitable(result):
                result = _block_on(_await(result))
            return _blocking(result)

        return call

    def __repr__(self) -> str:
        return repr(self._subject)

    def __enter__(self) -> _Blocking:
        _block_on(self._subject.__aenter__())
        return self

    def __exit__(self, *reason: object) -> None:
        _block_on(self._subject.__aexit__(*reason))

    def __iter__(self) -> Iterator[object]:
        return self if hasattr(self._subject, "__anext__") else _iterate(self._subject)

    def __next__(self) -> object:
        try:
            return _block_on(self._subject.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None


def _blocking(value: object) -> object:
    """*value*, if it is not the asyncio front's; else behind the names of the blocking one."""
    if inspect.isasyncgen(value):
        return _iterate(value)
    is_async = type(value).__module__.startswith("code_sandboxes.async_")
    return _Blocking(value) if is_async else value


def _iterate(subject: Any) -> Iterator[object]:
    loop = asyncio.new_event_loop()
    events = subject.__aiter__()
    try:
        while True:
            try:
                yield loop.run_until_complete(events.__anext__())
            except StopAsyncIteration:
                return
    finally:
        if hasattr(events, "aclose"):
            loop.run_until_complete(events.aclose())
        loop.close()


class _AsyncStream:
    def __init__(self, sandbox: AsyncSandbox, code: str, settings: dict[str, object]) -> None:
        self._stream = sandbox.run_code_streaming(code, **settings)  # type: ignore[arg-type]  # the test's

    @property
    def result(self) -> ExecutionResult:
        return self._stream.result

    def __iter__(self) -> Iterator[OutputMessage | Result | ExecutionError]:
        loop = asyncio.new_event_loop()
        try:
            events = self._stream.__aiter__()
            while True:
                try:
                    yield loop.run_until_complete(events.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(self._stream.aclose())
            loop.close()


class _ThroughIterator:
    """``run_code()`` by way of ``run_code_streaming()``, with the callbacks called here."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def __getattr__(self, name: str) -> object:
        return getattr(self._sandbox, name)

    def __repr__(self) -> str:
        return repr(self._sandbox)

    def run_code(
        self,
        code: str,
        *,
        on_stdout: Callable[[OutputMessage], object] | None = None,
        on_stderr: Callable[[OutputMessage], object] | None = None,
        on_result: Callable[[Result], object] | None = None,
        on_error: Callable[[ExecutionError], object] | None = None,
        **settings: object,
    ) -> ExecutionResult:
        stream = self._sandbox.run_code_streaming(code, **settings)  # type: ignore[arg-type]  # the test's
        for event in stream:
            if isinstance(event, OutputMessage):
                handler: Callable[..., object] | None = on_stderr if event.error else on_stdout
            else:
                handler = on_result if isinstance(event, Result) else on_error
            if handler is not None:
                handler(event)
        return stream.result


async def _await(awaitable: Any) -> object:
    return await awaitable


async def _awaited(starting: object) -> AsyncSandbox:
    return await starting  # type: ignore[no-any-return, misc]  # AsyncSandbox.create() gives an awaitable


def _block_on(coroutine: Coroutine[object, object, T]) -> T:
    """Run *coroutine* in this thread; where an event loop runs here already (in a callback), beside it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(coroutine))
        except BaseException as error:  # it is raised again in the thread that called
            failures.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
