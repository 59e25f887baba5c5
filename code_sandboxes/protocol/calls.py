"""One execution, from its request to its result.

Give it the events of its inbox, in order, with the time; it gives back what to show, and when it is done
the result. Here, and nowhere else, is decided how a run ended. The reply decides whether it succeeded
(messaging documentation, section "Execution results"): what is published may have been lost on the way.
"""

from __future__ import annotations

from collections.abc import Mapping

from code_sandboxes.protocol.events import (
    Cleared,
    ConnectionLost,
    Died,
    Displayed,
    Done,
    Event,
    Failed,
    InputAsked,
    InterruptAsked,
    KernelReplaced,
    NotRun,
    OutputDropped,
    Replied,
    Started,
    Streamed,
    Terminated,
    TimedOut,
    Updated,
    failure,
)
from code_sandboxes.protocol.messages import execute_content
from code_sandboxes.protocol.outputs import Displays, Outputs
from code_sandboxes.results import (
    ExecutionError,
    ExecutionResult,
    ExecutionStatus,
    InputRequest,
    Printed,
    Result,
)

__all__ = ["Execution", "Shown"]

Shown = Printed | Result | ExecutionError | InputRequest

_FINAL = (Done, Died, ConnectionLost, NotRun, Terminated)


class Execution:
    """One ``execute_request`` and everything that becomes of it.

    Args:
        code: what to run.
        allow_stdin: whether somebody answers ``input()``.
        context_id: told in the result.
        displays: of the kernel it runs on.
        max_output: how many bytes of output the result keeps.
        now: the time, on the clock that :meth:`feed` is told.
        started_at: the same time in seconds since the epoch.
    """

    def __init__(
        self,
        code: str,
        *,
        allow_stdin: bool = False,
        context_id: str | None = None,
        displays: Displays | None = None,
        max_output: int = 256 * 1024**2,
        now: float = 0.0,
        started_at: float = 0.0,
    ) -> None:
        self.content = execute_content(code, allow_stdin=allow_stdin)
        self.done = False
        self.input_asked: InputAsked | None = None
        self._outputs = Outputs(displays if displays is not None else Displays(), max_output)
        self._context_id = context_id
        self._started_at = started_at
        self._to_epoch = started_at - now
        self._completed_at = started_at
        self._execution_count: int | None = None
        self._reply: Replied | None = None
        self._failed: Failed | None = None
        self._error_shown: ExecutionError | None = None
        self._interrupt_asked = False
        self._timed_out: TimedOut | None = None
        self._end: Event | None = None
        self._status: ExecutionStatus | None = None
        self._state_preserved = True
        self._output_dropped = False

    def next_deadline(self) -> float | None:
        """When to call :meth:`tick`, if no event comes before."""
        return self._outputs.deadline

    def tick(self, now: float) -> list[Shown]:
        """What is due to be shown without a new event: lines that were held long enough."""
        return [*self._outputs.flush_due(now, now + self._to_epoch)]

    def feed(self, event: Event, now: float) -> list[Shown]:
        """What is to be shown now, in order, because of *event*."""
        shown = [*self.tick(now), *self._react(event, now)]
        if isinstance(event, _FINAL):
            shown += self._finish(event, now)
        return shown

    def _react(self, event: Event, now: float) -> list[Shown]:
        timestamp = now + self._to_epoch
        if isinstance(event, (Streamed, Displayed, Updated, Cleared)):
            if isinstance(event, Displayed) and event.execution_count is not None:
                self._execution_count = event.execution_count
            return [*self._outputs.feed(event, now, timestamp)]
        if isinstance(event, Failed):
            return self._show_failure(event, timestamp)
        if isinstance(event, Replied):
            self._replied(event)
            return []
        if isinstance(event, InputAsked):
            self.input_asked = event
            return [*self._outputs.flush(timestamp), InputRequest(event.prompt, event.password)]
        self._note(event)
        return []

    def _note(self, event: Event) -> None:
        if isinstance(event, Started):
            if event.execution_count is not None:
                self._execution_count = event.execution_count
        elif isinstance(event, TimedOut):
            self._timed_out = event
        elif isinstance(event, InterruptAsked):
            self._interrupt_asked = True
        elif isinstance(event, KernelReplaced):
            self._state_preserved = False
        elif isinstance(event, OutputDropped):
            self._output_dropped = True

    def _show_failure(self, event: Failed, timestamp: float) -> list[Shown]:
        self._failed = event
        held: list[Shown] = [*self._outputs.flush(timestamp)]
        self._outputs.clear_if_waiting()
        if event.name in ("SystemExit", "KeyboardInterrupt") or self._timed_out or self._interrupt_asked:
            return held  # what it means is known when the run is over
        self._error_shown = ExecutionError(event.name, event.value, event.traceback)
        return [*held, self._error_shown]

    def _replied(self, event: Replied) -> None:
        self._reply = event
        count = event.content.get("execution_count")
        if self._execution_count is None and isinstance(count, int) and not isinstance(count, bool):
            self._execution_count = count

    def _finish(self, event: Event, now: float) -> list[Shown]:
        self._end = event
        self._status = self._how_it_ended()
        self.done = True
        self._completed_at = now + self._to_epoch
        if isinstance(event, (Died, Terminated)):
            self._state_preserved = False
        elif isinstance(event, ConnectionLost):
            self._state_preserved &= event.state_preserved
        shown: list[Shown] = [*self._outputs.flush(self._completed_at)]
        for last in self._at_the_end():
            shown += self._outputs.feed(last, now, self._completed_at)
        error = self._error()
        if error is not None and error != self._error_shown:
            shown.append(error)
        return shown

    def _at_the_end(self) -> list[Displayed | Streamed]:
        """What is published nowhere: it comes last, since the reply may overtake what is."""
        pages = _pages(self._reply.content) if self._reply is not None else []
        message = self._exit_message() if self.status is ExecutionStatus.EXITED else ""
        return [*pages, *([Streamed(message + "\n", error=True)] if message else [])]

    @property
    def status(self) -> ExecutionStatus:
        """How it ended; only to be asked when :attr:`done`."""
        assert self._status is not None
        return self._status

    def _how_it_ended(self) -> ExecutionStatus:
        end = self._end
        if isinstance(end, NotRun):
            return ExecutionStatus.ABORTED
        if isinstance(end, Terminated):
            return ExecutionStatus.INTERRUPTED
        if self._timed_out is not None:
            return ExecutionStatus.TIMED_OUT
        if isinstance(end, (Died, ConnectionLost)):
            if self._interrupt_asked:
                return ExecutionStatus.INTERRUPTED
            return ExecutionStatus.KERNEL_DIED if isinstance(end, Died) else ExecutionStatus.CONNECTION_LOST
        return self._status_by_reply()

    def _status_by_reply(self) -> ExecutionStatus:
        reply = self._reply
        if reply is None:  # an interrupt that comes with the end of a cell can cost its reply (ipykernel)
            lost = not self._interrupt_asked
            return ExecutionStatus.CONNECTION_LOST if lost else ExecutionStatus.INTERRUPTED
        if reply.status == "ok":
            return ExecutionStatus.EXITED if _asks_exit(reply.content) else ExecutionStatus.OK
        if reply.status == "aborted":
            return ExecutionStatus.ABORTED
        name = self._failure().name
        if name == "SystemExit":
            return ExecutionStatus.EXITED
        # ipykernel cancels an awaiting cell instead of raising KeyboardInterrupt in it.
        if name == "KeyboardInterrupt" or (name == "CancelledError" and self._interrupt_asked):
            return ExecutionStatus.INTERRUPTED
        return ExecutionStatus.ERROR

    def result(self) -> ExecutionResult:
        """What became of it; only to be asked when :attr:`done`."""
        return ExecutionResult(
            status=self.status,
            results=self._outputs.results,
            logs=self._outputs.logs(),
            error=self._error(),
            exit_code=self._exit_code(),
            execution_count=self._execution_count,
            context_id=self._context_id,
            started_at=self._started_at,
            completed_at=self._completed_at,
            truncated=self._outputs.truncated or self._output_dropped,
            state_preserved=self._state_preserved,
        )

    def _failure(self) -> Failed:
        """What the code raised: published as it happened, and once more in the reply."""
        told = self._failed
        if self._reply is not None and "ename" in self._reply.content:
            replied = failure(self._reply.content)
            same = told is not None and (told.name, told.value) == (replied.name, replied.value)
            return told if told is not None and same else replied  # some replies leave out the traceback
        return told or Failed("Error", "the kernel did not say which", "")

    def _error(self) -> ExecutionError | None:
        status = self.status
        if status in (ExecutionStatus.OK, ExecutionStatus.EXITED):
            return None
        if status is ExecutionStatus.ERROR:
            failed = self._failure()
            return ExecutionError(failed.name, failed.value, failed.traceback)
        name, sentence = self._sentence(status)
        return ExecutionError(name, sentence, self._traceback(status))

    def _traceback(self, status: ExecutionStatus) -> str:
        last_words = self._end.output if isinstance(self._end, Died) else ""
        if status is ExecutionStatus.KERNEL_DIED and last_words:
            return last_words
        return self._failure().traceback or last_words

    def _sentence(self, status: ExecutionStatus) -> tuple[str, str]:
        end = self._end
        if status is ExecutionStatus.TIMED_OUT and self._timed_out is not None:
            return "TimeoutError", (
                f"no answer after {self._timed_out.timeout:g} s; {self._how_it_was_stopped()}"
                " (pass timeout= to wait longer)"
            )
        if isinstance(end, Terminated):
            return "Interrupted", end.sentence
        if status is ExecutionStatus.INTERRUPTED:
            return "KeyboardInterrupt", self._how_it_was_stopped()
        if isinstance(end, Died):
            return "KernelDied", end.sentence
        if isinstance(end, ConnectionLost):
            return "ConnectionLost", end.sentence
        if isinstance(end, NotRun):
            return "NotRun", end.sentence
        if status is ExecutionStatus.ABORTED:
            return "Aborted", "not run: the kernel aborted it because an earlier request failed"
        return "ConnectionLost", "the kernel went idle without a reply, so nobody knows how the code ended"

    def _how_it_was_stopped(self) -> str:
        if isinstance(self._end, Died):
            return f"the code did not stop when it was interrupted, so {self._end.how_killed}"
        if isinstance(self._end, ConnectionLost):
            return f"nobody knows whether the code was stopped: {self._end.sentence}"
        return "the code was interrupted"

    def _exit_code(self) -> int | None:
        if isinstance(self._end, Died):
            return self._end.exit_code
        if self.status is not ExecutionStatus.EXITED:
            return None
        if self._reply is not None and self._reply.status == "ok":
            return _asked_exit_code(self._reply.content)
        return _exit_code_of(self._failure().value)

    def _exit_message(self) -> str:
        # sys.exit("message") prints it, as the interpreter does.
        value = self._failure().value if self._reply and self._reply.status == "error" else ""
        return "" if _exit_code_of(value) != 1 or value in ("1", "True") else value


