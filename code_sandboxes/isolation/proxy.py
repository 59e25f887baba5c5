"""The forward proxy of one sandbox: CONNECT, and http:// requests, to the hosts that it may reach.

A name is matched before it is resolved, every address that it has is checked, and one that was checked is
connected to: nobody looks it up again. What a program in the sandbox starts with in a tunnel is read before
any of it is passed on: TLS has to name the host that the tunnel is for. In plain HTTP one request goes
through a connection, and its Host is the one that was checked.

Nothing of the connections is kept but what is on its way: a reader who stops stops the writer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Coroutine

from code_sandboxes.isolation.client_hello import (
    ClientHello,
    MalformedHelloError,
    NotTlsError,
    read_client_hello,
)
from code_sandboxes.isolation.hosts import (
    HOST_NAME,
    AllowedHosts,
    NotAllowedError,
    canonical_host,
    is_address,
    is_loopback_of_the_sandbox,
    with_port,
)
from code_sandboxes.isolation.lookups import Lookups, Resolve, within
from code_sandboxes.isolation.network_log import NetworkLog
from code_sandboxes.isolation.request_head import END, LONGEST, BadRequestError, Request, parse_request

__all__ = ["Proxy"]

_log = logging.getLogger(__name__)

# Further ones wait in the backlog of the listening socket.
_MOST_CONNECTIONS = 128

# Seconds: for the whole head of a request, for one address to answer and for all of a name's, and without a
# byte in either direction.
_HEAD = 30.0
_CONNECT = 5.0
_CONNECT_ALL = 20.0
_IDLE = 300.0

# More makes a single download a little faster, and takes as much from every connection that is stalled.
_CHUNK = 64 * 1024

# How long, and for how many bytes, a refused client is listened to. Closing a socket with unread data resets
# the connection, and the client would lose what it was told (RFC 9112, section 9.6).
_FAREWELL = 2.0
_MOST_UNREAD = 1024 * 1024

# Where a process has no descriptor left, accept(2) fails at once, again and again.
_OUT_OF_DESCRIPTORS = 0.1

# A fatal alert, access_denied (RFC 8446, section 6).
_ALERT = bytes([21, 3, 3, 0, 2, 2, 49])

_RESET = struct.pack("ii", 1, 0)  # struct linger of socket(7): on, for 0 s

# Characters of what a sandbox has called a host, and of a sentence: in the first line of an answer and below.
_LONGEST_SHOWN = 100
_LONGEST_PHRASE = 300
_LONGEST_SENTENCE = 1000


class Proxy:
    """
    Args:
        listener: the proxy's from now on.
    """

    def __init__(
        self, listener: socket.socket, allowed: AllowedHosts, log: NetworkLog, resolve: Resolve
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._allowed = allowed
        self._log = log
        self._lookups = Lookups(resolve)
        self._connections: set[asyncio.Task[None]] = set()
        self._is_listening = False
        self._is_over = False

    async def serve(self) -> None:
        """Until it is cancelled; then the connections end at once, and the listening socket is closed."""
        try:
            self._listen()
            await self._loop.create_future()
        finally:
            self._is_over = True
            self._pause()
            self._listener.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _listen(self) -> None:
        if not self._is_over and not self._is_listening and len(self._connections) < _MOST_CONNECTIONS:
            self._is_listening = True
            self._loop.add_reader(self._listener, self._accept)

    def _pause(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        # Not loop.sock_accept(): one that is cancelled may have accepted a connection, which is lost then.
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it was reset before it was accepted
            return
        except OSError:
            self._pause()
            self._loop.call_later(_OUT_OF_DESCRIPTORS, self._listen)
            return
        client.setblocking(False)
        connection = _Connection(client, self._allowed, self._log, self._lookups)
        task = self._loop.create_task(connection.run())
        self._connections.add(task)
        task.add_done_callback(lambda task: self._ended(task, client))
        if len(self._connections) >= _MOST_CONNECTIONS:
            self._pause()

    def _ended(self, connection: asyncio.Task[None], client: socket.socket) -> None:
        client.close()  # if it was cancelled before it began, nobody else has
        self._connections.discard(connection)
        self._listen()
        if not connection.cancelled() and connection.exception() is not None:
            _log.error("a connection of the egress proxy failed", exc_info=connection.exception())


class _AnswerError(Exception):
    """The client is told this, and nothing else comes of its request."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(answer)
        self.answer = answer


