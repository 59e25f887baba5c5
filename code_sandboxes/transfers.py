"""The local side of a transfer: what is uploaded is looked at and read, what is downloaded is built.

A sandbox may say anything of the folder that it sends: every name and link is checked before it is believed,
and the folder is built apart, where nobody else has made anything, by way of no link. It comes to where it
is to be when it is whole; until then nothing is changed there.

Everything here may block. What is begun in one thread may be given up in another.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Concatenate, ParamSpec, TypeVar

from code_sandboxes.file_info import FileType
from code_sandboxes.guest.files import write_all

__all__ = ["Entry", "FileLanding", "FolderLanding", "Source", "check_entries", "entries_of", "type_of"]

P = ParamSpec("P")
T = TypeVar("T")
LandingT = TypeVar("LandingT", bound="_Landing")

Parts = tuple[str, ...]

_TEMPORARY = ".code_sandboxes-"
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in a folder that is transferred.

    Args:
        parts: the names that lead to it; none for what is transferred itself.
        type: what it is.
        size: bytes.
        mode: permissions.
        target: of a link.
    """

    parts: Parts
    type: FileType
    size: int = 0
    mode: int = 0o666
    target: str | None = None


def type_of(mode: int) -> FileType:
    """What ``st_mode`` says."""
    kinds = {
        stat.S_IFREG: FileType.FILE,
        stat.S_IFDIR: FileType.DIRECTORY,
        stat.S_IFLNK: FileType.SYMLINK,
    }
    return kinds.get(stat.S_IFMT(mode), FileType.OTHER)


# What is uploaded.


def entries_of(local: str) -> list[Entry]:
    """A local file, or a folder and all that is in it, each folder before its content; no link is followed.

    Raises:
        OSError: there is nothing, it cannot be read, or something is no file, folder or link.
    """
    top = os.stat(local)
    found = [_entry((), top, local)]
    if not stat.S_ISDIR(top.st_mode):
        return found
    folders: list[Parts] = [()]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(local, *folder)) as entries:
            for each in sorted(entries, key=lambda entry: entry.name):
                entry = _entry((*folder, each.name), each.stat(follow_symlinks=False), each.path)
                found.append(entry)
                if entry.type is FileType.DIRECTORY:
                    folders.append(entry.parts)
    return found


def _entry(parts: Parts, found: os.stat_result, path: str) -> Entry:
    kind = type_of(found.st_mode)
    if kind is FileType.OTHER:
        raise OSError(errno.EINVAL, "neither a file, a folder nor a link", path)
    target = os.readlink(path) if kind is FileType.SYMLINK else None
    return Entry(parts, kind, found.st_size, stat.S_IMODE(found.st_mode), target)


class Source:
    """A local file that is uploaded; a link in its place is followed only where the user has named it."""

    def __init__(self, path: str, *, follow: bool) -> None:
        self._path = path
        self._flags = _READ | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
        self._fd: int | None = None
        self._is_over = False
        self._lock = Lock()

    def read(self, size: int) -> bytes:
        """The next bytes, *size* of them but at the end."""
        with self._lock:
            if self._is_over:
                return b""
            if self._fd is None:
                self._open()
            assert self._fd is not None
            return os.read(self._fd, size)

    def _open(self) -> None:
        fd = os.open(self._path, self._flags)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            self._fd = fd
            return
        os.close(fd)
        raise OSError(errno.EINVAL, "no longer a file", self._path)

    def close(self) -> None:
        with self._lock:
            self._is_over = True
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


# What is downloaded.


