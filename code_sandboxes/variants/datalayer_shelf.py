"""The snapshots of an account at Datalayer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from code_sandboxes.errors import SandboxSnapshotError
from code_sandboxes.info import SandboxVariant
from code_sandboxes.remote.datalayer import Datalayer
from code_sandboxes.remote.datalayer_values import ServiceSnapshot
from code_sandboxes.snapshots import SnapshotInfo

__all__ = ["DatalayerShelf"]


class DatalayerShelf:
    """A :class:`code_sandboxes.snapshots.Shelf`.

    Args:
        runtime: gives the name of the one that snapshots are made of; it raises if there is none.
    """

    def __init__(self, datalayer: Datalayer, runtime: Callable[[], str]) -> None:
        self._datalayer = datalayer
        self._runtime = runtime
        self._chosen: ServiceSnapshot | None = None

    @property
    def chosen(self) -> str | None:
        """The uid of the one with which a runtime is to begin."""
        return None if self._chosen is None else self._chosen.uid

    @property
    def environment(self) -> str | None:
        """What that was made in: the same Python reads it best."""
        return None if self._chosen is None else self._chosen.environment or None

    def all(self) -> list[SnapshotInfo]:
        return [_info_of(each) for each in self._datalayer.snapshots()]

    def make(self, name: str) -> SnapshotInfo:
        # By the description it is found if the service does not tell at once what has come of it.
        description = f"made by code_sandboxes ({os.urandom(8).hex()})"
        info = _info_of(self._datalayer.create_snapshot(self._runtime(), name, description))
        return replace(info, name=name)

    def begin_with(self, id_or_name: str) -> SnapshotInfo:
        self._chosen = self._find(id_or_name)
        return _info_of(self._chosen)

    def delete(self, id: str) -> None:
        self._datalayer.delete_snapshot(self._find(id).uid)

    def _find(self, id_or_name: str) -> ServiceSnapshot:
        """The one of that id, or the latest one of that name."""
        there = self._datalayer.snapshots()
        found = [each for each in there if each.uid == id_or_name]
        found = found or [each for each in there if each.name == id_or_name]
        if not found:
            known = ", ".join(repr(name) for name in dict.fromkeys(each.name for each in there)) or "none"
            raise SandboxSnapshotError(f"no snapshot {id_or_name!r} at Datalayer (known: {known})")
        return found[-1]


def _info_of(snapshot: ServiceSnapshot) -> SnapshotInfo:
    return SnapshotInfo(
        snapshot.uid, snapshot.name, SandboxVariant.DATALAYER_RUNTIME, snapshot.updated_at, snapshot.size
    )
