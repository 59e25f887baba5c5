"""``python -m code_sandboxes build-image``: the image that local-docker runs, built where the engine is."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from code_sandboxes.errors import SandboxConfigurationError, SandboxError
from code_sandboxes.isolation.engine import IMAGE, connect, told

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["RECIPE", "add_to", "build", "context_files", "narrate", "packed", "recipe_folder"]

RECIPE = ("Dockerfile", "requirements.txt", "requirements-data.txt")
"""The files of the folder ``docker`` of this project; pyproject.toml puts them in the wheel."""

# What pip and apt are told in the build as they are here. The engine takes proxies unasked, and forgets them.
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_FORWARDED = (
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"),
    *_PROXIES,
    *(name.lower() for name in _PROXIES),
)

# A stage of the build that is in no image any more.
_LEFT_OVER = {"dangling": True, "label": "io.code-sandboxes.image=build"}

_STEP = re.compile(r"step (?P<number>\d+/\d+) ?: *(?P<instruction>\w+)", re.IGNORECASE)
_STATUS = re.compile(r"returned a non-zero code: (\d+)")


# What it does.


def build(
    engine: DockerClient,
    tag: str,
    *,
    arguments: Mapping[str, str],
    files: Mapping[str, Path],
    network: str | None = None,
    labels: Mapping[str, str] | None = None,
    write: Callable[[str], object],
) -> int:
    """Build the image; an older one of that name loses it.

    Args:
        arguments: of ``docker/Dockerfile``.
        files: what the build sees, as of :func:`context_files`.
        network: that of its commands, by default the engine's.
        write: takes what the build says, as it does.

    Returns:
        its size in bytes.

    Raises:
        SandboxError: it cannot be built.
        OSError: one of *files* cannot be read.
    """
    with packed(files) as context, told(f"build {tag}"):
        events = engine.api.build(
            fileobj=context,
            custom_context=True,
            dockerfile="docker/Dockerfile",
            tag=tag,
            buildargs=dict(arguments),
            network_mode=network,
            labels=dict(labels or {}),
            rm=True,
            forcerm=True,
            decode=True,
        )
        narrate(tag, events, write)
        engine.images.prune(_LEFT_OVER)
        size: int = engine.images.get(tag).attrs["Size"]
    return size


def recipe_folder(package: Path = Path(__file__).parent) -> Path:
    """Where the Dockerfile is: in the package that was installed, or in the checkout that *package* is in.

    Raises:
        SandboxConfigurationError: nowhere.
    """
    for folder in (package / "docker", package.parent / "docker"):
        if (folder / "Dockerfile").is_file():
            return folder
    raise SandboxConfigurationError(
        f"there is no docker/Dockerfile in {package}; install it again:"
        " pip install --force-reinstall --no-deps code-sandboxes"
    )


def context_files(wheels: Path | None = None, ca_file: Path | None = None) -> dict[str, Path]:
    """The files that the build sees, by their names in it.

    Raises:
        SandboxConfigurationError: there are no such wheels, or no such file.
    """
    folder = recipe_folder()
    files = {f"docker/{name}": folder / name for name in RECIPE}
    if wheels is not None:
        found = {f"docker/wheels/{path.name}": path for path in sorted(wheels.glob("*.whl"))}
        if not found:
            raise SandboxConfigurationError(
                f"there are no wheels in {str(wheels)!r}; with the Python of the base image, fill it:"
                f" pip wheel -w {wheels} -r {folder / 'requirements.txt'}"
            )
        files |= found
    if ca_file is not None:
        if not ca_file.is_file():
            raise SandboxConfigurationError(f"there is no file {str(ca_file)!r} to be --ca-file")
        files["docker/ca.crt"] = ca_file
    return files


@contextlib.contextmanager
def packed(files: Mapping[str, Path]) -> Iterator[IO[bytes]]:
    """*files* as an archive, at its start."""
    with tempfile.TemporaryFile() as archive:  # wheels may be larger than memory should be
        with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
            for name, path in files.items():
                with path.open("rb") as content:
                    entry = tar.gettarinfo(arcname=name, fileobj=content)
                    # Of who may read it here, and whose it is, an engine's cache should know nothing.
                    entry.mode, entry.uid, entry.gid, entry.uname, entry.gname = 0o644, 0, 0, "", ""
                    tar.addfile(entry, content)
        archive.seek(0)
        yield archive


def narrate(tag: str, events: Iterable[Mapping[str, Any]], write: Callable[[str], object]) -> None:
    """Write what a build says, until it ends.

    Args:
        events: as an engine sends them (Docker Engine API, "Build an image").

    Raises:
        SandboxError: it failed.
    """
    step, instruction = "", ""
    for event in events:
        text = str(event.get("stream", ""))
        if begun := _STEP.match(text):
            step, instruction = begun["number"], begun["instruction"].upper()
        if "error" in event:
            raise SandboxError(f"{tag} was not built: {_why(step, instruction, str(event['error']))}")
        # That something is fetched is worth a line, how far it has come is not.
        if "status" in event and not event.get("progressDetail"):
            text = " ".join(str(event[key]) for key in ("id", "status") if key in event) + "\n"
        write(text)


def _why(step: str, instruction: str, error: str) -> str:
    status = _STATUS.search(error)
    if status is not None:
        return (
            f"step {step} failed with status {status[1]}, and says above why;"
            " if it could not fetch something, see --network, --ca-file and --wheels"
        )
    if instruction == "FROM":
        return f"{error}; with --base-image, name one that the engine has, or can fetch"
    return error


# How it is asked.


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``build-image`` to others."""
    parser = commands.add_parser(
        "build-image",
        help="build the image that local-docker runs",
        description="Build the image that local-docker runs: Python with a Jupyter kernel and server.",
        epilog=f"In the build, {', '.join(_FORWARDED[:6])} are as they are here."
        " Exit status: 0 if it is built, 1 if not, 2 on wrong usage.",
    )
    add = parser.add_argument
    add("--tag", default=IMAGE, help="its name (%(default)s)")
    add("--base-image", metavar="IMAGE", help="one like Debian's, with Python or without (python:3.13-slim)")
    add("--data", action="store_true", help="with numpy, pandas, matplotlib and pyarrow")
    add("--wheels", type=Path, metavar="DIR", help="install what is there, and nothing from an index")
    add("--ca-file", type=Path, metavar="FILE", help="authorities that an index is to be certified by")
    add("--network", metavar="NAME", help="of the build: host, none, or one of the engine (the engine's own)")
    add("--label", action="append", type=_label, metavar="KEY=VALUE", help="of the image; repeatable")
    add("--docker-host", metavar="URL", help="where the engine listens (as for the command docker)")
    parser.set_defaults(run=_run)


def _label(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{argument!r} is not KEY=VALUE")
    return key, value


def _run(chosen: argparse.Namespace) -> int:
    try:
        _build(chosen)
    except (SandboxError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the engine ends a build whose client goes away
        print("interrupted; nothing was built", file=sys.stderr)
        return 130
    return 0


def _build(chosen: argparse.Namespace) -> None:
    files = context_files(chosen.wheels, chosen.ca_file)
    arguments = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
    if chosen.base_image:
        arguments["BASE_IMAGE"] = chosen.base_image
    if chosen.data:
        arguments["DATA_PACKAGES"] = "1"
    engine = connect(chosen.docker_host)
    try:
        size = build(
            engine,
            chosen.tag,
            arguments=arguments,
            files=files,
            network=chosen.network,
            labels=dict(chosen.label or ()),
            write=_say,
        )
    finally:
        engine.close()
    print(f"built {chosen.tag} ({size / 1e6:.0f} MB)")


def _say(text: str) -> None:
    print(text, end="", flush=True)
