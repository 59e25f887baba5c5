"""What a copy costs at least: a file, through a Unix socket, into a file that another process writes."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from benchmarks.drivers.service import serve

_CHUNK = 2 * 1024**2


class Floor:
    """Copies in its own folder."""

    def copy(self, size: int) -> list[float]:
        """Seconds for each MiB of *size* bytes."""
        source, target = Path("source"), Path("target")
        if not source.exists() or source.stat().st_size != size:
            source.write_bytes(os.urandom(size))
        began = time.perf_counter()
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            ours.close()
            _receive(theirs, target)
            os._exit(0)
        theirs.close()
        with source.open("rb") as file:
            ours.sendfile(file)
        ours.shutdown(socket.SHUT_WR)
        os.waitpid(child, 0)
        seconds = time.perf_counter() - began
        ours.close()
        if target.stat().st_size != size:
            raise RuntimeError("not all of it was copied")
        target.unlink()
        return [seconds / (size / 1024**2)]

    def end(self) -> list[float]:
        return []


def _receive(connection: socket.socket, target: Path) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    with target.open("wb", buffering=0) as file:
        while received := connection.recv_into(buffer):
            file.write(buffer[:received])


if __name__ == "__main__":
    floor = Floor()
    serve({"copy": floor.copy, "end": floor.end}, floor.end)
