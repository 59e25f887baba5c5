"""Tell what changes in a folder: by inotify(7) where there is one, else by looking again and again.

Each watch has a thread and the channel that was opened with it, on which its events go, and which ends it
when it is closed. Without credit nothing is taken from the system's queue; when that overflows, the watch
ends and says so.
"""

from __future__ import annotations

import errno
import os
import selectors
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from stat import S_ISDIR
from struct import Struct
from threading import Event, Lock, Thread
from time import monotonic, time
from typing import TYPE_CHECKING, Any

try:
    from ctypes import CDLL, get_errno
except ImportError:  # a Python that was built without
    CDLL = None  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from code_sandboxes.guest.calls import Call, Channel

# Events in one message, and what that costs.
BATCH = 64
COST = 256

# Seconds: how long one half of a renaming waits for the other, and between two looks.
_TOGETHER = 0.01
_AGAIN = 0.2

# Files under these names are about to take the place of another; see files.py.
TEMPORARY = ".code_sandboxes-"

_MODIFY, _ATTRIB, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_OVERFLOW, _IGNORED = 0x4000, 0x8000
_ONLY_FOLDER, _DONT_FOLLOW, _IS_FOLDER = 0x1000000, 0x2000000, 0x40000000
_CLOEXEC, _NONBLOCK = 0o2000000, 0o4000

_IN_FOLDER = _MODIFY | _ATTRIB | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_IN_ROOT = _IN_FOLDER | _DELETE_SELF | _MOVE_SELF

_HEAD = Struct("iIII")


class Gone(Exception):
    """What was watched is there no more, or nobody listens."""


class Inotify:
    """The system's queue of what happens in some folders."""

    def __init__(self) -> None:
        library = CDLL(None, use_errno=True)
        self._add = library.inotify_add_watch
        self._remove = library.inotify_rm_watch
        self.fd = library.inotify_init1(_CLOEXEC | _NONBLOCK)
        if self.fd < 0:
            raise OSError(get_errno(), os.strerror(get_errno()))

    def add(self, path: str, mask: int) -> int:
        number: int = self._add(self.fd, os.fsencode(path), mask)
        if number < 0:
            raise OSError(get_errno(), os.strerror(get_errno()), path)
        return number

    def remove(self, number: int) -> None:
        self._remove(self.fd, number)

    def read(self) -> list[tuple[int, int, int, str]]:
        """What has happened: where, what, which renaming, and to whom."""
        try:
            content = os.read(self.fd, 65536)
        except BlockingIOError:
            return []
        events = []
        start = 0
        while start < len(content):
            number, mask, cookie, length = _HEAD.unpack_from(content, start)
            start += _HEAD.size
            name = content[start : start + length].rstrip(b"\0")
            events.append((number, mask, cookie, os.fsdecode(name)))
            start += length
        return events

    def close(self) -> None:
        os.close(self.fd)


