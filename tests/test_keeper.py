"""The keeper: sandboxes that are found again, outlive their program when asked, and never leak when not."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from code_sandboxes import (
    AsyncSandbox,
    ContextNotFoundError,
    Sandbox,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxNotFoundError,
    SandboxNotStartedError,
)
from code_sandboxes.keeper import client, lines
from conftest import MakeSandbox, processes_of, sandbox_folders, wait_until


def create(**settings: object) -> Sandbox:
    return Sandbox.create("local-jupyter", isolation="none", **settings)  # type: ignore[arg-type]  # any


class Program:
    """Another program: ``tell()`` runs lines in it, and gives what they print."""

    def __init__(self, folder: Path) -> None:
        code = """
            import contextlib, io, os, sys, threading, time
            from code_sandboxes import *
            from code_sandboxes import SandboxConfig
            def create(**settings): return Sandbox.create("local-jupyter", isolation="none", **settings)
            for line in sys.stdin:
                exec(eval(line), globals())
                print(flush=True)
        """
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CODE_SANDBOXES_RUNTIME_DIR": str(folder)},
        )

    def begin(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(repr(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()

    def heard(self) -> str:
        """What it has printed up to the end of what it was told to do, or before its own."""
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            if line == "\n":
                break
            said.append(line)
        return "".join(said).strip()

    def tell(self, code: str) -> str:
        self.begin(code)
        return self.heard()

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


StartProgram = Callable[[], Program]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder of the test's own, with a keeper of its own; at the end nothing must be left in it."""
    folder = tmp_path / "r"
    monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(client, "_LINGER", 0.2)
    yield folder
    wait_until(lambda: not sandbox_folders(folder), seconds=10)
    assert_nothing_is_left_in(folder)


def assert_nothing_is_left_in(folder: Path) -> None:
    client.the_keeper(folder).close()
    try:
        wait_until(lambda: nothing_is_left_in(folder), seconds=10)
    except AssertionError:
        left = [process.cmdline() for process in processes_of(folder)], sorted(folder.rglob("*"))
        pytest.fail(f"{left} is left; {(folder / 'keeper.log').read_text()}")


def nothing_is_left_in(folder: Path) -> bool:
    if processes_of(folder):
        return False
    return not folder.exists() or {path.name for path in folder.iterdir()} <= {"keeper.log", "keeper.log.1"}


@pytest.fixture
def start_program(folder: Path) -> Iterator[StartProgram]:
    programs: list[Program] = []

    def start() -> Program:
        programs.append(Program(folder))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def is_keeper(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "keeper.server" in " ".join(process.cmdline())
    return False


def keeper_of(folder: Path) -> psutil.Process:
    (keeper,) = filter(is_keeper, processes_of(folder))
    return keeper


def kernels_of(folder: Path) -> list[psutil.Process]:
    return [process for process in processes_of(folder) if not is_keeper(process)]


# Found again


@pytest.mark.slow
def test_a_detached_sandbox_is_found_by_another_program_with_all_that_is_in_it(
    start_program: StartProgram,
) -> None:
    maker, finder = start_program(), start_program()
    sandbox_id = maker.tell("""
        sandbox = create(name="mine", tags={"job": "1", "step": "a"}, timeout=7, env={"GIVEN": "yes"})
        sandbox.run_code("x = 42; open('file', 'w').write('kept')")
        context = sandbox.create_context("other", env={"OWN": "1"})
        sandbox.run_code("y = 'in other'", context="other")
        sandbox.detach()
        print(sandbox.id)
    """)
    maker.close()

    assert finder.tell("""
        (found,) = Sandbox.list("local-jupyter", tags={"job": "1"})
        print(found.id, found.name, found.tags, found.status, found.config.timeout, found.metadata)
    """) == (
        f"{sandbox_id} mine {{'job': '1', 'step': 'a'}} running 7.0"
        " {'programs': 0, 'detached': True, 'paused': False, 'kernels': 2}"
    )
    assert finder.tell(f"""
        sandbox = Sandbox.from_id({sandbox_id!r})
        print(sandbox.run_code("x, open('file').read(), __import__('os').environ['GIVEN']").text)
        print(sandbox.run_code("y", context="other").text, [c.name for c in sandbox.list_contexts()])
        print(sandbox.name, sandbox.tags, sandbox.config.timeout, sandbox.is_running)
        sandbox.restart_context("other")
        print(sandbox.run_code("__import__('os').environ['OWN']", context="other").text)
        print(sandbox.terminate(), Sandbox.list())
    """).splitlines() == [
        "(42, 'kept', 'yes')",
        "'in other' ['default', 'other']",
        "mine {'job': '1', 'step': 'a'} 7.0 True",
        "'1'",
        "True []",
    ]


@pytest.mark.slow
def test_list_filters_by_variant_and_by_all_tags(folder: Path) -> None:
    assert Sandbox.list() == []
    assert not folder.exists() or not processes_of(folder)  # no keeper is started to look for one
    with (
        create(tags={"a": "1", "b": "2"}) as first,
        create(tags={"a": "1"}) as second,
        Sandbox.create("local-eval", tags={"a": "1"}) as here,
    ):
        assert [each.id for each in Sandbox.list(tags={"a": "1"})] == [here.id, first.id, second.id]
        assert [each.id for each in Sandbox.list("local-jupyter", tags={"a": "1", "b": "2"})] == [first.id]
        assert [each.id for each in Sandbox.list("local-eval")] == [here.id]
        assert Sandbox.list(tags={"a": "2"}) == []
        second.set_tags({"a": "2"})
        assert [each.id for each in Sandbox.list(tags={"a": "2"})] == [second.id]
        with pytest.raises(ValueError, match="no sandbox variant 'cloud'"):
            Sandbox.list("cloud")
        with pytest.raises(TypeError, match="tags must map str to str, not int"):
            Sandbox.list(tags={"a": 1})  # type: ignore[dict-item]  # on purpose
    assert Sandbox.list() == []


@pytest.mark.parametrize(
    ("id", "sentence"),
    [
        ("local-jupyter:no", "no sandbox 'local-jupyter:no' on this machine: it has ended, or never was"),
        (
            "local-eval:no",
            "no sandbox 'local-eval:no': a local-eval sandbox belongs to the process that made it",
        ),
        (
            "no",
            "no sandbox 'no': it would be looked up at Datalayer, for which there is no API key; pass token=,"
            " or set DATALAYER_API_KEY",
        ),
        ("", "no sandbox '': the id of a datalayer-runtime is the name of its runtime"),
    ],
)
def test_what_is_not_there_is_not_found(folder: Path, id: str, sentence: str) -> None:
    with pytest.raises(SandboxNotFoundError, match=f"^{sentence}$"):
        Sandbox.from_id(id)


def test_an_id_is_a_str_and_local_jupyter_takes_no_options_for_it(folder: Path) -> None:
    with pytest.raises(TypeError, match="id must be a str, not int"):
        Sandbox.from_id(1)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"from_id\(\) of local-jupyter takes no options \(given: token\)"):
        Sandbox.from_id("local-jupyter:1", token="x")


