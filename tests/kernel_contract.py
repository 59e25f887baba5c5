"""What any Jupyter kernel must do, seen at the level of messages.

Source: the Jupyter messaging documentation. No test knows which kernel it talks to. It names as arguments the
:class:`Abilities` that it needs; the module that collects these tests fills them in, kernel by kernel, and
leaves the test out for a kernel that lacks one. The fixtures are that module's, too: ``kernel``, in which a
test leaves no trace, and ``new_kernel``, which it may end.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import psutil
import pytest

from code_sandboxes.kernel_process import KernelProcess
from code_sandboxes.protocol.messages import Channel, Message, Session, execute_content
from code_sandboxes.transports.loop import the_loop
from conftest import processes_of, wait_until

# Seconds after which a test that waits for a kernel has failed.
PATIENCE = 30

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Abilities:
    """What a kernel can do, most of it as code that does it; None or False where it cannot."""

    language: str
    """As its ``kernel_info_reply`` names it."""
    prints: str
    """Prints ``hello`` and a newline."""
    prints_in_pieces: str
    """Prints the numbers below 300, each by itself and with a blank behind it, and a newline."""
    prints_exactly: Mapping[str, str]
    """What else is printed, by the code that prints it."""
    assigns: str
    """Assigns 7 to a variable."""
    recalls: str
    """Prints that variable, and a newline."""
    fails: str
    """Prints ``before`` and a newline, and fails."""
    failure: tuple[str, str]
    """The name and the value of that error."""
    refuses: str
    """Is not valid, and if any of it ran would print ``never``."""
    spins: str
    """Assigns 8 to the variable, prints something, and does not end."""

    prints_errors: str | None = None
    """Prints ``out`` to standard output and ``err`` to standard error."""
    shows: str | None = None
    """Has the value 42."""
    displays: str | None = None
    """Displays ``<b>bold</b>`` as HTML; it may be followed by a newline."""
    updates: str | None = None
    """Displays something with the display id ``here``, and then something else in its place."""
    clears: str | None = None
    """Clears the output, at once and then with ``wait``."""
    mixes: str | None = None
    """Prints, displays, prints, and has a value."""
    draws: str | None = None
    """Displays the bytes of :data:`PNG`."""
    shows_nearly_json: str | None = None
    """Displays ``{1: (2, 3), "bytes": PNG, "set": {4}, "not": nan}`` as JSON, and 6 as the type ``5``."""
    changes_what_it_showed: str | None = None
    """Displays ``{"list": [1]}`` as ``application/json``, and appends to the list."""
    asks: str | None = None
    """Asks ``name?`` and prints the answer and a newline."""
    asks_secretly: str | None = None
    """The same for ``secret?``, a password."""
    exits: str | None = None
    """Exits with 3."""
    awaits: str | None = None
    """Prints something, and awaits what does not come."""

    welcomes: bool = False
    """Sends ``iopub_welcome``."""
    keeps_history: bool = False
    """Counts what is stored in its history, and nothing else."""
    names_interrupts: bool = False
    """Code that is interrupted fails, with ``KeyboardInterrupt``, and nothing else feels an interrupt."""


@dataclass(frozen=True)
class Exchange:
    """A request, and what the kernel has said about it, in the order of arrival."""

    request: Message
    messages: tuple[Message, ...]

    @property
    def published(self) -> list[Message]:
        return [message for message in self.messages if message.channel == "iopub"]

    @property
    def story(self) -> list[str]:
        """What was published, in short; however many messages the text came in."""
        return [word for word, _ in groupby(map(_word, self.published))]

    @property
    def replies(self) -> list[Message]:
        return [message for message in self.messages if message.channel in ("shell", "control")]

    @property
    def reply(self) -> Mapping[str, object]:
        (reply,) = self.replies
        return reply.content

    @property
    def count(self) -> int:
        """The execution count, as the reply tells it."""
        count = self.reply["execution_count"]
        assert isinstance(count, int)
        return count

    @property
    def is_over(self) -> bool:
        return bool(self.replies) and "idle" in self.story

    def all(self, msg_type: str) -> list[Mapping[str, object]]:
        return [message.content for message in self.published if message.msg_type == msg_type]

    def only(self, msg_type: str) -> Mapping[str, object]:
        (content,) = self.all(msg_type)
        return content

    def printed(self, name: str = "stdout") -> str:
        return "".join(str(stream["text"]) for stream in self.all("stream") if stream["name"] == name)


def _word(message: Message) -> str:
    return str(message.content["execution_state"]) if message.msg_type == "status" else message.msg_type


class Conversation:
    """A client of one kernel: it says what a test wants, and keeps all that it hears."""

    def __init__(self, launch: Callable[[], KernelProcess]) -> None:
        before = _alive()
        self.process = launch()
        wait_until(lambda: _alive() - before)  # a process has no arguments yet while it is in execve(2)
        self.body = _alive() - before
        """The process or the thread that came into being with it."""
        self.session = Session(os.urandom(8).hex(), lambda: datetime.now(timezone.utc).isoformat())
        self.heard: list[Message] = []
        self.ends = 0
        self._latest: Message | None = None
        self._news = threading.Condition()
        self._transport = self.process.transport(
            the_loop(), self.session.session_id, self._receive, max_message=1024**2
        )
        the_loop().call_soon(lambda: self.process.watch(the_loop(), self._ended))
        the_loop().call_soon(self._transport.open)

    def meet(self) -> None:
        """From now on nothing that it publishes is missed."""
        while not any(message.channel == "iopub" for message in self.heard):
            self.wait_replied(self.send("kernel_info_request"))
        self.ask("kernel_info_request")

    def close(self) -> None:
        the_loop().call_soon(self.process.kill)
        self.wait_ended()
        self.process.release()

    def send(
        self,
        msg_type: str,
        content: Mapping[str, object] | None = None,
        channel: Channel = "shell",
        parent_header: Mapping[str, object] | None = None,
    ) -> Message:
        message = self.session.message(channel, msg_type, content or {}, parent_header=parent_header or {})
        self._latest = message if channel == "shell" else self._latest
        the_loop().call_soon(lambda: self._transport.send(message))
        return message

    def start(self, code: str, **switches: bool) -> Message:
        """Request that *code* be executed; *switches* are those of an ``execute_request``."""
        content = {**execute_content(code, allow_stdin=False), "stop_on_error": False, **switches}
        return self.send("execute_request", content)

    def ask(self, msg_type: str) -> Exchange:
        return self.wait_over(self.send(msg_type))

    def run(self, code: str, **switches: bool) -> Exchange:
        return self.wait_over(self.start(code, **switches))

    def answer(self, question: Message, value: str) -> None:
        self.send("input_reply", {"value": value}, "stdin", question.header)

    def interrupt(self) -> None:
        """In the way that is the kernel's."""
        if self.process.interrupt_mode == "message":
            self.send("interrupt_request", channel="control")
        else:
            the_loop().call_soon(self.process.interrupt)

    @property
    def is_idle(self) -> bool:
        """It has answered everything: whoever comes next finds it well."""
        return self._latest is None or self.about(self._latest).is_over

    def about(self, request: Message) -> Exchange:
        """What has been said about *request* until now."""
        return Exchange(request, tuple(m for m in self.heard if m.parent_id == request.msg_id))

    def wait_replied(self, request: Message) -> None:
        self._wait(lambda: bool(self.about(request).replies), "a reply")

    def wait_over(self, request: Message) -> Exchange:
        self._wait(lambda: self.about(request).is_over, "a reply and an idle status")
        return self.about(request)

    def wait_heard(self, request: Message, msg_type: str) -> Message:
        """The first message of that type about *request*."""

        def heard() -> list[Message]:
            return [message for message in self.about(request).messages if message.msg_type == msg_type]

        self._wait(lambda: bool(heard()), msg_type)
        return heard()[0]

    def wait_ended(self) -> None:
        self._wait(lambda: self.ends > 0, "the end of its process")

    def wait_settled(self) -> None:
        """Whatever the I/O thread was asked to do has been done, and what came of that."""
        for _ in range(2):
            settled = threading.Event()
            the_loop().call_soon(settled.set)
            assert settled.wait(PATIENCE)

    def _receive(self, message: Message) -> None:
        with self._news:
            self.heard.append(message)
            self._news.notify_all()

    def _ended(self) -> None:
        self._transport.close()
        with self._news:
            self.ends += 1
            self._news.notify_all()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        with self._news:
            came = self._news.wait_for(condition, PATIENCE)
        assert came, f"{what} did not come; the last that came: {self.heard[-10:]}"


