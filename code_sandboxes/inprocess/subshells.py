"""Threads of a kernel in this process beside the one that runs code: they serve files and commands.

Source: the Jupyter messaging documentation, sections "Custom Messages" (comms) and, for subshells, JEP 91. No
code runs in them, and there is one target for comms: the guest's.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from code_sandboxes.guest import values
from code_sandboxes.guest.calls import Guest, Link
from code_sandboxes.guest.comms import TARGET, environ
from code_sandboxes.guest.files import Files
from code_sandboxes.guest.packages import Packages
from code_sandboxes.guest.processes import Processes
from code_sandboxes.guest.variables import Variables
from code_sandboxes.guest.watching import Watching
from code_sandboxes.inprocess.output import Output
from code_sandboxes.protocol.messages import Message

__all__ = ["Subshells"]

_log = logging.getLogger(__name__)

_EMPTY: Mapping[str, object] = {}


class Subshells:
    """The subshells of one kernel.

    Args:
        said: takes what they say.
        namespace: of the code.
    """

    def __init__(self, said: Output, namespace: Callable[[], dict[str, Any]]) -> None:
        self._said = said
        self._namespace = namespace
        self._guest: Guest | None = None
        self._links: dict[str, Link] = {}
        self._queues: dict[str, queue.SimpleQueue[Message | None]] = {}

    def accept(self, message: Message) -> bool:
        """Take *message*, if it is for one of them; in the I/O thread."""
        if message.msg_type == "create_subshell_request":
            self._reply(message, subshell_id=self._create())
        elif message.msg_type == "delete_subshell_request":
            self._delete(str(message.content.get("subshell_id")))
            self._reply(message)
        elif message.msg_type in _HANDLERS:
            self._queue(str(message.header.get("subshell_id", ""))).put(message)
        else:
            return False
        return True

    def close(self) -> None:
        """End them, and whatever runs in them; may block."""
        for subshell_id in list(self._queues):
            self._delete(subshell_id)
        if self._guest is not None:
            self._guest.close()

    def _create(self) -> str:
        subshell_id = os.urandom(8).hex()
        self._queue(subshell_id)
        return subshell_id

    def _queue(self, subshell_id: str) -> queue.SimpleQueue[Message | None]:
        if subshell_id not in self._queues:
            messages = self._queues[subshell_id] = queue.SimpleQueue()
            name = "code_sandboxes-subshell"
            threading.Thread(target=self._serve, args=(messages,), name=name, daemon=True).start()
        return self._queues[subshell_id]

    def _delete(self, subshell_id: str) -> None:
        messages = self._queues.pop(subshell_id, None)
        if messages is not None:
            messages.put(None)

    def _reply(self, request: Message, **content: object) -> None:
        msg_type = request.msg_type.replace("_request", "_reply")
        self._said.say("iopub", "status", {"execution_state": "busy"}, request.header, wake=False)
        self._said.say("control", msg_type, {"status": "ok", **content}, request.header, wake=False)
        self._said.say("iopub", "status", {"execution_state": "idle"}, request.header)

    # In a thread of its own.

    def _serve(self, messages: queue.SimpleQueue[Message | None]) -> None:
        while (message := messages.get()) is not None:
            self._said.say("iopub", "status", {"execution_state": "busy"}, message.header, wake=False)
            try:
                _HANDLERS[message.msg_type](self, message)
            except Exception:  # as ipykernel does; who has sent it hears that nothing came of it
                _log.exception("a %s failed", message.msg_type)
            self._said.say("iopub", "status", {"execution_state": "idle"}, message.header)

    def _open(self, message: Message) -> None:
        comm_id = str(message.content.get("comm_id"))
        if message.content.get("target_name") != TARGET:
            self._said.say("iopub", "comm_close", {"comm_id": comm_id, "data": {}}, message.header)
            return
        if self._guest is None:
            self._guest = Guest(
                [
                    Files(),
                    Watching(),
                    Processes(environ, _nobody_minds),
                    Variables(self._namespace, values),
                    Packages(),
                ]
            )

        def send(data: Mapping[str, object], buffers: list[Any]) -> None:
            self._said.say("iopub", "comm_msg", {"comm_id": comm_id, "data": data}, _EMPTY, buffers=buffers)

        self._links[comm_id] = self._guest.open(comm_id, send)
        send({"open": True}, [])

    def _receive(self, message: Message) -> None:
        link = self._links.get(str(message.content.get("comm_id")))
        data = message.content.get("data")
        if link is not None and self._guest is not None and isinstance(data, dict):
            self._guest.receive(link, data, [memoryview(buffer) for buffer in message.buffers])

    def _close_comm(self, message: Message) -> None:
        comm_id = str(message.content.get("comm_id"))
        if self._links.pop(comm_id, None) is not None and self._guest is not None:
            self._guest.close_link(comm_id)


def _nobody_minds(running: int) -> None:
    return


_HANDLERS: Mapping[str, Callable[[Subshells, Message], None]] = {
    "comm_open": Subshells._open,
    "comm_msg": Subshells._receive,
    "comm_close": Subshells._close_comm,
}
