"""The folder that all sandboxes of a user on this machine are in."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from code_sandboxes.errors import SandboxConfigurationError

__all__ = ["check_length", "runtime_root"]

# sun_path of unix(7) holds 107 bytes and a zero; macOS has 103.
_LONGEST_SOCKET_PATH = 103

# A keeper's folder, and below it by number a sandbox's, a kernel's, and a channel's socket; what containers
# see has a letter of its own in between.
_LONGEST_NAME = "k2-0000/00000/c/000000/s-5"

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
        raise SandboxConfigurationError(
            f"cannot make the runtime folder {root}: {error.strerror}; {_ADVICE}"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SandboxConfigurationError(
            f"the runtime folder {root} is not a folder that only this user can enter; {_ADVICE}"
        )
    return root


def check_length(root: Path) -> None:
    """
    Raises:
        SandboxConfigurationError: the paths of sockets below *root* would be too long.
    """
    longest = len(os.fsencode(root / _LONGEST_NAME))
    if longest > _LONGEST_SOCKET_PATH:
        raise SandboxConfigurationError(
            f"the path of the runtime folder {root} is {longest - _LONGEST_SOCKET_PATH} bytes too"
            " long for sockets; set CODE_SANDBOXES_RUNTIME_DIR to a shorter one"
        )
