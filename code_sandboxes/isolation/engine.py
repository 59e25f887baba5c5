"""The connection to a Docker engine, and in our words why there is none.

The package docker is there only for who has asked for it, and is imported on use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from code_sandboxes.errors import SandboxConfigurationError, SandboxConnectionError, SandboxError
from code_sandboxes.isolation.engine_ssh import over_ssh

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["IMAGE", "connect", "told"]

IMAGE = "code-sandboxes-jupyter:latest"
"""What ``docker/Dockerfile`` is built as, and what is run where no other image is asked for."""

_INSTALL = "pip install 'code-sandboxes[docker]'"


def connect(docker_host: str | None = None) -> DockerClient:
    """An engine that answers, for who closes it.

    Args:
        docker_host: where it listens, as in ``DOCKER_HOST``. By default where the ``docker`` command would
            look: at what that variable says, and without it in its current context.

    Raises:
        SandboxConfigurationError: the package docker is missing, or *docker_host* makes no sense.
        SandboxConnectionError: nobody answers there, or not to this user.
    """
    try:
        from docker import DockerClient, from_env
        from docker.errors import DockerException
    except ImportError as error:  # also where a folder called docker is on the path, and nothing else is
        raise SandboxConfigurationError(
            f"the package docker, which talks to container engines, is missing ({error}); install it with:"
            f" {_INSTALL}"
        ) from None
    host = docker_host or os.environ.get("DOCKER_HOST")
    try:
        if host:
            _knock(host)
            if host.startswith("ssh://"):
                return over_ssh(host)
            return from_env(environment={**os.environ, "DOCKER_HOST": host})
        host, tls = _of_the_context()
        _knock(host)
        return over_ssh(host) if host.startswith("ssh://") else DockerClient(base_url=host, tls=tls)
    except SandboxError:
        raise
    except (DockerException, OSError, ValueError) as error:  # the last for a port of tcp:// that is none
        raise _refusal(host or "its default place", error) from None


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Errors of an engine as ours.

    Args:
        what: it could not do, in the words of "the container engine could not ...".

    Raises:
        SandboxConnectionError: it refused, or went away.
    """
    import requests
    import urllib3
    from docker.errors import DockerException

    try:
        yield
    # The last is what a stream of answers ends with when the engine does.
    except (DockerException, requests.RequestException, urllib3.exceptions.HTTPError) as error:
        why = getattr(error, "explanation", None) or error
        raise SandboxConnectionError(f"the container engine could not {what}: {why}") from None


def _knock(host: str) -> None:
    """What keeps this user from a Unix socket, as an OSError: one tried in vain the package leaves open."""
    if host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as knocking:
            knocking.connect("/" + host.removeprefix("unix://").lstrip("/"))


def _of_the_context() -> tuple[str, Any]:
    """Where the ``docker`` command would look, and with which certificates.

    The package did not ask its contexts before 7.2, and Docker Desktop may listen nowhere else.
    """
    from docker.context import ContextAPI

    name = os.environ.get("DOCKER_CONTEXT")
    context = ContextAPI.get_context(name)
    if context is None or not context.Host:
        raise SandboxConfigurationError(
            f"there is no Docker context {name or 'of the name in its configuration'!r}; choose one:"
            " docker context ls, docker context use NAME"
        )
    return context.Host, context.TLSConfig or False


def _refusal(host: str, error: Exception) -> SandboxError:
    import requests

    causes = list(_causes(error))
    if any(isinstance(cause, PermissionError) for cause in causes):
        return SandboxConnectionError(
            f"this user may not use the Docker engine at {host}; let them, which makes them as mighty"
            " as root, and log in again: sudo usermod -aG docker $USER"
        )
    unreachable = (requests.ConnectionError, requests.Timeout, FileNotFoundError, ConnectionRefusedError)
    is_foreign = any(isinstance(cause, requests.exceptions.SSLError) for cause in causes)
    if not is_foreign and any(isinstance(cause, unreachable) for cause in causes):
        why = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), "")
        return SandboxConnectionError(
            f"no Docker engine answers at {host}{f' ({why})' * bool(why)}; {_to_start(host)}"
        )
    return SandboxConfigurationError(f"the Docker engine at {host} cannot be used: {error}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _to_start(host: str) -> str:
    if not host.startswith(("unix:", "npipe:")):
        return "start it there, or say in DOCKER_HOST where one is"
    if sys.platform != "linux":
        return "start Docker Desktop"
    if shutil.which("dockerd"):
        return "start it: sudo systemctl start docker"
    return "install one, on Debian with: sudo apt-get install docker.io"
