"""Functions of the guest, called in real kernels: while code runs, and whatever the code has done."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from code_sandboxes import (
    AsyncSandbox,
    Context,
    InputRequest,
    Sandbox,
    SandboxConnectionError,
    SandboxExecutionError,
    SandboxNotStartedError,
)
from code_sandboxes.awaiting import drive as awaiting_drive
from code_sandboxes.blocking import drive
from conftest import UNISOLATED, wait_until

IN_A_CONTAINER = True

# Gives the guest one function more. (In local-eval this process has many guests.)
ADD_FUNCTION = """
import gc as _gc
_guests = [o for o in _gc.get_objects() if type(o).__name__ == "Guest" and hasattr(o, "_functions")]
_turns = 0
def _spin(call):
    global _turns
    while True: _turns += 1
for _guest in _guests:
    _guest._functions["spin"] = _spin
"""


def call(sandbox: Sandbox, context: Context | None = None) -> object:
    """Some function of the guest, there and back."""
    return drive(sandbox._core.guest(context).call("files.kind", path="/")).value


@contextmanager
def running(sandbox: Sandbox, code: str) -> Iterator[None]:
    """In the meantime, *code* runs; it prints when it has begun, and is interrupted at the end."""
    begun = threading.Event()
    thread = threading.Thread(
        target=lambda: sandbox.run_code(code, on_stdout=lambda _: begun.set(), timeout=0)
    )
    thread.start()
    try:
        assert begun.wait(30)
        yield
    finally:
        sandbox.interrupt()
        thread.join()


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            "import time; print('begun'); time.sleep(60)",
            id="sleeping",
            marks=pytest.mark.needs("interrupt_blocked"),
        ),
        pytest.param("print('begun')\nwhile True: pass", id="computing"),
        pytest.param("import asyncio; print('begun'); await asyncio.sleep(60)", id="awaiting"),
    ],
)
def test_calls_are_answered_while_code_runs(sandbox: Sandbox, code: str) -> None:
    with running(sandbox, code):
        for _ in range(3):
            call(sandbox)
        assert sandbox.is_executing

    assert sandbox.run_code("1 + 1").text == "2"


def test_calls_are_answered_while_code_waits_for_input(shared_sandbox: Sandbox) -> None:
    def answer(request: InputRequest) -> str:
        call(shared_sandbox)
        return "answered"

    assert shared_sandbox.run_code("print(input())", on_input=answer).stdout == "answered"


def test_calls_leave_no_trace_in_the_namespace_the_history_and_the_count(sandbox: Sandbox) -> None:
    sandbox.run_code("first = 1")
    before = sandbox.run_code("sorted(globals())")
    call(sandbox)
    after = sandbox.run_code("sorted(globals())")

    assert after.execution_count == (before.execution_count or 0) + 1
    names = set(eval(after.text or "")) - set(eval(before.text or ""))
    assert {name for name in names if not name.startswith("_")} == set()


@pytest.mark.parametrize(
    "damage",
    [
        "open = print = exec = eval = len = isinstance = dict = __import__ = get_ipython = None",
        "import os\nfor name in 'open read write close stat listdir pipe'.split(): setattr(os, name, None)",
        "import json\njson.loads = json.dumps = json.JSONEncoder = None",
        "import subprocess, threading\nsubprocess.Popen = subprocess.run = threading.Thread = None",
        "import builtins\nbuiltins.open = builtins.print = None",
        "import builtins\nreal = builtins.__import__\n"
        "builtins.__import__ = lambda name, *rest, **more: real(name, *rest, **more)",
        "get_ipython().display_formatter.formatters['text/plain'].for_type(dict, lambda *a: 1 / 0)\n"
        "get_ipython().events.register('pre_execute', lambda: 1 / 0)",
        "import sys\nfor name in ('os', 'json', 'subprocess', 'threading', 'comm'): del sys.modules[name]",
        "get_ipython().kernel.comm_manager.comms.clear()",
        "get_ipython().kernel.comm_manager.comms.clear(); get_ipython().kernel.comm_manager.targets.clear()",
    ],
    ids=[
        "shadowed",
        "os",
        "json",
        "subprocess",
        "builtins",
        "import",
        "formatters",
        "modules",
        "comms",
        "targets",
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.needs("own_process", "magics")
@pytest.mark.slow
def test_calls_work_whatever_code_has_damaged(sandbox: Sandbox, damage: str, when: str) -> None:
    kernel = sandbox.run_code("import os; os.getpid()").text
    if when == "after":
        call(sandbox)
    sandbox.run_code(damage)

    for _ in range(2):
        sandbox.files.write("file", "content")
        assert sandbox.files.read("file") == "content"
        assert sandbox.commands.run("echo $PPID").stdout.strip() == kernel


@pytest.mark.needs("own_process", "magics")
@pytest.mark.slow
def test_calls_work_after_code_has_broken_its_kernel(make_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = make_sandbox(timeout=2)
    result = sandbox.run_code("import builtins\nbuiltins.__import__ = lambda *a, **k: 1 / 0")
    assert not result.success  # ipykernel cannot even answer any more
    assert not result.state_preserved

    call(sandbox)


@pytest.mark.needs("magics")
def test_calls_do_not_do_what_others_want_done_after_a_cell(sandbox: Sandbox) -> None:
    sandbox.run_code("done = []\nget_ipython().events.register('post_execute', lambda: done.append(1))")
    count = sandbox.run_code("len(done)").text
    call(sandbox)

    assert int(sandbox.run_code("len(done)").text or 0) == int(count or 0) + 1


@pytest.mark.slow
def test_what_threads_print_during_a_call_belongs_to_the_run_that_is_on(sandbox: Sandbox) -> None:
    code = (
        "import threading, time\n"
        "def work():\n    for i in range(40): print(i, flush=True); time.sleep(0.01)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()"
    )
    result = sandbox.run_code(code, on_stdout=lambda _: call(sandbox))

    assert result.stdout.split() == [str(i) for i in range(40)]
    assert not sandbox.background_output.stdout


@pytest.mark.slow
def test_a_call_ends_with_the_kernel_and_the_next_one_starts_another(sandbox: Sandbox) -> None:
    sandbox.run_code("variable = 1")
    call(sandbox)
    sandbox.run_code(ADD_FUNCTION)
    failures: list[BaseException] = []

    def spin() -> None:
        try:
            drive(sandbox._core.guest().call("spin"))
        except (SandboxConnectionError, SandboxExecutionError) as error:  # a server ends its variables first
            failures.append(error)

    thread = threading.Thread(target=spin)
    thread.start()
    wait_until(lambda: sandbox.run_code("_turns").text != "0")
    sandbox.restart()
    thread.join(30)

    assert len(failures) == 1
    call(sandbox)
    assert sandbox.run_code("'variable' in globals()").text == "False"


@pytest.mark.needs("last_words")
def test_a_kernel_that_dies_under_a_call_says_how(sandbox: Sandbox) -> None:
    call(sandbox)
    sandbox.run_code(ADD_FUNCTION + "_guest._functions['die'] = lambda call: __import__('os').kill(0, 9)")
    with pytest.raises(SandboxConnectionError, match="died with signal 9"):
        drive(sandbox._core.guest().call("die"))

    call(sandbox)
    assert not sandbox.run_code("1").state_preserved


@pytest.mark.slow
def test_a_call_that_is_given_up_and_does_not_stop_holds_up_neither_calls_nor_code(variant: str) -> None:
    async def give_up() -> None:
        settings: dict[str, Any] = UNISOLATED.get(variant, {})
        async with AsyncSandbox.create(variant, **settings) as sandbox:
            guest = sandbox._core.guest()
            await awaiting_drive(guest.call("files.kind", path="/"))
            await sandbox.run_code(ADD_FUNCTION + "kept = 1")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(awaiting_drive(guest.call("spin")), 0.5)
            await asyncio.wait_for(awaiting_drive(guest.call("files.kind", path="/")), 20)

            assert (await sandbox.run_code("kept")).text == "1"
            turns: str | None = ""
            while turns != (turns := (await sandbox.run_code("_turns")).text):  # it was stopped, too
                await asyncio.sleep(0.05)

    asyncio.run(give_up())


def test_a_sandbox_that_has_ended_is_not_called(make_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = make_sandbox()
    guest = sandbox._core.guest()
    sandbox.terminate()

    with pytest.raises(SandboxNotStartedError):
        drive(guest.call("files.kind", path="/"))
    with pytest.raises(SandboxNotStartedError):
        sandbox._core.guest()


@pytest.mark.needs("languages.bash")
@pytest.mark.slow
def test_a_context_of_another_language_is_served_by_a_python_kernel(sandbox: Sandbox) -> None:
    context = sandbox.create_context(language="bash", cwd="/usr")

    call(sandbox, context)
    assert sandbox._core.guest(context).base == "/usr"


# Kernels that were not started by us


@pytest.fixture
def stock_kernel(install_kernel: Callable[..., str]) -> Callable[[str, str], str]:
    """A kernelspec of that name, of ipykernel as it is, after some lines of *preparation*."""

    def install(name: str, preparation: str) -> str:
        program = f"from ipykernel import ipkernel, kernelapp\n{preparation}\nkernelapp.launch_new_instance()"
        argv = [sys.executable, "-Xfrozen_modules=off", "-c", program, "-f", "{connection_file}"]
        return install_kernel(name, argv, language="python")

    return install


@pytest.mark.not_in_a_container("it runs its image's kernel")
@pytest.mark.needs("own_process", "magics")
@pytest.mark.slow
def test_the_guest_is_brought_to_a_kernel_while_it_runs_code(
    make_sandbox: Callable[..., Sandbox], stock_kernel: Callable[[str, str], str]
) -> None:
    sandbox = make_sandbox(kernel_name=stock_kernel("stock", ""))
    sandbox.run_code("exec = __import__ = get_ipython = None\nfirst = 1")

    with running(sandbox, "import time; print('begun'); time.sleep(60)"):
        call(sandbox)
    assert sandbox.capabilities.subshells
    assert sandbox.run_code("[name for name in globals() if 'code_sandboxes' in name]").text == "[]"
    assert sandbox.run_code("In[-3:-1]").text == (
        """["import time; print('begun'); time.sleep(60)",\n"""
        """ "[name for name in globals() if 'code_sandboxes' in name]"]"""
    )


@pytest.mark.not_in_a_container("it runs its image's kernel")
@pytest.mark.needs("own_process", "magics")
@pytest.mark.slow
def test_a_kernel_without_subshells_answers_when_the_code_is_over_and_says_so(
    make_sandbox: Callable[..., Sandbox], stock_kernel: Callable[[str, str], str]
) -> None:
    without = "ipkernel.IPythonKernel._supports_kernel_subshells = property(lambda self: False)"
    sandbox = make_sandbox(kernel_name=stock_kernel("without-subshells", without))
    assert "no subshells" in str(sandbox.capabilities.subshells)
    call(sandbox)
    over: list[float] = []

    def call_and_note() -> None:
        call(sandbox)
        over.append(time.monotonic())

    def wait(_: object) -> None:
        thread.start()

    thread = threading.Thread(target=call_and_note)
    sandbox.run_code("import time; print('begun', flush=True); time.sleep(1)", on_stdout=wait)
    ended = time.monotonic()
    thread.join(30)
    assert over[0] > ended - 0.5


# Code that attacks on purpose


@pytest.mark.needs("own_process", "magics")
@pytest.mark.slow
def test_forged_messages_of_the_guest_harm_nobody(sandbox: Sandbox) -> None:
    call(sandbox)
    sandbox.run_code(
        "import threading, random\n"
        "kernel = get_ipython().kernel\n"
        "ids = list(kernel.comm_manager.comms)\n"
        "def flood():\n"
        "    for _ in range(20_000):\n"
        "        n = random.randrange(100)\n"
        "        data = random.choice([{'answer': n, 'value': 'forged'}, {'failure': n, 'error': [1]},\n"
        "            {'taken': n}, {'channel': n, 'data': 'x'}, {'open': 1}, [], None, 'x', {'end': 1}])\n"
        "        kernel.session.send(kernel.iopub_socket, 'comm_msg', {'comm_id': ids[0], 'data': data},\n"
        "                            parent={}, buffers=[b'x' * 1000])\n"
        "for _ in range(2): threading.Thread(target=flood, daemon=True).start()"
    )
    answered = 0
    for _ in range(50):
        try:
            call(sandbox)
            answered += 1
        except (SandboxConnectionError, RuntimeError):  # it may say what it got
            pass

    assert answered
    assert sandbox.run_code("1 + 1").text == "2"
