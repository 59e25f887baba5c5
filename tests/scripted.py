"""A kernel that says what a test tells it to say, and the sans-I/O half of a client to say it to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from hypothesis import settings

from code_sandboxes.protocol.calls import Execution, Shown
from code_sandboxes.protocol.events import Event, KernelReplaced, Streamed
from code_sandboxes.protocol.messages import Channel, Message, Session
from code_sandboxes.protocol.outputs import Displays
from code_sandboxes.protocol.router import Routed, Router
from code_sandboxes.results import ExecutionError, InputRequest, OutputMessage, Printed, Result

__all__ = [
    "Output",
    "QuietProcess",
    "ScriptedClient",
    "ScriptedKernel",
    "ScriptedRun",
    "errors",
    "quick",
    "results",
    "text",
    "told",
]

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)

_NOTHING: Mapping[str, object] = {}


Output = OutputMessage | Result | ExecutionError | InputRequest


def told(shown: Sequence[Shown]) -> list[Output]:
    """What is shown, line by line."""
    return [output for item in shown for output in (item if isinstance(item, Printed) else [item])]


class ScriptedKernel:
    """Makes the messages of a kernel; *to* is the request that they answer, None for an empty parent."""

    def __init__(self, session: str = "kernel") -> None:
        self.session = session
        self._numbers = itertools.count(1)

    def says(
        self,
        msg_type: str,
        content: Mapping[str, object] = _NOTHING,
        *,
        to: Message | None = None,
        channel: Channel = "iopub",
        buffers: Sequence[bytes] = (),
    ) -> Message:
        header = {"msg_id": f"k{next(self._numbers)}", "msg_type": msg_type, "session": self.session}
        return Message(channel, header, to.header if to else {}, {}, content, buffers)

    def status(self, state: str, *, to: Message | None = None) -> Message:
        return self.says("status", {"execution_state": state}, to=to)

    def stream(self, text: str, *, to: Message | None = None, name: str = "stdout") -> Message:
        return self.says("stream", {"name": name, "text": text}, to=to)

    def display(
        self,
        text: str,
        *,
        to: Message | None = None,
        display_id: str | None = None,
        msg_type: str = "display_data",
    ) -> Message:
        content: dict[str, object] = {"data": {"text/plain": text}, "metadata": {}}
        if display_id is not None:
            content["transient"] = {"display_id": display_id}
        return self.says(msg_type, content, to=to)

    def update(self, text: str, *, to: Message | None = None, display_id: str) -> Message:
        return self.display(text, to=to, display_id=display_id, msg_type="update_display_data")

    def reply(self, *, to: Message, status: str = "ok", **content: object) -> Message:
        msg_type = to.msg_type.replace("_request", "_reply")
        return self.says(msg_type, {"status": status, **content}, to=to, channel="shell")


class QuietProcess:
    """What a kernel asks of a process, of one of which there is nothing to tell."""

    why_lost = ""
    why_ended = ""
    may_go_on = False

    def exit_code(self) -> int | None:
        return -9

    def output(self) -> str:
        return ""

    def written(self) -> list[int]:
        return [0, 0]

    def unpublished(self, published: object) -> list[Streamed]:
        return []

    def claim(self, granted: Callable[[], None]) -> None:
        granted()

    def rest(self) -> None:
        return

    def leave(self) -> None:
        return


class ScriptedRun:
    """One execution on its way: what was sent for it, and what it has shown so far."""

    def __init__(self, request: Message, execution: Execution) -> None:
        self.request = request
        self.execution = execution
        self.shown: list[Output] = []

    def feed(self, event: Event, now: float = 0.0) -> None:
        self.shown += told(self.execution.feed(event, now))


class ScriptedClient:
    """A router, the displays of a kernel and the runs on it, put together as ``kernel.py`` does it."""

    def __init__(self, session: str = "client") -> None:
        self.session = Session(session, lambda: "2030-01-01T00:00:00Z")
        self.router = Router(self.session)
        self.displays = Displays()
        self.runs: dict[str, ScriptedRun] = {}
        self.of_the_kernel: list[Event] = []

    def sends(self, msg_type: str) -> Message:
        request = self.session.message("shell", msg_type)
        self.router.sent(request)
        return request

    def executes(self, code: str = "", max_output: int = 2**20) -> ScriptedRun:
        execution = Execution(code, displays=self.displays, max_output=max_output)
        run = ScriptedRun(self.sends("execute_request"), execution)
        self.runs[run.request.msg_id] = run
        return run

    def routes(self, *messages: Message) -> list[Routed]:
        """What the router makes of them."""
        return [routed for message in messages for routed in self.router.receive(message)]

    def receives(self, *messages: Message, now: float = 0.0) -> None:
        """Give them to whom they concern."""
        for recipient, event in self.routes(*messages):
            if recipient in self.runs:
                self.runs[recipient].feed(event, now)
            elif recipient is None:
                self.of_the_kernel.append(event)
            if isinstance(event, KernelReplaced):
                for run in self.runs.values():
                    run.feed(event, now)


def text(outputs: Sequence[Output], *, error: bool = False) -> str:
    """What was printed, byte for byte."""
    return "".join(o.line + o.end for o in outputs if isinstance(o, OutputMessage) and o.error is error)


def results(outputs: Sequence[Output]) -> list[str | None]:
    return [o.text for o in outputs if isinstance(o, Result)]


def errors(outputs: Sequence[Output]) -> list[ExecutionError]:
    return [o for o in outputs if isinstance(o, ExecutionError)]
