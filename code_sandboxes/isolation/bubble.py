"""A bubble: an enclosure on this machine that bubblewrap makes (:mod:`.bubblewrap`), with its cgroups."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from code_sandboxes.guest.init import SHARED_MEMORY
from code_sandboxes.isolation import cgroups
from code_sandboxes.isolation.bubblewrap import (
    USER,
    arguments,
    data_files,
    environment,
    init_command,
    owned,
)
from code_sandboxes.isolation.enclosure import PATIENCE, Enclosure, EnclosureError, configure
from code_sandboxes.isolation.landlock import SCOPES
from code_sandboxes.isolation.memory_files import memory_file
from code_sandboxes.isolation.plan import Bounds, Plan
from code_sandboxes.isolation.probe import probe
from code_sandboxes.reaper import MARK, USERS, Reaper
from code_sandboxes.transports.loop import Loop

__all__ = ["CGROUPS", "make"]

CGROUPS = "cgroups"
"""The file in a sandbox's folder that names those of its enclosure, one a line."""

# A file for each so many bytes: what a tmpfs takes for one is memory, too.
_BYTES_PER_FILE = 4096
_MOST_FILES = 1_000_000

_SHARED_MEMORY = 64 * 1024**2
_UNLIMITED = 2**50

_LONGEST = 65536
_KEPT_STDERR = 4096


class _Bubble:
    """A :class:`code_sandboxes.isolation.enclosure.Place`.

    Args:
        first: a descriptor of the first process in it.
    """

    environment: Mapping[str, str] = {}
    container: str | None = None

    def __init__(
        self, process: subprocess.Popen[bytes], first: int, cgroup: cgroups.Cgroup | None, guard: Reaper
    ) -> None:
        self._process = process
        self._first = first
        self._cgroup = cgroup
        self._guard = guard

    def kill(self) -> None:
        _kill(self._first)

    def out_of_memory_kills(self) -> int:
        return 0 if self._cgroup is None else self._cgroup.out_of_memory_kills()

    def remove(self) -> None:
        try:
            self._remove()
        finally:
            self._guard.release_group(self._process.pid)
            self._guard.release_cgroups(() if self._cgroup is None else self._cgroup.folders)

    def _remove(self) -> None:
        self.kill()
        # When it has ended, so has everything in its PID namespace (pid_namespaces(7)).
        if not select.select([self._first], [], [], PATIENCE)[0]:
            raise TimeoutError(f"the sandbox's first process does not end within {PATIENCE:g} s")
        self._process.kill()  # it only waits for the other one
        self._process.wait()
        os.close(self._first)
        if self._cgroup is not None:
            self._cgroup.remove()


def make(loop: Loop, plan: Plan, name: str, folder: Path, guard: Reaper) -> Enclosure:
    """Make one; blocks, and whose thread this is must live as long as the enclosure.

    Args:
        name: for what else has to be made on this machine, a cgroup; nothing else has it.
        folder: the sandbox's, by which a reaper finds what is left of it.
        guard: ends it, should this process be killed.

    Raises:
        EnclosureError: it cannot be made as it is planned.
        OSError: something is missing to make it: descriptors, processes.
    """
    _check_places(plan)
    user = secrets.choice(USERS) if os.geteuid() == 0 else USER
    bounds = _of_cgroups(plan)
    folders = cgroups.folders_of(name, bounds)
    # First, so that they go even if this process is killed as it makes them.
    (folder / CGROUPS).write_text("".join(f"{path}\n" for path in folders))
    with contextlib.ExitStack() as undo:
        guard.guard_cgroups(folders)
        undo.callback(guard.release_cgroups, folders)
        cgroup = cgroups.make(name, bounds)
        if cgroup is not None:
            undo.callback(cgroup.remove)
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(control.close)
        with theirs:
            process, info, said = _start(plan, user, theirs.fileno(), str(folder))
        undo.callback(process.wait)
        undo.callback(_kill_group, process)
        with open(info), open(said):
            pid, first = _first_process(info, said)
            undo.callback(os.close, first)
            undo.callback(_kill, first)
            if cgroup is not None:
                cgroup.add(pid)
            listener = configure(control, plan, _configuration(plan, user), lambda: _said(said))
        guard.guard_group(process.pid)
        undo.pop_all()
    return Enclosure(loop, plan, control, listener, _Bubble(process, first, cgroup, guard))


