"""The I/O thread and the sockets: over tcp and ipc, with peers that keep to nothing."""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import psutil
import pytest
import zmq

from code_sandboxes.inbox import Inbox
from code_sandboxes.kernel import Ended, Kernel, Ready, StartFailed
from code_sandboxes.kernel_process import Limits
from code_sandboxes.protocol.calls import Execution
from code_sandboxes.protocol.events import Event
from code_sandboxes.protocol.messages import Message, Session
from code_sandboxes.protocol.wire import WireCodec
from code_sandboxes.protocol.zmtp import hello
from code_sandboxes.results import ExecutionResult
from code_sandboxes.runs import Run
from code_sandboxes.transports.loop import Loop, the_loop
from code_sandboxes.transports.zmq import ConnectionInfo, ZmqTransport
from conftest import wait_until
from tests.scripted import QuietProcess

KEY = "a key"
PORTS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5}


class ScriptedKernel(QuietProcess, threading.Thread):
    """A kernel of real sockets that says what the test wants; it is its own process, as far as we know."""

    interrupt_mode: Literal["message"] = "message"
    how_killed = "it was killed"

    def __init__(self, connection: ConnectionInfo, *, welcome: bool) -> None:
        super().__init__(daemon=True)
        self.connection = connection
        self.on_execute: Callable[[ScriptedKernel, Message], None] = lambda kernel, request: None
        self._welcome = welcome
        self._session = Session("the kernel", lambda: "2026-01-01T00:00:00Z")
        self._codec = WireCodec(KEY.encode())
        self._reader = WireCodec(KEY.encode())
        self._context = zmq.Context()
        self._sockets = {
            name: self._context.socket(kind)
            for name, kind in (("shell", zmq.ROUTER), ("iopub", zmq.XPUB), ("control", zmq.ROUTER))
        }
        for name, bound in self._sockets.items():
            bound.linger = 0
            bound.sndhwm = 0
            bound.bind(connection.url(name))
        self._ended: Callable[[], None] | None = None
        self._stopped = threading.Event()
        self._requester: bytes = b""
        self.interrupts = 0

    def run(self) -> None:
        poller = zmq.Poller()
        for bound in self._sockets.values():
            poller.register(bound, zmq.POLLIN)
        while not self._stopped.is_set():
            for ready, _ in poller.poll(20):
                self._take(ready)
        self._context.destroy(linger=0)

    def _take(self, ready: zmq.Socket[bytes]) -> None:
        frames = ready.recv_multipart()
        if ready is self._sockets["iopub"]:
            if self._welcome and frames[0][:1] == b"\1":
                self.publish("iopub_welcome", {"subscription": ""}, {})
            return
        self._requester = frames[0]
        request = self._reader.decode(frames, "shell")
        if request.msg_type == "kernel_info_request":
            self.publish("status", {"execution_state": "busy"}, request.header)
            self.reply(request, {"status": "ok", "language_info": {"name": "test"}})
            self.publish("status", {"execution_state": "idle"}, request.header)
        elif request.msg_type == "execute_request":
            self.on_execute(self, request)
        elif request.msg_type == "interrupt_request":
            self.interrupts += 1

    def publish(self, msg_type: str, content: dict[str, object], parent: object) -> None:
        message = self._session.message("iopub", msg_type, content, parent_header=parent)  # type: ignore[arg-type]  # anything
        self.publish_frames([msg_type.encode(), *self._codec.encode(message)])

    def publish_frames(self, frames: list[bytes | memoryview]) -> None:
        self._sockets["iopub"].send_multipart(frames)

    def reply(self, request: Message, content: dict[str, object]) -> None:
        msg_type = request.msg_type.replace("_request", "_reply")
        message = self._session.message("shell", msg_type, content, parent_header=request.header)
        self._sockets["shell"].send_multipart([self._requester, *self._codec.encode(message)])

    def finish(self, request: Message, status: str = "ok") -> None:
        self.reply(request, {"status": status})
        self.publish("status", {"execution_state": "idle"}, request.header)

    # What the kernel object wants of a process.

    is_fresh = True
    prologue = None

    def transport(
        self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
    ) -> ZmqTransport:
        return ZmqTransport(loop, self.connection, identity, receive, max_message)

    def watch(self, loop: object, ended: Callable[[], None]) -> None:
        self._ended = ended

    def interrupt(self) -> None:
        raise AssertionError("it is interrupted by message")

    def kill(self) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            assert self._ended is not None
            the_loop().call_soon(self._ended)

    terminate = kill

    def release(self) -> None:
        self.join(10)


