"""The Jupyter server of a runtime at Datalayer, by way of what is before it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from code_sandboxes.errors import SandboxAuthenticationError, SandboxConnectionError
from code_sandboxes.info import SandboxVariant
from code_sandboxes.reaper import Guard
from code_sandboxes.remote.datalayer import pauses
from code_sandboxes.remote.datalayer_values import Runtime
from code_sandboxes.remote.kernels import RemoteKernel
from code_sandboxes.remote.rest import Place
from code_sandboxes.remote.server import JupyterServer
from code_sandboxes.variants.base import ContextSpec
from code_sandboxes.variants.gateway import JupyterGateway

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["Ingress", "reached"]

# A Jupyter server takes both; what of it is let through is not documented.
_SCHEMES = ("token", "Bearer")


class Ingress(JupyterGateway):
    """The kernels of one runtime: they are there as long as it is.

    Args:
        kernel_id: the default context's; None if one is to be started.
        is_fresh: nobody else has used that.
    """

    name = SandboxVariant.DATALAYER_RUNTIME  # in what it says

    def __init__(
        self, config: SandboxConfig, server: JupyterServer, kernel_id: str | None, *, is_fresh: bool
    ) -> None:
        # The runtime has the rest of the settings.
        names = ("env_vars", "start_timeout", "working_dir")
        own = type(config)(**{name: getattr(config, name) for name in names})
        options = {"server_url": server.place.url} | ({} if kernel_id is None else {"kernel_id": kernel_id})
        super().__init__(own, options)
        self._known_server = server
        self._is_fresh = is_fresh

    def find(self) -> None:
        """Find out what the server has; blocks."""
        self._find_out()

    def default_spec(self) -> ContextSpec:
        """The default context's."""
        return self._default_spec()

    def launcher(self, spec: ContextSpec) -> Callable[[], RemoteKernel]:
        launch = super().launcher(spec)
        context = self._contexts[spec.id]
        context.is_given = self._is_over  # else it can be deleted, and another one takes its place
        context.is_fresh = context.is_fresh or self._is_fresh
        return launch

    def _guard(self, what: str, guard: Guard) -> None:
        return  # what ends the runtime ends its kernels

    def ends(self, why: str, *, orderly: bool) -> None:
        super().ends(why, orderly=orderly)
        for context in self._contexts.values():
            context.is_given = True  # its end is the runtime's

    def close(self) -> None:
        """Let go of the connections to it."""
        self._server.close()


def reached(
    runtime: Runtime, seconds: float, check_wanted: Callable[[], None]
) -> tuple[JupyterServer, list[str]]:
    """The server of *runtime*, when it is there, and the ids of its kernels, the oldest first.

    Args:
        seconds: that it may take.
        check_wanted: raises if nobody waits for it any more.

    Raises:
        SandboxConnectionError: it is not there in time.
        SandboxAuthenticationError: it does not take the token that was given for it.
    """
    if not runtime.ingress:
        raise SandboxConnectionError(f"Datalayer does not tell where the server of {runtime.name!r} is")
    place = Place(runtime.ingress, "the ingress of a runtime")
    refused = SandboxAuthenticationError(f"the server at {place.url} takes no token")
    for scheme in _SCHEMES:
        server = JupyterServer(place, runtime.token or None, scheme)
        try:
            _wait_until_there(server, seconds, check_wanted)
            return server, [model.id for model in server.kernels()]
        except SandboxAuthenticationError as error:
            server.close()
            refused = error
        except BaseException:
            server.close()
            raise
    raise refused


def _wait_until_there(server: JupyterServer, seconds: float, check_wanted: Callable[[], None]) -> None:
    """What is before it knows of it only after a while."""
    until = time.monotonic() + seconds
    for pause in pauses():
        why = "what is before it answers in its place"
        try:
            if server.is_there():
                return
        except SandboxConnectionError as error:
            why = str(error)
        if time.monotonic() + pause > until:
            raise SandboxConnectionError(
                f"the server at {server.place.url} was not there within {seconds:g} s"
                f" (SandboxConfig.start_timeout): {why}"
            )
        time.sleep(pause)
        check_wanted()
