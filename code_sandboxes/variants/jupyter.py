"""local-jupyter: kernels on this machine, each a process of its own, spoken to over ``ipc://``.

Everything a sandbox has on this machine is one folder that only this user can enter, below
``$CODE_SANDBOXES_RUNTIME_DIR`` or the system's folder for temporary files: the home of the code, and for
each kernel its connection file and sockets. The processes are started by jupyter_client's provisioners
from any installed kernelspec.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, cast

from code_sandboxes.checks import check_str
from code_sandboxes.errors import SandboxConfigurationError, SandboxConnectionError, SandboxIsolationWarning
from code_sandboxes.forks import in_forked_child
from code_sandboxes.guest import journal
from code_sandboxes.info import Capabilities, Capability, SandboxVariant
from code_sandboxes.protocol.events import Streamed
from code_sandboxes.protocol.messages import Message
from code_sandboxes.reaper import Reaper
from code_sandboxes.transports.loop import Loop
from code_sandboxes.transports.zmq import ConnectionInfo, ZmqTransport
from code_sandboxes.variants.base import Variant

if TYPE_CHECKING:
    from jupyter_client.kernelspec import KernelSpec

    from code_sandboxes.config import SandboxConfig

__all__ = ["LocalJupyter"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

# sun_path of unix(7) holds 107 bytes and a zero; macOS has 103.
_LONGEST_SOCKET_PATH = 103

_CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
_LAUNCH = str(Path(__file__).parent.parent / "guest" / "launch.py")
_IPYKERNEL_ARGUMENTS = ("--HistoryManager.enabled=False", "--IPythonKernel._execute_sleep=0")
_KEPT_STDERR = 16 * 1024
_PERSISTENCE = 3.0
_ADVICE = "set CODE_SANDBOXES_RUNTIME_DIR to a folder of yours"

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
        self._kernel_name = _checked_kernel_name(options.get("kernel_name"))
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
            languages=tuple(sorted({*_kernelspecs(), *(spec.language for spec in _kernelspecs().values())})),
            contexts=yes,
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
        specs = _kernelspecs()
        if language is None:
            return self._kernel_name
        if language not in specs and not _speaking(language, specs):
            specs = _kernelspecs(refresh=True)
        if language in specs:
            return language
        speaking = _speaking(language, specs)
        if not speaking:
            known = sorted({*specs, *(spec.language for spec in specs.values())})
            raise ValueError(f"no kernel for the language {language!r} (installed: {', '.join(known)})")
        return speaking[0]

    def language_of(self, kernel_name: str) -> str:
        return _kernelspecs()[kernel_name].language

    def prepare(self) -> None:
        _kernelspecs()  # here, where it holds up nobody's event loop
        folder = _runtime_root() / secrets.token_hex(4)
        _check_length(folder)
        _reaper().guard_folder(str(folder))
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            _reaper().release_folder(str(folder))
            raise _unusable(folder, error) from error
        self._folder = folder

    def launcher(
        self, kernel_name: str, cwd: str | None, env: Mapping[str, str]
    ) -> Callable[[], LocalProcess]:
        spec, sandbox_folder = _kernelspecs()[kernel_name], self._folder
        return lambda: self._launch(spec, sandbox_folder, cwd, env)

    def _launch(
        self, spec: _Spec, sandbox_folder: Path, cwd: str | None, env: Mapping[str, str]
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
            command = _command(spec, folder / "connection.json")
            environment = {**_environment(home, command[0]), **self.config.env_vars, **env}
            cwd = cwd or self.config.working_dir or str(home)
            _check_startable(spec, command[0], environment["PATH"], cwd)
            process, stderr = _start(spec, command, environment, cwd)
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
            _remove_tree(folder)
            _reaper().release_folder(str(folder))

    @classmethod
    def leave(cls) -> None:
        if _the_reaper is not None:
            _the_reaper.close()


class LocalProcess:
    """A kernel process that this program started, and its process group."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        connection: ConnectionInfo,
        interrupt_mode: Literal["signal", "message"],
        stderr: int,
        folder: Path,
        journal_identity: tuple[int, int],
    ) -> None:
        self._process = process
        self._connection = connection
        self._interrupt_mode = interrupt_mode
        self._stderr = stderr
        self._folder = folder
        self._journal = str(folder / "journal"), journal_identity
        self._said: deque[bytes] = deque()
        self._said_size = 0
        self._has_ended = False

    def transport(
        self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
    ) -> ZmqTransport:
        return ZmqTransport(loop, self._connection, identity, receive, max_message)

    @property
    def interrupt_mode(self) -> Literal["signal", "message"]:
        return self._interrupt_mode

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        os.set_blocking(self._stderr, False)
        loop.add_reader(self._stderr, lambda: self._hear(loop))
        try:
            pidfd = os.pidfd_open(self._process.pid)
        except (AttributeError, OSError):  # macOS, or a kernel before Linux 5.3
            self._look(loop, ended)
            return
        loop.add_reader(pidfd, lambda: self._exited(loop, pidfd, ended))

    def _exited(self, loop: Loop, pidfd: int, ended: Callable[[], None]) -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        self._ended(loop, ended)

    def _look(self, loop: Loop, ended: Callable[[], None]) -> None:
        if self._process.poll() is None:
            loop.call_later(0.05, lambda: self._look(loop, ended))
        else:
            self._ended(loop, ended)

    def _ended(self, loop: Loop, ended: Callable[[], None]) -> None:
        # Children it left go now, while the dead leader still keeps the group's number from being used again.
        self._signal_group(signal.SIGKILL)
        self._has_ended = True
        self._process.wait()
        if self._stderr >= 0:
            self._hear(loop)  # a pipe holds 64 KiB: that is all there can be
        if self._stderr >= 0:
            self._close_stderr(loop)
        ended()

    def _hear(self, loop: Loop) -> None:
        # Once a turn: whoever floods it must not keep the others waiting.
        try:
            said = os.read(self._stderr, 65536)
        except BlockingIOError:
            return
        if not said:
            self._close_stderr(loop)
            return
        self._said.append(said)
        self._said_size += len(said)
        while self._said_size - len(self._said[0]) > _KEPT_STDERR:
            self._said_size -= len(self._said.popleft())

    def _close_stderr(self, loop: Loop) -> None:
        loop.remove_reader(self._stderr)
        os.close(self._stderr)
        self._stderr = -1

    def exit_code(self) -> int | None:
        return self._process.returncode

    def output(self) -> str:
        return b"".join(self._said)[-_KEPT_STDERR:].decode("utf-8", "replace")

    def written(self) -> list[int]:
        return journal.read_totals(*self._journal) or [0, 0]

    def unpublished(self, published: Sequence[int]) -> list[Streamed]:
        left = []
        for stream, (total, latest) in enumerate(journal.read(*self._journal)):
            missing = min(len(latest), total - published[stream])
            if missing > 0:
                left.append(Streamed(latest[-missing:].decode("utf-8", "replace"), error=stream == 1))
        return left

    def interrupt(self) -> None:
        self._signal_group(signal.SIGINT)

    def terminate(self) -> None:
        self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        self._signal_group(signal.SIGKILL)

    def release(self) -> None:
        _reaper().release_group(self._process.pid)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal_group(self, number: signal.Signals) -> None:
        # The kernel leads its group. Until it is reaped its number cannot be another's.
        if not self._has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


