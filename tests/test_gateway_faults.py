"""What goes wrong with a server, the way to it and its kernels: told as it is, soon, and cleared up.

No success with anything missing, no waiting beyond the bounds that ``variants/gateway.py`` states, nothing
left on the server or here. Each test has that looked at when it is over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from code_sandboxes import (
    ExecutionResult,
    InputRequest,
    OutputMessage,
    Sandbox,
    SandboxAuthenticationError,
    SandboxConfig,
    SandboxConnectionError,
    SandboxError,
    SandboxNotFoundError,
    SandboxNotStartedError,
)
from code_sandboxes.remote import kernels as remote_kernels, server as remote_server
from code_sandboxes.remote.rest import Answer, Rest
from code_sandboxes.transports import websocket
from code_sandboxes.transports.loop import the_loop
from code_sandboxes.variants import gateway as gateway_variant, remote_guards
from conftest import open_descriptors, wait_until
from tests.cutting_proxy import CuttingProxy, Ending
from tests.server_fixtures import running
from tests.servers import JupyterServer, Server
from tests.servers.server import free_port
from tests.websocket_proxy import WebSocketProxy

pytestmark = pytest.mark.slow

MIB = 1024**2

# For what should take a moment: who waits longer, waits for what does not come.
SOON = 20.0

LONG = "print('began', flush=True)\nfor _ in range(6000): __import__('time').sleep(0.01)\nprint('ended')"

# They take about a second.
LINES = "import time\nfor number in range(400): print('line', number, flush=True); time.sleep(0.001)"
ALL_LINES = "".join(f"line {number}\n" for number in range(400)).rstrip("\n")


class Diary(logging.Handler):
    """All that anybody could read of what happened: log records of whatever library, errors, and objects."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.entries: list[str] = []
        self.secrets: set[str] = set()
        self.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.entries.append(self.format(record))

    def note(self, *things: object) -> None:
        self.entries += [f"{thing!r} {thing}" for thing in things]

    def note_error(self, error: BaseException) -> None:
        self.note(error, vars(error))
        self.entries += traceback.format_exception(error)


@pytest.fixture(scope="module")
def diary() -> Iterator[Diary]:
    """Kept while the tests of this module go on; the last of them reads it."""
    diary = Diary()
    names = ("", "code_sandboxes", "requests", "urllib3", "websockets")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger().addHandler(diary)
    yield diary
    logging.getLogger().removeHandler(diary)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, diary: Diary) -> Iterator[JupyterServer]:
    """One that no test harms: a Jupyter Server as it is without any settings."""
    with running(JupyterServer, tmp_path_factory, "server") as server:
        diary.secrets.add(server.token)
        yield server


@pytest.fixture(scope="module")
def fragile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    resigned = {"KernelRestarter.restart_limit": 0}
    with running(JupyterServer, tmp_path_factory, "fragile", settings=resigned) as server:
        yield server


@pytest.fixture
def fragile(fragile_server: JupyterServer, diary: Diary) -> JupyterServer:
    """One that tests kill and start again; it runs, has no kernels, and does not restart any."""
    if fragile_server.process.poll() is not None:
        fragile_server.start()
    diary.secrets.add(fragile_server.token)
    assert kernels(fragile_server) == []
    return fragile_server


@pytest.fixture(autouse=True)
def nothing_is_left(server: JupyterServer) -> Iterator[None]:
    the_loop()
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    yield
    wait_until(lambda: kernels(server) == [])
    wait_until(lambda: set(threading.enumerate()) <= threads)
    # What could not be ended is left to a process that watches over this one, by a pipe.
    wait_until(lambda: open_descriptors() <= descriptors + bool(remote_guards.guards._guarded))


@pytest.fixture
def proxy(server: JupyterServer) -> Iterator[CuttingProxy]:
    with CuttingProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def frames(server: JupyterServer) -> Iterator[WebSocketProxy]:
    with WebSocketProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is waited for by the clock takes a second or so."""
    monkeypatch.setattr(websocket, "_PING_EVERY", 0.2)
    monkeypatch.setattr(websocket, "_SILENT_FOR", 0.6)
    monkeypatch.setattr(websocket, "_PATIENCE", 1.0)
    monkeypatch.setattr(websocket, "_DIAL", 1.0)
    monkeypatch.setattr(websocket, "_OPENING", 5.0)
    monkeypatch.setattr(remote_kernels, "_ASK_EVERY", 0.5)
    monkeypatch.setattr(remote_server, "_TO_DELETE", 2.0)
    for function in (Rest.ask, Rest.expect):
        assert function.__kwdefaults__ is not None
        monkeypatch.setitem(function.__kwdefaults__, "seconds", 2.0)


MakeSandbox = Callable[..., Sandbox]


@pytest.fixture
def make(server: JupyterServer, diary: Diary) -> Iterator[MakeSandbox]:
    """Makes sandboxes at a URL, which end with the test."""
    made: list[Sandbox] = []

    def make(url: str, **settings: Any) -> Sandbox:
        sandbox = Sandbox.create(
            "jupyter-gateway", server_url=url, **{"token": server.token, "timeout": 60, **settings}
        )
        made.append(sandbox)
        diary.note(sandbox, sandbox.info, sandbox.config, sandbox.id)
        return sandbox

    yield make
    for sandbox in made:
        diary.note(sandbox, sandbox.info)
        with contextlib.suppress(SandboxError):  # the server may be gone
            sandbox.kill()


class Running:
    """Something that is going on in a thread of its own."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._value: object = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="running", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except Exception as error:  # it is what is asked for
            self._error = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def outcome(self, seconds: float = SOON) -> Any:
        self._thread.join(seconds)
        assert self.is_over, f"it is still going on after {seconds} s"
        if self._error is not None:
            raise self._error
        return self._value


