"""The connections to one kernel on this machine: ``ipc://`` or ``tcp://``, without libzmq (see
``protocol/zmtp.py``).

Source: the Jupyter messaging documentation, sections "Introduction" (sockets) and "The Wire Protocol";
ZeroMQ RFC 23/ZMTP for what is sent on them.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.protocol.wire import WireCodec, WireError
from code_sandboxes.protocol.zmtp import MessageReader, ZmtpError, framed, hello
from code_sandboxes.transports.loop import Loop, Timer

__all__ = ["ConnectionInfo", "ZmqTransport"]

_log = logging.getLogger(__name__)

# Seconds for which one connection may keep the I/O thread: so long the others wait.
_TURN = 0.005

# One message may take longer, if its kernel means it to. After so long a turn comes a pause, several times as
# long: what others ask passes the I/O thread several times, and must not meet such a message each time. What
# counts is the time that it takes of this thread: on a busy machine others take theirs in between. And a
# pause must not look as if the kernel had nothing more to say.
_LONG_TURN = 0.05
_PAUSE = 4
_LONGEST_PAUSE = 2.0

_CHUNK = 64 * 1024

# sendmsg(2) takes no more (IOV_MAX).
_MOST_PIECES = 1024

# Seconds until a connection that was not to be had is tried again: soon, as that is what the start of a
# kernel waits for, and later when it takes long.
_SOONEST, _LATEST = 0.005, 0.1

_KINDS: Mapping[Channel, str] = {"shell": "DEALER", "stdin": "DEALER", "control": "DEALER", "iopub": "SUB"}

_SUBSCRIBE_TO_ALL = b"\1"


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
        max_message: bytes; a message that is larger is skipped, and costs nothing.

    Attributes:
        dropped: how many messages were, by why.
        lost: called with the channel and how it was, when a message was skipped.
        cut: not called: what libzmq's peers do with a lost connection is seen by ``iopub_welcome``.
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
        self.lost: Callable[[Channel, str], None] = _nothing
        self.cut: Callable[[bool], None] = _nothing
        self._loop = loop
        self._connection = connection
        self._identity = identity.encode()
        self._receive = receive
        self._max_message = max_message
        self._codec = WireCodec(connection.key.encode())
        self._channels: dict[Channel, _Connection] = {}
        self._closed = False

    def open(self) -> None:
        """Connect; the kernel need not listen yet."""
        # iopub first: what is published before its subscription has arrived is lost (libzmq guide,
        # "slow joiner"). stdin at once: a ROUTER drops what it sends to a peer that is not there yet.
        for name in ("iopub", "shell", "stdin"):
            self._channel(name)

    def send(self, message: Message) -> None:
        """Send *message*; from any thread. It is encoded here, in the caller's time."""
        pieces = framed(self._codec.encode(message))
        if self._loop.is_here():
            self._send_pieces(message.channel, pieces)
        else:
            self._loop.call_soon(lambda: self._send_pieces(message.channel, pieces))

    def close(self) -> None:
        self._closed = True
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def _send_pieces(self, name: Channel, pieces: list[memoryview]) -> None:
        if not self._closed:
            self._channel(name).send(pieces)

    def _channel(self, name: Channel) -> _Connection:
        # control costs a descriptor and is seldom needed: it is opened when it is.
        if name not in self._channels:
            self._channels[name] = _Connection(self, name)
            self._channels[name].open()
        return self._channels[name]

    def _decode(self, name: Channel, frames: list[bytes]) -> None:
        try:
            message = self._codec.decode(frames, name)
        except WireError as error:
            self.dropped[error.reason] += 1
            _log.debug("dropped a message on %s: %s", name, error)
            return
        self._receive(message)

    def _skipped(self, name: Channel, count: int) -> None:
        self.dropped["too large"] += count
        self.lost(name, f"larger than {self._max_message / 1024**2:g} MiB")

    def _broke_off(self, name: Channel, error: ZmtpError) -> None:
        self.dropped["malformed"] += 1
        _log.debug("broke off %s: %s", name, error)


