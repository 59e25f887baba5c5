"""The latest of what a process printed, in a file that can be read when the process is dead.

A print reaches the network some milliseconds after it was made. A process that is killed, crashes or calls
``os._exit()`` in between would take it along; here it is found. Both sides are in this file:
:class:`Journal` writes, in the kernel; :func:`read` reads, on the host, and believes nothing it reads.

For each stream there is the number of bytes ever written (8 bytes, little-endian), then a ring of them.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import threading

RING = 1024 * 1024
STREAMS = ("stdout", "stderr")

_TOTAL = struct.Struct("<Q")
_REGION = _TOTAL.size + RING
_FILE_SIZE = _REGION * len(STREAMS)


class Journal:
    """Record what is written, in the process that writes it; from any thread.

    Args:
        fd: a descriptor of a file that the host has made; not used any more afterwards.
    """

    def __init__(self, fd: int) -> None:
        self._lock = threading.Lock()
        self._totals = [0] * len(STREAMS)
        self._map = mmap.mmap(fd, _FILE_SIZE)

    def record(self, stream: int, text: str) -> None:
        """*text* was written to ``STREAMS[stream]``."""
        data = text.encode("utf-8", "replace")
        start = _REGION * stream + _TOTAL.size
        with self._lock:
            total = self._totals[stream]
            position = total % RING
            end = position + len(data)
            if end <= RING:
                self._map[start + position : start + end] = data
            else:
                self._wrap(start, position, data)
            total += len(data)
            self._totals[stream] = total
            # The count last: a reader must not find bytes counted that are not there yet.
            _TOTAL.pack_into(self._map, _REGION * stream, total)

    def _wrap(self, start: int, position: int, data: bytes) -> None:
        kept = data[-RING:]
        position = (position + len(data) - len(kept)) % RING
        first = kept[: RING - position]
        self._map[start + position : start + position + len(first)] = first
        self._map[start : start + len(kept) - len(first)] = kept[len(first) :]


def create(path: str) -> tuple[int, int]:
    """Make the file, before the process starts; returns what tells it from one put in its place."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, _FILE_SIZE)
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return status.st_dev, status.st_ino


def create_in_memory() -> tuple[int, tuple[int, int]]:
    """The same as a file in memory, whose size nobody can change; a descriptor of it."""
    import fcntl  # which Windows does not have

    fd = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _FILE_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    status = os.fstat(fd)
    return fd, (status.st_dev, status.st_ino)


def read(path: str, identity: tuple[int, int]) -> list[tuple[int, bytes]]:
    """For each stream how many bytes were ever written, and the latest of them; empty if it is not there."""
    return [_latest(region) for region in _read_regions(path, identity, _REGION)]


def read_totals(path: str, identity: tuple[int, int]) -> list[int]:
    """For each stream how many bytes were ever written; empty if the file is not there."""
    return [_TOTAL.unpack(region)[0] for region in _read_regions(path, identity, _TOTAL.size)]


def _read_regions(path: str, identity: tuple[int, int], size: int) -> list[bytes]:
    try:
        # The sandbox could have put a link or a pipe in its place; not in that of a descriptor.
        no_link = 0 if path.startswith("/proc/") else os.O_NOFOLLOW
        fd = os.open(path, os.O_RDONLY | no_link | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != identity or not stat.S_ISREG(status.st_mode):
            return []
        regions = [os.pread(fd, size, _REGION * stream) for stream in range(len(STREAMS))]
    finally:
        os.close(fd)
    return regions if all(len(region) == size for region in regions) else []


def _latest(region: bytes) -> tuple[int, bytes]:
    (total,) = _TOTAL.unpack_from(region)
    ring = region[_TOTAL.size :]
    if total <= RING:
        return total, ring[:total]
    position = total % RING
    return total, ring[position:] + ring[:position]