class RunningCode(Running):
    """A run, as it is after it has printed something."""

    def __init__(self, sandbox: Sandbox, code: str, until: str = "began", **settings: Any) -> None:
        self._began = threading.Event()

        def look(message: Any) -> None:
            if until in message.line:
                self._began.set()

        super().__init__(lambda: sandbox.run_code(code, on_stdout=look, **settings))
        wait_until(lambda: self._began.is_set() or self.is_over)

    def result(self, seconds: float = SOON) -> ExecutionResult:
        result = self.outcome(seconds)
        assert isinstance(result, ExecutionResult)
        return result


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


@contextmanager
def refused(diary: Diary, kind: type[Exception], match: str) -> Iterator[None]:
    with within(SOON), pytest.raises(kind, match=match) as caught:
        yield
    diary.note_error(caught.value)


def kernels(server: Server) -> list[str]:
    return [kernel["id"] for kernel in server.request("GET", "/api/kernels").json()]


def only_kernel(server: Server) -> str:
    (kernel,) = kernels(server)
    return f"/api/kernels/{kernel}"


def process_of_kernel(sandbox: Sandbox) -> psutil.Process:
    return psutil.Process(int(sandbox.run_code("import os; os.getpid()").text or ""))


def sentence(result: ExecutionResult) -> str:
    assert result.error is not None
    return result.error.value


def works(sandbox: Sandbox) -> bool:
    result = sandbox.run_code("20 + 22")
    return (result.status, result.text) == ("ok", "42")


# The server.


def test_a_server_that_is_killed_and_started_again_ends_the_run(
    fragile: JupyterServer, make: MakeSandbox
) -> None:
    sandbox = make(fragile.url, token=fragile.token)
    sandbox.run_code("x = 1")
    run = RunningCode(sandbox, LONG)
    fragile.kill()
    fragile.start()
    result = run.result()
    assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "began", False)
    assert "it is not on the server any more" in sentence(result)
    assert sandbox.run_code("'x' in globals()").text == "False"
    assert sandbox.terminate()
    assert kernels(fragile) == []


def test_a_server_that_is_killed_and_started_again_between_two_runs_has_lost_the_variables(
    fragile: JupyterServer, make: MakeSandbox
) -> None:
    sandbox = make(fragile.url, token=fragile.token)
    sandbox.run_code("x = 1")
    fragile.kill()
    fragile.start()
    result = sandbox.run_code("'x' in globals()")
    assert (result.status, result.text, result.state_preserved) == ("ok", "False", False)
    assert sandbox.run_code("1").state_preserved


def test_a_server_that_stays_away_is_waited_for_so_long_and_no_longer(
    proxy: CuttingProxy, make: MakeSandbox, impatient: None, diary: Diary
) -> None:
    sandbox = make(proxy.url)
    run = RunningCode(sandbox, f"x = 7\n{LONG}")
    proxy.refuse()
    proxy.cut()
    result = run.result()
    assert (result.status, result.stdout, result.state_preserved) == ("connection_lost", "began", False)
    assert f"the connection to {proxy.url} was lost" in sentence(result)
    with within(SOON):
        not_run = sandbox.run_code("x = 1")
    assert not_run.status == "aborted"
    assert "did not answer" in sentence(not_run)
    with refused(diary, SandboxConnectionError, "did not answer"):
        sandbox.files.read("/etc/hostname")
    proxy.accept()
    result = sandbox.run_code("x")  # and not after the minute that the first would have taken
    assert (result.status, result.text, result.state_preserved) == ("ok", "7", True)


def test_a_server_that_stays_away_between_two_runs_has_lost_the_variables_when_it_is_back(
    fragile: JupyterServer, make: MakeSandbox, impatient: None
) -> None:
    sandbox = make(fragile.url, token=fragile.token)
    sandbox.run_code("x = 1")
    fragile.kill()
    wait_until(lambda: not sandbox.run_code("1").success)
    fragile.start()
    result = sandbox.run_code("'x' in globals()")
    assert (result.status, result.text, result.state_preserved) == ("ok", "False", False)


def test_a_server_that_is_not_there_is_told_at_once(make: MakeSandbox, diary: Diary) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with refused(diary, SandboxConnectionError, f"the Jupyter server at {url} did not answer.*refused"):
        make(url)


def test_a_server_that_says_nothing_is_not_waited_for_again_and_again(
    proxy: CuttingProxy, make: MakeSandbox, impatient: None, diary: Diary
) -> None:
    proxy.stall()
    with within(5), refused(diary, SandboxConnectionError, "did not answer.*timed out"):
        make(proxy.url)


