"""The first process in a container of an engine elsewhere: has a Jupyter server, ends when nobody is there.

Run as ``python -I -S -c <this> <config>``, JSON, as no file of the program's machine can be shown there.
Programs reach it and its server through ``guest/relay.py``, which the engine runs in the container for them.
While such relays run, somebody is there. When none has been for a while, and nobody has asked for it to go
on, this process ends, and with it everything in the container; and when the sandbox's lifetime is over.

Code in the container cannot speak to it: what a process outside of the container has started has no parent in
here, and this heeds nobody else. Nor can it hold a relay up, as that is another user's, or end this process
(pid_namespaces(7)).

Each message is a line of JSON, each answered by one. ``attend``: count me, and answer when the server does.
``about``: what there is to know. ``keep``: remember these values, and forget those that are null.
``detach``: go on although nobody is there. ``leave``: whoever asks is about to go; if nobody else is there,
end at once. ``lifetime``: end in so many seconds.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

PIECE = 65536

# Bytes of a request, and of what is remembered for programs.
LONGEST = 16 * 1024**2

# Bytes of what the server has said last.
KEPT = 4096

# Seconds between two looks whether a server that has begun answers already, or for how long nobody was there.
SOON, LATE = 0.02, 1.0

# A server that has ended is begun again, but not if it did so within so many seconds.
TOO_SOON = 5.0

# Seconds for which somebody may have said that he is about to leave.
LEAVING = 5.0

# Where control groups tell how many processes have been ended for want of memory (cgroups(7), versions 2, 1).
OOM_KILLS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


class Server:
    """The Jupyter server: begun at once, and again if it ends."""

    def __init__(self, config: dict[str, Any], prepare: Any) -> None:
        self.command = config["command"]
        self.env = {**os.environ, **config["env"]}
        self.cwd = config["cwd"]
        self.socket = config["socket"]
        self.prepare = prepare
        self.said = b""
        self.start()

    def start(self) -> None:
        self.answers = False
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            env=self.env,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=self.prepare,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.output, False)

    def look(self) -> bool:
        """Does it answer?"""
        if not self.answers:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
                knocking.setblocking(False)
                try:
                    knocking.connect(self.socket)
                    self.answers = True
                except OSError:  # not yet
                    pass
        return self.answers

    def hear(self) -> bool:
        """Take what it has to say; False at the end."""
        try:
            said = os.read(self.output, PIECE)
        except BlockingIOError:
            return True
        self.said = (self.said + said)[-KEPT:]
        return bool(said)

    def ended(self) -> None:
        """
        Raises:
            SystemExit: it makes no sense to start it again.
        """
        assert self.process.stdout is not None
        while select.select([self.output], [], [], 0)[0] and self.hear():
            pass
        self.process.stdout.close()
        if time.monotonic() - self.began < TOO_SOON:
            sys.exit(f"the Jupyter server has ended: {self.said.decode('utf-8', 'replace').strip()}")
        for pid in others():  # kernels that nobody knows of any more
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # it has just ended, or is a program's relay
                continue
        self.start()


class Client:
    """Whoever has connected."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.heard = b""
        self.attends = self.waits = False

    def lines(self) -> Iterator[bytes]:
        """What it has said, in whole lines.

        Raises:
            EOFError: it has hung up.
        """
        heard = self.connection.recv(PIECE)
        if not heard or len(self.heard) > LONGEST:
            raise EOFError
        *lines, self.heard = (self.heard + heard).split(b"\n")
        yield from lines

    def answer(self, value: Any) -> None:
        self.connection.sendall(json.dumps(value).encode() + b"\n")


