"""Which folders of this machine a kernel is installed in: an enclosure shows them to it, and no others."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from code_sandboxes.isolation.plan import Mount

__all__ = ["NotEnclosableError", "folders_of", "is_public", "is_visible", "mounts_of", "own_folders"]

# There in every enclosure (isolation/bubblewrap.py).
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")

# What tells that a folder is an installation, and not one that has a "bin" among other things.
_SIGNS = ("pyvenv.cfg", "conda-meta", "lib", "lib64", "share", "libexec")

_GUEST = str(Path(__file__).parent.parent / "guest")


class NotEnclosableError(Exception):
    """A kernel is installed where more is than an enclosure should show: a sentence."""


def own_folders() -> tuple[str, ...]:
    """Those of this interpreter, and of what this library runs in an enclosure."""
    return _without_those_inside({*_prefixes_of_this_python(), _GUEST})


def folders_of(command: Sequence[str], resources: str) -> tuple[str, ...]:
    """What the kernel that *command* starts is installed in, as far as it is not part of the system.

    Args:
        resources: the folder of its kernelspec.

    Raises:
        NotEnclosableError: that cannot be told, or would show too much.
    """
    program = shutil.which(command[0])
    if program is None:  # which whoever starts it will say
        return ()
    needed = {resources} if os.path.isdir(resources) else set()
    if program in (sys.executable, os.path.realpath(sys.executable)):
        needed |= _prefixes_of_this_python()
    else:
        needed |= {_installation_of(path) for path in _links_of(program) if not _is_system(path)}
    needed |= {argument for argument in command[1:] if os.path.isabs(argument) and os.path.isfile(argument)}
    return _without_those_inside({path for path in needed if not _is_system(path)})


def mounts_of(folders: Sequence[str]) -> tuple[Mount, ...]:
    """Each where it is on this machine, read-only."""
    return tuple(Mount.of(folder, folder) for folder in _without_those_inside(set(folders)))


def is_visible(path: str, mounts: Sequence[Mount]) -> bool:
    """Is *path* of this machine there in an enclosure with *mounts*, under the same name?"""
    return _is_system(path) or any(
        mount.source == mount.target and _is_below(path, mount.target) for mount in mounts
    )


def is_public(path: str) -> bool:
    """May every user of this machine read what is at *path*, as far as the way to it tells?"""
    if not os.stat(path).st_mode & 0o004:
        return False
    while (path := os.path.dirname(path)) != "/":
        if not os.stat(path).st_mode & 0o001:
            return False
    return True


def _prefixes_of_this_python() -> set[str]:
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    prefixes |= {os.path.realpath(prefix) for prefix in prefixes}
    return {prefix for prefix in prefixes if not _is_system(prefix)}


def _links_of(program: str) -> Iterator[str]:
    """*program*, and what it is a link to, link by link."""
    for _ in range(40):  # as many as the system follows (path_resolution(7))
        yield program
        if not os.path.islink(program):
            break
        program = os.path.normpath(os.path.join(os.path.dirname(program), os.readlink(program)))
    yield os.path.realpath(program)


def _installation_of(program: str) -> str:
    """The folder above the ``bin`` that *program* is in.

    Raises:
        NotEnclosableError: it is in another folder, or in one that has more than an installation.
    """
    folder = os.path.dirname(os.path.dirname(program))
    is_installation = any(os.path.exists(os.path.join(folder, sign)) for sign in _SIGNS)
    home = os.path.realpath(os.path.expanduser("~"))
    shows_too_much = _is_below(home, folder) or os.path.realpath(folder) == os.path.join(home, ".local")
    if os.path.basename(os.path.dirname(program)) != "bin" or not is_installation or shows_too_much:
        raise NotEnclosableError(
            f"its program {program} is in no folder that has nothing but an installation;"
            f" say with mounts= what of {os.path.dirname(program)} the sandbox may see"
        )
    return folder


def _without_those_inside(folders: set[str]) -> tuple[str, ...]:
    return tuple(
        sorted(
            folder
            for folder in folders
            if not any(folder != other and _is_below(folder, other) for other in folders)
        )
    )


def _is_system(path: str) -> bool:
    return any(_is_below(path, folder) for folder in _SYSTEM)


def _is_below(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")
