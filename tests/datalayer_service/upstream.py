"""HTTP to the Jupyter Server of a pod, through its socket."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import closing
from pathlib import Path

from tests.datalayer_service.answers import Answer, Request

__all__ = ["HOP_BY_HOP", "ask", "connect", "forward"]

# Between two neighbours alone (RFC 9110, 7.6.1); lengths are counted anew.
HOP_BY_HOP = {
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def forward(path: Path, request: Request) -> Answer:
    """What the server at the socket *path* answers to *request*."""
    # Behind its own ingress a server is told no other name than the one it knows; it refuses unknown ones.
    with closing(http.client.HTTPConnection("localhost")) as upstream:
        upstream.sock = connect(path)
        upstream.putrequest(request.method, request.target, skip_accept_encoding=True)
        for name, value in request.headers:
            if name.lower() not in HOP_BY_HOP:
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(request.body)))
        upstream.endheaders(request.body)
        response = upstream.getresponse()
        body = response.read()
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP]
    content_type = next((value for name, value in kept if name.lower() == "content-type"), "")
    headers = tuple((name, value) for name, value in kept if name.lower() != "content-type")
    return Answer(response.status, body, content_type, headers)


def ask(path: Path, token: str, method: str, target: str, body: object = None) -> tuple[int, object]:
    """The status and the JSON of an answer to the service itself."""
    data = b"" if body is None else json.dumps(body).encode()
    headers = (("Authorization", f"token {token}"), ("Content-Type", "application/json"))
    answer = forward(path, Request(method, target, {}, target, headers, data))
    return answer.status, json.loads(answer.body) if answer.body else None
