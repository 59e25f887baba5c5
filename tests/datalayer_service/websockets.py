"""Websockets on their way through the ingress, and what may happen to them there."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from io import BufferedIOBase

from tests.datalayer_service.frames import Frame, close_frame, read_frame

__all__ = ["Faults", "Tunnel"]

_ABNORMAL = 1006  # no code at all: the connection ends without a close frame (RFC 6455, 7.1.5)


@dataclass
class _Plan:
    """What is to happen to the websockets of one runtime, those to come included."""

    duplicates: bool = False
    loses_heartbeats: bool = False
    closes_before: bytes | None = None
    close_code: int = _ABNORMAL
    refusals: int = 0
    refusal_status: int = 503


class Faults:
    """What happens to websockets; *name* is a runtime's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tunnels: list[Tunnel] = []
        self._plans: dict[str, _Plan] = {}

    # For tests

    def open(self, name: str) -> int:
        """How many websockets go through now; those that are stalled count until their server lets go."""
        return len(self._of(name))

    def wait_until_open(self, name: str, count: int = 1, seconds: float = 30.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.open(name) == count, seconds), (
                f"{self.open(name)} websockets of {name}"
            )

    def close(self, name: str, code: int = _ABNORMAL) -> None:
        """Close those that there are, stalled or not; 1006 is without a close frame."""
        for tunnel in self._of(name):
            tunnel.close(code)

    def close_before(self, name: str, holding: bytes = b"", code: int = _ABNORMAL) -> None:
        """Close the one on which the next message with *holding* in it comes, which is lost; once."""
        plan = self._plan(name)
        plan.closes_before, plan.close_code = holding, code

    def stall(self, name: str) -> None:
        """Lose everything on those that there are; neither end is told, not even of the other's end."""
        for tunnel in self._of(name):
            tunnel.is_stalled = True

    def duplicate(self, name: str, on: bool = True) -> None:
        """Deliver each message from the server twice."""
        self._plan(name).duplicates = on

    def lose_heartbeats(self, name: str, on: bool = True) -> None:
        """Lose pings and pongs, in both directions."""
        self._plan(name).loses_heartbeats = on

    def refuse(self, name: str, times: int, status: int = 503) -> None:
        """Answer the next *times* handshakes with *status*, in HTML."""
        plan = self._plan(name)
        plan.refusals, plan.refusal_status = times, status

    # For the service

    def takes_refusal(self, name: str) -> int | None:
        """The status that the handshake is refused with, if it is."""
        with self._changed:
            plan = self._plan(name)
            if plan.refusals == 0:
                return None
            plan.refusals -= 1
            return plan.refusal_status

    def takes_closing(self, name: str, frame: Frame) -> int | None:
        """The code to close with in the place of delivering *frame*, if so."""
        with self._changed:
            plan = self._plan(name)
            if plan.closes_before is None or not frame.is_message or plan.closes_before not in frame.raw:
                return None
            plan.closes_before = None
            return plan.close_code

    def passes(self, name: str, frame: Frame) -> bool:
        return not (self._plan(name).loses_heartbeats and frame.is_heartbeat)

    def copies(self, name: str, frame: Frame) -> int:
        return 2 if self._plan(name).duplicates and frame.is_message else 1

    def end(self, name: str, code: int) -> None:
        """The runtime ends: who is behind a stall does not hear of it."""
        for tunnel in self._of(name):
            if not tunnel.is_stalled:
                tunnel.close(code)

    def added(self, tunnel: Tunnel) -> None:
        with self._changed:
            self._tunnels.append(tunnel)
            self._changed.notify_all()

    def removed(self, tunnel: Tunnel) -> None:
        with self._changed:
            self._tunnels.remove(tunnel)
            self._changed.notify_all()

    def close_all(self) -> None:
        with self._changed:
            tunnels = list(self._tunnels)
        for tunnel in tunnels:
            tunnel.cut()

    def _of(self, name: str) -> list[Tunnel]:
        with self._changed:
            return [tunnel for tunnel in self._tunnels if tunnel.name == name]

    def _plan(self, name: str) -> _Plan:
        with self._changed:
            return self._plans.setdefault(name, _Plan())


class Tunnel:
    """One websocket, from its handshake on: a thread for each direction."""

    def __init__(self, name: str, client: socket.socket, server: socket.socket, faults: Faults) -> None:
        self.name = name
        self.is_stalled = False
        self._client = client
        self._server = server
        self._faults = faults
        self._is_closed = False
        self._writes_to_client = threading.Lock()
        # A client that does not read must not keep the service from closing.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))

    def carry(self, opened: bytes, from_client: BufferedIOBase, from_server: BufferedIOBase) -> None:
        """Until both ends have ended. The client hears that it is *opened* when faults can happen to it."""
        down = threading.Thread(
            target=self._carry_down, args=(from_server,), name="websocket-down", daemon=True
        )
        self._faults.added(self)
        try:
            self._client.sendall(opened)
            down.start()
            self._carry_up(from_client)
            down.join()
        finally:
            self._faults.removed(self)

    def close(self, code: int) -> None:
        """Close it towards both."""
        with self._writes_to_client, contextlib.suppress(OSError):  # the client may be gone
            self._is_closed = True
            if code == _ABNORMAL:
                self._client.shutdown(socket.SHUT_RDWR)
            else:
                self._client.sendall(close_frame(code))
                self._client.shutdown(socket.SHUT_WR)  # its own close frame is still to come
        _shut(self._server)

    def cut(self) -> None:
        """End both connections at once."""
        self._is_closed = True
        _shut(self._client)
        _shut(self._server)

    def _carry_up(self, stream: BufferedIOBase) -> None:
        with contextlib.suppress(OSError):  # the client has ended in the middle
            while (frame := read_frame(stream)) is not None:
                if not self.is_stalled and not self._is_closed and self._faults.passes(self.name, frame):
                    # If the server has ended, the client is about to see that.
                    with contextlib.suppress(OSError):
                        self._server.sendall(frame.raw)
        # The server of one that is stalled does not hear of the client's end: it finds out by its pings.
        if not self.is_stalled:
            _shut(self._server)

    def _carry_down(self, stream: BufferedIOBase) -> None:
        with contextlib.suppress(OSError):
            while (frame := read_frame(stream)) is not None:
                self._deliver(frame)
        if not self.is_stalled and not self._is_closed:
            _shut(self._client, socket.SHUT_WR)  # what is on its way to the client is still to arrive

    def _deliver(self, frame: Frame) -> None:
        if self.is_stalled or not self._faults.passes(self.name, frame):
            return
        if (code := self._faults.takes_closing(self.name, frame)) is not None:
            self.close(code)
        with self._writes_to_client:
            if not self._is_closed:
                self._client.sendall(frame.raw * self._faults.copies(self.name, frame))


def _shut(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        connection.shutdown(how)
