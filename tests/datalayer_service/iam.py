"""Who is asking: the account, its credits, and its secrets."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import threading

from tests.datalayer_service.answers import Answer, Json, Refusal, Request, new_uid, success, unprocessable
from tests.datalayer_service.ledger import Ledger

__all__ = ["Iam", "Secrets", "new_api_key"]

_VARIANTS = ("generic", "password", "key", "token")


class Secrets:
    """What users keep with the cloud, for their runtimes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._secrets: dict[str, Json] = {}
        self._values: dict[str, str] = {}

    def values(self) -> dict[str, str]:
        """By name, as they are injected."""
        with self._lock:
            return {str(told["name_s"]): self._values[uid] for uid, told in self._secrets.items()}

    def told(self) -> list[Json]:
        with self._lock:
            return list(self._secrets.values())

    def add(self, name: str, value: str, description: str = "", variant: str = "generic") -> Json:
        with self._lock:
            if any(told["name_s"] == name for told in self._secrets.values()):
                raise Refusal(409, f"There is a secret {name} already")
            uid = new_uid()
            told: Json = {"uid": uid, "name_s": name, "description_t": description, "variant_s": variant}
            self._secrets[uid] = told
            self._values[uid] = value
            return told

    def remove(self, uid: str) -> None:
        with self._lock:
            if self._secrets.pop(uid, None) is None:
                raise Refusal(404, f"Secret {uid} not found")
            del self._values[uid]


class Iam:
    """The account service."""

    def __init__(self, ledger: Ledger, user_secrets: Secrets) -> None:
        self._ledger = ledger
        self._secrets = user_secrets

    def whoami(self, request: Request) -> Answer:
        profile = {
            "uid": "01J00000000000000000000000",
            "handle_s": "ada",
            "first_name_t": "Ada",
            "last_name_t": "Lovelace",
            "email_s": "ada@example.org",
        }
        return success({"profile": profile})

    def credits(self, request: Request) -> Answer:
        return success(self._ledger.usage())

    def secrets(self, request: Request) -> Answer:
        return success({"secrets": self._secrets.told()})

    def add_secret(self, request: Request) -> Answer:
        body = request.json()
        name, variant = body.get("name"), body.get("variant", "generic")
        if not isinstance(name, str) or not name:
            raise unprocessable(("body", "name"), "Field required", "missing")
        if variant not in _VARIANTS:
            raise unprocessable(("body", "variant"), f"Input should be one of {', '.join(_VARIANTS)}", "enum")
        try:
            value = base64.b64decode(str(body.get("value")), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise unprocessable(("body", "value"), "Input should be base64", "base64_invalid") from error
        added = self._secrets.add(name, value, str(body.get("description", "")), str(variant))
        return success({"secret": added}, status=201)

    def remove_secret(self, request: Request, uid: str) -> Answer:
        self._secrets.remove(uid)
        return success()


def new_api_key() -> str:
    """It looks like a JWT, and is nobody's."""
    head = _part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    return f"{head}.{_part(json.dumps({'sub': new_uid()}).encode())}.{_part(secrets.token_bytes(32))}"


def _part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
