"""``python -m code_sandboxes kernelspec``: kernelspecs that any Jupyter tool runs sandboxed."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code_sandboxes.errors import SandboxConfigurationError, SandboxError
from code_sandboxes.isolation.plan import ISOLATIONS

if TYPE_CHECKING:
    from jupyter_client.kernelspec import KernelSpec

__all__ = ["add_to", "install", "installed", "remove"]

_SUFFIX = "(sandboxed)"

# What a kernelspec's display name says of its implementation, which is not what this one is about.
_PLAIN = " (ipykernel)"


# What it does.


def install(
    kernel: str,
    settings: Mapping[str, object],
    *,
    name: str | None = None,
    display_name: str | None = None,
    user: bool = False,
    prefix: str | None = None,
) -> tuple[str, str]:
    """Install a kernelspec that runs another one's kernel in a sandbox; one of that name is replaced.

    Args:
        kernel: the name of the other one.
        settings: traits of :class:`code_sandboxes.provisioner.SandboxProvisioner`, by name. Where they do not
            say how to isolate, what is the strongest here is written down: it never becomes less.
        user: for all Jupyter installations of this user, not for that in *prefix* or of this interpreter.

    Returns:
        its folder, and what separates its sandboxes from this machine.

    Raises:
        SandboxError: this machine cannot enforce the settings, or start the kernel with them.
        OSError: the folder cannot be written.
        ValueError: *name* is none that Jupyter takes.
    """
    from jupyter_client.kernelspec import KernelSpecManager

    from code_sandboxes.variants.kernelspecs import installed_kernels, kernel_named, launch_environment
    from code_sandboxes.variants.plans import strongest

    wrapped = installed_kernels()[kernel_named(kernel)]
    launch_environment(wrapped, {})  # which refuses what is no process of this machine
    if settings.get("isolation", "auto") == "auto" and strongest() != "none":
        settings = {**settings, "isolation": strongest()}
    name = _name_of(kernel, name)
    _check_free(name)
    spec = _sandboxed(wrapped.kernel_spec, settings, display_name)
    isolation = asyncio.run(_tried(spec, settings))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / name
        shutil.copytree(wrapped.kernel_spec.resource_dir, source)
        content = {key: value for key, value in spec.to_dict().items() if value != ""}
        (source / "kernel.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        place = None if user else prefix or sys.prefix
        return KernelSpecManager().install_kernel_spec(str(source), name, user, prefix=place), isolation


def installed() -> Iterator[tuple[str, KernelSpec]]:
    """The sandboxed kernelspecs that Jupyter finds here, by name."""
    from code_sandboxes.variants.kernelspecs import installed_kernels

    for name, kernel in installed_kernels(refresh=True).items():
        if _settings_of(kernel.kernel_spec) is not None:
            yield name, kernel.kernel_spec


def remove(name: str) -> str:
    """Remove a sandboxed kernelspec; returns the folder that it was in.

    Raises:
        SandboxConfigurationError: there is none of that name.
    """
    from jupyter_client.kernelspec import KernelSpecManager

    names = [each for each, _ in installed()]
    if name not in names:
        known = ", ".join(names) or "none"
        raise SandboxConfigurationError(f"there is no sandboxed kernelspec {name!r} (known: {known})")
    return KernelSpecManager().remove_kernel_spec(name)


def _name_of(kernel: str, name: str | None) -> str:
    return (name or f"sandboxed-{kernel}").lower()  # as Jupyter installs it


def _check_free(name: str) -> None:
    from code_sandboxes.variants.kernelspecs import installed_kernels

    there = installed_kernels(refresh=True).get(name)
    if there is not None and _settings_of(there.kernel_spec) is None:
        raise SandboxConfigurationError(
            f"there is a kernelspec {name!r} in {there.kernel_spec.resource_dir}, which is not sandboxed;"
            " choose another --name"
        )


def _sandboxed(wrapped: KernelSpec, settings: Mapping[str, object], display_name: str | None) -> KernelSpec:
    from jupyter_client.kernelspec import KernelSpec

    from code_sandboxes.variants.kernelspecs import PROVISIONER

    return KernelSpec(
        argv=wrapped.argv,
        name=wrapped.name,
        env=wrapped.env,
        display_name=display_name or f"{wrapped.display_name.removesuffix(_PLAIN)} {_SUFFIX}",
        language=wrapped.language,
        interrupt_mode=wrapped.interrupt_mode,
        resource_dir=wrapped.resource_dir,
        metadata={
            # ipykernel is started without a debugger (guest/launch.py), and its messages are not encrypted.
            **{key: value for key, value in wrapped.metadata.items() if key != "supported_encryption"},
            "debugger": False,
            "kernel_provisioner": {"provisioner_name": PROVISIONER, "config": dict(settings)},
        },
    )


def _settings_of(spec: KernelSpec) -> Mapping[str, Any] | None:
    """Of its sandbox; None if it has none."""
    from code_sandboxes.variants.kernelspecs import PROVISIONER

    provisioner = spec.metadata.get("kernel_provisioner", {})
    settings: Mapping[str, Any] = provisioner.get("config", {})
    return settings if provisioner.get("provisioner_name") == PROVISIONER else None


async def _tried(spec: KernelSpec, settings: Mapping[str, object]) -> str:
    """Start the kernel and end it: what separated it from this machine."""
    from code_sandboxes.provisioner import SandboxProvisioner

    provisioner = SandboxProvisioner(kernel_id="kernelspec install", kernel_spec=spec, **settings)
    arguments = await provisioner.pre_launch()
    await provisioner.launch_kernel(**arguments)
    try:
        return provisioner.sandbox_isolation
    finally:
        await provisioner.cleanup()


# How it is asked.


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``kernelspec`` to others."""
    kernelspec = commands.add_parser(
        "kernelspec",
        help="install, list or remove kernelspecs that any Jupyter tool runs sandboxed",
        description="Kernelspecs that any Jupyter tool runs sandboxed, if it is installed where this is.",
    )
    verbs = kernelspec.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_install(verbs)
    listing = verbs.add_parser("list", help="show the sandboxed kernelspecs and their settings")
    listing.set_defaults(run=_reporting(_list))
    removing = verbs.add_parser("remove", help="remove a sandboxed kernelspec")
    removing.add_argument("name")
    removing.set_defaults(run=_reporting(_remove))


