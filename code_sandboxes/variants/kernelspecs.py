"""Which kernels are installed on this machine, and how one is started: all that needs jupyter_client.

Source: the jupyter_client documentation, sections "Kernel specs" and "Kernel provisioning".
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from code_sandboxes.errors import SandboxConfigurationError, SandboxConnectionError

if TYPE_CHECKING:
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase

__all__ = [
    "IPYKERNEL_ARGUMENTS",
    "LAUNCH",
    "PROVISIONER",
    "InstalledKernel",
    "check_startable",
    "command_of",
    "installed_kernels",
    "kernel_named",
    "kernels_speaking",
    "known_languages",
    "launch_environment",
    "takes_descriptors",
]

_log = logging.getLogger(__name__)

T = TypeVar("T")

LAUNCH = str(Path(__file__).parent.parent / "guest" / "launch.py")
IPYKERNEL_ARGUMENTS = ("--HistoryManager.enabled=False", "--IPythonKernel._execute_sleep=0")

PROVISIONER = "code-sandboxes"
"""The name of :class:`code_sandboxes.provisioner.SandboxProvisioner` in a kernelspec (pyproject.toml)."""


@dataclass(frozen=True, slots=True)
class InstalledKernel:
    name: str
    language: str
    kernel_spec: KernelSpec


_specs: dict[str, InstalledKernel] = {}


def installed_kernels(*, refresh: bool = False) -> Mapping[str, InstalledKernel]:
    """The kernels that are installed, by name; looked up once, and again when one is not found."""
    global _specs
    if refresh or not _specs:
        _specs = {spec.name: spec for spec in _find_kernels()}
    return _specs


def _find_kernels() -> Iterator[InstalledKernel]:
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from traitlets import TraitError

    class TolerantSpec(KernelSpec):
        """One with keys of its own, as bash_kernel's, is not worth a DeprecationWarning to its user."""

        def __init__(self, **content: object) -> None:
            super().__init__(**{key: value for key, value in content.items() if self.has_trait(key)})

    manager = KernelSpecManager(kernel_spec_class=TolerantSpec)
    for name in sorted(manager.find_kernel_specs()):
        try:
            spec = manager.get_kernel_spec(name)
        except (OSError, ValueError, TypeError, TraitError) as error:
            _log.warning("the kernelspec %r cannot be used: %s", name, error)
            continue
        if spec.argv:
            yield InstalledKernel(name, spec.language.lower(), spec)


def known_languages() -> list[str]:
    """The names that ``language=`` takes."""
    kernels = installed_kernels()
    return sorted({*kernels, *(kernel.language for kernel in kernels.values())})


def kernel_named(name: object) -> str:
    if name is None:
        return "python3"
    if name not in installed_kernels() and name not in installed_kernels(refresh=True):
        raise SandboxConfigurationError(
            f"no kernelspec {name!r} on this machine (installed: {', '.join(installed_kernels())})"
        )
    return str(name)


def kernels_speaking(language: str, specs: Mapping[str, InstalledKernel]) -> list[str]:
    names = [name for name, spec in specs.items() if spec.language == language.lower()]
    return sorted(names, key=lambda name: (name != "python3", name))


def command_of(spec: InstalledKernel) -> list[str]:
    """The kernelspec's command line (jupyter_client, "Kernel specs"), tuned where it starts ipykernel.

    ``{connection_file}`` is left in it: where that is is decided at each start.
    """
    values = {
        "resource_dir": spec.kernel_spec.resource_dir,
        "prefix": sys.prefix,
    }
    command = [_filled_in(argument, values) for argument in spec.kernel_spec.argv]
    if command[0] in ("python", f"python{sys.version_info[0]}"):
        command[0] = sys.executable
    for i, module in enumerate(command[:-1]):
        if module == "-m" and command[i + 1] in ("ipykernel_launcher", "ipykernel"):
            return [command[0], LAUNCH, *command[i + 2 :], *IPYKERNEL_ARGUMENTS]
    return command


def takes_descriptors(command: Sequence[str]) -> bool:
    """Does :data:`LAUNCH` start it, so that it can be given sockets that listen already?"""
    return command[1:2] == [LAUNCH] and ("-f", "{connection_file}") in pairwise(command)


def check_startable(spec: InstalledKernel, program: str, path: str, cwd: str | None) -> None:
    """Say it better than the system would."""
    if shutil.which(program, path=path) is None:
        raise SandboxConnectionError(
            f"the kernel {spec.name!r} could not be started: its kernelspec in"
            f" {spec.kernel_spec.resource_dir} names the program {program!r}, which is not there"
        )
    if cwd is not None and not os.path.isdir(cwd):
        raise SandboxConnectionError(
            f"the kernel {spec.name!r} could not be started: there is no directory {cwd!r}"
        )


def _filled_in(argument: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace("{" + name + "}", value)
    return argument


def launch_environment(spec: InstalledKernel, environment: dict[str, str]) -> dict[str, str]:
    """*environment* as jupyter_client's provisioner prepares it for this kernel.

    Raises:
        SandboxConfigurationError: the kernel is not one that a process of this machine runs.
    """
    return _run_to_end(_prepare(spec, environment))


def _run_to_end(coroutine: Coroutine[object, None, T]) -> T:
    """Run a coroutine that never waits, as those of the local provisioner; no event loop is needed for it."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    coroutine.close()
    raise RuntimeError("jupyter_client's local provisioner waited for something")


async def _prepare(spec: InstalledKernel, environment: dict[str, str]) -> dict[str, str]:
    from jupyter_client.provisioning.factory import KernelProvisionerFactory
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    factory, number = KernelProvisionerFactory.instance(), secrets.token_hex(8)
    wanted = spec.kernel_spec.metadata.get("kernel_provisioner", {}).get("provisioner_name")
    provisioner: KernelProvisionerBase
    if (wanted or factory.default_provisioner_name) == PROVISIONER:  # here it is sandboxed in any case
        provisioner = LocalProvisioner(kernel_id=number, kernel_spec=spec.kernel_spec)
    else:
        provisioner = factory.create_provisioner_instance(number, spec.kernel_spec, parent=None)
    if not isinstance(provisioner, LocalProvisioner):
        raise SandboxConfigurationError(
            f"local-jupyter cannot run the kernelspec {spec.name!r}:"
            f" its provisioner {type(provisioner).__name__} does not start a process of this machine"
        )
    arguments = await provisioner.pre_launch(env=environment)
    return cast("dict[str, str]", arguments["env"])
