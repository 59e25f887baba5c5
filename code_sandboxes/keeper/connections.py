"""Where a kernel listens: sockets in its folder, of which it is told by a file or gets the descriptors."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from code_sandboxes.guest import journal

__all__ = ["Handover", "Listening", "connection_file", "handed_over", "listen", "write_connection_file"]

_CHANNELS = ("shell", "iopub", "stdin", "control", "hb")

_BACKLOG = 128

# A kernel's descriptors where it starts with none but these: its standard error, then those of a handover.
_FIRST_PLACE = 3


@dataclass(frozen=True, slots=True)
class Listening:
    """Sockets that listen in a kernel's place, in the order of its ports.

    Args:
        connection: what programs are told of it.
    """

    connection: dict[str, Any]
    sockets: Sequence[socket.socket]


@dataclass(frozen=True, slots=True)
class Handover:
    """What a kernel gets as descriptors: nothing of it is then in its file system.

    Args:
        connection: what programs are told of it.
        connection_file: its path for the kernel.
        descriptors: for the kernel, its standard error first.
        stderr: where what it writes there can be read.
        journal: a descriptor of its journal, and what tells that from another file.
    """

    connection: dict[str, Any]
    connection_file: str
    descriptors: Sequence[int]
    stderr: int
    journal: tuple[int, tuple[int, int]]


@contextmanager
def handed_over(folder: Path, key: str | None, *, renumbered: bool) -> Iterator[Handover]:
    """Make it; at the end what the kernel has got by then is closed, after a failure all of it.

    Args:
        folder: for the names of its sockets, by which programs reach it.
        key: what its messages are signed with; None for a new one.
        renumbered: the kernel finds *descriptors* from 2 on; else under the numbers that they have here.

    Raises:
        OSError: there are too few descriptors.
    """
    with ExitStack() as for_kernel, ExitStack() as for_keeper:
        listening = listen(folder, key)
        for each in listening.sockets:
            for_kernel.enter_context(each)
        book, identity = journal.create_in_memory()
        for_keeper.callback(os.close, book)
        read, write = os.pipe()
        for_keeper.callback(os.close, read)
        for_kernel.callback(os.close, write)
        description = os.memfd_create("connection")
        for_kernel.callback(os.close, description)
        own = [description, book, *(each.fileno() for each in listening.sockets)]
        told = range(_FIRST_PLACE, _FIRST_PLACE + len(own)) if renumbered else own
        with open(description, "w", closefd=False) as file:
            places = {"journal": told[1], "sockets": dict(zip(_CHANNELS, told[2:], strict=True))}
            json.dump({**_as_file(listening.connection), **places}, file)
        connection_file = f"/proc/self/fd/{told[0]}"
        yield Handover(listening.connection, connection_file, [write, *own], read, (book, identity))
        for_keeper.pop_all()


def listen(folder: Path, key: str | None) -> Listening:
    """Listen in *folder* in a kernel's place."""
    connection = _connection(folder, key)
    sockets: list[socket.socket] = []
    try:
        for port in connection["ports"].values():
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(f"{connection['ip']}-{port}")
            sockets[-1].listen(_BACKLOG)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return Listening(connection, sockets)


def write_connection_file(folder: Path, key: str | None) -> dict[str, Any]:
    """Choose where the kernel listens, and write it where it looks (jupyter_client, "Connection files")."""
    connection = _connection(folder, key)
    path = folder / "connection.json"
    path.touch(mode=0o600)
    path.write_text(connection_file(connection))
    return connection


def connection_file(connection: Mapping[str, Any], ip: str | None = None) -> str:
    """The content of a connection file; with *ip* for a kernel that listens elsewhere than programs look."""
    return json.dumps(_as_file({**connection, "ip": ip or connection["ip"]}))


def _as_file(connection: Mapping[str, Any]) -> dict[str, Any]:
    ports = {f"{channel}_port": port for channel, port in connection["ports"].items()}
    where = {name: connection[name] for name in ("transport", "ip", "key")}
    return {**where, **ports, "signature_scheme": "hmac-sha256"}


def _connection(folder: Path, key: str | None) -> dict[str, Any]:
    ports = {channel: number for number, channel in enumerate(_CHANNELS, start=1)}
    key = key or secrets.token_hex(32)
    return {"transport": "ipc", "ip": str(folder / "s"), "key": key, "ports": ports}
