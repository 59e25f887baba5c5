"""Passes on what comes through a listening socket to a kernel that listens where nobody else can connect."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

__all__ = ["Connect", "Connected", "Relay"]

Connected = Callable[[int, "OSError | None"], None]

Connect = Callable[[Connected], None]
"""Calls back, in any thread, with a new connection to the kernel, as a descriptor, or with an error."""

# Seconds between two attempts to reach a kernel that does not listen yet, and until it is given up.
_AGAIN = 0.02
_PATIENCE = 60.0

_CHUNK = 256 * 1024


class Relay:
    """
    Args:
        listener: the relay's from now on.
    """

    def __init__(self, listener: socket.socket, connect: Connect) -> None:
        self._listener = listener
        self._connect = connect
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until it is cancelled; then its connections end at once."""
        server = await asyncio.start_unix_server(self._join, sock=self._listener, limit=_CHUNK)
        try:
            await server.serve_forever()
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        with contextlib.closing(writer), contextlib.suppress(OSError):
            from_kernel, to_kernel = await self._reached()
            with contextlib.closing(to_kernel):
                both = [
                    asyncio.create_task(_pass_on(reader, to_kernel)),
                    asyncio.create_task(_pass_on(from_kernel, writer)),
                ]
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for each in both:
                        each.cancel()
                    await asyncio.gather(*both, return_exceptions=True)

    async def _reached(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """
        Raises:
            OSError: the kernel does not listen, for all the time that it gets.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + _PATIENCE
        while True:
            try:
                kernel = socket.socket(fileno=await self._connection())
            except OSError:  # it does not listen yet
                if loop.time() > give_up:
                    raise
                await asyncio.sleep(_AGAIN)
                continue
            kernel.setblocking(False)
            return await asyncio.open_unix_connection(sock=kernel, limit=_CHUNK)

    async def _connection(self) -> int:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[int] = loop.create_future()

        def done(descriptor: int, error: OSError | None) -> None:
            if answer.done():  # nobody waits any more
                if error is None:
                    os.close(descriptor)
            elif error is None:
                answer.set_result(descriptor)
            else:
                answer.set_exception(error)

        def tell(descriptor: int, error: OSError | None) -> None:
            loop.call_soon_threadsafe(done, descriptor, error)

        self._connect(tell)
        return await answer


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(_CHUNK):
        sink.write(data)
        await sink.drain()
