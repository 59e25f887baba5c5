"""AsyncSandbox: the same as Sandbox, without ever holding up the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from code_sandboxes import (
    AsyncCodeStream,
    AsyncFileWatcher,
    AsyncProcessHandle,
    AsyncProcessLines,
    AsyncSandbox,
    AsyncSandboxCommands,
    AsyncSandboxFileHandle,
    AsyncSandboxFilesystem,
    CodeStream,
    FileWatcher,
    InputRequest,
    OutputMessage,
    ProcessHandle,
    ProcessLines,
    Sandbox,
    SandboxCommands,
    SandboxFileHandle,
    SandboxFilesystem,
    SandboxNotStartedError,
)
from conftest import BUSY, BUSY_OR_WAITING, UNISOLATED

IN_A_CONTAINER = True
FAST_VARIANT = "local-jupyter"

Body = Callable[[AsyncSandbox], Awaitable[None]]
Start = Callable[..., Any]  # what AsyncSandbox.create() gives
WithSandbox = Callable[[Body], None]


@pytest.fixture
def start(variant: str) -> Start:
    """Starts a sandbox: to be awaited, or entered."""
    settings: dict[str, Any] = UNISOLATED.get(variant, {})
    return partial(AsyncSandbox.create, variant, **settings)


@pytest.fixture
def with_sandbox(start: Start) -> WithSandbox:
    """Runs a body with a sandbox in an event loop."""

    def run(body: Body) -> None:
        async def main() -> None:
            async with start() as sandbox:
                await body(sandbox)

        asyncio.run(main())

    return run


# Parity.


def _public(cls: type) -> dict[str, object]:
    return {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [
        (Sandbox, AsyncSandbox),
        (CodeStream, AsyncCodeStream),
        (SandboxFilesystem, AsyncSandboxFilesystem),
        (SandboxFileHandle, AsyncSandboxFileHandle),
        (FileWatcher, AsyncFileWatcher),
        (SandboxCommands, AsyncSandboxCommands),
        (ProcessHandle, AsyncProcessHandle),
        (ProcessLines, AsyncProcessLines),
    ],
)
def test_both_fronts_have_the_same_names_signatures_and_documentation(
    blocking: type, asynchronous: type
) -> None:
    ours, theirs = _public(blocking), _public(asynchronous)
    assert set(theirs) - set(ours) <= {"aclose"}
    assert set(ours) <= set(theirs)
    for name, member in ours.items():
        twin = theirs[name]
        assert inspect.getdoc(twin) == inspect.getdoc(member), name
        if callable(member) and callable(twin):
            assert list(inspect.signature(twin).parameters.values()) == [
                parameter.replace(annotation=inspect.signature(twin).parameters[parameter.name].annotation)
                for parameter in inspect.signature(member).parameters.values()
            ], name


# Life.


def test_create_can_be_awaited_and_used_in_async_with(start: Start) -> None:
    async def main() -> None:
        sandbox = await start(name="mine")
        assert (sandbox.is_running, sandbox.name) == (True, "mine")
        assert (await sandbox.run_code("1 + 1")).text == "2"
        assert await sandbox.terminate() is True
        assert await sandbox.kill() is False
        with pytest.raises(SandboxNotStartedError):
            await sandbox.run_code("1")
        async with start() as other:
            assert other.is_running
        assert other.status == "stopped"

    asyncio.run(main())


def test_a_sandbox_outlives_the_event_loop_it_was_made_in(start: Start) -> None:
    async def make() -> AsyncSandbox:
        sandbox: AsyncSandbox = await start()
        return sandbox

    sandbox = asyncio.run(make())
    assert asyncio.run(sandbox.run_code("1 + 1")).text == "2"
    assert asyncio.run(sandbox.terminate()) is True


# Running code.


def test_callbacks_may_be_plain_or_asynchronous_and_come_in_order(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        heard: list[str] = []

        async def slowly(message: OutputMessage) -> None:
            await asyncio.sleep(0.01)
            heard.append(message.line)

        result = await sandbox.run_code(
            "import sys\nfor i in range(5): print(i)\nprint('e', file=sys.stderr)",
            on_stdout=slowly,
            on_stderr=lambda message: heard.append(message.line),
        )
        assert result.success
        assert sorted(heard) == ["0", "1", "2", "3", "4", "e"]
        assert [line for line in heard if line != "e"] == ["0", "1", "2", "3", "4"]

    with_sandbox(body)


def test_input_is_answered_by_a_coroutine(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        async def answer(request: InputRequest) -> str:
            await asyncio.sleep(0.01)
            return request.prompt + "me"

        assert (await sandbox.run_code("input('who? ')", on_input=answer)).text == "'who? me'"

    with_sandbox(body)


def test_an_exception_in_an_asynchronous_callback_is_raised_after_the_run(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        async def fail(_: object) -> None:
            raise LookupError("from the callback")

        with pytest.raises(LookupError, match="from the callback"):
            await sandbox.run_code("print(1); x = 1", on_stdout=fail)
        assert (await sandbox.run_code("x")).text == "1"

    with_sandbox(body)


def test_a_callback_may_not_wait_for_its_own_run(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        async def nested(_: object) -> None:
            await sandbox.run_code("1")

        with pytest.raises(RuntimeError, match="would wait for itself"):
            await sandbox.run_code("print(1)", on_stdout=nested)

    with_sandbox(body)


@pytest.mark.parametrize("code", BUSY_OR_WAITING)
@pytest.mark.slow
def test_a_cancelled_run_is_interrupted_and_the_kernel_is_ready_for_the_next(
    with_sandbox: WithSandbox, code: str
) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        before = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sandbox.run_code(f"x = 1\n{code}", timeout=0), 0.5)
        assert time.monotonic() - before < 5
        result = await sandbox.run_code("x")
        assert (result.status, result.text, result.state_preserved) == ("ok", "1", True)

    with_sandbox(body)


@pytest.mark.slow
def test_a_cancelled_run_that_does_not_stop_keeps_nobody_waiting(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        await sandbox.run_code("x = 1")
        code = "import time\nwhile True:\n    try: time.sleep(20)\n    except KeyboardInterrupt: pass"
        before = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sandbox.run_code(code, timeout=0), 0.3)
        assert time.monotonic() - before < 4
        result = await sandbox.run_code("'x' in globals()")
        assert (result.status, result.text, result.state_preserved) == ("ok", "False", False)

    with_sandbox(body)


@pytest.mark.slow
def test_a_run_that_is_cancelled_while_it_waits_for_its_turn_is_not_run(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        first = asyncio.create_task(sandbox.run_code("import time; time.sleep(0.5)"))
        await asyncio.sleep(0)
        second = asyncio.create_task(sandbox.run_code("ran = True"))
        await asyncio.sleep(0.1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert (await first).status == "ok"
        assert (await sandbox.run_code("'ran' in globals()")).text == "False"

    with_sandbox(body)


@pytest.mark.slow
def test_a_timeout_is_kept_while_a_callback_awaits(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        result = await sandbox.run_code(
            f"import time\nt = time.time()\nprint('on')\ntry:\n    {BUSY}\nfinally: print(time.time() - t)",
            on_stdout=lambda m: asyncio.sleep(2 if m.line == "on" else 0),
            timeout=1,
        )
        assert result.status == "timed_out"
        assert float(result.stdout.split()[1]) < 1.9

    with_sandbox(body)


# The iterator.


@pytest.mark.slow
def test_the_stream_is_live_and_in_order(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        stream = sandbox.run_code_streaming(
            "print('a', end='')\nimport time; time.sleep(0.5)\nprint('b')\n1 / 0"
        )
        times, seen = [], []
        async for event in stream:
            times.append(time.monotonic())
            seen.append(str(event))
        assert seen == ["a", "b", "ZeroDivisionError: division by zero"]
        assert times[1] - times[0] > 0.2
        assert stream.result.status == "error"
        with pytest.raises(RuntimeError, match="only once"):
            stream.__aiter__()

    with_sandbox(body)


def test_leaving_the_stream_early_interrupts_the_run(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        stream = sandbox.run_code_streaming("x = 1\nimport time\nwhile True: print(1); time.sleep(0.01)")
        async for _ in stream:
            break
        assert (await sandbox.run_code("x")).text == "1"
        assert stream.result.status == "interrupted"

    with_sandbox(body)


def test_aclosing_a_stream_waits_until_the_code_has_stopped(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        stream = sandbox.run_code_streaming("import time\nwhile True: print(1); time.sleep(0.01)")
        async with contextlib.aclosing(stream):
            async for _ in stream:
                break
        assert stream.result.status == "interrupted"
        assert sandbox.is_executing is False

    with_sandbox(body)


# The event loop.


@pytest.mark.slow
def test_the_event_loop_misses_no_tick_while_20_runs_proceed(with_sandbox: WithSandbox) -> None:
    async def late_ticks(sandbox: AsyncSandbox) -> int:
        loop = asyncio.get_running_loop()
        late: list[float] = []

        def tick(due: float) -> None:
            late.append(loop.time() - due)
            ticks.append(loop.call_later(0.02, tick, loop.time() + 0.02))

        ticks = [loop.call_later(0, tick, loop.time())]
        contexts = [await sandbox.create_context() for _ in range(2)]
        results = await asyncio.gather(
            *(
                sandbox.run_code(f"import time; time.sleep(0.05); {i}", context=contexts[i % 2])
                for i in range(20)
            )
        )
        ticks[-1].cancel()
        assert [result.text for result in results] == [str(i) for i in range(20)]
        assert len(late) > 10
        return sum(lateness > 0.02 for lateness in late)

    async def body(sandbox: AsyncSandbox) -> None:
        # What holds the loop does so each time; a machine that is busy with something else does not.
        for _ in range(10):
            if await late_ticks(sandbox) == 0:
                return
        pytest.fail("in each of ten rounds the event loop was held for longer than a tick")

    with_sandbox(body)


@pytest.mark.slow
def test_500_runs_on_10_kernels_keep_their_order(with_sandbox: WithSandbox) -> None:
    async def body(sandbox: AsyncSandbox) -> None:
        contexts = [await sandbox.create_context(f"c{i}") for i in range(10)]
        await asyncio.gather(*(sandbox.run_code("order = []", context=c) for c in contexts))
        await asyncio.gather(
            *(sandbox.run_code(f"order.append({i})", context=contexts[i % 10], timeout=0) for i in range(500))
        )
        for number, context in enumerate(contexts):
            result = await sandbox.run_code("print(order)", context=context)
            assert result.stdout == str(list(range(number, 500, 10)))

    with_sandbox(body)
