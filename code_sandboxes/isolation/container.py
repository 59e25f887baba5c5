"""A container: an enclosure that a container engine on this machine makes, hardened, and its limits.

``guest/init.py`` of this library, not the image, is the first process in it. It connects to a socket that
is shown to the container and to nobody else on this machine, and when that connection ends, so does the
container, and the engine removes it: whoever made it is gone, or has let go of it.

Sources: the Docker Engine API ("Create a container"), "Docker security" of the engine's documentation.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.guest.init import SHARED_MEMORY
from code_sandboxes.isolation import cgroups
from code_sandboxes.isolation.bubblewrap import HOME, INIT, USER, environment, users
from code_sandboxes.isolation.container_engine import Engine
from code_sandboxes.isolation.enclosure import PATIENCE, Enclosure, EnclosureError, configure
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.isolation.seccomp import CORE
from code_sandboxes.isolation.system import is_below
from code_sandboxes.reaper import USERS, Reaper
from code_sandboxes.transports.loop import Loop

if TYPE_CHECKING:
    from code_sandboxes.isolation.plan import ContainerPlan

__all__ = [
    "CONTAINERS",
    "GUEST",
    "HOST",
    "LABEL",
    "SHOWN",
    "SNAPSHOTS",
    "WORKING_DIR",
    "check_volumes",
    "files_of",
    "hardened",
    "make",
    "own_configuration",
    "path_of",
    "release_image",
    "user_of",
]

CONTAINERS = "containers"
"""The file in a sandbox's folder that names those that were made for it, one a line, after their engine."""

SNAPSHOTS = "code-sandboxes-snapshot"
"""The name of the images of snapshots; their tags say which."""

LABEL = "io.code-sandboxes"
"""What begins the labels of our containers; ``.sandbox`` says whose one is, ``.keeper`` who made it."""

GUEST = "/opt/code-sandboxes/guest"
"""Where the library's own part is in it, read-only."""

# What is shown of the sandbox's folder, and where; with the name of the socket in it.
SHOWN, HOST, _CONTROL = "c", "/opt/code-sandboxes/host", "control"

WORKING_DIR = "/workspace"

# Of what can be written, in hundredths: engines make places of a limited size, but not one for all of them.
_SHARES = {WORKING_DIR: 50, HOME: 25, "/data": 10, "/tmp": 10}

# The rest, and no more than the engine's default.
_MOST_SHARED_MEMORY = 64 * 1024**2

_BYTES_PER_FILE = 4096
_MOST_FILES = 1_000_000

# Processes that are not the code's: the first one.
_OWN_PROCESSES = 1

# What the image's own root needs to install packages: files of other users, to be these, and to end them.
_CAPABILITIES_OF_ROOT = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID"]

# Seconds between two looks whether it still runs.
_LOOK = 0.25


