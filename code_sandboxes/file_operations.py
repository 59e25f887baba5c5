"""What both fronts do with files, written once.

Content travels as binary buffers, in pieces where it is big, a few of them under way at a time. What is open
in the guest stays open as long as the channel that was opened with it.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import stat
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol, TypeVar

from code_sandboxes.errors import SandboxConnectionError
from code_sandboxes.file_info import FileInfo, FileType, FileWatchEvent, FileWatchEventType
from code_sandboxes.guest.calls import wire_path
from code_sandboxes.guest.files import BATCH, SMALL
from code_sandboxes.guest.watching import BATCH as EVENT_BATCH, COST as EVENT_COST
from code_sandboxes.guest_calls import Answer, Guest, Window
from code_sandboxes.guest_link import Channel, ChannelEnded, GuestCall, Told
from code_sandboxes.guest_values import (
    as_bool,
    as_bytes,
    as_float,
    as_int,
    as_list,
    as_object,
    as_path,
    as_str,
    bad_answer,
    error_of,
)
from code_sandboxes.inbox import Inbox
from code_sandboxes.protocol.events import Event
from code_sandboxes.steps import Operation, Tell, in_worker, next_event
from code_sandboxes.transfers import (
    Entry,
    FileLanding,
    FolderLanding,
    Source,
    check_entries,
    entries_of,
    type_of,
)
from code_sandboxes.transports.loop import the_loop

__all__ = [
    "Content",
    "OnProgress",
    "OpenFile",
    "Path",
    "Reading",
    "Watcher",
    "copy",
    "download",
    "exists",
    "get_info",
    "is_dir",
    "is_file",
    "list_folder",
    "mkdir",
    "move",
    "open_file",
    "read",
    "read_bytes",
    "rm",
    "stream",
    "upload",
    "watch",
    "write",
    "write_files",
]

T = TypeVar("T")

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
OnProgress = Callable[[int, int], object]

PIECE = 4 * 1024**2
"""Bytes that travel together."""

_PIECES = 3
_FILES = 16
_MOST_ENTRIES = 1_000_000
# Characters of all names in a folder.
_MOST_NAMES = 512 * 1024**2
# Characters of a name, a path or where a link leads: four times what Linux takes.
_LONGEST = 16 * 1024
_EVENT_CREDIT = 64 * EVENT_COST
# 64 events with two paths of 4 KiB, each byte of which may be two characters.
_EVENT_JSON = 2 * 1024**2


class Readable(Protocol):
    """A binary file."""

    def read(self, size: int, /) -> object: ...


_BYTES = (str, bytes, bytearray, memoryview)
Content = str | bytes | bytearray | memoryview | Readable


def _wire(path: Path) -> object:
    """*path* as a JSON value.

    Raises:
        TypeError: it is no path.
    """
    return wire_path(os.fspath(path))


def _relative(guest: Guest) -> Mapping[str, object]:
    """Where relative paths start, as an argument of the guest's functions."""
    return {"base": None if guest.base is None else wire_path(guest.base)}


def _call(guest: Guest, name: str, *buffers: bytes | memoryview, **arguments: object) -> Operation[Answer]:
    return (yield from guest.call(name, *buffers, **arguments, **_relative(guest)))


# Calls under way.


def _ignore(_: Event) -> None:
    """The end of a channel on which nothing is told: calls that come later are refused."""


class _Handle:
    """Something that is open in the guest.

    Args:
        name: of the function that opens it.
        within: what is open, if it is opened in that.

    Attributes:
        opening: what every call that names it follows.
    """

    def __init__(
        self, guest: Guest, name: str, within: _Handle | None = None, /, **arguments: object
    ) -> None:
        self._guest = guest
        self._channel = Channel(_ignore, 0)
        self.opening: GuestCall = GuestCall(
            name, arguments, (), Inbox(), self._channel, None if within is None else within.opening
        )

    def open(self) -> Operation[object]:
        """Open it; what the function returns."""
        try:
            return (yield from self._guest.ask(self.opening)).value
        except BaseException:  # nobody waits any more, whatever the reason
            self.close()
            raise

    @property
    def number(self) -> int:
        """Its name in the guest."""
        return self._channel.number

    def call(self, name: str, *buffers: bytes | memoryview, **arguments: object) -> Operation[Answer]:
        """Call a function that does something with it.

        Raises:
            SandboxConnectionError: the kernel is gone, and with it what was open.
        """
        call = GuestCall(name, {"handle": self.number, **arguments}, buffers, Inbox(), follows=self.opening)
        return (yield from self._guest.ask(call))

    def close(self) -> None:
        """Close it, if it is open; whoever asks something after that finds it closed."""
        self._guest.close_channel(self._channel)


