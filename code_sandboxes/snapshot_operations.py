"""What can be done with snapshots, written once for both fronts.

A snapshot has the sandbox's own files and the variables of its Python contexts. The guest makes bytes of
them, and takes them again; here they pass by, in pieces of which a few are under way. A snapshot that is made
has its turn as a run has, and no code runs meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from code_sandboxes import shelf_operations
from code_sandboxes.errors import SandboxConnectionError, SandboxSnapshotError
from code_sandboxes.guest.calls import cost
from code_sandboxes.guest.namespace import ALTOGETHER
from code_sandboxes.guest.snapshots import PIECE
from code_sandboxes.guest_calls import Guest, answer_of
from code_sandboxes.guest_link import Answered, Channel, ChannelEnded, GuestCall, Refused, Told
from code_sandboxes.guest_values import as_bool, as_bytes, as_object, as_path, as_str, bad_answer
from code_sandboxes.inbox import Inbox
from code_sandboxes.isolation.system import is_below
from code_sandboxes.operations import DEFAULT, Core, Origin
from code_sandboxes.protocol.events import Event
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
from code_sandboxes.snapshots import SavedContext, Snapshot, SnapshotInfo, Store, Writer, check_name
from code_sandboxes.steps import Operation, Wait
from code_sandboxes.variants.base import ContextSpec, Variant

__all__ = ["Restoring", "create_snapshot", "delete_snapshot", "list_snapshots", "origin_of"]

_FILES = "files.tar"

# Bytes that may be on their way out of a sandbox, and pieces that may be on their way into one.
_CREDIT = 8 * PIECE
_AHEAD = 4

# Seconds without a word from the sandbox; it may take that long to find out what it cannot carry.
_SILENCE = 2 * ALTOGETHER + 60

# How often what was sent may turn out to be worth nothing.
_MOST_ATTEMPTS = 100


def list_snapshots(core: Core) -> Operation[list[SnapshotInfo]]:
    shelf = core.variant.shelf
    if shelf is not None:
        return (yield from apart(shelf.all))
    store = core.variant.snapshots
    return [snapshot.info for snapshot in (yield from apart(store.all))]


def delete_snapshot(core: Core, id: str) -> Operation[None]:
    """
    Raises:
        SandboxSnapshotError: there is none of that id.
    """
    if not isinstance(id, str):
        raise TypeError(f"the id of a snapshot must be a str, not {type(id).__name__}")
    store = core.variant.shelf or core.variant.snapshots
    yield from apart(lambda: store.delete(id))


def origin_of(variant: Variant, name: str) -> Origin:
    """What lets a sandbox begin with the snapshot *name*.

    Raises:
        TypeError: *name* is no str.
        SandboxConfigurationError: the variant has no snapshots.
    """
    if not isinstance(name, str):
        raise TypeError(f"snapshot_name must be a str, not {type(name).__name__}")
    if variant.shelf is not None:
        return shelf_operations.Beginning(variant.shelf, name)
    return Restoring(variant, name)


# Making one.


def create_snapshot(core: Core, name: str) -> Operation[SnapshotInfo]:
    """
    Raises:
        TypeError, ValueError: no snapshot can have that name.
        RuntimeError: this is a callback of a run, of which it would have to wait for the end.
        SandboxSnapshotError: there is one of that name, or no room for it.
    """
    core.check_running()
    if core.variant.shelf is not None:
        return shelf_operations.create_snapshot(core, core.variant.shelf, check_name(name))
    writer = core.variant.snapshots.create(check_name(name))
    kernels = [kernel for _, kernel in core.kernels()]
    check_not_inside(kernels)
    return _create(core, writer, name)


def _create(core: Core, writer: Writer, name: str) -> Operation[SnapshotInfo]:
    try:
        with explained(f"the snapshot {name!r} could not be made"):
            yield from apart(writer.open)
            taken = _Taken(core, writer)
            yield from taken.take()
            return (yield from apart(taken.commit))
    except BaseException as error:
        if isinstance(error, GeneratorExit):  # nobody drives this any more
            writer.abort()
        else:
            yield from apart(writer.abort)
        raise


class _Taken:
    """What is taken of a sandbox, and what is not."""

    def __init__(self, core: Core, writer: Writer) -> None:
        self._core = core
        self._writer = writer
        self._folders: Sequence[str] = ()
        self._contexts: list[SavedContext] = []
        self._variables: list[str] = []
        self._not_carried: dict[str, str] = {}
        self._home = ""
        self._room_of_files, self._room_of_variables = core.variant.most_in_a_snapshot

    def take(self) -> Operation[None]:
        self._folders = yield from apart(lambda: self._core.variant.own_folders)
        guest = self._core.guest()  # whose kernel may be another one than that of the runs
        kernels = self._core.kernels()
        turns = [Turn(kernel, Inbox()) for _, kernel in kernels]
        try:
            for turn in turns:
                yield from come(turn)
            yield from self._take_files(guest)
            for spec, kernel in kernels:
                yield from self._take_context(spec, Guest(kernel, None))
        finally:
            for turn in turns:
                turn.kernel.end_turn(turn)

    def _take_files(self, guest: Guest) -> Operation[None]:
        folders = list(self._folders)
        answer = yield from _received(
            guest, self._writer, self._room_of_files, _FILES, "snapshots.save_files", folders=folders
        )
        self._not_carried |= reasons_of(answer.get("left"))
        self._home = as_path(answer.get("home"))

    def _take_context(self, spec: ContextSpec, guest: Guest) -> Operation[None]:
        cwd = _moved(spec.cwd, self._home, "~")
        context = SavedContext(spec.id, spec.name, spec.kernel_name, cwd, dict(spec.env), None)
        if spec.language == "python":
            part = f"variables-{len(self._contexts)}"
            room = self._room_of_variables
            answer = yield from _received(guest, self._writer, room, part, "snapshots.save_variables")
            self._variables += [_told(context, name) for name in names_of(answer.get("names"))]
            for name, why in reasons_of(answer.get("left")).items():
                self._not_carried[_told(context, name)] = why
            context = replace(context, part=part)
        else:
            self._not_carried[_told(context, "*")] = f"the variables of {spec.language} cannot be carried"
        self._contexts.append(context)

    def commit(self) -> SnapshotInfo:
        return self._writer.commit(self._folders, self._contexts, self._variables, self._not_carried)


def _received(
    guest: Guest, writer: Writer, room: int, part: str, name: str, **arguments: object
) -> Operation[dict[str, object]]:
    """Write what the guest's function *name* sends, if that is no more than *room*; what it says of that."""
    inbox = Inbox()
    channel = Channel(inbox.put, _CREDIT)
    call = GuestCall(name, arguments, (), inbox, channel)
    yield from apart(lambda: writer.begin(part))
    guest.begin(call)
    attempts, size = 1, 0
    try:
        while True:
            event = yield from _next(inbox)
            if isinstance(event, (Answered, Refused)):
                return as_object(answer_of(event).value)
            if isinstance(event, ChannelEnded):
                raise event.error or bad_answer("an answer", None)
            assert isinstance(event, Told)
            if "again" in as_object(event.data):
                attempts += 1
                if attempts > _MOST_ATTEMPTS:
                    raise SandboxConnectionError(f"the sandbox began anew {attempts} times")
                yield from apart(lambda: writer.begin(part))
                size = 0
            size += sum(map(len, event.buffers))
            if size > room:
                raise SandboxSnapshotError(f"the sandbox sent more than {room:,} bytes, which it cannot have")
            for buffer in event.buffers:
                data = as_bytes(buffer)
                yield from apart(lambda data=data: writer.write(data))  # type: ignore[misc]  # its default
            guest.grant(channel, cost(event.buffers))
    except BaseException:  # nobody waits any more, whatever the reason
        guest.cancel(call)
        raise
    finally:
        guest.close_channel(channel)


