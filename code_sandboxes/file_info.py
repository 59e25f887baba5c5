"""What users are told about files, and about what happens to them: values, frozen."""

from __future__ import annotations

from dataclasses import dataclass

from code_sandboxes.results import Text

__all__ = ["FileInfo", "FileType", "FileWatchEvent", "FileWatchEventType"]


class FileType(Text):
    """What an entry of a folder is; a link is a link, wherever it leads."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    OTHER = "other"  # a device, FIFO or socket


@dataclass(frozen=True, slots=True)
class FileInfo:
    """An entry of a folder; where it is a link, the link itself.

    Args:
        name: the last part of its path.
        path: from the root of the sandbox. Bytes that are no UTF-8 are lone surrogates, as :mod:`os` has it.
        type: what it is.
        size: bytes.
        modified: when its content last changed, in seconds since the epoch.
        permissions: as ``ls`` shows them: ``-rw-r--r--``.
        mode: the same as a number: ``0o644``.
        owner: a name, or a number where it has none.
        group: the same.
        symlink_target: what is written in the link; None if it is none.
    """

    name: str
    path: str
    type: FileType
    size: int
    modified: float
    permissions: str
    mode: int
    owner: str
    group: str
    symlink_target: str | None = None


class FileWatchEventType(Text):
    """What has happened to a file."""

    CREATE = "create"
    MODIFY = "modify"  # its content, permissions or times
    DELETE = "delete"
    RENAME = "rename"


@dataclass(frozen=True, slots=True)
class FileWatchEvent:
    """Something has happened to a file or folder.

    Args:
        event_type: what.
        path: from the root of the sandbox.
        timestamp: when it was noticed, in seconds since the epoch.
        new_path: what it is called now, where it was renamed.
    """

    event_type: FileWatchEventType
    path: str
    timestamp: float
    new_path: str | None = None