# Looking.


def list_folder(guest: Guest, path: Path, depth: int) -> Operation[list[FileInfo]]:
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth must be an int, not {type(depth).__name__}")
    if depth < 1:
        raise ValueError(f"depth must be 1 or more, not {depth}")
    found: list[FileInfo] = []
    handle = _Handle(guest, "files.list", path=_wire(path), depth=depth, **_relative(guest))
    try:
        yield from _entries(handle, lambda folder, value: found.append(_info(folder, value)))
    finally:
        handle.close()
    return sorted(found, key=lambda info: info.path)


def _entries(handle: _Handle, take: Callable[[str, object], object]) -> Operation[Mapping[str, object]]:
    """Open *handle* with a function that lists, and let *take* have the folder's path and each entry.

    Returns what else the function has said of the folder.
    """
    first = as_object((yield from handle.open()))
    folder, batch = _no_longer(as_path(first.get("path"))), as_list(first.pop("entries", None))
    total = names = 0
    while batch:
        if len(batch) > BATCH:
            raise SandboxConnectionError(f"the sandbox sent {len(batch)} entries at once")
        total += len(batch)
        if total > _MOST_ENTRIES:
            raise OSError(errno.EOVERFLOW, f"more than {_MOST_ENTRIES} files", folder)
        for value in batch:
            names += sum(len(str(field)) for field in as_list(value) if isinstance(field, (str, dict)))
            take(folder, value)
        if names > _MOST_NAMES:
            raise OSError(errno.EOVERFLOW, f"the names of files are more than {_MOST_NAMES} bytes", folder)
        batch = as_list((yield from handle.call("files.more")).value)
    return first


def _no_longer(text: str) -> str:
    """*text*, which the sandbox has sent, if the host is to keep it."""
    if len(text) > _LONGEST:
        raise SandboxConnectionError(f"the sandbox sent a name of {len(text)} characters")
    return text


def _info(folder: str, value: object) -> FileInfo:
    """An entry, as ``guest/files.py`` describes it."""
    fields = as_list(value)
    if len(fields) != 7:
        raise bad_answer("an entry", value)
    name, mode = _no_longer(as_path(fields[0])), as_int(fields[1])
    if not 0 <= mode < 2**32:
        raise bad_answer("permissions", mode)
    path = posixpath.join(folder, name) if name else folder
    return FileInfo(
        name=posixpath.basename(path),
        path=path,
        type=type_of(mode),
        size=as_int(fields[2]),
        modified=as_float(fields[3]),
        permissions=stat.filemode(mode),
        mode=stat.S_IMODE(mode),
        owner=_no_longer(as_str(fields[4])),
        group=_no_longer(as_str(fields[5])),
        symlink_target=None if fields[6] is None else _no_longer(as_path(fields[6])),
    )


def get_info(guest: Guest, path: Path) -> Operation[FileInfo]:
    answer = as_list((yield from _call(guest, "files.stat", path=_wire(path))).value)
    if len(answer) != 2:
        raise bad_answer("an entry", answer)
    return _info(_no_longer(as_path(answer[0])), answer[1])


def _kind(guest: Guest, path: Path) -> Operation[str | None]:
    value = (yield from _call(guest, "files.kind", path=_wire(path))).value
    return None if value is None else as_str(value)


def exists(guest: Guest, path: Path) -> Operation[bool]:
    return (yield from _kind(guest, path)) is not None


def is_file(guest: Guest, path: Path) -> Operation[bool]:
    return (yield from _kind(guest, path)) == "file"


