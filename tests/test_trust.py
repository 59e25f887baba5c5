"""Kernels that lie, flood and send garbage: real ones, in which hostile code has their sockets and their key.

What must hold: the program lives, its memory stays flat, others are answered, the next run works. Not that
the result of a hostile run is true: the code can say what it likes in its own sandbox.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from code_sandboxes import ExecutionResult, InputRequest, OutputMessage, Sandbox, SandboxConfig
from code_sandboxes.guest.launch import LONGEST_TEXT
from conftest import UNISOLATED
from tests.test_keeper import keeper_of

MEGABYTE = 1024**2

# What hostile code begins with: it says what it likes, as the kernel.
FORGE = """
import json, threading, time
kernel = get_ipython().kernel
parent = kernel.get_parent()
def forge(msg_type, content, parent=parent, **more):
    kernel.session.send(kernel.iopub_socket, msg_type, content, parent=parent, **more)
def say(msg_type, content, parent=parent, key=None):
    # what no kernel would send: *content* is text, and signed as it is
    header, parent = kernel.session.msg_header(msg_type), parent.get('header', parent)
    parts = [json.dumps(part, default=str).encode() for part in (header, parent, {})]
    parts.append(content.encode())
    session = kernel.session if key is None else type(kernel.session)(key=key)
    frames = [b'topic', b'<IDS|MSG>', session.sign(parts), *parts]
    send(*frames)
    return frames
def reply(msg_type, content, socket='shell_stream'):
    ident = kernel._parent_ident['shell']
    kernel.shell_channel_thread.io_loop.add_callback(
        lambda: kernel.session.send(getattr(kernel, socket), msg_type, content, parent=parent, ident=ident))
def send(*frames):
    kernel.iopub_socket.send_multipart(list(frames))