class _Container:
    """A :class:`code_sandboxes.isolation.enclosure.Place`."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        environment: Mapping[str, str],
        control: socket.socket,
        memory: cgroups.Cgroup | None,
        guard: Reaper,
    ) -> None:
        self.environment = environment
        self.container: str | None = name
        self._engine = engine
        self._name = name
        self._control = control
        self._memory = memory
        self._guard = guard

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # it has hung up itself
            self._control.shutdown(socket.SHUT_RDWR)  # with which the first process ends

    def out_of_memory_kills(self) -> int:
        return 0 if self._memory is None else self._memory.out_of_memory_kills()

    def remove(self) -> None:
        self.kill()
        _remove(self._engine, self._name, self._guard)
        self._engine.close()


def make(loop: Loop, plan: Plan, sandbox_id: str, folder: Path, guard: Reaper) -> Enclosure:
    """Make one; blocks.

    Args:
        folder: the sandbox's, for what is shown to the container.
        guard: removes it, should this process be killed.

    Raises:
        SandboxConfigurationError: there is no such engine or image, or it cannot do what is planned.
        EnclosureError: it did not start.
        OSError: something is missing to make it: descriptors, room.
    """
    assert plan.container is not None
    name = f"code-sandboxes-{secrets.token_hex(8)}"
    labels = {LABEL: "1", f"{LABEL}.sandbox": sandbox_id, f"{LABEL}.keeper": str(folder.parent)}
    with contextlib.ExitStack() as undo, _listening(folder / SHOWN) as listener:
        engine = undo.enter_context(contextlib.closing(Engine(plan.container.engine)))
        if not engine.is_local:
            raise SandboxConfigurationError(
                f"the engine at {engine.url} cannot be used: its containers have to be handed sockets of this"
                " machine"
            )
        # First, so that it goes even if this process is killed as it makes it.
        with open(folder / CONTAINERS, "a") as listed:
            listed.write(f"{engine.url} {name}\n")
        guard.guard_container(engine.url, name)
        undo.callback(_remove, engine, name, guard)
        user = user_of(plan.container, engine, name, labels)
        engine.create(name, _config(plan, labels, user, folder))
        said = engine.start(name)
        control = undo.enter_context(_connection(listener, engine, name, said))
        about = engine.inspect(name)
        check_volumes(about, plan)
        proxy_listener = configure(control, plan, own_configuration(plan), said)
        variables = _environment(about["Config"]["Env"], plan.container.home)
        place = _Container(engine, name, variables, control, _memory_of(about, plan), guard)
        undo.pop_all()
    return Enclosure(loop, plan, control, proxy_listener, place)


def release_image(plan: Plan) -> None:
    """No more containers are made for this plan: if its snapshot was deleted, the image can go; blocks.

    Raises:
        SandboxError: the engine does not answer.
    """
    assert plan.container is not None
    if plan.container.image.startswith(f"{SNAPSHOTS}:"):
        with contextlib.closing(Engine(plan.container.engine)) as engine:
            engine.remove_retired(SNAPSHOTS)


def _remove(engine: Engine, name: str, guard: Reaper) -> None:
    engine.remove(name)
    guard.release_container(engine.url, name)


def user_of(plan: ContainerPlan, engine: Engine, name: str, labels: Mapping[str, str]) -> str:
    """Who code is: of two sandboxes not the same, as what a user has is counted for all of them together.

    Args:
        name: of a container that there may be for a moment, with *labels*, to look into the image.

    Raises:
        SandboxConfigurationError: the image has no such user, or it is root without having been called so.
        SandboxConnectionError: the engine does not answer.
    """
    if plan.is_root:
        return plan.user
    if plan.user:
        is_numbered = all(part.isdecimal() for part in plan.user.split(":", 1))
        user = plan.user if is_numbered else _numbers(plan, engine, name, labels)
        if int(user.partition(":")[0]) == 0:
            raise SandboxConfigurationError(
                f"the user {plan.user!r} is root in {plan.image}; if code is to be that, create it with"
                " user='root'"
            )
        return user
    if plan.as_caller:
        return f"{os.geteuid()}:{os.getegid()}"
    uid = USER if engine.has_few_users else secrets.choice(USERS)
    return f"{uid}:{uid}"


def _numbers(plan: ContainerPlan, engine: Engine, name: str, labels: Mapping[str, str]) -> str:
    """The numbers of the plan's user, as places in memory belong to numbers; by a container never started.

    Raises:
        SandboxConfigurationError: the image has no such user or group.
    """
    engine.create(name, {"Image": plan.image, "Entrypoint": ["-"], "Labels": labels})
    users, groups = (_entries(engine.read(name, path)) for path in ("/etc/passwd", "/etc/group"))
    engine.remove(name)
    user, _, group = plan.user.partition(":")
    uid, gid = users.get(user, (user, "0"))
    if group:
        gid = groups.get(group, (group, ""))[0]
    for what, given, number in (("user", user, uid), ("group", group, gid)):
        if not number.isdecimal():
            raise SandboxConfigurationError(f"the image {plan.image!r} has no {what} {given!r}")
    return f"{uid}:{gid}"


def _entries(file: bytes) -> dict[str, tuple[str, str]]:
    """Of passwd(5) or group(5) by name: the number, and what is behind it."""
    entries = (line.split(":") for line in file.decode("utf-8", "replace").splitlines())
    return {entry[0]: (entry[2], entry[3]) for entry in entries if len(entry) > 3}


def check_volumes(about: Mapping[str, Any], plan: Plan) -> None:
    """
    Raises:
        SandboxConfigurationError: code could write more than is planned.
    """
    volumes = [mount["Destination"] for mount in about["Mounts"] if mount["Type"] == "volume"]
    if volumes and plan.bounds.disk is not None:
        raise SandboxConfigurationError(
            f"what can be written cannot be limited: {about['Config']['Image']} has volumes of its own"
            f" ({', '.join(volumes)}), which take what the disk has; choose an image without, or user='root',"
            " for whom nothing is limited that is written"
        )


@contextlib.contextmanager
def _listening(folder: Path) -> Iterator[socket.socket]:
    """A socket in *folder*, which is shown to the container; only until it has connected."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)  # whatever the umask is
    path = folder / _CONTROL
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        try:
            path.chmod(0o666)  # for whoever code is in there; here nobody else can enter what it is in
            listener.listen(1)
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _connection(listener: socket.socket, engine: Engine, name: str, said: Callable[[], str]) -> socket.socket:
    """What the first process connects with.

    Raises:
        EnclosureError: it does not.
    """
    give_up = time.monotonic() + PATIENCE
    listener.settimeout(_LOOK)
    while time.monotonic() < give_up:
        try:
            return listener.accept()[0]
        except TimeoutError:
            if not engine.is_running(name):
                break
    else:
        raise EnclosureError(f"the container did not begin within {PATIENCE:g} s")
    raise EnclosureError(
        f"the container has ended before it began: {said() or 'it does not say why'}; an image needs"
        " Python 3.9 or newer with ipykernel, and the engine has to be on this machine"
    )


