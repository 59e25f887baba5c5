"""Connections to who listens somewhere; blocking."""

from __future__ import annotations

import socket
import ssl

__all__ = ["dial_tcp", "dial_unix"]

# Seconds for name, connection and TLS, each.
_PATIENCE = 10.0


def dial_tcp(host: str, port: int, tls: ssl.SSLContext | None = None) -> socket.socket:
    """A connection on which nothing small is put off.

    Args:
        tls: what it is secured with.

    Raises:
        OSError: nobody listens there, or is who he says he is.
    """
    connection = socket.create_connection((host, port), _PATIENCE)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            return tls.wrap_socket(connection, server_hostname=host)
    except BaseException:
        connection.close()
        raise
    return connection


def dial_unix(path: str) -> socket.socket:
    """A connection to a Unix socket.

    Raises:
        OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_PATIENCE)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