@pytest.mark.slow
def test_in_the_same_process_it_is_the_same_sandbox(folder: Path) -> None:
    for sandbox in (create(), Sandbox.create("local-eval")):
        again = Sandbox.from_id(sandbox.id)
        again.run_code("x = 1")
        assert sandbox.run_code("x").text == "1"
        assert type(again) is type(sandbox)
        assert again.terminate() is True
        assert sandbox.terminate() is False


@pytest.mark.slow
def test_pickling_carries_the_id_and_reattaches(start_program: StartProgram) -> None:
    with create() as sandbox:
        sandbox.run_code("x = 1")
        assert pickle.loads(pickle.dumps(sandbox)).run_code("x").text == "1"
        assert sandbox.id.encode() in pickle.dumps(sandbox)
        other = start_program()
        assert (
            other.tell(f"""
            import pickle
            print(pickle.loads({pickle.dumps(sandbox)!r}).run_code("x").text)
        """)
            == "1"
        )
        other.close()  # which ends nothing: this program is attached
        assert sandbox.run_code("x").text == "1"
    with pytest.raises(SandboxNotStartedError, match="is terminated"):
        pickle.dumps(sandbox)


@pytest.mark.slow
def test_an_async_sandbox_is_found_pickled_and_detached_too(folder: Path) -> None:
    import asyncio

    async def main() -> None:
        async with AsyncSandbox.create("local-jupyter", isolation="none", tags={"a": "b"}) as sandbox:
            await sandbox.run_code("x = 1")
            again = pickle.loads(pickle.dumps(sandbox))
            assert isinstance(again, AsyncSandbox)
            assert (await again.run_code("x")).text == "1"
            await sandbox.detach()
            assert [each.id for each in await AsyncSandbox.list(tags={"a": "b"})] == [sandbox.id]
        async with await AsyncSandbox.from_id(sandbox.id) as found:
            assert (await found.run_code("x")).text == "1"
            await found.set_timeout(100)
            await found.set_tags({"c": "d"})
            assert found.tags == {"c": "d"}
        assert await AsyncSandbox.list() == []

    asyncio.run(main())


# Detached, and when it ends


@pytest.mark.slow
def test_detach_leaves_it_running_and_says_how_to_reach_it(folder: Path) -> None:
    with create() as sandbox:
        sandbox.detach()
        assert (sandbox.status, sandbox.is_running) == ("detached", False)
        with pytest.raises(SandboxNotStartedError, match=rf"Sandbox.from_id\('{sandbox.id}'\)"):
            sandbox.run_code("1")
        assert (sandbox.terminate(), sandbox.kill()) == (False, False)
    with pytest.raises(SandboxNotStartedError, match="this program detached from it"):
        sandbox.detach()
    assert Sandbox.from_id(sandbox.id).terminate() is True


def test_local_eval_cannot_be_detached_and_goes_on(folder: Path) -> None:
    with Sandbox.create("local-eval") as sandbox:
        with pytest.raises(
            SandboxConfigurationError, match="local-eval cannot detach: the code runs in this"
        ):
            sandbox.detach()
        assert sandbox.run_code("1").text == "1"


@pytest.mark.slow
def test_a_run_goes_on_when_its_program_detaches(start_program: StartProgram) -> None:
    sandbox = create()
    results = []
    ready = threading.Event()
    code = "print('on', flush=True)\nimport time; time.sleep(1.5); done = True"
    run = threading.Thread(
        target=lambda: results.append(sandbox.run_code(code, on_stdout=lambda _: ready.set()))
    )
    run.start()
    assert ready.wait(30)
    sandbox.detach()
    run.join()

    (result,) = results
    assert (result.status, result.stdout, result.state_preserved) == ("connection_lost", "on", True)
    assert result.error is not None
    assert "this program detached from it" in result.error.value
    other = start_program()
    # It waits for its turn, and its time begins when it has it.
    assert (
        other.tell(f"""
        with Sandbox.from_id({sandbox.id!r}) as sandbox:
            result = sandbox.run_code("done", timeout=1)
            print(result.status, result.text)
    """)
        == "ok True"
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", ["max_lifetime", "set_timeout", "idle_timeout"])
def test_a_detached_sandbox_ends_in_time_although_nobody_is_attached(
    start_program: StartProgram, folder: Path, end: str
) -> None:
    program = start_program()
    setting = f"config=SandboxConfig({end}=4)" if end != "set_timeout" else ""
    program.tell(f"""
        sandbox = create({setting})
        sandbox.run_code("x = 1")
        {"sandbox.set_timeout(3)" if end == "set_timeout" else ""}
        sandbox.detach()
    """)
    program.close()
    assert len(sandbox_folders(folder)) == 1
    wait_until(lambda: nothing_is_left_in(folder), seconds=20)


@pytest.mark.slow
def test_set_timeout_can_be_longer_and_shorter_and_is_told_to_all(start_program: StartProgram) -> None:
    with create(config=SandboxConfig(max_lifetime=3)) as sandbox:
        sandbox.set_timeout(1000)
        other = start_program()
        other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r})")
        time.sleep(3.2)  # nothing tells that it does not end
        assert sandbox.run_code("1").text == "1"
        assert sandbox.info.end_at == pytest.approx(time.time() + 999, abs=5)
        other.tell("sandbox.set_timeout(500)")
        wait_until(lambda: sandbox.info.end_at < time.time() + 501)  # type: ignore[operator]  # it has an end
        other.begin("sandbox.set_timeout(0)")
        wait_until(lambda: not sandbox.is_running)
        with pytest.raises(SandboxNotStartedError, match=r"the 0 s that set_timeout\(\) gave it are over"):
            sandbox.run_code("1")


