"""What users get back."""

from __future__ import annotations

import dataclasses

import pytest

from code_sandboxes import results
from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxError,
    SandboxExecutionError,
    SandboxTimeoutError,
)
from code_sandboxes.results import (
    CodeError,
    Context,
    ExecutionError,
    ExecutionResult,
    ExecutionStatus,
    InputRequest,
    Logs,
    MIMEType,
    OutputMessage,
    OutputMessages,
    Printed,
    Result,
    ResultList,
)

FAILED = ExecutionError("ValueError", "no", "Traceback ...")
OF_THE_MACHINERY = [
    ExecutionStatus.INTERRUPTED,
    ExecutionStatus.TIMED_OUT,
    ExecutionStatus.KERNEL_DIED,
    ExecutionStatus.CONNECTION_LOST,
    ExecutionStatus.ABORTED,
]


def printed(*messages: OutputMessage) -> ExecutionResult:
    return ExecutionResult(ExecutionStatus.OK, logs=Logs(messages, messages))


# Result.


@pytest.mark.parametrize("mime_type", [mime_type for mime_type in MIMEType if mime_type is not MIMEType.JSON])
def test_a_result_has_a_property_for_each_mime_type(mime_type: MIMEType) -> None:
    name = mime_type.name.lower()
    assert getattr(Result({mime_type.value: "it"}), name) == "it"
    assert getattr(Result({}), name) is None
    assert getattr(Result({mime_type.value: ["no", "text"]}), name) is None


@pytest.mark.parametrize("value", [{"a": [1]}, [1, 2], "text", 0, None])
def test_json_is_what_it_is(value: object) -> None:
    assert Result({"application/json": value}).json == value


def test_a_result_names_its_formats_in_order() -> None:
    assert Result({"text/html": "", "text/plain": "", "x/y": 1}).formats() == [
        "text/html",
        "text/plain",
        "x/y",
    ]


def test_a_result_shows_itself_in_a_notebook() -> None:
    result = Result({"text/plain": "it"}, {"text/plain": {"isolated": True}})
    data, metadata = result._repr_mimebundle_(include=None, exclude=None)
    assert (data, metadata) == (result.data, result.metadata)
    data.clear()
    assert result.text == "it"


# ResultList.


def test_results_are_a_sequence() -> None:
    one, two = Result({"text/plain": "1"}), Result({"text/plain": "2"})
    results = ResultList([one, two])
    assert (len(results), results[0], results[-1], results[:1], list(results)) == (
        2,
        one,
        two,
        [one],
        [one, two],
    )
    assert one in results
    assert results == [one, two] == list(results)
    assert results == ResultList([one, two])
    assert results != [two, one]
    assert results != "other"
    assert repr(results) == repr([one, two])
    with pytest.raises(IndexError):
        results[2]


# Frozen.


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (OutputMessage("a"), "line"),
        (Result({}), "data"),
        (FAILED, "name"),
        (Logs(), "stdout"),
        (InputRequest("? "), "prompt"),
        (Context("1", "default", "python"), "id"),
        (ExecutionResult(ExecutionStatus.OK), "status"),
    ],
)
def test_values_are_frozen(value: object, name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_two_results_do_not_share_their_defaults() -> None:
    one, two = ExecutionResult(ExecutionStatus.OK), ExecutionResult(ExecutionStatus.OK)
    assert one.results is not two.results


# Words.


@pytest.mark.parametrize("member", [*ExecutionStatus, *MIMEType])
def test_members_compare_and_print_as_plain_strings(member: ExecutionStatus | MIMEType) -> None:
    assert member == member.value
    assert str(member) == f"{member}" == member.value
    assert {member.value: 1}[member] == 1


def test_a_message_prints_as_its_line() -> None:
    assert str(OutputMessage("50%", "\r")) == "50%"


def test_an_error_prints_as_python_does() -> None:
    assert str(FAILED) == "ValueError: no"
    assert str(ExecutionError("KeyboardInterrupt", "")) == "KeyboardInterrupt"
    assert CodeError is ExecutionError


# ExecutionResult.


@pytest.mark.parametrize("status", ExecutionStatus)
@pytest.mark.parametrize("exit_code", [None, 0, 1])
def test_success_is_ok_or_an_exit_with_0(status: ExecutionStatus, exit_code: int | None) -> None:
    expected = status == "ok" or (status == "exited" and exit_code == 0)
    assert ExecutionResult(status, exit_code=exit_code).success is expected


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], ""),
        ([OutputMessage("a")], "a"),
        ([OutputMessage("a", "")], "a"),
        ([OutputMessage("a"), OutputMessage("")], "a\n"),
        ([OutputMessage("a", "\r\n")], "a"),
        ([OutputMessage("a", "\r\n"), OutputMessage("", "\r\n")], "a\r\n"),
        ([OutputMessage("a", "\r")], "a\r"),
        ([OutputMessage("a", "\r"), OutputMessage("b", "")], "a\rb"),
        ([OutputMessage(" a "), OutputMessage("b")], " a \nb"),
        ([OutputMessage("")], ""),
    ],
)
def test_stdout_and_stderr_leave_out_one_final_newline(messages: list[OutputMessage], text: str) -> None:
    result = printed(*messages)
    assert (result.stdout, result.stderr) == (text, text)