"""


@pytest.fixture(scope="module")
def hostile() -> Iterator[Sandbox]:
    """A sandbox that attacks; with an idle time, so that the keeper hears from its kernel too."""
    settings: dict[str, object] = {**UNISOLATED["local-jupyter"], "config": SandboxConfig(idle_timeout=600.0)}
    with Sandbox.create("local-jupyter", **settings) as sandbox:  # type: ignore[arg-type]  # by name
        yield sandbox


@pytest.fixture(scope="module")
def bystander() -> Iterator[Sandbox]:
    with Sandbox.create("local-jupyter", **UNISOLATED["local-jupyter"]) as sandbox:  # type: ignore[arg-type]  # by name
        yield sandbox


def attack(sandbox: Sandbox, code: str, **more: object) -> ExecutionResult:
    """The result of hostile code; after it, the next run is as ever, and all can be printed and stored."""
    result = sandbox.run_code(FORGE + code, **more)  # type: ignore[arg-type]  # by name
    for each in result.results:
        assert isinstance(repr(each), str)
        each._repr_mimebundle_()
        assert all(value is None or isinstance(value, str) for value in (each.text, each.png, each.svg))
        (each.text or "").encode()
    assert isinstance(repr(result), str)
    (result.stdout + result.stderr + str(result.error)).encode()
    after = sandbox.run_code("print('next'); 40 + 2")
    assert (after.status, after.stdout, after.text, after.truncated) == ("ok", "next", "42", False)
    return result


def dropped(sandbox: Sandbox) -> dict[str, int]:
    counts = sandbox.info.metadata["dropped_messages"]
    assert isinstance(counts, dict)
    return dict(counts)


@contextmanager
def watched(bystander: Sandbox, folder: Path, most: int) -> Iterator[None]:
    """Meanwhile the program grows by *most* bytes at most, its keeper hardly, and both answer in a second."""
    processes = [psutil.Process(), keeper_of(folder)]
    before = [process.memory_info().rss for process in processes]
    peaks, slowest, over = list(before), [0.0, 0.0], threading.Event()

    def measure() -> None:
        while not over.wait(0.01):
            peaks[:] = [max(p, q.memory_info().rss) for p, q in zip(peaks, processes, strict=True)]

    def use() -> None:
        calls: list[Callable[[], object]] = [lambda: bystander.run_code("1"), Sandbox.list]
        while not over.wait(0.05):
            for number, call in enumerate(calls):
                begun = time.monotonic()
                call()
                slowest[number] = max(slowest[number], time.monotonic() - begun)

    threads = [threading.Thread(target=measure), threading.Thread(target=use)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    program, its_keeper = (peak - start for peak, start in zip(peaks, before, strict=True))
    assert program < most
    assert its_keeper < 20 * MEGABYTE
    assert max(slowest) < 10.0, "others wait"


# Forged messages


def test_output_after_a_forged_idle_is_not_lost(hostile: Sandbox) -> None:
    result = attack(hostile, "forge('status', {'execution_state': 'idle'}); time.sleep(0.1); print('later')")

    assert result.status == "ok"
    background = "".join(message.line for message in hostile.background_output.stdout)
    assert "later" in result.stdout + background


def test_a_run_that_was_forged_to_its_end_is_over_and_the_next_one_comes_after_the_code(
    hostile: Sandbox,
) -> None:
    result = attack(
        hostile,
        "forge('status', {'execution_state': 'idle'})\n"
        "for _ in range(100): reply('execute_reply', {'status': 'ok', 'execution_count': 7})\n"
        "time.sleep(0.3); forged = 1; print('later')",
    )

    assert (result.status, result.stdout) == ("ok", "")
    assert hostile.run_code("forged").text == "1"


def test_a_forged_result_is_output_of_the_sandbox_that_forged_it(hostile: Sandbox) -> None:
    result = attack(
        hostile,
        "forge('execute_result', {'data': {'text/plain': 'forged'}, 'metadata': {}, 'execution_count': 7})\n"
        "forge('error', {'ename': 'Forged', 'evalue': 'not true', 'traceback': []}); print('after')",
    )

    assert (result.status, result.text, result.error, result.stdout) == ("ok", "forged", None, "after")


def test_messages_for_another_parent_are_nobodys(hostile: Sandbox) -> None:
    result = attack(
        hostile,
        "foreign = {'msg_id': 'x', 'session': 'y', 'msg_type': 'execute_request'}\n"
        "for other in (foreign, {'msg_id': 5}, {'msg_id': ''}):\n"
        "    for content in ({'name': 'stdout', 'text': 'forged'}, {'execution_state': 'idle'}, {}):\n"
        "        for kind in ('stream', 'status', 'execute_reply', 'error'): forge(kind, content, other)\n"
        "print('true')",
    )

    assert (result.status, result.stdout) == ("ok", "true")


JUNK = r"""
for frames in ([b'junk'], [b''] * 50, [b'<IDS|MSG>'], [b'topic', b'<IDS|MSG>', b'', *[b'{}'] * 4]):
    send(*frames)
once = '{"name": "stdout", "text": "once\\n"}'
send(*say('stream', once))
say('stream', once, key=b'another')
for bad in ('{', 'nonsense', '[]',
            '{"a":' + '[' * 50_000 + ']' * 50_000 + '}',
            '{"data": ' + '[' * 300 + ']' * 300 + '}',
            '{"a": ' + '9' * 10_000 + '}',
            '{"data": [' + '[],' * 6_000_000 + '0]}'):
    say('display_data', bad)
