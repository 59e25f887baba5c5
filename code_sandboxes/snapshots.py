"""Snapshots as they are kept: what there is to know of one, and the folder that they are in.

A snapshot has parts: its files, and the variables of each context. They are bytes of a sandbox, which are
neither looked at nor believed here: only another sandbox takes them apart.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, BinaryIO, Protocol

from code_sandboxes.errors import SandboxConfigurationError, SandboxError, SandboxSnapshotError
from code_sandboxes.guest.files import write_all
from code_sandboxes.info import SandboxVariant

__all__ = [
    "FolderStore",
    "SavedContext",
    "Shelf",
    "Snapshot",
    "SnapshotInfo",
    "Store",
    "Writer",
    "check_name",
]

_log = logging.getLogger(__name__)

_VARIABLE = "CODE_SANDBOXES_SNAPSHOTS"

_FORMAT = 1

# Of a folder that is being written or removed; whoever does that holds the lock on it.
_UNDER_WAY = "."

_ABOUT = "snapshot.json"

_LONGEST_NAME = 100

# Of the disk, what a snapshot does not take: so much, or a twentieth of it.
_LEFT_FREE = 1024**3


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot of a sandbox.

    Args:
        id: unique.
        name: as it was given; unique, too, among those of a variant, but for those of Datalayer.
        created_at: seconds since the epoch.
        size: bytes.
        variables: that were carried; those of another context than the default one as ``"context:variable"``.
        not_carried: what was not, by its name, and why not: variables, and files by their path. Of those that
            Datalayer lists, neither is known.
    """

    id: str
    name: str
    variant: SandboxVariant
    created_at: float
    size: int
    variables: tuple[str, ...] = ()
    not_carried: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SavedContext:
    """A context of which there is a snapshot.

    Args:
        cwd: where it starts; ``~`` at its beginning is the home of the sandbox.
        part: with its variables; None if they are not carried.
    """

    id: str
    name: str
    kernel_name: str
    cwd: str | None
    env: Mapping[str, str] = field(repr=False)
    part: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot, with what it takes to make a sandbox of it.

    Args:
        folders: where its files were, see :attr:`code_sandboxes.variants.base.Variant.own_folders`.
    """

    info: SnapshotInfo
    folders: Sequence[str]
    contexts: Sequence[SavedContext]


class Writer(Protocol):
    """Writes one snapshot, which is there whole or not at all. Everything may block.

    Everything raises :class:`SandboxSnapshotError` if there is no room, or something else is in the way.
    """

    def open(self) -> None:
        """Begin it.

        Raises:
            SandboxSnapshotError: there is one of that name.
        """

    def begin(self, part: str) -> None:
        """What is written from now on is this part, from its beginning."""

    def write(self, data: bytes | memoryview) -> None: ...

    def commit(
        self,
        folders: Sequence[str],
        contexts: Sequence[SavedContext],
        variables: Sequence[str],
        not_carried: Mapping[str, str],
    ) -> SnapshotInfo:
        """It is complete."""

    def abort(self) -> None:
        """Leave nothing of it; nothing if it is complete."""


class Store(Protocol):
    """Where the snapshots of a variant are. Everything but :meth:`create` may block."""

    def create(self, name: str) -> Writer:
        """What writes a new one."""

    def all(self) -> list[Snapshot]:
        """Those that there are, the oldest first."""

    def find(self, id_or_name: str) -> Snapshot:
        """
        Raises:
            SandboxSnapshotError: there is none.
        """

    def open(self, snapshot: Snapshot, part: str) -> BinaryIO:
        """A part, to be read.

        Raises:
            SandboxSnapshotError: it was deleted meanwhile.
        """

    def delete(self, id: str) -> None:
        """
        Raises:
            SandboxSnapshotError: there is none of that id.
        """


class Shelf(Protocol):
    """Where the snapshots are that a service makes, of the variables of a sandbox's default context.

    Several can have one name; the latest of them is meant. Everything may block.
    """

    def all(self) -> list[SnapshotInfo]:
        """Those that there are, the oldest first."""

    def make(self, name: str) -> SnapshotInfo:
        """Make one of the sandbox as it is now; no code may run in it meanwhile.

        Raises:
            SandboxSnapshotError: it was not made.
        """

    def begin_with(self, id_or_name: str) -> SnapshotInfo:
        """Let the sandbox, which is not made yet, begin with that one.

        Raises:
            SandboxSnapshotError: there is none.
        """

    def delete(self, id: str) -> None:
        """
        Raises:
            SandboxSnapshotError: there is none of that id.
        """


def check_name(name: object) -> str:
    """*name*, if a snapshot can have it.

    Raises:
        TypeError: it is no str.
        ValueError: nobody would find it again.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a snapshot must be a str, not {type(name).__name__}")
    if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable() or set(name) & set("/\\:"):
        raise ValueError(
            f"a snapshot cannot be named {name[:200]!r}: a name has 1 to {_LONGEST_NAME} characters that can"
            " be printed, and no '/', '\\' or ':'"
        )
    return name


