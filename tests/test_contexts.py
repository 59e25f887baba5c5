"""Contexts: kernels of their own, in any installed language."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from code_sandboxes import Context, ContextNotFoundError, Sandbox, SandboxConnectionError
from conftest import BUSY, MakeSandbox

IN_A_CONTAINER = True
ON_A_SERVER = True
AT_DATALAYER = True


ISOLATED = True
EVERY_FRONT = ("blocking", "async")


@pytest.mark.slow
def test_contexts_have_variables_of_their_own(sandbox: Sandbox) -> None:
    other = sandbox.create_context("other")
    sandbox.run_code("x = 'default'")
    sandbox.run_code("x = 'other'", context=other)

    assert sandbox.run_code("x").text == "'default'"
    for context in (other, other.id, "other"):
        result = sandbox.run_code("x", context=context)
        assert (result.text, result.context_id) == ("'other'", other.id)
    assert [c.name for c in sandbox.list_contexts()] == ["default", "other"]


@pytest.mark.slow
def test_contexts_run_side_by_side(sandbox: Sandbox) -> None:
    sandbox.create_context("other")
    begun = threading.Event()
    results = []
    waiting = threading.Thread(
        target=lambda: results.append(sandbox.run_code(f"print(1)\n{BUSY}", on_stdout=lambda _: begun.set()))
    )
    waiting.start()
    assert begun.wait(30)

    assert sandbox.run_code("40 + 2", context="other").text == "42"
    assert sandbox.interrupt("other") is False
    assert sandbox.interrupt() is True
    waiting.join(30)
    assert results[0].status == "interrupted"


@pytest.mark.needs("environment")
@pytest.mark.from_this_machine
@pytest.mark.slow
def test_a_context_starts_in_its_directory_with_its_environment(sandbox: Sandbox, tmp_path: Path) -> None:
    context = sandbox.create_context(cwd=str(tmp_path), env={"COLOUR": "red"})
    result = sandbox.run_code("import os; print(os.getcwd(), os.environ['COLOUR'])", context=context)

    assert result.stdout == f"{tmp_path} red"
    assert sandbox.run_code("import os; 'COLOUR' in os.environ").text == "False"


@pytest.mark.slow
def test_restarting_a_context_forgets_its_variables_and_nothing_else(sandbox: Sandbox) -> None:
    sandbox.create_context("other")
    sandbox.run_code("x = 1")
    sandbox.run_code("x = 2", context="other")
    sandbox.restart_context("other")

    assert sandbox.run_code("'x' in globals()", context="other").text == "False"
    assert sandbox.run_code("x").text == "1"


@pytest.mark.slow
def test_restarting_cuts_a_run_short_and_the_next_one_works(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        f"x = 1; print(1)\n{BUSY}",
        on_stdout=lambda _: threading.Thread(target=sandbox.restart).start(),
    )

    assert (result.status, result.state_preserved) == ("interrupted", False)
    again = sandbox.run_code("'x' in globals()")
    assert (again.text, again.state_preserved) == ("False", True)


@pytest.mark.not_in_a_container("its processes have other numbers there")
@pytest.mark.needs("own_process")
@pytest.mark.from_this_machine
@pytest.mark.slow
def test_a_deleted_context_is_gone_with_its_process(sandbox: Sandbox) -> None:
    context = sandbox.create_context("other")
    pid = int(sandbox.run_code("import os; os.getpid()", context=context).text or 0)
    sandbox.delete_context(context)

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ContextNotFoundError, match=r"no context 'other' in this sandbox \(known: default\)"):
        sandbox.run_code("1", context="other")


@pytest.mark.needs("own_process")
@pytest.mark.slow
def test_a_death_in_one_context_leaves_the_others_alone(sandbox: Sandbox) -> None:
    sandbox.create_context("other")
    sandbox.run_code("x = 1")
    sandbox.run_code("import os; os._exit(1)", context="other")

    assert sandbox.run_code("x").text == "1"
    assert sandbox.run_code("1", context="other").text == "1"


@pytest.mark.slow
def test_names_and_languages_are_checked(sandbox: Sandbox) -> None:
    sandbox.create_context("taken")
    with pytest.raises(ValueError, match="the name 'default-other' is kept for the contexts of runs"):
        sandbox.create_context("default-other")
    with pytest.raises(ValueError, match="there is a context 'taken' already"):
        sandbox.create_context("taken")
    with pytest.raises(ValueError, match="give either context= or language="):
        sandbox.run_code("1", context="taken", language="python")
    with pytest.raises(TypeError, match="a context is a Context, its id or its name, not int"):
        sandbox.run_code("1", context=3)  # type: ignore[arg-type]  # on purpose


@pytest.mark.slow
def test_a_context_of_another_sandbox_is_unknown(make_sandbox: MakeSandbox) -> None:
    context = make_sandbox().create_context("mine")
    with pytest.raises(ContextNotFoundError):
        make_sandbox().run_code("1", context=context)


@pytest.mark.parametrize("language", ["python", "python3", "Python"])
def test_python_by_any_name_is_the_default_context(shared_sandbox: Sandbox, language: str) -> None:
    result = shared_sandbox.run_code("1 + 1", language=language)

    assert (result.text, result.context_id) == ("2", "default")


# Another language


@pytest.mark.slow
@pytest.mark.needs("languages.bash")
def test_bash_runs_prints_fails_and_keeps_its_state(sandbox: Sandbox) -> None:
    assert sandbox.run_code("x=5; echo out; echo err >&2", language="bash").stdout.splitlines() == [
        "out",
        "err",
    ]
    assert sandbox.run_code("echo $x", language="bash").stdout == "5"
    failed = sandbox.run_code("false", language="bash")
    assert failed.status == "error"
    assert isinstance(sandbox.create_context("b", language="bash"), Context)
    assert sandbox.run_code("echo [$x]", context="b").stdout == "[]"


@pytest.mark.slow
@pytest.mark.needs("languages.bash")
def test_bash_is_interrupted_when_it_times_out(sandbox: Sandbox) -> None:
    result = sandbox.run_code("x=5; echo on; sleep 60", language="bash", timeout=1)

    assert (result.status, result.stdout.splitlines()[0]) == ("timed_out", "on")
    assert sandbox.run_code("echo $x", language="bash").stdout == "5"


@pytest.mark.slow
@pytest.mark.needs("languages.bash")
def test_bash_is_started_afresh_when_it_died(sandbox: Sandbox) -> None:
    sandbox.run_code("x=5", language="bash")
    result = sandbox.run_code("kill -9 $PPID; sleep 5", language="bash")

    assert (result.status, result.exit_code) == ("kernel_died", -signal.SIGKILL)
    assert sandbox.run_code("echo [$x]", language="bash").stdout == "[]"


@pytest.mark.needs("languages.bash")
@pytest.mark.from_this_machine
def test_a_context_whose_kernel_dies_at_start_raises_and_is_not_kept(
    sandbox: Sandbox, broken_kernel: str
) -> None:
    with pytest.raises(
        SandboxConnectionError, match="exited with code 7 before it answered; it said: no luck"
    ):
        sandbox.create_context("broken", language=broken_kernel)
    assert [c.name for c in sandbox.list_contexts()] == ["default"]
    assert sandbox.run_code("1").text == "1"
