"""Snapshots of containers: beside files and variables an image, with what code that is root has changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from code_sandboxes.info import SandboxVariant
from code_sandboxes.isolation.container import SNAPSHOTS
from code_sandboxes.isolation.container_engine import Engine
from code_sandboxes.snapshots import FolderStore

__all__ = ["ContainerStore", "image_of"]


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
        with closing(Engine(self._engine)) as engine:
            engine.retire_image(image_of(id))
            engine.remove_retired(SNAPSHOTS)  # what the sandboxes of killed keepers have left
