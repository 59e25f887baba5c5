"""Which folders of this machine a kernel is installed in: an enclosure shows them to it, and no others.

Of an installation only the parts are shown that any has, never the folder that they are in: that may be a
project's, with secrets (``.env``), or somebody's home.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from code_sandboxes.isolation.plan import Mount
from code_sandboxes.isolation.system import SYSTEM, is_below

__all__ = ["NotEnclosableError", "folders_of", "is_visible", "mounts_of", "own_folders"]

# What an installation is made of: that of Python (sysconfig, its schemes; PEP 405), and those of others.
_PARTS = ("bin", "include", "lib", "lib32", "lib64", "libexec", "pyvenv.cfg")

# Also that, where it is nobody's but an installation's: in ~/.local programs of all sorts keep there what
# they know. The last is where conda has the certificates and the settings of OpenSSL.
_MORE_PARTS = ("conda-meta", "etc/fonts", "share", "ssl")

# What tells that a folder is an installation, and not one that has a "bin" among other things.
_SIGNS = ("pyvenv.cfg", "conda-meta", "lib", "lib64", "share", "libexec")

_GUEST = str(Path(__file__).parent.parent / "guest")


class NotEnclosableError(Exception):
    """A kernel is installed where more is than an enclosure should show: a sentence."""


def own_folders() -> tuple[str, ...]:
    """Those of this interpreter, and of what this library runs in an enclosure; some are files."""
    return _without_those_inside({*_parts_of_this_python(), _GUEST})


def folders_of(command: Sequence[str], resources: str) -> tuple[str, ...]:
    """What the kernel that *command* starts is installed in, as far as it is not part of the system.

    That is of each installation what it has of ``bin``, ``include``, ``lib``, ``lib32``, ``lib64``,
    ``libexec``, ``share``, ``etc/fonts``, ``ssl``, ``conda-meta`` and ``pyvenv.cfg``; and the folder of the
    kernelspec, and files that it names.

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
        needed |= _parts_of_this_python()
    else:
        for path in _links_of(program):
            needed |= set() if _is_system(path) else _parts_of(_installation_of(path))
    needed |= {argument for argument in command[1:] if os.path.isabs(argument) and os.path.isfile(argument)}
    return _without_those_inside({path for path in needed if not _is_system(path)})


def mounts_of(folders: Sequence[str]) -> tuple[Mount, ...]:
    """Each where it is on this machine, read-only."""
    return tuple(Mount.of(folder, folder) for folder in _without_those_inside(set(folders)))


def is_visible(path: str, mounts: Sequence[Mount]) -> bool:
    """Is *path* of this machine there in an enclosure with *mounts*, under the same name?"""
    return _is_system(path) or any(
        mount.source == mount.target and is_below(path, mount.target) for mount in mounts
    )


def _parts_of_this_python() -> set[str]:
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    prefixes |= {os.path.realpath(prefix) for prefix in prefixes}
    programs = {sys.executable, os.path.realpath(sys.executable)}  # it is not in bin everywhere
    parts = {part for prefix in prefixes for part in _parts_of(prefix)}
    return parts | {path for path in programs if not _is_system(path) and os.path.isfile(path)}


def _parts_of(installation: str) -> set[str]:
    """Those that there are, and are not shown anyway."""
    names = _PARTS if _is_for_all_sorts(installation) else (*_PARTS, *_MORE_PARTS)
    paths = {os.path.join(installation, name) for name in names}
    return {path for path in paths if not _is_system(path) and os.path.exists(path)}


def _is_for_all_sorts(folder: str) -> bool:
    """Is it one in which more than one thing is installed, beside what somebody has: a home, or such?"""
    real, home = os.path.realpath(folder), os.path.realpath(os.path.expanduser("~"))
    return is_below(home, real) or real in (os.path.join(home, ".local"), "/tmp", "/var/tmp")


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
    is_in_bin = os.path.basename(os.path.dirname(program)) == "bin"
    if not is_in_bin or not is_installation or _is_for_all_sorts(folder):
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
            if not any(folder != other and is_below(folder, other) for other in folders)
        )
    )


def _is_system(path: str) -> bool:
    return any(is_below(path, folder) for folder in SYSTEM)
