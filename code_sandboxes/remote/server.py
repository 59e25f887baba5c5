"""A Jupyter server as whoever uses its kernels sees it: Jupyter Server, Kernel Gateway, Enterprise Gateway.

Source: Jupyter Server's REST API, "kernels" and "kernelspecs"; Kernel Gateway and Enterprise Gateway have the
same, with what is said of them below. Blocking, but for :meth:`JupyterServer.channels`.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from code_sandboxes.errors import SandboxConfigurationError, SandboxConnectionError, SandboxError
from code_sandboxes.reaper import Guard
from code_sandboxes.remote.rest import HttpError, Place, Rest, tls
from code_sandboxes.transports.websocket import WebSocketAddress

__all__ = ["JupyterServer", "KernelModel", "KernelSpec", "is_kernel_id", "is_unanswered"]

# Seconds: who ends a sandbox waits for that.
_TO_DELETE = 30.0

# Seconds: a kernel whose start nobody has heard of is there by then, and is looked for so often.
_TO_APPEAR, _LOOK = 2.0, 0.2

# What a proxy says when it has heard nothing from the server.
_FOR_THE_SERVER = (502, 503, 504)

# What a server says that could not do it; one that is starting a kernel again cannot end it meanwhile
# (jupyter_client, "Kernel is in a pending state"). So long, in seconds, that is waited for.
_COULD_NOT, _TO_BE_ABLE = 500, 10.0

_OF_KUBERNETES = ("KubernetesProcessProxy", "CustomResourceProcessProxy", "SparkOperatorProcessProxy")


@dataclass(frozen=True, slots=True)
class KernelModel:
    """A kernel as its server describes it.

    Args:
        state: ``starting``, ``idle``, ``busy``, ``restarting``, ``dead`` or what else a server knows; what it
            has heard last, which may be a while ago.
        connections: how many clients it has.
    """

    id: str
    name: str
    state: str
    connections: int


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """A kernel that a server can start."""

    name: str
    language: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def process_proxy(self) -> str:
        """The class that starts it, in Enterprise Gateway; empty elsewhere."""
        proxy = self.metadata.get("process_proxy")
        name = proxy.get("class_name") if isinstance(proxy, dict) else None
        return name if isinstance(name, str) else ""

    @property
    def limits_resources(self) -> bool:
        """It is started in Kubernetes, where ``KERNEL_MEMORY_LIMIT`` and its like hold."""
        return self.process_proxy.rpartition(".")[2] in _OF_KUBERNETES


class JupyterServer:
    """A server that has kernels, and whoever asks it.

    Args:
        token: of the server; None for one that wants none.
        scheme: of the ``Authorization`` header. All of them know this one, Kernel Gateway in this spelling
            alone.
        dial: makes the connections, in place of looking for the host of *place*.
    """

    def __init__(
        self,
        place: Place,
        token: str | None,
        scheme: str = "token",
        dial: Callable[[], socket.socket] | None = None,
    ) -> None:
        self.place = place
        self._token = token
        self._scheme = scheme
        self._dial = dial
        self._rest = Rest(place, token, scheme=scheme, what="the Jupyter server", dial=dial)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.place.url}>"

    def is_there(self) -> bool:
        """It is up; while it comes up, what is before it answers in its place.

        Raises:
            SandboxAuthenticationError: it does not take the token.
            SandboxConnectionError: nobody answers.
        """
        answer = self._rest.ask("GET", "/api")
        return answer.status == 200 and "version" in answer.mapping

    def kernelspecs(self) -> tuple[dict[str, KernelSpec], str]:
        """What it can start, by name, and which of it is its default.

        Raises:
            SandboxError: it does not say.
        """
        try:
            answer = self._rest.expect("GET", "/api/kernelspecs").mapping
        except HttpError as error:
            if error.status != 404:
                raise
            raise SandboxConnectionError(
                f"{self._rest.what} has no kernels to offer: there is no Jupyter server, or a Kernel Gateway"
                " in the mode notebook-http, which runs its own notebook only"
            ) from None
        specs = {}
        told = answer.get("kernelspecs")
        for name, entry in told.items() if isinstance(told, dict) else ():
            spec = entry.get("spec") if isinstance(entry, dict) else None
            if isinstance(spec, dict):
                metadata = spec.get("metadata")
                specs[name] = KernelSpec(
                    name,
                    str(spec.get("language", "")).lower(),
                    metadata if isinstance(metadata, dict) else {},
                )
        default = answer.get("default")
        return specs, default if isinstance(default, str) else next(iter(specs), "")

    def is_enterprise_gateway(self) -> bool:
        """Only that one says so; the others say the version of a Jupyter Server, and Hubs of theirs."""
        return isinstance(self._rest.expect("GET", "/api").mapping.get("gateway_version"), str)

    def start(
        self,
        name: str,
        kernel_id: str,
        *,
        path: str | None,
        env: Mapping[str, str] | None,
        seconds: float,
    ) -> KernelModel:
        """A new kernel.

        Args:
            kernel_id: is to be its, and known if no answer comes; Enterprise Gateway gives it another.
            path: the folder below the server's root in which it begins; the server decides without one.
            env: environment variables, for servers that take them.
            seconds: for which it may take.

        Raises:
            SandboxError: it was not started.
        """
        body: dict[str, object] = {"name": name, "kernel_id": kernel_id}
        if path is not None:
            body["path"] = path
        if env:
            body["env"] = dict(env)
        try:
            return _model(self._rest.expect("POST", "/api/kernels", body, seconds=seconds).mapping)
        except SandboxConnectionError as error:
            if is_unanswered(error):
                self._end_if_started(kernel_id)
            raise

    def _end_if_started(self, kernel_id: str) -> None:
        """It may be starting still; if nobody answers now either, there is nothing to be done."""
        give_up = time.monotonic() + _TO_APPEAR
        with suppress(SandboxError):  # why it was not started says more
            while not self.delete(kernel_id) and time.monotonic() < give_up:
                time.sleep(_LOOK)

    def kernels(self) -> list[KernelModel]:
        """Those it has; Kernel Gateway and Enterprise Gateway tell only if they are configured to."""
        told = self._rest.expect("GET", "/api/kernels").value
        return [_model(each) for each in told if isinstance(each, dict)] if isinstance(told, list) else []

    def kernel(self, kernel_id: str) -> KernelModel | None:
        """That kernel; None if there is none of that id."""
        answer = self._rest.ask("GET", _path_of(kernel_id))
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise self._rest.error(answer, "a question about a kernel")
        return _model(answer.mapping)

    def interrupt(self, kernel_id: str) -> None:
        self._rest.expect("POST", f"{_path_of(kernel_id)}/interrupt")

    def restart(self, kernel_id: str) -> None:
        """Let it begin again, under the same id."""
        self._rest.expect("POST", f"{_path_of(kernel_id)}/restart")

    def delete(self, kernel_id: str) -> bool:
        """End it; False if it is not there.

        Raises:
            SandboxError: the server does not do it.
        """
        give_up = time.monotonic() + _TO_BE_ABLE
        answer = self._rest.ask("DELETE", _path_of(kernel_id), seconds=_TO_DELETE)
        while answer.status == _COULD_NOT and time.monotonic() < give_up:
            time.sleep(_LOOK)
            answer = self._rest.ask("DELETE", _path_of(kernel_id), seconds=_TO_DELETE)
        if answer.status != 404 and not 200 <= answer.status < 300:
            raise self._rest.error(answer, "the end of a kernel")
        return answer.status != 404

    def guard(self, kernel_id: str) -> Guard:
        """Deletes it if this program is killed."""
        return self._rest.guard(_path_of(kernel_id))

    def channels(self, kernel_id: str, session_id: str) -> WebSocketAddress:
        """Where its messages go in and out."""
        headers = {"Authorization": f"{self._scheme} {self._token}"} if self._token else {}
        return WebSocketAddress(
            self.place.websocket(f"{_path_of(kernel_id)}/channels?session_id={session_id}"),
            headers,
            self.place.unix_socket,
            tls() if self.place.is_secure else None,
            self._dial,
        )

    def close(self) -> None:
        """Let go of the connections to it."""
        self._rest.close()


def is_unanswered(error: SandboxError) -> bool:
    """Does *error* leave open whether what was asked for was done?"""
    if isinstance(error, HttpError):
        return error.status in _FOR_THE_SERVER
    return isinstance(error, SandboxConnectionError)


def is_kernel_id(text: str) -> bool:
    """Can *text* be the id of a kernel? Of servers it is a UUID; what is none must not get into a URL."""
    return re.fullmatch(r"[\w-]{1,128}", text, re.ASCII) is not None


def _path_of(kernel_id: str) -> str:
    if not is_kernel_id(kernel_id):
        raise SandboxConfigurationError(f"there can be no kernel {kernel_id!r}")
    return f"/api/kernels/{quote(kernel_id)}"


def _model(told: Mapping[str, Any]) -> KernelModel:
    kernel_id, connections = told.get("id"), told.get("connections")
    if not isinstance(kernel_id, str) or not is_kernel_id(kernel_id):
        raise SandboxConnectionError("a Jupyter server told of a kernel without an id: is it one?")
    return KernelModel(
        kernel_id,
        str(told.get("name") or ""),
        str(told.get("execution_state") or ""),
        connections if isinstance(connections, int) else 0,
    )
