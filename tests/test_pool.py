"""SandboxPool: sandboxes that are ready before they are needed, each for one user."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from code_sandboxes import (
    AsyncSandboxPool,
    Sandbox,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxNotStartedError,
    SandboxPool,
    SandboxTimeoutError,
)
from code_sandboxes.sandbox import _CLASSES
from conftest import UNISOLATED, sandbox_folders, wait_until

IN_A_CONTAINER = True
FAST_VARIANT = "local-eval"

MakePool = Callable[..., SandboxPool]


@pytest.fixture
def make_pool(variant: str) -> Iterator[MakePool]:
    """Makes pools, which are closed with the test."""
    made: list[SandboxPool] = []

    def make(size: int = 1, **options: Any) -> SandboxPool:
        made.append(SandboxPool(variant, size=size, **{**UNISOLATED.get(variant, {}), **options}))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def ready(pool: SandboxPool | AsyncSandboxPool) -> list[Sandbox]:
    """Those that nobody has been given yet."""
    return [_CLASSES[core.variant.name]._around(core) for core in list(pool._pool._ready)]


def waiting(pool: SandboxPool | AsyncSandboxPool) -> int:
    return len(pool._pool._waiters)


class Acquirer(threading.Thread):
    """Wants a sandbox, and keeps it."""

    def __init__(self, pool: SandboxPool) -> None:
        super().__init__()
        self.pool = pool
        self.sandbox: Sandbox | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.sandbox = self.pool.acquire()
        except Exception as error:
            self.error = error

    @property
    def got(self) -> Sandbox:
        self.join(60)
        assert self.error is None
        assert self.sandbox is not None
        return self.sandbox


# Acquire and release.


def test_each_sandbox_is_handed_out_once_and_nobody_has_used_it(make_pool: MakePool) -> None:
    pool = make_pool(2)
    seen = set()
    for _ in range(3):
        first, second = pool.acquire(), pool.acquire()
        for sandbox in (first, second):
            result = sandbox.run_code("used = 'used' in globals(); used")
            assert (result.text, result.execution_count) == ("False", 1)
            seen.add(sandbox.id)
            pool.release(sandbox)
            assert sandbox.status == "stopped"
    assert len(seen) == 6


def test_all_are_started_before_anybody_asks(make_pool: MakePool) -> None:
    pool = make_pool(3, tags={"of": "pool"})
    wait_until(lambda: len(ready(pool)) == 3)

    assert pool.size == 3
    assert pool.acquire(timeout=0).tags == {"of": "pool"}


def test_when_all_are_handed_out_acquire_waits_for_a_release(make_pool: MakePool) -> None:
    pool = make_pool()
    first = pool.acquire()
    acquirer = Acquirer(pool)
    wait_until(lambda: waiting(pool))
    assert first.is_running
    pool.release(first)

    assert acquirer.got.id != first.id
    assert acquirer.got.run_code("1 + 1").text == "2"


@pytest.mark.parametrize("end", ["terminate", "kill", "with"])
def test_a_sandbox_that_ends_otherwise_counts_as_released(make_pool: MakePool, end: str) -> None:
    pool = make_pool()
    first = pool.acquire()
    if end == "with":
        with first:
            first.run_code("1")
    else:
        getattr(first, end)()
    assert pool.acquire().id != first.id
    pool.release(first)  # who does not know that it has ended may say so
    with pytest.raises(ValueError, match="was released before"):
        pool.release(first)


@pytest.mark.needs("own_process")
def test_a_sandbox_that_was_detached_is_not_the_pools_any_more(make_pool: MakePool) -> None:
    pool = make_pool()
    first = pool.acquire()
    first.detach()
    second = pool.acquire()
    pool.close()

    assert second.status == "stopped"
    with Sandbox.from_id(first.id) as again:
        assert again.run_code("1 + 1").text == "2"


def test_who_asks_first_gets_one_first(make_pool: MakePool) -> None:
    pool = make_pool()
    held = pool.acquire()
    acquirers = []
    for number in range(1, 4):
        acquirers.append(Acquirer(pool))
        wait_until(lambda number=number: waiting(pool) == number)  # type: ignore[misc]  # bound at once
    for acquirer in acquirers:
        pool.release(held)
        held = acquirer.got
        assert waiting(pool) == sum(each.is_alive() for each in acquirers)


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_acquire_waits_no_longer_than_its_timeout(make_pool: MakePool, timeout: float) -> None:
    pool = make_pool(2)
    with pool.acquire():
        other = pool.acquire()
        with pytest.raises(SandboxTimeoutError, match=rf"within {timeout:g} s: 2 of 2 are handed out"):
            pool.acquire(timeout)
    assert waiting(pool) == 0
    pool.release(other)
    assert pool.acquire(timeout=60).is_running


def test_ctrl_c_in_acquire_loses_no_sandbox(make_pool: MakePool) -> None:
    pool = make_pool()
    held = pool.acquire()

    def press() -> None:
        wait_until(lambda: waiting(pool))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        pool.acquire()
    wait_until(lambda: not waiting(pool))
    pool.release(held)
    assert pool.acquire(timeout=60).is_running


def test_its_lifetime_begins_when_a_sandbox_is_handed_out(make_pool: MakePool) -> None:
    pool = make_pool(config=SandboxConfig(max_lifetime=100))
    wait_until(lambda: ready(pool))
    given_at = time.time()
    info = pool.acquire().info

    assert info.created_at is not None
    assert info.created_at < given_at
    assert info.end_at is not None
    assert info.end_at >= given_at + 100


@pytest.mark.slow
def test_many_threads_share_a_small_pool() -> None:
    seen: list[str] = []
    most: list[int] = []
    held: set[str] = set()

    def use(times: int) -> None:
        for _ in range(times):
            with pool.acquire() as sandbox:
                held.add(sandbox.id)
                most.append(len(held))
                assert sandbox.run_code("used = 'used' in globals(); used").text == "False"
                seen.append(sandbox.id)
                held.discard(sandbox.id)

    threads = [threading.Thread(target=use, args=(7 if number < 2 else 6,)) for number in range(8)]
    with SandboxPool("local-eval", size=3) as pool:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(seen) == len(set(seen)) == 50
    assert max(most) <= 3


# What goes wrong.


@pytest.mark.not_in_a_container("its processes have other numbers there")
@pytest.mark.needs("own_process")
def test_a_kernel_that_died_in_the_pool_is_not_handed_out(make_pool: MakePool) -> None:
    pool = make_pool()
    wait_until(lambda: ready(pool))
    (dead,) = ready(pool)
    os.kill(int(dead.run_code("import os; os.getpid()").text or 0), signal.SIGKILL)
    given = pool.acquire()

    assert given.id != dead.id
    assert given.run_code("1 + 1").text == "2"
    assert dead.status == "stopped"


@pytest.mark.not_in_a_container("its processes have other numbers there")
@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_a_kernel_that_is_stuck_is_not_handed_out(make_pool: MakePool) -> None:
    pool = make_pool(config=SandboxConfig(interrupt_grace=0.1))
    wait_until(lambda: ready(pool))
    (stuck,) = ready(pool)
    os.kill(int(stuck.run_code("import os; os.getpid()").text or 0), signal.SIGSTOP)

    assert pool.acquire().id != stuck.id


def test_a_sandbox_that_ended_in_the_pool_is_replaced(make_pool: MakePool) -> None:
    pool = make_pool()
    wait_until(lambda: ready(pool))
    (ended,) = ready(pool)
    ended.kill()
    wait_until(lambda: ready(pool) and ready(pool)[0].id != ended.id)

    assert pool.acquire(timeout=0).is_running


def test_a_start_that_fails_is_told_once_and_tried_again(
    install_kernel: Callable[..., str], tmp_path: Path
) -> None:
    repaired = tmp_path / "repaired"
    program = (
        f"import os, sys; os.path.exists({str(repaired)!r}) or sys.exit('no luck')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', '-f', sys.argv[1]])"
    )
    name = install_kernel("fails-first", [sys.executable, "-c", program, "{connection_file}"])
    with SandboxPool("local-jupyter", size=1, kernel_name=name, isolation="none") as pool:
        for _ in range(2):
            with pytest.raises(SandboxConnectionError, match="no luck"):
                pool.acquire()
        wait_until(lambda: pool._pool._failures)
        repaired.touch()
        with pytest.raises(SandboxConnectionError, match="no luck"):
            pool.acquire()
        assert pool.acquire().run_code("1 + 1").text == "2"


def test_what_is_wrong_with_the_arguments_is_told_before_anything_starts(runtime_folder: Path) -> None:
    before = sandbox_folders(runtime_folder)
    for pool in (SandboxPool, AsyncSandboxPool):
        with pytest.raises(ValueError, match="no sandbox variant 'local-dokcer'"):
            pool("local-dokcer", size=1)
        with pytest.raises(TypeError, match="local-eval has no option 'colour'"):
            pool("local-eval", size=1, colour="red")
        with pytest.raises(SandboxConfigurationError, match="local-eval"):
            pool("local-eval", size=1, memory=100)
        with pytest.raises(ValueError, match="size must be 1 or more, not 0"):
            pool("local-eval", size=0)
        for size in ("2", 2.0, True, None):
            with pytest.raises(TypeError, match="size must be an int"):
                pool("local-eval", size=size)  # type: ignore[arg-type]  # the point
    assert sandbox_folders(runtime_folder) == before


def test_what_is_wrong_with_a_call_is_told(make_pool: MakePool, variant: str) -> None:
    pool = make_pool()
    with pytest.raises(ValueError, match="timeout must be 0 or more seconds"):
        pool.acquire(timeout=-1)
    with pytest.raises(TypeError, match="timeout must be a number of seconds"):
        pool.acquire(timeout="1")  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match=r"release\(\) takes a sandbox, not str"):
        pool.release("x")  # type: ignore[arg-type]  # the point
    with Sandbox.create("local-eval") as foreign:
        with pytest.raises(ValueError, match="is not from this pool"):
            pool.release(foreign)
        assert foreign.is_running
    sandbox = pool.acquire()
    pool.release(sandbox)
    with pytest.raises(ValueError, match="was released before"):
        pool.release(sandbox)


# The end.


def test_close_ends_all_and_tells_those_who_wait(make_pool: MakePool, runtime_folder: Path) -> None:
    before = sandbox_folders(runtime_folder)
    pool = make_pool(2)
    held = [pool.acquire(), pool.acquire()]
    acquirers = [Acquirer(pool), Acquirer(pool)]
    wait_until(lambda: waiting(pool) == 2)
    pool.close()
    pool.close()

    assert [sandbox.status for sandbox in held] == ["stopped", "stopped"]
    assert sandbox_folders(runtime_folder) == before
    for acquirer in acquirers:
        acquirer.join(60)
        assert isinstance(acquirer.error, SandboxNotStartedError)
        assert str(acquirer.error) == "the pool is closed"
    with pytest.raises(SandboxNotStartedError, match="the pool is closed"):
        pool.acquire()
    pool.release(held[0])  # it has ended, by itself as it were


@pytest.mark.parametrize("started", [0, 1, 2])
def test_close_leaves_nothing_of_those_that_are_starting(
    make_pool: MakePool, runtime_folder: Path, started: int
) -> None:
    make_pool().close()  # the threads that all sandboxes share are there then
    before = sandbox_folders(runtime_folder), set(threading.enumerate())
    with make_pool(3) as pool:
        wait_until(lambda: len(pool._pool._ready) >= started)
    assert sandbox_folders(runtime_folder) == before[0]
    assert not pool._pool._alive
    wait_until(lambda: set(threading.enumerate()) <= before[1])


def test_a_program_that_does_not_close_its_pool_leaves_nothing(tmp_path: Path, variant: str) -> None:
    folder = tmp_path / "r"
    program = (
        "from code_sandboxes import SandboxPool\n"
        f"pool = SandboxPool({variant!r}, size=2, **{UNISOLATED.get(variant, {})!r})\n"
        "sandbox = pool.acquire()\nprint(sandbox.run_code('1 + 1').text)"
    )
    environment = {**os.environ, "CODE_SANDBOXES_RUNTIME_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("2\n", "")
    wait_until(lambda: not sandbox_folders(folder))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that it is multi-threaded is the point
def test_a_forked_child_neither_uses_nor_closes_the_pool(make_pool: MakePool) -> None:
    with make_pool(2) as pool:
        held = pool.acquire()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            told = []
            for use in (pool.acquire, pool.close, lambda: pool.release(held)):
                try:
                    use()
                except SandboxConnectionError as error:
                    told.append("is its fork" in str(error))
            pool.__exit__(None, None, None)
            os.write(write, repr(told).encode())
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert os.read(read, 100) == b"[True, True, True]"
        os.close(read)
        os.close(write)
        assert held.run_code("1 + 1").text == "2"
        assert pool.acquire().run_code("1 + 1").text == "2"


# The asyncio front.


@pytest.fixture
def make_async_pool(variant: str) -> MakePool:
    def make(size: int = 1, **options: Any) -> Any:
        return AsyncSandboxPool(variant, size=size, **{**UNISOLATED.get(variant, {}), **options})

    return make


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def _public(cls: type) -> dict[str, Any]:
    return {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}


def test_both_fronts_have_the_same_names_signatures_and_documentation() -> None:
    ours, theirs = _public(SandboxPool), _public(AsyncSandboxPool)
    assert list(theirs) == list(ours)
    assert inspect.signature(AsyncSandboxPool) == inspect.signature(SandboxPool)
    for name, member in ours.items():
        assert inspect.getdoc(member)
        assert inspect.getdoc(theirs[name]) == inspect.getdoc(member), name
        if callable(member):
            assert list(inspect.signature(theirs[name]).parameters) == list(
                inspect.signature(member).parameters
            )


def test_async_sandboxes_are_fresh_and_ended_after_use(make_async_pool: Callable[..., Any]) -> None:
    async def main() -> None:
        seen = set()
        async with make_async_pool(2) as pool:
            for _ in range(2):
                async with await pool.acquire() as sandbox:
                    assert (await sandbox.run_code("used = 'used' in globals(); used")).text == "False"
                    seen.add(sandbox.id)
                sandbox = await pool.acquire()
                seen.add(sandbox.id)
                await pool.release(sandbox)
                assert sandbox.status == "stopped"
            assert len(seen) == 4
            held = [await pool.acquire(), await pool.acquire()]
            with pytest.raises(SandboxTimeoutError, match="2 are handed out"):
                await pool.acquire(timeout=0.05)
            waiter = asyncio.create_task(pool.acquire())
            await until(lambda: waiting(pool))
        with pytest.raises(SandboxNotStartedError, match="the pool is closed"):
            await waiter
        assert [sandbox.status for sandbox in held] == ["stopped", "stopped"]
        await pool.close()

    asyncio.run(main())


def test_async_who_asks_first_gets_one_first(make_async_pool: Callable[..., Any]) -> None:
    async def main() -> None:
        async with make_async_pool() as pool:
            held = await pool.acquire()
            order: list[int] = []

            async def use(number: int) -> None:
                async with await pool.acquire():
                    order.append(number)

            tasks = [asyncio.create_task(use(number)) for number in range(4)]
            await until(lambda: waiting(pool) == 4)
            await pool.release(held)
            await asyncio.gather(*tasks)
            assert order == [0, 1, 2, 3]

    asyncio.run(main())


@pytest.mark.parametrize("when", ["while it waits", "when it was given one and has not seen it"])
def test_a_cancelled_acquire_loses_no_sandbox(make_async_pool: Callable[..., Any], when: str) -> None:
    async def main() -> None:
        async with make_async_pool() as pool:
            held = await pool.acquire()
            task = asyncio.create_task(pool.acquire())
            await until(lambda: waiting(pool))
            if when != "while it waits":
                threading.Thread(target=held._core.over, args=("the test",)).start()
                # The loop is held, so that what the task is given cannot reach it.
                wait_until(lambda: any(core.id != held.id for core in pool._pool._out))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if held.is_running:
                await pool.release(held)
            assert (await (await pool.acquire(timeout=60)).run_code("1 + 1")).text == "2"

    asyncio.run(main())


def test_an_async_pool_is_bound_to_no_event_loop(make_async_pool: Callable[..., Any]) -> None:
    pool = make_async_pool()
    sandbox = asyncio.run(pool.acquire())
    assert asyncio.run(sandbox.run_code("1 + 1")).text == "2"
    asyncio.run(pool.release(sandbox))
    asyncio.run(pool.close())
