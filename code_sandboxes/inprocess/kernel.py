"""A kernel in this process: requests in, messages out, and a thread that runs code with ``exec()``.

It isolates nothing. Code that does not stop when it is interrupted cannot be ended: it is abandoned, its
thread goes on, and what it says from then on is dropped.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from inspect import CO_COROUTINE
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal

from code_sandboxes.guest.comms import FEATURE, SUBSHELLS
from code_sandboxes.inprocess.actor import Actor
from code_sandboxes.inprocess.cells import (
    compile_cell,
    failure_content,
    forget_source,
    name_of,
    remember_source,
    traceback_of,
)
from code_sandboxes.inprocess.display import as_sent, bundle_of
from code_sandboxes.inprocess.gate import Abandoned, Gate, Interrupted, look_no_more, uninterrupted
from code_sandboxes.inprocess.output import Output
from code_sandboxes.inprocess.stage import Performance, acting
from code_sandboxes.inprocess.subshells import Subshells
from code_sandboxes.protocol.events import Streamed
from code_sandboxes.protocol.messages import Message, Session
from code_sandboxes.transports.inprocess import InProcessTransport
from code_sandboxes.transports.loop import Loop

if TYPE_CHECKING:
    import asyncio

__all__ = ["InProcessKernel", "StdinNotImplementedError"]

_REMEMBERED = 1000  # cells whose source tracebacks can show

# How long an event loop may take to cancel the code that waits in it, before that is taken for busy.
_CANCELLATION = 0.1

_FAREWELL = 5.0
_LAST_WORDS = 0.5  # for tasks that do not care to be cancelled

_LOOK_AGAIN = 0.05


class StdinNotImplementedError(NotImplementedError):
    """Nobody answers; Jupyter's name for it."""


StdinNotImplementedError.__module__ = "builtins"  # code may see it, and its traceback names it


class _Run:
    """One request on its way through the thread."""

    def __init__(self, request: Message, execution_count: int) -> None:
        self.request = request
        self.execution_count = execution_count
        self.gate = Gate()
        self.waiting: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self.performance: Performance | None = None
        self.cancelled = False

    @property
    def header(self) -> Mapping[str, object]:
        return self.request.header

    @property
    def source(self) -> str:
        return str(self.request.content.get("code"))

    @property
    def is_stored(self) -> bool:
        """It counts; as in IPython, a cell of nothing does not."""
        return self.is_set("store_history", True) and bool(self.source.strip())

    def is_set(self, key: str, default: bool) -> bool:
        """A switch of the request."""
        return self.request.content.get(key, default) is True

    def end_performance(self) -> None:
        if self.performance is not None:
            self.performance.end()

    def wake(self) -> bool:
        """End its waiting if it waits in its event loop; False if it does not."""
        waiting = self.waiting
        if waiting is None:
            return False
        with contextlib.suppress(RuntimeError):  # the code has closed its event loop
            waiting[0].call_soon_threadsafe(self._cancel)
        return True

    def _cancel(self) -> None:
        if self.waiting is not None:
            self.cancelled = True
            self.waiting[1].cancel()


