"""Install packages of the operating system in a sandbox that has one of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from code_sandboxes.checks import check_seconds
from code_sandboxes.command_operations import run
from code_sandboxes.errors import SandboxConfigurationError, SandboxExecutionError
from code_sandboxes.guest_values import as_list, as_path, bad_answer
from code_sandboxes.operations import Core
from code_sandboxes.process_info import CommandResult
from code_sandboxes.results import Context
from code_sandboxes.steps import Operation

__all__ = ["install"]

# What each is called with: at first without any names, to learn what there is, then with them.
_MANAGERS: Mapping[str, Sequence[Sequence[str]]] = {
    "apt-get": (("update",), ("install", "-y")),
    "dnf": (("install", "-y"),),
    "yum": (("install", "-y"),),
    "apk": (("add", "--no-cache"),),
    "zypper": (("--non-interactive", "install"),),
    "pacman": (("-Sy", "--noconfirm", "--needed"),),
}

_ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive"}

_QUOTED = 2000


def install(
    core: Core,
    packages: Sequence[str],
    package_manager: str | None,
    timeout: float,
    context: Context | str | None,
    *,
    listen: bool,
) -> Operation[CommandResult]:
    """Install them with the package manager that is there.

    Raises:
        SandboxConfigurationError: they would be installed on this machine itself; or there is none.
        SandboxExecutionError: it failed.
        ValueError: one of them is no name of a package; or there is no such package manager.
    """
    names = _checked(packages)
    seconds = check_seconds("timeout", timeout)
    if package_manager is not None and package_manager not in _MANAGERS:
        raise ValueError(f"no package manager {package_manager!r} (known: {', '.join(_MANAGERS)})")
    can = core.variant.own_capabilities.system_packages
    if not can:
        raise core.variant.refuse("install system packages", can.reason)
    core.check_running()
    return _install(core, names, package_manager, seconds, context, listen=listen)


def _install(
    core: Core,
    names: Sequence[str],
    package_manager: str | None,
    timeout: float,
    context: Context | str | None,
    *,
    listen: bool,
) -> Operation[CommandResult]:
    name, path = yield from _found(core, package_manager, context)
    result = CommandResult(0, "", "")
    for arguments in _MANAGERS[name]:
        takes_names = arguments is _MANAGERS[name][-1]
        result = yield from run(
            core,
            [path, *arguments, *(names if takes_names else ())],
            context=context,
            env=_ENVIRONMENT,
            timeout=timeout,
            listen=listen,
        )
        if not result.success:
            raise _failed(name, names, result)
    return result


def _found(core: Core, wanted: str | None, context: Context | str | None) -> Operation[tuple[str, str]]:
    names = list(_MANAGERS) if wanted is None else [wanted]
    answer = yield from core.guest(context).call("processes.which", names=names)
    if answer.value is None:
        raise SandboxConfigurationError(
            f"cannot install system packages: there is no package manager in the sandbox"
            f" (looked for {', '.join(names)})"
        )
    found = as_list(answer.value)
    if len(found) != 2 or found[0] not in names:
        raise bad_answer("a package manager", answer.value)
    return found[0], as_path(found[1])


def _failed(manager: str, names: Sequence[str], result: CommandResult) -> SandboxExecutionError:
    why = "took too long" if result.timed_out else f"failed with exit code {result.exit_code}"
    said = (result.stderr.strip() or result.stdout.strip())[-_QUOTED:]
    return SandboxExecutionError(f"{manager} {why}, installing {', '.join(names)[:_QUOTED]}: {said}", result)


def _checked(packages: Sequence[str]) -> list[str]:
    if isinstance(packages, str):
        raise TypeError("packages must be a list of names, not one str")
    names = list(packages)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the name of a package must be a str, not {type(name).__name__}")
        if not name or name.startswith("-") or "\0" in name or name.split() != [name]:
            raise ValueError(f"{name!r} is no name of a package")
    if not names:
        raise ValueError("name at least one package")
    return names