def is_dir(guest: Guest, path: Path) -> Operation[bool]:
    return (yield from _kind(guest, path)) == "directory"


# Changing what there is.


def mkdir(guest: Guest, path: Path, parents: bool) -> Operation[None]:
    yield from _call(guest, "files.make_dir", path=_wire(path), parents=bool(parents))


def rm(guest: Guest, path: Path, recursive: bool) -> Operation[None]:
    yield from _call(guest, "files.remove", path=_wire(path), recursive=bool(recursive))


def copy(guest: Guest, source: Path, target: Path) -> Operation[None]:
    yield from _call(guest, "files.copy", source=_wire(source), target=_wire(target))


def move(guest: Guest, source: Path, target: Path) -> Operation[None]:
    yield from _call(guest, "files.move", source=_wire(source), target=_wire(target))


# Reading.


class Reading:
    """A file that comes in pieces; nothing of it is asked for before it is opened.

    Args:
        length: so many bytes at most, if not all.
        within: the folder that is open, if it is read from that.
        arguments: the others of ``files.open_read``.

    Attributes:
        size: bytes that will come at most, or None where its system does not know.
        mode: its permissions.
    """

    def __init__(
        self, guest: Guest, length: int | None, within: _Handle | None = None, /, **arguments: object
    ) -> None:
        self._handle = _Handle(guest, "files.open_read", within, length=length, **arguments)
        self._length = length
        self._window = Window(guest, self._handle.opening)
        self._asked = self._got = 0
        self._is_over = False
        self.size: int | None = None
        self.mode = 0

    def open(self) -> Operation[None]:
        answer = as_object((yield from self._handle.open()))
        said = answer.get("size")
        sizes = [self._length, None if said is None else as_int(said)]
        self.size = min((size for size in sizes if size is not None), default=None)
        self.mode = as_int(answer.get("mode"))

    def next(self) -> Operation[memoryview]:
        """The next piece; an empty one at the end."""
        self._ask()
        if not self._window:
            return memoryview(b"")
        piece = memoryview(_only_buffer((yield from self._window.oldest()), PIECE))
        self._got += len(piece)
        if self.size is not None and self._got > self.size:
            raise SandboxConnectionError("the sandbox sent more of a file than it has, or was asked for")
        if not piece:
            self._is_over = True
        return piece

    def _ask(self) -> None:
        """Ask for pieces until enough are under way, or the end will be."""
        while not self._is_over and len(self._window) < _PIECES:
            if (
                self.size is not None
                and self._asked >= self.size
                and (self._window or self._got == self.size)
            ):
                return
            self._window.begin("files.read_on", handle=self._handle.number, size=PIECE)
            self._asked += PIECE

    def close(self) -> None:
        self._is_over = True
        self._window.cancel()
        self._handle.close()


def _only_buffer(answer: Answer, most: int) -> bytes | memoryview:
    """The one buffer that came with *answer*."""
    if len(answer.buffers) != 1:
        raise SandboxConnectionError(f"the sandbox sent {len(answer.buffers)} buffers instead of one")
    content = as_bytes(answer.buffers[0])
    if len(content) > most:
        raise SandboxConnectionError(f"the sandbox sent {len(content)} bytes where {most} were asked for")
    return content


def stream(guest: Guest, path: Path) -> Reading:
    return Reading(guest, None, path=_wire(path), **_relative(guest))


def read(guest: Guest, path: Path) -> Operation[str]:
    content = yield from read_bytes(guest, path, 0, None)
    return content.decode("utf-8")


def read_bytes(guest: Guest, path: Path, offset: int, length: int | None) -> Operation[bytes]:
    _check_count("offset", offset)
    if length is not None:
        _check_count("length", length)
    answer = yield from _call(guest, "files.read", path=_wire(path), offset=offset, length=length)
    if as_bool(answer.value):
        return bytes(_only_buffer(answer, SMALL if length is None else min(length, SMALL)))
    content = io.BytesIO()  # getvalue() does not copy
    reading = Reading(guest, length, path=_wire(path), offset=offset, **_relative(guest))
    try:
        yield from reading.open()
        while piece := (yield from reading.next()):
            content.write(piece)
    finally:
        reading.close()
    return content.getvalue()


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, not {value}")