say('stream', '{"name": "stdout", "name": "stderr", "text": "twice the name\\n"}')
say('stream', '{"text": NaN}')
say('status', '{"execution_state": 1e999}')
for _ in range(500): forge('iopub_welcome', {}, {})
"""


def test_what_is_no_true_message_is_dropped_and_counted(hostile: Sandbox) -> None:
    before = dropped(hostile)
    result = attack(hostile, JUNK)

    assert (result.status, result.stdout, result.stderr) == ("ok", "once", "twice the name")
    assert list(result.results) == []
    assert result.truncated  # the kernel says that its subscription was lost
    assert Counter(dropped(hostile)) - Counter(before) == {"malformed": 12, "forged": 2, "replayed": 1}


def test_a_kernel_that_says_it_is_another_one_says_so_once(hostile: Sandbox) -> None:
    result = attack(
        hostile,
        "for number in range(2000):\n"
        "    header = dict(kernel.session.msg_header('status'), session=str(number))\n"
        "    forge('status', {'execution_state': 'busy'}, header=header)",
    )

    assert (result.status, result.state_preserved) == ("ok", False)


HOSTILE_DISPLAYS = r"""
from IPython.display import display
nested = 0
for _ in range(150): nested = [nested]
for bundle in ({'text/html': '<script>alert(1)</script>', 'text/plain': '\x1b]0;title\x07\x1b[2J'},
               {'image/png': 'no base64!', 'image/svg+xml': 5, 'text/plain': ['a'], '': None},
               {'application/json': nested}, {'application/json': float('nan')}, {}):
    display(bundle, raw=True)
