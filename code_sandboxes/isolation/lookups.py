"""Resolve names in threads: a few at a time, and for no longer than somebody waits."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import TypeVar

__all__ = ["Lookups", "Resolve", "resolve", "within"]

_T = TypeVar("_T")

Resolve = Callable[[str, int], list[str]]
"""Finds the addresses of a name, or raises OSError; blocks."""

_PATIENCE = 10.0

# For each sandbox: where one asks for names whose servers do not answer, the others have theirs.
_AT_ONCE = 8

_MOST_ADDRESSES = 16


def resolve(host: str, port: int) -> list[str]:
    """What getaddrinfo(3) says, in the order in which they are to be tried.

    Raises:
        OSError: there are none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for family, *_, address in found if family in (socket.AF_INET, socket.AF_INET6)]


async def within(seconds: float, work: Coroutine[None, None, _T]) -> _T:
    """asyncio.wait_for(), which before Python 3.12 may lose a cancellation.

    Raises:
        TimeoutError: it takes longer.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError(f"no answer in {seconds:.0f} s")
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Lookups:
    """Those of one sandbox; everything in the thread of its event loop."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._loop = asyncio.get_running_loop()
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def addresses(self, host: str, port: int) -> list[str]:
        """
        Raises:
            OSError: there are none, or nobody says in time.
        """
        found = await within(_PATIENCE, self._look_up(host, port))
        if not found:
            raise OSError("it has no address")
        return found[:_MOST_ADDRESSES]

    async def _look_up(self, host: str, port: int) -> list[str]:
        await self._free.acquire()
        answer: asyncio.Future[list[str]] = self._loop.create_future()

        def done(found: list[str], error: OSError | None) -> None:
            self._free.release()  # not before: a thread that nobody waits for any more is there all the same
            if answer.done():
                return
            if error is None:
                answer.set_result(found)
            else:
                answer.set_exception(error)

        def work() -> None:
            found: list[str] = []
            failure: OSError | None = None
            try:
                found = self._resolve(host, port)
            except OSError as error:
                failure = error
            except Exception as error:  # a thread ends here: the one who waits is told
                failure = OSError(str(error))
            try:
                self._loop.call_soon_threadsafe(done, found, failure)
            except RuntimeError:  # the loop is over, and nobody waits
                return

        try:
            # Not a pool of concurrent.futures: at its end a program waits for the threads of those.
            threading.Thread(target=work, name="code_sandboxes-lookup", daemon=True).start()
        except RuntimeError as error:
            self._free.release()
            raise OSError(str(error)) from None
        return await answer