class Steward:
    def __init__(self, config: dict[str, Any], listener: socket.socket, server: Server) -> None:
        self.grace: float = config["grace"]
        self.server = server
        self.listener = listener
        self.clients: set[Client] = set()
        self.kept: dict[str, Any] = {}
        self.detached = False
        self.leaving_until = 0.0
        self.ends_at: float | None = None
        # Whoever has made the container may take a while to come.
        self.alone_since = time.monotonic() + config["patience"] - self.grace
        self.selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Until the container is to end."""
        woken, waker = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.selector.register(woken, selectors.EVENT_READ, lambda: self.reap(woken))
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.hear_the_server()
        while not self.is_over():
            for key, _ in self.selector.select(LATE if self.server.look() else SOON):
                key.data()
            self.tell_who_waits()

    def is_over(self) -> bool:
        now = time.monotonic()
        if self.ends_at is not None and now >= self.ends_at:
            return True
        if self.detached or any(client.attends for client in self.clients):
            return False
        return now < self.leaving_until or now - self.alone_since >= self.grace

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        if not is_from_outside(connection):
            connection.close()
            return
        connection.settimeout(LEAVING)  # for answers
        client = Client(connection)
        self.clients.add(client)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self.hear(client))

    def hear(self, client: Client) -> None:
        try:
            for line in client.lines():
                self.take(client, json.loads(line))
        except (EOFError, OSError, ValueError):  # it has hung up, or is none of ours
            self.forget(client)

    def forget(self, client: Client) -> None:
        if client not in self.clients:
            return
        self.clients.discard(client)
        self.selector.unregister(client.connection)
        client.connection.close()
        if client.attends and not any(other.attends for other in self.clients):
            self.alone_since = time.monotonic()

    def take(self, client: Client, request: dict[str, Any]) -> None:
        if "attend" in request:
            client.attends = client.waits = True
            return
        for key, value in request.get("keep", {}).items():
            if value is None:
                self.kept.pop(key, None)
            else:
                self.kept[key] = value
        if "detach" in request:
            self.detached = True
        if "leave" in request:
            self.leaving_until = time.monotonic() + LEAVING
        if "lifetime" in request:
            self.ends_at = time.monotonic() + request["lifetime"]
        client.answer(self.about() if "about" in request else {})

    def about(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "detached": self.detached,
            "time_left": None if self.ends_at is None else self.ends_at - time.monotonic(),
            "oom_kills": oom_kills(),
        }

    def tell_who_waits(self) -> None:
        if not self.server.answers:
            return
        for client in [client for client in self.clients if client.waits]:
            client.waits = False
            try:
                client.answer({})
            except OSError:  # it has hung up
                self.forget(client)

    def hear_the_server(self) -> None:
        output = self.server.output

        def hear() -> None:
            if not self.server.hear():
                self.selector.unregister(output)

        self.selector.register(output, selectors.EVENT_READ, hear)

    def reap(self, woken: int) -> None:
        try:
            while os.read(woken, PIECE):
                pass
        except BlockingIOError:
            pass
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.server.process.pid:
                output = self.server.output
                if output in self.selector.get_map():
                    self.selector.unregister(output)
                self.server.ended()
                self.hear_the_server()


def is_from_outside(connection: socket.socket) -> bool:
    """Was who has connected started from outside of the container? Then it has no parent in here."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid = int.from_bytes(credentials[:4], sys.byteorder)
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[1] == b"0"
    except OSError:  # it is gone
        return False


def others() -> list[int]:
    """The processes that are not this one."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def oom_kills() -> int:
    for path in OOM_KILLS:
        try:
            with open(path) as file:
                counted = dict(line.split() for line in file if len(line.split()) == 2)
        except OSError:
            continue
        return int(counted.get("oom_kill", 0))
    return 0


def module_of(name: str, source: str) -> ModuleType:
    module = ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module


def main(argument: str) -> None:
    config = json.loads(argument)
    confine, init = (module_of(name, config["sources"][name]) for name in ("confine", "init"))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that it does nothing to the first process
    machine = os.uname().machine
    if machine not in config["filters"]:
        sys.exit(f"there is no filter of system calls for the machine {machine!r}")
    own = {**config["configure"], "filter": config["filters"][machine]}
    try:
        init.configure(own, confine)
    except OSError as error:
        sys.exit(str(error) if error.filename else str(error.strerror))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + config["steward"][1:])
    listener.listen(64)

    def prepare() -> None:
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        confine.limit_resources(config["limits"])
        confine.hide(False)  # as execve(2) does in a moment, or it could not write this
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(init.OOM_SCORE)

    Steward(config, listener, Server(config, prepare)).serve()


if __name__ == "__main__":
    main(sys.argv[1])