_ = say('display_data', '{"data": {"text/plain": "\\ud800"}, "metadata": {}}')
_ = say('stream', '{"name": "stdout", "text": "\\udfff"}')
"""


def test_displays_are_data_whatever_is_in_them(hostile: Sandbox) -> None:
    result = attack(hostile, HOSTILE_DISPLAYS)

    html, wrong, *_, surrogate = result.results
    assert html.html == "<script>alert(1)</script>"
    assert html.text == "\x1b]0;title\x07\x1b[2J"
    assert (wrong.png, wrong.svg, wrong.text) == ("no base64!", None, None)
    assert (surrogate.text, result.stdout) == ("?", "?")


# Floods


# What code says again and again, after FORGE. Some are more than the kernel can say before it is stopped.
FLOODS = [
    "while True: print('x' * 1000)",
    "while True: print('x', flush=True)",
    "import os\nwhile True: os.write(1, b'x' * 65536)",
    "while True: forge('status', {'execution_state': 'idle'})",
    "while True: forge('stream', {'name': 'stdout', 'text': ''})",
    "while True: forge('execute_input', {'code': 'x' * 100_000, 'execution_count': 1})",
    "while True: forge('error', {'ename': 'E', 'evalue': 'x' * 100_000, 'traceback': []})",
    "while True: forge('clear_output', {})",
    "while True: forge('iopub_welcome', {}, {})",
    "n = 0\nwhile True:\n    n += 1; forge('display_data', {'data': {'application/json': [[], {}] * 1000},"
    " 'metadata': {}, 'transient': {'display_id': str(n)}})",
    "while True: forge('update_display_data', {'data': {'a': 'x' * 9999}, 'transient': {'display_id': '1'}})",
    "while True: forge('comm_open', {'comm_id': 'x', 'target_name': 'y'}, buffers=[b'x' * 10**6])",
    "while True: forge('comm_msg', {'comm_id': 'x', 'data': {}}, buffers=[b'x' * 1000])",
    "while True: send(b'junk')",
    "while True: send(*[b'x' * 100_000] * 1000)",
    "while True: say('stream', '{\"text\": ' + '[' * 50_000)",
    "while True: forge('stream', {'name': 'stdout', 'text': 'x' * 30_000_000})",
    "while True: say('display_data', '{\"data\": {\"\": [' + '[],' * 1_200_000 + '0]}}')",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reader"),
    [(code, "callback") for code in FLOODS] + [(code, "iterator") for code in FLOODS[:1]],
    ids=lambda value: str(value)[12:60],
)
def test_no_flood_fills_the_memory_or_keeps_others_waiting(
    bystander: Sandbox, runtime_folder: Path, code: str, reader: str
) -> None:
    """Nobody takes what it says: a callback sleeps, or an iterator is not advanced."""
    settings: dict[str, object] = {**UNISOLATED["local-jupyter"], "max_output": 4 * MEGABYTE, "timeout": 1.0}
    with Sandbox.create("local-jupyter", **settings) as sandbox:  # type: ignore[arg-type]  # by name
        code = FORGE + "print('on', flush=True)\n" + code
        with watched(bystander, runtime_folder, most=200 * MEGABYTE):
            if reader == "callback":
                result = sandbox.run_code(code, on_stdout=_sleep)
            else:
                stream = sandbox.run_code_streaming(code)
                for _ in stream:
                    time.sleep(1.5)
                    break
                result = stream.result

        assert result.status in ("timed_out", "interrupted")
        assert sandbox.run_code("40 + 2").text == "42"


def _sleep(message: OutputMessage) -> None:
    time.sleep(1.0 if message.line == "on" else 0.0001)


BOMBS = {
    "a display": ("from IPython.display import display\ndisplay({'a': 'x' * 200_000_000}, raw=True)", "ok"),
    "a value": ("'x' * 200_000_000", "ok"),
    "many frames": ("send(*[b'x' * 1_000_000] * 200)", "ok"),
    "an error": ("raise ValueError('x' * 200_000_000)", "connection_lost"),
    "a reply": (
        "get_ipython().payload_manager.write_payload("
        "{'source': 'page', 'start': 0, 'data': {'text/plain': 'x' * 200_000_000}})",
        "connection_lost",
    ),
    "a question": ("input('x' * 200_000_000)", "timed_out"),
    "many characters of a prompt": ("input('x' * 200_000)", "timed_out"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_message_of_200_mb_costs_nothing_and_is_told_of(
    hostile: Sandbox, bystander: Sandbox, runtime_folder: Path, name: str
) -> None:
    code, status = BOMBS[name]
    seconds = 2.0 if status == "timed_out" else 60.0
    with watched(bystander, runtime_folder, most=60 * MEGABYTE):
        result = attack(hostile, "kept = 1\n" + code, on_input=lambda request: "answer", timeout=seconds)

    assert result.status == status
    assert result.truncated or result.error is not None
    assert result.state_preserved
    assert hostile.run_code("kept").text == "1"


@pytest.mark.parametrize("length", [LONGEST_TEXT - 1, LONGEST_TEXT + 1, 3 * LONGEST_TEXT])
def test_a_long_print_arrives_whole_in_several_messages(hostile: Sandbox, length: int) -> None:
    result = hostile.run_code(f"print('\u4e2d' * {length}, end='')")

    assert result.stdout == "\u4e2d" * length
    assert not result.truncated


@pytest.mark.slow
def test_questions_that_nobody_asked_are_asked_no_more_than_a_few_times(hostile: Sandbox) -> None:
    asked: list[InputRequest] = []

    def answer(request: InputRequest) -> str:
        asked.append(request)
        time.sleep(0.01)
        return "answer"

    ask = "for n in range(5000): reply('input_request', {'prompt': str(n)}, 'stdin_socket')\n"
    result = attack(hostile, ask + "time.sleep(0.5)", on_input=answer, timeout=1)

    assert result.status in ("ok", "timed_out")
    assert asked
    assert dropped(hostile)["too many questions"] > 1000


@pytest.mark.slow
def test_what_is_said_while_no_run_is_on_fills_nothing(bystander: Sandbox, runtime_folder: Path) -> None:
    code = """
def flood():
    ends = time.monotonic() + 3
    while time.monotonic() < ends:
        n = time.monotonic()
        forge('display_data', {'data': {'text/plain': 'x' * 1000}, 'transient': {'display_id': str(n)}}, {})
        forge('stream', {'name': 'stdout', 'text': 'x' * 1000}, {})
threading.Thread(target=flood, daemon=True).start()
"""
    with Sandbox.create("local-jupyter", **UNISOLATED["local-jupyter"]) as sandbox:  # type: ignore[arg-type]  # by name
        with watched(bystander, runtime_folder, most=60 * MEGABYTE):
            assert sandbox.run_code(FORGE + code).success
            time.sleep(3)  # while it floods
        assert len(sandbox.background_output.stdout)
        assert sandbox.run_code("40 + 2", timeout=60).text == "42"
