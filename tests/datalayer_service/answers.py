"""Requests to the control plane, and the shapes that its answers have."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

__all__ = [
    "Answer",
    "Json",
    "Refusal",
    "Request",
    "html",
    "new_uid",
    "refusal_answer",
    "success",
    "unprocessable",
]

Json = dict[str, object]

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


@dataclass(frozen=True)
class Request:
    """A request whose body has been read."""

    method: str
    path: str
    query: Mapping[str, str]
    target: str  # the path and the query as they came
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    @property
    def scheme(self) -> str:
        """Of its Authorization; empty without one."""
        return self.header("Authorization").partition(" ")[0]

    @property
    def credential(self) -> str:
        return self.header("Authorization").partition(" ")[2]

    @property
    def is_websocket(self) -> bool:
        return self.header("Upgrade").lower() == "websocket"

    def json(self) -> Json:
        """The object that the body is; anything else is refused as FastAPI does."""
        try:
            value = json.loads(self.body)
        except ValueError as error:
            raise unprocessable(("body",), "JSON decode error", "json_invalid") from error
        if not isinstance(value, dict):
            raise unprocessable(("body",), "Input should be a valid dictionary", "dict_type")
        return value

    def json_or_none(self) -> object:
        """For the record: what the body is, if it is JSON."""
        try:
            return json.loads(self.body) if self.body else None
        except ValueError:
            return None


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    is_silence: bool = False  # it is never sent


@dataclass(eq=False)
class Refusal(Exception):
    """Ends a request; its shape is a knob's, except where `detail` is FastAPI's own."""

    status: int
    message: str
    more: Json = field(default_factory=dict)
    detail: object = None


def success(payload: Mapping[str, object] | None = None, *, status: int = 200, message: str = "") -> Answer:
    return _json(status, {"success": True, "message": message, **(payload or {})})


def unprocessable(where: tuple[str, ...], message: str, kind: str) -> Refusal:
    return Refusal(422, message, detail=[{"loc": list(where), "msg": message, "type": kind}])


def refusal_answer(refusal: Refusal, shape: str) -> Answer:
    """The answer, in one of the shapes in which clients have seen errors."""
    if refusal.detail is not None:
        return _json(refusal.status, {"detail": refusal.detail})
    if refusal.status < 400:
        shape = "envelope"
    if shape == "html":
        return html(refusal.status)
    bodies: dict[str, Json] = {
        "envelope": {"success": False, "message": refusal.message},
        "detail": {"detail": refusal.message},
        "detail_message": {"detail": {"message": refusal.message}},
        "registry": {
            "code": f"DL_ENV_{HTTPStatus(refusal.status).name}",
            "correlationId": new_uid(),
            "message": refusal.message,
        },
    }
    return _json(refusal.status, bodies[shape] | refusal.more)


def html(status: int) -> Answer:
    """What a gateway says that does not know what is behind it."""
    title = f"{status} {HTTPStatus(status).phrase}"
    page = f"<head><title>{title}</title></head>\n<body><center><h1>{title}</h1></center></body>"
    return Answer(status, f"<html>\n{page}\n</html>\n".encode(), "text/html")


def new_uid() -> str:
    """26 characters that look like a ULID, whose first ones would tell the time."""
    return "01" + "".join(secrets.choice(_CROCKFORD) for _ in range(24))


def _json(status: int, value: Json) -> Answer:
    return Answer(status, json.dumps(value).encode())