def _alive() -> set[threading.Thread | psutil.Process]:
    return {*threading.enumerate(), *processes_of(Path(os.environ["CODE_SANDBOXES_RUNTIME_DIR"]))}


def data_of(content: Mapping[str, object]) -> dict[str, object]:
    data = content["data"]
    assert isinstance(data, dict)
    return data


# Messages


def test_a_kernel_tells_what_it_is(kernel: Conversation, language: str) -> None:
    info = kernel.ask("kernel_info_request")

    assert info.story == ["busy", "idle"]
    assert info.reply["status"] == "ok"
    assert re.fullmatch(r"5\.\d+", str(info.reply["protocol_version"]))
    for key in ("implementation", "implementation_version", "banner"):
        assert isinstance(info.reply[key], str), key
    language_info = info.reply["language_info"]
    assert isinstance(language_info, dict)
    assert language_info["name"] == language
    assert "/" in language_info["mimetype"]
    assert language_info["file_extension"].startswith(".")


def test_the_first_thing_that_a_client_hears_is_a_welcome(kernel: Conversation, welcomes: bool) -> None:
    first = next(message for message in kernel.heard if message.channel == "iopub")

    assert (first.msg_type, first.parent_header) == ("iopub_welcome", {})
    assert first.content == {"subscription": ""}