def _add_install(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "install",
        help="install one",
        description="Install a kernelspec whose kernels run sandboxed, after one was started that way.",
        epilog="Exit status: 0 if it is installed, 1 if this machine cannot do what it asks for,"
        " 2 on wrong usage.",
    )
    parser.add_argument("--kernel", default="python3", help="the kernelspec that is to run (%(default)s)")
    parser.add_argument("--name", help="the name of the new one (sandboxed- and that of the kernel)")
    parser.add_argument("--display-name", help=f"what Jupyter shows (as of the kernel, with {_SUFFIX})")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--user", action="store_true", help="install for this user")
    place.add_argument("--sys-prefix", action="store_true", help=f"install in {sys.prefix} (the default)")
    place.add_argument("--prefix", help="install in another prefix")
    settings = parser.add_argument_group("settings of each sandbox")
    add = settings.add_argument
    add("--isolation", choices=ISOLATIONS, help="(the strongest that works now)")
    add("--network-policy", choices=("inherit", "all", "none", "allowlist"), help="(inherit)")
    add("--allow", action="append", dest="allowed_hosts", metavar="HOST", help="under allowlist; repeatable")
    add("--memory", type=float, metavar="MIB")
    add("--cpu", type=float, metavar="N", help="number of CPUs")
    add("--pids", type=int, metavar="N", help="number of processes and threads")
    add("--disk", type=int, metavar="BYTES", help="of everything that can be written")
    add("--mount", action="append", type=_mount, metavar="HOST:GUEST:ro|rw", help="repeatable")
    add("--working-dir", metavar="PATH", help="where code starts, in the sandbox")
    add("--max-lifetime", type=float, metavar="SECONDS", help="after which a sandbox ends")
    add("--idle-timeout", type=float, metavar="SECONDS", help="without a run, after which a sandbox ends")
    parser.set_defaults(run=_reporting(_install), usage_error=parser.error)


_SETTINGS = (
    *("isolation", "network_policy", "allowed_hosts", "memory", "cpu", "pids", "disk"),
    *("working_dir", "max_lifetime", "idle_timeout"),
)


def _mount(argument: str) -> tuple[str, list[str]]:
    host, *where = argument.rsplit(":", 2)
    if not host or len(where) != 2 or where[1] not in ("ro", "rw"):
        raise argparse.ArgumentTypeError(f"{argument!r} is not HOST:GUEST:ro or HOST:GUEST:rw")
    return str(Path(host).absolute()), where


def _reporting(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """*run*, with the exit status that tells whether it went well."""

    def reporting(chosen: argparse.Namespace) -> int:
        try:
            run(chosen)
        except (SandboxError, OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0

    return reporting


def _install(chosen: argparse.Namespace) -> None:
    if chosen.allowed_hosts and chosen.network_policy != "allowlist":
        chosen.usage_error("--allow takes --network-policy allowlist")
    settings = {name: getattr(chosen, name) for name in _SETTINGS if getattr(chosen, name) is not None}
    if chosen.mount:
        settings["mounts"] = dict(chosen.mount)
    replaced = dict(installed()).get(_name_of(chosen.kernel, chosen.name))
    folder, isolation = install(
        chosen.kernel,
        settings,
        name=chosen.name,
        display_name=chosen.display_name,
        user=chosen.user,
        prefix=chosen.prefix,
    )
    had = "" if replaced is None else f", in place of one with {json.dumps(_settings_of(replaced))}"
    print(f"installed {folder}{had}")
    print(isolation)


def _list(chosen: argparse.Namespace) -> None:
    for name, spec in installed():
        print(f"{name}  {spec.display_name}  {spec.resource_dir}  {json.dumps(_settings_of(spec))}")


def _remove(chosen: argparse.Namespace) -> None:
    print(f"removed {remove(chosen.name)}")