class InProcessKernel:
    """A namespace, a thread that runs code in it, and the messages of a kernel around it.

    A :class:`code_sandboxes.kernel_process.KernelProcess`, too: it is a process as far as anybody can tell.
    """

    interrupt_mode: Literal["signal"] = "signal"
    is_fresh = True
    why_lost = ""
    prologue = None
    may_go_on = False
    why_ended = ""
    how_killed = (
        "it was abandoned: its thread goes on in this process, its output is dropped,"
        " and its variables are gone"
    )

    def __init__(self) -> None:
        self._id = os.urandom(4).hex()
        self._pid = os.getpid()
        self._said = Output(Session(os.urandom(16).hex(), lambda: datetime.now(timezone.utc).isoformat()))
        self._actor = Actor(self)
        self._namespace = self._actor.namespace()
        self._builtins: Any = self._namespace["__builtins__"]
        self._subshells = Subshells(self._said, lambda: self._namespace)
        self._execution_count = 0
        self._sources: deque[str] = deque()
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._requests: deque[Message] = deque()
        self._runs: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._abandoned = False
        self._loop: Loop | None = None
        self._ended: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._work, name="code_sandboxes-eval", daemon=True)
        self._thread.start()

    # What whoever has started it may do; in the I/O thread.

    def transport(
        self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
    ) -> InProcessTransport:
        return InProcessTransport(loop, self, receive)

    def connect(self, wake: Callable[[], None]) -> None:
        self._said.listen(wake)
        self._said.say("iopub", "iopub_welcome", {"subscription": ""}, {})

    def take(self, limit: int) -> list[Message]:
        return self._said.take(limit)

    @property
    def has_more(self) -> bool:
        return self._said.has_more

    def accept(self, message: Message) -> None:
        if message.channel == "stdin":
            value = message.content.get("value")
            self._answers.put(value if isinstance(value, str) else "")
            return
        if self._subshells.accept(message):
            return
        with self._lock:
            if self._run is not None:
                self._requests.append(message)
                return
            run = self._begin(message, wake=False)  # the transport looks by itself soon after
        self._runs.put(run)

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        self._loop, self._ended = loop, ended

    def exit_code(self) -> int | None:
        return None

    def output(self) -> str:
        return ""

    def written(self) -> list[int]:
        return [0, 0]

    def unpublished(self, published: Sequence[int]) -> list[Streamed]:
        return []

    def claim(self, granted: Callable[[], None]) -> None:
        granted()  # it has one user

    def rest(self) -> None:
        return

    def leave(self) -> None:
        raise NotImplementedError("a kernel in this process goes on for nobody else")

    def interrupt(self) -> None:
        with self._lock:
            run = self._run
        if run is None:
            return
        run.cancelled = False
        if not run.wake():
            self._send(run, Interrupted)
            return
        assert self._loop is not None
        self._loop.call_later(_CANCELLATION, lambda: None if run.cancelled else self._send(run, Interrupted))

    def _send(self, run: _Run, kind: type[BaseException]) -> None:
        assert self._loop is not None
        run.gate.interrupt(kind)
        self._loop.call_later(_LOOK_AGAIN, lambda: self._mind(run))

    def _mind(self, run: _Run) -> None:
        """While the code is in C, nobody else is to suffer; when it is back, it is to notice; and to stop."""
        assert self._loop is not None
        was_dropped = run.gate.is_wanted
        run.gate.interrupt_again()
        if run.gate.is_under_way:
            look_no_more()
            _wake_event_loop(self._thread)
        if was_dropped or not (self._abandoned or run.gate.is_over):
            self._loop.call_later(_LOOK_AGAIN, lambda: self._mind(run))

    def terminate(self) -> None:
        with self._lock:
            run = self._run
        if run is not None:
            self._send(run, Abandoned)
            run.wake()
        self._runs.put(None)

    def kill(self) -> None:
        self._abandoned = True
        self._said.close()
        with self._lock:
            run = self._run
        if run is not None:
            self._send(run, Abandoned)
            run.wake()
            run.end_performance()
        self._runs.put(None)
        self._end()

    def release(self) -> None:
        self._subshells.close()
        if not self._abandoned:
            self._thread.join(_FAREWELL)
        for filename in self._sources:
            forget_source(filename)

    def _end(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, None
        if ended is not None and self._loop is not None:
            self._loop.call_soon(ended)

    # What the code does, in whatever thread it is.

    def hear(self, stream: str, text: str) -> None:
        run = self._run
        self._said.write(stream, text, run.header if run is not None else {})
        self._wait_for_room()

    def see(self, msg_type: str, content: Mapping[str, object]) -> None:
        run = self._run
        self._said.say("iopub", msg_type, content, run.header if run is not None else {})
        self._wait_for_room()

    def _wait_for_room(self) -> None:
        # The listener itself may be here: the garbage collector calls __del__() in any thread.
        if self._loop is not None and not self._loop.is_here():
            self._said.wait_for_room()

    def answer(self, prompt: str, *, password: bool) -> str:
        run = self._run if threading.current_thread() is self._thread else None
        if run is None or not run.is_set("allow_stdin", True):
            raise StdinNotImplementedError("the code asked for input, and nobody answers (on_input= does)")
        answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._answers = answers  # a new one: what still comes for an earlier question is nobody's
        run.gate.nudge = lambda: answers.put(None)
        if run.gate.is_wanted:  # since before there was a nudge
            answers.put(None)
        content = {"prompt": prompt, "password": password}
        self._said.say("stdin", "input_request", content, run.header)
        answer = answers.get()
        run.gate.nudge = lambda: None
        return "" if answer is None else answer  # None: it is interrupted as soon as the gate opens

    # The thread.

    def _work(self) -> None:
        acting.set(self._actor)
        while not self._abandoned and (run := self._runs.get()) is not None:
            self._serve(run)
        self._close_event_loop()
        self._end()

    def _begin(self, request: Message, *, wake: bool) -> _Run:
        """It is its turn now."""
        executes = request.msg_type == "execute_request"
        run = _Run(request, self._execution_count + 1)
        self._said.say("iopub", "status", {"execution_state": "busy"}, request.header, wake=wake)
        if executes and not run.is_set("silent", False):
            self._execution_count += run.is_stored
            content = {"code": run.source, "execution_count": run.execution_count}
            self._said.say("iopub", "execute_input", content, request.header, wake=wake)
        self._run = run
        return run

    def _serve(self, run: _Run) -> None:
        if run.request.msg_type == "execute_request":
            self._reply(run, "execute_reply", self._execute(run))
        elif run.request.msg_type == "kernel_info_request":
            self._reply(run, "kernel_info_reply", _kernel_info())
        with self._lock:
            self._said.say("iopub", "status", {"execution_state": "idle"}, run.header)
            self._run = None
            following = self._begin(self._requests.popleft(), wake=True) if self._requests else None
        if following is not None:
            self._runs.put(following)

    def _reply(self, run: _Run, msg_type: str, content: Mapping[str, object]) -> None:
        self._said.say("shell", msg_type, content, run.header, wake=False)

    def _execute(self, run: _Run) -> Mapping[str, object]:
        run.performance = Performance()
        if self._abandoned:
            run.end_performance()
        try:
            failure = run.gate.call(lambda: self._attempt(run))
        except BaseException as error:  # an interrupt, of the kernel's own making, that came between
            failure = {"ename": name_of(error), "evalue": "", "traceback": []}
        run.end_performance()
        ended = {"execution_count": self._execution_count, "user_expressions": {}, "payload": []}
        if failure is None:
            return {"status": "ok", **ended}
        self._said.say("iopub", "error", failure, run.header, wake=False)
        return {"status": "error", **ended, **failure}

    def _attempt(self, run: _Run) -> dict[str, object] | None:
        try:
            self._run_cell(run)
        except BaseException as error:  # whatever the code raises is what became of it
            self._end_if_child(error)
            return failure_content(error)
        self._end_if_child(None)
        return None

    def _end_if_child(self, error: BaseException | None) -> None:
        """The code forked, and its child has come to its end here: it is not ours, and has nowhere to go."""
        if os.getpid() == self._pid:
            return
        try:
            code = _exit_code(error)
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(code)
        finally:  # it could not even tell why
            os._exit(1)

    def _run_cell(self, run: _Run) -> None:
        source, filename = run.source, self._filename(run)
        remember_source(filename, source)
        statements, shown = compile_cell(source, filename)
        parts = [part for part in (statements, shown) if part is not None]
        if any(part.co_flags & CO_COROUTINE for part in parts):
            value = self._await(run, parts)
        else:
            value = None
            for part in parts:
                value = eval(part, self._namespace)
        if value is not None and not run.is_set("silent", False):
            self._show(run, value)

    def _filename(self, run: _Run) -> str:
        filename = f"<cell {run.execution_count} of {self._id}>"
        if len(self._sources) == _REMEMBERED:
            forget_source(self._sources.popleft())
        self._sources.append(filename)
        return filename

    def _open_event_loop(self) -> asyncio.AbstractEventLoop:
        import asyncio

        if self._event_loop is None or self._event_loop.is_closed():
            self._event_loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._event_loop)
        return self._event_loop

    async def _eval_awaiting(self, parts: Iterable[CodeType]) -> object:
        """All of a cell that awaits somewhere: an event loop is running from its first line on."""
        value: Any = None
        for part in parts:
            value = eval(part, self._namespace)
            if part.co_flags & CO_COROUTINE:
                value = await value
        return value

    def _await(self, run: _Run, parts: Iterable[CodeType]) -> object:
        with uninterrupted():
            import asyncio
        task: asyncio.Task[object] | None = None
        try:
            with uninterrupted():
                loop = self._open_event_loop()
                task = loop.create_task(self._eval_awaiting(parts))
                run.waiting = loop, task
            return loop.run_until_complete(task)
        except asyncio.CancelledError:
            if run.cancelled:
                raise Interrupted from None
            raise
        except Abandoned:
            raise
        except BaseException:  # from outside of the task, mostly: it is not to go on in a later cell
            if task is not None and not task.done() and not loop.is_closed():
                task.cancel()
                loop.run_until_complete(asyncio.wait([task]))
            raise
        finally:
            run.waiting = None

    def _show(self, run: _Run, value: object) -> None:
        data, metadata = bundle_of(value)
        if not data:
            return
        content = {
            "execution_count": self._execution_count,
            "data": as_sent(data),
            "metadata": as_sent(metadata),
        }
        self._builtins._ = value
        with uninterrupted():
            self._said.say("iopub", "execute_result", content, run.header, wake=False)

    def _close_event_loop(self) -> None:
        loop = self._event_loop
        if loop is None or loop.is_closed():
            return
        import asyncio

        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=_LAST_WORDS))
            loop.run_until_complete(loop.shutdown_asyncgens())
        except BaseException:  # the last words of tasks that nobody waits for; the thread ends here
            return
        finally:
            loop.close()


def _kernel_info() -> Mapping[str, object]:
    """The content of a ``kernel_info_reply`` (messaging documentation, section "Kernel info")."""
    return {
        "status": "ok",
        "protocol_version": "5.4",
        "implementation": "code_sandboxes",
        "implementation_version": "2",
        "language_info": {
            "name": "python",
            "version": platform.python_version(),
            "mimetype": "text/x-python",
            "file_extension": ".py",
        },
        "banner": "",
        "help_links": [],
        "supported_features": [SUBSHELLS, FEATURE],
    }


def _wake_event_loop(thread: threading.Thread) -> None:
    """If *thread* waits in an event loop that the code runs itself (``asyncio.run()``)."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "run_forever":
        frame = frame.f_back
    wake = None if frame is None else getattr(frame.f_locals.get("self"), "call_soon_threadsafe", None)
    if wake is not None:
        with contextlib.suppress(RuntimeError):  # it has been closed meanwhile
            wake(int)


def _exit_code(error: BaseException | None) -> int:
    """What a process ends with; as the interpreter, which would, it prints what it is not told by that."""
    if error is None:
        return 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return (error.code or 0) & 0xFF
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        print(*traceback_of(error), sep="\n", file=sys.stderr)
    return 1
