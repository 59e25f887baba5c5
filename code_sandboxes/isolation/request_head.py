"""Read what a client asks a proxy for, and write what the server is to get instead (RFC 9110, RFC 9112).

No socket. Two readers of one request that do not agree on where it ends are how a second request is smuggled
past the first (RFC 9112, section 11.2): what could be read in two ways is refused, and nothing is passed on
that was not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["END", "LONGEST", "BadRequestError", "Request", "parse_request"]

LONGEST = 32 * 1024
"""Bytes of a head, its end included."""

END = b"\r\n\r\n"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}"
_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/(1\.[01])")
_FIELD = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
_AUTHORITY = re.compile(r"(.*?)(?::([0-9]{1,5}))?")
_URL = re.compile(r"http://([^/?#]*)([/?][^#]*)?", re.IGNORECASE)

# What concerns one connection and not the request (RFC 9110, section 7.6.1), and what is written anew.
_NOT_PASSED_ON = frozenset(
    (
        "connection",
        "content-length",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "upgrade",
    )
)


class BadRequestError(ValueError):
    """The request is not one, or not for a proxy; *status* is the answer's."""

    def __init__(self, sentence: str, *, target: str = "", status: int = 400) -> None:
        super().__init__(sentence)
        self.target = target
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """
    Args:
        host: as it was written.
        is_tunnel: CONNECT.
        length: bytes of the body.
        version: ``1.0`` or ``1.1``.
        path: with the query.
        fields: header lines for the server.
    """

    method: str
    host: str
    port: int
    is_tunnel: bool
    length: int = 0
    version: str = "1.1"
    path: str = ""
    fields: tuple[str, ...] = ()

    def for_server(self, host: str) -> bytes:
        """The head that the server gets: the one request that the connection is for."""
        named = f"[{host}]" if ":" in host else host
        lines = [
            f"{self.method} {self.path} HTTP/{self.version}",
            f"Host: {named}" if self.port == 80 else f"Host: {named}:{self.port}",
            *self.fields,
            "Connection: close",
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def parse_request(head: bytes) -> Request:
    """
    Args:
        head: up to the empty line, which may be there or not.

    Raises:
        BadRequestError: it is not a request, or can be understood in two ways.
    """
    first, *rest = head.removesuffix(END).decode("latin-1").split("\r\n")
    line = _LINE.fullmatch(first)
    if line is None:
        raise BadRequestError("the request line is not one of HTTP/1.0 or HTTP/1.1")
    method, target, version = line.groups()
    try:
        fields = [_field(each) for each in rest]
        length = _length(fields)
    except BadRequestError as error:
        error.target = target
        raise
    if method == "CONNECT":
        if length:
            raise BadRequestError("CONNECT has no body", target=target)
        host, port = _authority(target, target)
        if port is None:
            raise BadRequestError("CONNECT needs a host and a port", target=target)
        return Request(method, host, port, True)
    url = _URL.fullmatch(target)
    if url is None:
        raise BadRequestError(
            "this is a proxy: it takes CONNECT, and URLs that start with http://", target=target
        )
    host, port = _authority(url[1], target)
    path = url[2] or "/"
    return Request(
        method,
        host,
        80 if port is None else port,
        False,
        length,
        version,
        path if path.startswith("/") else f"/{path}",
        tuple(_passed_on(fields)),
    )


def _field(line: str) -> tuple[str, str]:
    field = _FIELD.fullmatch(line)
    if field is None:  # a bare CR or LF, a line that is folded, a space before the colon, NUL
        raise BadRequestError("a header line is malformed")
    return field[1], field[2].strip(" \t")


def _length(fields: Iterable[tuple[str, str]]) -> int:
    lengths = [value for name, value in fields if name.lower() == "content-length"]
    if any(name.lower() == "transfer-encoding" for name, _ in fields):
        if lengths:
            raise BadRequestError("Content-Length and Transfer-Encoding exclude each other")
        raise BadRequestError("the length of the body has to be declared (Content-Length)", status=411)
    if not lengths:
        return 0
    if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
        raise BadRequestError("Content-Length is not one number")
    return int(lengths[0])


def _authority(text: str, target: str) -> tuple[str, int | None]:
    parts = _AUTHORITY.fullmatch(text)
    host, port = parts.groups() if parts else ("", None)
    if not host or (port is not None and not 0 < int(port) < 65536):
        raise BadRequestError("there is no host, or no such port", target=target)
    return host, None if port is None else int(port)


def _passed_on(fields: Iterable[tuple[str, str]]) -> Iterable[str]:
    named = {
        token.strip().lower()
        for name, value in fields
        if name.lower() == "connection"
        for token in value.split(",")
    }
    for name, value in fields:
        if name.lower() not in _NOT_PASSED_ON | named:
            yield f"{name}: {value}"
        elif name.lower() == "content-length":
            yield f"Content-Length: {int(value)}"
