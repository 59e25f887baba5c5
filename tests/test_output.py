"""What code prints and shows: exact, live, whole, once, and in order."""

from __future__ import annotations

import threading
import time

import pytest

from code_sandboxes import (
    ExecutionError,
    InputRequest,
    OutputMessage,
    Result,
    Sandbox,
)
from conftest import BUSY, MakeSandbox

IN_A_CONTAINER = True
ON_A_SERVER = True


ISOLATED = True
EVERY_FRONT = True
FAST_VARIANT = "local-jupyter"


def test_prints_arrive_while_the_code_runs(shared_sandbox: Sandbox) -> None:
    code = "import time\nfor i in range(5):\n    print(i)\n    time.sleep(0.2)"
    called: list[float] = []
    shared_sandbox.run_code(code, on_stdout=lambda _: called.append(time.monotonic()))
    iterated = [time.monotonic() for _ in shared_sandbox.run_code_streaming(code)]

    for times in (called, iterated):
        assert len(times) == 5
        assert times[-1] - times[0] >= 0.6


def test_a_line_that_is_not_ended_arrives_while_the_code_runs(shared_sandbox: Sandbox) -> None:
    arrived: list[tuple[float, OutputMessage]] = []
    result = shared_sandbox.run_code(
        "import time; print('half', end=''); time.sleep(0.6); print(' whole')",
        on_stdout=lambda m: arrived.append((time.monotonic(), m)),
    )

    assert [m.line + m.end for _, m in arrived] == ["half", " whole\n"]
    assert arrived[1][0] - arrived[0][0] > 0.3
    assert result.stdout == "half whole"