@dataclass(frozen=True, slots=True)
class _Spec:
    name: str
    language: str
    kernel_spec: KernelSpec


_specs: dict[str, _Spec] = {}


def _kernelspecs(*, refresh: bool = False) -> Mapping[str, _Spec]:
    """The kernels that are installed, by name; looked up once, and again when one is not found."""
    global _specs
    if refresh or not _specs:
        _specs = {spec.name: spec for spec in _installed_kernelspecs()}
    return _specs


def _installed_kernelspecs() -> Iterator[_Spec]:
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
            yield _Spec(name, spec.language.lower(), spec)


def _checked_kernel_name(name: object) -> str:
    if name is None:
        return "python3"
    if name not in _kernelspecs() and name not in _kernelspecs(refresh=True):
        raise SandboxConfigurationError(
            f"no kernelspec {name!r} on this machine (installed: {', '.join(_kernelspecs())})"
        )
    return str(name)


def _speaking(language: str, specs: Mapping[str, _Spec]) -> list[str]:
    names = [name for name, spec in specs.items() if spec.language == language.lower()]
    return sorted(names, key=lambda name: (name != "python3", name))


def _command(spec: _Spec, connection_file: Path) -> list[str]:
    """The kernelspec's command line (jupyter_client, "Kernel specs"), tuned where it starts ipykernel."""
    values = {
        "connection_file": str(connection_file),
        "resource_dir": spec.kernel_spec.resource_dir,
        "prefix": sys.prefix,
    }
    command = [_filled_in(argument, values) for argument in spec.kernel_spec.argv]
    if command[0] in ("python", f"python{sys.version_info[0]}"):
        command[0] = sys.executable
    for i, module in enumerate(command[:-1]):
        if module == "-m" and command[i + 1] in ("ipykernel_launcher", "ipykernel"):
            return [command[0], _LAUNCH, *command[i + 2 :], *_IPYKERNEL_ARGUMENTS]
    return command