def test_a_server_that_asks_to_come_again_in_an_hour_is_not_waited_for(
    make: MakeSandbox, diary: Diary
) -> None:
    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("Retry-After", "3600")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Busy) as busy:
        thread = threading.Thread(target=busy.serve_forever, args=(0.01,))
        thread.start()
        try:
            with refused(diary, SandboxConnectionError, "HTTP status 503"):
                make(f"http://127.0.0.1:{busy.server_address[1]}")
        finally:
            busy.shutdown()
            thread.join()


def test_a_kernel_that_cannot_be_deleted_is_told(
    proxy: CuttingProxy,
    server: JupyterServer,
    make: MakeSandbox,
    diary: Diary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_guards, "_LOOKS", (1.0, 1.0, 1.0))
    sandbox = make(proxy.url)
    kernel = only_kernel(server).rpartition("/")[2]
    proxy.refuse()
    proxy.cut()
    with refused(diary, SandboxConnectionError, f"the kernel {kernel} is left"):
        sandbox.terminate()
    assert not sandbox.is_running
    assert not sandbox.terminate()
    only_kernel(server)
    proxy.accept()
    wait_until(lambda: kernels(server) == [])  # as it is tried again


def test_a_server_that_cannot_delete_a_kernel_yet_is_asked_again(
    server: JupyterServer, make: MakeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotYet(Rest):
        refused = 0

        def ask(self, verb: str, path: str, *arguments: Any, **more: Any) -> Answer:
            if verb == "DELETE" and self.refused < 2:  # as a server says that is starting it again
                self.refused += 1
                response = requests.Response()
                response.status_code = 500
                return Answer(response)
            return super().ask(verb, path, *arguments, **more)

    monkeypatch.setattr(remote_server, "Rest", NotYet)
    assert make(server.url).terminate()
    assert kernels(server) == []


def test_a_kernel_that_takes_its_time_to_begin_again_is_waited_for(
    server: JupyterServer, make: MakeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(remote_server.JupyterServer):
        def restart(self, kernel_id: str) -> None:
            time.sleep(0.5)  # longer than a handshake that is not heard of is tried again
            super().restart(kernel_id)

    monkeypatch.setattr(gateway_variant, "JupyterServer", Slow)
    sandbox = make(server.url)
    sandbox.run_code("x = 1")
    sandbox.restart()
    assert sandbox.run_code("'x' in globals()").text == "False"


def test_the_end_does_not_wait_for_a_server_that_says_nothing(
    proxy: CuttingProxy, server: JupyterServer, make: MakeSandbox, impatient: None, diary: Diary
) -> None:
    sandbox = make(proxy.url)
    proxy.stall()
    with within(10), refused(diary, SandboxConnectionError, "is left"):
        sandbox.terminate()
    proxy.cut()
    proxy.resume()
    server.request("DELETE", only_kernel(server))


def test_a_token_that_is_revoked_is_told(fragile: JupyterServer, make: MakeSandbox, diary: Diary) -> None:
    sandbox = make(fragile.url, token=fragile.token)
    run = RunningCode(sandbox, LONG)
    fragile.kill()
    fragile.token = "another-" + fragile.token[::-1]
    diary.secrets.add(fragile.token)
    fragile.start()
    result = run.result()
    assert (result.status, result.stdout, result.state_preserved) == ("connection_lost", "began", False)
    assert "does not let this token to the kernel" in sentence(result)
    not_run = sandbox.run_code("1")
    assert not_run.status == "aborted"
    assert "does not take this token" in sentence(not_run)
    with refused(diary, SandboxConnectionError, "is left.*does not take this token"):
        sandbox.terminate()


# The way to it.


@pytest.mark.parametrize("ending", ["reset", "end"])
def test_a_connection_that_is_cut_in_the_middle_of_output_costs_no_success(
    proxy: CuttingProxy, make: MakeSandbox, ending: Ending
) -> None:
    sandbox = make(proxy.url)
    sandbox.run_code("x = 7")
    run = RunningCode(sandbox, LINES, until="line 150")
    proxy.cut(ending)
    result = run.result()
    assert result.status in ("ok", "connection_lost")
    assert result.stdout == ALL_LINES or result.truncated or result.status == "connection_lost"
    assert result.stdout.startswith("line 0\nline 1\n")
    assert result.state_preserved
    again = sandbox.run_code("x")
    assert (again.status, again.text, again.truncated) == ("ok", "7", False)


@pytest.mark.parametrize("code", [1001, 1006, 1012])
def test_output_that_was_lost_with_a_connection_is_missed(
    frames: WebSocketProxy, make: MakeSandbox, code: int
) -> None:
    sandbox = make(frames.url)
    frames.close_before(b"line 200", code)
    result = sandbox.run_code(LINES)
    assert (result.status, result.truncated) == ("ok", True)
    assert "line 199\n" in result.stdout
    assert result.stdout.endswith("line 399")
    assert works(sandbox)


def test_a_reply_that_was_lost_with_a_connection_is_not_made_up(
    frames: WebSocketProxy, make: MakeSandbox
) -> None:
    sandbox = make(frames.url)
    frames.close_before(b'"execute_reply"', 1006)
    result = sandbox.run_code("x = 7; print('said', flush=True); import time; time.sleep(0.5)")
    assert (result.status, result.stdout, result.state_preserved) == ("connection_lost", "said", True)
    assert "the connection to the kernel was lost for a while, and with it how the code ended" in sentence(
        result
    )
    assert sandbox.run_code("x").text == "7"


def test_a_connection_that_is_cut_between_two_runs_costs_nothing(
    proxy: CuttingProxy, make: MakeSandbox
) -> None:
    sandbox = make(proxy.url)
    sandbox.run_code("x = 7")
    for _ in range(3):
        assert proxy.cut() > 0
        result = sandbox.run_code("x")
        assert (result.status, result.text, result.truncated, result.state_preserved) == (
            "ok",
            "7",
            False,
            True,
        )


def test_a_run_that_begins_while_the_connection_is_away_is_run_when_it_is_back(
    proxy: CuttingProxy, make: MakeSandbox
) -> None:
    sandbox = make(proxy.url)
    sandbox.run_code("x = 7")
    proxy.refuse()
    proxy.cut()
    run = Running(lambda: sandbox.run_code("print(x)\nx = 8"))
    wait_until(lambda: sandbox.is_executing)
    proxy.accept()
    result = run.outcome()
    assert (result.status, result.stdout, result.truncated) == ("ok", "7", False)
    assert sandbox.run_code("x").text == "8"


def test_a_connection_that_says_nothing_any_more_is_noticed(
    proxy: CuttingProxy, make: MakeSandbox, impatient: None
) -> None:
    sandbox = make(proxy.url)
    sandbox.run_code("x = 7")
    run = RunningCode(sandbox, LONG)
    proxy.stall()
    result = run.result()
    assert (result.status, result.stdout) == ("connection_lost", "began")
    assert f"the connection to {proxy.url} was lost" in sentence(result)
    proxy.cut()
    proxy.resume()
    result = sandbox.run_code("x")  # and not after the minute that the run would have taken
    assert (result.status, result.text, result.state_preserved) == ("ok", "7", True)


def test_a_connection_that_says_nothing_for_a_while_is_made_again(
    proxy: CuttingProxy, make: MakeSandbox, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "_PATIENCE", SOON)
    sandbox = make(proxy.url)
    run = RunningCode(sandbox, "print('began', flush=True)\nimport time; time.sleep(2); print('ended')")
    before = proxy.connections
    proxy.stall()
    wait_until(lambda: proxy.connections > before)
    proxy.cut()
    proxy.resume()
    result = run.result()
    assert result.status == "ok" if "ended" in result.stdout else result.truncated
    assert works(sandbox)


def test_a_run_that_times_out_while_the_server_is_away_does_not_say_that_it_was_stopped(
    proxy: CuttingProxy, make: MakeSandbox
) -> None:
    sandbox = make(proxy.url, config=SandboxConfig(interrupt_grace=0.5))
    run = RunningCode(sandbox, LONG, timeout=1)
    proxy.refuse()
    proxy.cut()
    result = run.result()
    assert (result.status, result.stdout, result.state_preserved) == ("timed_out", "began", False)
    assert "the code was interrupted" not in sentence(result)
    assert "nobody knows" in sentence(result)
    proxy.accept()
    assert works(sandbox)


def test_proxies_that_cut_what_is_silent_do_not_meet_anything_silent(
    proxy: CuttingProxy, make: MakeSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They cut after 30 s, and something is sent every 10 s: here it all is fifteen times faster.
    assert 3 * websocket._PING_EVERY <= 30
    monkeypatch.setattr(websocket, "_PING_EVERY", websocket._PING_EVERY / 15)
    sandbox = make(proxy.url)
    sandbox.run_code("x = 7")
    before = proxy.connections
    proxy.cut_idle(2.0)
    result = sandbox.run_code("import time; time.sleep(2.7); print('ended')")
    assert (result.status, result.stdout, result.truncated) == ("ok", "ended", False)
    assert proxy.connections == before
    assert works(sandbox)
    sandbox.restart()  # by a connection for which nothing is sent
    assert works(sandbox)


@pytest.mark.parametrize("lost", ["kernel_info_reply", "execute_reply", "busy", "idle"])
def test_a_start_does_not_wait_for_what_was_lost_on_its_way(
    frames: WebSocketProxy, make: MakeSandbox, lost: str
) -> None:
    frames.close_before(f'"{lost}"'.encode(), 1006)
    with within(SOON):
        sandbox = make(frames.url)
    assert works(sandbox)
    assert sandbox.files.exists("/")


def _has_begun(proxy: CuttingProxy, connections: int, start: Running) -> bool:
    return proxy.connections > connections + 1 or start.is_over


def test_a_start_is_not_stopped_by_a_connection_that_is_cut(proxy: CuttingProxy, make: MakeSandbox) -> None:
    with ExitStack() as made:
        for _ in range(3):
            start = Running(lambda: made.enter_context(make(proxy.url)))
            wait_until(partial(_has_begun, proxy, proxy.connections, start))
            proxy.cut()
            assert works(start.outcome())


def test_a_start_of_which_nobody_hears_leaves_no_kernel(
    frames: WebSocketProxy, server: JupyterServer, make: MakeSandbox, diary: Diary
) -> None:
    before = server.log.read_text().count("Kernel started")
    frames.lose_answer(b"POST /api/kernels ")
    with refused(diary, SandboxConnectionError, "did not answer"):
        make(frames.url)
    assert server.log.read_text().count("Kernel started") == before + 1
    assert kernels(server) == []


@pytest.mark.parametrize(
    ("status", "why"),
    [(404, "there is no websocket to the kernel"), (403, "does not let this token to the kernel")],
)
def test_a_proxy_that_lets_no_websockets_through_is_told(
    frames: WebSocketProxy, server: JupyterServer, make: MakeSandbox, diary: Diary, status: int, why: str
) -> None:
    frames.refuse(status)
    with refused(diary, SandboxConnectionError, f"could not be started: .*{why}.*HTTP status {status}"):
        make(frames.url)
    make(server.url)
    with Sandbox.from_id(f"jupyter-gateway:{frames.url}#{kernels(server)[0]}", token=server.token) as again:
        with within(SOON):
            result = again.run_code("1")
        assert result.status == "aborted"
        assert f"could not be reached: {frames.url}" in sentence(result) or why in sentence(result)
        frames.refuse(None)
        assert works(again)


def test_what_is_attached_to_does_not_wait_for_what_was_lost_on_its_way(
    frames: WebSocketProxy, server: JupyterServer, make: MakeSandbox
) -> None:
    make(server.url).run_code("x = 7")
    frames.close_before(b'"kernel_info_reply"', 1006)
    again = Sandbox.from_id(f"jupyter-gateway:{frames.url}#{kernels(server)[0]}", token=server.token)
    with within(SOON):
        assert again.run_code("x").text == "7"
    again.detach()


def test_an_answer_to_input_is_not_lost_with_the_connection(proxy: CuttingProxy, make: MakeSandbox) -> None:
    sandbox = make(proxy.url)

    def answer(_: InputRequest) -> str:
        proxy.cut()
        return "the answer"

    result = sandbox.run_code("print(input('?'))", on_input=answer)
    assert (result.status, result.stdout) == ("ok", "the answer")


def test_frames_that_come_twice_count_once(frames: WebSocketProxy, make: MakeSandbox) -> None:
    frames.duplicate()
    sandbox = make(frames.url)
    result = sandbox.run_code("for n in range(50): print(n, flush=True)\nprint(input('?'))\n7", on_input=str)
    assert result.success, result
    assert result.stdout == "".join(f"{n}\n" for n in range(50)) + "InputRequest(prompt='?', password=False)"
    assert [each.text for each in result.results] == ["7"]
    assert sandbox.run_code("1 / 0").status == "error"
    assert sandbox.commands.run("seq 5").stdout == "1\n2\n3\n4\n5\n"
    sandbox.files.write_bytes("/tmp/twice", bytes(3 * MIB))
    assert sandbox.files.read_bytes("/tmp/twice") == bytes(3 * MIB)
    sandbox.files.rm("/tmp/twice")


def test_a_download_that_is_cut_leaves_the_file_as_it_was(
    proxy: CuttingProxy, make: MakeSandbox, tmp_path: Path, diary: Diary
) -> None:
    sandbox = make(proxy.url)
    there, here = tmp_path / "there", tmp_path / "here"
    there.write_bytes(os.urandom(MIB) * 50)
    here.write_text("as it was")
    before = proxy.bytes_down
    download = Running(lambda: sandbox.files.download(str(there), str(here)))
    wait_until(lambda: proxy.bytes_down > before + 10 * MIB)
    proxy.cut()
    with refused(diary, SandboxConnectionError, "connection"):
        download.outcome()
    assert here.read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir() if path not in (there, here)] == []
    sandbox.files.download(str(there), str(here))
    assert here.read_bytes() == there.read_bytes()


def test_an_upload_that_is_cut_leaves_the_file_as_it_was(
    proxy: CuttingProxy, make: MakeSandbox, tmp_path: Path, diary: Diary
) -> None:
    sandbox = make(proxy.url)
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(os.urandom(MIB) * 50)
    there.write_text("as it was")
    before = proxy.bytes_up
    upload = Running(lambda: sandbox.files.upload(str(here), str(there)))
    wait_until(lambda: proxy.bytes_up > before + 10 * MIB)
    proxy.cut()
    with refused(diary, SandboxConnectionError, "connection"):
        upload.outcome()
    assert there.read_text() == "as it was"
    sandbox.files.upload(str(here), str(there))
    assert there.read_bytes() == here.read_bytes()


def test_calls_that_are_on_when_the_connection_is_lost_do_not_wait_for_the_next(
    proxy: CuttingProxy, make: MakeSandbox, diary: Diary
) -> None:
    sandbox = make(proxy.url)
    pids: list[int] = []
    before = proxy.bytes_down

    def note(message: OutputMessage) -> None:
        pids.append(int(message.line))

    calls = [
        Running(lambda: sandbox.commands.run("echo $$; exec sleep 60", on_stdout=note)),
        Running(lambda: sandbox.files.read_bytes("/dev/zero", 0, 1_000_000_000)),
    ]
    wait_until(lambda: pids and proxy.bytes_down > before + 5 * MIB)
    proxy.refuse()
    proxy.cut()
    for call in calls:
        with refused(diary, SandboxConnectionError, "the connection to the kernel was lost"):
            call.outcome(5)
    proxy.accept()
    assert sandbox.commands.run("echo again").stdout == "again\n"
    os.kill(pids[0], signal.SIGKILL)


# Its kernels.


def test_a_kernel_that_somebody_deletes_ends_the_run(server: JupyterServer, make: MakeSandbox) -> None:
    sandbox = make(server.url)
    run = RunningCode(sandbox, LONG)
    server.request("DELETE", only_kernel(server))
    result = run.result()
    assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "began", False)
    assert "somebody has deleted it" in sentence(result)
    assert works(sandbox)
    assert len(kernels(server)) == 1


def test_a_kernel_that_somebody_deletes_between_two_runs_has_lost_the_variables(
    server: JupyterServer, make: MakeSandbox
) -> None:
    sandbox = make(server.url)
    sandbox.run_code("x = 7")
    server.request("DELETE", only_kernel(server))
    result = sandbox.run_code("'x' in globals()")
    assert (result.status, result.text, result.state_preserved) == ("ok", "False", False)
    assert sandbox.files.exists("/")
    assert sandbox.id.endswith(kernels(server)[0])


def test_a_kernel_that_somebody_restarts_ends_the_run(server: JupyterServer, make: MakeSandbox) -> None:
    sandbox = make(server.url)
    kernel = only_kernel(server)
    run = RunningCode(sandbox, LONG)
    server.request("POST", f"{kernel}/restart").raise_for_status()
    result = run.result()
    assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "began", False)
    assert "somebody has restarted it" in sentence(result)
    assert works(sandbox)
    assert only_kernel(server) == kernel


