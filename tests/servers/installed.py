"""Where the servers of others are installed: from the package registries, on first use, once on a machine.

What is made is kept in the cache folder of the user, beside that of ``tests/engine.sh``, under a name that
tells the versions wanted and the interpreter. Packages come from where pip and npm of this machine have
theirs: nothing here names a registry.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

__all__ = [
    "ENTERPRISE_GATEWAY",
    "HUB",
    "HUB_PROXY",
    "JUPYTER",
    "Installation",
    "NodePackage",
    "NotInstalledError",
    "PythonPackages",
]

# A slow mirror is waited for, one that does not answer is not.
_PATIENCE = 900.0


class NotInstalledError(Exception):
    """A server is not on this machine, and could not be installed: a sentence that says why."""


class Installation(ABC):
    """Something that is installed in a folder of its own, when that is first asked for."""

    _failures: ClassVar[dict[Installation, str]] = {}

    def folder(self) -> Path:
        """Where it is, now that it is.

        Raises:
            NotInstalledError: it cannot be had. This is tried once in a process.
        """
        if self in self._failures:
            raise NotInstalledError(self._failures[self])
        try:
            return self._made()
        except NotInstalledError as error:
            self._failures[self] = str(error)
            raise

    def is_there(self) -> bool:
        """Whether it has been installed already, by this process or an earlier one."""
        try:
            return self._is_made(self._place())
        except NotInstalledError:
            return False

    @abstractmethod
    def _key(self) -> str:
        """What the folder is called; another one if anything else is wanted in it."""

    @abstractmethod
    def _make(self, folder: Path, log: Path) -> None: ...

    def _place(self) -> Path:
        return _cache() / self._key()

    def _made(self) -> Path:
        folder = self._place()
        if not self._is_made(folder):
            with _locked(folder.with_suffix(".lock")):
                if not self._is_made(folder):  # as somebody else may have made it meanwhile
                    shutil.rmtree(folder, ignore_errors=True)
                    self._make(folder, folder.with_suffix(".log"))
                    (folder / "complete").touch()
        return folder

    def _is_made(self, folder: Path) -> bool:
        return (folder / "complete").exists()

    def _run(self, log: Path, command: Sequence[str]) -> None:
        """Run one step; what it says goes to *log*, of which the end is told if it fails."""
        with log.open("w") as output:
            try:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=_PATIENCE,
                    check=True,
                )
            except (OSError, subprocess.SubprocessError) as error:
                said = log.read_text(errors="replace").strip().splitlines()[-2:] or [str(error)]
                raise NotInstalledError(
                    f"{self} could not be installed: {' / '.join(said)} (see {log})"
                ) from error


@dataclass(frozen=True)
class PythonPackages(Installation):
    """Packages in a virtual environment of their own, as they share no version of anything with ours."""

    name: str
    requirements: tuple[str, ...]
    newest: tuple[int, int] = (3, 99)
    """The newest Python that they work with."""

    def __str__(self) -> str:
        return " ".join(self.requirements)

    def python(self) -> Path:
        return self.folder() / "bin" / "python"

    def _key(self) -> str:
        version, _ = _interpreter(self.newest)
        return f"{self.name}-{version}-{_digest(*self.requirements)}"

    def _make(self, folder: Path, log: Path) -> None:
        _, interpreter = _interpreter(self.newest)
        self._run(log, [interpreter, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
        self._run(log, [*pip, *self.requirements])

    def _is_made(self, folder: Path) -> bool:
        # The interpreter that it was made with may have gone: then its name leads nowhere.
        return super()._is_made(folder) and (folder / "bin" / "python").exists()


@dataclass(frozen=True)
class NodePackage(Installation):
    """A program of the npm registry."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    def program(self) -> Path:
        return self.folder() / "node_modules" / ".bin" / self.name

    def _key(self) -> str:
        return f"{self.name}-{self.version}"

    def _make(self, folder: Path, log: Path) -> None:
        for needed in ("node", "npm"):
            if shutil.which(needed) is None:
                raise NotInstalledError(f"{self} takes {needed}, and there is none")
        folder.mkdir(parents=True)
        quiet = ["--no-audit", "--no-fund", "--no-update-notifier"]
        self._run(log, ["npm", "install", "--prefix", str(folder), *quiet, str(self)])


# The versions are exact: what is released tomorrow must not break what is tested today. What they depend on
# is what pip finds for them.
JUPYTER = PythonPackages("jupyter", ("jupyter_server==2.21.1", "jupyter_kernel_gateway==3.0.1"))
HUB = PythonPackages("hub", ("jupyterhub==6.1.1", "jupyter_server==2.21.1"))
# It wants pyzmq<25, of which there are no wheels for a newer Python, nor does its source build there.
ENTERPRISE_GATEWAY = PythonPackages(
    "enterprise-gateway", ("jupyter_enterprise_gateway==3.3.0",), newest=(3, 11)
)
HUB_PROXY = NodePackage("configurable-http-proxy", "5.3.0")


def _cache() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "code-sandboxes-tests" / "servers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _interpreter(newest: tuple[int, int]) -> tuple[str, str]:
    """The version of a Python that is not newer than *newest*, and what starts it: ours, or else the newest.

    Raises:
        NotInstalledError: there is none on this machine.
    """
    if sys.version_info[:2] <= newest:
        return f"{sys.version_info[0]}.{sys.version_info[1]}", sys.executable
    for minor in range(newest[1], 8, -1):
        for candidate in _candidates(minor):
            if _runs(candidate):
                return f"3.{minor}", candidate
    raise NotInstalledError(f"it takes a Python between 3.9 and {newest[0]}.{newest[1]}, and there is none")


def _candidates(minor: int) -> Iterator[str]:
    if (found := shutil.which(f"python3.{minor}")) is not None:
        yield found
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    if versions.is_dir():
        for folder in sorted(versions.iterdir(), reverse=True):
            if re.fullmatch(rf"3\.{minor}\.\d+", folder.name):
                yield str(folder / "bin" / "python")


def _runs(python: str) -> bool:
    """Whether it does: a version manager may offer a name and refuse to start it."""
    try:
        return (
            subprocess.run([python, "-c", ""], capture_output=True, timeout=60, check=False).returncode == 0
        )
    except (OSError, subprocess.SubprocessError):
        return False