@pytest.mark.not_in_a_container("the folder that is mounted would show the keeper")
@pytest.mark.slow
def test_set_timeout_cuts_a_run_short(folder: Path, make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(config=SandboxConfig(max_lifetime=0))
    assert sandbox.info.end_at is None
    for wrong, kind in ((-1, ValueError), ("1", TypeError), (float("nan"), ValueError)):
        with pytest.raises(kind, match="seconds must be"):
            sandbox.set_timeout(wrong)  # type: ignore[arg-type]  # on purpose
    sandbox.set_timeout(1)
    result = sandbox.run_code("import time\nwhile True: time.sleep(0.01)", timeout=0)
    assert result.status == "interrupted"
    assert result.error is not None
    assert result.error.value == "the sandbox ended: the 1 s that set_timeout() gave it are over"
    wait_until(lambda: not sandbox.is_running)


@pytest.mark.slow
def test_a_sandbox_is_not_idle_while_code_runs_in_it_also_when_nobody_is_attached(
    start_program: StartProgram, folder: Path
) -> None:
    program = start_program()
    program.tell("""
        sandbox = create(config=SandboxConfig(idle_timeout=2))
        for _ in range(5):
            assert sandbox.run_code("import time; time.sleep(0.5); 1").text == "1"
        assert sandbox.run_code("time.sleep(3); 2").text == "2"
        code = "print('on', flush=True); time.sleep(3.5); open('done', 'w').close(); time.sleep(0.5)"
        on = threading.Event()
        run = lambda: sandbox.run_code(code, on_stdout=lambda _: on.set())
        thread = threading.Thread(target=run); thread.start(); on.wait()
        sandbox.detach(); thread.join()
    """)
    program.close()
    (sandbox_folder,) = sandbox_folders(folder)
    wait_until(lambda: (sandbox_folder / "home" / "done").exists(), seconds=20)
    wait_until(lambda: nothing_is_left_in(folder), seconds=20)


@pytest.mark.slow
def test_an_idle_sandbox_ends_and_its_program_is_told(folder: Path) -> None:
    sandbox = create(config=SandboxConfig(idle_timeout=2))
    assert sandbox.run_code("1").text == "1"
    wait_until(lambda: not sandbox.is_running)
    with pytest.raises(SandboxNotStartedError, match=r"is terminated: it was idle for 2 s"):
        sandbox.run_code("1")


@pytest.mark.slow
def test_a_clock_that_jumps_changes_no_deadline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    with create(config=SandboxConfig(max_lifetime=3600)) as sandbox:
        for jump in (86400, -86400):
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
            assert sandbox.info.end_at == pytest.approx(now() + jump + 3600, abs=5)
            assert sandbox.run_code("1 + 1", timeout=20).text == "2"
            assert Sandbox.list()[0].end_at == pytest.approx(now() + jump + 3600, abs=5)


# Two programs on one sandbox


@pytest.mark.slow
def test_without_detach_it_ends_with_the_last_program(start_program: StartProgram, folder: Path) -> None:
    first, second = start_program(), start_program()
    sandbox_id = first.tell("sandbox = create(); sandbox.run_code('x = 1'); print(sandbox.id)")
    second.tell(f"sandbox = Sandbox.from_id({sandbox_id!r})")
    first.close()
    assert second.tell("print(sandbox.run_code('x').text)") == "1"
    second.kill()
    wait_until(lambda: nothing_is_left_in(folder), seconds=5)


@pytest.mark.slow
def test_terminate_ends_it_for_all_and_cuts_their_runs_short(
    start_program: StartProgram, folder: Path
) -> None:
    with create() as sandbox:
        other = start_program()
        other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r}); print(sandbox.run_code('1').text)")
        other.begin("""
            result = sandbox.run_code("print('on', flush=True)\\nimport time; time.sleep(60)",
                                      on_stdout=lambda m: print("on", flush=True))
            print(result.status, result.error.value, sandbox.status)
        """)
        assert other.process.stdout is not None
        assert other.process.stdout.readline() == "on\n"
        assert sandbox.terminate() is True
        assert other.heard() == "interrupted the sandbox ended: it was terminated stopped"


@pytest.mark.slow
def test_runs_of_two_programs_take_turns_and_each_sees_its_own_output(start_program: StartProgram) -> None:
    with create() as sandbox:
        sandbox.run_code("order = []")
        other = start_program()
        other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r}); sandbox.run_code('1')")
        code = "order.append({who!r}); print({who!r}, {i}); import time; time.sleep(0.02); {i}"
        other.begin(
            """
            for i in range(20):
                code = f"order.append('b'); print('b', {i}); time.sleep(0.02); {i}"
                result = sandbox.run_code(code, timeout=1)
                assert (result.status, result.stdout, result.text) == ("ok", f"b {i}", str(i)), result
            print("done")
        """.replace("time.sleep(0.02)", "__import__('time').sleep(0.02)")
        )
        for i in range(20):
            result = sandbox.run_code(code.format(who="a", i=i), timeout=1)
            assert (result.status, result.stdout, result.text) == ("ok", f"a {i}", str(i))
        assert other.heard() == "done"
        order = sandbox.run_code("''.join(order)").text
        assert order is not None
        # While both want it, neither has it twice in a row for long.
        both = order.strip("'")[: order.rindex("a")].strip("b")
        assert "aaa" not in both
        assert "bbb" not in both
        assert not sandbox.background_output.stdout


@pytest.mark.slow
def test_waiting_for_the_other_programs_run_does_not_count_against_the_timeout(
    start_program: StartProgram,
) -> None:
    with create() as sandbox:
        other = start_program()
        other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r}); sandbox.run_code('1')")
        other.begin("""
            result = sandbox.run_code("print(1, flush=True); import time; time.sleep(2); x = 5",
                                      on_stdout=lambda _: print("on", flush=True))
            print(result.status)
        """)
        assert other.process.stdout is not None
        assert other.process.stdout.readline() == "on\n"
        assert sandbox.run_code("x", timeout=1).text == "5"
        assert other.heard() == "ok"