def test_a_kernel_that_somebody_restarts_between_two_runs_has_lost_the_variables(
    server: JupyterServer, make: MakeSandbox
) -> None:
    sandbox = make(server.url)
    sandbox.run_code("x = 7")
    server.request("POST", f"{only_kernel(server)}/restart").raise_for_status()
    result = sandbox.run_code("'x' in globals()")
    assert (result.status, result.text, result.state_preserved) == ("ok", "False", False)


def test_a_kernel_that_is_restarted_while_the_connection_is_away_has_lost_the_variables(
    proxy: CuttingProxy, server: JupyterServer, make: MakeSandbox
) -> None:
    sandbox = make(proxy.url)
    sandbox.run_code("x = 7")
    run = RunningCode(sandbox, LONG)
    proxy.refuse()
    proxy.cut()
    server.request("POST", f"{only_kernel(server)}/restart").raise_for_status()
    proxy.accept()
    result = run.result()
    assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "began", False)
    assert sandbox.run_code("'x' in globals()").text == "False"


def test_a_kernel_that_is_killed_ends_the_run(server: JupyterServer, make: MakeSandbox) -> None:
    sandbox = make(server.url)
    process = process_of_kernel(sandbox)
    run = RunningCode(sandbox, LONG)
    process.kill()
    result = run.result()
    assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "began", False)
    assert "it died" in sentence(result)
    assert works(sandbox)
    assert len(kernels(server)) == 1