# Writing.


class _Writing:
    """A file that is sent in pieces, and is there when it is whole."""

    def __init__(self, guest: Guest, path: Path, make_dirs: bool, mode: int | None) -> None:
        arguments = {"path": _wire(path), "make_dirs": make_dirs, "mode": mode, **_relative(guest)}
        self._handle = _Handle(guest, "files.begin_write", **arguments)
        self._window = Window(guest, self._handle.opening)
        self._sizes: deque[int] = deque()

    def open(self) -> Operation[None]:
        yield from self._handle.open()

    def write(self, piece: bytes | memoryview) -> Operation[int]:
        """Send *piece*; how many bytes were written meanwhile."""
        written = 0
        if len(self._window) >= _PIECES:
            written = yield from self._written()
        self._window.begin("files.write_on", piece, handle=self._handle.number)
        self._sizes.append(len(piece))
        return written

    def rest(self) -> Operation[int]:
        """How many more bytes were written; 0 if all are."""
        return (yield from self._written()) if self._window else 0

    def _written(self) -> Operation[int]:
        yield from self._window.oldest()
        return self._sizes.popleft()

    def commit(self) -> Operation[None]:
        while self._window:
            yield from self._written()
        yield from self._handle.call("files.commit")

    def close(self) -> None:
        """If it was not committed, nothing is left of it."""
        self._window.cancel()
        self._handle.close()


def write(guest: Guest, path: Path, content: Content, make_dirs: bool) -> Operation[None]:
    if not isinstance(content, _BYTES):
        yield from _write_file(guest, path, content, make_dirs)
        return
    view = _view(content)
    if len(view) <= SMALL:
        yield from _call(guest, "files.write", view, path=_wire(path), make_dirs=bool(make_dirs), mode=None)
        return
    writing = _Writing(guest, path, bool(make_dirs), None)
    try:
        yield from writing.open()
        for start in range(0, len(view), PIECE):
            yield from writing.write(view[start : start + PIECE])
        yield from writing.commit()
    finally:
        writing.close()


def _view(content: str | bytes | bytearray | memoryview) -> memoryview:
    if isinstance(content, str):
        return memoryview(content.encode("utf-8"))
    view = memoryview(content)
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


def _write_file(guest: Guest, path: Path, content: Readable, make_dirs: bool) -> Operation[None]:
    if not callable(getattr(content, "read", None)):
        kind = type(content).__name__
        raise TypeError(f"content must be a str, bytes or a binary file, not {kind}")
    writing = _Writing(guest, path, bool(make_dirs), None)
    try:
        yield from writing.open()
        while piece := (yield Tell(content.read, (PIECE,))):
            if not isinstance(piece, (bytes, bytearray, memoryview)):
                raise TypeError(f"the file to read from gives {type(piece).__name__}, not bytes")
            view = memoryview(bytes(piece))  # a file may use its buffer again
            for start in range(0, len(view), PIECE):
                yield from writing.write(view[start : start + PIECE])
        yield from writing.commit()
    finally:
        writing.close()


def write_files(guest: Guest, contents: Mapping[str, Content]) -> Operation[None]:
    if not isinstance(contents, Mapping):
        raise TypeError(f"files must be a mapping from path to content, not {type(contents).__name__}")
    with Window(guest) as window:
        for path, content in contents.items():
            view = _view(content) if isinstance(content, _BYTES) else None
            if view is None or len(view) > SMALL:
                yield from write(guest, path, content, True)
                continue
            while len(window) >= _PIECES:
                yield from window.oldest()
            arguments = {"path": _wire(path), "make_dirs": True, "mode": None}
            window.begin("files.write", view, **arguments, **_relative(guest))
        while window:
            yield from window.oldest()


# A file as open() gives one.