def _check_places(plan: Plan) -> None:
    """
    Raises:
        EnclosureError: a place that bubblewrap makes lies behind a link. Whoever could write where that is
            may have led it out of the enclosure, of which bubblewrap is still outside when it makes places.
    """
    for place in (*(mount.target for mount in plan.mounts), plan.working_dir):
        for mount in plan.mounts:
            if place.startswith(f"{mount.target}/"):
                path = mount.source + place.removeprefix(mount.target)
                if os.path.realpath(path) != os.path.realpath(mount.source) + path.removeprefix(mount.source):
                    raise EnclosureError(
                        f"{place} cannot be made in it: on this machine {path} lies behind a link"
                    )


def _start(plan: Plan, user: int, control: int, folder: str) -> tuple[subprocess.Popen[bytes], int, int]:
    """The process of bubblewrap, and what to read: its information and its standard error."""
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as on_failure:
        data = {}
        for path, content in data_files(plan, user).items():
            data[path] = memory_file(content)
            ours.callback(os.close, data[path])
        info, info_write = os.pipe()
        on_failure.callback(os.close, info)
        ours.callback(os.close, info_write)
        said, said_write = os.pipe()
        on_failure.callback(os.close, said)
        ours.callback(os.close, said_write)
        command = arguments(
            plan,
            program=plan.program or probe().bubblewrap_path,
            as_root=user != USER,
            sizes=_sizes(plan),
            data=data,
            info=info_write,
        )
        process = subprocess.Popen(
            [*command, *init_command(plan, control)],
            pass_fds=[control, info_write, *data.values()],
            # The first process has another one by the time that code could look at it.
            env={**environment(), MARK: folder},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said_write,
            start_new_session=True,
        )
        on_failure.pop_all()
    return process, info, said


def _first_process(info: int, said: int) -> tuple[int, int]:
    """The number of the enclosure's first process, and a descriptor of it.

    Raises:
        EnclosureError: there is none.
    """
    # To its end: it is written in pieces, and ends when the enclosure is complete. Before that, ending
    # bubblewrap would leave the process in it (bubblewrap, issue 633).
    told = _read_to_end(info)
    try:
        pid = int(json.loads(told)["child-pid"])
    except (ValueError, KeyError):
        raise EnclosureError(f"bubblewrap did not make it: {_said(said) or 'it does not say why'}") from None
    return pid, os.pidfd_open(pid)


def _configuration(plan: Plan, user: int) -> dict[str, Any]:
    """What the first process has to do that is only needed in a bubble."""
    sizes = dict(zip(("/", SHARED_MEMORY), _sizes(plan), strict=True))
    return {
        "in_container": False,
        "uid": user,
        "in_namespace": user == USER,
        "sizes": {path: (size, _files(size, plan)) for path, size in sizes.items()},
        "owned": owned(plan),
        "scoped": plan.network == "all" and probe().landlock >= SCOPES,
        "limits": {} if plan.bounds.pids is None else {"nproc": plan.bounds.pids},
    }


def _of_cgroups(plan: Plan) -> Bounds:
    return replace(plan.bounds, pids=None)  # as the first process must be able to start more


def _sizes(plan: Plan) -> tuple[int, int]:
    """Bytes of the root and of the shared memory, together what the plan allows."""
    if plan.bounds.disk is None:
        return _UNLIMITED, _SHARED_MEMORY
    shared_memory = min(_SHARED_MEMORY, plan.bounds.disk // 4)
    return plan.bounds.disk - shared_memory, shared_memory


def _files(size: int, plan: Plan) -> int:
    """How many may be in a tmpfs of *size* bytes."""
    if plan.bounds.memory is not None:  # of which what the system has to know of a file takes a part
        size = min(size, plan.bounds.memory)
    return max(1024, min(size // _BYTES_PER_FILE, _MOST_FILES))


def _read_to_end(descriptor: int) -> bytes:
    give_up = time.monotonic() + PATIENCE
    data = b""
    while select.select([descriptor], [], [], max(0.0, give_up - time.monotonic()))[0]:
        part = os.read(descriptor, _LONGEST)
        if not part:
            return data
        data += part
    raise EnclosureError(f"bubblewrap took longer than {PATIENCE:g} s")


def _said(stderr: int) -> str:
    """What is there to read, without waiting for more."""
    os.set_blocking(stderr, False)
    try:
        return os.read(stderr, _KEPT_STDERR).decode("utf-8", "replace").strip()
    except BlockingIOError:
        return ""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End bubblewrap, and its child that waits for ever where this was ended too early (its issue 633)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
