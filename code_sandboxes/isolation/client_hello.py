"""Read the Server Name in the first bytes that a TLS client sends.

RFC 8446, section 4.1.2 (ClientHello) and 5.1 (records); RFC 6066, section 3 (Server Name).

No socket. What a server could read in another way than this is refused as malformed. Not to be seen here are
the Host of a request that is encrypted, and the hello that a client sends once more when the server has asked
it for another key (HelloRetryRequest).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ClientHello", "MalformedHelloError", "NotTlsError", "read_client_hello"]

# A hello with post-quantum keys has some 1,800 bytes.
_LONGEST = 16 * 1024
_MOST_RECORDS = 16

_HANDSHAKE = 22
_CONTENT_TYPES = range(20, 25)
_LONGEST_FRAGMENT = 2**14  # RFC 8446, section 5.1
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_HOST_NAME = 0
# encrypted_client_hello, and its draft encrypted_server_name. The name outside is any that the client likes:
# the server goes by the one inside.
_ENCRYPTED = (0xFE0D, 0xFFCE)


class NotTlsError(ValueError):
    """It does not begin like TLS."""


class MalformedHelloError(ValueError):
    """It begins like TLS, and is not a ClientHello as the standards have it."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """
    Args:
        server_name: as it was sent, or None.
        is_encrypted: there is another hello in it that only the server can read (ECH), or what looks like it.
    """

    server_name: str | None
    is_encrypted: bool = False


def read_client_hello(data: bytes) -> ClientHello | None:
    """
    Args:
        data: all that the client has sent so far.

    Returns:
        None if more is needed; never for more than about 16 KiB.

    Raises:
        NotTlsError: by what has come, this is something else.
        MalformedHelloError: no server should take this for a ClientHello, but one might.
    """
    if not data or _may_become_ssl2(data):
        return None
    # OpenSSL passes over alerts before the hello: those, too, begin what a server takes for TLS.
    if data[0] not in _CONTENT_TYPES or (len(data) > 1 and data[1] != 3):
        raise NotTlsError("it is not TLS")
    message = bytearray()
    rest = data
    for _ in range(_MOST_RECORDS):
        if len(rest) < 5:
            return None
        if rest[0] != _HANDSHAKE or rest[1] != 3:
            raise MalformedHelloError("it is TLS that does not begin with a ClientHello")
        length = int.from_bytes(rest[3:5], "big")
        if not 0 < length <= _LONGEST_FRAGMENT:
            raise MalformedHelloError("a record has no length that TLS allows")
        message += rest[5 : 5 + length]
        if message and message[0] != _CLIENT_HELLO:
            raise MalformedHelloError("it is TLS that does not begin with a ClientHello")
        if len(message) >= 4:
            end = 4 + int.from_bytes(message[1:4], "big")
            if end > _LONGEST:
                raise MalformedHelloError(f"the ClientHello has more than {_LONGEST} bytes")
            if len(message) > end:
                raise MalformedHelloError("something follows the ClientHello in its record")
            if len(message) == end:
                return _Reader(bytes(message[4:])).client_hello()
        if len(rest) < 5 + length:
            return None
        rest = rest[5 + length :]
    raise MalformedHelloError(f"the ClientHello is in more than {_MOST_RECORDS} pieces")


def _may_become_ssl2(data: bytes) -> bool:
    """The hello of SSL 2, which servers still understand (RFC 5246, appendix E.2), has no Server Name.

    Raises:
        MalformedHelloError: it is one.
    """
    if not data[0] & 0x80 or (len(data) > 2 and data[2] != _CLIENT_HELLO):
        return False
    if len(data) < 5:
        return True
    if data[3] == 3 or data[3:5] == b"\x00\x02":
        raise MalformedHelloError("it is a ClientHello of SSL 2, which has no Server Name")
    return False


class _Reader:
    """Takes a ClientHello apart, from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def client_hello(self) -> ClientHello:
        self._take(2 + 32)  # legacy_version, random
        self._vector(1)  # legacy_session_id
        self._vector(2)  # cipher_suites
        self._vector(1)  # legacy_compression_methods
        extensions = self._extensions() if self._is_left() else {}
        if self._is_left():
            raise MalformedHelloError("something follows the extensions of the ClientHello")
        name = _Reader(extensions[_SERVER_NAME]).server_name() if _SERVER_NAME in extensions else None
        return ClientHello(name, any(kind in extensions for kind in _ENCRYPTED))

    def server_name(self) -> str:
        entry = _Reader(self._vector(2))
        if self._is_left() or entry._number(1) != _HOST_NAME:
            raise MalformedHelloError("the Server Name extension is malformed")
        name = entry._vector(2)
        if entry._is_left() or not name or not name.isascii():
            raise MalformedHelloError("the Server Name extension is malformed, or has several names")
        return name.decode("ascii")

    def _extensions(self) -> dict[int, bytes]:
        inner = _Reader(self._vector(2))
        found: dict[int, bytes] = {}
        while inner._is_left():
            kind = inner._number(2)
            if kind in found:
                raise MalformedHelloError("the ClientHello has an extension twice")
            found[kind] = inner._vector(2)
        return found

    def _is_left(self) -> bool:
        return self._at < len(self._data)

    def _vector(self, size: int) -> bytes:
        """What has its length, of *size* bytes, before it."""
        return self._take(self._number(size))

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) != count:
            raise MalformedHelloError("the ClientHello ends too early")
        self._at += count
        return taken