class _Connection:
    """One channel: connected, and again when it was lost, until it is closed."""

    def __init__(self, transport: ZmqTransport, name: Channel) -> None:
        self._transport = transport
        self._name = name
        self._loop = transport._loop
        self._closed = False
        self._socket: socket.socket | None = None
        self._reader = MessageReader(0)
        self._is_talking = False
        self._received: deque[list[bytes]] = deque()
        self._outgoing: deque[list[memoryview]] = deque()
        self._unsent: deque[memoryview] = deque()
        self._sends_message = self._is_blocked = False
        self._again: Timer | None = None
        self._paused: Timer | None = None
        self._away_since = time.monotonic()

    def open(self) -> None:
        """Connect, or try again soon.

        Raises:
            OSError: there can be no such address, or there are too few descriptors.
        """
        transport = self._transport
        self._reader = MessageReader(transport._max_message)
        identity = b"" if self._name == "iopub" else transport._identity
        self._unsent.append(memoryview(hello(_KINDS[self._name], identity)))
        connection, is_connected = _connect(transport._connection, self._name)
        if connection is None:
            self._lose()
            return
        self._socket = connection
        self._loop.add_reader(connection.fileno(), self._read)
        if is_connected:
            self._write()
        else:
            self._write_when_possible()

    def send(self, pieces: list[memoryview]) -> None:
        self._outgoing.append(pieces)
        self._write()

    def close(self) -> None:
        self._closed = True
        self._disconnect()
        self._received.clear()
        self._outgoing.clear()
        if self._again is not None:
            self._again.cancel()

    def _disconnect(self) -> None:
        self._unsent.clear()
        self._is_talking = self._sends_message = self._is_blocked = False
        self._loop.forget(self._read)
        if self._socket is not None:
            connection, self._socket = self._socket, None
            if self._paused is None:
                self._loop.remove_reader(connection.fileno())
            connection.close()
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None

    def _lose(self) -> None:
        now = time.monotonic()
        if self._is_talking:
            self._away_since = now
        self._disconnect()
        patience = min(_LATEST, max(_SOONEST, (now - self._away_since) / 50))
        self._again = self._loop.call_later(patience, self._open_again)

    def _open_again(self) -> None:
        try:
            self.open()
        except OSError as error:  # too few descriptors, mostly: there may be more later
            _log.debug("could not connect %s: %s", self._name, error)
            self._lose()

    def _read(self) -> None:
        begun, used = time.monotonic(), time.thread_time()
        try:
            while not self._closed and (self._received or self._receive()):
                if self._received:
                    self._transport._decode(self._name, self._received.popleft())
                if time.monotonic() - begun >= _TURN:
                    return
        finally:
            took = time.thread_time() - used
            if took > _LONG_TURN and self._socket is not None and self._paused is None:
                self._pause(min(_LONGEST_PAUSE, _PAUSE * took))
            elif self._received:
                self._loop.call_again(self._read)

    def _pause(self, seconds: float) -> None:
        assert self._socket is not None
        self._loop.remove_reader(self._socket.fileno())
        self._paused = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._paused = None
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self._read)
            if self._is_blocked:
                self._write_when_possible()
        self._read()

    def _receive(self) -> bool:
        """Read once; False if there is nothing to be read now."""
        if self._socket is None:
            return False
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # reset, or refused
            data = b""
        if data:
            try:
                self._received += self._reader.feed(data)
            except ZmtpError as error:
                self._transport._broke_off(self._name, error)
                data = b""
        if not data:
            self._lose()
            return False
        if self._reader.skipped:
            self._transport._skipped(self._name, self._reader.skipped)
            self._reader.skipped = 0
        if self._reader.is_ready and not self._is_talking:
            self._talk()
        return True

    def _talk(self) -> None:
        """The peer is ready."""
        self._is_talking = True
        if self._name == "iopub":
            self._unsent += framed([_SUBSCRIBE_TO_ALL])
        self._write()

    def _write(self) -> None:
        while self._socket is not None and not self._is_blocked:
            if not self._unsent:
                if not (self._is_talking and self._outgoing):
                    return
                self._unsent += self._outgoing[0]
                self._sends_message = True
            try:
                sent = self._socket.sendmsg(islice(self._unsent, _MOST_PIECES))
            except BlockingIOError:
                self._write_when_possible()
            except OSError:  # it is gone; what it has sent before is still to be read
                self._is_blocked = True
            else:
                self._has_sent(sent)

    def _has_sent(self, count: int) -> None:
        while self._unsent and count >= len(self._unsent[0]):
            count -= len(self._unsent.popleft())
        if count:
            self._unsent[0] = self._unsent[0][count:]
        if not self._unsent and self._sends_message:
            self._outgoing.popleft()  # not before: of a message that was cut off the kernel has nothing
            self._sends_message = False

    def _write_when_possible(self) -> None:
        if self._socket is not None:
            self._is_blocked = True
            if self._paused is None:
                self._loop.call_when_writable(self._socket.fileno(), self._write_on)

    def _write_on(self) -> None:
        self._is_blocked = False
        self._write()


def _connect(info: ConnectionInfo, channel: Channel) -> tuple[socket.socket | None, bool]:
    """A socket, and whether it is connected already; None if nobody listens yet.

    Raises:
        OSError: it is not a matter of waiting.
    """
    is_ipc = info.transport == "ipc"
    connection = socket.socket(socket.AF_UNIX if is_ipc else socket.AF_INET, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        if is_ipc:
            connection.connect(f"{info.ip}-{info.ports[channel]}")
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.connect((info.ip, info.ports[channel]))
    except BlockingIOError:
        if not is_ipc:
            return connection, False
        connection.close()  # its queue is full (connect(2), EAGAIN): none is under way
        return None, False
    except (FileNotFoundError, ConnectionError):
        connection.close()
        return None, False
    except BaseException:
        connection.close()
        raise
    return connection, True


def _nothing(*_: object) -> None:
    return