class FolderStore:
    """Snapshots in a folder that only this user can enter, each a folder in it.

    Args:
        variant: whose they are.
    """

    def __init__(self, variant: SandboxVariant) -> None:
        self.variant = variant
        self.root = _data_folder() / str(variant)

    def create(self, name: str) -> Writer:
        return _FolderWriter(self, name)

    def all(self) -> list[Snapshot]:
        if not self.root.is_dir():
            return []
        _check_private(self.root)
        found = []
        for path in self.root.iterdir():
            if path.name.startswith(_UNDER_WAY):
                continue
            try:
                found.append(_snapshot_of(json.loads((path / _ABOUT).read_bytes())))
            except FileNotFoundError:  # it was deleted in this moment
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s is no snapshot: %r", path, error)
        return sorted(found, key=lambda snapshot: snapshot.info.created_at)

    def find(self, id_or_name: str) -> Snapshot:
        snapshots = self.all()
        for snapshot in snapshots:
            if id_or_name in (snapshot.info.id, snapshot.info.name):
                return snapshot
        known = ", ".join(repr(snapshot.info.name) for snapshot in snapshots) or "none"
        raise SandboxSnapshotError(f"no snapshot {id_or_name!r} of {self.variant} (known: {known})")

    def open(self, snapshot: Snapshot, part: str) -> BinaryIO:
        try:
            return open(self.root / snapshot.info.id / part, "rb")
        except FileNotFoundError:
            raise SandboxSnapshotError(
                f"the snapshot {snapshot.info.name!r} was deleted while it was restored"
            ) from None

    def delete(self, id: str) -> None:
        with self.locked():
            snapshot = self.find(id)
            removed = self.root / f"{_UNDER_WAY}{snapshot.info.id}"
            os.rename(self.root / snapshot.info.id, removed)
        self._remove_with_all(removed)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """What there is does not change by others meanwhile."""
        import fcntl  # which Windows does not have

        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(self.root)
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
            fcntl.flock(fd, fcntl.LOCK_UN)  # by name: a forked child may have the descriptor, too
        finally:
            os.close(fd)

    def keep(self, id: str) -> None:
        """Keep what else belongs to that snapshot, before it is there.

        Raises:
            SandboxError: it cannot be kept.
        """

    def let_go(self, id: str) -> None:
        """What :meth:`keep` has kept, if it has.

        Raises:
            SandboxError: it is there still.
        """

    def check_free(self, name: str) -> None:
        """
        Raises:
            SandboxSnapshotError: there is one of that name.
        """
        for snapshot in self.all():
            if snapshot.info.name == name:
                raise SandboxSnapshotError(
                    f"there is a snapshot {name!r} already, {snapshot.info.id}: delete it first, or choose"
                    " another name"
                )

    def remove_leftovers(self) -> None:
        """What was written when its program was killed."""
        for path in self.root.glob(f"{_UNDER_WAY}*"):
            if (lock := _lock_of(path)) is not None:
                self._remove_with_all(path)
                os.close(lock)

    def _remove_with_all(self, path: Path) -> None:
        """If not all of it can go, it is tried again the next time."""
        try:
            self.let_go(path.name.removeprefix(_UNDER_WAY))
        except SandboxError as error:
            _log.warning("what belongs to %s could not be removed yet: %s", path, error)
        else:
            _remove(path)


