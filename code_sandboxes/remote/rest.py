"""JSON over HTTP, with a token that stands in one header and nowhere else; blocking.

Neither the proxies nor the ``.netrc`` of the environment are heeded: the second would put a password in the
place of the token. Certificates are checked against the system's (``SSL_CERT_FILE`` names others).
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from functools import cache, partial
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3 import HTTPConnectionPool, Retry
from urllib3.connection import HTTPConnection
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

from code_sandboxes.errors import (
    SandboxAuthenticationError,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxQuotaExceededError,
)
from code_sandboxes.reaper import Guard
from code_sandboxes.transports.dialling import dial_unix

__all__ = ["Answer", "HttpError", "Place", "Rest", "tls"]

# Seconds to connect, and to wait for an answer.
_CONNECT, _ANSWER = 10.0, 60.0

# Characters of what a server says that are told on.
_LONGEST_REASON = 500

_UNIX = "http+unix"


class HttpError(SandboxConnectionError):
    """A server's answer that is none that was hoped for."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Answer:
    """What a server has answered.

    Attributes:
        status: of HTTP.
        value: its body, if that was JSON, else None.
        location: the header of that name; empty without.
        retry_after: seconds, from the header of that name; None without.
    """

    def __init__(self, response: requests.Response) -> None:
        self.status = response.status_code
        self.location = response.headers.get("Location", "")
        after = response.headers.get("Retry-After", "")
        self.retry_after = float(after) if after.isdecimal() else None
        try:
            self.value: Any = response.json()
        except ValueError:
            self.value = None
        self.text = response.text if self.value is None else ""

    @property
    def mapping(self) -> Mapping[str, Any]:
        """Its body, if that was a JSON object; else an empty one."""
        return self.value if isinstance(self.value, dict) else {}

    def reason(self) -> str:
        """What it says about itself, in a line."""
        told = self.mapping
        detail = told.get("detail")
        if isinstance(detail, dict):
            detail = detail.get("message")
        elif isinstance(detail, list):
            detail = "; ".join(str(each.get("msg", each)) for each in detail if isinstance(each, dict))
        words = [str(word) for word in (told.get("message"), told.get("reason"), detail) if word]
        text = ": ".join(dict.fromkeys(words)) or _without_tags(self.text)
        return text[:_LONGEST_REASON]


