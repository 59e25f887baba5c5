"""local-jupyter: kernels on this machine, each a process of its own, spoken to over ``ipc://``.

Everything a sandbox has on this machine is one folder that only this user can enter, below
``$CODE_SANDBOXES_RUNTIME_DIR`` or the system's folder for temporary files: the home of the code, and for
each kernel its connection file and sockets. The processes are started by jupyter_client's provisioners
from any installed kernelspec.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from code_sandboxes.checks import check_str
from code_sandboxes.errors import SandboxConfigurationError, SandboxIsolationWarning
from code_sandboxes.guest import journal
from code_sandboxes.info import Capabilities, Capability, SandboxVariant
from code_sandboxes.reaper import remove_tree
from code_sandboxes.transports.zmq import ConnectionInfo
from code_sandboxes.variants.base import Variant
from code_sandboxes.variants.folders import check_length, runtime_root, unusable
from code_sandboxes.variants.kernelspecs import (
    InstalledKernel,
    check_startable,
    command_of,
    installed_kernels,
    kernel_named,
    kernels_speaking,
    known_languages,
    start_kernel,
)
from code_sandboxes.variants.local_process import LocalProcess, close_reaper, the_reaper

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["LocalJupyter"]

_CHANNELS = ("shell", "iopub", "stdin", "control", "hb")

_NEEDS_ISOLATION = "that takes isolation, and it has only a process of its own yet"
_NO_GPU_CHOICE = "what GPUs the machine has are visible to the code"
_UNENFORCED = (
    ("memory_limit", "limit the memory"),
    ("cpu_limit", "limit the CPUs"),
)


class LocalJupyter(Variant):
    """Kernels as processes of this machine."""

    name = SandboxVariant.LOCAL_JUPYTER
    options: ClassVar[frozenset[str]] = frozenset(
        {"disk", "isolation", "kernel_name", "max_output", "mounts", "pids", "preload"}
    )

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        super().__init__(config, options)
        if not hasattr(os, "killpg"):
            raise self.refuse("run on this system", "it needs process groups; use Linux or macOS")
        check_str("kernel_name", options.get("kernel_name"))
        self._refuse_what_is_not_enforced(config, options)
        isolation = options.get("isolation") or "auto"
        if isolation == "auto":
            _warn_once()
        elif isolation != "none":
            raise self.refuse(f"isolate with {isolation!r}", "it knows only 'auto' and 'none' yet")
        self._max_output = _bytes("max_output", options.get("max_output"), default=256 * 1024**2)
        self._kernel_name = kernel_named(options.get("kernel_name"))
        self._folder = Path()

    def _refuse_what_is_not_enforced(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        for trait, what in _UNENFORCED:
            if getattr(config, trait) is not None:
                raise self.refuse(f"{what} ({trait}={getattr(config, trait)!r})", _NEEDS_ISOLATION)
        for option in ("disk", "mounts", "pids"):
            if options.get(option) is not None:
                raise self.refuse(f"honour {option}={options[option]!r}", _NEEDS_ISOLATION)
        if config.gpu is not None:
            raise self.refuse(f"choose a GPU (gpu={config.gpu!r})", _NO_GPU_CHOICE)
        if options.get("preload") is not None:
            raise self.refuse(f"preload {options['preload']!r}", "its kernels are started one by one yet")
        if config.network_policy in ("none", "allowlist"):
            raise self.refuse(
                f"enforce network_policy={config.network_policy!r}",
                f"{_NEEDS_ISOLATION}; 'inherit' and 'all' leave the network as it is",
            )
        if config.environment is not None:
            raise self.refuse(
                f"provide the environment {config.environment!r}",
                "it runs what is installed on this machine; choose with kernel_name=",
            )
        if config.idle_timeout is not None:
            raise self.refuse("enforce idle_timeout", "nothing watches idle kernels yet; use max_lifetime")
        if config.working_dir is not None and not os.path.isdir(config.working_dir):
            raise self.refuse(
                f"start in working_dir={config.working_dir!r}", "there is no such directory on this machine"
            )

    @classmethod
    def capabilities(cls) -> Capabilities:
        yes, not_isolated = Capability(True), Capability(False, _NEEDS_ISOLATION)
        not_yet = Capability(False, "it cannot do that yet")
        return Capabilities(
            languages=tuple(known_languages()),
            contexts=yes,
            own_process=yes,
            environment=yes,
            magics=yes,
            interrupt_blocked=yes,
            subshells=not_yet,
            network_none=not_isolated,
            network_allowlist=not_isolated,
            memory_limit=not_isolated,
            cpu_limit=not_isolated,
            pids_limit=not_isolated,
            disk_limit=not_isolated,
            gpu=Capability(False, _NO_GPU_CHOICE),
            mounts=not_isolated,
            idle_timeout=not_yet,
            snapshots=not_yet,
            fork=not_yet,
        )

    @property
    def isolation(self) -> str:
        return (
            "none: a process of this user, in a home of its own; files and network are the machine's, and"
            " a child that leaves its session (setsid) outlives it"
        )

    @property
    def max_output(self) -> int:
        return self._max_output

    def kernel_name(self, language: str | None) -> str:
        specs = installed_kernels()
        if language is None:
            return self._kernel_name
        if language not in specs and not kernels_speaking(language, specs):
            specs = installed_kernels(refresh=True)
        if language in specs:
            return language
        speaking = kernels_speaking(language, specs)
        if not speaking:
            known = ", ".join(known_languages())
            raise ValueError(f"no kernel for the language {language!r} (installed: {known})")
        return speaking[0]

    def language_of(self, kernel_name: str) -> str:
        return installed_kernels()[kernel_name].language

    def prepare(self) -> None:
        installed_kernels()  # here, where it holds up nobody's event loop
        folder = runtime_root() / secrets.token_hex(4)
        check_length(folder)
        the_reaper().guard_folder(str(folder))
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            the_reaper().release_folder(str(folder))
            raise unusable(folder, error) from error
        self._folder = folder

    def launcher(
        self, kernel_name: str, cwd: str | None, env: Mapping[str, str]
    ) -> Callable[[], LocalProcess]:
        spec, sandbox_folder = installed_kernels()[kernel_name], self._folder
        return lambda: self._launch(spec, sandbox_folder, cwd, env)

    def _launch(
        self, spec: InstalledKernel, sandbox_folder: Path, cwd: str | None, env: Mapping[str, str]
    ) -> LocalProcess:
        home = sandbox_folder / "home"
        folder = sandbox_folder / secrets.token_hex(2)
        # What was there before, code may have removed or closed since.
        sandbox_folder.mkdir(mode=0o700, exist_ok=True)
        sandbox_folder.chmod(0o700)
        home.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700)
        try:
            connection = _write_connection_file(folder, spec.name)
            identity = journal.create(str(folder / "journal"))
            command = command_of(spec, folder / "connection.json")
            environment = {**_environment(home, command[0]), **self.config.env_vars, **env}
            cwd = cwd or self.config.working_dir or str(home)
            check_startable(spec, command[0], environment["PATH"], cwd)
            process, stderr = start_kernel(spec, command, environment, cwd)
            the_reaper().guard_group(process.pid)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        mode = spec.kernel_spec.interrupt_mode
        return LocalProcess(
            process, connection, "message" if mode == "message" else "signal", stderr, folder, identity
        )

    def remove(self) -> None:
        folder, self._folder = self._folder, Path()
        if folder != Path():
            remove_tree(str(folder))
            the_reaper().release_folder(str(folder))

    @classmethod
    def leave(cls) -> None:
        close_reaper()


def _environment(home: Path, executable: str) -> dict[str, str]:
    """Not the program's own: what it takes to run, and a home in the sandbox."""
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "TZ")}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("LC_")}
    path = os.environ.get("PATH", os.defpath)
    if os.path.isabs(executable):
        path = f"{os.path.dirname(executable)}{os.pathsep}{path}"
    return kept | {"PATH": path, "HOME": str(home)}


def _write_connection_file(folder: Path, kernel_name: str) -> ConnectionInfo:
    ports = {channel: number for number, channel in enumerate(_CHANNELS, start=1)}
    connection = ConnectionInfo("ipc", str(folder / "s"), ports, secrets.token_hex(32))
    content = {f"{channel}_port": number for channel, number in ports.items()} | {
        "transport": connection.transport,
        "ip": connection.ip,
        "key": connection.key,
        "signature_scheme": "hmac-sha256",
        "kernel_name": kernel_name,
    }
    path = folder / "connection.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(content))
    return connection


def _bytes(name: str, value: object, *, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise SandboxConfigurationError(f"{name} must be a positive number of bytes, not {value!r}")
    return value


@cache
def _warn_once() -> None:
    warnings.warn(
        "local-jupyter has no isolation on this machine but a process of its own: code in it can read and"
        " change what this user can, and reach the network (isolation='none' says that this is intended)",
        SandboxIsolationWarning,
        stacklevel=_frames_of_this_package() + 1,
    )


def _frames_of_this_package() -> int:
    """How many frames, from the caller up, lie between it and the program that uses this package."""
    frame = sys._getframe(1)
    count = 0
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("code_sandboxes."):
        count, frame = count + 1, frame.f_back
    return count
