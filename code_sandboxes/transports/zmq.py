"""The ZeroMQ sockets of one kernel on this machine: ``ipc://`` or ``tcp://``.

Source: the Jupyter messaging documentation, sections "Introduction" (sockets) and "The Wire Protocol";
zmq_setsockopt(3) for the options.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import zmq

from code_sandboxes.forks import in_forked_child
from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.protocol.wire import WireCodec, WireError
from code_sandboxes.transports.loop import Loop

__all__ = ["ConnectionInfo", "ZmqTransport"]

_log = logging.getLogger(__name__)

# As many messages in one go as other kernels can wait for.
_TURN = 100

_KINDS: Mapping[Channel, int] = {
    "shell": zmq.DEALER,
    "stdin": zmq.DEALER,
    "control": zmq.DEALER,
    "iopub": zmq.SUB,
}


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """Where a kernel listens: what a connection file says (section "Connection files" of jupyter_client).

    Args:
        transport: ``"ipc"`` or ``"tcp"``.
        ip: the address; for ``ipc`` the path that ``-<port>`` is put behind.
        ports: of the channels, by name.
        key: what messages are signed with.
    """

    transport: str
    ip: str
    ports: Mapping[str, int]
    key: str = field(repr=False)

    def url(self, channel: str) -> str:
        separator = "-" if self.transport == "ipc" else ":"
        return f"{self.transport}://{self.ip}{separator}{self.ports[channel]}"


class ZmqTransport:
    """Sends and receives the messages of one kernel; all of it in the I/O thread, but for :meth:`send`.

    Args:
        identity: of our sockets; the kernel sends ``input_request`` to the one a request came from.
        receive: called with each message that is believed.
        max_message: bytes; libzmq drops the connection of a peer that sends a larger one, and a new
            ``iopub_welcome`` then tells that something was lost.
    """

    def __init__(
        self,
        loop: Loop,
        connection: ConnectionInfo,
        identity: str,
        receive: Callable[[Message], None],
        max_message: int,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self._loop = loop
        self._connection = connection
        self._identity = identity.encode()
        self._receive = receive
        self._max_message = max_message
        self._codec = WireCodec(connection.key.encode())
        self._channels: dict[Channel, _Channel] = {}
        self._closed = False

    def open(self) -> None:
        """Connect; the kernel need not listen yet."""
        # iopub first: what is published before its subscription has arrived is lost (libzmq guide,
        # "slow joiner"). stdin at once: a ROUTER drops what it sends to a peer that is not there yet.
        for name in ("iopub", "shell", "stdin"):
            self._channel(name)

    def send(self, message: Message) -> None:
        """Send *message*; from any thread. It is encoded here, in the caller's time."""
        frames = self._codec.encode(message)
        if self._loop.is_here():
            self._send_frames(message.channel, frames)
        else:
            self._loop.call_soon(lambda: self._send_frames(message.channel, frames))

    def close(self) -> None:
        self._closed = True
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def _send_frames(self, name: Channel, frames: list[bytes | memoryview]) -> None:
        if not self._closed:
            self._channel(name).send(frames)

    def _channel(self, name: Channel) -> _Channel:
        # control costs two descriptors and is seldom needed: it is opened when it is.
        if name not in self._channels:
            socket = self._connect(name)
            self._channels[name] = _Channel(self._loop, socket, lambda frames: self._decode(name, frames))
        return self._channels[name]

    def _connect(self, name: Channel) -> zmq.Socket[bytes]:
        socket = _context().socket(_KINDS[name])
        socket.linger = 0
        socket.rcvhwm = 0  # whoever does not read loses messages, among them the idle status
        socket.sndhwm = 0
        socket.reconnect_ivl = 5  # milliseconds; the default 100 is what a kernel's start would wait for
        socket.maxmsgsize = self._max_message
        if name == "iopub":
            socket.subscribe(b"")
        else:
            socket.identity = self._identity
        socket.connect(self._connection.url(name))
        return socket

    def _decode(self, name: Channel, frames: list[bytes]) -> None:
        try:
            message = self._codec.decode(frames, name)
        except WireError as error:
            self.dropped[type(error).__name__] += 1
            _log.debug("dropped a message on %s: %s", name, error)
            return
        self._receive(message)


class _Channel:
    """One socket in the loop. Its descriptor only says "look": what is there is asked of the socket."""

    def __init__(self, loop: Loop, socket: zmq.Socket[bytes], deliver: Callable[[list[bytes]], None]) -> None:
        self._loop = loop
        self._socket = socket
        self._deliver = deliver
        self._closed = False
        self._fd: int = socket.fileno()
        loop.add_reader(self._fd, self.read)

    def read(self) -> None:
        for _ in range(_TURN):
            if self._closed or not self._can_read():
                return
            self._deliver(self._socket.recv_multipart(zmq.NOBLOCK))
        self._loop.call_again(self.read)

    def send(self, frames: list[bytes | memoryview]) -> None:
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        # Sending may have taken the signal for something that has arrived (zmq_getsockopt(3), ZMQ_FD).
        if self._can_read():
            self._loop.call_again(self.read)

    def _can_read(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def close(self) -> None:
        self._closed = True
        self._loop.forget(self.read)
        self._loop.remove_reader(self._fd)
        self._socket.close(0)


_the_context: zmq.Context[zmq.Socket[bytes]] | None = None


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    global _the_context
    if _the_context is None:
        _the_context = zmq.Context()
        _the_context.max_sockets = 65536
    return _the_context


def _let_go() -> object:
    global _the_context
    kept, _the_context = _the_context, None
    return kept


in_forked_child(_let_go)
