"""The least that a client of a Jupyter kernel can do: one DEALER, one SUB, the calling thread reads.

No thread, no timeout handling, no notion of outputs: it is the floor that ours is compared with. Source: the
Jupyter messaging documentation, section "The Wire Protocol".
"""

from __future__ import annotations

import hmac
import json
import os
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import zmq

__all__ = ["MinimalClient"]

_DELIMITER = b"<IDS|MSG>"

Output = Callable[[str, Mapping[str, object]], object]


class MinimalClient:
    """Connected to the kernel that *connection_file* describes; :meth:`wait_ready` before use."""

    def __init__(self, connection_file: Path) -> None:
        info = json.loads(connection_file.read_text())
        self._session = os.urandom(16).hex()
        self._hmac = hmac.new(info["key"].encode(), digestmod=sha256)
        self._sent = 0
        self._context = zmq.Context()
        self._iopub = self._connect(zmq.SUB, info, "iopub")
        self._iopub.subscribe(b"")
        self._shell = self._connect(zmq.DEALER, info, "shell")
        self._poller = zmq.Poller()
        self._poller.register(self._shell, zmq.POLLIN)
        self._poller.register(self._iopub, zmq.POLLIN)

    def execute(self, code: str, on_output: Output | None = None) -> Mapping[str, object]:
        """Run *code*; the content of its reply, when its idle status has come as well."""
        content: Mapping[str, object] = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": True,
        }
        request = self._send("execute_request", content)
        reply: Mapping[str, object] | None = None
        idle = False
        while reply is None or not idle:
            for socket, _ in self._poller.poll():
                header, parent, content = self._receive(socket)
                if parent.get("msg_id") != request:
                    continue
                if socket is self._shell:
                    reply = content
                elif header["msg_type"] != "status":
                    if on_output is not None:
                        on_output(str(header["msg_type"]), content)
                elif content["execution_state"] == "idle":
                    idle = True
        return reply

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Until the kernel answers and its iopub is heard."""
        waiting = {self._shell, self._iopub}
        give_up = time.monotonic() + timeout
        self._send("kernel_info_request", {})
        while waiting:
            ready = self._poller.poll(200)
            if time.monotonic() > give_up:
                raise TimeoutError(f"no answer of the kernel in {timeout:g} s")
            for socket, _ in ready:
                waiting.discard(socket)
                socket.recv_multipart()
            if self._shell not in waiting and not ready:
                self._send("kernel_info_request", {})
        self.drain()

    def drain(self) -> None:
        """Forget what has come: the answers to others on the same kernel, for instance."""
        while ready := self._poller.poll(0):
            for socket, _ in ready:
                socket.recv_multipart()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _connect(self, kind: int, info: Mapping[str, object], channel: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.rcvhwm = 0
        socket.reconnect_ivl = 5
        if kind == zmq.DEALER:
            socket.identity = self._session.encode()
        separator = "-" if info["transport"] == "ipc" else ":"
        socket.connect(f"{info['transport']}://{info['ip']}{separator}{info[f'{channel}_port']}")
        return socket

    def _send(self, msg_type: str, content: Mapping[str, object]) -> str:
        self._sent += 1
        msg_id = f"{self._session}_{self._sent}"
        header = {
            "msg_id": msg_id,
            "session": self._session,
            "username": "minimal",
            "msg_type": msg_type,
            "version": "5.4",
            "date": "2026-01-01T00:00:00.000000Z",
        }
        frames = [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()]
        self._shell.send_multipart([_DELIMITER, self._sign(frames), *frames])
        return msg_id

    def _receive(
        self, socket: zmq.Socket[bytes]
    ) -> tuple[Mapping[str, object], Mapping[str, object], Mapping[str, object]]:
        frames = socket.recv_multipart()
        start = frames.index(_DELIMITER)
        signature, *parts = frames[start + 1 : start + 6]
        if not hmac.compare_digest(self._sign(parts), signature):
            raise ValueError("a message with a signature that does not fit")
        return json.loads(parts[0]), json.loads(parts[1]), json.loads(parts[3])

    def _sign(self, parts: list[bytes]) -> bytes:
        digest = self._hmac.copy()
        for part in parts:
            digest.update(part)
        return digest.hexdigest().encode()