class Client:
    """A caller of a kernel, without a front."""

    def __init__(self, peer: ScriptedKernel, **limits: float) -> None:
        self.peer = peer
        settings = {"grace": 1.0, "start": 20.0, "max_message": 1024**2} | limits
        self.kernel = Kernel(the_loop(), lambda: peer, "the scripted kernel", Limits(**settings))  # type: ignore[arg-type]  # numbers
        peer.start()

    def start(self) -> Event:
        inbox = Inbox()
        self.kernel.start(inbox)
        return _next(inbox)

    def run(self, timeout: float | None = 20) -> ExecutionResult:
        execution = Execution("code", displays=self.kernel.displays)
        inbox = Inbox()
        self.kernel.execute(Run(self.kernel, execution.content, timeout, inbox))
        while not execution.done:
            execution.feed(_next(inbox), time.monotonic())
        return execution.result()

    def close(self) -> None:
        inbox = Inbox()
        self.kernel.close(inbox, "closed", orderly=False)
        assert isinstance(_next(inbox), Ended)


def _next(inbox: Inbox) -> Event:
    while (event := inbox.take()) is None:
        inbox.wait(30)
    return event


MakeClient = Callable[..., Client]


@pytest.fixture(params=["ipc", "tcp"])
def make_client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeClient]:
    clients = []

    def make(*, welcome: bool = True, **limits: float) -> Client:
        if request.param == "ipc":
            connection = ConnectionInfo("ipc", str(tmp_path / "s"), PORTS, KEY)
        else:
            connection = ConnectionInfo("tcp", "127.0.0.1", dict(zip(PORTS, _free_ports(), strict=True)), KEY)
        client = Client(ScriptedKernel(connection, welcome=welcome), **limits)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


def _free_ports() -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _say(text: str) -> Callable[[ScriptedKernel, Message], None]:
    def say(kernel: ScriptedKernel, request: Message) -> None:
        kernel.publish("stream", {"name": "stdout", "text": text}, request.header)
        kernel.finish(request)

    return say


@pytest.mark.parametrize("welcome", [True, False], ids=["with iopub_welcome", "without"])
def test_a_kernel_is_ready_when_nothing_it_publishes_is_missed(
    make_client: MakeClient, welcome: bool
) -> None:
    client = make_client(welcome=welcome)
    client.peer.on_execute = _say("first")

    assert isinstance(client.start(), Ready)
    assert client.run().stdout == "first"
    assert client.kernel.info is not None
    assert client.kernel.info.language == "test"


def test_malformed_forged_and_replayed_messages_are_dropped_and_counted(make_client: MakeClient) -> None:
    client = make_client()

    def attack(kernel: ScriptedKernel, request: Message) -> None:
        session = Session("the kernel", lambda: "")
        honest = session.message(
            "iopub", "stream", {"name": "stdout", "text": "once\n"}, parent_header=request.header
        )
        frames = WireCodec(KEY.encode()).encode(honest)
        forged = WireCodec(b"another key").encode(honest)
        for each in (frames, frames, forged, [b"garbage"], [b"<IDS|MSG>", b"x"], [b""]):
            kernel.publish_frames([b"topic", *each])
        kernel.publish("stream", {"name": "stdout", "text": 5}, request.header)
        kernel.publish("display_data", {"data": "no bundle"}, request.header)
        kernel.finish(request)

    client.peer.on_execute = attack
    client.start()
    result = client.run()

    assert (result.status, result.stdout) == ("ok", "once")
    client.peer.on_execute = _say("next")
    assert client.run().stdout == "next"
    client.close()
    assert client.kernel.dropped == {"replayed": 1, "forged": 1, "malformed": 5}