def _config(plan: Plan, labels: Mapping[str, str], user: str, folder: Path) -> dict[str, Any]:
    """The container, as an engine takes it (Docker Engine API, "Create a container")."""
    assert plan.container is not None
    config = hardened(plan, labels, user)
    config["Entrypoint"] = ["python3", "-I", "-S", f"{GUEST}/{Path(INIT).name}", f"{HOST}/{_CONTROL}"]
    config["HostConfig"]["Mounts"] = [_bind(*mount) for mount in _mounts(plan, user, folder)]
    config["HostConfig"]["DeviceRequests"] = [_gpus(plan.container.gpus)] if plan.container.gpus else []
    return config


def hardened(plan: Plan, labels: Mapping[str, str], user: str) -> dict[str, Any]:
    """What is the same in all containers: that code in them can do as little as it needs, and use as much."""
    assert plan.container is not None
    is_root, bounds = plan.container.is_root, plan.bounds
    return {
        "Image": plan.container.image,
        "User": user,
        "WorkingDir": "/",
        "Hostname": "sandbox",
        "Cmd": [],
        "Labels": labels,
        "StopSignal": "SIGKILL",  # the first process heeds no other, and who stops it would wait
        "Healthcheck": {"Test": ["NONE"]},  # it would run beside the first process, without its filter
        "HostConfig": {
            "AutoRemove": True,
            "RestartPolicy": {"Name": "no"},
            "CapDrop": ["ALL"],
            "CapAdd": _CAPABILITIES_OF_ROOT if is_root else [],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": not is_root,
            "Init": False,  # ours is the first process, and reaps
            "NetworkMode": "bridge" if plan.network == "all" else "none",
            "IpcMode": "private",
            "Tmpfs": _tmpfs(plan, user),
            "ShmSize": _MOST_SHARED_MEMORY,
            "PidsLimit": None if bounds.pids is None else bounds.pids + _OWN_PROCESSES,
            "Memory": bounds.memory,
            "MemorySwap": bounds.memory,  # of both together: so there is none
            "NanoCpus": None if bounds.cpu is None else int(bounds.cpu * 1e9),
            "Ulimits": [{"Name": "core", "Soft": CORE, "Hard": CORE}],
            "LogConfig": {"Type": "none", "Config": {}},
        },
    }


