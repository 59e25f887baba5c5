"""What of this machine a sandbox is asked to show, and where in it code is asked to start.

Places are refused that would hide what the sandbox needs, or through which code could get out of it.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.isolation.bubblewrap import HOME
from code_sandboxes.isolation.plan import Mount
from code_sandboxes.isolation.system import SYSTEM, is_below
from code_sandboxes.variants.folders import runtime_root

__all__ = ["Refuse", "asked_mounts", "check_hidden", "check_keeper_is_hidden", "check_start"]

Refuse = Callable[[str, str], SandboxConfigurationError]
"""The error for what cannot be done, and why."""

# What of an enclosure is the system's.
_RESERVED = (*SYSTEM, "/dev", "/etc", "/proc", "/run", "/sys")

# Each is a call of bubblewrap's that looks at all of those before.
_MOST_MOUNTS = 100


def asked_mounts(value: object, installed: Sequence[Mount], refuse: Refuse) -> tuple[Mount, ...]:
    """*value* of the option ``mounts``.

    Args:
        installed: the other mounts, which these must leave as they are.

    Raises:
        SandboxConfigurationError: it is none, or they cannot be so.
    """
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise refuse(f"honour mounts={value!r}", 'it takes {host: (path in the sandbox, "ro" or "rw")}')
    if len(value) > _MOST_MOUNTS:
        raise refuse(f"honour {len(value)} mounts", f"there may be {_MOST_MOUNTS}; mount what they are in")
    mounts = tuple(_mount(source, target, refuse) for source, target in value.items())
    for mount in mounts:
        _check_target(mount, [other for other in mounts if other is not mount], installed, refuse)
    return mounts


def check_start(path: str, mounts: Sequence[Mount], refuse: Refuse) -> str:
    """*path* in the sandbox in which code is to start.

    Raises:
        SandboxConfigurationError: code cannot start there.
    """
    setting = f"start in working_dir={path!r}"
    place = _place(path, setting, refuse)
    _check_not_the_systems(place, setting, refuse)
    _check_cannot_be_led_away(place, mounts, setting, refuse)
    return place


def check_keeper_is_hidden(mounts: Sequence[Mount], refuse: Refuse) -> None:
    """
    Raises:
        SandboxConfigurationError: the sandbox would see the sockets by which the keeper of all sandboxes is
            spoken to, and so code could have it run programs outside.
    """
    root = os.path.realpath(runtime_root())
    above, identity = set(_upwards(root)), _identity(root)
    for source in (*filter(os.path.exists, SYSTEM), *(mount.source for mount in mounts)):
        # By what they are, not by their names: something may be mounted at two places.
        if _identity(source) in above or identity in _upwards(os.path.realpath(source)):
            raise refuse(
                f"show {source} to a sandbox",
                f"the runtime folder {root} would be seen with it, from which all sandboxes are governed;"
                " mount something else, or set CODE_SANDBOXES_RUNTIME_DIR to another folder",
            )


def check_hidden(mounts: Sequence[Mount], path: str, whose: str, refuse: Refuse) -> None:
    """
    Raises:
        SandboxConfigurationError: the sandbox would see a socket through which it could govern this machine.
    """
    if not os.path.exists(path):
        return
    above = set(_upwards(os.path.realpath(path)))
    for mount in mounts:
        if _identity(mount.source) in above:
            raise refuse(
                f"show {mount.source} to a sandbox",
                f"the socket {path} of {whose} would be seen with it; who may use it is as mighty as root",
            )


def _mount(source: object, where: object, refuse: Refuse) -> Mount:
    setting = f"mount {source!r}: {where!r}"
    if not isinstance(source, (str, os.PathLike)) or not isinstance(given := os.fspath(source), str):
        raise refuse(setting, "what is mounted is a path of this machine")
    if "\0" in given:
        raise refuse(setting, "no path of this machine has a NUL")
    if not isinstance(where, (tuple, list)) or len(where) != 2 or where[1] not in ("ro", "rw"):
        raise refuse(setting, 'how it is mounted is a path in the sandbox, and "ro" or "rw"')
    if not isinstance(where[0], (str, os.PathLike)) or not isinstance(target := os.fspath(where[0]), str):
        raise refuse(setting, "where it is mounted is a path in the sandbox")
    path, writable = os.path.realpath(given), where[1] == "rw"
    if not os.path.exists(path):
        raise refuse(setting, f"there is no {path} on this machine")
    if writable and os.geteuid() == 0 and not os.stat(path).st_mode & 0o002:
        raise refuse(
            setting, "code is not root in the sandbox, and only its owner may write there; chmod o+w it"
        )
    return Mount.of(path, _place(target, setting, refuse), writable=writable, is_asked_for=True)


def _place(path: str, setting: str, refuse: Refuse) -> str:
    """*path* in the sandbox, in the one way in which it is written everywhere else."""
    if not path.isprintable():
        raise refuse(setting, "the path in the sandbox has characters that cannot be printed")
    if not posixpath.isabs(path):
        raise refuse(setting, "it must be an absolute path in the sandbox")
    return "/" + posixpath.normpath(path).lstrip("/")  # of two slashes, normpath() leaves both


def _check_target(mount: Mount, asked: Sequence[Mount], installed: Sequence[Mount], refuse: Refuse) -> None:
    place = mount.target
    setting = f"mount {mount.source!r} at {place}"
    _check_not_the_systems(place, setting, refuse)
    for folder in _RESERVED:
        if is_below(folder, place):
            raise refuse(setting, f"{folder}, which is the system's in the sandbox, would be hidden")
    if is_below(HOME, place):
        raise refuse(setting, f"{HOME}, where code is at home, would be hidden; mount it below")
    if any(place == other.target for other in asked):
        raise refuse(setting, "something else is mounted there")
    _check_cannot_be_led_away(place, asked, setting, refuse)
    for other in installed:
        if is_below(place, other.target) or is_below(other.target, place):
            raise refuse(
                setting, f"kernels are installed in {other.target}, which is there, too; choose another path"
            )


def _check_not_the_systems(place: str, setting: str, refuse: Refuse) -> None:
    if any(is_below(place, folder) for folder in _RESERVED):
        raise refuse(setting, f"{place} is the system's in the sandbox")


def _check_cannot_be_led_away(place: str, mounts: Sequence[Mount], setting: str, refuse: Refuse) -> None:
    for other in mounts:
        if other.writable and place != other.target and is_below(place, other.target):
            raise refuse(
                setting,
                f'it lies in {other.target}, which is mounted "rw": who can write there, such as code in'
                " another sandbox, could make it a link to somewhere else",
            )


def _upwards(path: str) -> Iterator[tuple[int, int]]:
    """Of *path*, without links, and all that it is in."""
    yield _identity(path)
    while path != "/":
        path = os.path.dirname(path)
        yield _identity(path)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
