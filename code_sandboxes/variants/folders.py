"""The folders of sandboxes on this machine: where they are, and that nothing of them stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

from code_sandboxes.errors import SandboxConfigurationError

__all__ = ["check_length", "remove_tree", "runtime_root", "unusable"]

# sun_path of unix(7) holds 107 bytes and a zero; macOS has 103.
_LONGEST_SOCKET_PATH = 103

# Seconds for which to try to remove a folder in which something is still being written.
_PERSISTENCE = 3.0

_ADVICE = "set CODE_SANDBOXES_RUNTIME_DIR to a folder of yours"


def runtime_root() -> Path:
    """The folder all sandboxes of this user are in, entered by nobody else."""
    given = os.environ.get("CODE_SANDBOXES_RUNTIME_DIR")
    try:
        root = Path(given or Path(tempfile.gettempdir()) / f"code-sandboxes-{os.geteuid()}").absolute()
    except FileNotFoundError as error:
        raise SandboxConfigurationError(f"there is no folder for temporary files; {_ADVICE}") from error
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
    except OSError as error:
        raise unusable(root, error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SandboxConfigurationError(
            f"the runtime folder {root} is not a folder that only this user can enter; {_ADVICE}"
        )
    return root


def unusable(folder: Path, error: OSError) -> SandboxConfigurationError:
    return SandboxConfigurationError(f"cannot make the runtime folder {folder}: {error.strerror}; {_ADVICE}")


def remove_tree(folder: Path) -> None:
    """Remove *folder*, also while something still writes in it, for a while.

    Raises:
        OSError: that did not help.
    """
    give_up = time.monotonic() + _PERSISTENCE
    while folder.exists():
        if sys.version_info >= (3, 12):
            shutil.rmtree(folder, onexc=_make_removable)
        else:
            shutil.rmtree(folder, onerror=_make_removable)
        if folder.exists() and time.monotonic() > give_up:
            raise OSError(f"something still writes in {folder}")


def check_length(folder: Path) -> None:
    longest = len(os.fsencode(folder / "0000" / "s-5"))
    if longest > _LONGEST_SOCKET_PATH:
        raise SandboxConfigurationError(
            f"the path of the runtime folder {folder.parent} is {longest - _LONGEST_SOCKET_PATH} bytes too"
            " long for sockets; set CODE_SANDBOXES_RUNTIME_DIR to a shorter one"
        )


def _make_removable(function: object, path: str, error: object) -> None:
    """Code may have closed a folder of its own; whose folder it is may open it, for the next try."""
    for folder in (os.path.dirname(path), path):
        if os.path.isdir(folder) and not os.path.islink(folder):
            with contextlib.suppress(OSError):
                os.chmod(folder, 0o700)
