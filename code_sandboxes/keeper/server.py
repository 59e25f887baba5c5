"""The keeper: one process per user that owns the kernels on this machine, and outlives the programs.

It is the parent of the kernels, so it alone sees how they end. It knows which programs are attached to which
sandbox, ends what nobody needs, and ends itself when it has nothing to keep. Should it be killed, the small
process that watches it (:mod:`code_sandboxes.reaper`) ends the kernels and removes the folder that all of
this is in.

In the runtime folder there is for each keeper a folder of its own, locked (flock(2)) as long as it lives. Its
name says which protocol it speaks: libraries that speak different ones have each a keeper, and neither
disturbs the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from code_sandboxes.isolation.bubble import CGROUPS
from code_sandboxes.isolation.container import CONTAINERS
from code_sandboxes.keeper.kernels import LEASE, raise_descriptor_limit
from code_sandboxes.keeper.leftovers import Leftovers
from code_sandboxes.keeper.lines import PROTOCOL, Lines, start_time
from code_sandboxes.keeper.places import folder_prefix, is_elsewhere, locked, log_of, peer_of
from code_sandboxes.keeper.sandboxes import KeptSandbox, RefusedError, Reply
from code_sandboxes.reaper import Reaper, end_cgroups, end_marked, remove_container, remove_tree
from code_sandboxes.transports.loop import Loop

__all__ = ["Keeper", "main"]

_log = logging.getLogger(__name__)

# How long it stays when it has nothing to keep and nobody is connected, should somebody come right after.
_LINGER = 1.0

_LOG_SIZE = 256 * 1024


class _Connection:
    """One program that is connected, for as long as it lives."""

    def __init__(self, keeper: Keeper, connection: socket.socket, pid: int) -> None:
        self._keeper = keeper
        self._pid = pid
        self._pidfd = -1
        self.is_introduced = False
        self.lines = Lines(keeper.loop, connection, lambda m: keeper.receive(self, m), self.ended)

    def introduce(self, began: str) -> None:
        """
        Raises:
            RefusedError: the process that connected is not the one that is there now.
        """
        # Its end is the end of the process, not of the connection, which a forked child would hold open.
        try:
            self._pidfd = os.pidfd_open(self._pid)
            self._keeper.loop.add_reader(self._pidfd, self.ended)
        except (AttributeError, OSError):  # macOS, or gone already: the end of the connection tells
            self._pidfd = -1
        if start_time(self._pid) != began:
            raise RefusedError("connection", f"process {self._pid} is not the one that connected")
        if is_elsewhere(self._pid):
            raise RefusedError("connection", f"process {self._pid} is in a sandbox, or a container")
        self.is_introduced = True

    def tell(self, event: Mapping[str, object]) -> None:
        self.lines.send(event)

    def ended(self) -> None:
        if self._pidfd >= 0:
            self._keeper.loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self.lines.close()
        self._keeper.lost(self)


class Keeper:
    """What it keeps, and what programs may ask of it; all in the I/O thread."""

    def __init__(self, root: Path, folder: Path, listener: socket.socket) -> None:
        self.loop = Loop()
        self.reaper = Reaper()
        self.leftovers = Leftovers(self.loop)
        self.has_ended = threading.Event()
        self._root = root
        self._folder = folder
        self._listener = listener
        self._connections: set[_Connection] = set()
        self._sandboxes: dict[str, KeptSandbox] = {}
        self._numbers = 0
        self._stopping = False
        self._verbs: dict[str, Callable[[_Connection, Mapping[str, Any], Reply], None]] = {
            "open": self._open,
            "kernel": self._kernel,
            "turn": self._turn,
            "list": self._list,
            "ping": lambda _, __, reply: reply({}),
            "end": self._end,
            "detach": self._detach,
            "lifetime": self._lifetime,
            "tags": self._tags,
            "pause": self._pause,
            "network_log": self._network_log,
            "delete_context": self._delete_context,
            "give_turn": self._give_turn,
            "signal": self._signal,
            "release": self._release,
        }
        listener.setblocking(False)
        self.loop.call_soon(self._begin)

    def _begin(self) -> None:
        self.reaper.guard_folder(str(self._folder))
        self._listen()
        self._linger()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self.loop.add_reader(self._listener.fileno(), self._accept)

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    # Programs.

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # too few descriptors: who connects waits
            _log.error("cannot accept: %s", error)
            self.loop.remove_reader(self._listener.fileno())
            self.loop.call_later(_LINGER, self._listen)
            return
        pid, uid = peer_of(connection)
        if uid != os.geteuid():
            _log.error("refused a connection of user %d", uid)
            connection.close()
            return
        self._connections.add(_Connection(self, connection, pid))

    def receive(self, connection: _Connection, message: Mapping[str, Any]) -> None:
        """A request of a program."""

        def reply(answer: Mapping[str, object]) -> None:
            if message.get("id") is not None:
                connection.tell({"id": message["id"], **answer})

        try:
            if message["verb"] == "hello":
                connection.introduce(message["began"])
                reply({"protocol": PROTOCOL, "pid": os.getpid()})
            elif self._stopping and message["verb"] == "open":
                connection.ended()  # another keeper has to do it
            elif connection.is_introduced:
                self._verbs[message["verb"]](connection, message, reply)
            else:
                raise RefusedError("connection", "who is not introduced is not served")
        except RefusedError as error:
            reply({"error": {"kind": error.kind, "text": str(error)}})
        except OSError as error:
            reply({"error": {"kind": "folder", "text": f"{error.strerror}: {error.filename}"}})
        except Exception as error:  # nobody else's sandbox is to suffer from one request
            _log.exception("a request failed")
            reply({"error": {"kind": "connection", "text": f"the keeper failed: {error!r}"}})

    def lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        for sandbox in list(self._sandboxes.values()):
            try:
                sandbox.gone(connection)
            except Exception:  # the others are to know it, too
                _log.exception("a sandbox could not be left")
        self._linger()

    # What they ask for.

    def _find(self, connection: _Connection, message: Mapping[str, Any]) -> KeptSandbox:
        sandbox = self._sandboxes.get(message["sandbox"])
        if sandbox is None or sandbox.is_ending or not sandbox.is_used_by(connection):
            raise RefusedError(
                "unknown", f"there is no sandbox {message['sandbox']!r} to which you are attached"
            )
        return sandbox

    def _open(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        """Attach to a sandbox; with a ``record`` it is made if it is not there."""
        sandbox = self._sandboxes.get(message["sandbox"])
        if sandbox is None and message.get("record") is not None:
            folder = self._folder / str(self.next_number())
            sandbox = KeptSandbox(self, message["sandbox"], message["record"], folder)
            self._sandboxes[sandbox.id] = sandbox
            _log.info("%s begins", sandbox.id)
        if sandbox is None or sandbox.is_ending:
            raise RefusedError("unknown", f"there is no sandbox {message['sandbox']!r}")
        sandbox.attach(connection)
        reply(sandbox.description())

    def _kernel(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        self._find(connection, message).kernel(connection, message, reply)

    def _turn(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        self._find(connection, message).ask_for_turn(connection, message["kernel"], reply)

    def _list(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        kept = [sandbox for sandbox in self._sandboxes.values() if not sandbox.is_ending]
        reply({"sandboxes": [sandbox.description() for sandbox in kept]})

    def _end(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        sandbox = self._sandboxes.get(message["sandbox"])
        if sandbox is None:
            reply({})
            return
        sandbox.when_ended(reply)
        sandbox.end(message["why"], orderly=message["orderly"], by=connection)

    def _detach(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        """Let go of a sandbox; the answer comes when that has had its consequences."""
        sandbox = self._find(connection, message)
        sandbox.detach(connection, keep=message["keep"])
        if sandbox.is_ending:
            sandbox.when_ended(reply)
        else:
            reply({})

    def _lifetime(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        self._find(connection, message).set_lifetime(connection, message["seconds"], message["reason"])
        reply({})

    def _tags(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        self._find(connection, message).set_tags(connection, message["tags"])
        reply({})

    def _pause(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        self._find(connection, message).pause(connection, reply, on=message["on"])

    def _network_log(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        reply({"attempts": self._find(connection, message).network_log()})

    def _delete_context(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        self._find(connection, message).delete_context(connection, message["context"])
        reply({})

    # What means nothing when what it is about has ended.

    def _give_turn(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        sandbox = self._sandboxes.get(message["sandbox"])
        if sandbox is not None:
            sandbox.give_turn(connection, message["kernel"])

    def _signal(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        sandbox = self._sandboxes.get(message["sandbox"])
        if sandbox is not None:
            sandbox.signal(message["kernel"], message["signal"])
        reply({})

    def _release(self, connection: _Connection, message: Mapping[str, Any], reply: Reply) -> None:
        sandbox = self._sandboxes.get(message["sandbox"])
        if sandbox is not None:
            sandbox.release(connection, message["kernel"])

    # Its own end.

    def forget(self, sandbox: KeptSandbox) -> None:
        self._sandboxes.pop(sandbox.id, None)
        self._linger()

    def stop(self, why: str) -> None:
        """End everything, then itself."""
        self._stopping = True
        self._stop_listening()
        for sandbox in list(self._sandboxes.values()):
            sandbox.end(why, orderly=False)
        self._linger()

    @property
    def _is_needed(self) -> bool:
        return bool(self._sandboxes) or (bool(self._connections) and not self._stopping)

    def _linger(self) -> None:
        if not self._is_needed:
            self.loop.call_later(0 if self._stopping else _LINGER, self._end_itself)

    def _end_itself(self) -> None:
        if self._is_needed or self.has_ended.is_set():
            return
        if self._stopping or not self._folder.exists():  # nobody can find it any more
            self._leave()
            return
        # Who looks for a keeper has this lock: nobody is to find one that is about to end.
        with locked(self._root) as lock:
            if lock is None:
                self.loop.call_later(_LINGER, self._end_itself)
                return
            self._stop_listening()
            self._leave()

    def _stop_listening(self) -> None:
        if self._listener.fileno() >= 0:
            with contextlib.suppress(KeyError):  # it waits for descriptors
                self.loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def _leave(self) -> None:
        remove_tree(str(self._folder))
        self.has_ended.set()


def _remove_what_dead_keepers_left(root: Path) -> None:
    """They were killed, and so was what watched them."""
    for folder in root.glob(folder_prefix("[0-9]*") + "????"):
        with locked(folder) as lock:
            if lock is not None:  # its keeper is dead
                for lease in folder.glob(f"[0-9]*/[0-9]*/{LEASE}"):
                    _end_leased(lease)
                for listed in folder.glob(f"[0-9]*/{CGROUPS}"):
                    with contextlib.suppress(OSError):
                        end_cgroups(listed.read_text().splitlines())
                for listed in folder.glob(f"[0-9]*/{CONTAINERS}"):
                    _remove_containers(listed)
                with contextlib.suppress(OSError):  # the folder must go all the same
                    end_marked([str(folder)])
                with contextlib.suppress(OSError):
                    remove_tree(str(folder))


def _remove_containers(listed: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in listed.read_text().splitlines():
            engine, name = line.rsplit(" ", 1)
            remove_container(engine, name)


def _end_leased(lease: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        pid, began = lease.read_text().split()
        if start_time(int(pid)) == began:
            os.killpg(int(pid), signal.SIGKILL)


def _make_folder(root: Path) -> Path:
    while True:
        folder = root / f"{folder_prefix()}{secrets.token_hex(2)}"
        try:
            folder.mkdir(mode=0o700)
            return folder
        except FileExistsError:
            continue


class _PrivateLog(RotatingFileHandler):
    def _open(self) -> Any:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, self.mode, encoding="utf-8", opener=private)


def _write_log(root: Path) -> None:
    logging.raiseExceptions = False  # a disk that is full is no reason to end
    handler = _PrivateLog(log_of(root), maxBytes=_LOG_SIZE, backupCount=1, delay=True)
    handler.setFormatter(logging.Formatter(f"%(asctime)s keeper {os.getpid()}: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)


def main(runtime_folder: str, root_lock: int) -> None:
    """Begin to keep; the process that calls this ends as soon as programs can connect, or with an error.

    Args:
        root_lock: the descriptor by which whoever starts this has locked the runtime folder, so that there is
            one keeper, whatever becomes of them meanwhile.
    """
    root = Path(runtime_folder)
    folder = _make_folder(root)
    listener = socket.socket(socket.AF_UNIX)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_what_dead_keepers_left(root)
        listener.bind(str(folder / "s"))
        listener.listen(4096)
    except OSError as error:
        remove_tree(str(folder))
        sys.exit(f"{error.strerror}: {error.filename or folder}")
    if os.fork():
        os._exit(0)
    os.close(root_lock)
    _keep(root, folder, listener)


def _keep(root: Path, folder: Path, listener: socket.socket) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    _write_log(root)
    raise_descriptor_limit()
    keeper = Keeper(root, folder, listener)
    # Handled, not ignored: what is ignored the kernels would inherit.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.signal(
        signal.SIGTERM, lambda *_: keeper.loop.call_soon(lambda: keeper.stop("its keeper was ended"))
    )
    keeper.has_ended.wait()
    keeper.reaper.close()
    os._exit(0)
