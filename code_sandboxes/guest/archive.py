"""The files of a sandbox as one tar, and back: all that is below a folder, and on the same file system.

What is mounted is not the sandbox's own, so it is neither taken along nor written to: neither by its path nor
by way of a link. Owners are not kept, since all is the code's; nor devices, sockets and FIFOs.
"""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from stat import S_IMODE, S_ISDIR, S_ISLNK, S_ISREG
from typing import Any

# Of files that are written just now, see files.py.
TEMPORARY = ".code_sandboxes-"

# Files that are named because they are left out.
MOST_NAMED = 1000

_PIECE = 1024**2
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

# As pax has them, names may be of any length and, as bytes that are no UTF-8, of any kind.
_FORMAT: dict[str, Any] = {
    "format": tarfile.PAX_FORMAT,
    "encoding": "utf-8",
    "errors": "surrogateescape",
}


class Damaged(Exception):
    """What is read was not written here."""


class Left:
    """What is left out, and why.

    Args:
        shown: what names begin with as they are told.
        told: makes text that can be told.
    """

    def __init__(self, shown: str, told: Callable[[str], str]) -> None:
        self.reasons: dict[str, str] = {}
        self._shown = shown
        self._told = told
        self._more = 0

    def add(self, name: str, why: str) -> None:
        if len(self.reasons) < MOST_NAMED:
            self.reasons[self._told(self._shown + name)] = self._told(why)
        else:
            self._more += 1
            self.reasons["..."] = str(self._more) + " more files"

    @contextmanager
    def unless(self, name: str) -> Iterator[None]:
        """It is left out if the system does not let it be.

        Raises:
            OSError: there is no room for it, nor then for others.
        """
        try:
            yield
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            self.add(name, error.strerror or str(error))


def save(
    root: str,
    folders: Collection[str],
    leave_out: Collection[str],
    write: Callable[[Any], object],
    left: Left,
) -> None:
    """Write what is in *folders*.

    Args:
        root: where their names begin, and those that are written.
        leave_out: what nobody would miss.
        left: takes what is left out.
    """
    output: Any = _Output(write)
    tar: Any = tarfile.TarFile(mode="w", fileobj=output, copybufsize=_PIECE, **_FORMAT)
    seen: dict[tuple[int, int], str] = {}
    for name, status in (each for folder in folders for each in _walk(root, folder, leave_out, left)):
        if status.st_uid != os.geteuid():
            continue  # it was there when the sandbox was made
        with left.unless(name):
            _add(tar, root, name, status, seen, left)
        tar.members = []  # which it would keep
    tar.close()


def _walk(
    root: str, top: str, leave_out: Collection[str], left: Left
) -> Iterator[tuple[str, os.stat_result]]:
    """What is in the folder *top* and below, each folder before what is in it."""
    device = os.stat(os.path.join(root, top)).st_dev
    folders = [top]
    while folders:
        folder = folders.pop()
        with left.unless(folder), os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if name in leave_out or entry.name.startswith(TEMPORARY):
                    continue
                with left.unless(name):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_dev == device:
                        yield name, status
                        if S_ISDIR(status.st_mode):
                            folders.append(name)


