"""A real server in a process of its own: started, waited for, asked, restarted where it was, ended.

What is special about a kind of server is in its own file. All of them run in a clean environment, with
their home and their Jupyter folders in the folder that they are given. Their kernels run on the Python of the
tests, whatever the server runs on.
"""

from __future__ import annotations

import json as json_of
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

import psutil
import requests

from tests.servers.installed import Installation
from tests.servers.processes import MARK, end_marked, marked, new_mark
from tests.servers.unix_http import UnixAdapter

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Server", "ServerStartError", "free_port"]

# Time-outs are for what has gone wrong; nothing that works takes that long.
_START = 90.0
_STOP = 30.0
_ANSWER = 60.0

# The longest name that a Unix socket may have everywhere (sockaddr_un on macOS: 104 with its end).
_LONGEST_SOCKET = 100


class ServerStartError(Exception):
    """A server did not start: what it has said."""


class Server(ABC):
    """One server; the address and the token are the same for as long as this object is used.

    ``settings`` are traits by their full name, such as ``{"MappingKernelManager.cull_idle_timeout": 5}``, and
    win over those that are made here. They are written to a file that others cannot read, as everybody can
    read a command line.
    """

    installations: ClassVar[tuple[Installation, ...]]
    """What has to be installed for it."""

    _READY: ClassVar[str] = "/api"

    def __init__(
        self,
        folder: Path,
        *,
        base_url: str = "/",
        unix: bool = False,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = folder
        self.settings = dict(settings or {})
        self.token = secrets.token_hex(24)
        self.log = folder / "server.log"
        self.base = base_url.rstrip("/")
        self.socket = folder / "socket" if unix else None
        self.port = 0 if unix else free_port()
        self._mark = new_mark()
        self._process: subprocess.Popen[bytes] | None = None
        if self.socket and len(os.fsencode(self.socket)) > _LONGEST_SOCKET:
            raise ValueError(f"too long for the name of a Unix socket: {self.socket}")
        for each in (self.home, self.files, self._jupyter("runtime")):
            each.mkdir(parents=True, exist_ok=True)
        python = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self.install_kernel("python3", python, display_name="Python 3", language="python")

    # Where it is, and what it is made of.

    @property
    def url(self) -> str:
        """Its address without a slash at the end: ``http://127.0.0.1:port/base``, or ``http+unix://%2F.../base``."""
        place = f"http+unix://{quote(str(self.socket), safe='')}" if self.socket else self._local_url
        return place + self.base

    @property
    def _local_url(self) -> str:
        # On a Unix socket it is the name of the host that matters: servers refuse others than this.
        return "http://localhost" if self.socket else f"http://127.0.0.1:{self.port}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def files(self) -> Path:
        """What the contents API shows, and where kernels are."""
        return self.folder / "files"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server itself. Who ends it alone, by this, leaves all that it has started; see :meth:`kill`."""
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process

    def processes(self) -> list[psutil.Process]:
        """Those of the server and of all that it has started, kernels included."""
        return marked(self._mark)

    def install_kernel(self, name: str, argv: list[str], **more: object) -> str:
        """Have a kernelspec, also while the server runs; returns its name."""
        folder = self._jupyter("path") / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        # Gateways give kernels next to nothing of their own environment when a client sends some.
        environment = {MARK: self._mark, "IPYTHONDIR": str(self.folder / "ipython")}
        spec = {"argv": argv, "display_name": name, "language": name, "env": environment} | more
        (folder / "kernel.json").write_text(json_of.dumps(spec))
        return name

    # Its life.

    def start(self) -> Self:
        """Start it, and wait until it answers.

        Raises:
            NotInstalledError: it is not on this machine, and could not be installed.
            ServerStartError: it ended, or does not answer.
        """
        if self._process is not None and self._process.poll() is None:
            raise RuntimeError("the server runs already")
        self._write_config()
        if self.socket:
            self.socket.unlink(missing_ok=True)  # that of one that was killed
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:  # including Ctrl-C: nobody else knows of it
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """Ask it to end, which ends its kernels, and kill what is left of it then."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP)
            except subprocess.TimeoutExpired:
                self._log_line(f"did not end within {_STOP:g} s of SIGTERM, and is killed")
        self.kill()

    def kill(self) -> None:
        """SIGKILL for it and for all that it has started; returns when none of them is left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        end_marked(self._mark)

    def restart_on_same_address(self) -> None:
        """Stop it and start it: same address, token, folder. (A crash is :meth:`kill` and :meth:`start`.)"""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # Asking it.

    def request(
        self,
        method: str,
        path: str,
        json: object = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Ask for *path* below :attr:`url`, with *token* or its own in the header. Redirects are answers."""
        with requests.Session() as session:
            session.trust_env = False  # neither proxies nor a netrc of who runs the tests
            if self.socket:
                session.mount("http://", UnixAdapter(self.socket))
            return session.request(
                method,
                self._local_url + self.base + path,
                json=json,
                headers={"Authorization": f"token {self.token if token is None else token}"}
                | dict(headers or {}),
                allow_redirects=False,
                timeout=_ANSWER,
            )

    # What a kind of server says of itself.

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _config(self) -> dict[str, object]:
        """Traits by their full name."""

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            # An Enterprise Gateway starts no kernels for root.
            "USER": "tester",
            "LOGNAME": "tester",
            "IPYTHONDIR": str(self.folder / "ipython"),
            "JUPYTER_CONFIG_DIR": str(self._jupyter("config")),
            "JUPYTER_DATA_DIR": str(self._jupyter("data")),
            "JUPYTER_RUNTIME_DIR": str(self._jupyter("runtime")),
            "JUPYTER_PATH": str(self._jupyter("path")),
            MARK: self._mark,
        }

    # Inside.

    @property
    def _config_file(self) -> Path:
        return self.folder / "server_config.py"

    def _jupyter(self, kind: str) -> Path:
        return self.folder / "jupyter" / kind

    def _write_config(self) -> None:
        traits = self._config() | self.settings
        lines = [f"c.{name} = {value!r}\n" for name, value in traits.items()]
        self._config_file.unlink(missing_ok=True)
        descriptor = os.open(self._config_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.writelines(lines)

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + _START
        while not self._is_ready():
            if (status := self.process.poll()) is not None:
                raise ServerStartError(f"the server ended with status {status}: {self._end_of_log()}")
            if time.monotonic() > give_up:
                raise ServerStartError(f"no answer within {_START:g} s: {self._end_of_log()}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        try:
            return self.request("GET", self._READY).status_code == 200
        except (requests.ConnectionError, requests.Timeout):
            return False

    def _end_of_log(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def _log_line(self, line: str) -> None:
        with self.log.open("a") as log:
            log.write(f"[tests] {line}\n")


_given: set[int] = set()


def free_port() -> int:
    """One that nobody listens at, and that the system gives to nobody while the server that has it is down.

    For that it is below those that systems give out by themselves (from 32768 on Linux, else from 49152).
    """
    while True:
        port = random.randrange(20000, 32000)
        if port in _given:
            continue
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
