"""Which container engine is meant, and whether it is on this machine."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from code_sandboxes.checks import check_str
from code_sandboxes.isolation.container_engine import Engine, url_of
from code_sandboxes.variants.mounts import Refuse

__all__ = ["EngineChoice", "engine_of"]

# Where the command ``docker`` looks, if nothing says otherwise.
_ENGINE = "unix:///var/run/docker.sock"

_ELSEWHERE = ("tcp://", "ssh://", "http://", "https://")

# Docker Desktop has a machine of its own, which shows its containers not all of this one's files.
_DESKTOP = ".docker/desktop/"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine.

    Args:
        url: where it listens.
        client: a ``docker.DockerClient`` of it, if there is one.
        is_by_context: the current context of the command ``docker`` says how to reach it.
    """

    url: str
    client: object = field(default=None, repr=False)
    is_by_context: bool = False

    @property
    def is_here(self) -> bool:
        """It can hand files and sockets of this machine to its containers."""
        return self.url.startswith("unix://") and sys.platform == "linux" and _DESKTOP not in self.url

    def connect(self) -> Engine:
        """
        Raises:
            SandboxError: it does not answer, or cannot be used.
        """
        return Engine("" if self.is_by_context else self.url, self.client)


def engine_of(options: Mapping[str, object], refuse: Refuse) -> EngineChoice:
    """The one that ``docker_host=`` or ``docker_client=`` names, or that ``docker`` would use; may block.

    Raises:
        TypeError: it is no str, or no client.
        SandboxError: it cannot be told.
    """
    host, client = options.get("docker_host"), options.get("docker_client")
    check_str("docker_host", host)
    if client is not None:
        if host is not None:
            raise refuse("honour docker_host and docker_client", "one of them says which engine it is")
        return _checked(EngineChoice(url_of(client), client), refuse)
    url = str(host or os.environ.get("DOCKER_HOST") or "")  # which the keeper may not have
    if not url and _has_context():
        engine = Engine()
        engine.close()
        return _checked(EngineChoice(engine.url, None, is_by_context=True), refuse)
    return _checked(EngineChoice(url or _ENGINE), refuse)


def _checked(choice: EngineChoice, refuse: Refuse) -> EngineChoice:
    if not choice.url.startswith(("unix://", *_ELSEWHERE)):
        raise refuse(
            f"use the engine at {choice.url}",
            "name one that listens at unix:///path, tcp://host:port or ssh://user@host",
        )
    return choice


def _has_context() -> bool:
    """This program's command ``docker`` may look elsewhere than by default, and than the keeper's would."""
    folder = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    with contextlib.suppress(OSError), open(os.path.join(folder, "config.json"), errors="replace") as file:
        return "DOCKER_CONTEXT" in os.environ or "currentContext" in file.read()
    return "DOCKER_CONTEXT" in os.environ