def _add(
    tar: Any,
    root: str,
    name: str,
    status: os.stat_result,
    seen: dict[tuple[int, int], str],
    left: Left,
) -> None:
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = S_IMODE(status.st_mode) & 0o1777, status.st_mtime
    if S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
    elif S_ISLNK(status.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(os.path.join(root, name))
    elif not S_ISREG(status.st_mode):
        return
    elif (status.st_dev, status.st_ino) in seen:
        info.type, info.linkname = tarfile.LNKTYPE, seen[status.st_dev, status.st_ino]
    else:
        _add_file(tar, root, name, info, left)
        if status.st_nlink > 1:
            seen[status.st_dev, status.st_ino] = name
        return
    tar.addfile(info)


def _add_file(tar: Any, root: str, name: str, info: tarfile.TarInfo, left: Left) -> None:
    fd = os.open(os.path.join(root, name), _READ)
    try:
        status, disk = os.fstat(fd), os.fstatvfs(fd)
        if not S_ISREG(status.st_mode):  # it was replaced in this moment
            return
        if status.st_size > disk.f_blocks * disk.f_frsize:
            left.add(name, "it has holes, without which it is larger than the disk")
            return
        info.size = status.st_size
        content: Any = _Content(fd, info.size)
        tar.addfile(info, content)
    finally:
        os.close(fd)
    if content.is_short:
        left.add(name, "it could not be read to its end; zeros are in the place of the rest")


class _Output:
    """A file to which a tar is written."""

    def __init__(self, write: Callable[[Any], object]) -> None:
        self._write = write
        self._written = 0

    def write(self, data: bytes) -> int:
        self._write(data)
        self._written += len(data)
        return len(data)

    def tell(self) -> int:
        return self._written


class _Content:
    """Exactly so many bytes of a file, whatever becomes of it meanwhile."""

    def __init__(self, fd: int, size: int) -> None:
        self.is_short = False
        self._fd = fd
        self._left = size

    def read(self, size: int) -> bytes:
        size = min(size, self._left)
        self._left -= size
        pieces = []
        while size:
            piece = b""
            with suppress(OSError):  # the disk's; its header is written by now
                piece = b"" if self.is_short else os.read(self._fd, size)
            if not piece:
                self.is_short = True
                piece = bytes(size)
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# And back.


def load(root: str, folders: Collection[str], source: Any, left: Left) -> None:
    """Make in *folders* what was in others of these names.

    Args:
        root: where names begin.
        source: has ``read()``.
        left: takes what is left out.

    Raises:
        OSError: there is no room for it.
        Damaged: that is no tar.
    """
    restored = _Restored(root, folders, left)
    try:
        tar: Any
        with tarfile.open(mode="r|", fileobj=source, bufsize=_PIECE, **_FORMAT) as tar:
            while (info := tar.next()) is not None:
                restored.add(tar, info)
                tar.members = []  # which it would keep
        restored.finish()
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise Damaged("it is no tar: " + str(error)[:200]) from None
    finally:
        restored.close()


class _Restored:
    """Folders in which files are made, by way of no link, and on the file systems of these folders only."""

    def __init__(self, root: str, folders: Collection[str], left: Left) -> None:
        self._left = left
        self._devices = {os.stat(os.path.join(root, folder)).st_dev for folder in folders}
        self._root = os.open(root, _FOLDER)
        self._folders: list[tuple[list[str], tarfile.TarInfo]] = []
        self._at: list[str] = []
        self._fd = os.dup(self._root)  # of the folder at these names

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._root)

    def add(self, tar: Any, info: tarfile.TarInfo) -> None:
        with self._left.unless(info.name):
            self._make(tar, info, _parts(info.name))

    def finish(self) -> None:
        """Let folders be as they were, now that nothing more is made in them."""
        for parts, info in reversed(self._folders):
            with self._left.unless(info.name):
                fd = os.open(parts[-1], _FOLDER, dir_fd=self._folder(parts[:-1]))
                try:
                    self._check_own(fd)
                    os.fchmod(fd, info.mode & 0o1777)
                    _set_time(fd, info)
                finally:
                    os.close(fd)

    def _make(self, tar: Any, info: tarfile.TarInfo, parts: list[str]) -> None:
        folder, name = self._folder(parts[:-1]), parts[-1]
        if info.isdir():
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=folder)
            self._folders.append((parts, info))
        elif info.isreg():
            _remove(name, folder)
            _write(tar.extractfile(info), info, os.open(name, _NEW, 0o600, dir_fd=folder))
        elif info.issym():
            _remove(name, folder)
            os.symlink(info.linkname, name, dir_fd=folder)
        elif info.islnk():
            _remove(name, folder)
            self._link(_parts(info.linkname), parts)

    def _link(self, other: list[str], parts: list[str]) -> None:
        source = os.dup(self._folder(other[:-1]))
        try:
            target = self._folder(parts[:-1])
            os.link(other[-1], parts[-1], src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(source)

    def _folder(self, parts: list[str]) -> int:
        """A descriptor of the folder at *parts*, which is made if it is not there; it is closed here."""
        if parts != self._at:
            fd = os.dup(self._root)
            try:
                for part in parts:
                    below = self._enter(part, fd)
                    os.close(fd)
                    fd = below
                self._check_own(fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(self._fd)
            self._at, self._fd = parts, fd
        return self._fd

    def _enter(self, name: str, folder: int) -> int:
        try:
            return os.open(name, _FOLDER, dir_fd=folder)
        except FileNotFoundError:
            self._check_own(folder)
            os.mkdir(name, 0o700, dir_fd=folder)
            return os.open(name, _FOLDER, dir_fd=folder)

    def _check_own(self, folder: int) -> None:
        if os.fstat(folder).st_dev not in self._devices:
            raise OSError(errno.EXDEV, "something else is mounted there")


def _parts(name: str) -> list[str]:
    """The names that lead to a file.

    Raises:
        OSError: it is none that can be named below a folder.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise OSError(errno.EINVAL, "a file of which the name leads elsewhere")
    return parts


def _remove(name: str, folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _write(content: Any, info: tarfile.TarInfo, fd: int) -> None:
    try:
        while piece := content.read(_PIECE):
            if piece.count(0) == len(piece):  # a hole, perhaps
                os.lseek(fd, len(piece), os.SEEK_CUR)
            else:
                _write_all(fd, memoryview(piece))
        os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))
        os.fchmod(fd, info.mode & 0o777)
        _set_time(fd, info)
    finally:
        os.close(fd)


def _write_all(fd: int, content: memoryview) -> None:
    while content:
        content = content[os.write(fd, content) :]


def _set_time(fd: int, info: tarfile.TarInfo) -> None:
    with suppress(ValueError, OverflowError):  # there is no such time
        os.utime(fd, (info.mtime, info.mtime))