def _exit_code_of(value: str) -> int:
    if value in ("", "None", "False"):
        return 0
    try:
        return int(value)
    except ValueError:
        return 1


def _payloads(content: Mapping[str, object]) -> list[Mapping[str, object]]:
    payload = content.get("payload")
    return [item for item in payload if isinstance(item, dict)] if isinstance(payload, list) else []


def _pages(content: Mapping[str, object]) -> list[Displayed]:
    """What ``obj?`` shows is published nowhere: it is only in the reply (section "Payloads")."""
    pages = [item.get("data") for item in _payloads(content) if item.get("source") == "page"]
    return [Displayed(data, {}) for data in pages if isinstance(data, dict)]


def _asked_exit_code(content: Mapping[str, object]) -> int:
    """The argument of ``exit()``: ipykernel takes it for "keep the kernel", and tells it as that."""
    codes = [item.get("keepkernel") for item in _payloads(content) if item.get("source") == "ask_exit"]
    return next((code for code in codes if isinstance(code, int) and not isinstance(code, bool)), 0)


def _asks_exit(content: Mapping[str, object]) -> bool:
    """``exit()`` and ``quit()`` do not raise in a notebook: they ask the frontend to end the kernel."""
    return any(item.get("source") == "ask_exit" for item in _payloads(content))
