"""A connection of our own to a container engine, wherever it is: a socket that can be waited for with others.

The package docker has them, too, but of several kinds; one is no socket (``ssh://``), none is public.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from code_sandboxes.transports.dialling import dial_tcp, dial_unix

__all__ = ["EngineAddress"]

# Seconds.
_CONNECT = 10.0

_HTTP = {"http": 2375, "tcp": 2375, "https": 2376}


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine is.

    Args:
        url: ``unix://``, ``http://``, ``https://``, ``tcp://`` or ``ssh://``.
        version: of its interface that is spoken with it.
        tls: for ``https://``.
    """

    url: str
    version: str
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def dial(self) -> socket.socket:
        """A connection; blocks.

        Raises:
            OSError: nobody listens there, or is who he says he is.
        """
        parts = urlsplit(self.url)
        if parts.scheme == "unix":
            return dial_unix(unquote(self.url.removeprefix("unix://")))
        if parts.scheme == "ssh":
            return _Ssh.dial(parts.hostname or "", parts.username, parts.port)
        connection = dial_tcp(parts.hostname or "", parts.port or _HTTP[parts.scheme], self.tls)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except BaseException:
            connection.close()
            raise
        return connection


class _Ssh(socket.socket):
    """What the command ``ssh`` reads and writes; it ends with this."""

    _process: subprocess.Popen[bytes]

    @classmethod
    def dial(cls, host: str, user: str | None, port: int | None) -> _Ssh:
        ours, its = socket.socketpair()
        connection = cls(fileno=ours.detach())
        # As the command ``docker`` does it; it could not ask anybody for a password each time.
        command = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT:g}"]
        command += ["-l", user] if user else []
        command += ["-p", str(port)] if port else []
        try:
            connection._process = subprocess.Popen(
                [*command, "--", host, "docker", "system", "dial-stdio"],
                stdin=its.fileno(),
                stdout=its.fileno(),
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it
            )
        except BaseException:
            socket.socket.close(connection)
            raise
        finally:
            its.close()
        return connection

    def close(self) -> None:
        was_open = self.fileno() >= 0
        super().close()
        if was_open:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CONNECT)