@pytest.mark.slow
def test_a_death_under_one_programs_run_is_told_to_both(start_program: StartProgram) -> None:
    with create() as sandbox:
        sandbox.run_code("x = 1")
        other = start_program()
        assert (
            other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r}); print(sandbox.run_code('x').text)") == "1"
        )
        result = sandbox.run_code("import os; os.kill(os.getpid(), 9)")
        assert (result.status, result.state_preserved) == ("kernel_died", False)
        assert (
            other.tell("""
            result = sandbox.run_code("'x' in globals()")
            print(result.text, result.state_preserved)
            print(sandbox.run_code("y = 2").state_preserved)
        """)
            == "False False\nTrue"
        )
        assert sandbox.run_code("y").text == "2"


@pytest.mark.slow
def test_interrupt_reaches_the_run_of_another_program(start_program: StartProgram) -> None:
    with create() as sandbox:
        assert sandbox.interrupt() is False
        other = start_program()
        other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r}); sandbox.run_code('1')")
        other.begin("print(sandbox.run_code('import time; time.sleep(60)').error.name)")
        wait_until(sandbox.interrupt)
        assert other.heard() == "KeyboardInterrupt"
        assert sandbox.run_code("1").state_preserved


@pytest.mark.slow
def test_what_one_program_changes_the_other_sees(start_program: StartProgram) -> None:
    with create() as sandbox:
        other = start_program()
        other.tell(f"""
            sandbox = Sandbox.from_id({sandbox.id!r})
            sandbox.set_tags({{"a": "b"}})
            sandbox.create_context("theirs"); sandbox.run_code("z = 3", context="theirs")
        """)
        assert sandbox.tags == {"a": "b"}
        assert [context.name for context in sandbox.list_contexts()] == ["default", "theirs"]
        assert sandbox.run_code("z", context="theirs").text == "3"
        with pytest.raises(ValueError, match="there is a context 'theirs' already"):
            sandbox.create_context("theirs")
        sandbox.delete_context("theirs")
        wait_until(lambda: other.tell("print([c.name for c in sandbox.list_contexts()])") == "['default']")


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "1"])
def test_a_program_that_is_killed_leaves_the_kernel_to_the_others(
    start_program: StartProgram, code: str
) -> None:
    with create() as sandbox:
        other = start_program()
        other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r}); sandbox.run_code('1')")
        other.begin(
            f"sandbox.run_code('print(1, flush=True)'); print('on', flush=True); sandbox.run_code({code!r})"
        )
        assert other.process.stdout is not None
        assert other.process.stdout.readline() == "on\n"
        other.kill()
        assert sandbox.run_code("x = 1; x").text == "1"


@pytest.mark.slow
def test_a_second_program_can_attach_while_a_long_run_is_on(start_program: StartProgram) -> None:
    program = start_program()
    sandbox_id = program.tell("sandbox = create(config=SandboxConfig(start_timeout=1)); print(sandbox.id)")
    program.begin("print(sandbox.run_code('import time; time.sleep(3); x = 7').status)")
    with Sandbox.from_id(sandbox_id) as sandbox:
        assert sandbox.run_code("x", timeout=1).text == "7"
        assert program.heard() == "ok"


@pytest.mark.slow
def test_leaving_and_coming_back_does_not_make_two_runs_be_on_at_once(start_program: StartProgram) -> None:
    sandbox = create()
    other = start_program()
    other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r})")
    sandbox.detach()
    with Sandbox.from_id(sandbox.id) as sandbox:
        sandbox.run_code("1")
        other.tell("sandbox.run_code('1')")
        results = []
        ready = threading.Event()
        code = "print(1, flush=True)\nimport time; time.sleep(2.5)"
        run = threading.Thread(
            target=lambda: results.append(sandbox.run_code(code, on_stdout=lambda _: ready.set()))
        )
        run.start()
        assert ready.wait(30)
        assert other.tell("print(sandbox.run_code('1', timeout=1).status)") == "ok"
        run.join()
        assert [result.status for result in results] == ["ok"]


@pytest.mark.slow
def test_a_program_that_is_stopped_does_not_keep_the_others_waiting(start_program: StartProgram) -> None:
    with create() as sandbox:
        other = start_program()
        other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r}); sandbox.run_code('x = 1')")
        process = psutil.Process(other.process.pid)
        process.suspend()
        try:
            assert sandbox.run_code("x", timeout=1).text == "1"
        finally:
            process.resume()
        assert other.tell("print(sandbox.run_code('x').text)") == "1"
        assert sandbox.run_code("x").text == "1"