def test_a_header_is_complete(kernel: Conversation, prints: str) -> None:
    for message in kernel.run(prints).messages:
        for key in ("msg_id", "msg_type", "session", "username", "version", "date"):
            assert isinstance(message.header[key], str), (message.msg_type, key)


def test_every_message_about_a_request_names_it_as_its_parent(kernel: Conversation, prints: str) -> None:
    before = len(kernel.heard)
    run = kernel.run(prints)

    for message in kernel.heard[before:]:
        for key in ("msg_id", "msg_type", "session"):
            assert message.parent_header[key] == run.request.header[key], message.msg_type


def test_messages_have_ids_of_their_own_and_one_session_that_is_the_kernels(
    kernel: Conversation, prints: str
) -> None:
    run = kernel.run(prints)
    ids = [message.msg_id for message in kernel.heard]

    assert len(set(ids)) == len(ids)
    (session,) = {message.header["session"] for message in kernel.heard}
    assert session != run.request.header["session"]


def test_requests_are_answered_one_by_one_in_the_order_in_which_they_were_sent(
    kernel: Conversation, prints: str
) -> None:
    before = len(kernel.heard)
    requests = [
        kernel.start(prints),
        kernel.send("kernel_info_request"),
        kernel.start(prints),
        kernel.start(prints),
    ]
    for request in requests:
        kernel.wait_over(request)

    ids = [request.msg_id for request in requests]
    heard = kernel.heard[before:]
    assert [m.parent_id for m in heard if m.channel == "shell"] == ids
    published = [(m.parent_id, _word(m)) for m in heard if m.msg_type == "status"]
    assert published == [(each, word) for each in ids for word in ("busy", "idle")]


# What is executed


def test_a_run_is_told_from_busy_to_idle(kernel: Conversation, prints: str) -> None:
    run = kernel.run(prints)

    assert run.story == ["busy", "execute_input", "stream", "idle"]
    assert run.only("execute_input") == {"code": prints, "execution_count": run.count}
    assert run.reply["status"] == "ok"