class OpenFile:
    """A file that is open in the guest, and stands somewhere."""

    def __init__(self, guest: Guest, path: Path, mode: str) -> None:
        self._handle = _Handle(guest, "files.open", path=_wire(path), mode=mode, **_relative(guest))
        self.can_seek = False

    def open(self) -> Operation[None]:
        self.can_seek = as_bool((yield from self._handle.open()))

    def read(self, size: int) -> Operation[memoryview]:
        """The next bytes, no more than *size* and :data:`PIECE`; none at the end."""
        wanted = min(size, PIECE)
        answer = yield from self._handle.call("files.read_on", size=wanted)
        return memoryview(_only_buffer(answer, wanted))

    def write(self, content: bytes) -> Operation[int]:
        """Write the beginning of *content*; how many bytes were written."""
        piece = memoryview(content)[:PIECE]
        answer = yield from self._handle.call("files.handle_write", piece)
        written = as_int(answer.value)
        if not 0 <= written <= len(piece):
            raise bad_answer("how much was written", written)
        return written

    def seek(self, offset: int, whence: int) -> Operation[int]:
        answer = yield from self._handle.call("files.seek", offset=offset, whence=whence)
        return as_int(answer.value)

    def truncate(self, size: int) -> Operation[None]:
        yield from self._handle.call("files.truncate", size=size)

    def close(self) -> None:
        self._handle.close()


def open_file(guest: Guest, path: Path, mode: str) -> Operation[OpenFile]:
    file = OpenFile(guest, path, mode)
    yield from file.open()
    return file


# Transfers.