@pytest.mark.slow
def test_two_threads_that_look_for_a_sandbox_at_once_find_the_same(start_program: StartProgram) -> None:
    other = start_program()
    sandbox_id = other.tell("sandbox = create(); print(sandbox.id)")
    found: list[Sandbox] = []
    threads = [threading.Thread(target=lambda: found.append(Sandbox.from_id(sandbox_id))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sandbox in found:
        assert sandbox.run_code("import os; os._exit(1)").status == "kernel_died"
    assert found[0].terminate() is True
    assert [sandbox.is_running for sandbox in found] == [False] * 4


@pytest.mark.slow
def test_who_looks_for_a_sandbox_that_is_ending_does_not_keep_it_from_that(folder: Path) -> None:
    for _ in range(10):
        sandbox = create()
        ending = threading.Thread(target=sandbox.terminate)
        ending.start()
        wait_until(lambda sandbox=sandbox: not sandbox.is_running)  # type: ignore[misc]
        with contextlib.suppress(SandboxNotFoundError):
            Sandbox.from_id(sandbox.id)
        ending.join(20)
        assert not ending.is_alive()


@pytest.mark.slow
def test_from_id_and_detach_that_are_cancelled_leave_no_doubt(start_program: StartProgram) -> None:
    import asyncio

    other = start_program()
    sandbox_id = other.tell("sandbox = create(); print(sandbox.id)")

    async def main() -> None:
        finding = asyncio.ensure_future(AsyncSandbox.from_id(sandbox_id))
        await asyncio.sleep(0)
        finding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finding
        other.close()
        for _ in range(1000):
            if not await AsyncSandbox.list():
                break
            await asyncio.sleep(0.01)
        assert await AsyncSandbox.list() == []

        sandbox = await AsyncSandbox.create("local-jupyter", isolation="none")
        detaching = asyncio.ensure_future(sandbox.detach())
        await asyncio.sleep(0)
        detaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await detaching
        assert sandbox.status == "detached"
        async with await AsyncSandbox.from_id(sandbox.id) as found:
            assert (await found.run_code("1")).text == "1"

    asyncio.run(main())


@pytest.mark.slow
def test_a_sandbox_whose_directory_is_gone_can_be_attached_to(
    start_program: StartProgram, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    program = start_program()
    config = f"SandboxConfig(working_dir={str(tmp_path / 'work')!r})"
    sandbox_id = program.tell(
        f"sandbox = create(config={config}); sandbox.run_code('x = 1'); print(sandbox.id)"
    )
    shutil.rmtree(tmp_path / "work")
    with Sandbox.from_id(sandbox_id) as sandbox:
        assert sandbox.run_code("x").text == "1"
        assert sandbox.config.working_dir == str(tmp_path / "work")


@pytest.mark.slow
def test_nobody_listens_any_more_when_all_has_ended(folder: Path) -> None:
    sandbox = create()
    for _ in range(3):
        sandbox.detach()
        sandbox = Sandbox.from_id(sandbox.id)
        assert sandbox.run_code("1").text == "1"
    sandbox.terminate()
    wait_until(lambda: client.the_keeper(folder)._listeners == {})


@pytest.mark.slow
def test_who_attaches_under_a_run_that_kills_the_kernel_gets_the_next_one(
    start_program: StartProgram,
) -> None:
    program = start_program()
    sandbox_id = program.tell("sandbox = create(); print(sandbox.id)")
    program.begin("print(sandbox.run_code('import os, time; time.sleep(1.5); os._exit(1)').status)")
    with Sandbox.from_id(sandbox_id) as sandbox:
        result = sandbox.run_code("1 + 1")
        assert (result.status, result.text, result.state_preserved) == ("ok", "2", False)
        assert program.heard() == "kernel_died"


@pytest.mark.slow
def test_a_context_that_was_deleted_does_not_come_back(start_program: StartProgram) -> None:
    with create() as sandbox:
        other = start_program()
        other.tell(f"sandbox = Sandbox.from_id({sandbox.id!r})")
        for i in range(5):
            other.tell(f"sandbox.create_context('c{i}')")
            wait_until(lambda i=i: f"c{i}" in [each.name for each in sandbox.list_contexts()])  # type: ignore[misc]
            other.begin(f"sandbox.delete_context('c{i}')")
            with contextlib.suppress(ContextNotFoundError):
                sandbox.run_code("1", context=f"c{i}")
            other.heard()
        wait_until(lambda: [each.name for each in sandbox.list_contexts()] == ["default"])
        assert other.tell("print([each.name for each in sandbox.list_contexts()])") == "['default']"
        assert Sandbox.list()[0].metadata["kernels"] == 1


@pytest.mark.slow
def test_after_the_keeper_s_death_the_lifetime_ends_all_the_same(folder: Path) -> None:
    sandbox = create(config=SandboxConfig(max_lifetime=2))
    keeper_of(folder).kill()
    wait_until(lambda: not sandbox.is_running, seconds=10)
    with pytest.raises(SandboxNotStartedError, match="its max_lifetime of 2 s"):
        sandbox.set_tags({})


@pytest.mark.slow
def test_large_messages_of_the_code_are_nothing_to_the_keeper(folder: Path) -> None:
    with create(config=SandboxConfig(idle_timeout=100)) as sandbox:
        before = keeper_of(folder).memory_info().rss
        code = "display({'text/plain': 'x' * 50_000_000}, raw=True)\n" * 3
        assert sandbox.run_code(code).success
        assert keeper_of(folder).memory_info().rss < before + 70 * 1024**2


@pytest.mark.slow
def test_a_kernel_that_died_is_idle(folder: Path) -> None:
    sandbox = create(config=SandboxConfig(idle_timeout=2))
    assert sandbox.run_code("import os, time; time.sleep(3); os._exit(1)").status == "kernel_died"
    wait_until(lambda: not sandbox.is_running, seconds=15)


PUBLISH = """
    def publish(msg_type, content, parent={}):
        kernel = get_ipython().kernel
        kernel.session.send(kernel.iopub_socket, msg_type, content, parent=parent)
    def processes(data, comm_id="code_sandboxes.processes"):
        publish("comm_msg", {"comm_id": comm_id, "data": data})
    import threading, time
"""


def publish(sandbox: Sandbox, then: str) -> None:
    sandbox.run_code(textwrap.dedent(PUBLISH) + textwrap.dedent(then)).raise_for_status()


@pytest.mark.slow
def test_a_sandbox_is_not_idle_while_commands_run_in_it(folder: Path) -> None:
    sandbox = create(config=SandboxConfig(idle_timeout=3))
    begin = time.monotonic()
    publish(
        sandbox,
        """
        processes({"status": "running", "processes": 1})
        threading.Timer(4, processes, [{"status": "none", "processes": 0}]).start()
        """,
    )
    wait_until(lambda: not sandbox.is_running)
    assert time.monotonic() > begin + 7
    with pytest.raises(SandboxNotStartedError, match=r"it was idle for 3 s"):
        sandbox.run_code("1")


@pytest.mark.slow
def test_commands_keep_a_sandbox_only_as_long_as_their_kernel_lives(folder: Path) -> None:
    sandbox = create(config=SandboxConfig(idle_timeout=2))
    publish(sandbox, 'processes({"status": "running", "processes": 1})')
    sandbox.create_context("other")
    assert sandbox.run_code("import os; os._exit(1)").status == "kernel_died"
    wait_until(lambda: not sandbox.is_running, seconds=15)


@pytest.mark.slow
def test_nonsense_about_commands_keeps_no_sandbox(folder: Path) -> None:
    sandbox = create(config=SandboxConfig(idle_timeout=2))
    publish(
        sandbox,
        """
        processes({"status": "running", "processes": 1}, "another")
        for nonsense in (
            {"status": "none", "processes": 1},
            {"status": ["running"], "processes": 1},
            {"status": "running"},
            {"status": "running", "processes": 0},
            {"status": "running", "processes": True},
            {"status": "running", "processes": "1"},
            ["status", "running"],
            "status",
        ):
            processes(nonsense)
        """,
    )
    wait_until(lambda: not sandbox.is_running, seconds=15)


@pytest.mark.slow
@pytest.mark.parametrize("msg_type", ["comm_open", "comm_msg"])
def test_calls_count_as_use(folder: Path, msg_type: str) -> None:
    sandbox = create(config=SandboxConfig(idle_timeout=3))
    begin = time.monotonic()
    publish(
        sandbox,
        f"""
        def call(times):
            publish("status", {{"execution_state": "busy"}}, {{"header": {{"msg_type": "{msg_type}"}}}})
            if times > 1:
                threading.Timer(0.5, call, [times - 1]).start()
        call(8)
        """,
    )
    wait_until(lambda: not sandbox.is_running)
    assert time.monotonic() > begin + 3.5 + 3


# What is killed


@pytest.mark.slow
@pytest.mark.parametrize(
    "then",
    [
        "print('go', flush=True); time.sleep(600)",
        "print('go', flush=True); sandbox.run_code('while True: print(1)', timeout=0)",
        "print('go', flush=True)\nwhile True: create().terminate()",
        "[sandbox.create_context() for _ in range(3)]; print('go', flush=True); sandbox.terminate()",
    ],
    ids=["idle", "runs code", "creates and terminates", "terminates"],
)
def test_a_killed_program_leaves_nothing(start_program: StartProgram, folder: Path, then: str) -> None:
    program = start_program()
    program.tell(
        'sandbox = create(); sandbox.run_code(\'import subprocess; subprocess.Popen(["sleep", "600"])\')'
    )
    program.begin(then)
    assert program.process.stdout is not None
    program.process.stdout.readline()
    time.sleep(random.random() / 50)
    program.kill()
    wait_until(lambda: nothing_is_left_in(folder), seconds=5)


@pytest.mark.slow
def test_a_killed_keeper_takes_the_kernels_along_and_is_told(folder: Path) -> None:
    with create(tags={"a": "b"}, config=SandboxConfig(max_lifetime=1000)) as sandbox:
        sandbox.run_code("x = 1; import subprocess; subprocess.Popen(['sleep', '600'])")
        sandbox.create_context("other")
        (sandbox_folder,) = sandbox_folders(folder)
        kernels = kernels_of(folder)
        assert len(kernels) == 2
        children = [child for kernel in kernels for child in kernel.children()]
        keeper_of(folder).kill()
        wait_until(lambda: not any(process.is_running() for process in (*kernels, *children)), seconds=5)
        wait_until(lambda: not sandbox_folder.parent.exists(), seconds=5)

        result = sandbox.run_code("x")
        assert (result.status, result.state_preserved) == ("kernel_died", False)
        assert result.error is not None
        assert result.error.value.startswith("the keeper of local kernels is gone")
        result = sandbox.run_code("'x' in globals()")
        assert (result.status, result.text) == ("ok", "False")
        assert [each.id for each in Sandbox.list(tags={"a": "b"})] == [sandbox.id]
        assert sandbox.info.end_at == pytest.approx(time.time() + 1000, abs=20)
        assert Sandbox.list()[0].end_at == pytest.approx(time.time() + 1000, abs=20)
        assert sandbox.run_code("1", context="other").status == "kernel_died"
        assert sandbox.run_code("1", context="other").text == "1"


@pytest.mark.slow
def test_a_keeper_killed_under_a_run_is_told_by_that_run(folder: Path) -> None:
    with create() as sandbox:
        result = sandbox.run_code(
            "print('on', flush=True); import time; time.sleep(60)",
            on_stdout=lambda _: keeper_of(folder).kill(),
        )
        assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "on", False)
        assert result.error is not None
        assert result.error.value.startswith("the keeper of local kernels is gone")
        assert sandbox.run_code("1").text == "1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        lambda sandbox: sandbox.set_tags({"c": "d"}),
        lambda sandbox: sandbox.set_timeout(100),
        lambda sandbox: sandbox.create_context("more"),
        lambda sandbox: sandbox.restart(),
        lambda sandbox: sandbox.interrupt(),
        lambda sandbox: sandbox.terminate(),
    ],
    ids=["set_tags", "set_timeout", "create_context", "restart", "interrupt", "terminate"],
)
def test_whatever_is_called_after_the_keeper_was_killed_works(
    folder: Path, use: Callable[[Sandbox], object]
) -> None:
    with create() as sandbox:
        keeper = keeper_of(folder)
        keeper.kill()
        keeper.wait()
        use(sandbox)
        if sandbox.is_running:
            wait_until(lambda: sandbox.run_code("1").text == "1")