class _Connection:
    """One connection of a program in the sandbox, to its end."""

    def __init__(
        self, client: socket.socket, allowed: AllowedHosts, log: NetworkLog, lookups: Lookups
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._allowed = allowed
        self._log = log
        self._lookups = lookups

    async def run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._patience = _Patience(self._loop, task.cancel)
        finished = False
        try:
            _send_at_once(self._client)
            await self._answer()
            finished = True
        except OSError:  # the client has reset the connection, or is gone: nobody is left to be told
            return
        finally:
            self._patience.end()
            _close(self._client, reset=not finished)

    async def _answer(self) -> None:
        try:
            self._patience.allow(_HEAD)
            head, rest = await self._read_head()
            if head:
                await self._serve(self._parsed(head), rest)
        except _AnswerError as error:
            await self._say_farewell(error.answer)

    async def _read_head(self) -> tuple[bytes, bytes]:
        """The head of the request, empty if there is none, and what has come after it."""
        received = bytearray()
        while chunk := await self._loop.sock_recv(self._client, LONGEST):
            looked_at = max(0, len(received) - len(END) + 1)
            received += chunk
            end = received.find(END, looked_at)
            if end + len(END) > LONGEST or (end < 0 and len(received) > LONGEST):
                raise self._bad_request(
                    BadRequestError(f"the head of the request has more than {LONGEST} bytes")
                )
            if end >= 0:
                return bytes(received[: end + len(END)]), bytes(received[end + len(END) :])
        return b"", b""

    def _parsed(self, head: bytes) -> Request:
        try:
            return parse_request(head)
        except BadRequestError as error:
            raise self._bad_request(error) from None

    def _bad_request(self, error: BadRequestError) -> _AnswerError:
        self._log.refused(error.target, 0, str(error))
        return _AnswerError(_response(error.status, f"the proxy of the sandbox cannot do that: {error}"))

    async def _serve(self, request: Request, rest: bytes) -> None:
        host = self._checked(request)
        attempt = _Attempt(self._log, host, request.port)
        server = await self._connected(attempt)
        finished = False
        try:
            _send_at_once(server)
            self._patience.allow(_IDLE)
            if request.is_tunnel:
                await self._tunnel(server, rest, attempt)
            else:
                await self._exchange(server, request, rest, attempt)
            finished = True
        finally:
            _close(server, reset=not finished)

    # May it?

    def _checked(self, request: Request) -> str:
        """The host in its one form."""
        port = request.port
        if self._allowed.is_empty:
            raise self._refused(request.host, port, 'network_policy is "none"')
        try:
            host = canonical_host(request.host)
        except ValueError as error:
            raise self._refused(request.host, port, f"{request.host[:_LONGEST_SHOWN]!a}: {error}") from None
        if is_loopback_of_the_sandbox(host):
            reason = f"{host} is the sandbox's own loopback, which is reached without the proxy (NO_PROXY)"
            raise self._refused(host, port, reason)
        if not self._allowed.allows_name(host, port):
            raise self._refused(host, port, f"{with_port(host, port)} is not in allowed_hosts")
        return host

    def _refused(self, host: str, port: int, reason: str) -> _AnswerError:
        self._log.refused(host, port, reason)
        return _AnswerError(_response(403, _in_words(reason)))

    # Connect

    async def _connected(self, attempt: _Attempt) -> socket.socket:
        try:
            addresses = await self._addresses(attempt.host, attempt.port)
        except NotAllowedError as error:
            raise self._refused(attempt.host, attempt.port, str(error)) from None
        except OSError as error:
            attempt.is_allowed()
            raise _AnswerError(_response(502, f"cannot resolve {attempt.host}: {error}")) from None
        give_up = self._loop.time() + _CONNECT_ALL
        failure = OSError("nobody has answered")
        self._patience.allow(_IDLE)
        for address in addresses:
            patience = min(_CONNECT, give_up - self._loop.time())
            if patience <= 0:
                break
            try:
                server = await self._connect(address, attempt.port, patience)
            except OSError as error:
                failure = error
                continue
            attempt.address = address
            return server
        attempt.is_allowed()
        where = with_port(attempt.host, attempt.port)
        raise _AnswerError(_response(502, f"cannot connect to {where}: {failure}"))

    async def _addresses(self, host: str, port: int) -> list[str]:
        """Those that may be connected to: all of them, or none.

        Raises:
            NotAllowedError: one may not.
            OSError: there are none.
        """
        if host == HOST_NAME:
            return ["127.0.0.1", "::1"]
        self._patience.allow(_IDLE)
        found = [host] if is_address(host) else await self._lookups.addresses(host, port)
        for address in found:
            self._allowed.check_address(host, address, port, is_own=_is_own(address))
        return found

    async def _connect(self, address: str, port: int, patience: float) -> socket.socket:
        server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            server.setblocking(False)
            await within(patience, self._loop.sock_connect(server, (address, port)))
        except BaseException:
            server.close()
            raise
        return server

    # CONNECT

    async def _tunnel(self, server: socket.socket, rest: bytes, attempt: _Attempt) -> None:
        await self._loop.sock_sendall(self._client, b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            # Both at once: in some protocols it is the server that speaks first.
            await _together(
                self._pass_on_judged(server, rest, attempt),
                self._pass_on(server, self._client, attempt.is_allowed),
            )
        finally:
            attempt.is_allowed()

    async def _pass_on_judged(self, server: socket.socket, begun: bytes, attempt: _Attempt) -> None:
        await self._loop.sock_sendall(server, await self._judged(begun, attempt))
        await self._pass_on(self._client, server, attempt.is_allowed)

    async def _judged(self, begun: bytes, attempt: _Attempt) -> bytes:
        """The first bytes of the client, as soon as they may be passed on."""
        while True:
            try:
                hello = read_client_hello(begun)
            except NotTlsError as error:
                return self._without_tls(begun, attempt, error)
            except MalformedHelloError as error:
                raise self._refused_in_tunnel(attempt, str(error), _ALERT) from None
            if hello is not None:
                self._check_hello(hello, attempt)
                return begun
            chunk = await self._loop.sock_recv(self._client, _CHUNK)
            if not chunk and begun:
                raise self._refused_in_tunnel(attempt, "the ClientHello ends too early", _ALERT)
            if not chunk:
                return begun
            begun += chunk

    def _without_tls(self, begun: bytes, attempt: _Attempt, error: NotTlsError) -> bytes:
        if self._allowed.names_port(attempt.host, attempt.port):
            return begun
        where = with_port(attempt.host, attempt.port)
        reason = f"{error}, what was sent to {where}; if it is meant, add '{where}' to allowed_hosts"
        raise self._refused_in_tunnel(attempt, reason, _response(403, _in_words(reason)))

    def _check_hello(self, hello: ClientHello, attempt: _Attempt) -> None:
        if hello.is_encrypted:
            reason = "the name in an encrypted TLS ClientHello (ECH) cannot be checked; switch ECH off"
        elif hello.server_name is None:
            if is_address(attempt.host):
                return
            reason = f"the TLS ClientHello does not name the host ({attempt.host})"
        elif _is_same(hello.server_name, attempt.host):
            return
        else:
            named = hello.server_name[:_LONGEST_SHOWN]
            reason = f"the TLS ClientHello names {named!a}, not the host of the tunnel ({attempt.host})"
        raise self._refused_in_tunnel(attempt, reason, _ALERT)

    def _refused_in_tunnel(self, attempt: _Attempt, reason: str, answer: bytes) -> _AnswerError:
        # In the middle of what the server has said, the answer would be nonsense.
        is_heard = not attempt.is_told
        attempt.is_refused(reason)
        return _AnswerError(answer if is_heard else b"")

    # http://

    async def _exchange(
        self, server: socket.socket, request: Request, rest: bytes, attempt: _Attempt
    ) -> None:
        attempt.is_allowed()
        await self._loop.sock_sendall(server, request.for_server(attempt.host))
        body = self._loop.create_task(self._pass_on_body(server, request.length, rest))
        try:
            await self._pass_on(server, self._client, attempt.is_allowed)
        finally:
            body.cancel()
            await asyncio.gather(body, return_exceptions=True)
        await self._hear_out()

    async def _pass_on_body(self, server: socket.socket, length: int, rest: bytes) -> None:
        """Exactly so much and nothing after it: a second request could be for a host that nobody checked."""
        try:
            await self._loop.sock_sendall(server, rest[:length])
            missing = length - len(rest[:length])
            while missing:
                chunk = await self._loop.sock_recv(self._client, min(missing, _CHUNK))
                if not chunk:
                    raise ConnectionAbortedError("the client has left in the middle of the body")
                await self._loop.sock_sendall(server, chunk)
                missing -= len(chunk)
                self._patience.touch()
            await self._overhear()
            server.shutdown(socket.SHUT_WR)
        except OSError:  # one of them is gone: what the server has said already is still passed on
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)

    # Bytes

    async def _pass_on(
        self, source: socket.socket, target: socket.socket, passed: Callable[[], None]
    ) -> None:
        """Until the source has said everything, which the target is told too."""
        loop = self._loop
        while chunk := await loop.sock_recv(source, _CHUNK):
            passed()
            await loop.sock_sendall(target, chunk)
            self._patience.touch()
            await asyncio.sleep(0)  # where both are quick, nothing above has let others have their turn
        target.shutdown(socket.SHUT_WR)

    async def _say_farewell(self, answer: bytes) -> None:
        if answer:
            await self._loop.sock_sendall(self._client, answer)
        self._client.shutdown(socket.SHUT_WR)
        await self._hear_out()

    async def _hear_out(self) -> None:
        with contextlib.suppress(TimeoutError):  # what it has not read yet, the system still delivers
            await within(_FAREWELL, self._overhear())

    async def _overhear(self) -> None:
        """Read, up to a limit, what nobody wants to know."""
        unwanted = 0
        while unwanted < _MOST_UNREAD and (chunk := await self._loop.sock_recv(self._client, _CHUNK)):
            unwanted += len(chunk)
            await asyncio.sleep(0)


class _Attempt:
    """What is written into the log about a connection, once it is known."""

    def __init__(self, log: NetworkLog, host: str, port: int) -> None:
        self._log = log
        self.host = host
        self.port = port
        self.address = ""
        self.is_told = False

    def is_allowed(self) -> None:
        if not self.is_told:
            self.is_told = True
            self._log.allowed(self.host, self.port, self.address)

    def is_refused(self, reason: str) -> None:
        self.is_told = True
        self._log.refused(self.host, self.port, reason)


class _Patience:
    """Calls back when nothing was heard for some time; to touch it costs next to nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[], object]) -> None:
        self._loop = loop
        self._expire = expire
        self._timer: asyncio.TimerHandle | None = None

    def allow(self, seconds: float) -> None:
        self.end()
        self._seconds = seconds
        self.touch()
        self._timer = self._loop.call_later(seconds, self._look)

    def touch(self) -> None:
        self._touched = self._loop.time()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        left = self._touched + self._seconds - self._loop.time()
        if left <= 0:
            self._expire()
        else:
            self._timer = self._loop.call_later(left, self._look)


async def _together(*ways: Coroutine[None, None, None]) -> None:
    """Until all have ended, or one has failed. None goes on, with sockets that are closed, after that."""
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(way) for way in ways]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _send_at_once(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _close(connection: socket.socket, *, reset: bool) -> None:
    if reset:  # an end that was none must not look like one: half a download would pass for all of it
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


def _is_own(address: str) -> bool:
    """Is it one of this machine's? Then packets to it pass no firewall that stands before the machine.

    Where net.ipv4.ip_nonlocal_bind is set, everything looks like that.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _is_same(server_name: str, host: str) -> bool:
    try:
        return server_name.lower() == host or canonical_host(server_name) == host
    except ValueError:
        return False


def _in_words(reason: str) -> str:
    return (
        f"blocked: {reason}"
        if reason.startswith("network_policy")
        else f"blocked by network_policy: {reason}"
    )


def _response(status: int, sentence: str) -> bytes:
    """An answer of the proxy itself.

    The sentence is in its first line as well: of what answers CONNECT, most programs show nothing else.
    """
    sentence = sentence[:_LONGEST_SENTENCE]
    shown = sentence if sentence.isascii() and sentence.isprintable() else ascii(sentence)[1:-1]
    body = f"{shown}\n".encode("ascii")
    head = (
        f"HTTP/1.1 {status} {shown[:_LONGEST_PHRASE]}",
        "Content-Type: text/plain",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode("ascii") + body