EXACT = {
    "end=''": "a",
    "newlines": "\n\na\n\n",
    "carriage returns": "10%\r20%\r100%\n\rx\r\ny\r",
    "unicode": "\u00e9\u4e2d\U0001f600 e\u0301\u2028\x85\x0b\x0c\x1cend",
    "NUL": "a\0b\0",
    "ANSI": "\x1b[31mred\x1b[0m",
    "a line of 1 MB": "x" * 1024**2,
    "a line of 1 MB of wide characters": "\U0001f600" * (1024**2 // 4),
}


@pytest.mark.parametrize("name", EXACT)
def test_text_arrives_exactly(shared_sandbox: Sandbox, name: str) -> None:
    text = EXACT[name]
    # json.loads takes a fraction of the time that the kernel needs to read the same as source.
    result = shared_sandbox.run_code(
        "import sys, json; sys.stdout.write(json.loads(input())); sys.stderr.write('err')",
        on_input=lambda _: _json(text),
    )

    assert "".join(m.line + m.end for m in result.logs.stdout) == text
    assert result.stderr == "err"


def test_what_is_no_unicode_text_arrives_as_replacement(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(r"import os; print('a\ud800b'); print(os.fsdecode(b'c\xff'))")

    assert result.stdout.splitlines() == ["a?b", "c\ufffd"]


@pytest.mark.needs("own_process")
def test_bytes_written_to_the_descriptor_itself_are_output_too(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(r"import os; print('text'); os.write(1, b'\xfe\n')")

    assert sorted(result.stdout.splitlines()) == ["text", "\ufffd"]


@pytest.mark.needs("own_process")
def test_characters_written_to_the_descriptor_in_pieces_stay_whole(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "import os, time\n"
        "data = ('\u20ac' * 20_000).encode()\n"
        "for start in range(0, len(data), 10_000): os.write(1, data[start:start + 10_000])\n"
        "time.sleep(0.05); os.write(1, data[:2]); time.sleep(0.05); os.write(1, data[2:3])"
    )

    assert result.stdout == "\u20ac" * 20_001


@pytest.mark.needs("own_process")
def test_bytes_written_to_the_descriptor_last_are_output_of_the_run(shared_sandbox: Sandbox) -> None:
    # Keeping the interpreter's lock keeps any other thread from reading before the cell ends.
    code = "import sys, os; sys.setswitchinterval(100)\nfor _ in range(1): os.write(1, b'late\\n')"
    try:
        outputs = [shared_sandbox.run_code(code).stdout for _ in range(50)]
    finally:
        shared_sandbox.run_code("sys.setswitchinterval(0.005)")

    assert outputs == ["late"] * 50


def test_output_of_a_thread_is_output_of_the_run(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "import threading\nt = threading.Thread(target=lambda: print('thread')); t.start(); t.join()"
    )

    assert result.stdout == "thread"


@pytest.mark.needs("own_process")
def test_output_of_a_child_process_is_output_of_the_run(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "import subprocess, time\nsubprocess.run('echo child; echo err >&2', shell=True); time.sleep(0.1)"
    )

    assert (result.stdout, result.stderr) == ("child", "err")


@pytest.mark.slow
def test_output_while_no_run_is_on_is_background_output(sandbox: Sandbox) -> None:
    sandbox.run_code(
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()"
    )
    give_up = time.monotonic() + 30
    while not sandbox.background_output.stdout:
        assert time.monotonic() < give_up
        time.sleep(0.01)

    assert [m.line for m in sandbox.background_output.stdout] == ["late"]
    assert sandbox.run_code("1").stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "for i in range(1_000_000): print('x' * 99)",
        "import sys\nfor i in range(100): sys.stdout.write('x' * 999_999 + '\\n')",
    ],
    ids=["small lines", "big chunks"],
)
def test_100_mb_of_output_arrive_whole(shared_sandbox: Sandbox, code: str) -> None:
    result = shared_sandbox.run_code(code, timeout=0)

    assert result.status == "ok"
    assert not result.truncated
    assert len(result.stdout) == 100_000_000 - 1
    assert set(result.stdout) == {"x", "\n"}


@pytest.mark.needs("own_process")
@pytest.mark.slow
def test_beyond_max_output_head_and_tail_are_kept_and_the_result_says_so(make_sandbox: MakeSandbox) -> None:
    sandbox = make_sandbox(max_output=100_000)
    result = sandbox.run_code("for i in range(100_000): print(i)")

    assert result.status == "ok"
    assert result.truncated
    lines = result.stdout.splitlines()
    assert lines[0] == "0"
    assert lines[-1] == "99999"
    assert 90_000 < len(result.stdout) <= 100_000
    assert not sandbox.run_code("print(1)").truncated


@pytest.mark.slow
def test_50_000_displays_reach_a_slow_callback_without_a_loss(shared_sandbox: Sandbox) -> None:
    seen: list[str | None] = []

    def slow(result: Result) -> None:
        if len(seen) % 1000 == 0:
            time.sleep(0.02)
        seen.append(result.text)

    result = shared_sandbox.run_code(
        "from IPython.display import display\n"
        "for i in range(50_000): display({'text/plain': str(i)}, raw=True)\nprint('done')",
        on_result=slow,
        timeout=0,
    )

    assert (result.success, result.stdout) == (True, "done"), (result.error, len(seen))
    assert seen == [str(i) for i in range(50_000)]
    assert len(result.results) == 50_000


def test_rich_results(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "from IPython.display import display, HTML, JSON, Markdown, Latex, SVG, Javascript\n"
        "display(HTML('<b>h</b>'), Markdown('# m'), Latex('$l$'), JSON({'a': [1]}), Javascript('1'))\n"
        "import base64\n"
        "class Picture:\n"
        "    def _repr_png_(self): return base64.b64decode('iVBORw0KGgo=')\n"
        "    def __repr__(self): return 'a picture'\n"
        "Picture()"
    )

    html, markdown, latex, json, javascript, main = result.results
    assert html.html == "<b>h</b>"
    assert markdown.markdown == "# m"
    assert latex.latex == "$l$"
    assert json.json == {"a": [1]}
    assert javascript.javascript == "1"
    assert main.is_main_result
    assert (main.text, main.formats()) == ("a picture", ["text/plain", "image/png"])
    assert main.png is not None
    assert main.png.strip() == "iVBORw0KGgo="
    assert result.text == "a picture"


def test_an_update_replaces_a_display_of_an_earlier_run(shared_sandbox: Sandbox) -> None:
    first = shared_sandbox.run_code("from IPython.display import display\nh = display(1, display_id=True)")
    updates: list[Result] = []
    second = shared_sandbox.run_code("h.update(2)", on_result=updates.append)

    assert [r.text for r in first.results] == ["2"]
    assert [r.text for r in updates] == ["2"]
    assert list(second.results) == []


def test_clear_output_clears_results_and_keeps_logs(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "from IPython.display import clear_output, display\n"
        "for i in range(3):\n    clear_output(wait=True); print(i); display(i)"
    )

    assert [r.text for r in result.results] == ["2"]
    assert result.stdout == "0\n1\n2"


@pytest.mark.needs("magics")
def test_the_page_of_a_question_mark_is_a_result(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code("len?")

    assert result.success
    assert "Return the number of items" in (result.results[0].text or "")


@pytest.mark.needs("magics")
def test_magics_and_shell_escapes_work(shared_sandbox: Sandbox) -> None:
    assert shared_sandbox.run_code("!echo shell").stdout.strip() == "shell"
    assert shared_sandbox.run_code("%%bash\necho magic").stdout == "magic"


def test_top_level_await_works(shared_sandbox: Sandbox) -> None:
    assert shared_sandbox.run_code("import asyncio\nawait asyncio.sleep(0, 'slept')").text == "'slept'"


def test_the_execution_count_goes_up(sandbox: Sandbox) -> None:
    assert [sandbox.run_code("1").execution_count for _ in range(3)] == [1, 2, 3]


def test_the_stream_gives_everything_in_the_order_of_its_production(shared_sandbox: Sandbox) -> None:
    stream = shared_sandbox.run_code_streaming(
        "from IPython.display import display\nprint('a', end='')\ndisplay(1)\nprint('b')\n1 / 0"
    )
    seen = [m.line if isinstance(m, OutputMessage) else str(getattr(m, "text", m)) for m in stream]

    assert seen == ["a", "1", "b", "ZeroDivisionError: division by zero"]
    assert stream.result.status == "error"


def test_leaving_the_stream_early_interrupts_the_run(sandbox: Sandbox) -> None:
    stream = sandbox.run_code_streaming("x = 1\nimport time\nwhile True:\n    print(1); time.sleep(0.01)")
    for _ in stream:
        break

    assert stream.result.status == "interrupted"
    assert sandbox.is_executing is False
    assert sandbox.run_code("x").text == "1"


def test_the_result_of_a_stream_is_there_when_it_is_over(shared_sandbox: Sandbox) -> None:
    stream = shared_sandbox.run_code_streaming("print(1)")
    with pytest.raises(RuntimeError, match="the run is not over"):
        _ = stream.result
    assert len(list(stream)) == 1
    assert stream.result.success
    with pytest.raises(RuntimeError, match="only once"):
        list(stream)


@pytest.mark.slow
def test_a_paused_iterator_does_not_delay_the_timeout(sandbox: Sandbox) -> None:
    stream = sandbox.run_code_streaming(
        f"import time\nt = time.time()\nprint('on')\ntry:\n    {BUSY}\nfinally: print(time.time() - t)",
        timeout=1,
    )
    lines = []
    for message in stream:
        if isinstance(message, OutputMessage):
            lines.append(message.line)
            time.sleep(2 if message.line == "on" else 0)

    assert stream.result.status == "timed_out"
    assert float(lines[1]) < 1.9


# Callbacks


def test_each_callback_gets_what_is_meant_for_it_once_and_in_the_callers_thread(
    shared_sandbox: Sandbox,
) -> None:
    got: list[tuple[str, object, int]] = []

    def note(kind: str, value: object) -> None:
        got.append((kind, value, threading.get_ident()))

    shared_sandbox.run_code(
        "import sys, time\nprint('out'); time.sleep(0.05)\nprint('err', file=sys.stderr); time.sleep(0.05)\n"
        "from IPython.display import display; display(1)\nraise ValueError('v')",
        on_stdout=lambda m: note("stdout", m.line),
        on_stderr=lambda m: note("stderr", m.line),
        on_result=lambda r: note("result", r.text),
        on_error=lambda e: note("error", str(e)),
    )

    assert [(kind, value) for kind, value, _ in got] == [
        ("stdout", "out"),
        ("stderr", "err"),
        ("result", "1"),
        ("error", "ValueError: v"),
    ]
    assert {thread for _, _, thread in got} == {threading.get_ident()}


@pytest.mark.slow
def test_on_error_is_told_of_a_timeout_once(sandbox: Sandbox) -> None:
    errors: list[ExecutionError] = []
    result = sandbox.run_code("while True: pass", timeout=0.3, on_error=errors.append)

    assert errors == [result.error]
    assert errors[0].name == "TimeoutError"


@pytest.mark.callbacks
def test_an_exception_in_a_callback_is_raised_after_the_run_and_loses_no_state(sandbox: Sandbox) -> None:
    calls: list[str] = []

    def fail(message: OutputMessage) -> None:
        calls.append(message.line)
        raise LookupError("from the callback")

    with pytest.raises(LookupError, match="from the callback"):
        sandbox.run_code(
            "for i in range(3): print(i)\nimport time; time.sleep(0.3); x = 'end'", on_stdout=fail
        )

    assert calls == ["0"]
    assert sandbox.run_code("x").text == "'end'"


@pytest.mark.callbacks
def test_a_callback_may_use_another_context_and_interrupt_but_not_wait_for_itself(sandbox: Sandbox) -> None:
    other = sandbox.create_context("other")
    seen: list[str | None] = []

    def use(_: object) -> None:
        seen.append(sandbox.run_code("40 + 2", context=other).text)
        with pytest.raises(RuntimeError, match="would wait for itself"):
            sandbox.run_code("1")
        sandbox.interrupt("default")

    result = sandbox.run_code(f"print(1)\n{BUSY}", on_stdout=use)

    assert seen == ["42"]
    assert result.status == "interrupted"


@pytest.mark.callbacks
def test_a_callback_may_run_code_in_another_sandbox(make_sandbox: MakeSandbox) -> None:
    sandbox, other = make_sandbox(), make_sandbox()
    seen: list[str | None] = []
    sandbox.run_code("print(1)", on_stdout=lambda _: seen.append(other.run_code("40 + 2").text))

    assert seen == ["42"]


# input()


def test_input_and_getpass_are_answered(shared_sandbox: Sandbox) -> None:
    requests: list[InputRequest] = []

    def answer(request: InputRequest) -> str:
        requests.append(request)
        return "answer \u00e9"

    result = shared_sandbox.run_code(
        "import getpass\nprint(input('name? '))\ngetpass.getpass('secret? ')", on_input=answer
    )

    assert requests == [InputRequest("name? ", False), InputRequest("secret? ", True)]
    assert result.stdout == "answer \u00e9"
    assert result.text == "'answer \u00e9'"


def test_without_on_input_asking_fails_at_once(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code("input('name? ')")

    assert result.error is not None
    assert result.error.name == "StdinNotImplementedError"


@pytest.mark.slow
def test_waiting_for_an_answer_does_not_count_against_the_timeout(sandbox: Sandbox) -> None:
    def think(_: InputRequest) -> str:
        time.sleep(0.7)
        return "a"

    assert sandbox.run_code("input()", on_input=think, timeout=0.5).status == "ok"
    result = sandbox.run_code(f"input()\n{BUSY}", on_input=think, timeout=0.5)
    assert result.status == "timed_out"


@pytest.mark.parametrize("bad", [lambda _: 1 / 0, lambda _: 5], ids=["raises", "no str"])
@pytest.mark.slow
def test_an_on_input_that_fails_stops_the_run_and_is_raised(sandbox: Sandbox, bad: object) -> None:
    with pytest.raises((ZeroDivisionError, TypeError)):
        sandbox.run_code("x = 1; input()", on_input=bad)  # type: ignore[arg-type]  # on purpose

    assert sandbox.run_code("x").text == "1"


def test_a_failing_callback_before_input_does_not_hang(sandbox: Sandbox) -> None:
    with pytest.raises(ZeroDivisionError):
        sandbox.run_code("print('x', end=''); input()", on_stdout=lambda _: 1 / 0, on_input=lambda _: "a")

    assert sandbox.run_code("1").text == "1"


def _json(text: str) -> str:
    import json

    return json.dumps(text)
