"""A sandbox that is paused does nothing, and goes on as if nothing had been."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from code_sandboxes import (
    ExecutionResult,
    InputRequest,
    Sandbox,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxNotStartedError,
)
from conftest import MakeSandbox, wait_until

IN_A_CONTAINER = True

ISOLATED = True
EVERY_FRONT = ("blocking", "async")

# Counts in a file ten times a second, for a minute.
COUNTING = """
import time
for i in range(600):
    open('count', 'w').write(str(i))
    time.sleep(0.1)
"""


def written(sandbox: Sandbox) -> list[float]:
    """When the files were that are written all the time."""
    return [sandbox.files.get_info(name).modified for name in ("count", "stamp")]


class Runs:
    """A run in a thread of its own."""

    def __init__(self, run: Callable[[], ExecutionResult]) -> None:
        self._results: list[ExecutionResult] = []
        self._thread = threading.Thread(target=lambda: self._results.append(run()))
        self._thread.start()

    @property
    def is_on(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> ExecutionResult:
        self._thread.join(60)
        return self._results[0]


@pytest.mark.needs("pause")
def test_nothing_goes_on_while_it_is_paused_and_everything_afterwards(sandbox: Sandbox) -> None:
    sandbox.run_code("x = {'kept': 1}")
    other = sandbox.create_context("other")
    running = Runs(lambda: sandbox.run_code(COUNTING, context=other))
    command = sandbox.commands.spawn("while true; do date +%s%N > stamp; sleep 0.05; done")
    wait_until(lambda: sandbox.files.exists("count") and sandbox.files.exists("stamp"))
    sandbox.pause()
    began = time.time()
    assert (sandbox.status, sandbox.is_running) == ("paused", False)
    time.sleep(0.5)  # in which something would have happened
    resumed = time.time()
    sandbox.resume()

    assert (sandbox.status, sandbox.is_running) == ("running", True)
    assert sandbox.run_code("x['kept']").text == "1"
    assert not any(began < when < resumed for when in written(sandbox))
    wait_until(lambda: all(when > resumed for when in written(sandbox)))
    command.kill()
    sandbox.interrupt()
    sandbox.delete_context(other)
    assert running.result().status in ("interrupted", "error")


@pytest.mark.needs("pause")
def test_the_time_does_not_count_against_the_timeout_of_a_run(sandbox: Sandbox) -> None:
    started = threading.Event()
    code = "print('on', flush=True)\nimport time\nfor _ in range(10): time.sleep(0.05)\n'done'"
    running = Runs(lambda: sandbox.run_code(code, timeout=2, on_stdout=lambda _: started.set()))
    assert started.wait(30)
    sandbox.pause()
    time.sleep(2.5)  # longer than the timeout
    assert running.is_on
    sandbox.resume()

    assert (running.result().status, running.result().text) == ("ok", "'done'")


@pytest.mark.needs("pause")
@pytest.mark.one_front
def test_a_question_is_answered_after_a_pause(sandbox: Sandbox) -> None:
    asked, may_answer = threading.Event(), threading.Event()

    def answer(_: InputRequest) -> str:
        asked.set()
        may_answer.wait(30)
        return "yes"

    running = Runs(lambda: sandbox.run_code("input('?')", on_input=answer, timeout=5))
    assert asked.wait(30)
    sandbox.pause()
    may_answer.set()
    sandbox.resume()
    assert running.result().text == "'yes'"


@pytest.mark.needs("pause")
def test_whoever_uses_it_meanwhile_is_told_to_resume(sandbox: Sandbox) -> None:
    sandbox.pause()
    sandbox.pause()
    for use in (
        lambda: sandbox.run_code("1"),
        lambda: sandbox.files.read("x"),
        lambda: sandbox.commands.run("true"),
        lambda: sandbox.get_variable("x"),
        lambda: sandbox.create_context(),
    ):
        with pytest.raises(SandboxNotStartedError, match=r"is paused: call resume\(\)"):
            use()
    sandbox.set_timeout(1000)
    sandbox.set_tags({"a": "b"})
    assert [info.status for info in Sandbox.list(tags={"a": "b"})] == ["paused"]
    sandbox.resume()
    sandbox.resume()
    assert sandbox.run_code("1 + 1").text == "2"


@pytest.mark.needs("pause")
@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_it_can_be_ended_while_it_is_paused(sandbox: Sandbox, end: str) -> None:
    sandbox.run_code("x = 1")
    sandbox.pause()
    assert getattr(sandbox, end)() is True
    assert sandbox.status == "stopped"


@pytest.mark.needs("pause")
@pytest.mark.one_front
def test_its_lifetime_ends_it_although_it_is_paused(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(config=SandboxConfig(max_lifetime=0))
    sandbox.pause()
    sandbox.set_timeout(0.3)
    wait_until(lambda: sandbox.status == "stopped")


@pytest.mark.parametrize("settings", [{"variant": "local-eval"}, {"isolation": "none"}], ids=str)
def test_what_cannot_be_paused_says_so(settings: dict[str, str]) -> None:
    with Sandbox.create(**settings) as sandbox:  # type: ignore[arg-type]  # by name
        assert not sandbox.capabilities.pause
        with pytest.raises(SandboxConfigurationError, match="cannot pause: "):
            sandbox.pause()
        assert sandbox.run_code("1 + 1").text == "2"