def test_nothing_is_published_about_a_request_after_its_idle(
    kernel: Conversation, prints_in_pieces: str, prints: str
) -> None:
    request = kernel.run(prints_in_pieces).request
    kernel.run(prints)  # what came later would have come before this

    published = [_word(message) for message in kernel.about(request).published]
    assert published.index("idle") == len(published) - 1


def test_the_count_goes_up_by_one_with_each_run(kernel: Conversation, prints: str) -> None:
    first, second = kernel.run(prints), kernel.run(prints)

    assert second.count == first.count + 1


def test_a_silent_run_is_not_announced_and_does_not_count(kernel: Conversation, prints: str) -> None:
    before = kernel.run(prints)
    silent = kernel.run(prints, silent=True, store_history=False)

    assert "execute_input" not in silent.story
    assert silent.reply["status"] == "ok"
    assert silent.count == before.count
    assert kernel.run(prints).count == before.count + 1


def test_a_run_that_is_not_stored_or_has_no_code_does_not_count(
    kernel: Conversation, prints: str, fails: str, keeps_history: bool
) -> None:
    before = kernel.run(prints)

    assert kernel.run(prints, store_history=False).count == before.count
    assert kernel.run(fails, store_history=False).count == before.count
    assert kernel.run("").count == before.count
    assert kernel.run(" \n").count == before.count
    assert kernel.run(prints).count == before.count + 1


def test_variables_are_kept_from_run_to_run(kernel: Conversation, assigns: str, recalls: str) -> None:
    kernel.run(assigns)

    assert kernel.run(recalls).printed() == "7\n"


# What is printed


def test_text_that_is_printed_in_pieces_arrives_whole_and_in_order(
    kernel: Conversation, prints_in_pieces: str
) -> None:
    numbers = "".join(f"{number} " for number in range(300))

    assert kernel.run(prints_in_pieces).printed() == numbers + "\n"


def test_text_is_exact(kernel: Conversation, prints_exactly: Mapping[str, str]) -> None:
    for code, text in prints_exactly.items():
        assert kernel.run(code).printed() == text


def test_standard_output_and_error_are_told_apart(kernel: Conversation, prints_errors: str) -> None:
    run = kernel.run(prints_errors)

    assert (run.printed("stdout"), run.printed("stderr")) == ("out", "err")
    assert {stream["name"] for stream in run.all("stream")} == {"stdout", "stderr"}


# What is shown


def test_the_value_of_a_run_is_its_main_result(kernel: Conversation, shows: str) -> None:
    run = kernel.run(shows)
    result = run.only("execute_result")

    assert run.story == ["busy", "execute_input", "execute_result", "idle"]
    assert data_of(result) == {"text/plain": "42"}
    assert result["metadata"] == {}
    assert result["execution_count"] == run.only("execute_input")["execution_count"] == run.count


def test_statements_have_no_main_result(kernel: Conversation, assigns: str) -> None:
    assert kernel.run(assigns).story == ["busy", "execute_input", "idle"]


def test_a_silent_run_has_no_main_result(kernel: Conversation, shows: str) -> None:
    assert kernel.run(shows, silent=True, store_history=False).story == ["busy", "idle"]


def test_what_is_displayed_is_no_main_result(kernel: Conversation, displays: str) -> None:
    run = kernel.run(displays)
    display = run.only("display_data")

    assert run.story == ["busy", "execute_input", "display_data", "idle"]
    assert str(data_of(display)["text/html"]).rstrip("\n") == "<b>bold</b>"
    assert display["metadata"] == {}
    assert not display.get("transient")


def test_a_display_with_an_id_can_be_updated(kernel: Conversation, updates: str) -> None:
    run = kernel.run(updates)
    first, second = run.only("display_data"), run.only("update_display_data")

    assert run.story == ["busy", "execute_input", "display_data", "update_display_data", "idle"]
    assert first["transient"] == second["transient"] == {"display_id": "here"}
    assert data_of(first).keys() == data_of(second).keys()
    assert data_of(first) != data_of(second)