def test_what_was_detached_is_gone_with_its_keeper(folder: Path) -> None:
    sandbox = create()
    sandbox.detach()
    keeper_of(folder).kill()
    wait_until(lambda: nothing_is_left_in(folder), seconds=5)
    with pytest.raises(SandboxNotFoundError):
        Sandbox.from_id(sandbox.id)


@pytest.mark.slow
def test_a_keeper_that_is_asked_to_end_ends_everything_first(folder: Path) -> None:
    sandbox = create()
    other = create()
    other.detach()
    keeper = keeper_of(folder)
    keeper.terminate()
    keeper.wait(10)
    assert nothing_is_left_in(folder)
    wait_until(lambda: not sandbox.is_running)
    with pytest.raises(SandboxNotStartedError, match="its keeper was ended"):
        sandbox.run_code("1")


@pytest.mark.slow
def test_program_and_keeper_killed_at_once_20_times_leave_nothing(
    start_program: StartProgram, folder: Path
) -> None:
    for i in range(20):
        program = start_program()
        program.begin("""
            print('go', flush=True)
            while True:
                with create() as sandbox:
                    sandbox.run_code("import subprocess; subprocess.Popen(['sleep', '600'])")
        """)
        assert program.process.stdout is not None
        program.process.stdout.readline()
        wait_until(lambda i=i: len(processes_of(folder)) > 1 or i % 5 == 0)  # type: ignore[misc]
        time.sleep(random.random() / 2)
        for process in processes_of(folder):
            if is_keeper(process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        program.kill()
        wait_until(lambda: nothing_is_left_in(folder), seconds=5)


@pytest.mark.slow
def test_keeper_and_watcher_killed_at_once_are_cleaned_up_after_by_the_next_keeper(folder: Path) -> None:
    sandbox = create()
    sandbox.run_code("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    (kernel,) = kernels_of(folder)
    keeper = keeper_of(folder)
    watchers = [child for child in keeper.children() if "reaper.py" in " ".join(child.cmdline())]
    kernel.suspend()  # so that it does not notice by itself
    for process in (*watchers, keeper):
        process.suspend()
    for process in (*watchers, keeper):
        process.kill()
    wait_until(lambda: not keeper.is_running() or keeper.status() == psutil.STATUS_ZOMBIE)
    assert kernel.is_running()
    with create() as another:
        assert another.run_code("1").text == "1"
        wait_until(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, seconds=5)
        assert len(sandbox_folders(folder)) == 1
    sandbox.terminate()


# Many at once


@pytest.mark.slow
def test_100_creates_from_4_programs_at_once(start_program: StartProgram, folder: Path) -> None:
    programs = [start_program() for _ in range(4)]
    for program in programs:
        program.begin("""
            from concurrent.futures import ThreadPoolExecutor
            def work(i):
                with create() as sandbox:
                    return sandbox.run_code(f"{i} * 2").text
            with ThreadPoolExecutor(25) as pool:
                print(list(pool.map(work, range(25))) == [str(i * 2) for i in range(25)])
        """)
    assert [program.heard() for program in programs] == ["True"] * 4
    for program in programs:
        program.close()


@pytest.mark.slow
def test_programs_that_start_at_once_start_one_keeper(start_program: StartProgram, folder: Path) -> None:
    programs = [start_program() for _ in range(4)]
    for program in programs:
        program.begin("sandbox = create(); print(sandbox.run_code('1').text)")
    assert [program.heard() for program in programs] == ["1"] * 4
    keeper_of(folder)  # there is one


# Folders, sockets, processes and versions that are not as they should be


@pytest.mark.slow
def test_a_stale_socket_is_no_keeper(folder: Path) -> None:
    for name in ("k2-0000", "k2-zzzz"):
        (folder / name).mkdir(mode=0o700, parents=True)
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(folder / name / "s"))
    folder.chmod(0o700)
    with create() as sandbox:
        assert sandbox.run_code("1").text == "1"
        assert not (folder / "k2-0000").exists()


@pytest.mark.slow
def test_a_keeper_that_does_not_answer_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PATIENCE", 0.5)
    with create() as sandbox:
        keeper = keeper_of(folder)
        keeper.suspend()
        try:
            with pytest.raises(SandboxConnectionError, match=r"does not answer; its log is .*keeper\.log"):
                sandbox.set_tags({"a": "b"})
            with pytest.raises(SandboxConnectionError, match="does not answer"):
                create()
        finally:
            keeper.resume()
        wait_until(lambda: sandbox.run_code("1").text == "1")


@pytest.mark.slow
def test_a_run_ends_in_time_although_the_keeper_is_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_STALLED", 1.0)
    with create(config=SandboxConfig(interrupt_grace=0.5)) as sandbox:
        keeper = keeper_of(folder)
        try:
            result = sandbox.run_code(
                "print(1, flush=True)\nwhile True: pass", timeout=1, on_stdout=lambda _: keeper.suspend()
            )
        finally:
            keeper.resume()
        assert (result.status, result.state_preserved) == ("timed_out", False)


@pytest.mark.slow
def test_what_takes_long_to_remove_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create() as neighbour, create() as sandbox:
        neighbour.run_code("x = 1")
        sandbox.run_code(
            "for d in range(10):\n    import os; os.mkdir(str(d))\n"
            "    for i in range(1000): open(f'{d}/{i}', 'w').close()"
        )
        monkeypatch.setattr(client, "_PATIENCE", 0.02)
        assert sandbox.terminate() is True
        assert neighbour.run_code("x").text == "1"


@pytest.mark.slow
def test_what_is_too_much_for_the_keeper_is_refused_before_it_is_sent(folder: Path) -> None:
    with create() as sandbox:
        with pytest.raises(
            ValueError, match="are too much for the keeper of local kernels: it takes 16777216"
        ):
            sandbox.set_tags({"a": "x" * 17_000_000})
        assert sandbox.tags == {}
        assert sandbox.run_code("1").text == "1"


@pytest.mark.slow
def test_who_creates_while_the_keeper_is_ending_gets_another_one(folder: Path) -> None:
    first = create()
    for _ in range(3):
        max(filter(is_keeper, processes_of(folder)), key=lambda keeper: keeper.create_time()).terminate()
        with contextlib.suppress(SandboxNotStartedError):  # it was there just before
            create().terminate()
        sandbox = create()
        assert sandbox.run_code("1").text == "1"
        sandbox.terminate()
        sandbox = create()
    assert not first.is_running
    sandbox.terminate()


@pytest.mark.slow
def test_a_process_that_is_not_the_one_that_connected_is_refused(folder: Path) -> None:
    with create():
        (path,) = folder.glob("k2-*/s")
        for began, served in ((lines.start_time(os.getpid()), True), ("another-1", False)):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.sendall(lines.as_line({"id": 1, "verb": "hello", "began": began}))
                connection.sendall(lines.as_line({"id": 2, "verb": "list"}))
                answers = connection.makefile("rb")
                assert (b"is not the one that connected" not in answers.readline()) is served
                assert (b"sandboxes" in answers.readline()) is served


@pytest.mark.slow
@pytest.mark.parametrize(
    "nonsense",
    [b"{}\n", b"[]\n", b"\xff\n", b'{"id": 1, "verb": "no"}\n', b"x" * 100_000, b"[" * 100_000 + b"\n"],
)
def test_nonsense_harms_nobody_but_who_says_it(folder: Path, nonsense: bytes) -> None:
    with create() as sandbox:
        (path,) = folder.glob("k2-*/s")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                continue
        assert sandbox.run_code("1").text == "1"


@pytest.mark.slow
def test_a_runtime_folder_without_room_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted_tmpfs(tmp_path / "s", "size=16k,nr_inodes=3,mode=700") as small:
        monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(small))
        with pytest.raises(
            SandboxConfigurationError, match=r"No space left on device.*CODE_SANDBOXES_RUNTIME_DIR"
        ):
            create()
        assert_nothing_is_left_in(small)
    with mounted_tmpfs(tmp_path / "m", "size=200k,nr_inodes=9,mode=700") as more:
        monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(more))
        with pytest.raises(
            (SandboxConfigurationError, SandboxConnectionError), match=r"No space left on device"
        ):
            create()
        assert_nothing_is_left_in(more)