class _FolderWriter:
    """Writes beside the place where the snapshot is to be."""

    def __init__(self, store: FolderStore, name: str) -> None:
        self._store = store
        self._name = name
        self._id = f"snapshot-{os.urandom(8).hex()}"
        self._folder = store.root / f"{_UNDER_WAY}{self._id}"
        self._sizes: dict[str, int] = {}
        self._part = ""
        self._fd = self._lock = -1
        self._is_over = False
        self._step = RLock()  # it may be given up in another thread than it is written in

    def open(self) -> None:
        with self._telling(), self._store.locked():
            self._store.remove_leftovers()
            self._store.check_free(self._name)
            self._folder.mkdir(mode=0o700)
            lock = _lock_of(self._folder)
            assert lock is not None
            self._lock = lock

    def begin(self, part: str) -> None:
        with self._telling():
            self._close()
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._folder / part, flags, 0o600)
            self._part, self._sizes[part] = part, 0

    def write(self, data: bytes | memoryview) -> None:
        with self._telling():
            self._check_room(len(data))
            write_all(self._fd, memoryview(data))
            self._sizes[self._part] += len(data)

    def commit(
        self,
        folders: Sequence[str],
        contexts: Sequence[SavedContext],
        variables: Sequence[str],
        not_carried: Mapping[str, str],
    ) -> SnapshotInfo:
        size, created_at = sum(self._sizes.values()), time.time()
        info = SnapshotInfo(
            self._id, self._name, self._store.variant, created_at, size, tuple(variables), dict(not_carried)
        )
        about = {"format": _FORMAT, **asdict(Snapshot(info, folders, contexts))}
        self.begin(_ABOUT)
        self.write(json.dumps(about).encode())
        self._store.keep(self._id)
        with self._telling():
            self._close()
            with self._store.locked():
                self._store.check_free(self._name)
                os.rename(self._folder, self._store.root / self._id)
                _sync(self._store.root)
            self._is_over = True
            os.close(self._lock)
        return info

    def abort(self) -> None:
        with self._step:
            if not self._is_over:
                self._is_over = True
                with suppress(OSError):  # what could not be written is removed all the same
                    self._close()
                if self._lock >= 0:
                    self._store._remove_with_all(self._folder)
                    os.close(self._lock)

    def _check_room(self, size: int) -> None:
        disk = os.fstatvfs(self._fd)
        left_free = min(_LEFT_FREE, disk.f_blocks * disk.f_frsize // 20)
        if disk.f_bavail * disk.f_frsize - size < left_free:
            raise OSError(errno.ENOSPC, f"there is no room for more, as {_mib(left_free)} are left free")

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.fsync(fd)  # a snapshot that is there is whole, whatever happens to the machine
            finally:
                os.close(fd)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        with self._step:
            if self._is_over:
                raise SandboxSnapshotError(f"the snapshot {self._name!r} was given up")
            try:
                yield
            except OSError as error:
                written = _mib(sum(self._sizes.values()))
                raise SandboxSnapshotError(
                    f"the snapshot {self._name!r} was given up after {written}: in {self._store.root}"
                    f" {error.strerror}; delete snapshots, or set {_VARIABLE} to a folder elsewhere"
                ) from None


def _data_folder() -> Path:
    if given := os.environ.get(_VARIABLE):
        return Path(given).absolute()
    data = os.environ.get("XDG_DATA_HOME", "")
    folder = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return folder / "code_sandboxes" / "snapshots"


def _check_private(folder: Path) -> None:
    """
    Raises:
        SandboxConfigurationError: others could change what is in it, or read it.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SandboxConfigurationError(
            f"{folder}, where snapshots are kept, is not a folder that only this user can enter;"
            f" set {_VARIABLE} to another one"
        )


def _lock_of(folder: Path) -> int | None:
    """A descriptor that holds the lock of *folder*; None if somebody else has it, or it is gone."""
    import fcntl

    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)  # others may do that, too; what is left is tried again


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _mib(size: int) -> str:
    return f"{size / 1024**2:.3g} MiB" if size < 1024**3 else f"{size / 1024**3:.3g} GiB"


def _snapshot_of(about: Mapping[str, Any]) -> Snapshot:
    """
    Raises:
        ValueError: it is of another version.
        KeyError, TypeError: it is something else.
    """
    if about["format"] != _FORMAT:
        raise ValueError(f"it has the format {about['format']!r}, not {_FORMAT}")
    info = about["info"]
    return Snapshot(
        SnapshotInfo(
            **{**info, "variant": SandboxVariant(info["variant"]), "variables": tuple(info["variables"])}
        ),
        tuple(about["folders"]),
        tuple(SavedContext(**context) for context in about["contexts"]),
    )
