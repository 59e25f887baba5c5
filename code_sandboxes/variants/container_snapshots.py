"""Snapshots of containers: beside files and variables an image, with what code that is root has changed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing

from code_sandboxes.errors import SandboxError
from code_sandboxes.info import SandboxVariant
from code_sandboxes.isolation.container import SNAPSHOTS
from code_sandboxes.isolation.container_engine import Engine
from code_sandboxes.snapshots import FolderStore

__all__ = ["ContainerStore", "image_of"]

_log = logging.getLogger(__name__)


def image_of(snapshot_id: str) -> str:
    """The name of the image that belongs to a snapshot."""
    return f"{SNAPSHOTS}:{snapshot_id}"


class ContainerStore(FolderStore):
    """Snapshots, each with an image that its engine keeps.

    Args:
        engine: where the engine listens; "" for where the ``docker`` command would look.
        container: the name of the container of which snapshots are made.
    """

    def __init__(self, variant: SandboxVariant, engine: str, container: Callable[[], str]) -> None:
        super().__init__(variant)
        self._engine = engine
        self._container = container

    def keep(self, id: str) -> None:
        with closing(Engine(self._engine)) as engine:
            engine.commit(self._container(), image_of(id))

    def let_go(self, id: str) -> None:
        try:
            with closing(Engine(self._engine)) as engine:
                engine.remove_image(image_of(id))
        except SandboxError as error:  # its name is all that is left of it
            _log.warning("the image %s was not removed: %s", image_of(id), error)
