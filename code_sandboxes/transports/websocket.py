"""The connection to one kernel behind a Jupyter server: one websocket for all its channels.

Source: RFC 6455; Jupyter Server documentation, "WebSocket kernel wire protocols". What a websocket is, the
library ``websockets`` knows (its Sans-I/O part); here are the socket, the deadlines, and what becomes of a
connection that is lost: while it is away the server keeps what the kernel sends, and gives it to whoever
comes back with the same ``session_id``.
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from code_sandboxes.protocol.kernel_websocket import SUBPROTOCOL, decode, encode
from code_sandboxes.protocol.messages import Channel, Message
from code_sandboxes.protocol.wire import WireError
from code_sandboxes.transports.dialling import dial_tcp, dial_unix
from code_sandboxes.transports.errors import MessageTooLargeError, PlaceGoneError
from code_sandboxes.transports.loop import Loop, Timer

if TYPE_CHECKING:
    from websockets.client import ClientProtocol
    from websockets.frames import Frame
    from websockets.http11 import Response

__all__ = ["WebSocketAddress", "WebSocketTransport"]

_log = logging.getLogger(__name__)

MOST_SENT = 8 * 1024**2
"""Bytes of a message that goes out: a server closes the connection at 10 MiB (tornado's default)."""

# Seconds: proxies cut what is silent for 30 or 60. An answer to a ping that does not come in the time of two
# more means that nobody is there.
_PING_EVERY = 10.0
_SILENT_FOR = 25.0

# Seconds until a connection that was not to be had is tried again, and for how long it is.
_SOONEST, _LATEST = 0.1, 2.0
_PATIENCE = 30.0

# Seconds for name, connection, TLS, and then for the answer to the opening. A server may ask the kernel first
# whether it is there.
_DIAL = 10.0
_OPENING = 70.0

# Seconds for which one connection may keep the I/O thread: so long the others wait.
_TURN = 0.005

_CHUNK = 256 * 1024

# TCP_QUICKACK, see tcp(7): Linux alone has it.
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)

# Who gets one of these, or is sent to another page, gets it the next time, too.
_FINAL = (401, 403, 404)


@dataclass(frozen=True, slots=True)
class WebSocketAddress:
    """Where a kernel's channels are.

    Args:
        url: ``ws://`` or ``wss://``, with no secret in it.
        headers: of the opening.
        unix_socket: the path of the socket on which the server listens, in place of the host in *url*.
        tls: for ``wss://``.
        dialler: makes the connections, in place of looking for the host in *url*.
    """

    url: str
    headers: Mapping[str, str] = field(repr=False)
    unix_socket: str | None = None
    tls: ssl.SSLContext | None = None
    dialler: Callable[[], socket.socket] | None = field(default=None, repr=False)

    def dial(self) -> socket.socket:
        """A connection, ready for the opening of the websocket; blocks.

        Raises:
            PlaceGoneError: nobody will listen there any more.
            OSError: nobody listens there, or is who he says he is.
        """
        if self.dialler is not None:
            return self.dialler()
        if self.unix_socket is not None:
            return dial_unix(self.unix_socket)
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        port = parts.port or (443 if parts.scheme == "wss" else 80)
        return dial_tcp(parts.hostname, port, self.tls)


