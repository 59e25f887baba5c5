"""Where keepers are: their folders in the runtime folder, the locks on these, their log, and their peers."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from code_sandboxes.keeper import lines

__all__ = ["folder_prefix", "is_elsewhere", "locked", "log_of", "peer_of"]

# SO_PEERCRED (unix(7)): the other side's process, user and group as they were when it connected.
_PEER = struct.Struct("3i")


def folder_prefix(protocol: int | str | None = None) -> str:
    """How the names of the folders of keepers begin that speak *protocol*; by default ours."""
    return f"k{lines.PROTOCOL if protocol is None else protocol}-"


def log_of(root: Path) -> Path:
    return root / "keeper.log"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Hold the lock of *folder*; gives the descriptor that holds it, or None if somebody else has it."""
    import fcntl  # which Windows does not have

    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield fd
        fcntl.flock(fd, fcntl.LOCK_UN)  # by name: a forked child may have the descriptor, too
    finally:
        os.close(fd)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end."""
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        return pid, uid
    return 0, os.geteuid()  # macOS: nobody else can enter the folder that the socket is in


def is_elsewhere(pid: int) -> bool:
    """Has it another PID namespace, as code in a sandbox has, to which somebody has shown the socket?"""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    except FileNotFoundError:  # it is gone; or nobody tells: macOS, which has no namespaces
        return False
    except PermissionError:  # it is not like this process, or it would not be refused (ptrace(2))
        return True