@pytest.mark.parametrize("frames", [1, 20])
def test_a_message_beyond_the_limit_is_lost_and_told_and_all_others_arrive(
    make_client: MakeClient, frames: int
) -> None:
    client = make_client(max_message=100_000)

    def bomb(kernel: ScriptedKernel, request: Message) -> None:
        kernel.publish("stream", {"name": "stdout", "text": "before\n"}, request.header)
        kernel.publish_frames([bytes(200_000 // frames)] * frames)
        kernel.publish("stream", {"name": "stdout", "text": "after\n"}, request.header)
        kernel.finish(request)

    client.peer.on_execute = bomb
    client.start()
    result = client.run(timeout=None)

    assert (result.status, result.truncated, result.stdout) == ("ok", True, "before\nafter")
    client.peer.on_execute = _say("next")
    assert (client.run().stdout, client.run().truncated) == ("next", False)
    assert client.kernel.dropped == {"too large": 1}


@pytest.mark.parametrize("idle_first", [True, False])
def test_a_reply_beyond_the_limit_ends_the_run_with_an_honest_error_and_the_kernel_lives(
    make_client: MakeClient, idle_first: bool
) -> None:
    client = make_client(max_message=2**17)

    def bomb(kernel: ScriptedKernel, request: Message) -> None:
        if idle_first:
            kernel.publish("status", {"execution_state": "idle"}, request.header)
        kernel.reply(request, {"status": "ok", "payload": "x" * 200_000})
        if not idle_first:
            kernel.publish("status", {"execution_state": "idle"}, request.header)

    client.peer.on_execute = bomb
    client.start()
    result = client.run(timeout=None)

    assert (result.status, result.state_preserved) == ("connection_lost", True)
    assert "the kernel's reply was larger than 0.125 MiB" in str(result.error)
    client.peer.on_execute = _say("next")
    assert client.run().stdout == "next"


def test_a_kernel_that_breaks_its_connections_off_is_reached_again(make_client: MakeClient) -> None:
    client = make_client()
    client.peer.on_execute = _say("text")
    client.start()
    assert client.run().stdout == "text"
    connection = client.kernel._transport._channels["shell"]  # type: ignore[union-attr]  # a ZmqTransport
    the_loop().call_soon(connection._lose)

    assert client.run().stdout == "text"


# fmt: off
TYPES = [
    "status", "stream", "execute_input", "execute_result", "display_data", "update_display_data",
    "clear_output", "error", "iopub_welcome", "comm_open", "comm_msg", "comm_close", "input_request",
    "execute_reply", "kernel_info_reply", "create_subshell_reply", "debug_event", "", "x" * 1000,
]
FIELDS = [
    "execution_state", "name", "text", "data", "metadata", "transient", "wait", "ename", "evalue",
    "traceback", "prompt", "comm_id", "target_name", "execution_count", "payload", "user_expressions",
    "supported_features", "language_info",
]
# fmt: on
VALUES: list[object] = [
    None,
    True,
    -5,
    10**400,
    1e999,
    float("nan"),
    "",
    "idle",
    "\ud800",
    "x" * 100_000,
    [],
    [[]],
    ["x", 5],
    [{"source": "page", "data": {"text/plain": []}}],
    {},
    {"display_id": 5},
    {"": {"": None}},
]  # fmt: skip


@pytest.mark.slow
def test_no_value_in_any_field_of_any_message_on_any_channel_harms_a_run(make_client: MakeClient) -> None:
    client = make_client()

    def attack(kernel: ScriptedKernel, request: Message) -> None:
        for msg_type, parent in itertools.product(TYPES, (request.header, {})):
            for value in VALUES:
                content = dict.fromkeys(FIELDS, value)
                kernel.publish(msg_type, content, parent)
                kernel.publish(msg_type, {"data": {}} | {f: value for f in FIELDS if len(f) % 2}, parent)
        for value in VALUES:
            kernel.publish("stream", {"name": "stdout", "text": "x"}, {"msg_id": value, "session": value})
            kernel.reply(request, dict.fromkeys(FIELDS, value) | {"status": value})
        kernel.publish("stream", {"name": "stdout", "text": "the end\n"}, request.header)
        kernel.finish(request)

    client.peer.on_execute = attack
    client.start()
    result = client.run()

    assert isinstance(repr(result), str)
    client.peer.on_execute = _say("next")
    assert client.run().stdout.endswith("next")  # what came after a forged idle may be before it
    assert client.run().stdout == "next"


class HostilePeer(threading.Thread):
    """Listens where a kernel should, and says to each that connects what it says to all."""

    def __init__(self, folder: Path, says: Iterator[bytes]) -> None:
        super().__init__(daemon=True)
        self.connection = ConnectionInfo("ipc", str(folder / "h"), PORTS, KEY)
        self.said = 0
        self._says = says
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{folder}/h-{PORTS['iopub']}")
        self._listener.listen()

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener, contextlib.suppress(OSError):
            for data in self._says:
                connection.sendall(data)
                self.said += len(data)


HELLO = hello("XPUB", b"")
MEGABYTE = bytes(2**20)
FLOODS: Mapping[str, tuple[bytes, Iterable[bytes]]] = {
    "one endless frame": (HELLO + b"\2" + b"\x7f" * 8, itertools.repeat(MEGABYTE)),
    "endless frames": (HELLO, itertools.repeat(b"\3" + (2**20).to_bytes(8, "big") + MEGABYTE)),
    "endless small frames": (HELLO, itertools.repeat(b"\1\1x" * 20_000)),
    "endless small messages": (HELLO, itertools.repeat(b"\0\1x" * 20_000)),
    "endless large messages": (HELLO, itertools.repeat(b"\2" + (2**20).to_bytes(8, "big") + MEGABYTE)),
    "endless commands": (HELLO, itertools.repeat(b"\4\7\4PING\0\0" * 5000)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOODS)
def test_no_flood_on_a_socket_takes_memory_or_keeps_another_kernel_waiting(
    make_client: MakeClient, tmp_path: Path, name: str
) -> None:
    client = make_client()
    client.peer.on_execute = _say("text")
    client.start()
    client.run()
    first, endless = FLOODS[name]
    peer = HostilePeer(tmp_path, itertools.chain([first], endless))
    transport = ZmqTransport(the_loop(), peer.connection, "me", lambda message: None, 8 * 2**20)
    peer.start()
    before = psutil.Process().memory_info().rss
    the_loop().call_soon(transport.open)
    wait_until(lambda: peer.said > 100_000)
    most, longest, until = 0, 0.0, time.monotonic() + 2
    while time.monotonic() < until:
        begun = time.monotonic()
        assert client.run().stdout == "text"
        longest = max(longest, time.monotonic() - begun)
        most = max(most, psutil.Process().memory_info().rss)
    the_loop().call_soon(transport.close)
    peer.join(30)

    assert peer.said > 100_000
    assert most - before < 40 * 2**20
    assert longest < 3, "the other kernel waits"


@pytest.mark.slow
def test_a_kernel_that_never_sends_idle_or_never_replies_is_not_waited_for_for_ever(
    make_client: MakeClient,
) -> None:
    client = make_client()
    client.start()
    client.peer.on_execute = lambda kernel, request: kernel.reply(request, {"status": "ok"})
    assert client.run(timeout=None).status == "ok"
    client.peer.on_execute = lambda kernel, request: kernel.publish(
        "status", {"execution_state": "idle"}, request.header
    )
    assert client.run(timeout=None).status == "connection_lost"


@pytest.mark.slow
def test_a_kernel_with_message_interrupts_gets_one_and_is_killed_when_it_does_not_react(
    make_client: MakeClient,
) -> None:
    client = make_client(grace=1.0)
    client.start()
    result = client.run(timeout=0.1)

    assert (result.status, result.state_preserved) == ("timed_out", False)
    assert client.peer.interrupts == 1


def test_a_kernel_that_comes_back_as_another_process_has_lost_its_variables(make_client: MakeClient) -> None:
    client = make_client()
    client.peer.on_execute = _say("a")
    client.start()
    assert client.run().state_preserved

    client.peer._session = Session("another process", lambda: "")
    assert client.run().state_preserved is False


@pytest.mark.slow
def test_a_start_that_takes_too_long_is_given_up(make_client: MakeClient) -> None:
    client = make_client(start=0.3)
    client.peer._take = lambda ready: ready.recv_multipart()  # type: ignore[method-assign, assignment]  # deaf
    event = client.start()

    assert isinstance(event, StartFailed)
    assert str(event.error) == "the scripted kernel did not answer within 0.3 s; it said nothing"


# The loop


def test_calls_from_many_threads_are_made_in_order_in_one_thread() -> None:
    loop = the_loop()
    made: list[tuple[int, int, int | None]] = []
    done = threading.Semaphore(0)

    def call(thread: int) -> None:
        for i in range(500):
            loop.call_soon(lambda i=i: made.append((thread, i, threading.get_ident())))  # type: ignore[misc]  # typed by its use
        loop.call_soon(lambda: done.release())

    threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert done.acquire(timeout=30)

    assert len(made) == 4000
    assert len({ident for _, _, ident in made}) == 1
    for n in range(8):
        assert [i for thread, i, _ in made if thread == n] == list(range(500))


def test_a_callback_that_raises_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    loop = the_loop()
    done = threading.Event()
    loop.call_soon(lambda: 1 / 0)  # type: ignore[arg-type]  # on purpose
    loop.call_soon(done.set)

    assert done.wait(30)
    assert "a callback of the I/O thread failed" in caplog.text


def test_timers_come_in_order_and_cancelled_ones_not_at_all() -> None:
    loop = the_loop()
    rung: list[str] = []
    done = threading.Event()

    def arm() -> None:
        now = time.monotonic()
        loop.call_at(now + 0.04, lambda: rung.append("second"))
        loop.call_at(now + 0.02, lambda: rung.append("first"))
        loop.call_at(now + 0.03, lambda: rung.append("never")).cancel()
        for _ in range(1000):
            loop.call_later(1000, done.set).cancel()
        loop.call_at(now + 0.05, done.set)

    loop.call_soon(arm)
    assert done.wait(30)
    assert rung == ["first", "second"]
    assert len(loop._timers) < 500


def test_the_reaper_starts_again_when_it_was_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys, signal\nfrom code_sandboxes.reaper import Reaper\n"
        "folder = sys.argv[1]; os.mkdir(folder)\n"
        "reaper = Reaper(); reaper.guard_folder(folder)\n"
        "reaper._process.kill(); reaper._process.wait()\n"
        "reaper.guard_group(2**22 + 7)\n"
        "print('ready', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    folder = tmp_path / "folder"
    subprocess.run([sys.executable, "-c", program, str(folder)], check=False, timeout=30)
    give_up = time.monotonic() + 10
    while folder.exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)
