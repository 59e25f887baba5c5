"""The kernel provisioner of jupyter_client whose kernels each run in a sandbox of their own.

Whatever starts kernels through jupyter_client (Jupyter Server, nbclient, a console) uses it for kernelspecs
whose metadata name it; ``python -m code_sandboxes kernelspec install`` writes one. What is enforced, and how,
is decided by local-jupyter; here is only what jupyter_client wants to have said in its own way.

Source: the jupyter_client documentation, section "Kernel Provisioning".
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, cast

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Bool, Dict, Float, Integer, List, TraitError, Unicode

from code_sandboxes.awaiting import drive
from code_sandboxes.checks import check_environment
from code_sandboxes.config import SandboxConfig
from code_sandboxes.errors import (
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxNotFoundError,
    SandboxNotStartedError,
)
from code_sandboxes.operations import DEFAULT
from code_sandboxes.steps import in_worker
from code_sandboxes.transports.loop import the_loop
from code_sandboxes.variants.base import ContextSpec, Record
from code_sandboxes.variants.jupyter import LocalJupyter
from code_sandboxes.variants.kept_kernel import KeptKernel
from code_sandboxes.variants.kernelspecs import InstalledKernel, installed_kernels
from code_sandboxes.variants.plans import seen_as, strongest, why_not

if TYPE_CHECKING:
    from jupyter_client.connect import KernelConnectionInfo

__all__ = ["SandboxProvisioner"]

T = TypeVar("T")

_MIB = 1024**2

# What jupyter_client and its callers pass on to whoever starts a process, and what is the keeper's here.
_TAKEN_CARE_OF = {"cwd", "env", "independent", "kernel_id", "stderr", "stdin", "stdout"}

# Of all that is given as environment, what Jupyter adds for itself: nobody misses it in a sandbox.
_OF_JUPYTER = "JPY_"

_SIGNALS: Mapping[int, Callable[[KeptKernel], None]] = {
    signal.SIGINT: KeptKernel.interrupt,
    signal.SIGTERM: KeptKernel.terminate,
    **({signal.SIGKILL: KeptKernel.kill} if hasattr(signal, "SIGKILL") else {}),
}

# As in subprocess; of a kernel that nobody knows more of than that it is gone, it was killed.
_KILLED = -9

# Characters of what a kernel wrote before it died that are worth a place in the server's log.
_LATEST = 2000

# The name in a sandbox's folder that stands for the folder of the kernel that runs now.
_NOW = "kernel"


class SandboxProvisioner(KernelProvisionerBase):
    """Starts, signals and ends one kernel, in a sandbox of its own.

    The traits are settings of the sandbox, under the names and with the units of ``Sandbox.create()`` and
    ``SandboxConfig``. What this machine cannot enforce makes the start of the kernel fail, with a sentence
    that says why; a name that is not among them does so, too.

    * A restart gives a new kernel in the same sandbox: its files stay, and clients stay connected. A
      sandbox that has ended itself (``max_lifetime``, ``idle_timeout``) is not made again.
    * The sandbox ends with the process that runs this, ``kill -9`` included, or when jupyter_client has shut
      the kernel down. With ``detached`` only the latter, or one of those limits; whoever takes it over by
      :meth:`load_provisioner_info` need not be there before.
    * Code starts in ``working_dir``. Without one, it starts where the folder that jupyter_client asks for
      (mostly the notebook's) is in the sandbox, if some mount shows it, else in ``/workspace``.
    * Of the environment that it is given, and of that of this process, the sandbox gets nothing: it has what
      the kernelspec's own ``env`` and ``env_vars`` say (``${NAME}`` in the former means the sandbox's).
    """

    isolation = Unicode(
        "auto", help="'bubblewrap', 'landlock', 'none', or the strongest that works: 'auto', but never none."
    ).tag(config=True)
    network_policy = Unicode("inherit", help="'inherit', 'all', 'none' or 'allowlist'.").tag(config=True)
    allowed_hosts = List(Unicode(), help="What may be reached under the policy 'allowlist'.").tag(config=True)
    memory = Float(None, allow_none=True, help="MiB of memory.").tag(config=True)
    cpu = Float(None, allow_none=True, help="Number of CPUs.").tag(config=True)
    pids = Integer(None, allow_none=True, help="Number of processes and threads.").tag(config=True)
    disk = Integer(None, allow_none=True, help="Bytes of everything that can be written.").tag(config=True)
    mounts = Dict(help='{path on this machine: [path in the sandbox, "ro" or "rw"]}.').tag(config=True)
    working_dir = Unicode(None, allow_none=True, help="Where code starts.").tag(config=True)
    env_vars = Dict(help="Environment variables.").tag(config=True)
    max_lifetime = Float(0.0, help="Seconds after which the sandbox ends; 0 for no limit.").tag(config=True)
    idle_timeout = Float(
        None, allow_none=True, help="Seconds without a run after which the sandbox ends."
    ).tag(config=True)
    detached = Bool(False, help="Go on when the process that started it ends.").tag(config=True)

    def __init__(self, **settings: Any) -> None:
        known = self.class_trait_names(config=True)
        unknown = sorted(set(settings) - {*known, "config", "kernel_id", "kernel_spec", "log", "parent"})
        if unknown:
            raise SandboxConfigurationError(
                f"the kernelspec has a setting {unknown[0]!r}, which no sandbox has"
                f" (known: {', '.join(sorted(known))})"
            )
        try:
            super().__init__(**settings)
        except TraitError as error:
            raise SandboxConfigurationError(str(error)) from None
        self._changing = threading.Lock()  # held by one thread that makes or removes
        self._sandbox: _Sandbox | None = None
        self._running: _Running | None = None
        self._key = secrets.token_hex(32)  # for all its kernels: clients are to stay connected

    @property
    def sandbox_id(self) -> str | None:
        """Of the sandbox as ``Sandbox.list()`` shows it; None before the start and after the end."""
        return None if self._sandbox is None else self._sandbox.id

    @property
    def sandbox_isolation(self) -> str:
        """What separates the sandbox from this machine, and what does not; empty where there is none."""
        return "" if self._sandbox is None else self._sandbox.variant.isolation

    @property
    def has_process(self) -> bool:
        return self._running is not None

    # Start.

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """The command line, not filled in: what is in the place of ``{connection_file}`` the keeper decides.

        Raises:
            SandboxConfigurationError: something is asked for that a sandboxed kernel cannot have.
        """
        extra = kwargs.pop("extra_arguments", [])
        encryption = kwargs.pop("transport_encryption", None)
        encryption = encryption or getattr(self.parent, "transport_encryption", "disabled")
        if encryption == "required":
            raise SandboxConfigurationError(
                "a sandboxed kernel cannot have transport_encryption='required': its messages do not leave"
                " this machine, and only this user can open its sockets; set it to 'auto'"
            )
        unknown = sorted(set(kwargs) - _TAKEN_CARE_OF)
        if unknown:
            raise SandboxConfigurationError(f"a sandboxed kernel cannot be started with {unknown[0]}=")
        self._tell_of_environment(kwargs.get("env"))
        return {**kwargs, "cmd": [*self.kernel_spec.argv, *extra]}

    def _tell_of_environment(self, given: Mapping[str, str] | None) -> None:
        """Servers pass their own environment on; who means more than that should know that it is not done."""
        meant = [
            name
            for name, value in (given or {}).items()
            if os.environ.get(name) != value and not name.startswith(_OF_JUPYTER)
        ]
        if meant:
            self.log.warning(
                "the sandbox of kernel %s does not get the variables that its start was given (%s):"
                " set them as env_vars",
                self.kernel_id,
                ", ".join(sorted(meant)),
            )

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start a kernel, in a new sandbox if it is the first.

        Args:
            cmd: as :meth:`pre_launch` returned it.

        Raises:
            SandboxConfigurationError: a setting makes no sense, or cannot be enforced here.
            SandboxConnectionError: the kernel could not be started.
            SandboxNotStartedError: its sandbox has ended; the message says why.
        """
        kernel, cwd = self._kernel(cmd), kwargs.get("cwd")
        is_first = self._sandbox is None
        try:
            await _in_thread(lambda: self._launch(kernel, cwd))
        except BaseException:  # a cancellation, too: should the launch go on, this waits for it
            if is_first:
                the_loop().run_blocking(self._remove, self._removed, apart=True)
            raise
        return self.connection_info

    def _kernel(self, command: Sequence[str]) -> InstalledKernel:
        """The one that jupyter_client has found, by its own configuration, with this command line."""
        spec: KernelSpec = self.kernel_spec
        name = getattr(self.parent, "kernel_name", "") or os.path.basename(spec.resource_dir) or "python3"
        started = KernelSpec(
            argv=list(command),
            name=name,
            env=spec.env,
            resource_dir=spec.resource_dir,
            display_name=spec.display_name,
            language=spec.language,
            interrupt_mode=spec.interrupt_mode,
        )
        return InstalledKernel(name, spec.language.lower(), started)

    def _launch(self, kernel: InstalledKernel, cwd: str | None) -> None:
        with self._changing:
            if self._sandbox is None:
                self._sandbox = _Sandbox(*self._settings(), kernel)
                self._sandbox.begin(self.kernel_id, detached=self.detached)
            self._sandbox.check_not_over()
            variant = self._sandbox.variant
            variant.only = kernel
            where = None if cwd is None or self.working_dir else seen_as(os.fspath(cwd), variant.plan)
            kept = variant.launcher(
                ContextSpec(DEFAULT, DEFAULT, kernel.language, kernel.name, where, {}, self._key)
            )()
            if not kept.is_fresh:
                raise SandboxConnectionError("the kernel that is to be started again has not ended yet")
            self._use(kept)

    def _settings(self) -> tuple[SandboxConfig, dict[str, object]]:
        if self.isolation == "auto" and strongest() == "none":
            raise SandboxConfigurationError(
                f"a kernel cannot be sandboxed on this machine: {why_not('bubblewrap')}"
                " (isolation='none' says that a process of its own is enough)"
            )
        if self.detached and not (self.max_lifetime or self.idle_timeout):
            raise SandboxConfigurationError(
                "a detached kernel needs max_lifetime or idle_timeout: nothing else might ever end it"
            )
        config = SandboxConfig(
            network_policy=self.network_policy,
            allowed_hosts=self.allowed_hosts,
            memory_limit=None if self.memory is None else round(self.memory * _MIB),
            cpu_limit=self.cpu,
            working_dir=self.working_dir,
            env_vars=check_environment("env_vars", self.env_vars),
            max_lifetime=self.max_lifetime,
            idle_timeout=self.idle_timeout,
        )
        names = ("isolation", "pids", "disk", "mounts")
        return config, {name: getattr(self, name) for name in names}

    def _use(self, kept: KeptKernel) -> None:
        self.connection_info = _connection_info(kept)
        self._running = _Running(kept, self.log)

    # While it runs.

    async def poll(self) -> int | None:
        """Its exit status, as in :mod:`subprocess`; None while it runs."""
        if self._running is None:
            return 0
        return self._running.exit_status.result() if self._running.exit_status.done() else None

    async def wait(self) -> int | None:
        """Its exit status, when it has ended."""
        running = self._running
        if running is None:
            return 0
        # Not by the event loop's own means: who gives up waiting may close it before the kernel ends.
        status = await _in_thread(running.exit_status.result)
        if self._running is running:
            self._running = None
        return status

    async def send_signal(self, signum: int) -> None:
        """
        Raises:
            ValueError: it is none of those that interrupt or end a kernel.
        """
        if self._running is None or signum == 0:
            return
        if signum not in _SIGNALS:
            raise ValueError(
                f"a sandboxed kernel cannot be sent the signal {signum}: it takes SIGINT, SIGTERM and SIGKILL"
            )
        self._running.is_to_end = self._running.is_to_end or signum != signal.SIGINT
        _SIGNALS[signum](self._running.kernel)

    async def kill(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:
        await self.send_signal(signal.SIGTERM)

    async def shutdown_requested(self, restart: bool = False) -> None:
        if self._running is not None:
            self._running.is_to_end = True

    # The end.

    async def cleanup(self, restart: bool = False) -> None:
        """Remove the sandbox, and everything in it; not before a restart."""
        if not restart:
            await _in_thread(self._remove)

    def _remove(self) -> None:
        with self._changing:
            sandbox, self._sandbox, self._running = self._sandbox, None, None
            if sandbox is not None:
                sandbox.variant.remove()

    def _removed(self, _: None, error: Exception | None) -> None:
        if error is not None:
            self.log.error("could not remove the sandbox of kernel %s: %s", self.kernel_id, error)

    # Another process takes over.

    async def get_provisioner_info(self) -> dict[str, Any]:
        """As the superclass; ``sandbox_id`` is what :meth:`load_provisioner_info` finds it by."""
        return {**await super().get_provisioner_info(), "sandbox_id": self.sandbox_id}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Take over a kernel that another process, or this one in an earlier life, has started.

        Raises:
            SandboxNotFoundError: it, or its sandbox, has ended.
        """
        await super().load_provisioner_info(provisioner_info)
        await _in_thread(lambda: self._attach(provisioner_info["sandbox_id"]))

    def _attach(self, sandbox_id: str) -> None:
        with self._changing:
            sandbox, context = _Sandbox.found(sandbox_id)
            kept = sandbox.variant.launcher(context)()
            if kept.is_fresh:
                kept.kill()
                sandbox.variant.detach(keep=False)
                raise SandboxNotFoundError(f"the kernel of {sandbox_id} has ended")
            assert context.key is not None
            self._sandbox, self._key = sandbox, context.key
            self._use(kept)


class _OneKernel(LocalJupyter):
    """The variant, with the kernel that jupyter_client has found instead of those that are installed here."""

    only: InstalledKernel | None = None

    def __init__(
        self, config: SandboxConfig, options: Mapping[str, object], only: InstalledKernel | None = None
    ) -> None:
        self.only = only
        super().__init__(config, options)
        if only is not None:
            self._kernel_name = only.name

    def _startable(self) -> Mapping[str, InstalledKernel]:
        return installed_kernels() if self.only is None else {self.only.name: self.only}


class _Sandbox:
    """The sandbox of one kernel; a :class:`code_sandboxes.variants.base.Audience`."""

    def __init__(self, config: SandboxConfig, options: Mapping[str, object], kernel: InstalledKernel) -> None:
        self.variant = _OneKernel(config, options, kernel)
        self.id = f"{self.variant.name}:{secrets.token_hex(8)}"
        self._why_over = ""

    def begin(self, name: str, *, detached: bool) -> None:
        config = self.variant.config
        record = Record(
            id=self.id,
            name=name,
            tags={},
            settings=config.settings(),
            created_at=time.time(),
            time_left=config.max_lifetime or None,
            isolation=self.variant.isolation,
        )
        self.variant.prepare(record, self)
        if detached:
            only = self.variant.only
            self.variant.detach(keep=True)
            self._join(self.id)
            self.variant.only = only

    @classmethod
    def found(cls, sandbox_id: str) -> tuple[_Sandbox, ContextSpec]:
        """One that is there already, and the context of its kernel.

        Raises:
            SandboxNotFoundError: it has ended.
        """
        sandbox = object.__new__(cls)
        sandbox.id, sandbox._why_over = sandbox_id, ""
        record = sandbox._join(sandbox_id)
        for context in record.contexts:
            if context.id == DEFAULT and context.key is not None:
                return sandbox, context
        sandbox.variant.detach(keep=False)
        raise SandboxNotFoundError(f"{sandbox_id} is no sandbox of a Jupyter kernel")

    def _join(self, sandbox_id: str) -> Record:
        variant, record = _OneKernel.attach(sandbox_id, {})
        self.variant = cast("_OneKernel", variant)
        self.variant.listen(self)
        return record

    def check_not_over(self) -> None:
        if self._why_over:
            raise SandboxNotStartedError(
                f"the sandbox of this kernel has ended: {self._why_over}; start another kernel"
            )

    def over(self, why: str) -> None:
        self._why_over = why

    # What other programs do to it makes no difference here.

    def tagged(self, tags: Mapping[str, str]) -> None:
        return

    def rescheduled(self, time_left: float) -> None:
        return

    def paused(self, *, on: bool) -> None:
        return

    def context_added(self, spec: ContextSpec) -> None:
        return

    def context_deleted(self, context_id: str) -> None:
        return


class _Running:
    """A kernel, and the exit status that it will have.

    Attributes:
        is_to_end: somebody wants it to.
    """

    def __init__(self, kernel: KeptKernel, log: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self.kernel = kernel
        self.exit_status: Future[int] = Future()
        self.is_to_end = False
        self._log = log
        loop = the_loop()
        loop.call_soon(lambda: kernel.watch(loop, self._ended))

    def _ended(self) -> None:
        kernel = self.kernel
        code = kernel.exit_code()
        status = _KILLED if code is None else code
        if not self.is_to_end:
            why = f": {kernel.why_lost or kernel.why_ended}" if kernel.why_lost or kernel.why_ended else ""
            said = kernel.output()[-_LATEST:]
            wrote = f"; the latest of what it wrote: {said!r}" if said else ""  # escaped: it is not trusted
            self._log.error("a sandboxed kernel ended with status %d%s%s", status, why, wrote)
        kernel.release()
        self.exit_status.set_result(status)


def _connection_info(kernel: KeptKernel) -> KernelConnectionInfo:
    """As jupyter_client wants it, and the same for each kernel of a sandbox: clients find the next there."""
    connection = kernel.connection
    folder, name = os.path.split(connection.ip)
    sandbox = os.path.dirname(folder)
    link = os.path.join(sandbox, _NOW)
    os.symlink(os.path.basename(folder), f"{link}~")
    os.replace(f"{link}~", link)
    ports = {f"{channel}_port": port for channel, port in connection.ports.items()}
    info = {"transport": connection.transport, "ip": os.path.join(link, name), **ports}
    signed = {"key": connection.key.encode(), "signature_scheme": "hmac-sha256"}
    return cast("KernelConnectionInfo", {**info, **signed})


async def _in_thread(function: Callable[[], T]) -> T:
    return await drive(in_worker(function, apart=True))