class Place:
    """Where a server is.

    Args:
        url: ``http://``, ``https://``, or ``http+unix://`` with the path of a socket, its slashes as ``%2F``,
            in the place of the host; what follows is the path below which the server's own begin.
        what: is to be there, for messages.

    Raises:
        SandboxConfigurationError: it is no such URL, or there is a secret in it.
    """

    def __init__(self, url: str, what: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port  # which is looked at only now
        except (ValueError, AttributeError):
            raise SandboxConfigurationError(f"{what} must be a URL") from None
        if parts.scheme not in ("http", "https", _UNIX) or not parts.netloc:
            raise SandboxConfigurationError(
                f"{what} must be a URL that begins with http://, https:// or {_UNIX}://"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise SandboxConfigurationError(
                f"{what} must not have a user, a query or a fragment in it: a token is given with token="
            )
        self.unix_socket = unquote(parts.netloc) if parts.scheme == _UNIX else None
        self.is_secure = parts.scheme == "https"
        self.path = parts.path.rstrip("/")
        self._host = "localhost" if self.unix_socket else _host_of(parts, port)
        netloc = parts.netloc if self.unix_socket else self._host
        self.url = f"{parts.scheme}://{netloc}{self.path}"
        """The same for all that is the same place."""

    def http(self, path: str) -> str:
        return f"{'https' if self.is_secure else 'http'}://{self._host}{self.path}{path}"

    def websocket(self, path: str) -> str:
        return f"{'wss' if self.is_secure else 'ws'}://{self._host}{self.path}{path}"


class Rest:
    """Asks one server; from any thread.

    Args:
        scheme: of the ``Authorization`` header.
        what: it is, for messages.
        dial: makes the connections, in place of looking for the host of *place*.
    """

    def __init__(
        self,
        place: Place,
        token: str | None,
        *,
        scheme: str,
        what: str,
        dial: Callable[[], socket.socket] | None = None,
    ) -> None:
        self.place = place
        self.what = f"{what} at {place.url}"
        self._token = token
        self._authorization = f"{scheme} {token}" if token else None
        self._session = session = requests.Session()
        session.trust_env = False
        session.auth = _Token(self._authorization)
        # Jupyter Server gives one that is as good as the token, and stays so when that is revoked.
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        if dial is None and place.unix_socket is not None:
            dial = partial(dial_unix, place.unix_socket)
        adapter = _Adapter(dial)
        session.mount("http://", adapter)
        session.mount("https://", adapter)

    def ask(
        self,
        verb: str,
        path: str,
        body: object = None,
        *,
        seconds: float = _ANSWER,
        params: Mapping[str, str] | None = None,
    ) -> Answer:
        """Its answer, whatever the status, but for those that concern who is asking.

        Raises:
            SandboxAuthenticationError: it does not know this token, or the token may not do that.
            SandboxQuotaExceededError: there are as many kernels as there may be.
            SandboxConnectionError: it does not answer.
        """
        try:
            response = self._session.request(
                verb,
                self.place.http(path),
                json=body,
                params=params,
                timeout=(_CONNECT, seconds),
                allow_redirects=False,
            )
        except requests.RequestException as error:
            why = self._without_token(_cause(error))
            raise SandboxConnectionError(f"{self.what} did not answer: {why}") from None
        answer = Answer(response)
        if answer.status == 401 or (answer.status == 403 and not _is_limit(answer)):
            raise SandboxAuthenticationError(f"{self.what} {self._why_refused(answer)}")
        if answer.status == 403:
            raise SandboxQuotaExceededError(f"{self.what}: {self.reason(answer)}")
        if 300 <= answer.status < 400:
            raise SandboxAuthenticationError(
                f"{self.what} sends who asks to another page, as it does with who has not logged in"
                + ("" if self._token else "; give token=")
            )
        return answer

    def expect(self, verb: str, path: str, body: object = None, *, seconds: float = _ANSWER) -> Answer:
        """Its answer, if it has done what was asked.

        Raises:
            HttpError: it has not.
            SandboxError: see :meth:`ask`.
        """
        answer = self.ask(verb, path, body, seconds=seconds)
        if not 200 <= answer.status < 300:
            raise self.error(answer, f"{verb} {path}")
        return answer

    def reason(self, answer: Answer) -> str:
        """What it says in *answer* about itself, in a line that can be told."""
        return self._without_token(answer.reason())

    def error(self, answer: Answer, what: str) -> HttpError:
        """That *answer* to *what* was not the one that was hoped for."""
        reason = self.reason(answer)
        return HttpError(
            f"{self.what} answered {what} with the HTTP status {answer.status}"
            + f": {reason}" * bool(reason),
            answer.status,
        )

    def guard(self, path: str, body: object = None) -> Guard:
        """Deletes what is there if this program is killed."""
        return Guard(
            "resource",
            self.place.http(path),
            os.path.abspath(self.place.unix_socket) if self.place.unix_socket else "",
            self._authorization or "",
            "" if body is None else json.dumps(body),
        )

    def close(self) -> None:
        self._session.close()

    def _why_refused(self, answer: Answer) -> str:
        if not self._token:
            return "wants a token, and none was given: pass token="
        reason = self.reason(answer)
        # What Jupyter says to a write that has neither a known token nor a form's secret.
        said = f" ({reason})" if reason and "_xsrf" not in reason else ""
        return f"does not take this token, or not for that{said}"

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "[token]") if self._token else text


class _Token(AuthBase):
    def __init__(self, header: str | None) -> None:
        self._header = header

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._header is not None:
            request.headers["Authorization"] = self._header
        return request


@cache
def tls() -> ssl.SSLContext:
    """What every ``https://`` and ``wss://`` of this process is checked with; it takes a while to make."""
    return ssl.create_default_context()


class _Adapter(HTTPAdapter):
    """With the certificates of :func:`tls`, or over connections that somebody else makes."""

    def __init__(self, dial: Callable[[], socket.socket] | None) -> None:
        self._dial = dial
        again = _Again(
            total=2,
            backoff_factor=0.1,
            status_forcelist=(502, 503, 504),
            raise_on_status=False,
            respect_retry_after_header=False,  # it may ask for hours
        )
        super().__init__(max_retries=again)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=tls())
        if self._dial is not None:
            pool = partial(_DialledPool, self._dial)
            self.poolmanager.pool_classes_by_scheme = {"http": pool}  # makes one

    def close(self) -> None:
        # urllib3 lets go of its pools, and an error that somebody keeps may keep one, and what is open in it.
        for key in self.poolmanager.pools.keys():  # noqa: SIM118  (it is no dict)
            self.poolmanager.pools[key].close()
        super().close()


class _Again(Retry):
    """What has not reached the server, or what a proxy before it says for it, can be asked again."""

    def increment(self, *args: Any, **kwargs: Any) -> _Again:
        error = kwargs.get("error")
        if isinstance(error, ReadTimeoutError):  # who has kept silent for so long would do so again
            raise error
        return super().increment(*args, **kwargs)


class _DialledPool(HTTPConnectionPool):
    def __init__(self, dial: Callable[[], socket.socket], *args: Any, **kwargs: Any) -> None:
        self.ConnectionCls = partial(_DialledConnection, dial)  # type: ignore[assignment]  # makes one
        super().__init__(*args, **kwargs)


class _DialledConnection(HTTPConnection):
    def __init__(self, dial: Callable[[], socket.socket], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._dial = dial

    def _new_conn(self) -> socket.socket:
        try:
            return self._dial()
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error


def _host_of(parts: SplitResult, port: int | None) -> str:
    name = parts.hostname or ""
    name = f"[{name}]" if ":" in name else name
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return name if port in (None, default) else f"{name}:{port}"


def _is_limit(answer: Answer) -> bool:
    """Is a 403 about how much there is already? Kernel Gateway and Enterprise Gateway mean that, too."""
    return any(word in answer.reason().lower() for word in ("limit", "quota"))


def _cause(error: BaseException) -> str:
    """The innermost reason: what is around it names pools and retries."""
    while isinstance(error.args[0] if error.args else None, BaseException) or hasattr(error, "reason"):
        inner = getattr(error, "reason", None) or error.args[0]
        if not isinstance(inner, BaseException):
            break
        error = inner
    text = str(error).rpartition(">: ")[2] or str(error)
    return text or type(error).__name__


def _without_tags(text: str) -> str:
    """What an HTML page says, about."""
    text = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", text[:100_000])
    return " ".join(re.sub(r"<[^<>]*>", " ", text).split())
