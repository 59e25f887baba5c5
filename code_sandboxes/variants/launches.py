"""How a kernel of local-jupyter is started: what the keeper is told, from kernelspec and plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from code_sandboxes.errors import SandboxConfigurationError, SandboxConnectionError
from code_sandboxes.guest.init import PROXY
from code_sandboxes.isolation.bubblewrap import HOME, environment
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.isolation.system import is_below
from code_sandboxes.variants.base import ContextSpec
from code_sandboxes.variants.installations import NotEnclosableError, folders_of, is_visible
from code_sandboxes.variants.kernelspecs import (
    InstalledKernel,
    check_startable,
    command_of,
    launch_environment,
    takes_descriptors,
)

__all__ = ["THROUGH_PROXY", "check_variables", "launch_of", "locale", "own_packages"]

# The library's own in the environment of a kernel: by some of them it is told what it may do, and how.
_OWN_VARIABLES = "CODE_SANDBOXES_"

# What most clients look at, in the case in which they do; code may of course not.
_PROXY = f"http://{PROXY[0]}:{PROXY[1]}"
_NOT_THROUGH_IT = "localhost,127.0.0.1,::1"
THROUGH_PROXY = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), _PROXY),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), _NOT_THROUGH_IT),
}
"""What leads programs to the proxy, where that is all the network there is."""


def launch_of(
    kernel: InstalledKernel, spec: ContextSpec, plan: Plan, home: str, env_vars: Mapping[str, str]
) -> Mapping[str, object]:
    """What :func:`code_sandboxes.keeper.kernels.start_kernel` wants to know.

    Args:
        home: where the code is at home, if it has no enclosure.

    Raises:
        SandboxError: it cannot be started from here.
    """
    check_variables("env", spec.env)
    command = command_of(kernel)
    path = os.environ.get("PATH", os.defpath)
    if plan.method == "bubblewrap":
        _check_visible(kernel, command, plan)
        variables = {**_enclosed_environment(command[0], plan), **env_vars, **spec.env}
        check_startable(kernel, command[0], path, None)
    else:
        if plan.method == "landlock":
            _check_confinable(kernel, command, spec.cwd, home, plan)
        variables = {**_environment(home, command[0], path, plan), **env_vars, **spec.env}
        check_startable(kernel, command[0], variables["PATH"], spec.cwd or plan.working_dir or None)
    return {
        "command": command,
        "env": launch_environment(kernel, variables),
        "cwd": spec.cwd or plan.working_dir,
        "interrupt_mode": kernel.kernel_spec.interrupt_mode,
        "by_descriptors": takes_descriptors(command),
    }


def check_variables(setting: str, variables: Mapping[str, str]) -> None:
    """
    Raises:
        SandboxConfigurationError: one of them is this library's own.
    """
    for name in variables:
        if name.startswith(_OWN_VARIABLES):
            raise SandboxConfigurationError(
                f"{setting} cannot set {name}: names that begin with {_OWN_VARIABLES} are the library's own"
            )


def _check_confinable(
    kernel: InstalledKernel, command: list[str], cwd: str | None, home: str, plan: Plan
) -> None:
    if not takes_descriptors(command):
        raise SandboxConfigurationError(
            f"local-jupyter cannot run the kernel {kernel.name!r} with isolation='landlock': it would have to"
            " make Unix sockets; with isolation='bubblewrap' it can"
        )
    path = os.path.realpath(cwd or home)
    if not is_below(path, os.path.realpath(home)) and not is_visible(path, plan.mounts):
        raise SandboxConfigurationError(
            f"local-jupyter cannot start in cwd={cwd!r}: with isolation='landlock' code has nothing but its"
            f" home, {home}"
        )


def _check_visible(kernel: InstalledKernel, command: Sequence[str], plan: Plan) -> None:
    try:
        needed = folders_of(command, kernel.kernel_spec.resource_dir)
    except NotEnclosableError as error:
        raise SandboxConnectionError(f"the kernel {kernel.name!r} cannot be enclosed: {error}") from None
    hidden = [folder for folder in needed if not is_visible(folder, plan.mounts)]
    if hidden:
        raise SandboxConnectionError(
            f"the kernel {kernel.name!r} could not be started: the sandbox does not see {hidden[0]};"
            " what is installed after a sandbox was made only a new one sees"
        )


def _enclosed_environment(executable: str, plan: Plan) -> dict[str, str]:
    own = _basics(HOME, executable, environment()["PATH"])
    own |= own_packages(HOME) | {"PATH": f"{HOME}/.local/bin{os.pathsep}{own['PATH']}"}
    return own if plan.network == "all" else own | THROUGH_PROXY


def _environment(home: str, executable: str, path: str, plan: Plan) -> dict[str, str]:
    own = _basics(home, executable, path)
    if plan.method == "landlock":
        own |= own_packages(home) | {"PATH": f"{home}/.local/bin{os.pathsep}{own['PATH']}"}
    return own


def _basics(home: str, executable: str, path: str) -> dict[str, str]:
    """Not the program's own: what it takes to run, and a home in the sandbox."""
    if os.path.isabs(executable):
        path = f"{os.path.dirname(executable)}{os.pathsep}{path}"
    return locale() | {"PATH": path, "HOME": home}


def locale() -> dict[str, str]:
    """All that a sandbox has of the program's own environment."""
    return {
        name: value for name, value in os.environ.items() if name in ("LANG", "TZ") or name.startswith("LC_")
    }


def own_packages(home: str) -> dict[str, str]:
    """So that packages can be installed where the installation cannot change; programs are in ``bin``."""
    prefix = f"{home}/.local"
    # The second one is for whoever calls pip himself: ``%pip install``.
    return {"CODE_SANDBOXES_PACKAGES": prefix, "PIP_PREFIX": prefix}
