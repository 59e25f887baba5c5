"""Read, write and look at files.

What a program has open (a file it reads, one it writes, a folder it lists) is named by the channel that was
opened with it, and is closed with that: when the program says so, or is gone. Nothing here waits for what
another process does: of what is no regular file, only character devices can be read and written.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from stat import S_IMODE, S_ISCHR, S_ISDIR, S_ISLNK, S_ISREG
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

try:
    from grp import getgrgid
    from pwd import getpwuid
except ImportError:  # Windows, where files have no such owners
    getgrgid = getpwuid = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from code_sandboxes.guest.calls import Call, Channel

SMALL = 4 * 1024**2
"""Bytes; up to that, content comes with one answer."""

# Entries in one answer.
BATCH = 1000

# Of the file that is written before it takes the place of another; watchers do not tell of it.
TEMPORARY = ".code_sandboxes-"

_ODD_FLAGS = ("O_CLOEXEC", "O_BINARY", "O_NOCTTY", "O_NONBLOCK")
_PLAIN = sum(getattr(os, name, 0) for name in _ODD_FLAGS)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
_HAS_DIR_FD = os.open in os.supports_dir_fd

_MOST_LINKS = 40

OpenT = TypeVar("OpenT", bound="_Open")


class _Open:
    """Something that a program has open."""

    def __init__(self, fd: int | None) -> None:
        self.fd = fd
        self.lock = Lock()

    def close(self) -> None:
        with self.lock:
            fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    @contextmanager
    def held(self) -> Iterator[int]:
        """Its descriptor, which stays open meanwhile."""
        with self.lock:
            if self.fd is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            yield self.fd


class _File(_Open):
    """A file, read or written where its descriptor stands.

    Args:
        path: as the program gave it.
        left: bytes that are yet to be read, if not all there are.
    """

    def __init__(self, fd: int, path: str, left: int | None = None) -> None:
        super().__init__(fd)
        self.path = path
        self.left = left

    def read(self, size: int) -> bytes:
        with self.held() as fd, _named(self.path):
            content = os.read(fd, size if self.left is None else min(size, self.left))
        if self.left is not None:
            self.left -= len(content)
        return content


class _Writing(_Open):
    """New content for a file, which takes its place when it is whole.

    Args:
        path: as the program gave it.
        make_dirs: make the folders that it is to be in.
        mode: permissions; by default those of the file that is there, or those that new files get.
    """

    def __init__(self, path: str, make_dirs: bool, mode: int | None) -> None:
        super().__init__(None)
        self._path = path
        self._temporary = ""
        with _named(path):
            self._target = _target_of(path)
        if make_dirs:
            _make_parents(self._target)
        with _named(path):
            self._begin(mode)

    def _begin(self, mode: int | None) -> None:
        replaced = _stat_if_there(self._target)
        if replaced is not None and S_ISCHR(replaced.st_mode):
            self.fd = os.open(self._target, os.O_WRONLY | _PLAIN)
            return
        if replaced is not None:
            _check_replaceable(self._target, replaced)
        folder = os.path.dirname(self._target)
        kind = "new" if replaced is None else "changed"
        self._temporary = os.path.join(folder, TEMPORARY + os.urandom(8).hex() + "." + kind)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NOFOLLOW | _PLAIN
        self.fd = os.open(self._temporary, flags, 0o666 if mode is None else mode & 0o777)
        if replaced is not None:
            try:
                self._take_after(replaced, with_mode=mode is None)
            except BaseException:
                self.close()
                raise

    def _take_after(self, replaced: os.stat_result, *, with_mode: bool) -> None:
        assert self.fd is not None
        if hasattr(os, "fchown"):
            with suppress(PermissionError):  # then it is ours, as all that we make
                os.fchown(self.fd, replaced.st_uid, replaced.st_gid)
        if with_mode and hasattr(os, "fchmod"):
            os.fchmod(self.fd, replaced.st_mode & 0o777)

    def write(self, content: memoryview) -> None:
        with self.held() as fd, _named(self._path):
            write_all(fd, content)

    def copy_from(self, source: str) -> None:
        """Write what *source* has, and let the file say of itself what that does."""
        fd, _ = _open_at(source, 0, only_regular=True)
        try:
            while True:
                piece = os.read(fd, 1024**2)
                if not piece:
                    break
                self.write(memoryview(piece))
        finally:
            os.close(fd)
        if self._temporary:  # a device keeps what it says of itself
            with _named(self._path):
                shutil.copystat(source, self._temporary)

    def commit(self) -> None:
        with self.held() as fd, _named(self._path):
            self.fd = None
            try:
                os.close(fd)  # which may say that there was no room after all
                if self._temporary:
                    os.replace(self._temporary, self._target)
            except BaseException:
                self._remove()
                raise
            self._temporary = ""

    def close(self) -> None:
        super().close()
        self._remove()

    def _remove(self) -> None:
        temporary, self._temporary = self._temporary, ""
        if temporary:
            with suppress(FileNotFoundError):  # the user's code may have removed it
                os.unlink(temporary)


class _Tree(_Open):
    """A folder that is listed, and whose files are read; no link that is made in it leads elsewhere."""

    def __init__(self, path: str, depth: int | None) -> None:
        super().__init__(os.open(path, os.O_RDONLY | _DIRECTORY | _PLAIN) if _HAS_DIR_FD else None)
        self.path = path
        self.mode = S_IMODE(os.stat(path if self.fd is None else self.fd).st_mode)
        self._entries = _walk(path, depth)

    def close(self) -> None:
        super().close()
        with self.lock:
            self._entries.close()

    def next_batch(self) -> list[tuple[str, os.stat_result]]:
        with self.lock:
            return list(islice(self._entries, BATCH))

    def open(self, parts: list[str]) -> int:
        """A descriptor to read the file at *parts*, names below the folder."""
        path = os.path.join(self.path, *parts)
        with _named(path):
            if not _HAS_DIR_FD:
                return _checked(os.open(path, os.O_RDONLY | _PLAIN), path)
            with self.held() as fd:
                return _checked(_open_below(fd, parts), path, only_regular=True)


class Files:
    """Read, write and look at files."""

    in_threads = ("files.list", "files.more", "files.remove", "files.copy", "files.move")

    def __init__(self) -> None:
        self._open: dict[Channel, _Open] = {}
        self.functions: Mapping[str, Callable[..., object]] = {
            "files.stat": self.stat,
            "files.kind": self.kind,
            "files.list": self.list,
            "files.more": self.more,
            "files.make_dir": self.make_dir,
            "files.remove": self.remove,
            "files.copy": self.copy,
            "files.move": self.move,
            "files.link": self.link,
            "files.read": self.read,
            "files.open_read": self.open_read,
            "files.read_on": self.read_on,
            "files.tree_read": self.tree_read,
            "files.write": self.write,
            "files.begin_write": self.begin_write,
            "files.write_on": self.write_on,
            "files.commit": self.commit,
            "files.open": self.open,
            "files.handle_write": self.handle_write,
            "files.seek": self.seek,
            "files.truncate": self.truncate,
        }

    def close(self) -> None:
        """Close whatever is open."""
        for channel in list(self._open):
            self._close(channel)

    # What is open.

    def _keep(self, call: Call, opened: _Open) -> None:
        """It is open until the channel of *call* is closed."""
        channel = call.channel
        assert channel is not None
        self._open[channel] = opened
        channel.on_change = lambda: self._close(channel) if channel.is_closed else None
        channel.on_change()

    def _close(self, channel: Channel) -> None:
        opened = self._open.pop(channel, None)
        if opened is not None:
            opened.close()

    def _opened(self, call: Call, handle: int, kind: type[OpenT]) -> OpenT:
        channel = call.link.channel(handle)
        opened = None if channel is None else self._open.get(channel)
        if not isinstance(opened, kind):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return opened

    # Looking.

    def stat(self, call: Call, path: Any, base: Any = None) -> object:
        """The entry of *path* itself; if it is a link, that of the link."""
        found = _path(call, path, base)
        return [call.wire(call.absolute(found)), _entry(call, "", os.lstat(found), found)]

    def kind(self, call: Call, path: Any, base: Any = None) -> str | None:
        """What is at *path*, or where the link leads that is there; None if there is nothing."""
        found = _stat_if_there(_path(call, path, base))
        if found is None:
            return None
        return "file" if S_ISREG(found.st_mode) else "directory" if S_ISDIR(found.st_mode) else "other"

    def list(self, call: Call, path: Any, depth: int | None, base: Any = None) -> object:
        """The first entries in a folder and, down to *depth*, in those in it; the channel is the handle."""
        tree = _Tree(_path(call, path, base), depth)
        self._keep(call, tree)
        entries = self._batch(call, tree)
        return {"path": call.wire(call.absolute(tree.path)), "mode": tree.mode, "entries": entries}

    def more(self, call: Call, handle: int) -> object:
        """The next entries; none when there are no more."""
        return self._batch(call, self._opened(call, handle, _Tree))

    def _batch(self, call: Call, tree: _Tree) -> object:
        batch = tree.next_batch()
        return [_entry(call, name, stat, os.path.join(tree.path, name)) for name, stat in batch]

    # Changing what there is.

    def make_dir(self, call: Call, path: Any, parents: bool, mode: int = 0o777, base: Any = None) -> None:
        """Make a folder; with *parents* those that it is in, and it may be there already.

        *mode* are the permissions of one that is made; its owner can always use it.
        """
        found = _path(call, path, base)
        mode = mode & 0o777 | 0o700
        if not parents:
            os.mkdir(found, mode)
            return
        with _named(found):
            os.makedirs(found, mode, exist_ok=True)

    def remove(self, call: Call, path: Any, recursive: bool, base: Any = None) -> None:
        """Remove what is at *path*; a folder only if *recursive*."""
        found = _path(call, path, base)
        if not S_ISDIR(os.lstat(found).st_mode):
            os.unlink(found)
        elif recursive:
            shutil.rmtree(found)
        else:
            raise _error(errno.EISDIR, found)

    def copy(self, call: Call, source: Any, target: Any, base: Any = None) -> None:
        """As ``shutil.copytree()`` and ``copy2()``; links stay links, and a failure leaves no half of it."""
        here, there = _path(call, source, base), _path(call, target, base)
        if S_ISDIR(os.lstat(here).st_mode):
            _check_not_within(here, there)
            _copy_folder(here, there)
        else:
            _copy_entry(here, _within_if_folder(here, there))

    def move(self, call: Call, source: Any, target: Any, base: Any = None) -> None:
        """As ``shutil.move()``."""
        here, there = _path(call, source, base), _path(call, target, base)
        is_folder = S_ISDIR(os.lstat(here).st_mode)
        goal = _within_if_folder(here, there)
        if goal != there and os.path.lexists(goal):
            raise _error(errno.EEXIST, goal)
        if is_folder:
            _check_not_within(here, goal)
        try:
            os.rename(here, goal)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise OSError(error.errno, error.strerror, _culprit(here, goal)) from None
            (_copy_folder if is_folder else _copy_entry)(here, goal)
            (shutil.rmtree if is_folder else os.unlink)(here)

    def link(self, call: Call, path: Any, target: Any, base: Any = None) -> None:
        """Let *path* be a link to *target*; what it was, unless a folder, is gone."""
        found = _path(call, path, base)
        with _named(found):
            _make_link(call.path(target), found)

    # Reading.

    def read(self, call: Call, path: Any, offset: int, length: int | None, base: Any = None) -> bool:
        """Give the content with the answer; False if it is too much for that."""
        found = _path(call, path, base)
        fd, size = _open_at(found, offset)
        try:
            wanted = SMALL + 1 if length is None else min(length, SMALL + 1)
            if min(size - offset, wanted) > SMALL:
                return False
            with _named(found):
                content = _read_up_to(fd, wanted, size - offset)
        finally:
            os.close(fd)
        if len(content) > SMALL:
            return False
        call.attach(content)
        return True

    def open_read(
        self,
        call: Call,
        path: Any = None,
        offset: int = 0,
        length: int | None = None,
        base: Any = None,
        tree: int | None = None,
        only_regular: bool = False,
    ) -> object:
        """Open a file, or one below a folder that is open, for :meth:`read_on`; how many bytes will come.

        They are those that it has now, as far as its system knows a size.
        """
        if tree is None:
            found = _path(call, path, base)
            fd, size = _open_at(found, offset, only_regular=only_regular)
        else:
            folder = self._opened(call, tree, _Tree)
            parts = [call.path(part) for part in path]
            found = os.path.join(folder.path, *parts)
            fd = folder.open(parts)
            size = os.fstat(fd).st_size
        mode = os.fstat(fd).st_mode
        left = max(0, size - offset) if S_ISREG(mode) and size else None
        if length is not None:
            left = length if left is None else min(left, length)
        self._keep(call, _File(fd, found, left))
        return {"size": left, "mode": S_IMODE(mode)}

    def read_on(self, call: Call, handle: int, size: int) -> int:
        """Give the next bytes with the answer, at most *size*, and how many they are: 0 at the end."""
        content = self._opened(call, handle, _File).read(size)
        call.attach(content)
        return len(content)

    def tree_read(self, call: Call, tree: int, path: Any, size: int) -> int:
        """Give the first *size* bytes of a file below a folder that is open."""
        fd = self._opened(call, tree, _Tree).open([call.path(part) for part in path])
        try:
            content = _read_up_to(fd, size, size)
        finally:
            os.close(fd)
        call.attach(content)
        return len(content)

    # Writing.

    def write(self, call: Call, path: Any, make_dirs: bool, mode: int | None, base: Any = None) -> None:
        """Write what came with the call to a file, all or nothing."""
        writing = _Writing(_path(call, path, base), make_dirs, mode)
        try:
            for buffer in call.buffers:
                writing.write(buffer)
            writing.commit()
        finally:
            writing.close()

    def begin_write(self, call: Call, path: Any, make_dirs: bool, mode: int | None, base: Any = None) -> None:
        """Begin a file, which is there with :meth:`commit`, or never was."""
        self._keep(call, _Writing(_path(call, path, base), make_dirs, mode))

    def write_on(self, call: Call, handle: int) -> None:
        for buffer in call.buffers:
            self._opened(call, handle, _Writing).write(buffer)

    def commit(self, call: Call, handle: int) -> None:
        self._opened(call, handle, _Writing).commit()

    # A file as Python's open() gives one.

    def open(self, call: Call, path: Any, mode: str, base: Any = None) -> bool:
        """Open a file in one of the modes of ``open()``: ``r``, ``w``, ``a`` or ``x``, and ``+``.

        Returns whether it can be told where to go on.
        """
        found = _path(call, path, base)
        flags = os.O_RDWR if "+" in mode else os.O_RDONLY if "r" in mode else os.O_WRONLY
        flags |= {"r": 0, "w": os.O_CREAT | os.O_TRUNC, "a": os.O_CREAT | os.O_APPEND, "x": 0}[mode[0]]
        if mode[0] == "x":
            flags |= os.O_CREAT | os.O_EXCL
        with _named(found):
            fd = _checked(os.open(found, flags | _PLAIN, 0o666), found)
        if mode[0] == "a":
            os.lseek(fd, 0, os.SEEK_END)
        self._keep(call, _File(fd, found))
        return _can_seek(fd)

    def handle_write(self, call: Call, handle: int) -> int:
        file = self._opened(call, handle, _File)
        with file.held() as fd, _named(file.path):
            return sum(write_all(fd, buffer) for buffer in call.buffers)

    def seek(self, call: Call, handle: int, offset: int, whence: int) -> int:
        file = self._opened(call, handle, _File)
        with file.held() as fd, _named(file.path):
            return os.lseek(fd, offset, whence)

    def truncate(self, call: Call, handle: int, size: int) -> None:
        file = self._opened(call, handle, _File)
        with file.held() as fd, _named(file.path):
            os.ftruncate(fd, size)


# Paths and errors.


def _path(call: Call, value: Any, base: Any) -> str:
    path = call.path(value, base)
    if not path or not call.path(value):
        raise _error(errno.ENOENT, "")
    return path


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors of the system name *path*, whatever they were about."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), path) from None


def _stat_if_there(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _target_of(path: str) -> str:
    """Where ``open(path)`` would write: where links lead, whether there is something or not."""
    for _ in range(_MOST_LINKS):
        if not os.path.islink(path):
            return path
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    raise _error(errno.ELOOP, path)


def _make_parents(path: str) -> None:
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        try:
            os.makedirs(folder, exist_ok=True)
        except FileExistsError:
            raise _error(errno.ENOTDIR, folder) from None


def _check_replaceable(path: str, found: os.stat_result) -> None:
    """Would ``open(path, "w")`` write to it?"""
    if S_ISDIR(found.st_mode):
        raise _error(errno.EISDIR, path)
    if not S_ISREG(found.st_mode):
        raise _error(errno.EINVAL, path)
    if not os.access(path, os.W_OK):
        raise _error(errno.EACCES, path)


def _culprit(source: str, target: str) -> str:
    """Which of two paths an error is about."""
    return target if os.path.lexists(source) else source


def _within_if_folder(source: str, target: str) -> str:
    """*target*, or what *source* is called in it, if it is a folder."""
    if os.path.isdir(target):
        return os.path.join(target, os.path.basename(source.rstrip("/")))
    return target


def _check_not_within(source: str, target: str) -> None:
    real_source, real_target = os.path.realpath(source), os.path.realpath(target)
    if (real_target + os.sep).startswith(real_source + os.sep):
        raise _error(errno.EINVAL, target)


# Descriptors.


def _checked(fd: int, path: str, *, only_regular: bool = False) -> int:
    """*fd*, if it is of something that can be read without waiting for another process."""
    mode = os.fstat(fd).st_mode
    if S_ISREG(mode) or (S_ISCHR(mode) and not only_regular):
        return fd
    os.close(fd)
    raise _error(errno.EISDIR if S_ISDIR(mode) else errno.EINVAL, path)


def _open_at(path: str, offset: int, *, only_regular: bool = False) -> tuple[int, int]:
    """A descriptor that reads from *offset*, and the size of the file."""
    with _named(path):
        fd = _checked(os.open(path, os.O_RDONLY | _PLAIN), path, only_regular=only_regular)
        try:
            if offset:
                os.lseek(fd, offset, os.SEEK_SET)
            return fd, os.fstat(fd).st_size
        except BaseException:
            os.close(fd)
            raise


def _open_below(root: int, parts: list[str]) -> int:
    """A descriptor to read the file at *parts* below *root*, by way of no link."""
    fd = os.dup(root)
    for index, part in enumerate(parts):
        flags = os.O_RDONLY | _NOFOLLOW | _PLAIN | (_DIRECTORY if index < len(parts) - 1 else 0)
        try:
            below = os.open(part, flags, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def _read_up_to(fd: int, most: int, expected: int) -> bytes:
    """What there is to read, but no more than *most* bytes."""
    pieces: list[bytes] = []
    left = most
    while left > 0:
        piece = os.read(fd, min(left, max(expected + 1, 65536), 1024**2))
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _can_seek(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:  # a terminal, say
        return False
    return True


def write_all(fd: int, content: memoryview) -> int:
    written = 0
    while written < len(content):
        written += os.write(fd, content[written:])
    return written


# Folders.


def _walk(root: str, depth: int | None) -> Generator[tuple[str, os.stat_result], None, None]:
    """What is in a folder, named from there; not in those that links lead to."""
    folders = [("", depth)]
    while folders:
        folder, left = folders.pop()
        try:
            for name, stat in _look_into(root, folder):
                yield name, stat
                if S_ISDIR(stat.st_mode) and left != 1:
                    folders.append((name, None if left is None else left - 1))
        except (FileNotFoundError, NotADirectoryError):  # removed, or replaced, in this moment
            if not folder:
                raise


def _look_into(root: str, folder: str) -> Iterator[tuple[str, os.stat_result]]:
    path = os.path.join(root, folder) if folder else root
    with _named(path), os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # removed in this moment
                yield os.path.join(folder, entry.name), entry.stat(follow_symlinks=False)


def _entry(call: Call, name: str, stat: os.stat_result, path: str) -> object:
    """What the host is told of an entry; see ``file_info.py``."""
    target = None
    if S_ISLNK(stat.st_mode):
        with suppress(OSError):  # removed, or replaced, in this moment
            target = call.wire(os.readlink(path))
    owner, group = _owner(stat.st_uid), _group(stat.st_gid)
    return [call.wire(name), stat.st_mode, stat.st_size, stat.st_mtime, owner, group, target]


def _owner(number: int) -> str:
    try:
        return str(getpwuid(number).pw_name)
    except KeyError:  # it has no name
        return str(number)
    except TypeError:  # nobody here owns files
        return ""


def _group(number: int) -> str:
    try:
        return str(getgrgid(number).gr_name)
    except KeyError:  # the same
        return str(number)
    except TypeError:
        return ""


def _make_link(target: str, path: str) -> None:
    if S_ISDIR(getattr(_lstat_if_there(path), "st_mode", 0)):
        raise _error(errno.EISDIR, path)
    temporary = os.path.join(os.path.dirname(path), TEMPORARY + os.urandom(8).hex() + ".new")
    os.symlink(target, temporary)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _lstat_if_there(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _copy_folder(source: str, target: str) -> None:
    os.mkdir(target)
    try:
        _copy_content(source, target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _copy_content(source: str, target: str) -> None:
    with os.scandir(source) as entries:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in names:
        here, there = os.path.join(source, name), os.path.join(target, name)
        if is_folder:
            os.mkdir(there)
            _copy_content(here, there)
        else:
            _copy_entry(here, there)
    shutil.copystat(source, target)


def _copy_entry(source: str, target: str) -> None:
    """Copy a file or link; *target* is there when it is whole."""
    mode = os.lstat(source).st_mode
    if S_ISLNK(mode):
        with _named(target):
            _make_link(os.readlink(source), target)
        return
    if os.path.exists(target) and os.path.samefile(source, target):
        raise _error(errno.EINVAL, target)
    writing = _Writing(target, False, mode)
    try:
        writing.copy_from(source)
        writing.commit()
    finally:
        writing.close()
