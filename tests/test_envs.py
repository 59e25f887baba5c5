"""Environment variables for one run: they hold until it ends, however it ends, and leave no trace."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from code_sandboxes import ExecutionStatus, Sandbox, SandboxConfigurationError
from conftest import MakeSandbox

ISOLATED = True
FAST_VARIANT = "local-jupyter"
EVERY_FRONT = ("blocking", "async")
IN_A_CONTAINER = True
ON_A_SERVER = True
AT_DATALAYER = True

needs_environment = pytest.mark.needs("environment")

SHOW = "import os; print(os.environ.get('GREETING'))"


def is_restored(sandbox: Sandbox) -> bool:
    return sandbox.run_code(SHOW).stdout == "None"


@needs_environment
def test_they_hold_for_one_run_and_for_what_it_starts(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(SHOW + "\n!echo $GREETING", envs={"GREETING": "h\u00e9 =;'\n"})
    assert result.stdout == "h\u00e9 =;'\n\nh\u00e9 =;'"
    assert is_restored(shared_sandbox)


@needs_environment
def test_what_was_there_before_is_there_again(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(env={"GREETING": "first"})
    code = SHOW + "; os.environ['GREETING'] = 'third'; del os.environ['HOME']"
    assert sandbox.run_code(code, envs={"GREETING": "second", "HOME": "/"}).stdout == "second"
    assert sandbox.run_code(SHOW + "; print('HOME' in os.environ)").stdout == "first\nTrue"


@needs_environment
def test_what_the_code_sets_itself_stays(shared_sandbox: Sandbox) -> None:
    shared_sandbox.run_code("import os; os.environ['OWN'] = 'set'", envs={"GREETING": "hello"})
    assert shared_sandbox.run_code("os.environ.pop('OWN')").text == "'set'"


@needs_environment
@pytest.mark.parametrize("value", ["", "\udcff", "\u4e2d"], ids=ascii)
def test_any_value_arrives_as_it_is(shared_sandbox: Sandbox, value: str) -> None:
    result = shared_sandbox.run_code("ascii(os.environ['GREETING'])", envs={"GREETING": value})
    assert result.text == repr(ascii(value))


@needs_environment
@pytest.mark.parametrize(
    ("code", "status"),
    [("1 / 0", "error"), ("import sys; sys.exit(3)", "exited"), ("def", "error")],
    ids=["error", "exit", "syntax"],
)
def test_they_are_restored_after_a_failure(shared_sandbox: Sandbox, code: str, status: str) -> None:
    assert shared_sandbox.run_code(code, envs={"GREETING": "hello"}).status == status
    assert is_restored(shared_sandbox)


@needs_environment
@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "await __import__('asyncio').sleep(60)"])
def test_they_are_restored_after_a_time_out(shared_sandbox: Sandbox, code: str) -> None:
    result = shared_sandbox.run_code(code, envs={"GREETING": "hello"}, timeout=0.1)
    assert result.status is ExecutionStatus.TIMED_OUT
    assert result.state_preserved
    assert is_restored(shared_sandbox)


@needs_environment
@pytest.mark.callbacks
def test_they_are_restored_after_an_interrupt(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "print('begun', flush=True)\nimport time\ntime.sleep(60)",
        envs={"GREETING": "hello"},
        on_stdout=lambda _: shared_sandbox.interrupt(),
    )
    assert result.status is ExecutionStatus.INTERRUPTED
    assert is_restored(shared_sandbox)


@needs_environment
def test_the_source_stays_as_it_is(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code("x = 1\n1 / 0", envs={"GREETING": "hello"})
    assert result.error is not None
    assert "line 2" in "".join(result.error.traceback)
    assert "GREETING" not in "".join(result.error.traceback)
    cell = "%%capture caught\nimport os; print(os.environ['GREETING'])"
    assert shared_sandbox.run_code(cell, envs={"GREETING": "hello"}).success
    assert shared_sandbox.run_code("caught.stdout").text == r"'hello\n'"


@needs_environment
def test_awaiting_code_has_them_to_its_end(shared_sandbox: Sandbox) -> None:
    code = "import asyncio; await asyncio.sleep(0.01); " + SHOW
    assert shared_sandbox.run_code(code, envs={"GREETING": "hello"}).stdout == "hello"


@needs_environment
def test_none_and_an_empty_mapping_change_nothing(shared_sandbox: Sandbox) -> None:
    assert shared_sandbox.run_code(SHOW, envs={}).stdout == "None"
    assert shared_sandbox.run_code(SHOW, envs=None).stdout == "None"


@pytest.mark.parametrize(
    ("envs", "error", "sentence"),
    [
        ({"": "x"}, ValueError, "envs has a variable ''"),
        ({"A=B": "x"}, ValueError, "envs has a variable 'A=B'"),
        ({"A\0": "x"}, ValueError, "envs has a variable"),
        ({"A": "x\0"}, ValueError, "envs has a NUL in the value of 'A'"),
        ({"A": 1}, TypeError, "envs must map str to str, not int"),
        ({1: "A"}, TypeError, "envs must map str to str, not int"),
        (["A=1"], TypeError, "envs must be a mapping, not list"),
        ({"A": "\ud800"}, ValueError, "cannot be encoded"),
    ],
)
def test_what_is_no_environment_is_refused(
    shared_sandbox: Sandbox, envs: dict[str, str], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        shared_sandbox.run_code("1", envs=envs)


def test_a_variant_without_an_environment_of_its_own_refuses_them(variant: str, front: str) -> None:
    if Sandbox.capabilities_of(variant).environment:
        return
    with (
        Sandbox.create(variant) as sandbox,
        pytest.raises(SandboxConfigurationError, match=r"cannot set environment variables for one run"),
    ):
        sandbox.run_code("ran = 1", envs={"A": "1"})


@pytest.mark.needs("languages.bash")
@pytest.mark.slow
def test_another_language_refuses_them(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxConfigurationError, match=r"envs= is for Python, and the context"):
        sandbox.run_code("echo $A", language="bash", envs={"A": "1"})


@pytest.mark.not_in_a_container("it runs its image's kernel")
@pytest.mark.needs("own_process")
def test_a_kernel_that_would_leave_them_out_does_not_run_the_code(
    make_sandbox: MakeSandbox, install_kernel: Callable[..., str], variant: str
) -> None:
    # Started in a way that brings no guest along.
    program = "import sys; sys.argv[0] = 'x'; from ipykernel.kernelapp import launch_new_instance as go; go()"
    argv = [sys.executable, "-c", program, "-f", "{connection_file}"]
    sandbox = make_sandbox(kernel_name=install_kernel("bare", argv, language="python"))
    result = sandbox.run_code("ran = 1", envs={"A": "1"})
    assert result.status is ExecutionStatus.ABORTED
    assert result.error is not None
    assert "cannot set environment variables for one run" in result.error.value
    assert sandbox.run_code("'ran' in globals()").text == "False"