class _Progress:
    """Tells the caller how far a transfer is."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress = on_progress
        self._done = 0
        self._total = total

    def add(self, size: int) -> Operation[None]:
        self._done += size
        if self._on_progress is not None and size:
            yield Tell(self._on_progress, (self._done, max(self._done, self._total)))


def _check_callable(on_progress: object) -> None:
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress must be a function, not {type(on_progress).__name__}")


def _locally(function: Callable[[], T]) -> Operation[T]:
    """What *function*, which works on local files, returns."""
    return (yield from in_worker(function, apart=True))


def upload(guest: Guest, local: Path, remote: Path, on_progress: OnProgress | None) -> Operation[None]:
    _check_callable(on_progress)
    path = os.fsdecode(local)
    entries = yield from _locally(lambda: entries_of(path))
    progress = _Progress(on_progress, sum(e.size for e in entries if e.type is FileType.FILE))
    if entries[0].type is FileType.FILE:
        yield from _upload_file(guest, path, os.fsdecode(remote), entries[0], progress)
    else:
        yield from _upload_folder(guest, path, os.fsdecode(remote), entries, progress)


def _upload_file(guest: Guest, local: str, remote: str, entry: Entry, progress: _Progress) -> Operation[None]:
    source = Source(os.path.join(local, *entry.parts), follow=not entry.parts)
    writing = _Writing(guest, posixpath.join(remote, *entry.parts), True, entry.mode)
    try:
        yield from writing.open()
        while piece := (yield from _locally(lambda: source.read(PIECE))):
            yield from progress.add((yield from writing.write(piece)))
        while written := (yield from writing.rest()):
            yield from progress.add(written)
        yield from writing.commit()
    finally:
        writing.close()
        source.close()


def _upload_folder(
    guest: Guest, local: str, remote: str, entries: Iterable[Entry], progress: _Progress
) -> Operation[None]:
    with Window(guest) as window:
        sizes: deque[int] = deque()
        for entry in entries:
            if entry.type is FileType.FILE and entry.size > PIECE:
                yield from _upload_file(guest, local, remote, entry, progress)
                continue
            while len(window) >= _FILES or sum(sizes) >= _PIECES * PIECE:
                yield from window.oldest()
                yield from progress.add(sizes.popleft())
            name, buffers, arguments = yield from _small(local, entry)
            path = _wire(posixpath.join(remote, *entry.parts))
            window.begin(name, *buffers, path=path, **arguments, **_relative(guest))
            sizes.append(sum(len(buffer) for buffer in buffers))
        while window:
            yield from window.oldest()
            yield from progress.add(sizes.popleft())


def _small(local: str, entry: Entry) -> Operation[tuple[str, list[bytes], dict[str, object]]]:
    """The call that makes *entry* in the sandbox."""
    if entry.type is FileType.DIRECTORY:
        return "files.make_dir", [], {"parents": True, "mode": entry.mode}
    if entry.type is FileType.SYMLINK:
        return "files.link", [], {"target": wire_path(entry.target)}
    source = Source(os.path.join(local, *entry.parts), follow=False)
    try:
        content = yield from _locally(lambda: source.read(entry.size))
    finally:
        source.close()
    return "files.write", [content], {"make_dirs": False, "mode": entry.mode}


def download(guest: Guest, remote: Path, local: Path, on_progress: OnProgress | None) -> Operation[None]:
    _check_callable(on_progress)
    reading = Reading(guest, None, path=_wire(remote), only_regular=True, **_relative(guest))
    try:
        yield from reading.open()
    except IsADirectoryError:
        reading.close()
        yield from _download_folder(guest, remote, os.fsdecode(local), on_progress)
        return
    landing = FileLanding(os.fsdecode(local), reading.mode)
    progress = _Progress(on_progress, reading.size or 0)
    try:
        yield from _locally(landing.begin)
        yield from _received(reading, landing, progress)
        yield from _locally(landing.commit)
    except BaseException as error:
        yield from _given_up(landing, error)
        raise
    finally:
        reading.close()


def _given_up(landing: FileLanding | FolderLanding, error: BaseException) -> Operation[None]:
    if isinstance(error, GeneratorExit):  # nobody drives this any more
        landing.abort()
    else:
        yield from _locally(landing.abort)


def _received(reading: Reading, landing: FileLanding | FolderLanding, progress: _Progress) -> Operation[None]:
    while piece := (yield from reading.next()):
        yield from _locally(partial(landing.write, piece))
        yield from progress.add(len(piece))


def _download_folder(
    guest: Guest, remote: Path, local: str, on_progress: OnProgress | None
) -> Operation[None]:
    folder = _Handle(guest, "files.list", path=_wire(remote), depth=None, **_relative(guest))
    landing = FolderLanding(local)
    entries: list[Entry] = []
    try:
        said = yield from _entries(folder, lambda _, value: entries.append(_tree_entry(value)))
        mode = as_int(said.get("mode"))
        check_entries(entries, os.fsdecode(remote))
        yield from _locally(lambda: landing.begin(mode))
        yield from _build(guest, folder, landing, entries, on_progress)
        yield from _locally(landing.commit)
    except BaseException as error:
        yield from _given_up(landing, error)
        raise
    finally:
        folder.close()


def _tree_entry(value: object) -> Entry:
    """An entry of a folder that is downloaded; whether it can be made here is not checked."""
    info = _info("", value)
    if info.size < 0:
        raise bad_answer("a size", info.size)
    return Entry(tuple(info.path.split("/")), info.type, info.size, info.mode, info.symlink_target)


def _build(
    guest: Guest,
    folder: _Handle,
    landing: FolderLanding,
    entries: Iterable[Entry],
    on_progress: OnProgress | None,
) -> Operation[None]:
    """Build what *entries* tell, of files that are read from *folder*."""
    of = {kind: [entry for entry in entries if entry.type is kind] for kind in FileType}
    progress = _Progress(on_progress, sum(entry.size for entry in of[FileType.FILE]))
    folders = sorted(of[FileType.DIRECTORY], key=lambda entry: len(entry.parts))
    yield from _locally(lambda: landing.make_folders(folders))
    small = [entry for entry in of[FileType.FILE] if entry.size <= PIECE]
    yield from _build_small(guest, folder, landing, small, progress)
    for entry in of[FileType.FILE]:
        if entry.size > PIECE:
            yield from _build_big(guest, folder, landing, entry, progress)
    yield from _locally(lambda: landing.make_links(of[FileType.SYMLINK]))


def _build_small(
    guest: Guest, folder: _Handle, landing: FolderLanding, entries: list[Entry], progress: _Progress
) -> Operation[None]:
    with Window(guest, folder.opening) as window:
        waiting: deque[Entry] = deque()
        for entry in [*entries, None]:
            while waiting and (entry is None or _is_full(waiting, entry)):
                content = _only_buffer((yield from window.oldest()), waiting[0].size)
                done = waiting.popleft()
                yield from _locally(partial(landing.put, done, content))
                yield from progress.add(len(content))
            if entry is not None:
                path = _wire_parts(entry)
                window.begin("files.tree_read", tree=folder.number, path=path, size=entry.size)
                waiting.append(entry)


def _wire_parts(entry: Entry) -> list[object]:
    return [wire_path(part) for part in entry.parts]


def _is_full(waiting: deque[Entry], entry: Entry) -> bool:
    return len(waiting) >= _FILES or sum(each.size for each in waiting) + entry.size > _PIECES * PIECE


def _build_big(
    guest: Guest, folder: _Handle, landing: FolderLanding, entry: Entry, progress: _Progress
) -> Operation[None]:
    reading = Reading(guest, entry.size, folder, tree=folder.number, path=_wire_parts(entry))
    try:
        yield from reading.open()
        yield from _locally(lambda: landing.begin_file(entry))
        yield from _received(reading, landing, progress)
    finally:
        reading.close()


# Watching.


class Watcher:
    """What happens in a folder, as it comes."""

    def __init__(self, guest: Guest, path: Path, recursive: bool) -> None:
        self._guest = guest
        self._inbox = Inbox()
        self._channel = Channel(self._inbox.put, _EVENT_CREDIT, most_json=_EVENT_JSON)
        arguments = {"path": _wire(path), "recursive": bool(recursive), **_relative(guest)}
        self._call = GuestCall("watching.watch", arguments, (), Inbox(), self._channel)
        self._events: deque[FileWatchEvent] = deque()
        self._is_over = self._is_closed = False

    def open(self) -> Operation[None]:
        """What happens after this is told."""
        try:
            yield from self._guest.ask(self._call)
        except BaseException:  # nobody waits any more, whatever the reason
            self.close()
            raise

    def next(self) -> Operation[FileWatchEvent | None]:
        """The next event; None when nothing more will come.

        Raises:
            OSError: too much happened at once, so that something was lost.
            SandboxConnectionError: the kernel is gone.
        """
        while self._is_closed or not self._events:
            if self._is_closed or self._is_over:
                return None
            event = yield from next_event(self._inbox)
            if isinstance(event, Told):
                self._take(event)
            elif isinstance(event, ChannelEnded):
                self._end(event)
        return self._events.popleft()

    def _take(self, event: Told) -> None:
        batch = as_list(as_object(event.data).get("events"))
        if len(batch) > EVENT_BATCH:
            raise SandboxConnectionError(f"the sandbox told {len(batch)} events at once")
        self._events.extend(_watch_event(each) for each in batch)
        self._guest.grant(self._channel, EVENT_COST)

    def _end(self, event: ChannelEnded) -> None:
        self._is_over = True
        if event.error is not None:
            raise event.error
        if isinstance(event.data, dict) and "error" in event.data:
            raise error_of(event.data["error"], "watch")

    def close_after(self, holder: object) -> None:
        """Close it when *holder* is no more."""
        weakref.finalize(holder, self._guest.close_channel, self._channel).atexit = False

    def close(self) -> None:
        """Whoever waits for an event gets none any more."""
        self._is_closed = True
        self._guest.close_channel(self._channel)
        ended = ChannelEnded(self._channel, None, None)
        the_loop().call_soon(lambda: self._inbox.put(ended))


def _watch_event(value: object) -> FileWatchEvent:
    fields = as_list(value)
    if len(fields) != 4 or fields[0] not in list(FileWatchEventType):
        raise bad_answer("an event", value)
    new_path = None if fields[3] is None else as_path(fields[3])
    return FileWatchEvent(FileWatchEventType(fields[0]), as_path(fields[1]), as_float(fields[2]), new_path)


def watch(guest: Guest, path: Path, recursive: bool) -> Operation[Watcher]:
    watcher = Watcher(guest, path, recursive)
    yield from watcher.open()
    return watcher