def _check_startable(spec: _Spec, program: str, path: str, cwd: str) -> None:
    """Say it better than the system would."""
    if shutil.which(program, path=path) is None:
        raise SandboxConnectionError(
            f"the kernel {spec.name!r} could not be started: its kernelspec in"
            f" {spec.kernel_spec.resource_dir} names the program {program!r}, which is not there"
        )
    if not os.path.isdir(cwd):
        raise SandboxConnectionError(
            f"the kernel {spec.name!r} could not be started: there is no directory {cwd!r}"
        )


def _filled_in(argument: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        argument = argument.replace("{" + name + "}", value)
    return argument


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


def _start(
    spec: _Spec, command: list[str], environment: dict[str, str], cwd: str
) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and where its standard error can be read."""
    read, write = os.pipe()
    try:
        process = _run_to_end(_provision(spec, command, environment, cwd, write))
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    _reaper().guard_group(process.pid)
    return process, read


def _run_to_end(coroutine: Coroutine[object, None, T]) -> T:
    """Run a coroutine that never waits, as those of the local provisioner; no event loop is needed for it."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    coroutine.close()
    raise RuntimeError("jupyter_client's local provisioner waited for something")


async def _provision(
    spec: _Spec, command: list[str], environment: dict[str, str], cwd: str, stderr: int
) -> subprocess.Popen[bytes]:
    from jupyter_client.provisioning.factory import KernelProvisionerFactory
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    provisioner = KernelProvisionerFactory.instance().create_provisioner_instance(
        secrets.token_hex(8), spec.kernel_spec, parent=None
    )
    if not isinstance(provisioner, LocalProvisioner):
        raise SandboxConfigurationError(
            f"local-jupyter cannot run the kernelspec {spec.name!r}:"
            f" its provisioner {type(provisioner).__name__} does not start a process of this machine"
        )
    arguments = await provisioner.pre_launch(env=environment, cwd=cwd)
    await provisioner.launch_kernel(
        command,
        env=arguments["env"],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )
    return cast("subprocess.Popen[bytes]", provisioner.process)


def _runtime_root() -> Path:
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
        raise _unusable(root, error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SandboxConfigurationError(
            f"the runtime folder {root} is not a folder that only this user can enter; {_ADVICE}"
        )
    return root


def _unusable(folder: Path, error: OSError) -> SandboxConfigurationError:
    return SandboxConfigurationError(f"cannot make the runtime folder {folder}: {error.strerror}; {_ADVICE}")


def _remove_tree(folder: Path) -> None:
    """Remove *folder*, also while something still writes in it, for a while.

    Raises:
        OSError: that did not help.
    """
    give_up = time.monotonic() + _PERSISTENCE
    while folder.exists():
        if sys.version_info >= (3, 12):
            shutil.rmtree(folder, onexc=_make_removable)
        else:
            shutil.rmtree(folder, onerror=_make_removable)
        if folder.exists() and time.monotonic() > give_up:
            raise OSError(f"something still writes in {folder}")


def _check_length(folder: Path) -> None:
    longest = len(os.fsencode(folder / "0000" / "s-5"))
    if longest > _LONGEST_SOCKET_PATH:
        raise SandboxConfigurationError(
            f"the path of the runtime folder {folder.parent} is {longest - _LONGEST_SOCKET_PATH} bytes too"
            " long for sockets; set CODE_SANDBOXES_RUNTIME_DIR to a shorter one"
        )


def _make_removable(function: object, path: str, error: object) -> None:
    """Code may have closed a folder of its own; whose folder it is may open it, for the next try."""
    for folder in (os.path.dirname(path), path):
        if os.path.isdir(folder) and not os.path.islink(folder):
            with contextlib.suppress(OSError):
                os.chmod(folder, 0o700)


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


_the_reaper: Reaper | None = None


def _reaper() -> Reaper:
    global _the_reaper
    if _the_reaper is None:
        _the_reaper = Reaper()
    return _the_reaper


def _let_go() -> object:
    global _the_reaper
    kept, _the_reaper = _the_reaper, None
    return kept


in_forked_child(_let_go)