class WebSocketTransport:
    """Sends and receives the messages of one kernel; in the I/O thread, but for :meth:`send`.

    Args:
        receive: called with each message that has the form of one.
        max_message: bytes; the connection on which a larger one comes is broken off and made again.

    Attributes:
        dropped: how many messages were, by why.
        lost: called with the channel and how it was, when a message was dropped that was too large.
        cut: called with True when the connection is lost, and with it what was on its way; with False when
            it is there again.
        broken: called once when there is no connection any more, with the reason, and with the HTTP status
            that the server has answered with, if it has.
    """

    def __init__(
        self,
        loop: Loop,
        address: WebSocketAddress,
        receive: Callable[[Message], None],
        max_message: int,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self.lost: Callable[[Channel, str], None] = _nothing
        self.cut: Callable[[bool], None] = _nothing
        self.broken: Callable[[str, int | None], None] = _nothing
        self._loop = loop
        self._address = address
        self._receive = receive
        self._max_message = max_message
        self._closed = False
        self._socket: socket.socket | None = None
        self._protocol: ClientProtocol | None = None
        self._is_open = self._was_open = self._is_v1 = False
        self._why_ending = ""
        self._waiting: deque[Message] = deque()
        self._fragments: list[Frame] = []
        self._frames: deque[Frame] = deque()
        self._unsent: deque[memoryview] = deque()
        self._is_blocked = False
        self._away_since = time.monotonic()
        self._last_sign = 0.0
        self._timer: Timer | None = None

    def open(self) -> None:
        """Connect; messages that are sent before that is done, wait for it."""
        self._dial()

    def send(self, message: Message) -> None:
        """Send *message*; from any thread.

        Raises:
            MessageTooLargeError: no server would take it.
        """
        size = sum(memoryview(buffer).nbytes for buffer in message.buffers)
        is_v1 = self._is_v1  # which another thread may change now
        data = encode(message, is_v1=is_v1) if size <= MOST_SENT else b""
        size = max(size, len(data))
        if size > MOST_SENT:
            raise MessageTooLargeError(
                f"a message of {size} bytes: a Jupyter server takes no more than {MOST_SENT // 1024**2} MiB"
            )
        if self._loop.is_here():
            self._send(message, data)
        else:
            self._loop.call_soon(lambda: self._send(message, data if is_v1 is self._is_v1 else None))

    def close(self) -> None:
        self._closed = True
        if self._is_open and self._protocol is not None:
            self._protocol.send_close(1000)  # so that the server does not keep anything for us
            self._write()
        self._disconnect()
        self._waiting.clear()

    # Connecting.

    def _dial(self) -> None:
        self._timer = None
        self._loop.run_blocking(self._reach, self._dialled, apart=True)

    def _reach(self) -> socket.socket:
        import websockets.client  # noqa: F401  (which takes a while: here nobody waits for it)

        return self._address.dial()

    def _dialled(self, connection: socket.socket | None, error: Exception | None) -> None:
        if isinstance(error, PlaceGoneError) and not self._closed:
            self._break(str(error), None)
            return
        if connection is None:
            self._try_again(f"{type(error).__name__}: {error}")
            return
        if self._closed:
            connection.close()
            return
        from websockets.client import ClientProtocol
        from websockets.typing import Subprotocol
        from websockets.uri import parse_uri

        connection.setblocking(False)
        self._socket = connection
        self._protocol = protocol = ClientProtocol(
            parse_uri(self._address.url),
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            max_size=self._max_message,
            logger=_quiet,
        )
        request = protocol.connect()
        request.headers.update(self._address.headers)
        protocol.send_request(request)
        self._last_sign = time.monotonic()
        self._loop.add_reader(connection.fileno(), self._read)
        self._timer = self._loop.call_later(
            self._patience(), lambda: self._lose("the server did not answer in time")
        )
        self._write()

    def _patience(self) -> float:
        """With the opening, in seconds. A kernel that was there need not be waited for."""
        if not self._was_open:
            return _OPENING
        return max(_DIAL, _PATIENCE - (time.monotonic() - self._away_since))

    def _opened(self) -> None:
        assert self._protocol is not None
        if self._timer is not None:
            self._timer.cancel()
        self._is_v1 = self._protocol.subprotocol is not None
        self._is_open = True
        self._timer = self._loop.call_later(_PING_EVERY, self._look_after)
        again, self._was_open = self._was_open, True
        waiting, self._waiting = self._waiting, deque()
        for message in waiting:
            self._send(message, None)
        if again:
            self.cut(False)

    def _try_again(self, why: str) -> None:
        if self._closed:
            return
        away_for = time.monotonic() - self._away_since
        if away_for > _PATIENCE:
            self._break(why, None)
            return
        self._timer = self._loop.call_later(min(_LATEST, max(_SOONEST, away_for / 5)), self._dial)

    def _break(self, why: str, status: int | None) -> None:
        self._closed = True
        self._disconnect()
        self.broken(why, status)

    # Losing.

    def _lose(self, why: str) -> None:
        was_open = self._is_open
        _log.debug("lost the connection to %s: %s", self._address.url, why)
        self._disconnect()
        if was_open:
            self._away_since = time.monotonic()
            self.cut(True)
        self._try_again(why)

    def _disconnect(self) -> None:
        self._is_open = self._is_blocked = False
        self._why_ending = ""
        self._unsent.clear()
        self._frames.clear()
        self._fragments.clear()
        self._protocol = None
        self._loop.forget(self._read)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            connection, self._socket = self._socket, None
            self._loop.remove_reader(connection.fileno())
            connection.close()

    def _look_after(self) -> None:
        """Nothing may be sent for long: a sign of life from here, and does any come from there?"""
        if not self._is_open or self._protocol is None:
            return
        if time.monotonic() - self._last_sign > _SILENT_FOR:
            self._lose(f"nothing was heard from the server for {_SILENT_FOR:g} s")
            return
        self._protocol.send_ping(b"")
        self._write()
        if self._is_open:
            self._timer = self._loop.call_later(_PING_EVERY, self._look_after)

    # Reading.

    def _read(self) -> None:
        begun = time.monotonic()
        while not self._closed:
            if self._frames:
                self._take_frame(self._frames.popleft())
            elif self._why_ending:
                self._has_ended()
                return
            elif not self._receive_some():
                break
            if time.monotonic() - begun >= _TURN:
                break
        if self._socket is not None and (self._frames or self._why_ending or self._has_more()):
            self._loop.call_again(self._read)

    def _has_more(self) -> bool:
        # What TLS has decrypted already, the selector does not know of.
        pending = getattr(self._socket, "pending", None)
        return pending is not None and pending() > 0

    def _receive_some(self) -> bool:
        """Read once; False if there is nothing to be read now."""
        if self._socket is None or self._protocol is None:
            return False
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as error:
            self._lose(str(error))
            return False
        self._last_sign = time.monotonic()
        self._acknowledge()
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        self._take_events(self._protocol)
        self._write()
        if self._protocol is not None and (not data or self._protocol.close_expected()):
            self._why_ending = _why_closed(self._protocol)
        return self._socket is not None

    def _acknowledge(self) -> None:
        # Tornado sends what is small only when what it has sent before is acknowledged (Nagle), which a
        # kernel may put off for 40 ms. This asks it not to; it forgets, so it is asked each time.
        if _QUICKACK is not None and self._socket is not None and self._address.unix_socket is None:
            try:
                self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
            except OSError:  # it is gone, which the next read says
                return

    def _take_events(self, protocol: ClientProtocol) -> None:
        for event in protocol.events_received():
            if self._is_open:
                self._frames.append(cast("Frame", event))
            elif protocol.handshake_exc is None:
                self._opened()
            else:
                self._refused(cast("Response", event).status_code)
                return
        if protocol.handshake_exc is not None:
            self._lose(str(protocol.handshake_exc))

    def _refused(self, status: int) -> None:
        """The server does not open a websocket, and says why with an HTTP status."""
        why = f"the server answered with the HTTP status {status}"
        if status in _FINAL or 300 <= status < 400:
            self._break(why, status)
        else:
            self._lose(why)

    def _has_ended(self) -> None:
        """The connection, of which all has been taken that came."""
        is_too_large = self._protocol is not None and _is_too_large(self._protocol)
        self._lose(self._why_ending)
        if is_too_large:
            self.dropped["too large"] += 1
            how = f"larger than {self._max_message / 1024**2:g} MiB"
            self.lost("iopub", how)  # which of the channels it was is not known
            self.lost("shell", how)

    def _take_frame(self, frame: Frame) -> None:
        from websockets.frames import Opcode

        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return  # the protocol has answered it
        self._fragments.append(frame)
        if not frame.fin:
            return
        frames, self._fragments = self._fragments, []
        whole = bytes(frames[0].data) if len(frames) == 1 else b"".join(each.data for each in frames)
        data = whole.decode("utf-8", "replace") if frames[0].opcode is Opcode.TEXT else whole
        try:
            message = decode(data, is_v1=self._is_v1)
        except WireError as error:
            self.dropped[error.reason] += 1
            _log.debug("dropped a message: %s", error)
            return
        self._receive(message)

    # Writing.

    def _send(self, message: Message, data: bytes | str | None) -> None:
        if self._closed:
            return
        if not self._is_open or self._protocol is None:
            self._waiting.append(message)
            return
        if data is None:
            data = encode(message, is_v1=self._is_v1)
        if isinstance(data, str):
            self._protocol.send_text(data.encode())
        else:
            self._protocol.send_binary(data)
        self._write()

    def _write(self) -> None:
        if self._protocol is not None:
            # An empty piece means that nothing more will be sent; the end of the connection says that, too.
            self._unsent += (memoryview(piece) for piece in self._protocol.data_to_send() if piece)
        while self._unsent and self._socket is not None and not self._is_blocked:
            try:
                sent = self._socket.send(self._unsent[0])
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._is_blocked = True
                self._loop.call_when_writable(self._socket.fileno(), self._write_on)
            except OSError:  # it is gone; what came before is still to be read
                self._unsent.clear()
            else:
                self._unsent[0] = self._unsent[0][sent:]
                if not self._unsent[0]:
                    self._unsent.popleft()

    def _write_on(self) -> None:
        self._is_blocked = False
        # What was sent has arrived, as there is room again. A ping behind much that is sent takes its time.
        self._last_sign = time.monotonic()
        self._write()


_quiet = logging.getLogger(f"{__name__}.protocol")
_quiet.setLevel(logging.CRITICAL)  # at DEBUG it would tell the headers, and in them the token


def _is_too_large(protocol: ClientProtocol) -> bool:
    return protocol.close_sent is not None and protocol.close_sent.code == 1009


def _why_closed(protocol: ClientProtocol) -> str:
    if _is_too_large(protocol):
        return "a message was too large"
    received = protocol.close_rcvd
    if received is None:
        return "the connection was closed"
    return f"the server closed the connection ({f'{received.code} {received.reason}'.strip()})"


def _nothing(*_: object) -> None:
    return
