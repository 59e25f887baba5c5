"""Snapshots that a service makes: what it leaves out goes along in one of its variables.

The service looks into the kernel that a sandbox begins with, and keeps plain variables of that. For as long
as it looks, there is one more, which the guest has made of all the rest (``guest/records.py``); from that the
guest makes it again in another sandbox. Nothing of it comes here.
"""

from __future__ import annotations

from dataclasses import replace

from code_sandboxes import package_operations
from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxExecutionError,
    SandboxSnapshotError,
    SandboxTimeoutError,
)
from code_sandboxes.guest_calls import Guest
from code_sandboxes.guest_link import GuestCall
from code_sandboxes.guest_values import as_bool, as_object
from code_sandboxes.inbox import Inbox
from code_sandboxes.operations import Core
from code_sandboxes.runs import Turn
from code_sandboxes.snapshot_steps import (
    apart,
    check_not_inside,
    come,
    explained,
    names_of,
    reasons_of,
    warn_of_missing,
)
from code_sandboxes.snapshots import Shelf, SnapshotInfo
from code_sandboxes.steps import Operation

__all__ = ["Beginning", "create_snapshot"]

# Beginning with an underscore, it would be left out.
_VARIABLE = "code_sandboxes_record"

# So many packages are no longer what somebody has installed in a session, but another environment.
_MOST_PACKAGES = 30

# Seconds that they may take.
_INSTALLING = 300.0


def create_snapshot(core: Core, shelf: Shelf, name: str) -> Operation[SnapshotInfo]:
    """
    Raises:
        RuntimeError: this is a callback of a run, of which it would have to wait for the end.
        SandboxConfigurationError: the default context is not Python's.
        SandboxSnapshotError: it was not made.
    """
    _, guest = core.python(None, "snapshots")
    spec, kernel = core.kernels()[0]
    check_not_inside([kernel])
    others = {
        f"{other.name}:*": "the service keeps the default context alone"
        for other, _ in core.kernels()
        if other.id != spec.id
    }
    return _create(core, shelf, guest, name, others)


def _create(
    core: Core, shelf: Shelf, guest: Guest, name: str, others: dict[str, str]
) -> Operation[SnapshotInfo]:
    turn = Turn(core.kernels()[0][1], Inbox())
    try:
        with explained(f"the snapshot {name!r} could not be made"):
            yield from come(turn)
            try:
                kept = as_object((yield from guest.call("records.keep", variable=_VARIABLE)).value)
                info = yield from apart(lambda: shelf.make(name))
            except BaseException:  # nobody waits any more, whatever the reason
                guest.begin(GuestCall("records.drop", {"variable": _VARIABLE}, (), Inbox()))
                raise
            yield from guest.call("records.drop", variable=_VARIABLE)
    finally:
        turn.kernel.end_turn(turn)
    left = reasons_of(kept.get("left"))
    return replace(info, variables=tuple(names_of(kept.get("names"))), not_carried={**left, **others})


class Beginning:
    """A snapshot that a sandbox begins with: a :class:`code_sandboxes.operations.Origin`."""

    def __init__(self, shelf: Shelf, name: str) -> None:
        self._shelf = shelf
        self._name = name
        self._info: SnapshotInfo | None = None

    def find(self) -> None:
        self._info = self._shelf.begin_with(self._name)

    def restore(self, core: Core) -> Operation[None]:
        """The service has restored what it has; this does the same with the rest."""
        assert self._info is not None
        what = f"the snapshot {self._name!r} could not be restored"
        with explained(what):
            try:
                missing = yield from self._restored(core)
            except SandboxConnectionError as error:  # something in it ends the kernel, say
                raise SandboxSnapshotError(f"{what}: {error}") from error
        core.metadata |= {"snapshot": self._info.name, "not_restored": missing}
        warn_of_missing(self._name, missing)

    def _restored(self, core: Core) -> Operation[dict[str, str]]:
        _, guest = core.python(None, "snapshots")
        found = as_object((yield from guest.call("records.missing", variable=_VARIABLE)).value)
        if not as_bool(found.get("found")):
            return {
                "*": "it was not made by code_sandboxes, so there are only plain variables in it: no imports,"
                " functions, classes or files"
            }
        missing = yield from self._installed(core, names_of(found.get("packages")))
        for name in names_of(found.get("others")):
            missing[name] = "this package was installed from somewhere else than an index"
        taken = as_object((yield from guest.call("records.take", variable=_VARIABLE)).value)
        return {**missing, **reasons_of(taken.get("left"))}

    def _installed(self, core: Core, packages: list[str]) -> Operation[dict[str, str]]:
        """Install what was installed there; what could not be, with the reason."""
        if not packages:
            return {}
        if len(packages) > _MOST_PACKAGES:
            return dict.fromkeys(
                packages, "this package is not in this environment; install_packages() does it"
            )
        try:
            yield from package_operations.install_packages(core, packages, _INSTALLING, None)
        except (SandboxExecutionError, SandboxTimeoutError, ValueError) as error:
            return dict.fromkeys(packages, f"this package could not be installed: {error}")
        return {}