def _mounts(plan: Plan, user: str, folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Of each a path on this machine, one in the container, and whether it can be written."""
    assert plan.container is not None
    yield str(Path(INIT).parent), GUEST, False
    yield str(folder / SHOWN), HOST, False
    if not plan.container.user:  # else the image may know who that is
        for path, content in users(int(user.partition(":")[0])).items():
            source = folder / path.rpartition("/")[2]
            source.write_bytes(content)
            source.chmod(0o644)
            yield str(source), path, False
    for mount in plan.mounts:
        yield mount.source, mount.target, mount.writable


def _bind(source: str, target: str, writable: bool) -> dict[str, Any]:
    # What is mounted below a source stays writable where only the source is read-only: so it is not there.
    return {
        "Type": "bind",
        "Source": source,
        "Target": target,
        "ReadOnly": not writable,
        "BindOptions": {"Propagation": "rprivate", "NonRecursive": not writable},
    }


def _tmpfs(plan: Plan, user: str) -> dict[str, str]:
    uid, _, gid = user.partition(":")
    owner = f"mode=0755,uid={uid},gid={gid or uid}"
    return {
        path: f"rw,exec,nosuid,nodev,size={size},nr_inodes={_files(size)},"
        + ("mode=1777" if path in ("/tmp", SHARED_MEMORY) else owner)
        for path, size in _sizes(plan).items()
    }


def _sizes(plan: Plan) -> dict[str, int]:
    """Bytes of each place that code can write, all in memory; empty where the whole image can be written."""
    if plan.bounds.disk is None:
        return {}
    sizes = {path: _pages(plan.bounds.disk * part // 100) for path, part in _SHARES.items()}
    place = plan.working_dir
    if place != WORKING_DIR and not any(is_below(place, mount.target) for mount in plan.mounts):
        sizes[place] = sizes.pop(WORKING_DIR) + sizes.get(place, 0)
    sizes = {path: size for path, size in sizes.items() if all(path != mount.target for mount in plan.mounts)}
    return sizes | {SHARED_MEMORY: min(_MOST_SHARED_MEMORY, _pages(plan.bounds.disk - sum(sizes.values())))}


def files_of(plan: Plan) -> tuple[str, ...]:
    """The places of the code's own files; none where all of its image can be written."""
    return tuple(path for path in _sizes(plan) if path != SHARED_MEMORY)


def _pages(size: int) -> int:
    return max(size // mmap.PAGESIZE, 1) * mmap.PAGESIZE


def _files(size: int) -> int:
    return max(1024, min(size // _BYTES_PER_FILE, _MOST_FILES))


def _gpus(numbers: tuple[str, ...]) -> dict[str, Any]:
    return {"Driver": "", "DeviceIDs": list(numbers), "Capabilities": [["gpu"]]}


def own_configuration(plan: Plan) -> dict[str, Any]:
    """What the first process has to do that is only needed in a container."""
    assert plan.container is not None
    return {
        "in_container": True,
        "is_root": plan.container.is_root,
        "scoped": False,  # it has abstract Unix sockets of its own, with its network
        "sizes": {path: (size, _files(size)) for path, size in _sizes(plan).items()},
        # What else is a place in memory, and may not be in the image.
        "folders": [plan.working_dir, "/data"] if plan.container.is_root else [],
        "limits": {},
    }


def _environment(of_image: Sequence[str] | None, home: str) -> dict[str, str]:
    variables = dict(entry.split("=", 1) for entry in of_image or () if "=" in entry)
    return variables | {"HOME": home, "PATH": path_of(of_image, home)}


def path_of(of_image: Sequence[str] | None, home: str) -> str:
    """``PATH``: the image's, behind what is installed at *home*."""
    paths = [entry.removeprefix("PATH=") for entry in of_image or () if entry.startswith("PATH=")]
    return f"{home}/.local/bin:{paths[-1] if paths else environment()['PATH']}"


def _memory_of(about: Mapping[str, Any], plan: Plan) -> cgroups.Cgroup | None:
    if plan.bounds.memory is None:
        return None
    try:
        return cgroups.memory_of(about["State"]["Pid"])
    except (OSError, SandboxConfigurationError):  # an engine that runs in a machine of its own
        return None
