"""How a program finds its keeper, starts it where there is none, and speaks with it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from code_sandboxes.errors import SandboxConfigurationError, SandboxConnectionError
from code_sandboxes.forks import in_forked_child
from code_sandboxes.keeper.lines import LONGEST, Lines, as_line, start_time
from code_sandboxes.keeper.places import folder_prefix, locked, log_of, peer_of
from code_sandboxes.reaper import MARK
from code_sandboxes.transports.loop import the_loop

__all__ = ["GoneError", "KeeperClient", "Listener", "UnknownSandboxError", "the_keeper"]

_PACKAGES = str(Path(__file__).resolve().parent.parent.parent)

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from code_sandboxes.keeper.server import main; main(sys.argv[2], int(sys.argv[3]))"
)

# Seconds that a connection stays open when nothing is kept for this program any more: with a keeper that is
# there already the next sandbox starts sooner.
_LINGER = 30.0

# Seconds: how long a keeper may take to start, and to answer.
_PATIENCE = 10.0
_PATIENCE_WITH_START = 60.0

# Seconds after which a keeper that does not take a signal for a kernel is taken for none.
_STALLED = 10.0


class UnknownSandboxError(Exception):
    """The keeper has no such sandbox."""


class GoneError(Exception):
    """What a request was about has ended meanwhile."""


class Listener(Protocol):
    """Who wants to know what becomes of a sandbox; called in the I/O thread."""

    def told(self, event: Mapping[str, Any]) -> None: ...

    def lost(self) -> None:
        """The keeper is gone, and everything that it kept."""


Answer = Mapping[str, Any]


class _Link:
    """A connection to a running keeper. It ends with the keeper, or when that does not answer any more."""

    def __init__(self, connection: socket.socket, listeners: dict[str, list[Listener]]) -> None:
        self.is_over = False
        self._loop = the_loop()
        self._listeners = listeners
        self._waiting: dict[int, Callable[[Answer | None], None]] = {}
        self._ids = itertools.count(1)
        self._lines: Lines | None = None
        self._loop.call_soon(lambda: self._open(connection))

    def request(
        self,
        message: Mapping[str, object],
        then: Callable[[Answer | None], None],
        patience: float | None = None,
    ) -> None:
        """Send *message*; *then* gets the answer, or None if there is no keeper any more. From any thread.

        One that does not answer within *patience* seconds is taken for none.
        """
        self._loop.call_soon(lambda: self._request(message, then, patience))

    def tell(self, message: Mapping[str, object]) -> None:
        """Send what wants no answer; from any thread."""
        self._loop.call_soon(lambda: self._send(message))

    def close(self) -> None:
        self._loop.call_soon(self._ended)

    def _open(self, connection: socket.socket) -> None:
        try:
            self._lines = Lines(self._loop, connection, self._receive, self._ended)
        except OSError:  # too few descriptors
            connection.close()
            self._ended()

    def _send(self, message: Mapping[str, object]) -> None:
        if self._lines is not None:
            self._lines.send(message)

    def _request(
        self,
        message: Mapping[str, object],
        then: Callable[[Answer | None], None],
        patience: float | None,
    ) -> None:
        if self._lines is None:
            then(None)
            return
        number = next(self._ids)
        self._waiting[number] = then
        if patience is not None:
            self._loop.call_later(patience, lambda: self._ended() if number in self._waiting else None)
        self._lines.send({"id": number, **message})

    def _receive(self, message: dict[str, Any]) -> None:
        if "id" in message:
            then = self._waiting.pop(message["id"], None)
            if then is not None:
                then(message)
            return
        for listener in self._listeners.get(message.get("sandbox", ""), ()):
            listener.told(message)

    def _ended(self) -> None:
        if self.is_over:
            return
        self.is_over = True
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        waiting, self._waiting = self._waiting, {}
        for then in waiting.values():
            then(None)
        for listeners in list(self._listeners.values()):
            for listener in listeners:
                listener.lost()


class KeeperClient:
    """The way to the keeper of one runtime folder.

    Args:
        root: the runtime folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listeners: dict[str, list[Listener]] = {}
        self._link: _Link | None = None
        self._asking = self._uses = 0
        self._connecting = threading.Lock()  # one connects, which takes its time
        self._lock = threading.Lock()  # never held for long

    def ask(self, verb: str, **fields: object) -> Answer:
        """The answer to a request. Blocks, so not in the I/O thread.

        A keeper is started if there is none. One that ends meanwhile has not done it: the next one is asked.

        Raises:
            UnknownSandboxError: it does not have the sandbox.
            GoneError: what this is about has ended meanwhile.
            SandboxError: it cannot be done; the message says why.
        """
        for _ in range(3):
            answer = self._ask_once({"verb": verb, **fields})
            if answer is not None:
                return _checked(answer)
        raise SandboxConnectionError(f"the keeper of local kernels ends again and again; {self._see_log()}")

    def ask_if_running(self, verb: str, **fields: object) -> Answer | None:
        """As :meth:`ask`, but None if there is no keeper: none is started."""
        answer = self._ask_once({"verb": verb, **fields}, start=False)
        return None if answer is None else _checked(answer)

    def listen(self, sandbox_id: str, listener: Listener, *, instead_of: Listener | None = None) -> None:
        """Tell *listener* what becomes of a sandbox, until :meth:`forget`."""
        with self._lock:
            others = [each for each in self._listeners.get(sandbox_id, ()) if each is not instead_of]
            self._listeners[sandbox_id] = [*others, listener]

    def forget(self, sandbox_id: str, listener: Listener) -> None:
        with self._lock:
            left = [each for each in self._listeners.pop(sandbox_id, ()) if each is not listener]
            if left:
                self._listeners[sandbox_id] = left
            self._close_if_unused()

    @property
    def has_rivals(self) -> bool:
        """There are keepers that speak another protocol, for another version of this library."""
        return any(
            not folder.name.startswith(folder_prefix())
            for folder in self.root.glob(f"{folder_prefix('*')}????")
        )

    def request(self, verb: str, then: Callable[[Answer | None], None], **fields: object) -> None:
        """Ask a running keeper, without waiting; *then* gets None if there is none. In the I/O thread."""
        link = self._running_link()
        if link is None:
            then(None)
        else:
            link.request({"verb": verb, **fields}, then)

    def demand(self, verb: str, **fields: object) -> None:
        """Tell a running keeper something that cannot wait; one that does not take it is given up."""
        link = self._running_link()
        if link is not None:
            link.request({"verb": verb, **fields}, lambda _: None, _STALLED)

    def tell(self, verb: str, **fields: object) -> None:
        """Tell a running keeper something that wants no answer; from any thread."""
        link = self._running_link()
        if link is not None:
            link.tell({"verb": verb, **fields})

    def _running_link(self) -> _Link | None:
        link = self._link
        return None if link is None or link.is_over else link

    def _ask_once(self, message: Mapping[str, object], *, start: bool = True) -> Answer | None:
        size = len(as_line(message))
        if size > LONGEST:
            raise ValueError(f"{size} bytes are too much for the keeper of local kernels: it takes {LONGEST}")
        link = self._connected(start=start)
        if link is None:
            return None
        answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        link.request(message, answers.put)
        try:
            while True:
                try:
                    return answers.get(timeout=_PATIENCE)
                except queue.Empty:  # some things take long; but a keeper that lives says so
                    link.request({"verb": "ping"}, lambda _: None, _STALLED)
        finally:
            self._asked()

    def start(self) -> None:
        """See to it that a keeper is there soon; blocks.

        Raises:
            SandboxError: there is none, and none can be started.
        """
        if self._connected(start=True) is not None:
            self._asked()

    def close(self) -> None:
        """Hang up; whatever is kept for this program is ended."""
        with self._lock:
            if self._link is not None:
                self._link.close()

    def _asked(self) -> None:
        with self._lock:
            self._asking -= 1
            self._close_if_unused()

    def _connected(self, *, start: bool) -> _Link | None:
        with self._connecting:
            link = self._running_link()
            if link is None:
                connection = self._find() or (self._find_or_start() if start else None)
                if connection is None:
                    return None
                link = self._link = _Link(connection, self._listeners)
            with self._lock:
                self._asking += 1
                self._uses += 1
            return link

    def _close_if_unused(self) -> None:
        """A keeper is not to stay for long for a program that has no sandbox any more."""
        if self._link is not None and not (self._listeners or self._asking):
            uses = self._uses
            the_loop().call_soon(lambda: self._close_later(uses))

    def _close_later(self, uses: int) -> None:
        the_loop().call_later(_LINGER, lambda: self._close_if_not_used_since(uses))

    def _close_if_not_used_since(self, uses: int) -> None:
        with self._lock:
            if self._link is not None and self._uses == uses and not (self._listeners or self._asking):
                self._link.close()
                self._link = None

    def _find(self) -> socket.socket | None:
        """A connection to a keeper that answers."""
        for folder in sorted(self.root.glob(f"{folder_prefix()}????")):
            connection = socket.socket(socket.AF_UNIX)
            try:
                _connect(connection, str(folder / "s"))
                if peer_of(connection)[1] == os.geteuid() and self._is_welcome(connection):
                    return connection
            except TimeoutError:
                connection.close()
                raise self._silent() from None
            except OSError:  # it was killed, or is about to end
                pass
            connection.close()
        return None

    def _is_welcome(self, connection: socket.socket) -> bool:
        connection.sendall(as_line({"id": 0, "verb": "hello", "began": start_time(os.getpid())}))
        received = b""
        while not received.endswith(b"\n"):
            more = connection.recv(4096)
            if not more:
                return False
            received += more
        _checked(json.loads(received))
        return True

    def _find_or_start(self) -> socket.socket:
        with self._locked() as lock:
            connection = self._find()
            if connection is not None:
                return connection
            _start(self.root, lock)
            connection = self._find()
        if connection is None:
            raise SandboxConnectionError(
                f"the keeper of local kernels ended as soon as it had been started; {self._see_log()}"
            )
        return connection

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock of the runtime folder: one at a time starts a keeper."""
        give_up = time.monotonic() + _PATIENCE_WITH_START
        while time.monotonic() < give_up:
            with locked(self.root) as lock:
                if lock is not None:
                    yield lock
                    return
            time.sleep(0.01)
        raise SandboxConnectionError(
            f"some program has held the lock of {self.root} for {_PATIENCE_WITH_START:g} s"
        )

    def _silent(self) -> SandboxConnectionError:
        return SandboxConnectionError(f"the keeper of local kernels does not answer; {self._see_log()}")

    def _see_log(self) -> str:
        return f"its log is {log_of(self.root)}"


def _connect(connection: socket.socket, path: str) -> None:
    """
    Raises:
        TimeoutError: somebody listens there, and takes nobody.
        OSError: nobody listens there.
    """
    connection.settimeout(_PATIENCE)
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.connect(path)
            return
        except BlockingIOError:  # very many connect at the same time (unix(7))
            if time.monotonic() > give_up:
                raise TimeoutError from None
            time.sleep(0.01)


def _start(root: Path, lock: int) -> None:
    path = [_PACKAGES, *(entry for entry in sys.path if os.path.isabs(entry) and entry != _PACKAGES)]
    try:
        starting = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _START, json.dumps(path), str(root), str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            # If this program runs in a kernel, the keeper, as all that comes of that, must end with it.
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH", MARK) if name in os.environ},
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C in a terminal is for the program
            timeout=_PATIENCE_WITH_START,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxConnectionError(f"the keeper of local kernels could not be started: {error}") from error
    if starting.returncode:
        said = starting.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise _unusable(said)


def _unusable(why: str) -> SandboxConfigurationError:
    return SandboxConfigurationError(
        f"the keeper of local kernels cannot use the runtime folder: {why};"
        " set CODE_SANDBOXES_RUNTIME_DIR to a folder of yours that has room"
    )


def _checked(answer: Answer) -> Answer:
    """*answer*, if it is none that an error is in."""
    error = answer.get("error")
    if error is None:
        return answer
    if error["kind"] == "folder":
        raise _unusable(error["text"])
    raise _ERRORS.get(error["kind"], SandboxConnectionError)(error["text"])


_ERRORS: Mapping[str, type[Exception]] = {
    "unknown": UnknownSandboxError,
    "gone": GoneError,
    "value": ValueError,
    "configuration": SandboxConfigurationError,
    "connection": SandboxConnectionError,
}

_clients: dict[Path, KeeperClient] = {}
_making = threading.Lock()


def the_keeper(root: Path) -> KeeperClient:
    """The one of this process for the runtime folder *root*."""
    with _making:
        if root not in _clients:
            _clients[root] = KeeperClient(root)
        return _clients[root]


def _let_go() -> object:
    global _making
    _making = threading.Lock()
    kept = dict(_clients)
    _clients.clear()
    return kept


in_forked_child(_let_go)
