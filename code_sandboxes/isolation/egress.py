"""The way out of sandboxes that have no network: one thread for the process, a proxy for each sandbox.

The thread has an event loop of asyncio, which is imported when the first sandbox needs it. Nobody who calls
is ever blocked. After ``os.fork()`` the child has no thread and serves nobody: :func:`the_egress` gives it a
new one.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

from code_sandboxes.forks import in_forked_child
from code_sandboxes.isolation.hosts import AllowedHosts
from code_sandboxes.isolation.network_log import NetworkLog

if TYPE_CHECKING:
    import asyncio

    from code_sandboxes.isolation.relay import Connect

__all__ = ["Egress", "Service", "the_egress"]

_log = logging.getLogger(__name__)

_FAREWELL = 10.0


class Service:
    """The proxy of one sandbox, for as long as that lives."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        serve: Callable[[], Coroutine[None, None, None]],
        running: set[Service],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._serve = serve
        self._running = running
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._closed = threading.Event()
        loop.call_soon_threadsafe(self._start)

    def close(self) -> None:
        """End it and all its connections at once; from any thread, and as often as one likes."""
        try:
            self._loop.call_soon_threadsafe(self._stop)
        except RuntimeError:  # the loop has ended, and this with it
            return

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Is all of it gone? Not to be asked in the thread of the proxies."""
        return self._closed.wait(timeout)

    def _start(self) -> None:
        self._running.add(self)  # the loop itself has only weak references to tasks
        self._task = self._loop.create_task(self._serve())
        self._task.add_done_callback(self._ended)

    def _stop(self) -> None:
        if self._task is not None and not self._is_closed:
            self._is_closed = True
            self._task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(self)
        self._listener.close()  # if it was cancelled before it began, nobody else has
        self._closed.set()
        if not task.cancelled() and task.exception() is not None:
            _log.error("an egress proxy has failed; its sandbox has no network", exc_info=task.exception())


class Egress:
    """
    Args:
        resolve: finds the addresses of a name; blocks, in a thread of its own. By default getaddrinfo(3).
    """

    def __init__(self, resolve: Callable[[str, int], list[str]] | None = None) -> None:
        self._resolve = resolve
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._running: set[Service] = set()

    def serve(self, listener: socket.socket, allowed: AllowedHosts, log: NetworkLog) -> Service:
        """
        Args:
            listener: a listening TCP socket, in whatever network namespace; the proxy's from now on.
            allowed: where it leads to; nowhere, if there is no entry.
            log: gets every attempt.
        """
        from code_sandboxes.isolation.lookups import resolve
        from code_sandboxes.isolation.proxy import Proxy

        listener.setblocking(False)
        loop = self._started()

        def serve() -> Coroutine[None, None, None]:
            return Proxy(listener, allowed, log, self._resolve or resolve).serve()

        return Service(loop, listener, serve, self._running)

    def relay(self, listener: socket.socket, connect: Connect) -> Service:
        """
        Args:
            listener: a listening Unix socket; the relay's from now on.
        """
        from code_sandboxes.isolation.relay import Relay

        listener.setblocking(False)
        return Service(self._started(), listener, Relay(listener, connect).serve, self._running)

    def close(self) -> None:
        """End every proxy, and the thread; waits for it."""
        import asyncio

        with self._starting:
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            loop.stop()

        asyncio.run_coroutine_threadsafe(end(), loop)
        self._thread.join(_FAREWELL)

    def _started(self) -> asyncio.AbstractEventLoop:
        import asyncio

        with self._starting:
            if self._loop is None:
                self._loop = loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run, args=(loop,), name="code_sandboxes-egress", daemon=True
                )
                self._thread.start()
            return self._loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


_egress: Egress | None = None
_creating = threading.Lock()


def the_egress() -> Egress:
    """The one of this process, started on first need."""
    global _egress
    with _creating:
        if _egress is None:
            _egress = Egress()
        return _egress


def _let_go() -> object:
    global _egress, _creating
    kept, _egress, _creating = _egress, None, threading.Lock()
    return kept


in_forked_child(_let_go)