def test_text_is_that_of_the_main_result() -> None:
    shown, main = Result({"text/plain": "shown"}), Result({"text/plain": "main"}, is_main_result=True)
    assert ExecutionResult(ExecutionStatus.OK, ResultList([shown, main])).text == "main"
    assert ExecutionResult(ExecutionStatus.OK, ResultList([shown])).text is None


def test_the_error_of_the_code_is_not_that_of_the_machinery() -> None:
    result = ExecutionResult(ExecutionStatus.ERROR, error=FAILED)
    assert (result.execution_ok, result.execution_error, result.code_error) == (True, None, FAILED)


@pytest.mark.parametrize("status", OF_THE_MACHINERY)
def test_the_error_of_the_machinery_is_not_that_of_the_code(status: ExecutionStatus) -> None:
    result = ExecutionResult(status, error=FAILED)
    assert (result.execution_ok, result.execution_error, result.code_error) == (False, FAILED, None)


# raise_for_status().


def test_a_success_is_returned() -> None:
    for result in (ExecutionResult(ExecutionStatus.OK), ExecutionResult(ExecutionStatus.EXITED, exit_code=0)):
        assert result.raise_for_status() is result


@pytest.mark.parametrize(
    ("status", "raised", "builtin"),
    [
        (ExecutionStatus.ERROR, SandboxExecutionError, RuntimeError),
        (ExecutionStatus.INTERRUPTED, SandboxExecutionError, RuntimeError),
        (ExecutionStatus.ABORTED, SandboxExecutionError, RuntimeError),
        (ExecutionStatus.TIMED_OUT, SandboxTimeoutError, TimeoutError),
        (ExecutionStatus.KERNEL_DIED, SandboxConnectionError, ConnectionError),
        (ExecutionStatus.CONNECTION_LOST, SandboxConnectionError, ConnectionError),
    ],
)
def test_any_other_status_raises_with_the_result(
    status: ExecutionStatus, raised: type[SandboxError], builtin: type[Exception]
) -> None:
    result = ExecutionResult(status, error=FAILED)
    with pytest.raises(raised, match=r"^ValueError: no$") as caught:
        result.raise_for_status()
    assert type(caught.value) is raised
    assert isinstance(caught.value, builtin)
    assert vars(caught.value)["result"] is result


def test_a_failing_exit_raises_with_its_code() -> None:
    with pytest.raises(SandboxExecutionError, match=r"^the code called sys\.exit\(2\)$"):
        ExecutionResult(ExecutionStatus.EXITED, exit_code=2).raise_for_status()


def test_many_lines_are_counted_and_indexed_without_making_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_MANY", 2)  # the same as with a million
    for texts in (["a\n", "b\r", "c\r\n", "d"], ["", "\n\r\n\r\r", "x"], [], ["\n"] * 3):
        messages = OutputMessages(Printed(text) for text in texts)
        expected = list(iter(messages))
        assert len(messages) == len(expected)
        assert [messages[i] for i in range(-len(expected), len(expected))] == expected * 2
    with pytest.raises(IndexError):
        messages[3]
    assert messages._messages is None
