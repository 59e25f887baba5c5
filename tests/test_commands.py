"""Commands: exact output, live output, input, signals and ends, on every variant and front."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from code_sandboxes import (
    AsyncSandbox,
    Capability,
    CommandResult,
    OutputMessage,
    Sandbox,
    SandboxCommands,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxExecutionError,
    SandboxTimeoutError,
)
from code_sandboxes.command_operations import _Kept, _Peekable, _run, _Running, _started, command_of
from code_sandboxes.guest_calls import Guest
from code_sandboxes.guest_link import Channel, ChannelEnded, GuestCall, Told
from code_sandboxes.processes import PIECE, RING, WINDOW, Process, end_of, output_of
from code_sandboxes.steps import Operation
from conftest import BUSY, UNISOLATED, MakeSandbox, wait_until

IN_A_CONTAINER = True
ON_A_SERVER = True


ISOLATED = True
FAST_VARIANT = "local-jupyter"
EVERY_FRONT = ("blocking", "async")

# The iterator front is one of run_code() only.
pytestmark = pytest.mark.callbacks

NASTY = "$(touch x); `touch x` & 'one' \"two\" \\ * ~ \n; # | > x é"


@pytest.fixture
def commands(shared_sandbox: Sandbox) -> Iterator[SandboxCommands]:
    """Those of a sandbox in which nothing is to be left running."""
    yield shared_sandbox.commands
    wait_until(lambda: shared_sandbox.commands.list() == [])


@pytest.fixture
def mark() -> str:
    """A number of seconds for ``sleep`` that nobody else sleeps."""
    return f"1000.{int.from_bytes(os.urandom(4), 'big'):010}"


def sleeping(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline() == ["sleep", mark]:
                found.append(process.pid)
    return found


# To the end.


def test_run_gives_exactly_what_was_printed_and_the_exit_code(commands: SandboxCommands) -> None:
    result = commands.run("printf 'a\\r\\nb\\n\\n'; printf 'c' >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == ("a\r\nb\n\n", "c", 3)
    assert (result.success, result.timed_out, result.truncated) == (False, False, False)
    assert commands.run("true").success


def test_one_string_is_for_the_shell_and_several_or_a_list_are_arguments(commands: SandboxCommands) -> None:
    assert commands.run("echo $((1 + 1)) | cat").stdout == "2\n"
    assert commands.run("printf", "%s|", "a b", "$HOME").stdout == "a b|$HOME|"
    assert commands.run(["printf", "%s|", "a b", "$HOME"]).stdout == "a b|$HOME|"
    assert commands.run(["printf", "%s|"], "a b").stdout == "a b|"
    with pytest.raises(FileNotFoundError):
        commands.run("echo hello", shell=False)


@pytest.mark.from_this_machine
def test_what_looks_like_shell_text_is_data(commands: SandboxCommands, tmp_path: Path) -> None:
    assert commands.run("printf", "%s", NASTY, cwd=tmp_path).stdout == NASTY
    assert commands.run('printf %s "$X"', env={"X": NASTY}, cwd=tmp_path).stdout == NASTY
    assert commands.run("cat", stdin=NASTY, cwd=tmp_path).stdout == NASTY
    assert commands.spawn(["printf", "%s", NASTY], cwd=str(tmp_path)).stdout.read() == NASTY
    assert commands.run_script(f"cat <<'END'\n{NASTY}\nEND\n", cwd=tmp_path).stdout == NASTY + "\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "error"), [([], ValueError), (5, TypeError), (["a", 5], TypeError), (["a\0b"], ValueError)]
)
def test_what_is_no_command_is_refused(
    commands: SandboxCommands, command: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        commands.run(command)


@pytest.mark.from_this_machine
def test_a_missing_program_or_directory_is_python_s_own_error(
    commands: SandboxCommands, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError) as program:
        commands.run(["no-such-program", "x"])
    assert (program.value.errno, program.value.filename) == (2, "no-such-program")
    with pytest.raises(FileNotFoundError) as folder:
        commands.exec("true", cwd="no/such/folder")
    assert folder.value.filename == "no/such/folder"
    (tmp_path / "plain").write_text("")
    with pytest.raises(PermissionError):
        commands.run([str(tmp_path / "plain")])
    with pytest.raises(NotADirectoryError):
        commands.run("true", cwd=tmp_path / "plain")


def test_who_is_killed_by_a_signal_has_its_number_as_exit_code(commands: SandboxCommands) -> None:
    assert commands.run("kill -TERM $$").exit_code == -15


def test_a_character_that_arrives_in_two_parts_stays_whole(commands: SandboxCommands) -> None:
    line = "printf '\\303'; sleep 0.05; printf '\\251 \\377 \\303\\n'"
    messages: list[OutputMessage] = []
    assert commands.run(line, on_stdout=messages.append).stdout == "é \ufffd \ufffd\n"
    assert "".join(m.line + m.end for m in messages) == "é \ufffd \ufffd\n"
    assert list(commands.spawn(line).stdout) == ["é \ufffd \ufffd\n"]


def test_arguments_need_not_be_utf_8(commands: SandboxCommands) -> None:
    name = os.fsdecode(b"\xff\xfe")
    shown = commands.run("sh", "-c", 'printf %s "$0$X" | od -An -tx1', name, env={"X": name}).stdout
    assert shown.split() == ["ff", "fe"] * 2


def test_input_comes_as_it_is_given_and_ends(commands: SandboxCommands) -> None:
    assert commands.run("cat", stdin="é\n").stdout == "é\n"
    assert commands.run("wc -c", stdin=b"\0\xff" * 10).stdout.strip() == "20"
    assert commands.run("cat").stdout == commands.run("cat", stdin="").stdout == ""


@pytest.mark.slow
def test_input_of_any_size_is_fed_while_output_is_read(commands: SandboxCommands) -> None:
    data = os.urandom(2**20).hex().encode() * 10
    assert commands.run("cat", stdin=data).stdout.encode() == data
    assert commands.run("head -c 5", stdin=data).stdout.encode() == data[:5]
    assert commands.run("true", stdin=memoryview(data)).success  # type: ignore[arg-type]  # works, too


def test_the_environment_is_that_of_the_code_and_what_is_given(
    shared_sandbox: Sandbox, commands: SandboxCommands
) -> None:
    shared_sandbox.run_code("import os; os.environ['FROM_CODE'] = 'a b'")
    assert commands.run("echo $FROM_CODE $X", env={"X": "1"}).stdout == "a b 1\n"
    shared_sandbox.run_code("del os.environ['FROM_CODE']")
    with pytest.raises(TypeError):
        commands.run("true", env={"X": 1})  # type: ignore[dict-item]  # on purpose


def test_a_time_out_ends_all_that_was_started_and_keeps_what_was_printed(
    commands: SandboxCommands, mark: str
) -> None:
    begun = time.monotonic()
    result = commands.run(f"echo before; (sleep {mark} & sleep {mark}) & sleep {mark}", timeout=0.1)
    assert (result.stdout, result.timed_out, result.exit_code) == ("before\n", True, -9)
    assert result.success is False
    assert time.monotonic() - begun < 10
    wait_until(lambda: not sleeping(mark))


@pytest.mark.slow
def test_run_takes_as_long_as_a_run_of_code_may_and_spawn_any_time(
    make_sandbox: MakeSandbox, mark: str
) -> None:
    commands = make_sandbox(timeout=0.3).commands
    with commands.spawn(f"sleep {mark}") as process:
        assert commands.run(f"sleep {mark}").timed_out
        assert commands.run("sleep 0.5; echo x", timeout=0).stdout == "x\n"
        assert process.poll() is None
    limited = commands.exec("sleep", mark, timeout=0.2)
    assert (limited.wait(), limited.timed_out) == (-9, True)


def test_check_raises_with_the_result_and_what_was_said(commands: SandboxCommands) -> None:
    with pytest.raises(SandboxExecutionError, match=r"exit code 3: no luck$") as error:
        commands.run("echo no luck >&2; exit 3", check=True)
    assert isinstance(error.value.result, CommandResult)
    assert error.value.result.exit_code == 3
    with pytest.raises(SandboxTimeoutError, match="timeout"):
        commands.run("sleep 100", check=True, timeout=0.05)
    assert commands.run("true", check=True).success


def test_callbacks_get_lines_as_they_come(commands: SandboxCommands) -> None:
    out: list[OutputMessage] = []
    err: list[OutputMessage] = []
    process = "echo a; printf 'b\\rc'; echo d >&2; sleep 0.2; echo e"
    commands.run(process, on_stdout=out.append, on_stderr=err.append)
    assert [(m.line, m.end, m.error) for m in out] == [
        ("a", "\n", False),
        ("b", "\r", False),
        ("c", "", False),
        ("e", "\n", False),
    ]
    assert [(m.line, m.end, m.error) for m in err] == [("d", "\n", True)]
    assert out[-1].timestamp - out[0].timestamp > 0.1


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_is_raised_in_a_callback_ends_the_command_and_is_raised(
    commands: SandboxCommands, mark: str, error: type[BaseException]
) -> None:
    def fail(message: OutputMessage) -> None:
        raise error

    with pytest.raises(error):
        commands.run(f"sleep {mark} & echo x; sleep {mark}", on_stdout=fail, timeout=0)
    assert commands.list() == []
    wait_until(lambda: not sleeping(mark))


def test_a_run_that_is_cancelled_ends_its_command(variant: str, mark: str) -> None:
    async def main() -> None:
        async with AsyncSandbox.create(variant, **UNISOLATED.get(variant, {})) as sandbox:  # type: ignore[arg-type]
            running = asyncio.create_task(sandbox.commands.run(f"sleep {mark} & sleep {mark}"))
            while not await sandbox.commands.list():
                await asyncio.sleep(0.01)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert await sandbox.commands.list() == []

    asyncio.run(main())
    wait_until(lambda: not sleeping(mark))


@pytest.mark.parametrize("how", ["run", "spawn"])
def test_what_is_given_up_before_it_was_sent_is_not_started(how: str) -> None:
    guest = _ClosedWay()
    arguments: dict[str, object] = {"id": "x"}
    command = command_of("true")
    if how == "run":
        running = _Running(guest, arguments, (), _Peekable(iter(())), None, 1.0)
        operation: Operation[Any] = _run(running, command, 1000, listen=False, check=False)
    else:
        operation = _started(Process(guest, "x", "true"), arguments)
    next(operation)
    with contextlib.suppress(ZeroDivisionError):
        operation.throw(ZeroDivisionError())
    assert [call.name for call in guest.waiting] == ["processes.signal"]


def test_input_that_is_given_up_is_not_sent() -> None:
    guest = _ClosedWay()
    writing = Process(guest, "x", "true").write(b"-" * 10 * PIECE)
    next(writing)
    assert len(guest.waiting) == 4
    with pytest.raises(ZeroDivisionError):
        writing.throw(ZeroDivisionError())
    assert guest.waiting == []


class _ClosedWay(Guest):
    """A guest to which the way is not open yet, and what waits for that."""

    def __init__(self) -> None:
        self.waiting: list[GuestCall] = []

    def begin(self, call: GuestCall) -> None:
        self.waiting.append(call)

    def cancel(self, call: GuestCall) -> None:
        self.waiting.remove(call)

    def close_channel(self, channel: Channel) -> None:
        pass


@pytest.mark.from_this_machine
def test_run_does_not_wait_for_what_goes_on_in_the_background(
    commands: SandboxCommands, tmp_path: Path
) -> None:
    line = "(while [ ! -e go ]; do sleep 0.01; done; echo later; touch done) & echo now"
    assert commands.run(line, cwd=tmp_path).stdout == "now\n"
    (tmp_path / "go").touch()
    wait_until((tmp_path / "done").exists)


def test_what_is_kept_is_the_beginning_and_the_latest_part() -> None:
    for step in (1, 3, 10, 100):
        kept = _Kept(20)
        data = "".join(f"{i:02}é" for i in range(10)).encode()
        for start in range(0, len(data), step):
            kept.add(data[start : start + step])
        assert kept.truncated
        assert len(kept.text().encode()) in (19, 20)
        assert kept.text().startswith("00é01é")
        assert kept.text().endswith("8é09é")
        assert "\ufffd" not in kept.text()
    whole = _Kept(20)
    whole.add(b"x" * 20)
    assert (whole.text(), whole.truncated) == ("x" * 20, False)


@pytest.mark.slow
def test_100_mb_are_whole(commands: SandboxCommands) -> None:
    result = commands.run("head -c 100000000 /dev/zero | tr '\\0' x; echo end >&2", timeout=0)
    assert (len(result.stdout), result.stdout.strip("x"), result.stderr) == (100_000_000, "", "end\n")
    assert not result.truncated


@pytest.mark.not_in_a_container("it is made without isolation here")
@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_more_than_is_kept_says_so(variant: str) -> None:
    with Sandbox.create(variant, max_output=10_000, **UNISOLATED[variant]) as sandbox:  # type: ignore[arg-type]
        result = sandbox.commands.run("seq 100000")
        assert result.truncated
        assert result.stdout.startswith("1\n2\n")
        assert result.stdout.endswith("\n99999\n100000\n")
        assert len(result.stdout) == 10_000


# Scripts.


@pytest.mark.not_in_a_container("this interpreter is not there")
def test_a_script_is_run_by_its_interpreter_and_may_read_input(commands: SandboxCommands) -> None:
    script = "read line\nif [[ $line == x* ]]; then echo \"got '$line'\"; fi\nexit 4\n"
    result = commands.run_script(script, stdin="xyz\n")
    assert (result.stdout, result.exit_code) == ("got 'xyz'\n", 4)
    assert commands.run_script("import sys; print(len(sys.argv))", sys.executable).stdout == "1\n"
    with pytest.raises(FileNotFoundError):
        commands.run_script("", "/no/such/interpreter")


# Handles.


def test_exec_takes_arguments_and_its_lines_keep_their_newline(commands: SandboxCommands) -> None:
    process = commands.exec("python3", "-c", "print('hello'); print('a b', end='')")
    assert list(process.stdout) == ["hello\n", "a b"]
    assert (process.wait(), process.returncode, process.poll()) == (0, 0, 0)
    assert list(process.stdout) == list(process.stderr) == []


def test_lines_arrive_while_the_command_runs(commands: SandboxCommands) -> None:
    with commands.spawn('while read line; do echo "<$line>"; done; echo end >&2') as process:
        assert process.poll() is None
        for word in ("one", "two"):
            process.write_stdin(word + "\n")
            assert next(process.stdout) == f"<{word}>\n"
        process.close_stdin()
        process.close_stdin()
        assert list(process.stderr) == ["end\n"]
        assert process.wait() == 0
        with pytest.raises(BrokenPipeError):
            process.write_stdin("three\n")


def test_a_signal_reaches_all_that_was_started(commands: SandboxCommands, mark: str) -> None:
    process = commands.spawn(f"trap 'echo got it; exit 5' TERM; sleep {mark} & sleep {mark} & echo on; wait")
    assert next(process.stdout) == "on\n"
    wait_until(lambda: len(sleeping(mark)) == 2)
    process.send_signal(15)
    assert process.wait() == 5
    assert process.stdout.read() == "got it\n"
    process.terminate()
    assert process.returncode == 5, "what has ended gets no signal"
    wait_until(lambda: not sleeping(mark))
    interrupted = commands.exec("sleep", mark)
    interrupted.send_signal(2)
    assert interrupted.wait() == -2


@pytest.mark.parametrize(("how", "exit_code"), [("terminate", -15), ("kill", -9)])
def test_ending_it_in_another_thread_ends_the_loop_over_its_output(
    commands: SandboxCommands, how: str, exit_code: int, mark: str
) -> None:
    process = commands.spawn(f"echo on; sleep {mark} & sleep {mark}")
    lines = iter(process.stdout)
    assert next(lines) == "on\n"
    ending = threading.Thread(target=getattr(process, how))
    ending.start()
    assert list(lines) == []
    ending.join()
    assert process.wait() == exit_code
    wait_until(lambda: not sleeping(mark))


def test_leaving_the_with_block_kills_it(commands: SandboxCommands, mark: str) -> None:
    with commands.exec("sleep", mark) as process:
        with pytest.raises(SandboxTimeoutError, match=r"still running after 0\.05 s"):
            process.wait(timeout=0.05)
        assert process.returncode is None
    assert process.returncode == -9
    assert "sleep" in repr(process)


@pytest.mark.slow
def test_what_nobody_reads_makes_nobody_wait_and_is_bounded(commands: SandboxCommands) -> None:
    size = RING + 10_000_000
    line = f"head -c {size} /dev/zero | tr '\\0' x; head -c {size} /dev/zero >&2; echo; echo end"
    process = commands.spawn(line)
    assert process.wait(60) == 0
    assert process.truncated
    rest = process.stdout.read()
    assert rest.endswith("xxx\nend\n")
    assert RING - WINDOW < len(rest) <= RING


@pytest.mark.slow
def test_a_loop_that_was_left_in_its_middle_makes_nobody_wait(commands: SandboxCommands) -> None:
    line = "yes $(printf %09999d 0) | head -c 10000000"
    process = commands.spawn(line)
    for _ in process.stdout:
        break
    assert process.wait(60) == 0
    process = commands.spawn(line)
    held = iter(process.stdout)
    assert len(next(held)) == 10_000
    assert process.wait(60) == 0
    assert sum(map(len, held)) == 10_000_000 - 10_000
    assert not process.truncated


@pytest.mark.not_in_a_container("it does not see the folder")
@pytest.mark.slow
@pytest.mark.parametrize("unread", [0, 10_000_000])
def test_a_slow_reader_holds_a_few_mib_and_makes_the_command_wait(
    variant: str, unread: int, tmp_path: Path
) -> None:
    with Sandbox.create(variant, **UNISOLATED.get(variant, {})) as sandbox:  # type: ignore[arg-type]
        kernel = psutil.Process(int(sandbox.run_code("import os; os.getpid()").text or 0))
        sandbox.commands.run("seq 1000000")
        before = (psutil.Process().memory_info().rss, kernel.memory_info().rss)
        line = f"head -c {unread} /dev/zero >&2; seq -f %099.0f 1000000; touch {tmp_path}/done"
        process = sandbox.commands.spawn(line)
        grown = 0
        for number, text in enumerate(process.stdout, 1):
            assert int(text) == number
            if number % 100_000 == 1:
                assert not (tmp_path / "done").exists() or number > 800_000
                grown = max(
                    grown,
                    psutil.Process().memory_info().rss - before[0] - unread,
                    kernel.memory_info().rss - before[1] - unread,
                )
        assert number == 1_000_000
        assert process.wait() == 0
        assert grown < 32 * 1024**2


def test_a_line_of_many_mib_comes_in_parts(commands: SandboxCommands) -> None:
    parts = list(commands.spawn("head -c 5000000 /dev/zero | tr '\\0' x; echo").stdout)
    assert "".join(parts) == "x" * 5_000_000 + "\n"
    assert max(map(len, parts)) < 2_000_000


@pytest.mark.from_this_machine
def test_list_connect_and_kill_know_what_runs(commands: SandboxCommands, tmp_path: Path) -> None:
    process = commands.spawn("read line; echo $line; read line", cwd=tmp_path)
    (info,) = commands.list()
    assert (info.pid, info.command) == (process.pid, "read line; echo $line; read line")
    assert (info.cwd, info.is_running) == (str(tmp_path), True)
    assert abs(info.started_at - time.time()) < 60
    other = commands.connect(process.pid)
    other.write_stdin("hello\n")
    assert next(other.stdout) == next(process.stdout) == "hello\n"
    assert commands.kill(process.pid) is True
    assert other.wait() == process.wait() == -9
    assert commands.kill(process.pid) is False
    for unknown in (commands.connect, commands.kill):
        with pytest.raises(ProcessLookupError):
            unknown(os.getpid())
    with pytest.raises(TypeError):
        commands.kill("5")  # type: ignore[arg-type]  # on purpose


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_another_program_can_connect_and_its_end_ends_nothing(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox()
    process = sandbox.commands.spawn("while read line; do echo $line; yes | head -c 100000; done")
    program = (
        "import sys, os; from code_sandboxes import Sandbox\n"
        f"s = Sandbox.from_id({sandbox.id!r}); p = s.commands.connect({process.pid})\n"
        "p.write_stdin('theirs\\n'); lines = iter(p.stdout); print(next(lines), end='', flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert theirs.stdout == "theirs\n"
    process.write_stdin("ours\n")
    process.close_stdin()
    assert process.wait(100) == 0


# While code runs, and whatever it does.


def test_commands_answer_while_code_runs(sandbox: Sandbox) -> None:
    running = threading.Thread(target=lambda: sandbox.run_code(BUSY))
    running.start()
    wait_until(lambda: sandbox.is_executing)
    assert sandbox.commands.run("echo hello").stdout == "hello\n"
    assert sandbox.is_executing
    assert next(sandbox.commands.spawn("echo one; sleep 100").stdout) == "one\n"
    sandbox.interrupt()
    running.join()
    assert len(sandbox.commands.list()) == 1, "an interrupt of the code does not reach a command"


@pytest.mark.slow
@pytest.mark.parametrize("code", ["t.sleep(3)", "end = t.time() + 3\nwhile t.time() < end: pass"])
def test_commands_are_quick_while_code_runs(sandbox: Sandbox, code: str) -> None:
    sandbox.commands.run("true")
    running = threading.Thread(target=lambda: sandbox.run_code("import time as t\n" + code))
    running.start()
    wait_until(lambda: sandbox.is_executing)
    took = []
    while sandbox.is_executing:
        begun = time.monotonic()
        sandbox.commands.run("true")
        took.append(time.monotonic() - begun)
    running.join()
    assert sorted(took)[len(took) // 2] < 1


@pytest.mark.slow
def test_ten_commands_at_once_keep_no_file_waiting(sandbox: Sandbox) -> None:
    line = "yes $(printf %099999d 0) | head -c 20000000"
    handles = [sandbox.commands.spawn(line) for _ in range(10)]
    readers = [threading.Thread(target=lambda p=p: [None for _ in p.stdout]) for p in handles]
    for reader in readers[:5]:  # the others are not read
        reader.start()
    for i in range(20):
        sandbox.files.write("x.txt", str(i))
        assert sandbox.files.read("x.txt") == str(i)
    sandbox.files.rm("x.txt")
    assert [process.wait(100) for process in handles] == [0] * 10
    for reader in readers[:5]:
        reader.join()


@pytest.mark.needs("own_process")
def test_code_that_has_broken_what_everybody_uses_breaks_no_command(sandbox: Sandbox) -> None:
    broken = (
        "import subprocess, os, builtins, selectors, posixpath, threading, time, sys, json, codecs\n"
        "def no(*args, **kwargs): raise RuntimeError('patched')\n"
        "subprocess.Popen = subprocess.run = no\n"
        "for name in ('pipe', 'read', 'write', 'close', 'kill', 'killpg', 'waitpid', 'open',\n"
        "             'set_blocking', 'pidfd_open'):\n"
        "    setattr(os, name, no)\n"
        "selectors.EpollSelector = selectors.DefaultSelector = no\n"
        "threading.Thread = no\n"
        "subprocess = os = None\n"
        "builtins.open = no\n"
    )
    kernel = sandbox.run_code("import os; os.getpid()").text
    sandbox.run_code(broken)
    assert sandbox.commands.run("echo $PPID").stdout.strip() == kernel
    assert sandbox.commands.run("cat; echo b >&2", stdin="a\n").stdout == "a\n"
    process = sandbox.commands.exec("sleep", "1000")
    process.kill()
    assert process.wait() == -9


@pytest.mark.slow
@pytest.mark.not_on_a_server("what its kernels have started outlives them there")
@pytest.mark.needs("own_process")
def test_the_end_of_the_kernel_is_told_to_whoever_waits_for_a_command(sandbox: Sandbox, mark: str) -> None:
    process = sandbox.commands.spawn(f"echo on; sleep {mark}")
    assert next(process.stdout) == "on\n"
    failures: list[Exception] = []

    def run() -> None:
        try:
            sandbox.commands.run(f"sleep {mark}", timeout=0)
        except Exception as error:
            failures.append(error)

    running = threading.Thread(target=run)
    running.start()
    wait_until(lambda: len(sandbox.commands.list()) == 2)
    sandbox.run_code("import os; os.kill(os.getpid(), 9)")
    running.join()
    assert isinstance(failures[0], SandboxConnectionError)
    for ask in (process.wait, process.poll, lambda: next(process.stdout)):
        with pytest.raises(SandboxConnectionError):
            ask()
    assert process.returncode is None
    process.kill()
    assert sandbox.commands.run("echo again").stdout == "again\n"
    wait_until(lambda: not sleeping(mark))


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_a_kernel_that_lets_go_of_nothing_is_told_of_in_time(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(config=SandboxConfig(interrupt_grace=0.3))
    sandbox.commands.run("true")
    running = threading.Thread(
        target=lambda: sandbox.run_code("import ctypes; ctypes.PyDLL(None).sleep(5)", timeout=0)
    )
    running.start()
    wait_until(lambda: sandbox.is_executing)
    time.sleep(0.2)
    with pytest.raises(SandboxTimeoutError, match=r"did not answer within 0\.2 s"):
        sandbox.commands.run("true", timeout=0.2)
    running.join()
    assert sandbox.commands.run("echo again").stdout == "again\n"


@pytest.mark.slow
@pytest.mark.needs("own_process")
@pytest.mark.from_this_machine
def test_output_of_a_process_of_one_cell_arrives_during_the_next_and_after_it(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    line = "for i in 1 2; do while [ ! -e $i ]; do sleep 0.01; done; echo number $i; done"
    sandbox.run_code(f"import subprocess; p = subprocess.Popen({line!r}, shell=True, cwd={str(tmp_path)!r})")
    out: list[OutputMessage] = []
    code = f"open({str(tmp_path / '1')!r}, 'w').close()\nimport time\ntime.sleep(1)"
    begun = time.time()
    sandbox.run_code(code, on_stdout=out.append)
    assert [m.line for m in out] == ["number 1"]
    assert out[0].timestamp - begun < 0.9, "it was live"
    (tmp_path / "2").touch()
    wait_until(lambda: "number 2" in "".join(map(str, sandbox.background_output.stdout)))


@pytest.mark.slow
@pytest.mark.needs("languages.bash")
@pytest.mark.from_this_machine
def test_commands_of_a_context_in_another_language_start_where_that_does(
    make_sandbox: MakeSandbox, tmp_path: Path
) -> None:
    sandbox = make_sandbox()
    context = sandbox.create_context(language="bash", cwd=str(tmp_path))
    (tmp_path / "sub").mkdir()
    assert sandbox.commands.run("pwd", context=context).stdout == f"{tmp_path}\n"
    assert sandbox.commands.run("pwd", cwd="sub", context=context).stdout == f"{tmp_path}/sub\n"
    with pytest.raises(FileNotFoundError) as error:
        sandbox.commands.run("pwd", cwd="no", context=context)
    assert error.value.filename == "no"


# What the sandbox says is checked.


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"exit_code": "0", "timed_out": False, "duration": 1},
        {"exit_code": 10**9, "timed_out": False},
    ],
)
def test_an_end_that_cannot_be_is_not_believed(data: object) -> None:
    with pytest.raises(SandboxConnectionError):
        end_of(ChannelEnded(Channel(print, 0), data, None))


@pytest.mark.parametrize(("data", "buffers"), [({"stream": 2}, [b"x"]), ({"stream": 0}, []), (5, [b"x"])])
def test_output_that_cannot_be_is_not_believed(data: object, buffers: list[bytes]) -> None:
    with pytest.raises(SandboxConnectionError):
        output_of(Told(Channel(print, 0), data, buffers))


# Packages of the system.


@pytest.mark.not_in_a_container("they are not this machine")
def test_system_packages_are_not_installed_on_this_machine(commands: SandboxCommands) -> None:
    with pytest.raises(
        SandboxConfigurationError,
        match=r"on (this machine itself|the server); use local-docker|not root in a runtime",
    ):
        commands.install_system_packages(["curl"])


@pytest.mark.parametrize("name", ["", "-y", "a b", "a\0b", "a\n", "--option=x"])
def test_what_is_no_name_of_a_package_is_refused(commands: SandboxCommands, name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a package"):
        commands.install_system_packages(["curl", name])


@pytest.mark.from_this_machine
def test_packages_go_to_the_package_manager_as_arguments(
    commands: SandboxCommands, shared_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = type(shared_sandbox._core.variant)
    can = replace(variant.capabilities(), system_packages=Capability(True))
    monkeypatch.setattr(variant, "own_capabilities", can)
    manager = tmp_path / "apk"
    manager.write_text(
        '#!/bin/sh\nprintf \'<%s>\' "$@"\n[ "$4" != broken ] || { echo no luck >&2; exit 9; }\n'
    )
    manager.chmod(0o755)
    shared_sandbox.run_code(f"import os; before = os.environ['PATH']; os.environ['PATH'] = {str(tmp_path)!r}")
    try:
        installed = commands.install_system_packages(["a;b", "$(x)"])
        assert installed.stdout == "<add><--no-cache><a;b><$(x)>"
        with pytest.raises(SandboxExecutionError, match=r"apk failed with exit code 9.*: no luck"):
            commands.install_system_packages(["a", "broken"], package_manager="apk")
        with pytest.raises(SandboxConfigurationError, match="no package manager"):
            commands.install_system_packages(["a"], package_manager="dnf")
        with pytest.raises(ValueError, match="no package manager 'port'"):
            commands.install_system_packages(["a"], package_manager="port")
    finally:
        shared_sandbox.run_code("os.environ['PATH'] = before")


@pytest.mark.slow
def test_threads_that_share_a_stream_get_each_line_once(shared_sandbox: Sandbox) -> None:
    process = shared_sandbox.commands.spawn("seq 100000")
    lines: list[str] = []
    readers = [threading.Thread(target=lambda: lines.extend(process.stdout)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()

    assert sorted(map(int, lines)) == list(range(1, 100001))


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A": "\0"}])
def test_an_environment_that_cannot_be_is_refused(shared_sandbox: Sandbox, env: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="env has"):
        shared_sandbox.commands.run("true", env=env)
