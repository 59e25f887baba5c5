"""jupyter-gateway: the kernels of any Jupyter server, near or far, over its REST interface and websockets.

What keeps code in them from doing harm is the server's business: this variant refuses every policy and limit
that it could only hope for. A kernel that it has started is deleted at the end; one that it was given is not.

When the connection to a kernel is cut, or has been silent for half a minute, calls of files and commands fail
at once. A run waits: the server keeps what the kernel says for whoever comes back within half a minute; one
last try may take 20 s more. After that the run is ``connection_lost``, and the next one looks for the kernel
again. A server that does not answer a question is waited for a minute, at the end of a sandbox as well.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from code_sandboxes.checks import check_str
from code_sandboxes.errors import (
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxNotFoundError,
)
from code_sandboxes.guest_boot import prologue
from code_sandboxes.info import Capabilities, Capability, SandboxVariant
from code_sandboxes.reaper import Guard
from code_sandboxes.remote.hub import Hub, hub_of
from code_sandboxes.remote.kernels import RemoteContext, RemoteKernel
from code_sandboxes.remote.rest import Place
from code_sandboxes.remote.server import (
    JupyterServer,
    KernelModel,
    KernelSpec,
    is_kernel_id,
    is_unanswered,
)
from code_sandboxes.variants.base import Audience, ContextSpec, Record, Variant, max_output_of
from code_sandboxes.variants.lifetimes import Lifetime
from code_sandboxes.variants.remote_guards import guards

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["JupyterGateway", "limits_of"]

_SERVERS = "that is the server's business; local-docker and local-jupyter can do it on this machine"
_MAYBE = (
    "only an Enterprise Gateway whose kernels are containers of Kubernetes does it, which is asked at the"
    " start; local-docker can do it on this machine"
)

# What the guard of a server that a Hub has started is known by; a kernel has no such id.
_OF_THE_HUB = "the server"

# Whoever asks with a shorter patience than the server's own may leave a kernel that nobody knows of.
_LEAST_TO_START = 40.0


class JupyterGateway(Variant):
    """Kernels of a Jupyter Server, a Kernel Gateway, an Enterprise Gateway or a JupyterHub."""

    name = SandboxVariant.JUPYTER_GATEWAY
    options: ClassVar[frozenset[str]] = frozenset(
        {"hub_url", "kernel_id", "kernel_name", "max_output", "path", "server_url", "token"}
    )
    is_reached_by_id = True
    is_elsewhere = True

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        super().__init__(config, options)
        self._max_output = max_output_of(options)
        for name in self.options - {"max_output"}:
            check_str(name, options.get(name))
        self._refuse_what_cannot_be(config)
        self._wanted_kernel, self._wanted_id = _given(options, "kernel_name"), _given(options, "kernel_id")
        self._path = _given(options, "path")
        if self._wanted_id is not None and (self._wanted_kernel is not None or self._path is not None):
            raise self.refuse(
                "take kernel_id= together with kernel_name= or path=", "the kernel is there already"
            )
        if self._wanted_id is not None and not is_kernel_id(self._wanted_id):
            raise SandboxConfigurationError(f"kernel_id must be the id of a kernel, not {self._wanted_id!r}")
        self._hub: Hub | None = None
        self._place, self._token = self._place_of(options)
        self._known_server: JupyterServer | None = None
        self._specs: Mapping[str, KernelSpec] = {}
        self._default = ""
        self._contexts: dict[str, RemoteContext] = {}
        self._lifetime: Lifetime | None = None
        self._started: dict[str, str] = {}  # the kernels' ids there, by context
        self._guards: dict[str, Guard] = {}  # by these, and by _OF_THE_HUB
        self._unanswered: set[str] = set()  # kernels that may be there
        self._was_attached = self._was_detached = self._is_over = self._limits = False

    def _place_of(self, options: Mapping[str, object]) -> tuple[Place, str | None]:
        token = _given(options, "token") or os.environ.get("JUPYTER_TOKEN")
        url, hub_url = _given(options, "server_url"), _given(options, "hub_url")
        if hub_url is not None:
            if url is not None or self._wanted_id is not None:
                raise self.refuse(
                    "take hub_url= together with server_url= or kernel_id=", "it starts a server"
                )
            place = Place(hub_url, "hub_url")
            self._hub = Hub(place, token)
            return place, token
        url = url or os.environ.get("JUPYTER_GATEWAY_URL")
        if not url:
            raise self.refuse("begin", "it needs server_url=, or JUPYTER_GATEWAY_URL in the environment")
        return Place(url, "server_url"), token

    @property
    def _url(self) -> str:
        return self._place.url if self._known_server is None else self._known_server.place.url

    @property
    def _server(self) -> JupyterServer:
        """The server; one of a Hub is there after :meth:`prepare`."""
        if self._known_server is None:
            self._known_server = JupyterServer(self._place, self._token)
        return self._known_server

    def _refuse_what_cannot_be(self, config: SandboxConfig) -> None:
        for trait, what in (("gpu", "choose a GPU"), ("idle_timeout", "enforce idle_timeout")):
            if getattr(config, trait) is not None:
                raise self.refuse(f"{what} ({trait}={getattr(config, trait)!r})", _SERVERS)
        if config.environment is not None:
            raise self.refuse(
                f"provide the environment {config.environment!r}",
                "a server's kernels are chosen with kernel_name=",
            )
        if config.network_policy in ("none", "allowlist"):
            raise self.refuse(f"enforce network_policy={config.network_policy!r}", _SERVERS)

    @classmethod
    def capabilities(cls) -> Capabilities:
        yes, no = Capability(True), Capability(False, _SERVERS)
        return Capabilities(
            languages=("python",),
            contexts=yes,
            own_process=yes,
            last_words=Capability(False, "no server tells how a kernel has died, or what it printed last"),
            own_home=Capability(False, "its kernels have the home of the server, and share it"),
            environment=yes,
            magics=yes,
            interrupt_blocked=yes,
            subshells=yes,
            system_packages=Capability(False, "they would be installed on the server; use local-docker"),
            network_none=no,
            network_allowlist=no,
            memory_limit=Capability(False, _MAYBE),
            cpu_limit=Capability(False, _MAYBE),
            pids_limit=no,
            disk_limit=no,
            gpu=no,
            mounts=no,
            idle_timeout=Capability(
                False, "nobody watches the server when this program is gone; let it cull idle kernels"
            ),
            pause=no,
            snapshots=Capability(False, "it cannot do that yet"),
            fork=no,
        )

    @property
    def own_capabilities(self) -> Capabilities:
        told = self.capabilities()
        return replace(
            told,
            languages=tuple(self._languages()) or told.languages,
            memory_limit=Capability(True) if self._limits else told.memory_limit,
            cpu_limit=Capability(True) if self._limits else told.cpu_limit,
        )

    @property
    def isolation(self) -> str:
        return f"whatever the server at {self._url} provides; nothing of this machine is in reach"

    @property
    def max_output(self) -> int:
        return self._max_output

    @property
    def metadata(self) -> Mapping[str, object]:
        kernels = (context.kernel_id for context in list(self._contexts.values()))
        return {
            "server_url": self._url,
            "kernel_ids": [kernel_id for kernel_id in kernels if kernel_id is not None],
        }

    @property
    def sandbox_id(self) -> str | None:
        context = self._contexts.get("default")
        if context is None or context.kernel_id is None:
            return None
        return f"{self.name}:{self._url}#{context.kernel_id}"

    @property
    def was_made_elsewhere(self) -> bool:
        return self._was_attached

    # Kernels by their languages.

    def kernel_name(self, language: str | None) -> str:
        if language is None:
            return self._default
        if language in self._specs:
            return language
        speaking = sorted(name for name, spec in self._specs.items() if spec.language == language.lower())
        if not speaking:
            known = ", ".join(self._languages())
            raise ValueError(f"no kernel for the language {language!r} (installed: {known})")
        return self._default if self._default in speaking else speaking[0]

    def _languages(self) -> list[str]:
        return sorted({*self._specs, *(spec.language for spec in self._specs.values())})

    def language_of(self, kernel_name: str) -> str:
        return self._specs[kernel_name].language

    # Start and end.

    def prepare(self, record: Record, audience: Audience) -> None:
        self._lifetime = Lifetime(audience)
        if record.time_left is not None:
            self.expire_in(record.time_left, f"it reached its max_lifetime of {record.time_left:g} s")
        if self._hub is not None:
            self._guard(_OF_THE_HUB, self._hub.guard())
            self._known_server = self._hub.start(self.config.start_timeout)
        self._find_out()

    def _find_out(self) -> None:
        """What the server has; blocks.

        Raises:
            SandboxError: it does not answer, or has not what was asked for.
        """
        self._specs, self._default = self._server.kernelspecs()
        if self._wanted_id is not None:
            model = self._server.kernel(self._wanted_id)
            if model is None:
                raise SandboxNotFoundError(
                    f"there is no kernel {self._wanted_id} at {self._url}: it has ended, or never was"
                )
            self._default = model.name
        elif self._wanted_kernel is not None:
            self._default = self._wanted_kernel
        if self._default not in self._specs:
            raise SandboxConfigurationError(
                f"no kernelspec {self._default!r} at {self._url}"
                f" (installed: {', '.join(sorted(self._specs)) or 'none'})"
            )
        # Few kernelspecs say that they do, so that the server is seldom asked.
        self._limits = self._specs[self._default].limits_resources and self._server.is_enterprise_gateway()
        for trait, what in (("memory_limit", "limit the memory"), ("cpu_limit", "limit the CPUs")):
            if getattr(self.config, trait) is not None and not self._limits:
                raise self.refuse(f"{what} ({trait}={getattr(self.config, trait)!r})", _MAYBE)

    def launcher(self, spec: ContextSpec) -> Callable[[], RemoteKernel]:
        is_python = self._specs[spec.kernel_name].language == "python"
        env, cwd = {**self.config.env_vars, **spec.env}, spec.cwd or self.config.working_dir
        if not is_python and (env or cwd is not None):
            raise self.refuse(
                f"set environment variables or a working directory for the kernel {spec.kernel_name!r}",
                "the server decides them, and only in a Python kernel can they be changed",
            )
        is_first = spec.id == "default" and self._wanted_id is not None
        context = RemoteContext(
            self._server,
            lambda: self._start(spec),
            kernel_id=self._wanted_id if is_first else None,
            is_given=is_first and not self._was_attached,
            prologue=prologue(env, cwd) if is_python else None,
        )
        context.is_over = self._is_over
        left = self._contexts.pop(spec.id, None)
        if left is not None and left.kernel_id is not None:  # it could not be deleted, which is tried again
            self._contexts[left.kernel_id] = left
            self._started[left.kernel_id] = self._started.pop(spec.id, "")
        self._contexts[spec.id] = context
        return context.launch

    def _start(self, spec: ContextSpec) -> KernelModel:
        seconds = max(self.config.start_timeout, _LEAST_TO_START)
        env = limits_of(self.config) if self._limits else {}
        kernel_id = str(uuid.uuid4())
        self._guard(kernel_id, self._server.guard(kernel_id))
        try:
            model = self._server.start(spec.kernel_name, kernel_id, path=self._path, env=env, seconds=seconds)
        except SandboxError as error:
            if not is_unanswered(error):
                self._release(kernel_id)
            elif (guard := self._guards.get(kernel_id)) is not None:
                self._unanswered.add(kernel_id)
                guards.release_later(guard, partial(self._end_again, kernel_id))
            raise
        if model.id != kernel_id:
            self._guard(model.id, self._server.guard(model.id))
            self._release(kernel_id)
        if (earlier := self._started.get(spec.id)) is not None:  # it is gone, or there would be no new one
            self._release(earlier)
        self._started[spec.id] = model.id
        return model

    def _guard(self, what: str, guard: Guard) -> None:
        """Nobody else's kernel, nor one that goes on without this program."""
        if self._was_attached:
            return
        self._guards[what] = guard
        guards.guard(guard)
        if self._was_detached:  # meanwhile
            guards.release(guard)

    def _release(self, *what: str) -> None:
        for each in what:
            if (guard := self._guards.pop(each, None)) is not None:
                guards.release(guard)

    def expire_in(self, seconds: float, why: str) -> None:
        assert self._lifetime is not None
        self._lifetime.end_in(seconds, why)

    def ends(self, why: str, *, orderly: bool) -> None:
        self._is_over = True
        if self._lifetime is not None:
            self._lifetime.cancel()
        for context in self._contexts.values():
            context.is_over = True

    def remove(self) -> None:
        failed = []
        for context_id, context in list(self._contexts.items()):
            try:
                self._delete(context_id, context)
            except SandboxError as error:
                failed.append(f"the kernel {context.kernel_id} is left: {error}")
        if self._hub is not None:
            try:
                self._hub.stop()
            except SandboxError as error:
                failed = [f"the server that was started is left: {error}"]
            else:
                failed = []  # what it had is gone with it
                self._release(*self._guards)
        for what in self._guards.keys() - self._unanswered:
            guards.release_later(self._guards[what], partial(self._end_again, what))
        self._close_connections()
        if failed:
            raise SandboxConnectionError("; ".join(failed))

    def _end_again(self, what: str) -> bool:
        """Says whether nothing more can come of it."""
        try:
            if what == _OF_THE_HUB and self._hub is not None:
                self._hub.stop()
                return True
            return self._server.delete(what) or what not in self._unanswered
        finally:
            if self._is_over:
                self._close_connections()

    def _close_connections(self) -> None:
        if self._known_server is not None:
            self._known_server.close()
        if self._hub is not None:
            self._hub.close()

    def delete_context(self, context_id: str) -> None:
        context = self._contexts.get(context_id)
        if context is not None:
            self._delete(context_id, context)
            self._contexts.pop(context_id, None)

    def _delete(self, context_id: str, context: RemoteContext) -> None:
        context.delete()
        self._release(self._started.pop(context_id, ""))

    # Found by its id.

    @classmethod
    def attach(cls, sandbox_id: str, options: Mapping[str, object]) -> tuple[Variant, Record]:
        from code_sandboxes.config import SandboxConfig

        url, _, kernel_id = sandbox_id.partition(":")[2].rpartition("#")
        if set(options) - {"token"}:
            raise TypeError(f"from_id() of {cls.name} takes token= (given: {', '.join(sorted(options))})")
        if not url or not is_kernel_id(kernel_id):
            raise SandboxNotFoundError(
                f"no sandbox {sandbox_id!r}: the id of a {cls.name} is a server's URL, '#' and a kernel"
            )
        variant = cls(SandboxConfig(), {**options, "server_url": url, "kernel_id": kernel_id})
        variant._was_attached = True
        variant._hub = hub_of(url, variant._token)
        try:
            variant._find_out()
        except BaseException:
            variant._close_connections()
            raise
        record = Record(
            id=sandbox_id,
            name=None,
            tags={},
            settings=variant.config.settings(),
            created_at=0.0,
            time_left=None,
            isolation=variant.isolation,
            contexts=[variant._default_spec()],
        )
        return variant, record

    def _default_spec(self) -> ContextSpec:
        return ContextSpec("default", "default", self._specs[self._default].language, self._default, None, {})

    def listen(self, audience: Audience) -> None:
        self._lifetime = Lifetime(audience)

    def detach(self, *, keep: bool) -> None:
        if self._lifetime is not None:
            self._lifetime.cancel()
        self._was_detached = True
        self._release(*self._guards)
        self._close_connections()


def limits_of(config: SandboxConfig) -> dict[str, str]:
    """The limits as an Enterprise Gateway takes them (its documentation, "Kernel environment variables")."""
    env: dict[str, str] = {}
    if config.memory_limit is not None:
        env |= dict.fromkeys(("KERNEL_MEMORY", "KERNEL_MEMORY_LIMIT"), str(config.memory_limit))
    if config.cpu_limit is not None:
        env |= dict.fromkeys(("KERNEL_CPUS", "KERNEL_CPUS_LIMIT"), f"{config.cpu_limit:g}")
    return env


def _given(options: Mapping[str, object], name: str) -> str | None:
    value = options.get(name)
    return value if isinstance(value, str) and value else None
