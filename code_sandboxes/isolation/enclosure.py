"""An enclosure: the place of its own in which all kernels of one sandbox are, as whoever made it talks to it.

It is a bubble on this machine (:mod:`.bubble`) or a container (:mod:`.container`). ``guest/init.py`` is the
first process in it and does there what is asked here. It ends with that process, and all that is in it with
it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import itertools
import json
import os
import queue
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from code_sandboxes.isolation.memory_files import memory_file
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.isolation.seccomp import CORE, deny_filter
from code_sandboxes.transports.loop import Loop

__all__ = ["LIMITS", "PATIENCE", "EnclosedKernel", "Enclosure", "EnclosureError", "Place", "configure"]

PATIENCE = 20.0
"""Seconds: how long making one may take, and how long its first process may take to answer."""

_ANSWERS = ("started", "connected", "paused", "resumed", "failed")

# Seconds that a process may take to be gone that was killed.
_DYING = 5.0

# Some systems give users what stops others ("nice", "rtprio"); the rest, but for files, is counted for all
# processes of a user, so that there must be something left for those that are not in a sandbox.
LIMITS = {
    "nofile": 4096,
    "nice": 0,
    "rtprio": 0,
    "memlock": 1024**2,
    "msgqueue": 256 * 1024,
    "sigpending": 4096,
}
"""What every process in an enclosure has at most (getrlimit(2))."""

_LONGEST = 65536


class EnclosureError(Exception):
    """It could not be made, or something in it could not be started: a sentence."""


@dataclass(frozen=True, slots=True)
class _Reply:
    message: Mapping[str, Any]
    descriptors: Sequence[int]


class EnclosedKernel:
    """A process in an enclosure that leads a process group; in the I/O thread."""

    def __init__(self, enclosure: Enclosure, number: int) -> None:
        self.has_ended = False
        self.status: int | None = None
        """As in :mod:`subprocess`; None, too, if it ended with its enclosure."""
        self.why_ended = ""
        """More than the status says: the end of a sentence; empty if there is no more."""
        self._enclosure = enclosure
        self._number = number
        self._memory_used_up = enclosure.out_of_memory_kills()
        self._on_end: Callable[[], None] | None = None

    @property
    def has_ended_with_all(self) -> bool:
        """Nothing is left of the enclosure."""
        return self._enclosure.is_over

    def watch(self, on_end: Callable[[], None]) -> None:
        """Call *on_end* once, when it has ended."""
        self._on_end = on_end
        if self.has_ended:
            on_end()

    def signal(self, what: signal.Signals) -> None:
        """Send a signal to it and its group."""
        if not self.has_ended:
            self._enclosure.signal(self._number, what)

    def ended(self, status: int | None) -> None:
        self.has_ended, self.status = True, status
        self.why_ended = self._reason()
        if self._on_end is not None:
            self._on_end()

    def _reason(self) -> str:
        if self.status not in (None, -signal.SIGKILL):
            return ""
        reasons = []
        if self._enclosure.out_of_memory_kills() > self._memory_used_up:
            memory = (self._enclosure.plan.bounds.memory or 0) / 1024**2
            reasons.append(f"the sandbox used up its memory of {memory:g} MiB, in which its files lie, too")
        if self.status is None:
            reasons.append("the whole sandbox was ended, and its files with it")
        return "; ".join(reasons)


class Place(Protocol):
    """What an enclosure is seen from outside.

    Attributes:
        container: its name, if it is one.
    """

    container: str | None

    @property
    def environment(self) -> Mapping[str, str]:
        """What every process in it has to begin with."""

    def kill(self) -> None:
        """End all that is in it at once; from any thread, does not block."""

    def out_of_memory_kills(self) -> int:
        """How often something in it was ended because its memory was used up, as far as that is known.

        Raises:
            OSError: it is not known any more.
        """

    def remove(self) -> None:
        """End it, and remove what is left; blocks.

        Raises:
            OSError: something does not end, or cannot be removed.
        """


class Enclosure:
    """What is not said to block is called in the I/O thread.

    Args:
        control: a socket to its first process, which is configured.
        proxy_listener: where a proxy is to listen, if it has no network but that.
    """

    def __init__(
        self,
        loop: Loop,
        plan: Plan,
        control: socket.socket,
        proxy_listener: socket.socket | None,
        place: Place,
    ) -> None:
        self.plan = plan
        self.is_over = False
        self.proxy_listener = proxy_listener
        self._loop = loop
        self._control = control
        self._place = place
        self._waiting: dict[int, Callable[[_Reply | None], None]] = {}
        self._kernels: dict[int, EnclosedKernel] = {}
        self._memory_used_up = 0
        self._questions = itertools.count(-1, -1)  # kernels have the numbers above zero
        self._tell: Callable[[], None] = _nothing

    # What it is asked.

    def watch(self, on_end: Callable[[], None]) -> None:
        """Call *on_end* once, when it is over."""
        self._tell = on_end
        self._loop.add_reader(self._control.fileno(), self._read)

    def start_kernel(
        self,
        number: int,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        files: Mapping[str, str],
        descriptors: Sequence[int],
    ) -> EnclosedKernel:
        """Start a kernel; blocks, so not in the I/O thread.

        Args:
            number: above zero, and no other kernel's.
            files: private ones to write first, by path.
            descriptors: what it has from its standard error, 2, on.

        Raises:
            OSError: there is no such program or directory.
            EnclosureError: the enclosure is over.
        """
        document = {"argv": list(command), "env": dict(env), "cwd": cwd, "files": dict(files)}
        kernel = self._kernels[number] = EnclosedKernel(self, number)
        how = memory_file(json.dumps(document).encode())
        try:
            self._ask(number, {"start": number}, [how, *descriptors])
        except BaseException:
            self._kernels.pop(number, None)
            raise
        finally:
            os.close(how)
        return kernel

    def signal(self, number: int, what: signal.Signals) -> None:
        """Send a signal to a kernel and its process group."""
        self._send({"signal": number, "number": int(what)})
        if what is signal.SIGKILL:
            self._loop.call_later(_DYING, lambda: self._end_with(number))

    def _end_with(self, number: int) -> None:
        """Who does not end has been frozen with its place, or waits for something in the system."""
        if number in self._kernels:
            self.kill()

    def pause(self) -> None:
        """Stop all processes in it until :meth:`resume`; blocks, so not in the I/O thread.

        Raises:
            OSError: one of them does not stop.
            EnclosureError: the enclosure is over.
        """
        number = next(self._questions)
        self._ask(number, {"pause": number}, [], kill=False)

    def resume(self) -> None:
        """Let all processes in it go on; blocks, so not in the I/O thread.

        Raises:
            EnclosureError: the enclosure is over.
        """
        number = next(self._questions)
        self._ask(number, {"resume": number}, [], kill=False)

    def connect(self, path: str, then: Callable[[int, OSError | None], None]) -> None:
        """Call *then* with a connection, as a descriptor, to a Unix socket of the sandbox, or with an error.

        From any thread; *then* is called in the I/O thread.
        """
        self._loop.call_soon(lambda: self._connect(path, then))

    def out_of_memory_kills(self) -> int:
        """How often something in it was ended because its memory was used up, as far as that is known."""
        with contextlib.suppress(OSError):  # it is gone: there are no more
            self._memory_used_up = self._place.out_of_memory_kills()
        return self._memory_used_up

    @property
    def environment(self) -> Mapping[str, str]:
        """What every process in it has to begin with."""
        return self._place.environment

    @property
    def container(self) -> str | None:
        """The name of the container, if it is one."""
        return self._place.container

    def kill(self) -> None:
        """End it at once; from any thread."""
        if not self.is_over:
            self._place.kill()

    def remove(self) -> None:
        """End it, and remove what is left; blocks.

        Raises:
            OSError: something does not end, or cannot be removed.
        """
        self._place.remove()
        self._control.close()
        if self.proxy_listener is not None:
            self.proxy_listener.close()

    # What it tells.

    def _connect(self, path: str, then: Callable[[int, OSError | None], None]) -> None:
        number = next(self._questions)

        def answered(reply: _Reply | None) -> None:
            del self._waiting[number]
            if reply is not None and reply.descriptors:
                then(reply.descriptors[0], None)
            else:
                then(-1, _error_of(reply, path))

        self._waiting[number] = answered
        self._send({"connect": number, "path": path})

    def _ask(
        self, number: int, message: Mapping[str, Any], descriptors: Sequence[int], *, kill: bool = True
    ) -> None:
        answer: queue.SimpleQueue[_Reply | None] = queue.SimpleQueue()
        self._waiting[number] = answer.put
        self._loop.call_soon(lambda: self._send(message, descriptors))
        try:
            reply = answer.get(timeout=PATIENCE)
        except queue.Empty:
            if kill:
                self.kill()
            raise EnclosureError(f"its first process did not answer within {PATIENCE:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if reply is None:
            raise EnclosureError("the sandbox has ended")
        if "failed" in reply.message:
            raise _error_of(reply, "")

    def _send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        try:
            if not self.is_over:
                socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        except BlockingIOError:  # it has not read for long: it never will
            self.kill()
        except OSError:  # it is over, which is told
            return
        self._forget_waiting_if_over()

    def _read(self) -> None:
        try:
            reply = _receive(self._control)
        except BlockingIOError:
            return
        except (OSError, ValueError, RecursionError):  # what is in there is not what was put there
            self._over()
            return
        if not reply.message:
            self._over()
        elif not self._is_taken(reply):  # by nobody, or too late
            _close_all(reply.descriptors)

    def _is_taken(self, reply: _Reply) -> bool:
        numbers = {kind: value for kind, value in reply.message.items() if type(value) is int}
        kernel = self._kernels.pop(numbers.get("ended", 0), None)
        if kernel is not None:
            kernel.ended(numbers.get("status"))
            return False
        answers = (self._waiting.get(numbers.get(kind, 0)) for kind in _ANSWERS)
        answer = next((answer for answer in answers if answer is not None), None)
        if answer is not None:
            answer(reply)
        return answer is not None

    def _over(self) -> None:
        if self.is_over:
            return
        self.kill()
        self.is_over = True
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        self._forget_waiting_if_over()
        kernels, self._kernels = self._kernels, {}
        for kernel in kernels.values():
            kernel.ended(None)
        self._tell()

    def _forget_waiting_if_over(self) -> None:
        if self.is_over:
            for answer in list(self._waiting.values()):
                answer(None)


def _error_of(reply: _Reply | None, path: str) -> OSError:
    if reply is None:
        return OSError(errno.ECONNRESET, "the sandbox has ended", path)
    code = reply.message.get("errno")
    if type(code) is not int:
        code = errno.EPROTO
    return OSError(code, os.strerror(code), str(reply.message.get("path") or path))


def configure(
    control: socket.socket, plan: Plan, own: Mapping[str, Any], said: Callable[[], str]
) -> socket.socket | None:
    """Let the first process do its part before anything else runs there; blocks.

    Args:
        own: what only this kind of place needs, see ``configure()`` of ``guest/init.py``.
        said: what the place has to say, should it fail.

    Returns:
        The socket for a proxy, if there is to be one.

    Raises:
        EnclosureError: it cannot.
    """
    configuration = {
        "proxy": plan.network != "all",
        "mounts": [(mount.target, mount.identity) for mount in plan.mounts if mount.identity is not None],
        "core": CORE,
        "filter": base64.b64encode(deny_filter()).decode(),
        **own,
        "limits": {**LIMITS, **own["limits"]},
    }
    control.settimeout(PATIENCE)
    try:
        socket.send_fds(control, [json.dumps({"configure": configuration}).encode()], [])
        reply = _receive(control)
    except OSError as error:
        raise EnclosureError(f"its first process does not answer: {said() or error}") from None
    control.setblocking(False)
    if "ready" not in reply.message:
        why = reply.message.get("unfit") or said() or "it does not say why"
        raise EnclosureError(f"its first process has ended: {why}")
    return socket.socket(fileno=reply.descriptors[0]) if reply.descriptors else None


def _receive(control: socket.socket) -> _Reply:
    data, descriptors, _, _ = socket.recv_fds(control, _LONGEST, 4)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    message = json.loads(data) if data else {}
    if not isinstance(message, dict):
        raise ValueError("that is no message")
    return _Reply(message, descriptors)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _nothing() -> None:
    return