def test_output_is_cleared_at_once_or_when_there_is_something_new(kernel: Conversation, clears: str) -> None:
    assert kernel.run(clears).all("clear_output") == [{"wait": False}, {"wait": True}]


def test_what_is_shown_keeps_its_place_in_what_is_printed(kernel: Conversation, mixes: str) -> None:
    assert kernel.run(mixes).story == [
        *("busy", "execute_input", "stream", "display_data", "stream", "execute_result", "idle")
    ]


def test_bytes_arrive_as_base64(kernel: Conversation, draws: str) -> None:
    data = data_of(kernel.run(draws).only("display_data"))

    assert data["image/png"] == base64.b64encode(PNG).decode()


def test_data_is_json_whatever_was_shown(kernel: Conversation, shows_nearly_json: str) -> None:
    data = data_of(kernel.run(shows_nearly_json).only("display_data"))

    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["5"] == 6
    assert data["application/json"] == {
        "1": [2, 3],
        "bytes": base64.b64encode(PNG).decode(),
        "set": [4],
        "not": "nan",
    }


def test_what_was_shown_does_not_change_with_the_object(
    kernel: Conversation, changes_what_it_showed: str
) -> None:
    run = kernel.run(changes_what_it_showed)

    assert run.reply["status"] == "ok"
    assert data_of(run.only("display_data"))["application/json"] == {"list": [1]}


# What fails


def test_an_error_is_published_and_replied_with_the_output_before_it(
    kernel: Conversation, fails: str, failure: tuple[str, str]
) -> None:
    run = kernel.run(fails)
    error = run.only("error")

    assert run.story == ["busy", "execute_input", "stream", "error", "idle"]
    assert run.printed() == "before\n"
    assert (error["ename"], error["evalue"]) == failure
    assert isinstance(error["traceback"], list)
    assert all(isinstance(line, str) for line in error["traceback"])
    assert run.reply["status"] == "error"
    for key in ("ename", "evalue", "traceback"):
        assert run.reply[key] == error[key]


def test_a_failing_run_counts(kernel: Conversation, fails: str) -> None:
    first, second = kernel.run(fails), kernel.run(fails)

    assert second.count == first.count + 1


def test_nothing_runs_of_code_that_is_not_valid(kernel: Conversation, refuses: str) -> None:
    run = kernel.run(refuses)

    assert run.reply["status"] == "error"
    assert run.only("error")["ename"] == run.reply["ename"]
    assert "never" not in run.printed()


def test_what_waits_behind_a_failing_request_runs_all_the_same(
    kernel: Conversation, fails: str, prints: str
) -> None:
    kernel.start(fails)
    run = kernel.wait_over(kernel.start(prints))

    assert (run.reply["status"], run.printed()) == ("ok", "hello\n")


def test_variables_survive_a_failure(kernel: Conversation, assigns: str, fails: str, recalls: str) -> None:
    kernel.run(assigns)
    kernel.run(fails)

    assert kernel.run(recalls).printed() == "7\n"


def test_exiting_is_an_error_that_tells_the_code_and_ends_nothing(
    kernel: Conversation, exits: str, assigns: str, recalls: str
) -> None:
    kernel.run(assigns)
    run = kernel.run(exits)

    for told in (run.reply, run.only("error")):
        assert (told["ename"], told["evalue"]) == ("SystemExit", "3")
    assert run.reply["status"] == "error"
    assert kernel.run(recalls).printed() == "7\n"


# What is asked


def test_input_is_asked_for_on_stdin(kernel: Conversation, asks: str) -> None:
    request = kernel.start(asks, allow_stdin=True)
    question = kernel.wait_heard(request, "input_request")
    kernel.answer(question, "Ünal")

    assert question.channel == "stdin"
    assert question.content == {"prompt": "name?", "password": False}
    run = kernel.wait_over(request)
    assert (run.reply["status"], run.printed()) == ("ok", "Ünal\n")


