"""Jupyter messages as values, and the requests that a client makes.

Source: the Jupyter messaging documentation, sections "General Message Format" and "Messages on the
shell (ROUTER/DEALER) channel".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Channel", "Message", "Session", "execute_content"]

Channel = Literal["shell", "iopub", "stdin", "control"]

_PROTOCOL_VERSION = "5.4"

_EMPTY: Mapping[str, object] = {}


@dataclass(frozen=True, slots=True)
class Message:
    """One message: the four dictionaries of the wire, and the binary buffers behind them.

    What stands in the dictionaries of a received message is the kernel's word and is not checked yet.
    """

    channel: Channel
    header: Mapping[str, object]
    parent_header: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
    content: Mapping[str, object] = field(default_factory=dict)
    buffers: Sequence[bytes | memoryview] = ()

    @property
    def msg_id(self) -> str:
        return _text(self.header.get("msg_id"))

    @property
    def msg_type(self) -> str:
        return _text(self.header.get("msg_type"))

    @property
    def parent_id(self) -> str:
        """The id of the request that caused it; empty where nobody did."""
        return _text(self.parent_header.get("msg_id"))


class Session:
    """The client's side of the conversation: its session id, and a new message id for each request.

    Args:
        session_id: told to the kernel in every header; a kernel answers to it.
        date: gives the time for the header, as ISO 8601.
    """

    def __init__(self, session_id: str, date: Callable[[], str]) -> None:
        self.session_id = session_id
        self._date = date
        self._numbers = itertools.count(1)

    def message(
        self,
        channel: Channel,
        msg_type: str,
        content: Mapping[str, object] = _EMPTY,
        *,
        parent_header: Mapping[str, object] = _EMPTY,
        metadata: Mapping[str, object] = _EMPTY,
        buffers: Sequence[bytes | memoryview] = (),
        subshell_id: str | None = None,
    ) -> Message:
        header: dict[str, object] = {
            "msg_id": f"{self.session_id}_{next(self._numbers)}",
            "session": self.session_id,
            "username": "code_sandboxes",
            "msg_type": msg_type,
            "version": _PROTOCOL_VERSION,
            "date": self._date(),
        }
        if subshell_id is not None:  # JEP 91; without it, it is for the main shell
            header["subshell_id"] = subshell_id
        return Message(channel, header, parent_header, metadata, content, buffers)

    def made(self, message: Message) -> bool:
        """Is *message* an answer to one of ours?"""
        return message.parent_header.get("session") == self.session_id


def execute_content(code: str, *, allow_stdin: bool) -> dict[str, object]:
    """The content of an ``execute_request`` (section "Execute")."""
    return {
        "code": code,
        "silent": False,
        "store_history": True,
        "user_expressions": {},
        "allow_stdin": allow_stdin,
        "stop_on_error": False,  # ours wait here for their turn; what others have sent need not be aborted
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