def check_entries(entries: Iterable[Entry], path: str) -> None:
    """Can what a sandbox says is in the folder *path* be made here, and lead nowhere else?

    A link may climb out of the folders that it is in, and then go down; so it stays inside whatever the
    other links are: none of them is left by ``..``.

    Raises:
        OSError: it cannot; of the entry that it names.
    """
    for entry in entries:
        name = "/".join((path, *entry.parts))
        if not entry.parts or not all(_is_name(part) for part in entry.parts):
            raise OSError(errno.EINVAL, "the sandbox named a file as none can be named", name)
        if entry.type is FileType.OTHER:
            raise OSError(errno.EINVAL, "neither a file, a folder nor a link", name)
        if entry.type is FileType.SYMLINK and not _stays_inside(entry):
            raise OSError(errno.EINVAL, f"a link that may lead out of the folder: {entry.target!r}", name)


def _is_name(part: str) -> bool:
    if part in ("", ".", "..") or "/" in part or "\0" in part:
        return False
    return os.name != "nt" or not set(part) & set('\\:*?"<>|')


def _stays_inside(entry: Entry) -> bool:
    target = entry.target
    if (
        not target
        or target.startswith("/")
        or "\0" in target
        or (os.name == "nt" and set(target) & set("\\:"))
    ):
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    climbs = 0
    while climbs < len(parts) and parts[climbs] == "..":
        climbs += 1
    return climbs < len(entry.parts) and ".." not in parts[climbs:]