# Beginning with one.


class Restoring:
    """A snapshot that a sandbox begins with: a :class:`code_sandboxes.operations.Origin`.

    Raises:
        SandboxConfigurationError: the variant has no snapshots.
    """

    def __init__(self, variant: Variant, name: str) -> None:
        self._variant = variant
        self._store: Store = variant.snapshots
        self._name = name
        self._snapshot: Snapshot | None = None
        self._not_restored: dict[str, str] = {}
        self._home = ""

    def find(self) -> None:
        snapshot = self._store.find(self._name)
        self._variant.begin_with(snapshot)
        folders = self._variant.own_folders
        missing = [folder for folder in snapshot.folders if folder not in folders]
        if missing:
            raise SandboxSnapshotError(
                f"the snapshot {self._name!r} cannot be restored like this: it has the files of {missing[0]},"
                f" and this sandbox would have files of its own in {', '.join(folders)} only; ask for the"
                " isolation, mounts and working_dir that the snapshot was made with"
            )
        self._snapshot = snapshot

    def restore(self, core: Core) -> Operation[None]:
        snapshot = self._snapshot
        assert snapshot is not None
        self._not_restored = {}
        what = f"the snapshot {self._name!r} could not be restored"
        with explained(what):
            try:
                yield from self._restore_files(core.guest(), snapshot)
                for context in snapshot.contexts:
                    yield from self._restore_context(core, snapshot, context)
            except SandboxConnectionError as error:  # something in it ends the kernel, say
                raise SandboxSnapshotError(f"{what}: {error}") from error
        core.metadata |= {"snapshot": snapshot.info.name, "not_restored": self._not_restored}
        warn_of_missing(self._name, self._not_restored)

    def _restore_files(self, guest: Guest, snapshot: Snapshot) -> Operation[None]:
        folders = list(snapshot.folders)
        answer = yield from self._sent(guest, snapshot, _FILES, "snapshots.load_files", folders=folders)
        self._not_restored |= reasons_of(answer.get("left"))
        self._home = as_path(answer.get("home"))

    def _restore_context(self, core: Core, snapshot: Snapshot, saved: SavedContext) -> Operation[None]:
        cwd = _moved(saved.cwd, "~", self._home)
        spec = ContextSpec(saved.id, saved.name, "", saved.kernel_name, cwd, saved.env)
        try:
            context = yield from core.make_again(spec)
        except (ValueError, SandboxConnectionError) as error:  # its kernel is not installed any more, say
            self._not_restored[_told(saved, "*")] = str(error)
            return
        if saved.part is None:
            return
        if context.language != "python":
            self._not_restored[_told(saved, "*")] = f"the context speaks {context.language} now"
            return
        _, guest = core.python(context, "variables")
        left = yield from self._restore_variables(guest, snapshot, saved.part)
        self._not_restored |= {_told(saved, name): why for name, why in left.items()}

    def _restore_variables(self, guest: Guest, snapshot: Snapshot, part: str) -> Operation[dict[str, str]]:
        careful, slow = False, set[str]()
        for _ in range(_MOST_ATTEMPTS):
            answer = yield from self._sent(
                guest, snapshot, part, "snapshots.load_variables", careful=careful, without=sorted(slow)
            )
            if not as_bool(answer.get("again")):
                return reasons_of(answer.get("left"))
            careful = True
            if answer.get("slow") is not None:
                slow.add(as_str(answer["slow"]))
        raise SandboxSnapshotError(f"the snapshot {self._name!r} has too many variables that take too long")

    def _sent(
        self, guest: Guest, snapshot: Snapshot, part: str, name: str, **arguments: object
    ) -> Operation[dict[str, object]]:
        """Send a part to the guest's function *name*; what that says of it."""
        inbox = Inbox()
        channel = Channel(inbox.put, 0)
        opening = GuestCall("snapshots.open", {}, (), Inbox(), channel)
        file = yield from apart(lambda: self._store.open(snapshot, part))
        under_way: set[GuestCall] = set()
        try:
            yield from guest.ask(opening)
            call = GuestCall(name, {"handle": channel.number, **arguments}, (), inbox, follows=opening)
            guest.begin(call)
            under_way.add(call)
            piece: bytes | None = None
            while True:
                while piece != b"" and len(under_way) <= _AHEAD:
                    piece = yield from apart(lambda: file.read(PIECE))
                    put = {"handle": channel.number, "last": not piece}
                    buffers = (piece,) if piece else ()
                    putting = GuestCall("snapshots.put", put, buffers, inbox, follows=opening)
                    guest.begin(putting)
                    under_way.add(putting)
                event = yield from _next(inbox)
                if isinstance(event, ChannelEnded):
                    raise event.error or bad_answer("an answer", None)
                assert isinstance(event, (Answered, Refused))
                answer = answer_of(event)
                under_way.remove(event.call)
                if event.call is call:
                    return as_object(answer.value)
        finally:
            file.close()
            for each in under_way:
                guest.cancel(each)
            guest.close_channel(channel)


# Both.


def _next(inbox: Inbox) -> Operation[Event]:
    until = time.monotonic() + _SILENCE
    while (event := inbox.take()) is None:
        if time.monotonic() >= until:
            raise SandboxSnapshotError(f"nothing was heard of the sandbox for {_SILENCE:g} s")
        yield Wait(inbox, until)
    return event


def _told(context: SavedContext, name: str) -> str:
    """What a variable of *context* is called among those of a snapshot."""
    return name if context.id == DEFAULT else f"{context.name}:{name}"


def _moved(path: str | None, source: str, target: str) -> str | None:
    """*path*, at *target* if it is at *source* or below."""
    if path is None or not is_below(path, source):
        return path
    return target + path.removeprefix(source)