class Watch:
    """A folder, or a file, that is watched.

    Args:
        root: the folder, from the root of the system.
        only: the name of the file in it that is meant, if it is not the folder itself.
        recursive: the folders in it, too.
        channel: takes the events.
        wire: makes a JSON value of a path.
    """

    def __init__(
        self,
        root: str,
        only: str | None,
        recursive: bool,
        channel: Channel,
        wire: Callable[[object], object],
    ) -> None:
        self._root = root
        self._only = None if only is None else os.path.join(root, only)
        self._recursive = recursive
        self._channel = channel
        self._wire = wire
        self._events: list[tuple[str, str, float, str | None]] = []

    def wake(self) -> None:
        """The channel has changed; from any thread."""
        raise NotImplementedError

    def wait(self) -> None:
        """Return when there is something new, or the channel has changed."""
        raise NotImplementedError

    def look(self) -> None:
        """Take in what has happened."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def serve(self) -> None:
        """Tell what happens until it is over; ends with why."""
        while True:
            self.wait()
            self._check()
            try:
                self.look()
            finally:
                self._send()

    def _check(self) -> None:
        if self._channel.is_closed:
            raise Gone

    def _tell(self, kind: str, path: str, new_path: str | None = None) -> None:
        if self._only is not None and self._only not in (path, new_path):
            return
        last = self._events[-1] if self._events else None
        if last is None or kind != "modify" or (last[0], last[1]) != (kind, path):
            self._events.append((kind, path, time(), new_path))

    def _send(self) -> None:
        while self._events:
            self._check()
            while self._channel.credit < COST:
                self._wait_for_credit()
                self._check()
            batch, self._events = self._events[:BATCH], self._events[BATCH:]
            self._channel.send({"events": [self._json(*event) for event in batch]})

    def _json(self, kind: str, path: str, when: float, new_path: str | None) -> object:
        return [kind, self._wire(path), when, None if new_path is None else self._wire(new_path)]

    def _wait_for_credit(self) -> None:
        raise NotImplementedError


class InotifyWatch(Watch):
    """One by inotify."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._queue = Inotify()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._lock = Lock()
        self._is_closed = False
        self._folders: dict[int, str] = {}
        self._leaving: dict[int, tuple[str, bool]] = {}
        self._leaving_until = 0.0
        # Found by looking into a new folder; that they were made may be in the queue as well.
        self._announced: set[str] = set()
        try:
            self._root_number = self._queue.add(self._root, _IN_ROOT | _ONLY_FOLDER)
            self._folders[self._root_number] = self._root
            if self._recursive:
                self._look_into(self._root, announce=False)
        except BaseException:
            self.close()
            raise

    def wake(self) -> None:
        with self._lock, suppress(BlockingIOError):
            if not self._is_closed:
                os.write(self._wake, b"\0")

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            os.close(self._woken)
            os.close(self._wake)
            self._queue.close()

    def wait(self) -> None:
        timeout = max(0.0, self._leaving_until - monotonic()) if self._leaving else None
        self._select([self._woken, self._queue.fd], timeout)

    def _wait_for_credit(self) -> None:
        self._select([self._woken], None)

    def _select(self, fds: list[int], timeout: float | None) -> None:
        with selectors.DefaultSelector() as selector:
            for fd in fds:
                selector.register(fd, selectors.EVENT_READ)
            for key, _ in selector.select(timeout):
                if key.fd == self._woken:
                    os.read(self._woken, 4096)

    def look(self) -> None:
        while True:
            events = self._queue.read()
            for event in events:
                self._happened(*event)
            if not events:
                break
            self._send()
        self._announced.clear()
        if self._leaving and monotonic() >= self._leaving_until:
            self._have_left()

    def _happened(self, number: int, mask: int, cookie: int, name: str) -> None:
        if mask & _OVERFLOW:
            raise OSError(errno.EOVERFLOW, "too much happened at once; some of it is lost", self._root)
        folder = self._folders.get(number)
        if folder is None:
            return
        if mask & (_DELETE_SELF | _MOVE_SELF | _IGNORED):
            if number == self._root_number:
                self._tell("delete", self._only or self._root)
                raise Gone
            if mask & _IGNORED:
                del self._folders[number]
            return
        path = os.path.join(folder, name)
        is_folder = bool(mask & _IS_FOLDER)
        if mask & _MOVED_FROM:
            self._leaving[cookie] = path, is_folder
            self._leaving_until = monotonic() + _TOGETHER
        elif mask & _MOVED_TO:
            self._arrived(path, is_folder, self._leaving.pop(cookie, None))
        elif name.startswith(TEMPORARY):
            return
        elif mask & _CREATE:
            self._created(path, is_folder)
        elif mask & _DELETE:
            self._announced.discard(path)
            self._tell("delete", path)
        else:
            self._tell("modify", path)

    def _created(self, path: str, is_folder: bool) -> None:
        if path in self._announced:
            self._announced.discard(path)
            return
        self._tell("create", path)
        if is_folder and self._recursive:
            self._look_into(path, announce=True)

    def _arrived(self, path: str, is_folder: bool, left: tuple[str, bool] | None) -> None:
        if left is None:
            self._created(path, is_folder)
            return
        before = os.path.basename(left[0])
        if before.startswith(TEMPORARY):
            self._tell("create" if before.endswith(".new") else "modify", path)
            return
        self._tell("rename", left[0], path)
        for number, folder in list(self._folders.items()):
            if (folder + os.sep).startswith(left[0] + os.sep):
                self._folders[number] = path + folder[len(left[0]) :]
        if is_folder and self._recursive:
            self._look_into(path, announce=True)  # what was not found under its name before

    def _have_left(self) -> None:
        """What left and has arrived nowhere here is gone."""
        for path, is_folder in self._leaving.values():
            if not os.path.basename(path).startswith(TEMPORARY):
                self._tell("delete", path)
            for number, folder in list(self._folders.items()) if is_folder else ():
                if (folder + os.sep).startswith(path + os.sep):
                    del self._folders[number]
                    self._queue.remove(number)
        self._leaving.clear()

    def _look_into(self, path: str, *, announce: bool) -> None:
        """Watch a folder and those in it; with *announce*, tell what is in those that were not watched."""
        folders = [path]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError, NotADirectoryError):  # it is gone, or called something else
                is_new = self._watch_folder(folder)
                for name, is_folder in self._names_in(folder):
                    if announce and is_new and not name.startswith(TEMPORARY):
                        self._announced.add(os.path.join(folder, name))
                        self._tell("create", os.path.join(folder, name))
                    if is_folder:
                        folders.append(os.path.join(folder, name))

    def _watch_folder(self, folder: str) -> bool:
        """Returns whether it was not watched before."""
        if folder == self._root:
            return False
        number = self._queue.add(folder, _IN_FOLDER | _ONLY_FOLDER | _DONT_FOLLOW)
        is_new = number not in self._folders
        self._folders[number] = folder
        return is_new

    def _names_in(self, folder: str) -> list[tuple[str, bool]]:
        try:
            with os.scandir(folder) as entries:
                return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except FileNotFoundError:
            # If it is called something else by now, that will be told, and then it is looked into.
            for number, watched in list(self._folders.items()):
                if watched == folder and folder != self._root:
                    del self._folders[number]
                    self._queue.remove(number)
            raise


