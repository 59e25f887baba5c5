"""The two sides of file calls, each without the other: what the guest keeps open, what the host believes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from code_sandboxes import FileWatchEvent, FileWatchEventType, SandboxConnectionError, file_operations
from code_sandboxes.blocking import drive
from code_sandboxes.errors import SandboxError
from code_sandboxes.files import FileWatcher, _Raw
from code_sandboxes.guest import files as guest_files, watching as guest_watching
from code_sandboxes.guest.calls import Guest, Link
from code_sandboxes.guest.files import SMALL, Files
from code_sandboxes.guest.watching import Watching
from code_sandboxes.guest_calls import Guest as HostGuest, Window
from code_sandboxes.guest_link import Answered, Channel, GuestCall, Refused, Told
from code_sandboxes.guest_values import error_of
from conftest import wait_until
from tests.test_transfers import tree

MIB = 1024**2


# The guest.


class Program:
    """A program that is connected to a guest in this process."""

    def __init__(self, guest: Guest, name: str) -> None:
        self._guest = guest
        self._name = name
        self.heard: list[Mapping[str, Any]] = []
        self.buffers: list[bytes] = []
        self.link: Link = guest.open(name, self._hear)
        self._number = 0

    def _hear(self, message: Mapping[str, Any], buffers: list[Any]) -> None:
        self.heard.append(message)
        self.buffers.extend(buffers)

    def call(self, name: str, *buffers: bytes, credit: int | None = None, **arguments: object) -> Any:
        """What the function returns."""
        self._number += 1
        message = {"call": self._number, "name": name, "args": arguments}
        if credit is not None:
            message |= {"channel": self._number, "credit": credit}
        self._guest.receive(self.link, message, [memoryview(buffer) for buffer in buffers])
        wait_until(lambda: self._reply() is not None)
        reply = self._reply()
        assert reply is not None
        if "failure" in reply:
            raise error_of(reply["error"], name)
        return reply["value"]

    def _reply(self) -> Mapping[str, Any] | None:
        number = self._number
        heard = list(self.heard)
        return next((m for m in heard if number in (m.get("answer"), m.get("failure"))), None)

    @property
    def handle(self) -> int:
        """What the latest call has opened."""
        return self._number

    def close(self, handle: int) -> None:
        self._guest.receive(self.link, {"close": handle}, [])

    def go(self) -> None:
        self._guest.close_link(self._name)

    def told(self) -> list[tuple[object, ...]]:
        """The events of a watch: what, and the names."""
        return [
            (kind, *(os.path.basename(path) for path in (path, new_path) if path))
            for message in list(self.heard)
            if "data" in message
            for kind, path, _, new_path in message["data"]["events"]
        ]


@pytest.fixture
def parts() -> tuple[Files, Watching]:
    return Files(), Watching()


@pytest.fixture
def guest(parts: tuple[Files, Watching]) -> Iterator[Guest]:
    guest = Guest(parts)
    yield guest
    guest.close()


@pytest.fixture
def program(guest: Guest) -> Program:
    return Program(guest, "program")


def test_what_the_modules_of_the_guest_agree_on_is_the_same() -> None:
    assert guest_files.TEMPORARY == guest_watching.TEMPORARY


@pytest.mark.parametrize("how", ["the handle", "the program", "the guest"])
def test_what_is_open_is_closed_with(how: str, guest: Guest, program: Program, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    before = len(os.listdir("/proc/self/fd"))
    opening: list[tuple[str, dict[str, object]]] = [
        ("files.open_read", {"path": str(tmp_path / "f")}),
        ("files.open", {"path": str(tmp_path / "f"), "mode": "r+"}),
        ("files.list", {"path": str(tmp_path), "depth": None}),
        ("files.begin_write", {"path": str(tmp_path / "g"), "make_dirs": True, "mode": None}),
    ]
    handles = []
    for name, arguments in opening:
        program.call(name, credit=0, **arguments)
        handles.append(program.handle)
    assert len(os.listdir("/proc/self/fd")) == before + 4
    assert len(os.listdir(tmp_path)) == 2
    if how == "the handle":
        for handle in handles:
            program.close(handle)
        with pytest.raises(OSError, match="Bad file descriptor"):
            program.call("files.read_on", handle=handles[0], size=1)
    elif how == "the program":
        program.go()
    else:
        guest.close()

    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(tmp_path) == ["f"]


def test_a_call_that_fails_leaves_nothing_open(program: Program, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name, arguments in (
        ("files.open_read", {"path": str(tmp_path)}),
        ("files.open", {"path": str(tmp_path / "no"), "mode": "r"}),
        ("files.begin_write", {"path": str(tmp_path), "make_dirs": True, "mode": None}),
    ):
        with pytest.raises(OSError, match=r"Errno"):
            program.call(name, credit=0, **arguments)

    assert len(os.listdir("/proc/self/fd")) == before
    assert not program.link.has_something_open


def test_a_handle_is_of_the_program_that_opened_it_and_of_its_kind(
    guest: Guest, program: Program, tmp_path: Path
) -> None:
    (tmp_path / "f").write_text("content")
    program.call("files.open_read", credit=0, path=str(tmp_path / "f"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        Program(guest, "other").call("files.read_on", handle=program.handle, size=1)
    handle = program.handle
    with pytest.raises(OSError, match="Bad file descriptor"):
        program.call("files.commit", handle=handle)
    assert program.call("files.read_on", handle=handle, size=3) == 3
    assert program.buffers == [b"con"]


def test_a_tree_reads_by_way_of_no_link(program: Program, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/e/f").write_text("f")
    (tmp_path / "d/to_file").symlink_to("../secret")
    (tmp_path / "d/to_folder").symlink_to("..")
    os.mkfifo(tmp_path / "d/fifo")
    program.call("files.list", credit=0, path=str(tmp_path / "d"), depth=None)
    handle = program.handle

    assert program.call("files.tree_read", tree=handle, path=["e", "f"], size=9) == 1
    for path in (["to_file"], ["to_folder", "secret"], ["fifo"], ["e"]):
        with pytest.raises(OSError, match=r"Errno") as caught:
            program.call("files.tree_read", tree=handle, path=path, size=9)
        assert caught.value.filename == "/".join((f"{tmp_path}/d", *path))
        with pytest.raises(OSError, match=r"Errno"):
            program.call("files.open_read", credit=0, tree=handle, path=path, length=9)


def test_a_folder_that_vanishes_while_it_is_listed_is_left_out(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_files, "BATCH", 3)
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "in").touch()
    first = program.call("files.list", path=str(tmp_path), depth=None, credit=0)
    handle = program.handle
    (tmp_path / "a/in").unlink()
    (tmp_path / "a").rmdir()
    (tmp_path / "b/in").unlink()
    (tmp_path / "b").rmdir()
    (tmp_path / "b").touch()

    assert sorted(each[0] for each in first["entries"]) == ["a", "b", "c"]
    assert [each[0] for each in program.call("files.more", handle=handle)] == ["c/in"]
    assert program.call("files.more", handle=handle) == []


def test_a_folder_that_cannot_be_listed_is_named(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError) as caught:
        program.call("files.list", path=str(tmp_path), depth=None, credit=0)
    assert caught.value.filename == str(tmp_path / "closed")


@pytest.mark.parametrize(
    "poll", [pytest.param(False, id="inotify"), pytest.param(True, id="polling", marks=pytest.mark.slow)]
)
def test_a_watch_tells_what_happened(poll: bool, tmp_path: Path) -> None:
    guest = Guest([Watching(poll=poll)])
    program = Program(guest, "program")
    (tmp_path / "old").write_text("1")
    assert program.call("watching.watch", credit=10_000, path=str(tmp_path), recursive=True) == str(tmp_path)
    for change, told in (
        (lambda: (tmp_path / "d").mkdir(), ("create", "d")),
        (lambda: (tmp_path / "d/f").write_text("f"), ("create", "f")),
        (lambda: (tmp_path / "old").write_text("22"), ("modify", "old")),
        (lambda: os.rename(tmp_path / "d/f", tmp_path / "g"), ("rename", "f", "g")),
        (lambda: os.remove(tmp_path / "g"), ("delete", "g")),
    ):
        cast(Callable[[], object], change)()
        wait_until(lambda told=told: told in program.told())  # type: ignore[misc]  # mypy cannot infer it
    guest.close()


def test_a_watch_waits_for_credit_and_ends_when_it_has_lost_something(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    guest = Guest([Watching()])
    program = Program(guest, "program")
    program.call("watching.watch", credit=2 * guest_watching.COST, path=str(tmp_path), recursive=False)
    number = program.handle
    for i in range(5 * guest_watching.BATCH):
        (tmp_path / str(i)).touch()
    wait_until(lambda: len([m for m in program.heard if "data" in m]) == 2)
    guest.receive(program.link, {"grant": number, "bytes": 100 * guest_watching.COST}, [])
    wait_until(lambda: ("create", str(5 * guest_watching.BATCH - 1)) in program.told())
    overflow = [(-1, 0x4000, 0, "")]
    monkeypatch.setattr(guest_watching.Inotify, "read", lambda self: overflow)
    (tmp_path / "more").touch()
    wait_until(lambda: any("end" in message for message in program.heard))

    end = next(message["end"] for message in program.heard if "end" in message)
    assert end["error"]["errno"] == "EOVERFLOW"
    guest.close()


# The host, and a sandbox that answers whatever it likes.


class Liar:
    """Answers each call with the next of *answers*: a value, and buffers; the last one for ever."""

    base = None

    def __init__(self, *answers: tuple[object, Sequence[bytes]]) -> None:
        self._answers = list(answers)
        self.closed: list[Channel] = []
        self.calls: list[GuestCall] = []

    def begin(self, call: GuestCall) -> None:
        self.calls.append(call)
        value, buffers = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        call.inbox.put(Answered(call, value, buffers))

    call, ask = HostGuest.call, HostGuest.ask

    def cancel(self, call: GuestCall) -> None:
        return

    def close_channel(self, channel: Channel) -> None:
        self.closed.append(channel)

    def grant(self, channel: Channel, credit: int) -> None:
        return


def liar(*answers: tuple[object, Sequence[bytes]]) -> HostGuest:
    return cast(HostGuest, Liar(*answers))


def listing(*entries: object) -> tuple[object, Sequence[bytes]]:
    return {"path": "/remote", "mode": 0o755, "entries": list(entries)}, []


def entry(name: object, mode: int = 0o100644, size: object = 1, target: object = None) -> list[object]:
    return [name, mode, size, 1.5, "root", "root", target]


@pytest.mark.parametrize(
    "answer",
    [
        (True, []),
        (True, [b"a", b"b"]),
        (True, [bytes(SMALL + 1)]),
        ("yes", [b""]),
        (None, [b""]),
        ({"done": True}, [b""]),
    ],
    ids=["none", "two", "too_big", "text", "null", "object"],
)
def test_content_is_what_was_asked_for_or_an_error(answer: tuple[object, list[bytes]]) -> None:
    with pytest.raises(SandboxConnectionError):
        drive(file_operations.read_bytes(liar(answer), "f", 0, None))


def test_no_more_is_read_than_was_said_to_be_there() -> None:
    endless = liar((False, []), ({"size": 3, "mode": 0o644}, []), (1, [b"abcd"]))
    with pytest.raises(SandboxConnectionError, match="more of a file than"):
        drive(file_operations.read_bytes(endless, "f", 0, None))
    assert len(cast(Liar, endless).closed) == 1
    big = liar((False, []), ({"size": 10 * SMALL, "mode": 0}, []), (1, [bytes(2 * file_operations.PIECE)]))
    with pytest.raises(SandboxConnectionError, match="bytes where"):
        drive(file_operations.read_bytes(big, "f", 0, None))


@pytest.mark.parametrize("said", [None, 80 * MIB])
def test_no_more_is_read_than_was_asked_for(said: int | None) -> None:
    endless = liar((False, []), ({"size": said, "mode": 0o644}, []), (1, [bytes(MIB)]))
    with pytest.raises(SandboxConnectionError, match="more of a file than"):
        drive(file_operations.read_bytes(endless, "f", 0, 10))


@pytest.mark.parametrize("size", ["1", -1, 1.5, True, []], ids=repr)
def test_a_size_is_a_number(size: object) -> None:
    wrong = liar((False, []), ({"size": size, "mode": 0o644}, []), (0, [b""]))
    with pytest.raises(SandboxConnectionError):
        drive(file_operations.read_bytes(wrong, "f", 0, None))


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {"path": 5, "entries": []},
        {"path": "/", "entries": {}},
        {"path": "/", "entries": [["a"]]},
        {"path": "/", "entries": [entry(5)]},
        {"path": "/", "entries": [entry({"hex": "zz"})]},
        {"path": "/", "entries": [entry("a", mode=-1)]},
        {"path": "/", "entries": [entry("a", mode=2**40)]},
        {"path": "/", "entries": [entry("a", size="1")]},
        {"path": "/", "entries": [entry("a", target=5)]},
        {"path": "/", "entries": [entry("a")] * (guest_files.BATCH + 1)},
        {"path": "/" * 20_000, "entries": []},
        {"path": "/", "entries": [entry("a" * 20_000)]},
        {"path": "/", "entries": [entry({"hex": "ff" * 20_000})]},
        {"path": "/", "entries": [entry("a", target="b" * 20_000)]},
        {"path": "/", "entries": [[*entry("a")[:4], "o" * 20_000, "g", None]]},
        {"path": "/", "entries": [[*entry("a")[:4], "o", "g" * 20_000, None]]},
    ],
    ids=lambda answer: repr(answer)[:60],
)
def test_a_listing_has_the_right_shape_or_is_an_error(answer: object) -> None:
    with pytest.raises(SandboxConnectionError):
        drive(file_operations.list_folder(liar((answer, [])), "/", 1))


def test_an_endless_listing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_operations, "_MOST_ENTRIES", 1000)
    endless = liar(listing(entry("a")), ([entry("b")] * 300, []))
    with pytest.raises(OSError, match="more than 1000 files"):
        drive(file_operations.list_folder(endless, "/", 1))
    assert len(cast(Liar, endless).closed) == 1
    monkeypatch.setattr(file_operations, "_MOST_NAMES", 1000)
    heavy = liar(listing(entry("a")), ([entry("b" * 50)] * 10, []))
    with pytest.raises(OSError, match="more than 1000 bytes"):
        drive(file_operations.list_folder(heavy, "/", 1))


@pytest.mark.parametrize(
    "entries",
    [
        [entry("../evil")],
        [entry("/evil")],
        [entry("a/../../evil")],
        [entry("")],
        [entry(".")],
        [entry("a\0b")],
        [entry("a", 0o120777, target="/"), entry("a/evil")],
        [entry("a", 0o120777, target="b"), entry("a/evil")],
        [entry("a", 0o120777)],
        [entry("a", 0o020666)],
        [entry("a", 0o040755), entry("a")],
        [entry("a", size=-1)],
    ],
    ids=repr,
)
def test_a_folder_that_lies_makes_nothing_here(tmp_path: Path, entries: list[object]) -> None:
    (tmp_path / "here").mkdir()
    guest = _folder(entries)
    with pytest.raises((OSError, SandboxError)):
        drive(file_operations.download(guest, "/remote", str(tmp_path / "here/d"), None))
    assert tree(tmp_path) == {"here": None}


def _folder(entries: list[object]) -> HostGuest:
    """A sandbox that has a folder of *entries*, and gives a byte for each file."""

    class Folder(Liar):
        def begin(self, call: GuestCall) -> None:
            if call.name == "files.open_read":
                failure = {"kind": "OSError", "errno": "EISDIR", "message": "", "path": "/remote"}
                call.inbox.put(Refused(call, error_of(failure, call.name)))
            else:
                super().begin(call)

    return cast(HostGuest, Folder(listing(*entries), ([], []), (1, [b"x"])))


def test_an_honest_folder_is_made(tmp_path: Path) -> None:
    guest = _folder([entry("b", 0o040755), entry("b/f"), entry("l", 0o120777, target="b/f")])
    drive(file_operations.download(guest, "/remote", str(tmp_path / "d"), None))

    assert tree(tmp_path) == {"d": None, "d/b": None, "d/b/f": "x", "d/l": "-> b/f"}


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"events": 5},
        {"events": [5]},
        {"events": [["create", "/a", 1.0]]},
        {"events": [["explode", "/a", 1.0, None]]},
        {"events": [["create", 5, 1.0, None]]},
        {"events": [["create", "/a", "now", None]]},
        {"events": [["create", "/a", 1.0, None]] * (guest_watching.BATCH + 1)},
    ],
    ids=lambda data: repr(data)[:40],
)
def test_events_have_the_right_shape_or_are_an_error(data: object) -> None:
    watcher = drive(file_operations.watch(liar(("/", [])), "/", False))
    channel = watcher._channel
    channel.receive(Told(channel, {"events": [["rename", "/a", 1.5, "/b"]]}, []))
    event = drive(watcher.next())
    assert event == FileWatchEvent(FileWatchEventType.RENAME, "/a", 1.5, "/b")
    channel.receive(Told(channel, data, []))
    with pytest.raises(SandboxConnectionError):
        drive(watcher.next())


def test_whatever_is_done_with_a_handle_follows_its_opening() -> None:
    guest = Liar((True, []), (1, [b"x"]))
    drive(drive(file_operations.open_file(cast(HostGuest, guest), "f", "r")).read(1))

    opening, reading = guest.calls
    assert reading.follows is opening  # so that no other kernel is asked for it (test_guest_link.py)


def test_answers_of_many_calls_may_come_in_any_order() -> None:
    calls: list[GuestCall] = []

    class Waiting(Liar):
        def begin(self, call: GuestCall) -> None:
            calls.append(call)

    window = Window(cast(HostGuest, Waiting((None, []))))
    for name in "abc":
        window.begin(name)
    for call in reversed(calls):
        call.inbox.put(Answered(call, call.name, []))

    assert [drive(window.oldest()).value for _ in "abc"] == ["a", "b", "c"]


def test_what_has_no_owner_here_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows."""
    monkeypatch.setattr(guest_files, "getpwuid", None)
    monkeypatch.setattr(guest_files, "getgrgid", None)

    assert (guest_files._owner(0), guest_files._group(0)) == ("", "")


def test_a_watch_that_nobody_holds_is_closed() -> None:
    guest = liar(("/", []))
    watcher = FileWatcher(drive(file_operations.watch(guest, "/", False)))
    assert not cast(Liar, guest).closed

    del watcher
    assert len(cast(Liar, guest).closed) == 1


def test_a_file_is_neither_used_nor_closed_by_a_forked_child(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = liar((True, []))
    file = _Raw(drive(file_operations.open_file(guest, "f", "w")), "f", "w")
    monkeypatch.setattr(os, "getpid", lambda: 0)
    with pytest.raises(SandboxConnectionError, match="its fork 0"):
        file.write(b"x")
    file.close()

    assert file.closed
    assert not cast(Liar, guest).closed