def test_code_that_ends_its_kernel_has_ended_it(make: MakeSandbox, server: JupyterServer) -> None:
    sandbox = make(server.url)
    result = sandbox.run_code("print('last words', flush=True)\nimport os; os._exit(3)")
    assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "last words", False)
    assert works(sandbox)


def test_code_that_exits_leaves_a_sandbox_that_works(make: MakeSandbox, server: JupyterServer) -> None:
    sandbox = make(server.url)
    sandbox.run_code("x = 7")
    for code in ("exit()", "quit()", "import sys; sys.exit()"):
        result = sandbox.run_code(f"print('said')\n{code}")
        assert (result.status, result.exit_code, result.stdout, result.success) == ("exited", 0, "said", True)
        assert works(sandbox)
    assert sandbox.run_code("import sys; sys.exit(3)").exit_code == 3
    assert sandbox.run_code("x").text == "7"


def test_a_kernel_that_is_culled_ends_the_run(
    new_jupyter_server: Callable[..., JupyterServer], make: MakeSandbox, diary: Diary
) -> None:
    culling = new_jupyter_server(
        settings={
            "MappingKernelManager.cull_idle_timeout": 3,  # it has to be there first
            "MappingKernelManager.cull_interval": 1,
            "MappingKernelManager.cull_connected": True,
            "MappingKernelManager.cull_busy": True,
        }
    )
    diary.secrets.add(culling.token)
    sandbox = make(culling.url, token=culling.token)
    result = RunningCode(sandbox, LONG).result()
    assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "began", False)
    assert "it was culled for being idle" in sentence(result)
    assert works(sandbox)
    sandbox.terminate()
    assert kernels(culling) == []