@pytest.mark.slow
def test_a_runtime_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted_tmpfs(tmp_path / "r", "ro,mode=700") as read_only:
        monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(read_only))
        with pytest.raises(
            SandboxConfigurationError, match=r"Read-only file system.*CODE_SANDBOXES_RUNTIME_DIR"
        ):
            create()


@contextlib.contextmanager
def mounted_tmpfs(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounting.returncode:
        pytest.skip(f"cannot mount: {mounting.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.slow
def test_another_user_can_neither_list_attach_interrupt_nor_read_anything(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with create() as sandbox:
        (path,) = folder.glob("k2-*/s")
        attempts = f"""
            import os, signal, socket, sys
            path, pid = sys.argv[1], int(sys.argv[2])
            def attempt(function):
                try: function(); print("done")
                except PermissionError: print("refused")
            attempt(lambda: os.listdir({str(folder)!r}))
            attempt(lambda: socket.socket(socket.AF_UNIX).connect(path))
            attempt(lambda: open(os.path.dirname(path) + "/1/2/connection.json").read())
            attempt(lambda: os.kill(pid, signal.SIGINT))
            attempt(lambda: open(f"/proc/{{pid}}/environ").read())
        """
        tried = subprocess.run(
            [
                "/usr/bin/env",
                "python3",
                "-c",
                textwrap.dedent(attempts),
                str(path),
                str(kernels_of(folder)[0].pid),
            ],
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert tried.stdout.split() == ["refused"] * 5, tried.stderr
        # Even if they could enter the folder, the keeper would not serve them.
        told = connect_as(65534, path)
        assert told == b""
        assert sandbox.run_code("1").text == "1"


def connect_as(user: int, path: Path) -> bytes:
    """What the keeper answers to that user, who reaches the socket by a way that root has opened."""
    here = os.open(path.parent, os.O_PATH)
    program = (
        "import os, socket, sys\n"
        "os.setgroups([])\n"
        "here, user = int(sys.argv[1]), int(sys.argv[2])\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        "os.fchdir(here); os.setresuid(user, user, 0)\n"
        "connection.connect('s')\n"
        'connection.sendall(b\'{"id": 1, "verb": "list"}\\n\')\n'
        "sys.stdout.buffer.write(connection.recv(1000))\n"
    )
    folders = [path.parent, path.parent.parent]
    modes = [folder.stat().st_mode for folder in folders]
    try:
        for folder in folders:
            folder.chmod(0o777)
        path.chmod(0o777)
        tried = subprocess.run(
            [sys.executable, "-c", program, str(here), str(user)],
            pass_fds=[here],
            capture_output=True,
            check=False,
        )
    finally:
        for folder, mode in zip(folders, modes, strict=True):
            folder.chmod(mode)
        os.close(here)
    assert b"PermissionError" not in tried.stderr
    return tried.stdout


@pytest.mark.slow
def test_a_library_that_speaks_another_protocol_has_a_keeper_beside(
    start_program: StartProgram, folder: Path
) -> None:
    newer = start_program()
    newer.tell("""
        import code_sandboxes.keeper.client as client, code_sandboxes.keeper.lines as lines
        client.PROTOCOL = lines.PROTOCOL = 3
        client._START = client._START.replace(
            "from code_sandboxes.keeper.server", "import code_sandboxes.keeper.lines as l; l.PROTOCOL = 3;"
            " from code_sandboxes.keeper.server")
    """)
    with create() as ours:
        theirs = newer.tell("sandbox = create(); print(sandbox.id, sandbox.run_code('1').text)").split()
        assert theirs[1] == "1"
        assert sorted(path.name[:3] for path in folder.glob("k*-*")) == ["k2-", "k3-"]
        assert [each.id for each in Sandbox.list()] == [ours.id]
        assert newer.tell("print([each.id for each in Sandbox.list()] == [sandbox.id])") == "True"
        with pytest.raises(SandboxNotFoundError, match="another version of code_sandboxes"):
            Sandbox.from_id(theirs[0])
        newer.close()
        wait_until(lambda: not list(folder.glob("k3-*")), seconds=5)
        assert ours.run_code("1").text == "1"


@pytest.mark.slow
def test_the_log_is_bounded_and_nobody_elses(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True)
    program = (
        "import logging, sys; from pathlib import Path; from code_sandboxes.keeper import server\n"
        "server._LOG_SIZE = 1000; server._write_log(Path(sys.argv[1]))\n"
        "for i in range(1000): logging.getLogger('code_sandboxes').info('line %d', i)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    logs = sorted(folder.glob("keeper.log*"))
    assert [path.name for path in logs] == ["keeper.log", "keeper.log.1"]
    assert sum(path.stat().st_size for path in logs) < 2100
    assert "line 999" in logs[0].read_text()
    assert all(path.stat().st_mode & 0o077 == 0 for path in logs)


@pytest.mark.slow
def test_a_keeper_whose_folder_is_removed_ends(folder: Path) -> None:
    with create():
        keeper = keeper_of(folder)
        shutil.rmtree(folder)
    client.the_keeper(folder).close()
    keeper.wait(10)


@pytest.mark.slow
def test_a_keeper_ends_when_it_has_nothing_to_keep_although_its_program_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_LINGER", 0.1)
    with create():
        keeper = keeper_of(folder)
    keeper.wait(10)
    with create() as sandbox:
        assert sandbox.run_code("1").text == "1"