def test_a_password_is_asked_for_as_one(kernel: Conversation, asks_secretly: str) -> None:
    request = kernel.start(asks_secretly, allow_stdin=True)
    question = kernel.wait_heard(request, "input_request")
    kernel.answer(question, "sesame")

    assert question.content == {"prompt": "secret?", "password": True}
    assert kernel.wait_over(request).printed() == "sesame\n"


def test_what_asks_fails_at_once_if_nobody_answers(
    kernel: Conversation, asks: str, asks_secretly: str
) -> None:
    for code in (asks, asks_secretly):
        run = kernel.run(code, allow_stdin=False)

        assert run.reply["status"] == "error"
        assert run.only("error")["ename"] == run.reply["ename"] == "StdinNotImplementedError"
        assert "input_request" not in [message.msg_type for message in run.messages]


def test_an_answer_that_comes_too_late_answers_no_other_question(kernel: Conversation, asks: str) -> None:
    request = kernel.start(asks, allow_stdin=True)
    question = kernel.wait_heard(request, "input_request")
    kernel.interrupt()
    assert kernel.wait_over(request).reply["ename"] == "KeyboardInterrupt"
    kernel.answer(question, "too late")
    kernel.ask("kernel_info_request")  # it has another way to go, and is there before the next question

    request = kernel.start(asks, allow_stdin=True)
    kernel.answer(kernel.wait_heard(request, "input_request"), "in time")
    assert kernel.wait_over(request).printed() == "in time\n"


# Interrupts


def test_an_interrupt_ends_code_that_spins_and_nothing_else(
    kernel: Conversation, spins: str, recalls: str
) -> None:
    request = kernel.start(spins)
    kernel.wait_heard(request, "stream")
    kernel.interrupt()

    assert kernel.wait_over(request).reply["status"] != "ok"
    assert kernel.run(recalls).printed() == "8\n"


def test_an_interrupt_is_an_error_with_a_name(
    kernel: Conversation, spins: str, names_interrupts: bool
) -> None:
    request = kernel.start(spins)
    kernel.wait_heard(request, "stream")
    kernel.interrupt()
    run = kernel.wait_over(request)

    assert run.reply["status"] == "error"
    assert run.only("error")["ename"] == run.reply["ename"] == "KeyboardInterrupt"


def test_an_interrupt_ends_code_that_awaits(kernel: Conversation, awaits: str, prints: str) -> None:
    request = kernel.start(awaits)
    kernel.wait_heard(request, "stream")
    kernel.interrupt()
    kernel.send("kernel_info_request")  # any message wakes an event loop that sleeps; the signal may not
    run = kernel.wait_over(request)

    assert run.reply["status"] == "error"
    assert run.reply["ename"] in ("KeyboardInterrupt", "CancelledError")
    assert run.only("error")["ename"] == run.reply["ename"]
    assert kernel.run(prints).reply["status"] == "ok"


def test_an_interrupt_while_nothing_runs_is_not_felt_by_what_runs_next(
    kernel: Conversation, prints: str, names_interrupts: bool
) -> None:
    for _ in range(5):
        kernel.interrupt()
        run = kernel.run(prints)

        assert (run.reply["status"], run.printed()) == ("ok", "hello\n")


# The end


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_the_end_is_told_once_and_leaves_nothing_behind(
    new_kernel: Conversation, spins: str, end: str
) -> None:
    new_kernel.wait_heard(new_kernel.start(spins), "stream")
    for _ in range(2):
        the_loop().call_soon(getattr(new_kernel.process, end))
    new_kernel.wait_ended()
    the_loop().call_soon(new_kernel.process.kill)
    new_kernel.process.release()
    new_kernel.wait_settled()

    assert new_kernel.ends == 1
    assert new_kernel.body
    for part in new_kernel.body:
        if isinstance(part, threading.Thread):
            part.join(PATIENCE)
            assert not part.is_alive()
        else:
            assert not part.is_running()
