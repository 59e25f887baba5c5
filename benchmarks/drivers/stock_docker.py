"""A container with a Jupyter Server as one would use it: a kernel by REST, its messages by websocket."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import docker
import websocket

from benchmarks.drivers.service import serve, timed

_IMAGE = "code-sandboxes-jupyter:latest"
_INSIDE = "/run/server"


class StockDocker:
    """One container with one kernel at a time; it is reached by a Unix socket in a folder that both see."""

    def __init__(self) -> None:
        self._engine = docker.from_env()
        self._folder = Path("server").absolute()
        self._folder.mkdir()
        self._folder.chmod(0o777)
        self._container: Any = None
        self._channels: Any = None
        self._session = secrets.token_hex(16)

    def create(self) -> list[float]:
        """Seconds from the start of a container to its first result."""
        began = time.perf_counter()
        self._container = self._engine.containers.run(
            _IMAGE,
            [
                "jupyter-server",
                f"--ServerApp.sock={_INSIDE}/s",
                "--ServerApp.sock_mode=0666",
                "--IdentityProvider.token=",
                "--ServerApp.disable_check_xsrf=True",
                "--KernelManager.transport=ipc",
            ],
            detach=True,
            network_mode="none",
            volumes={str(self._folder): {"bind": _INSIDE, "mode": "rw"}},
        )
        while not self._is_there():
            time.sleep(0.01)
        number = json.loads(self._ask("POST", "/api/kernels", {"name": "python3"}))["id"]
        connection = self._connect()
        self._channels = websocket.create_connection(
            f"ws://localhost/api/kernels/{number}/channels?session_id={self._session}", socket=connection
        )
        self._execute("1+1")
        return [time.perf_counter() - began]

    def run(self, code: str, repetitions: int) -> list[float]:
        """Seconds of each execution, up to its idle status."""
        return timed(lambda: self._execute(code), repetitions)

    def end(self) -> list[float]:
        """Seconds that its removal takes."""
        container, self._container = self._container, None
        began = time.perf_counter()
        if container is not None:
            self._channels.close()
            container.remove(force=True)
            (self._folder / "s").unlink(missing_ok=True)
        return [time.perf_counter() - began]

    def _is_there(self) -> bool:
        try:
            self._connect().close()
        except OSError:
            return False
        return True

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.path.relpath(self._folder / "s"))
        return connection

    def _ask(self, method: str, path: str, body: object) -> bytes:
        asking = http.client.HTTPConnection("localhost")
        asking.sock = self._connect()
        asking.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = asking.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{path}: {answer.status} {content!r}")
        return content

    def _execute(self, code: str) -> None:
        number = secrets.token_hex(16)
        header = {"msg_id": number, "session": self._session, "msg_type": "execute_request", "version": "5.3"}
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
        request = {
            "header": {**header, "username": "", "date": ""},
            "parent_header": {},
            "metadata": {},
            "content": content,
            "channel": "shell",
        }
        self._channels.send(json.dumps(request))
        missing = {"execute_reply", "idle"}
        while missing:
            message = json.loads(self._channels.recv())
            if message["parent_header"].get("msg_id") == number:
                missing.discard(message["msg_type"])
                missing.discard(message["content"].get("execution_state", ""))


if __name__ == "__main__":
    stock = StockDocker()
    serve({"create": stock.create, "run": stock.run, "end": stock.end}, stock.end)
