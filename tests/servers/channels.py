"""A kernel's websocket without anything of this package."""

from __future__ import annotations

import json
import secrets
from typing import Any

import websocket

__all__ = ["printed"]


def printed(channels: websocket.WebSocket, code: str, session: str = "s") -> str:
    """What *code* prints."""
    number = secrets.token_hex(16)
    header = {"msg_id": number, "session": session, "msg_type": "execute_request", "version": "5.3"}
    message: dict[str, Any] = {
        "header": {**header, "username": "", "date": ""},
        "parent_header": {},
        "metadata": {},
        "content": {"code": code, "silent": False},
        "channel": "shell",
    }
    channels.send(json.dumps(message))
    said = ""
    while True:
        told = json.loads(channels.recv())
        if told["parent_header"].get("msg_id") == number:
            said += told["content"].get("text", "") if told["msg_type"] == "stream" else ""
            if told["content"].get("execution_state") == "idle":
                return said
