"""Install Python packages for the code in a sandbox: with pip, by the interpreter of its kernel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from code_sandboxes import command_operations
from code_sandboxes.checks import check_seconds
from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxExecutionError,
    SandboxNotStartedError,
    SandboxTimeoutError,
)
from code_sandboxes.guest.calls import wire_path
from code_sandboxes.guest_calls import Guest
from code_sandboxes.guest_link import GuestCall
from code_sandboxes.guest_values import as_object, as_path
from code_sandboxes.inbox import Inbox
from code_sandboxes.operations import Core
from code_sandboxes.process_info import CommandResult
from code_sandboxes.results import Context
from code_sandboxes.steps import Operation, in_worker

__all__ = ["install_packages", "install_requirements"]

_PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input")

# Seconds: a package can be large.
_TIMEOUT = 600.0

# Characters of what pip has said in an error.
_QUOTED = 2000


def install_packages(
    core: Core, packages: Sequence[str], timeout: float | None, context: Context | str | None
) -> Operation[CommandResult]:
    """Install packages; afterwards they can be imported.

    Raises:
        TypeError: *packages* is no list of str.
        ValueError: one of them is an option, or nothing at all.
        SandboxExecutionError: pip failed.
        SandboxTimeoutError: it took too long.
    """
    names = _checked(packages)
    seconds = _TIMEOUT if timeout is None else check_seconds("timeout", timeout)
    _, guest = core.python(context, "packages")
    return _install(core, guest, names, None, seconds, context)


def install_requirements(
    core: Core, path: str | os.PathLike[str], timeout: float | None, context: Context | str | None
) -> Operation[CommandResult]:
    """Install what a file on this machine lists."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, not {type(path).__name__}")
    seconds = _TIMEOUT if timeout is None else check_seconds("timeout", timeout)
    _, guest = core.python(context, "packages")
    return _install(core, guest, (), Path(path), seconds, context)


def _install(
    core: Core,
    guest: Guest,
    names: Sequence[str],
    requirements: Path | None,
    seconds: float,
    context: Context | str | None,
) -> Operation[CommandResult]:
    content = () if requirements is None else ((yield from in_worker(requirements.read_bytes)),)
    prepared = as_object((yield from guest.call("packages.prepare", *content)).value)
    interpreter = as_path(prepared.get("interpreter"))
    path = None if requirements is None else as_path(prepared.get("path"))
    prefix = prepared.get("prefix")
    where = () if prefix is None else ("--prefix", as_path(prefix))
    command = [interpreter, *_PIP, *where, *(names if path is None else ("-r", path))]
    finish = {"path": None if path is None else wire_path(path)}
    try:
        result = yield from command_operations.run(core, command, context=context, timeout=seconds)
    except (SandboxConnectionError, SandboxNotStartedError):  # it is all gone with the kernel
        raise
    except BaseException:
        guest.begin(GuestCall("packages.finish", finish, (), Inbox()))
        raise
    yield from guest.call("packages.finish", **finish)
    what = ", ".join(names) if requirements is None else str(requirements)
    if result.timed_out:
        raise SandboxTimeoutError(
            f"pip did not install {what} within {seconds:g} s (pass timeout= to wait longer)", result
        )
    if not result.success:
        said = (result.stderr.strip() or result.stdout.strip())[-_QUOTED:]
        raise SandboxExecutionError(f"pip did not install {what}: {said}", result)
    return result


def _checked(packages: object) -> tuple[str, ...]:
    """
    Raises:
        TypeError: they are no list of str.
        ValueError: one of them is an option, or nothing at all.
    """
    if isinstance(packages, str) or not isinstance(packages, Sequence):
        raise TypeError(f"packages must be a list of str, not {type(packages).__name__}")
    if not packages:
        raise ValueError("packages is empty: there is nothing to install")
    for package in packages:
        if not isinstance(package, str):
            raise TypeError(f"packages must be a list of str, not of {type(package).__name__}")
        if not package.strip() or package.strip().startswith("-") or not package.isprintable():
            raise ValueError(f"{package[:200]!r} is no package: an option, nothing, or not one line of text")
    return tuple(packages)
