"""The files of a sandbox, for the blocking front."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from code_sandboxes import file_operations as operations
from code_sandboxes.blocking import drive
from code_sandboxes.errors import SandboxConnectionError
from code_sandboxes.file_info import FileInfo, FileWatchEvent
from code_sandboxes.file_operations import Content, OnProgress, OpenFile, Path, Watcher
from code_sandboxes.results import Context
from code_sandboxes.transports.loop import the_loop

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from code_sandboxes.operations import Core

__all__ = ["FileWatcher", "SandboxFileHandle", "SandboxFilesystem", "open_handle"]

# Bytes that are read ahead, and that are kept until they are written.
_BUFFER = 256 * 1024


class SandboxFilesystem:
    """The files of a sandbox; they are there while code runs, too.

    Relative paths start at the working directory of *context*, by default of the first one. Errors are those
    of Python (``FileNotFoundError``, ``PermissionError``, ...), with ``errno`` and the path in the sandbox.
    Names whose bytes are no UTF-8 are what :func:`os.fsdecode` makes of them.
    """

    def __init__(self, core: Core) -> None:
        self._core = core

    # Reading and writing.

    def read(self, path: Path, *, context: Context | str | None = None) -> str:
        """The text of a file.

        Raises:
            UnicodeDecodeError: it is not UTF-8; see :meth:`read_bytes`.
        """
        return drive(operations.read(self._core.guest(context), path))

    def read_bytes(
        self,
        path: Path,
        offset: int = 0,
        length: int | None = None,
        *,
        context: Context | str | None = None,
    ) -> bytes:
        """The content of a file.

        The code in the sandbox decides how much that is: where it may be anything, give *length*, or use
        :meth:`read_stream`.

        Args:
            offset: bytes to leave out.
            length: at most so many bytes; None for all.
        """
        return drive(operations.read_bytes(self._core.guest(context), path, offset, length))

    def read_stream(self, path: Path, *, context: Context | str | None = None) -> Iterator[bytes]:
        """Iterate over the content of a file in pieces of up to 4 MiB, of which a few are under way.

        The file is opened with the first step, and closed when the iterator is.
        """
        reading = operations.stream(self._core.guest(context), path)
        try:
            drive(reading.open())
            while piece := drive(reading.next()):
                yield bytes(piece)
        finally:
            reading.close()

    def write(
        self, path: Path, content: Content, make_dirs: bool = True, *, context: Context | str | None = None
    ) -> None:
        """Write a file, all or nothing: it has its old content until it has all of the new.

        A file that is replaced keeps its permissions; its other names (hard links) keep the old content. What
        a link leads to is written, and the link stays.

        Args:
            content: a str (UTF-8), bytes, or a binary file, which is read to its end.
            make_dirs: make the folders that it is to be in.
        """
        drive(operations.write(self._core.guest(context), path, content, make_dirs))

    def write_bytes(
        self, path: Path, content: Content, make_dirs: bool = True, *, context: Context | str | None = None
    ) -> None:
        """The same as :meth:`write`."""
        drive(operations.write(self._core.guest(context), path, content, make_dirs))

    def write_files(self, files: Mapping[str, Content], *, context: Context | str | None = None) -> None:
        """Write many files, each all or nothing; with the first that fails it ends."""
        drive(operations.write_files(self._core.guest(context), files))

    def open(
        self,
        path: Path,
        mode: str = "r",
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        context: Context | str | None = None,
    ) -> SandboxFileHandle:
        """Open a file, as :func:`open` does; text is UTF-8 by default."""
        guest = self._core.guest(context)
        return open_handle(OpenFile(guest, path, plain_mode(mode)), path, mode, encoding, errors, newline)

    # Looking.

    def list(
        self, path: Path = "/", depth: int = 1, *, context: Context | str | None = None
    ) -> list[FileInfo]:
        """What is in a folder, by path; where a link leads does not matter.

        Args:
            depth: 1 for what is in the folder itself, 2 for what is in the folders in it, too, ...
        """
        return drive(operations.list_folder(self._core.guest(context), path, depth))

    def exists(self, path: Path, *, context: Context | str | None = None) -> bool:
        """Is there something, or where the link leads that is there?"""
        return drive(operations.exists(self._core.guest(context), path))

    def is_file(self, path: Path, *, context: Context | str | None = None) -> bool:
        """Is it a regular file, or a link to one?"""
        return drive(operations.is_file(self._core.guest(context), path))

    def is_dir(self, path: Path, *, context: Context | str | None = None) -> bool:
        """Is it a folder, or a link to one?"""
        return drive(operations.is_dir(self._core.guest(context), path))

    def get_info(self, path: Path, *, context: Context | str | None = None) -> FileInfo:
        """What it is, how big, whose; of a link, the link itself."""
        return drive(operations.get_info(self._core.guest(context), path))

    def watch(
        self, path: Path, recursive: bool = False, *, context: Context | str | None = None
    ) -> FileWatcher:
        """Iterate over what happens in a folder, or to a file, from now on.

        Args:
            recursive: in the folders in it, too, and those that are made.
        """
        return FileWatcher(drive(operations.watch(self._core.guest(context), path, recursive)))

    # Changing what there is.

    def mkdir(self, path: Path, parents: bool = True, *, context: Context | str | None = None) -> None:
        """Make a folder.

        Args:
            parents: make those that it is in, too; and it may be there already.
        """
        drive(operations.mkdir(self._core.guest(context), path, parents))

    def rm(self, path: Path, recursive: bool = False, *, context: Context | str | None = None) -> None:
        """Remove a file or link; a folder, with all that is in it, only if *recursive*."""
        drive(operations.rm(self._core.guest(context), path, recursive))

    def copy(self, source: Path, target: Path, *, context: Context | str | None = None) -> None:
        """Copy a file or folder, with its permissions and times, as :mod:`shutil` does; links stay links.

        A file that is copied to a folder comes into it; a folder must not be there yet.
        """
        drive(operations.copy(self._core.guest(context), source, target))

    def move(self, source: Path, target: Path, *, context: Context | str | None = None) -> None:
        """Move a file or folder, as :func:`shutil.move` does; to a folder that is there, into it."""
        drive(operations.move(self._core.guest(context), source, target))

    # Between here and there.

    def upload(
        self,
        local: Path,
        remote: Path,
        on_progress: OnProgress | None = None,
        *,
        context: Context | str | None = None,
    ) -> None:
        """Copy a local file or folder into the sandbox, with its permissions; links in a folder stay links.

        A file is there when it is whole. A folder comes into the one that is there, if there is one.

        Args:
            on_progress: called with the bytes that have arrived, and how many there are; if it raises, the
                transfer ends.

        Raises:
            OSError: something in the folder is no file, folder or link; then nothing was sent.
        """
        drive(operations.upload(self._core.guest(context), local, remote, on_progress))

    def download(
        self,
        remote: Path,
        local: Path,
        on_progress: OnProgress | None = None,
        *,
        context: Context | str | None = None,
    ) -> None:
        """Copy a file or folder from the sandbox; until it is whole, nothing is changed here.

        A folder comes into the one that is there, if there is one; links there are not followed, but
        replaced. Links in the folder stay links.

        Args:
            on_progress: called with the bytes that have arrived, and how many there are; if it raises, the
                transfer ends.

        Raises:
            OSError: something in the folder is no file, folder or link, or a link is absolute, leads out of
                the folder, or has a ``..`` after a name; then nothing is changed.
        """
        drive(operations.download(self._core.guest(context), remote, local, on_progress))


def plain_mode(mode: str) -> str:
    """What the guest is to know of *mode*.

    Raises:
        ValueError: :func:`open` knows no such mode.
    """
    if not isinstance(mode, str):
        raise TypeError(f"mode must be a str, not {type(mode).__name__}")
    kinds = [letter for letter in mode if letter in "rwax"]
    if len(kinds) != 1 or set(mode) - set("rwaxbt+") or len(set(mode)) < len(mode) or {"b", "t"} <= set(mode):
        raise ValueError(f"invalid mode: {mode!r}")
    return kinds[0] + ("+" if "+" in mode else "")


class _Raw(io.RawIOBase):
    """A file in a sandbox, without a buffer."""

    def __init__(self, file: OpenFile, path: str, mode: str) -> None:
        self._file = file
        self._mode = mode
        self._pid = os.getpid()
        self.name = path

    def readable(self) -> bool:
        return "r" in self._mode or "+" in self._mode

    def writable(self) -> bool:
        return "r" not in self._mode or "+" in self._mode

    def seekable(self) -> bool:
        return self._file.can_seek

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._check(self.readable(), "read")
        view = memoryview(buffer).cast("B")
        piece = drive(self._file.read(len(view)))
        view[: len(piece)] = piece
        return len(piece)

    def readall(self) -> bytes:
        self._check(self.readable(), "read")
        content = io.BytesIO()
        while piece := drive(self._file.read(operations.PIECE)):
            content.write(piece)
        return content.getvalue()

    def write(self, content: ReadableBuffer) -> int:
        self._check(self.writable(), "written")
        return drive(self._file.write(bytes(content)))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check(True, "used")
        return drive(self._file.seek(offset, whence))

    def truncate(self, size: int | None = None) -> int:
        self._check(self.writable(), "written")
        size = self.tell() if size is None else size
        drive(self._file.truncate(size))
        return size

    def close(self) -> None:
        if not self.closed and os.getpid() == self._pid:  # in a forked child it is not ours
            self._file.close()
        super().close()

    def _check(self, allowed: bool, what: str) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if os.getpid() != self._pid:
            raise SandboxConnectionError(
                f"{self.name} was opened by process {self._pid}, and this is its fork {os.getpid()};"
                " reach the sandbox with Sandbox.from_id()"
            )
        if not allowed:
            raise io.UnsupportedOperation(f"the file cannot be {what}: it was opened with {self._mode!r}")
        if the_loop().is_here():
            # A handle that nobody closed was found there by the garbage collection: what it has not written
            # yet is lost, since this thread cannot wait for itself.
            raise OSError(errno.EDEADLK, "the file was not closed", self.name)


def open_handle(
    file: OpenFile,
    path: Path,
    mode: str,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
) -> SandboxFileHandle:
    """Open *file* as :func:`open` would; what is checked there is checked before."""
    if "b" in mode and (encoding, errors, newline) != (None, None, None):
        raise ValueError("binary mode takes no encoding, errors or newline")
    drive(file.open())
    try:
        raw = _Raw(file, os.fsdecode(path), plain_mode(mode))
        return SandboxFileHandle(_buffered(raw, mode, encoding, errors, newline), raw.name, mode)
    except BaseException:
        file.close()
        raise


def _buffered(
    raw: _Raw, mode: str, encoding: str | None, errors: str | None, newline: str | None
) -> io.BufferedIOBase | io.TextIOWrapper:
    buffered: io.BufferedRandom | io.BufferedWriter | io.BufferedReader
    if "+" in mode:
        buffered = io.BufferedRandom(raw, _BUFFER)
    elif raw.writable():
        buffered = io.BufferedWriter(raw, _BUFFER)
    else:
        buffered = io.BufferedReader(raw, _BUFFER)
    if "b" in mode:
        return buffered
    return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)


class SandboxFileHandle:
    """A file in a sandbox, open as :func:`open` opens one here; text is a str, binary bytes.

    What is written arrives at the latest with :meth:`flush` or :meth:`close`.
    """

    def __init__(self, file: io.BufferedIOBase | io.TextIOWrapper, name: str, mode: str) -> None:
        self._file: Any = file  # of text or of bytes, as the caller has asked
        self._name = name
        self._mode = mode

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.mode!r}{' closed' if self.closed else ''}>"

    @property
    def name(self) -> str:
        """The path, as it was given."""
        return self._name

    @property
    def mode(self) -> str:
        return self._mode

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def read(self, size: int = -1) -> str | bytes:
        """The next *size* characters or bytes; by default all there are."""
        content: str | bytes = self._file.read(size)
        return content

    def readline(self, size: int = -1) -> str | bytes:
        """The next line with what ends it; nothing at the end."""
        line: str | bytes = self._file.readline(size)
        return line

    def readlines(self, hint: int = -1) -> list[str | bytes]:
        """All lines, or enough of them to have *hint* characters or bytes."""
        return list(self._file.readlines(hint))

    def write(self, content: str | bytes | bytearray | memoryview) -> int:
        """Write, and tell how many characters or bytes."""
        return int(self._file.write(content))

    def writelines(self, lines: Iterable[str | bytes]) -> None:
        """Write each, and nothing between them."""
        self._file.writelines(lines)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go on at *offset*, from the beginning, the current position or the end."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The current position."""
        return int(self._file.tell())

    def truncate(self, size: int | None = None) -> int:
        """Let the file have *size* bytes, by default as many as are before the current position."""
        return int(self._file.truncate(size))

    def flush(self) -> None:
        """Let what was written arrive."""
        self._file.flush()

    def close(self) -> None:
        """Let what was written arrive, and close the file."""
        self._file.close()

    def __enter__(self) -> SandboxFileHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str | bytes]:
        return self

    def __next__(self) -> str | bytes:
        line: str | bytes = next(self._file)
        return line


class FileWatcher:
    """Iterates over what happens in a folder; :meth:`close`, or leaving ``with``, ends that.

    It ends by itself when the folder is gone, or nobody holds it any more. It raises ``OSError`` when so much
    happened at once that something was lost, and :class:`SandboxConnectionError` when the kernel ended.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        watcher.close_after(self)

    def close(self) -> None:
        """End it; whoever waits for an event, in another thread, gets none."""
        self._watcher.close()

    def __enter__(self) -> FileWatcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[FileWatchEvent]:
        return self

    def __next__(self) -> FileWatchEvent:
        event = drive(self._watcher.next())
        if event is None:
            raise StopIteration
        return event
