"""A TCP forwarder in front of a server that spoils connections when it is told to.

What networks do to connections, and proxies, balancers and laptops that sleep: they reset them, end them,
stop to carry anything without saying so, end those that are idle, refuse new ones. Each is one method of
:class:`CuttingProxy`, and has happened when that returns.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import urlsplit

from tests.servers.server import free_port

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CuttingProxy", "Ending", "Way"]

Ending = Literal["reset", "end"]
"""How a connection is cut: by RST, as by one that crashed, or by FIN, as by one that closes it."""

Way = Literal["up", "down", "both"]
"""Towards the server, towards the client."""

T = TypeVar("T")

_CHUNK = 64 * 1024

# How much is taken from one side while the other does not read: then TCP makes the sender wait, as it should.
_HELD = 256 * 1024

# For what takes microseconds, or has gone wrong.
_PATIENCE = 10.0


class CuttingProxy:
    """Forwards from :attr:`url` to the server at *url*, in a thread of its own.

    ``with CuttingProxy(server.url) as proxy:`` has it listen at a free port of the loopback interface.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "ws") or parts.hostname is None or parts.port is None:
            raise ValueError(f"it takes an address with a host and a port, not {url}")
        self._server = (parts.hostname, parts.port)
        self.port = free_port()
        self.url = parts._replace(netloc=f"127.0.0.1:{self.port}").geturl()
        self.connections = 0
        """How many there have been; see :attr:`open_connections`."""
        self.bytes_up = 0
        self.bytes_down = 0
        self._pairs: list[_Pair] = []
        self._stalled: set[str] = set()
        self._idle: tuple[float, Ending] | None = None
        self._listener: socket.socket | None = None
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._awaken, self._awoken = socket.socketpair()
        self._runs = True
        self._thread = threading.Thread(target=self._run, name="cutting-proxy", daemon=True)

    @property
    def open_connections(self) -> int:
        return len(self._pairs)

    # What it is told.

    def cut(self, ending: Ending = "reset") -> int:
        """Cut all connections, on both sides; tells how many those were. What is under way is lost."""

        def cut() -> int:
            pairs = list(self._pairs)
            for pair in pairs:
                self._drop(pair, ending)
            return len(pairs)

        return self._order(cut)

    def stall(self, way: Way = "both") -> None:
        """Carry nothing more that way, not even an end, nor say so; also on connections to come."""

        def stall() -> None:
            self._stalled |= {"up", "down"} if way == "both" else {way}

        self._order(stall)

    def resume(self) -> None:
        """End all stalls; what was sent meanwhile is carried now."""

        def resume() -> None:
            self._stalled.clear()
            for pair in self._pairs:
                pair.last_traffic = time.monotonic()

        self._order(resume)

    def cut_idle(self, seconds: float | None, ending: Ending = "end") -> None:
        """From now on cut what has had no traffic for *seconds*; ``None``: no more."""

        def cut_idle() -> None:
            self._idle = None if seconds is None else (seconds, ending)

        self._order(cut_idle)

    def refuse(self) -> None:
        """From now on nobody listens: who connects is refused. The connections there are stay."""
        self._order(self._stop_listening)

    def accept(self) -> None:
        """End :meth:`refuse`."""
        self._order(self._listen)

    def start(self) -> Self:
        self._listen()
        self._selector.register(self._awoken, selectors.EVENT_READ)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening, and reset what is open. May be called again."""

        def end() -> None:
            self._runs = False

        if self._thread.is_alive():
            self._order(end)
            self._thread.join(_PATIENCE)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _order(self, order: Callable[[], T]) -> T:
        """Have the thread do it, which alone has to do with sockets."""
        done: Future[T] = Future()

        def carry_out() -> None:
            try:
                done.set_result(order())
            except OSError as error:  # such as no port to listen at: it is for who gave the order
                done.set_exception(error)

        self._orders.put(carry_out)
        self._awaken.send(b"\0")
        return done.result(_PATIENCE)

    # In the thread.

    def _run(self) -> None:
        try:
            while self._runs:
                for key, events in self._selector.select(self._time_to_idle()):
                    self._turn(key, events)
                self._cut_idle_ones()
                for pair in self._pairs:
                    self._watch(pair)
        finally:
            for pair in list(self._pairs):
                self._drop(pair, "reset")
            self._stop_listening()
            self._selector.close()
            self._awaken.close()
            self._awoken.close()

    def _turn(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._awoken:
            self._awoken.recv(_CHUNK)
            while not self._orders.empty():
                self._orders.get()()
        elif key.data is None:
            self._take_connection()
        elif key.data in self._pairs:  # an order may have cut it since
            self._carry(key.data)

    def _listen(self) -> None:
        if self._listener is None:
            listener = socket.create_server(("127.0.0.1", self.port))
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
            self._listener = listener

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _take_connection(self) -> None:
        if self._listener is None:
            return
        try:
            client, _ = self._listener.accept()
        except OSError:  # the client has gone again
            return
        self.connections += 1
        try:
            server = socket.create_connection(self._server, timeout=_PATIENCE)
        except OSError:  # there is no server: the client hears that as it would of one that crashes
            _close(client, "reset")
            return
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs.append(_Pair(_Flow("up", client, server), _Flow("down", server, client)))

    def _carry(self, pair: _Pair) -> None:
        try:
            for flow in pair.flows:
                if flow.way not in self._stalled:
                    self._count(flow, flow.carry(), pair)
        except OSError:  # one side was reset, so the other is, too
            self._drop(pair, "reset")
        else:
            if all(flow.has_ended for flow in pair.flows):
                self._drop(pair, "end")

    def _count(self, flow: _Flow, amount: int, pair: _Pair) -> None:
        if amount:
            pair.last_traffic = time.monotonic()
        if flow.way == "up":
            self.bytes_up += amount
        else:
            self.bytes_down += amount

    def _watch(self, pair: _Pair) -> None:
        """Have the selector wait for what can be done for *pair* now."""
        wanted = {pair.up.source: 0, pair.down.source: 0}
        for flow in pair.flows:
            if flow.way not in self._stalled:
                wanted[flow.source] |= selectors.EVENT_READ if flow.can_take else 0
                wanted[flow.sink] |= selectors.EVENT_WRITE if flow.held else 0
        for end, events in wanted.items():
            known = self._selector.get_map().get(end)
            if known is not None and known.events != events:
                self._selector.unregister(end)
            if events and (known is None or known.events != events):
                self._selector.register(end, events, pair)

    def _drop(self, pair: _Pair, ending: Ending) -> None:
        self._pairs.remove(pair)
        for end in (pair.up.source, pair.down.source):
            if end in self._selector.get_map():
                self._selector.unregister(end)
            _close(end, ending)

    def _time_to_idle(self) -> float | None:
        if self._idle is None or not self._pairs:
            return None
        first = min(pair.last_traffic for pair in self._pairs) + self._idle[0]
        return max(0.0, first - time.monotonic())

    def _cut_idle_ones(self) -> None:
        if self._idle is not None:
            seconds, ending = self._idle
            for pair in list(self._pairs):
                if time.monotonic() - pair.last_traffic >= seconds:
                    self._drop(pair, ending)


@dataclass(eq=False)
class _Flow:
    """One way of a connection."""

    way: Literal["up", "down"]
    source: socket.socket
    sink: socket.socket
    held: bytearray = field(default_factory=bytearray)
    source_has_ended: bool = False
    has_ended: bool = False

    @property
    def can_take(self) -> bool:
        return not self.source_has_ended and len(self.held) < _HELD

    def carry(self) -> int:
        """Take and pass on what goes without waiting; tells how much was passed on.

        Raises:
            OSError: one of the sides was reset.
        """
        if self.can_take:
            with contextlib.suppress(BlockingIOError):
                taken = self.source.recv(_CHUNK)
                self.held += taken
                self.source_has_ended = not taken
        passed = 0
        if self.held:
            with contextlib.suppress(BlockingIOError):
                passed = self.sink.send(self.held)
                del self.held[:passed]
        if self.source_has_ended and not self.held and not self.has_ended:
            self.has_ended = True
            self.sink.shutdown(socket.SHUT_WR)  # the other way may go on
        return passed


@dataclass(eq=False)
class _Pair:
    """A connection with a client, and the one with the server that was made for it."""

    up: _Flow
    down: _Flow
    last_traffic: float = field(default_factory=time.monotonic)

    @property
    def flows(self) -> tuple[_Flow, _Flow]:
        return self.up, self.down


def _close(end: socket.socket, ending: Ending) -> None:
    if ending == "reset":
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends RST then
    else:
        # Closing with anything unread sends RST, too (RFC 1122, 4.2.2.13).
        with contextlib.suppress(OSError):
            while end.recv(_CHUNK):
                pass
    end.close()
