"""What an ordinary user needs to run these tests, made by root: an interpreter, packages, a copy of us.

What the tests run on is mostly root's alone, as is a folder below ``/root``. So the packages that they need
are copied, as they are installed here, beside an interpreter of the same version that everybody can run.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["NoInterpreterError", "OrdinaryUser", "ordinary_user"]

ROOT = Path(__file__).parent.parent.parent

# Of this project, besides the package: what its tests are.
_OURS = ("conftest.py", "pyproject.toml", "README.md", "code_sandboxes", "tests")

_NEEDED = ("code-sandboxes", "docker", "psutil", "pytest", "pytest-timeout", "bash_kernel", "numpy")

# Numbers that systems give to nobody (systemd, "Users, Groups, UIDs and GIDs").
_NUMBERS = range(61184, 65519)


class NoInterpreterError(Exception):
    """There is none that an ordinary user could run: a sentence."""


@dataclass(frozen=True, slots=True)
class OrdinaryUser:
    """A user that nothing on this machine belongs to but *folder*."""

    uid: int
    folder: Path

    def run(self, *arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run Python with *arguments*, in the copy of this project."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder / "project",
            env=self.environment(),
            user=self.uid,
            group=self.uid,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )

    def command(self, *arguments: str) -> list[str]:
        return [str(self.folder / "venv/bin/python"), *arguments]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in ("LANG", "PATH", "TZ")}
        kept |= {name: value for name, value in os.environ.items() if name.startswith("CODE_SANDBOXES_R")}
        kept.pop("CODE_SANDBOXES_RUNTIME_DIR", None)
        home = str(self.folder / "home")
        return {**kept, "HOME": home, "TMPDIR": f"{home}/tmp", "PYTHONDONTWRITEBYTECODE": "1"}


def ordinary_user(folder: Path) -> OrdinaryUser:
    """Make one, and in *folder* what it needs.

    Raises:
        NoInterpreterError: there is no interpreter for it.
    """
    uid = secrets.choice(_NUMBERS)
    python = _python_of_everybody()
    folder.chmod(0o755)
    venv = folder / "venv"
    command = [python, "-m", "venv", "--without-pip", str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise NoInterpreterError(f"{python} makes no virtual environment: {made.stdout}{made.stderr}")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for each in _with_requirements(_NEEDED):
        _copy(each, venv / "lib" / version / "site-packages")
    _copy_project(folder / "project", venv / "lib" / version / "site-packages")
    for name in ("home", "home/tmp"):
        (folder / name).mkdir(mode=0o700)
        os.chown(folder / name, uid, uid)
    return OrdinaryUser(uid, folder)


def _python_of_everybody() -> str:
    """
    Raises:
        NoInterpreterError: there is none.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = (os.path.realpath(sys.executable), f"/usr/bin/{version}", f"/usr/local/bin/{version}")
    for path in candidates:
        real = Path(path).resolve()
        if real.exists() and all(parent.stat().st_mode & 0o001 for parent in real.parents):
            return str(real)
    raise NoInterpreterError(
        f"no {version} here that an ordinary user can run: {sys.executable} is in a folder that is root's"
        f" alone; install one in /usr (apt-get install {version}-venv), or run the tests as an ordinary user"
    )


def _with_requirements(names: Sequence[str]) -> Iterator[Distribution]:
    """The distributions of these names, and what they require here, each once."""
    left, seen = list(names), set[str]()
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # for another system, or another version of Python
            continue
        if name != "code-sandboxes":
            yield found
        for requirement in found.requires or ():
            if "extra ==" not in requirement:
                left.append(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def _copy(what: Distribution, packages: Path) -> None:
    for file in what.files or ():
        source = Path(str(what.locate_file(file)))
        if ".." not in file.parts and "tests" not in file.parts and source.is_file():
            target = packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def _copy_project(project: Path, packages: Path) -> None:
    project.mkdir()
    for name in _OURS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, project / name)
    (packages / "code_sandboxes.pth").write_text(f"{project}\n")
    for folder, _, files in os.walk(project):
        os.chmod(folder, 0o755)
        for file in files:
            os.chmod(os.path.join(folder, file), 0o644)