def test_a_kernel_that_is_deleted_while_it_starts_is_not_waited_for(
    server: JupyterServer, make: MakeSandbox, impatient: None, diary: Diary
) -> None:
    mute = server.install_kernel("mute", [sys.executable, "-c", "import time; time.sleep(600)"])
    starting = Running(lambda: make(server.url, kernel_name=mute))
    wait_until(lambda: kernels(server))
    server.request("DELETE", only_kernel(server))
    with refused(diary, SandboxConnectionError, "it is not on the server any more"):
        starting.outcome()


def test_a_kernel_that_the_server_gives_up_ends_the_run(fragile: JupyterServer, make: MakeSandbox) -> None:
    sandbox = make(fragile.url, token=fragile.token)
    result = sandbox.run_code("print('last words', flush=True)\nimport os; os._exit(3)")
    assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "last words", False)
    assert "could not start it again" in sentence(result)
    assert works(sandbox)
    sandbox.terminate()
    assert kernels(fragile) == []


# Who may.


@pytest.mark.parametrize("token", ["not-the-token-of-the-server", None])
def test_a_token_that_the_server_does_not_know_is_told(
    server: JupyterServer, make: MakeSandbox, diary: Diary, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    diary.secrets |= {token} if token else set()
    with refused(diary, SandboxAuthenticationError, "token"):
        make(server.url, token=token)
    assert kernels(server) == []


# Several programs.


def program(code: str, server: JupyterServer, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, server.url, *arguments],
        env={**os.environ, "JUPYTER_TOKEN": server.token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said_by(started: subprocess.Popen[str]) -> str:
    try:
        output, errors = started.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    assert started.returncode == 0, errors
    return output


def test_two_programs_use_one_kernel_by_its_id(
    server: JupyterServer, make: MakeSandbox, diary: Diary
) -> None:
    sandbox = make(server.url)
    sandbox.run_code("x = 7")
    said = said_by(
        program(
            "import sys\n"
            "from code_sandboxes import Sandbox\n"
            "sandbox = Sandbox.from_id(sys.argv[2])\n"
            "print(sandbox.run_code('x').text)\n"
            "sandbox.run_code('x = 8')\n"
            "sandbox.files.write('/tmp/by-the-other', 'other')\n",
            server,
            sandbox.id,
        )
    )
    assert said == "7\n"
    assert sandbox.run_code("x").text == "8"
    assert sandbox.files.read("/tmp/by-the-other") == "other"
    sandbox.files.rm("/tmp/by-the-other")


def test_an_id_that_is_unknown_starts_nothing(server: JupyterServer, diary: Diary) -> None:
    for name in ("00000000-0000-4000-8000-000000000000", "not/an/id", ""):
        with refused(diary, SandboxNotFoundError, "no (kernel|sandbox)"):
            Sandbox.from_id(f"jupyter-gateway:{server.url}#{name}", token=server.token)
    assert kernels(server) == []


@pytest.fixture
def kernel_of_somebody(server: JupyterServer) -> Iterator[str]:
    kernel = server.request("POST", "/api/kernels", json={"name": "python3"}).json()["id"]
    yield kernel
    server.request("DELETE", f"/api/kernels/{kernel}")


def test_a_kernel_that_was_given_is_left_as_it_is(
    server: JupyterServer, make: MakeSandbox, kernel_of_somebody: str
) -> None:
    with make(server.url, kernel_id=kernel_of_somebody) as sandbox:
        sandbox.run_code("x = 7")
    assert kernels(server) == [kernel_of_somebody]
    with make(server.url, kernel_id=kernel_of_somebody) as sandbox:
        assert sandbox.run_code("x").text == "7"
    assert kernels(server) == [kernel_of_somebody]


def test_a_kernel_that_was_given_and_is_gone_is_not_replaced(
    server: JupyterServer, make: MakeSandbox, kernel_of_somebody: str
) -> None:
    sandbox = make(server.url, kernel_id=kernel_of_somebody)
    run = RunningCode(sandbox, LONG)
    server.request("DELETE", f"/api/kernels/{kernel_of_somebody}")
    assert run.result().status == "kernel_died"
    result = sandbox.run_code("1")
    assert result.status == "aborted"
    assert f"the kernel {kernel_of_somebody} is gone" in sentence(result)
    assert kernels(server) == []


def test_what_was_detached_goes_on_and_is_found_again(server: JupyterServer, make: MakeSandbox) -> None:
    sandbox = make(server.url)
    sandbox.run_code("x = 7")
    name = sandbox.id
    sandbox.detach()
    with pytest.raises(SandboxNotStartedError, match="detached"):
        sandbox.run_code("x")
    assert name.endswith(kernels(server)[0])
    again = Sandbox.from_id(name, token=server.token)
    assert again.run_code("x").text == "7"
    assert again.terminate()


CREATES = (
    "import os, sys\n"
    "from code_sandboxes import Sandbox\n"
    "sandbox = Sandbox.create('jupyter-gateway', server_url=sys.argv[1])\n"
    "print(sandbox.id, flush=True)\n"
)


def test_a_program_that_just_ends_leaves_no_kernel(server: JupyterServer) -> None:
    said_by(program(CREATES + "sandbox.run_code('1')", server))
    assert kernels(server) == []


def test_a_program_that_is_interrupted_in_a_run_leaves_no_kernel(server: JupyterServer) -> None:
    code = CREATES + f"sandbox.run_code({LONG!r}, on_stdout=lambda message: print(message.line, flush=True))"
    started = program(code, server)
    with started:
        assert started.stdout is not None
        assert started.stderr is not None
        while started.stdout.readline() != "began\n":
            assert started.poll() is None, started.stderr.read()
        started.send_signal(signal.SIGINT)
        assert started.wait(SOON) == -signal.SIGINT
    assert kernels(server) == []


def test_what_a_program_could_not_delete_is_deleted_after_its_end(
    server: JupyterServer, proxy: CuttingProxy
) -> None:
    code = "input()\ntry: sandbox.terminate()\nexcept Exception as error: print(error, flush=True)\n"
    with program(CREATES.replace("sys.argv[1]", "sys.argv[2]") + code, server, proxy.url) as started:
        assert started.stdout is not None
        started.stdout.readline()
        proxy.refuse()
        proxy.cut()
        said, errors = started.communicate("\n", timeout=60)
    assert "is left" in said, errors
    only_kernel(server)
    proxy.accept()
    wait_until(lambda: kernels(server) == [])


def test_the_end_of_a_fork_ends_nothing(server: JupyterServer, make: MakeSandbox) -> None:
    said = said_by(
        program(
            CREATES + "if os.fork() == 0:\n"
            "    sys.exit()\n"
            "os.wait()\n"
            "print(sandbox.run_code('6 * 7').text)\n",
            server,
        )
    )
    assert said.endswith("\n42\n")


# How much.


def test_much_output_comes_whole_through_a_server_with_limits(
    server: JupyterServer, make: MakeSandbox
) -> None:
    sandbox = make(server.url)
    result = sandbox.run_code("for n in range(200_000): print(f'{n:049}')")
    assert (result.status, result.truncated) == ("ok", False)
    assert result.stdout == "\n".join(f"{n:049}" for n in range(200_000))
    result = sandbox.run_code("print('x' * 10_000_000)")
    assert (result.status, result.stdout, result.truncated) == ("ok", "x" * 10_000_000, False)


def test_a_large_file_comes_whole_both_ways(server: JupyterServer, make: MakeSandbox, tmp_path: Path) -> None:
    sandbox = make(server.url)
    here, there, back = tmp_path / "here", tmp_path / "there", tmp_path / "back"
    here.write_bytes(os.urandom(MIB) * 100)
    sandbox.files.upload(str(here), str(there))
    sandbox.files.download(str(there), str(back))
    assert back.read_bytes() == here.read_bytes()


def test_a_message_that_is_too_large_is_missed(server: JupyterServer, make: MakeSandbox) -> None:
    sandbox = make(server.url)
    result = sandbox.run_code("print('before')\nx = 7\nb'x'.decode() * (70 * 1024 ** 2)")
    assert (result.stdout, result.text, result.truncated) == ("before", None, True)
    assert result.status in ("ok", "connection_lost")
    assert result.state_preserved
    assert sandbox.run_code("x").text == "7"


def test_code_that_is_too_long_for_the_server_is_told(server: JupyterServer, make: MakeSandbox) -> None:
    sandbox = make(server.url)
    with within(SOON):
        result = sandbox.run_code("#" + "x" * 9 * MIB)
    assert result.status == "aborted"
    assert "too long" in sentence(result)
    assert works(sandbox)
    assert sandbox.run_code("#" + "x" * 7 * MIB).success


# Who sees the token.


def test_the_token_is_sent_in_one_header_and_nowhere_else(
    frames: WebSocketProxy, server: JupyterServer, make: MakeSandbox
) -> None:
    sandbox = make(frames.url)
    sandbox.run_code("1")
    sandbox.interrupt()
    sandbox.restart()
    again = Sandbox.from_id(sandbox.id, token=server.token)
    assert again is not sandbox
    sandbox.terminate()
    lines = frames.asked.splitlines()
    told = [line for line in lines if server.token.encode() in line]
    assert set(told) == {f"Authorization: token {server.token}".encode()}
    asked = {line for line in lines if line.endswith(b" HTTP/1.1")}
    assert {line.split()[0] for line in asked} >= {b"GET", b"POST", b"DELETE"}
    assert any(b"/channels?session_id=" in line for line in asked)
    assert not any(line.lower().startswith(b"cookie") for line in lines)


def test_after_all_of_this_the_token_has_been_nowhere_to_be_read(
    server: JupyterServer, fragile_server: JupyterServer, make: MakeSandbox, diary: Diary
) -> None:
    sandbox = make(server.url)
    sandbox.commands.run("true")
    diary.note(sandbox, sandbox.info, sandbox.config, sandbox.capabilities, vars(sandbox))
    core = sandbox._core
    kept = [value for value in vars(core.variant).values() if not isinstance(value, str)]
    diary.note(core, core.variant, core.record(), *kept)
    for context in core.variant._contexts.values():  # type: ignore[attr-defined]  # it is a JupyterGateway
        diary.note(context, *vars(context).values())
        diary.note(context.server.channels(context.kernel_id, "session"))
    diary.entries += [json.dumps(line) for line in command_lines()]
    diary.entries += [server.log.read_text(errors="replace"), fragile_server.log.read_text(errors="replace")]
    assert any(entry.startswith("urllib3") for entry in diary.entries)
    for secret in diary.secrets:
        told = [entry for entry in diary.entries if secret in entry]
        assert told == []


def command_lines() -> list[list[str]]:
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            lines.append(process.cmdline())
    return lines