class PollingWatch(Watch):
    """One that looks again and again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._woken = Event()
        self._seen = dict(self._all())

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        return

    def wait(self) -> None:
        self._woken.wait(_AGAIN)
        self._woken.clear()

    def _wait_for_credit(self) -> None:
        self._woken.wait()
        self._woken.clear()

    def look(self) -> None:
        try:
            now = dict(self._all())
        except FileNotFoundError:
            self._tell("delete", self._only or self._root)
            raise Gone from None
        before, self._seen = self._seen, now
        gone = {state[0]: path for path, state in before.items() if path not in now}
        for path, state in now.items():
            old = before.get(path)
            if old is None and state[0] in gone:
                self._tell("rename", gone.pop(state[0]), path)
            elif old is None or old[0] != state[0]:
                self._tell("create" if old is None else "modify", path)
            elif old != state:
                self._tell("modify", path)
        for path in gone.values():
            self._tell("delete", path)

    def _all(self) -> Iterator[tuple[str, tuple[object, ...]]]:
        """Everything that is watched, and how to see that it has changed."""
        folders = [self._root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    found = [(entry.path, entry.stat(follow_symlinks=False)) for entry in entries]
            except FileNotFoundError:
                if folder == self._root:
                    raise
                continue
            for path, stat in found:
                if os.path.basename(path).startswith(TEMPORARY):
                    continue
                is_folder = S_ISDIR(stat.st_mode)
                # The time of a folder tells of what is in it.
                changes = (stat.st_mode,) if is_folder else (stat.st_mode, stat.st_mtime_ns, stat.st_size)
                yield path, ((stat.st_dev, stat.st_ino), *changes)
                if is_folder and self._recursive:
                    folders.append(path)


class Watching:
    """Tell what changes in a folder."""

    in_threads = ("watching.watch",)

    def __init__(self, *, poll: bool = False) -> None:
        self.functions: Mapping[str, Callable[..., object]] = {"watching.watch": self.watch}
        self._kind = PollingWatch if poll or not _has_inotify() else InotifyWatch
        self._watches: dict[Watch, Channel] = {}

    def close(self) -> None:
        """End all watches."""
        for watch, channel in list(self._watches.items()):
            channel.close()
            watch.wake()

    def watch(self, call: Call, path: Any, recursive: bool, base: Any = None) -> object:
        """Tell on the channel of the call what happens from now on; the answer is where."""
        found = call.path(path, base)
        is_folder = S_ISDIR(os.stat(found).st_mode)
        whole = call.absolute(found)
        channel = call.channel
        assert channel is not None
        if is_folder:
            watch = self._kind(whole, None, recursive, channel, call.wire)
        else:
            watch = self._kind(*os.path.split(whole), False, channel, call.wire)
        self._watches[watch] = channel
        channel.on_change = watch.wake
        watch.wake()  # it may have been closed before
        Thread(target=self._serve, args=(watch, channel, call), daemon=True).start()
        return call.wire(whole)

    def _serve(self, watch: Watch, channel: Channel, call: Call) -> None:
        try:
            watch.serve()
        except Gone:
            channel.end(None)
        except Exception as error:  # whatever it is, who listens is to know that nothing more comes
            channel.end({"error": call.wire_error(error)})
        finally:
            del self._watches[watch]
            watch.close()


def _has_inotify() -> bool:
    if CDLL is None or os.name != "posix":
        return False
    return hasattr(CDLL(None), "inotify_init1")
