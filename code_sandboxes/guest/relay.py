"""Between standard input and output and a socket in a container, for whoever runs this there from outside.

Run as ``python -I -S -c <this> <steward> <socket>``. It first asks the steward, the container's first process
(``guest/steward.py``), which takes it for a program that is there as long as this runs. The first byte of
the output says that all is ready; if it cannot be, the standard error says why. With no *socket* it is the
steward who is spoken to.
"""

from __future__ import annotations

import os
import select
import socket
import sys

READY = b"\x06"

# What asks to be counted, and for an answer when there is something to connect to.
ATTEND = b'{"attend": true}\n'

PIECE = 65536


def connect(name: str) -> socket.socket:
    """
    Args:
        name: of a socket; what begins with ``@`` is abstract (unix(7)).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect("\0" + name[1:] if name.startswith("@") else name)
    return connection


def attend(steward: socket.socket) -> None:
    """
    Raises:
        OSError: the steward does not have this here.
    """
    steward.sendall(ATTEND)
    if not steward.recv(PIECE):
        raise ConnectionRefusedError("the first process of the container does not answer")


def pass_on(connection: socket.socket) -> None:
    """Until either side hangs up: what one says waits for the other, and holds up nobody else."""
    there = connection.fileno()
    for descriptor in (0, 1, there):
        os.set_blocking(descriptor, False)
    to_socket = to_output = b""
    heard_all = False
    while not heard_all or to_output:
        poll = select.poll()
        poll.register(0, 0 if to_socket else select.POLLIN)  # that it is gone is told all the same
        poll.register(1, select.POLLOUT if to_output else 0)
        if not heard_all:
            wanted = (select.POLLOUT if to_socket else 0) | (0 if to_output else select.POLLIN)
            poll.register(there, wanted)
        events = dict(poll.poll())
        if events.get(0, 0) & (select.POLLIN | select.POLLHUP) and not to_socket:
            to_socket = os.read(0, PIECE)
            if not to_socket:
                return
        if events.get(1, 0) & select.POLLERR:
            return
        if to_socket and events.get(there, 0) & (select.POLLOUT | select.POLLERR):
            to_socket = to_socket[os.write(there, to_socket) :]
        if not to_output and events.get(there, 0) & (select.POLLIN | select.POLLHUP):
            to_output = os.read(there, PIECE)
            heard_all = not to_output
        if to_output and events.get(1, 0) & select.POLLOUT:
            to_output = to_output[os.write(1, to_output) :]


def main(steward: str, target: str) -> None:
    try:
        held = connect(steward)
        connection = held
        if target:
            attend(held)
            connection = connect(target)
        os.write(1, READY)
        pass_on(connection)
    except OSError as error:  # somebody has hung up; or it could not begin, which is to be told
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:3])
