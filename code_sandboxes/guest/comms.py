"""The guest in a Jupyter kernel: its calls come over comms, and it sets the environment of single runs.

Source: the Jupyter messaging documentation, section "Custom Messages"; what is used of ipykernel is named
where it is used. A comm is opened on a subshell, where the kernel has some, so that calls are answered while
code runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from inspect import isawaitable
from threading import Lock
from typing import Any

SUBSHELLS = "kernel subshells"
"""Among the ``supported_features`` of a kernel that has subshells (JEP 91)."""

TARGET = "code_sandboxes"
FEATURE = "code_sandboxes guest"
"""Among the ``supported_features`` of a kernel that has this."""

PROCESSES = "code_sandboxes.processes"
"""The ``comm_id`` under which whoever minds the kernel is told how many commands are running in it."""

# Seconds; with the default of 5 ms, each change between threads takes that long while code computes in
# Python, and an answer takes six of them.
SWITCH_INTERVAL = 0.0005


class Comms:
    """The comms of one kernel that programs have opened to call functions.

    Args:
        kernel: an ``ipykernel.ipkernel.IPythonKernel``.
        guest: a ``Guest`` of ``calls.py``.
    """

    def __init__(self, kernel: Any, guest: Any) -> None:
        self._kernel = kernel
        self._guest = guest
        self._sending = Lock()

    def install(self) -> None:
        """Be there for programs from now on."""
        self._kernel.comm_manager.register_target(TARGET, self._opened)

    def publish(self, comm_id: str, data: Mapping[str, object], buffers: list[Any]) -> None:
        """Send a ``comm_msg``; from any thread.

        Not by the comm itself: it would notice in which subshell that is, and ipykernel would bring the next
        message for the comm there; and no other parent than none says truly what a thread belongs to.
        """
        kernel = self._kernel
        with self._sending:
            kernel.session.send(
                kernel.iopub_socket,
                "comm_msg",
                {"comm_id": comm_id, "data": data},
                parent={},
                ident=b"comm-" + comm_id.encode(),
                buffers=buffers,
            )

    def _opened(self, comm: Any, message: Mapping[str, Any]) -> None:
        """A ``comm_open`` for our target."""
        comm_id = comm.comm_id
        link = self._guest.open(comm_id, lambda data, buffers: self.publish(comm_id, data, buffers))

        def receive(comm_msg: Mapping[str, Any]) -> None:
            self._guest.receive(link, comm_msg["content"]["data"], comm_msg["buffers"])

        # In the place of the comm's own, which would trigger IPython's events, as if a cell had run: what
        # others have asked to be done then would be done in this thread, in the middle of a cell.
        comm.handle_msg = receive
        comm.handle_close = lambda _: self._guest.close_link(comm_id)
        if sys.getswitchinterval() > SWITCH_INTERVAL:
            sys.setswitchinterval(SWITCH_INTERVAL)
        self.publish(comm_id, {"open": True}, [])


def set_environments(kernel: Any, text_of: Callable[[Any], str]) -> None:
    """Let an ``execute_request`` bring environment variables that hold until it is done.

    Args:
        text_of: undoes ``wire_path`` of ``calls.py``, since they need be no UTF-8 either.
    """
    execute: Callable[..., Any] = kernel.shell_handlers["execute_request"]

    async def execute_with_environment(stream: Any, ident: Any, request: Mapping[str, Any]) -> None:
        ours = request["metadata"].get(TARGET)
        envs = ours.get("envs", ()) if isinstance(ours, dict) else ()
        given = {text_of(name): text_of(value) for name, value in envs}
        environment = environ() if given else {}
        before = {name: environment.get(name) for name in given}
        try:
            environment.update(given)
            done = execute(stream, ident, request)
            if isawaitable(done):
                await done
        finally:
            for name, value in before.items():
                if value is None:
                    environment.pop(name, None)
                else:
                    environment[name] = value

    kernel.shell_handlers["execute_request"] = execute_with_environment


def environ() -> MutableMapping[str, str]:
    """The environment as the user's code sees and changes it."""
    return os.environ


def announce(kernel: Any) -> None:
    """Let ``kernel_info_reply`` say that the guest is there."""
    kind: Any = type(kernel)
    tell = kind.kernel_info.fget

    def kernel_info(self: Any) -> dict[str, Any]:
        info = dict(tell(self))
        info["supported_features"] = [*info.get("supported_features", ()), FEATURE]
        return info

    kind.kernel_info = property(kernel_info)


def install(kernel: Any, parts: Mapping[str, Any]) -> None:
    """Serve the functions of *parts*, the modules of the guest by name, in *kernel*."""

    def tell(running: int) -> None:
        status = "running" if running else "none"
        comms.publish(PROCESSES, {"status": status, "processes": running}, [])

    guest = parts["calls"].Guest(
        [
            parts["files"].Files(),
            parts["watching"].Watching(),
            parts["processes"].Processes(environ, tell),
            parts["variables"].Variables(lambda: kernel.shell.user_ns, parts["values"]),
            parts["packages"].Packages(),
            parts["snapshots"].Snapshots(
                lambda: kernel.shell.user_ns, lambda: kernel.shell.user_ns_hidden, parts
            ),
            parts["records"].Records(
                lambda: kernel.shell.user_ns, lambda: kernel.shell.user_ns_hidden, parts
            ),
            parts["machine"].Machine(),
        ]
    )
    comms = Comms(kernel, guest)
    comms.install()
    set_environments(kernel, parts["calls"].path_of)
    announce(kernel)
