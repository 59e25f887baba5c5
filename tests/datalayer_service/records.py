"""What a service was asked, for assertions, and as a cloud would log it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from tests.datalayer_service.answers import Request

__all__ = ["Record", "Records"]


@dataclass(frozen=True)
class Record:
    """One request."""

    method: str
    path: str  # without the query
    query: str
    status: int | None  # none was sent
    scheme: str  # of its Authorization; never what follows
    body: object  # what was sent as JSON
    at: float


class Records:
    """The requests in the order of their answers: each is here before the client has its answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self._lines: list[str] = []

    def add(self, request: Request, status: int | None, origin: str) -> None:
        now = time.time()
        query = request.target.partition("?")[2]
        record = Record(
            request.method, request.path, query, status, request.scheme, request.json_or_none(), now
        )
        with self._lock:
            self._records.append(record)
            self._lines.append(_line(request, status, origin, now))

    @property
    def all(self) -> list[Record]:
        with self._lock:
            return list(self._records)

    @property
    def log(self) -> str:
        with self._lock:
            return "".join(self._lines)


def _line(request: Request, status: int | None, origin: str, now: float) -> str:
    """As proxies log it: the whole URL, and the headers that they log; a token in any of them is told."""
    when = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(now))
    told = f'"{request.header("Referer") or "-"}" "{request.header("User-Agent") or "-"}"'
    answered = 499 if status is None else status  # nginx's code for a client that hung up first
    return f'127.0.0.1 - - [{when}] "{request.method} {origin}{request.target} HTTP/1.1" {answered} {told}\n'