def _step(
    method: Callable[Concatenate[LandingT, P], T],
) -> Callable[Concatenate[LandingT, P], T]:
    """One step at a time, and none when it was given up."""

    def step(self: LandingT, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            if self._is_over:
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
            return method(self, *args, **kwargs)

    step.__doc__ = method.__doc__
    return step


class _Landing:
    """Something that is built apart, and put in its place when it is whole."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._is_over = False

    def abort(self) -> None:
        """Leave nothing of it; nothing if it is in its place."""
        with self._lock:
            if not self._is_over:
                self._is_over = True
                self._remove()

    def _remove(self) -> None:
        raise NotImplementedError


class FileLanding(_Landing):
    """A local file that is downloaded.

    Args:
        path: where it is to be; where that is a link, where it leads.
        mode: permissions, of which the process may take some away.
    """

    def __init__(self, path: str, mode: int) -> None:
        super().__init__()
        self._path = path
        self._mode = mode & 0o777
        self._fd: int | None = None
        self._target = self._temporary = ""

    @_step
    def begin(self) -> None:
        self._target = os.path.realpath(self._path)
        if os.path.isdir(self._target):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), self._path)
        if os.path.exists(self._target) and not os.path.isfile(self._target):
            raise OSError(errno.EINVAL, "not a file", self._path)
        temporary = os.path.join(os.path.dirname(self._target), _temporary_name())
        with _naming(self._path):
            self._fd = os.open(temporary, _NEW, self._mode)
        self._temporary = temporary

    @_step
    def write(self, content: bytes | memoryview) -> None:
        assert self._fd is not None
        with _naming(self._path):
            write_all(self._fd, memoryview(content))

    @_step
    def commit(self) -> None:
        assert self._fd is not None
        fd, self._fd = self._fd, None
        with _naming(self._path):
            os.close(fd)
            os.replace(self._temporary, self._target)
        self._is_over = True

    def _remove(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._temporary:
            with suppress(FileNotFoundError):  # somebody else removed it
                os.unlink(self._temporary)


class FolderLanding(_Landing):
    """A local folder that is downloaded; into one that is there, if there is one.

    Args:
        path: where it is to be; where that is a link, where it leads.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._target = self._temporary = ""
        self._root = -1
        self._fd: int | None = None

    @_step
    def begin(self, mode: int = 0o777) -> None:
        """With these permissions, less what the process takes away; a folder that is there keeps its own."""
        self._target = os.path.realpath(self._path)
        is_there = os.path.lexists(self._target)
        if is_there and not os.path.isdir(self._target):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self._path)
        beside = self._target if is_there else os.path.dirname(self._target)
        temporary = os.path.join(beside, _temporary_name())
        with _naming(self._path):
            os.mkdir(temporary, 0o700)
            self._temporary = temporary
            os.mkdir(self._content, mode & 0o777 | 0o700)
            self._root = os.open(self._content, _FOLDER)

    @_step
    def make_folders(self, entries: Iterable[Entry]) -> None:
        """Make these, of which each comes after those that it is in."""
        for entry in entries:
            with self._folder_of(entry) as fd:
                os.mkdir(entry.parts[-1], entry.mode & 0o777 | 0o700, dir_fd=fd)

    @_step
    def begin_file(self, entry: Entry) -> None:
        """What is written from now on is its content."""
        self._end_file()
        with self._folder_of(entry) as fd:
            self._fd = os.open(entry.parts[-1], _NEW, entry.mode & 0o777, dir_fd=fd)

    @_step
    def write(self, content: bytes | memoryview) -> None:
        assert self._fd is not None
        with _naming(self._path):
            write_all(self._fd, memoryview(content))

    @_step
    def put(self, entry: Entry, content: bytes | memoryview) -> None:
        """A file of which this is the content."""
        self.begin_file(entry)
        self.write(content)
        self._end_file()

    @_step
    def make_links(self, entries: Iterable[Entry]) -> None:
        """When everything else is there."""
        self._end_file()
        for entry in entries:
            with self._folder_of(entry) as fd:
                os.symlink(entry.target or "", entry.parts[-1], dir_fd=fd)

    @_step
    def commit(self) -> None:
        """Put it in its place; into a folder that is there only if nothing is in the way."""
        self._end_file()
        if os.path.dirname(self._temporary) != self._target:
            with _naming(self._path):
                os.rename(self._content, self._target)
        else:
            target = os.open(self._target, _FOLDER)
            try:
                _check_merge(self._root, target, self._target)
                _merge(self._root, target, self._target)
            finally:
                os.close(target)
            os.rmdir(self._content)
        os.rmdir(self._temporary)
        os.close(self._root)
        self._is_over = True

    @property
    def _content(self) -> str:
        return os.path.join(self._temporary, "content")

    @contextmanager
    def _folder_of(self, entry: Entry) -> Iterator[int]:
        """A descriptor of the folder that *entry* is in, found by way of no link."""
        with _naming(os.path.join(self._path, *entry.parts)):
            fd = os.dup(self._root)
            try:
                for part in entry.parts[:-1]:
                    below = os.open(part, _FOLDER, dir_fd=fd)
                    os.close(fd)
                    fd = below
                yield fd
            finally:
                os.close(fd)

    def _end_file(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _remove(self) -> None:
        self._end_file()
        if self._root >= 0:
            os.close(self._root)
        if self._temporary:
            with suppress(FileNotFoundError):  # somebody else removed it
                shutil.rmtree(self._temporary)


def _check_merge(source: int, target: int, path: str) -> None:
    """Is nothing of the folder *target* in the way of what is in *source*?"""
    for name, is_folder in _names_in(source):
        there = os.path.join(path, name)
        try:
            mode = os.stat(name, dir_fd=target, follow_symlinks=False).st_mode
        except FileNotFoundError:
            continue
        if is_folder and not stat.S_ISDIR(mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), there)
        if not is_folder and stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), there)
        if is_folder:
            with _opened(name, source) as here, _opened(name, target) as below:
                _check_merge(here, below, there)


def _merge(source: int, target: int, path: str) -> None:
    """Move all that is in the folder *source* into *target*; both are descriptors."""
    for name, is_folder in _names_in(source):
        there = os.path.join(path, name)
        with _naming(there):
            if is_folder and _has(target, name):
                with _opened(name, source) as here, _opened(name, target) as below:
                    _merge(here, below, there)
                os.rmdir(name, dir_fd=source)
            else:
                os.replace(name, name, src_dir_fd=source, dst_dir_fd=target)


def _names_in(folder: int) -> list[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _has(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _opened(name: str, folder: int) -> Iterator[int]:
    fd = os.open(name, _FOLDER, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors of the system name *path*, whatever they were about."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), path) from None


def _temporary_name() -> str:
    return _TEMPORARY + os.urandom(8).hex()
