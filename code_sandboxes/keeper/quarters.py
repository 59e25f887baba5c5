"""Where the kernels of one sandbox are: on this machine as they are, confined, or in an enclosure."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from code_sandboxes.isolation import bubble, container
from code_sandboxes.isolation.container import SHOWN
from code_sandboxes.isolation.egress import Service, the_egress
from code_sandboxes.isolation.enclosure import Enclosure, EnclosureError
from code_sandboxes.isolation.hosts import AllowedHosts
from code_sandboxes.isolation.network_log import NetworkLog
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.keeper.jupyter_server import JupyterServer
from code_sandboxes.keeper.kernels import HostedKernel, start_confined, start_enclosed, start_kernel
from code_sandboxes.reaper import Reaper, remove_tree
from code_sandboxes.transports.loop import Loop

__all__ = ["Host", "Quarters"]

_log = logging.getLogger(__name__)

# The socket of a Jupyter Server in a sandbox's folder.
_SERVER = "jupyter"


Started = Callable[["HostedKernel | None", "Exception | None"], None]


class Host(Protocol):
    """What quarters need of the keeper they are in."""

    loop: Loop
    reaper: Reaper

    def next_number(self) -> int: ...


class Quarters:
    """An enclosure is made when it is first needed, and again if it has ended; in the I/O thread.

    Args:
        sandbox_id: whose they are.
        folder: the sandbox's.
        emptied: called when something that was here has gone.
    """

    def __init__(
        self, host: Host, sandbox_id: str, plan: Plan, folder: Path, emptied: Callable[[], None]
    ) -> None:
        self.plan = plan
        self._sandbox_id = sandbox_id
        self.home = folder / "home"
        self._host = host
        self._folder = folder
        self._emptied = emptied
        self._enclosure: Enclosure | None = None
        self._proxy: Service | None = None
        self._server: JupyterServer | None = None
        self._log = NetworkLog()
        self._making = threading.Lock()  # a container may be asked for in two threads
        self._under_way = 0
        self._failure: Exception | None = None
        self._is_ending = False
        self.is_paused = False  # all that is in it has been stopped
        self.home.mkdir(mode=0o700)

    @property
    def container(self) -> str | None:
        """The name of the container, if there is one."""
        return self._enclosure.container if self._enclosure is not None else None

    @property
    def server_url(self) -> str | None:
        """Where a Jupyter Server can be reached, if these are a container."""
        if not self._are_a_container:
            return None
        return f"http+unix://{quote(str(self._folder / _SERVER), safe='')}"

    @property
    def are_empty(self) -> bool:
        """There is nothing, and nothing will come."""
        return not self._under_way and (self._enclosure is None or self._enclosure.is_over)

    def prepare(self) -> None:
        """Begin to make what there has to be before a kernel can start."""
        if self._are_enclosed:
            self._under_way += 1
            self._host.loop.run_blocking(self._try_to_enclose, self._done, apart=self._are_a_container)

    def start(self, number: int, launch: Mapping[str, Any], then: Started) -> None:
        """Start a kernel, and call *then* with it, or with an error.

        Args:
            number: no other kernel has it.
            launch: how: see :func:`start_kernel`.
        """
        loop = self._host.loop
        if not self._are_enclosed:
            loop.run_blocking(lambda: self._start(number, launch), then)
            return

        def enclosed(enclosure: Enclosure | None, error: Exception | None) -> None:
            if enclosure is None:
                then(None, error)
            else:  # apart: code that is in there already can hold it up, and must hold up nobody else
                loop.run_blocking(lambda: self._start(number, launch, enclosure), then, apart=True)

        loop.run_blocking(self._enclosed, enclosed, apart=self._are_a_container)

    @property
    def _are_a_container(self) -> bool:
        # It is made in a thread of its own, as it takes an engine longer than others should wait. Of a bubble
        # the thread that has made it must live on.
        return self.plan.method == "container"

    @property
    def _are_enclosed(self) -> bool:
        return self.plan.method in ("bubblewrap", "container")

    def end(self) -> None:
        """End what there is; *emptied* is called when it is gone."""
        self._is_ending = True
        if self._enclosure is not None:
            self._enclosure.kill()

    def pause(self, then: Callable[[None, Exception | None], None]) -> None:
        """Stop all processes in it, and call *then* when they have stopped, or with an error."""
        self._of_the_enclosure(Enclosure.pause, then, paused=True)

    def resume(self, then: Callable[[None, Exception | None], None]) -> None:
        """Let them go on."""
        self._of_the_enclosure(Enclosure.resume, then, paused=False)

    def _of_the_enclosure(
        self,
        act: Callable[[Enclosure], None],
        then: Callable[[None, Exception | None], None],
        *,
        paused: bool,
    ) -> None:
        def done(_: None, error: Exception | None) -> None:
            if error is None:
                self.is_paused = paused
            then(None, error)

        enclosure = self._enclosure
        if enclosure is None or enclosure.is_over:
            done(None, None)  # there is nothing in it
        else:
            self._host.loop.run_blocking(lambda: act(enclosure), done, apart=True)

    def remove(self) -> None:
        """Remove what is left of them, when they are empty; blocks.

        Raises:
            OSError: not all of it can be removed.
        """
        try:
            if self._are_a_container:
                container.release_image(self.plan)
        finally:
            remove_tree(str(self._folder))

    def network_log(self) -> list[dict[str, object]]:
        """What was tried to reach, as far as the proxy was asked."""
        return [asdict(attempt) for attempt in self._log.attempts()]

    def _start(
        self, number: int, launch: Mapping[str, Any], enclosure: Enclosure | None = None
    ) -> HostedKernel:
        """Blocks.

        Raises:
            OSError: there is no such program or directory, or something is missing to start it.
            EnclosureError: the enclosure is over.
        """
        # What was there before, code may have removed or closed since.
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._folder.chmod(0o700)
        self.home.mkdir(mode=0o700, exist_ok=True)
        folder = (self._folder / SHOWN if self._are_a_container else self._folder) / str(number)
        try:
            if enclosure is not None:
                return self._start_enclosed(enclosure, number, folder, launch)
            if self.plan.method == "landlock":
                return start_confined(folder, launch, self.home, self._host.reaper, self.plan)
            return start_kernel(folder, launch, self.home, self._host.reaper)
        except BaseException:
            remove_tree(str(folder))
            raise

    def _start_enclosed(
        self, enclosure: Enclosure, number: int, folder: Path, launch: Mapping[str, Any]
    ) -> HostedKernel:
        kernel = start_enclosed(enclosure, number, folder, launch)
        server = self._server
        if server is not None:
            close, forget = kernel.close, server.add(number, kernel.connection)

            def close_and_forget() -> None:
                forget()
                close()

            kernel.close = close_and_forget
        return kernel

    def _try_to_enclose(self) -> None:
        try:
            self._enclosed()
        except Exception as error:  # whoever wants to start a kernel is told
            self._failure = error

    def _enclosed(self) -> Enclosure:
        """The enclosure, which is made if there is none; blocks.

        Raises:
            SandboxConfigurationError: it cannot be as it is planned.
            EnclosureError: it cannot be made.
        """
        with self._making:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            if self._is_ending:
                raise EnclosureError("the sandbox has ended")
            if self._enclosure is None or self._enclosure.is_over:
                self._enclosure = self._make()
            return self._enclosure

    def _make(self) -> Enclosure:
        loop, reaper = self._host.loop, self._host.reaper
        if self._are_a_container:
            enclosure = container.make(loop, self.plan, self._sandbox_id, self._folder, reaper)
        else:
            name = f"{os.getpid()}-{self._folder.parent.name}-{self._host.next_number()}"
            enclosure = bubble.make(loop, self.plan, name, self._folder, reaper)
        loop.call_soon(lambda: self._use(enclosure))
        return enclosure

    def _use(self, enclosure: Enclosure) -> None:
        self.is_paused = False
        self._under_way += 1  # until it is removed
        enclosure.watch(lambda: self._over(enclosure))
        if self._are_a_container:
            self._server = self._serve(enclosure)
        listener, enclosure.proxy_listener = enclosure.proxy_listener, None
        if listener is not None:
            allowed = AllowedHosts(self.plan.allowed_hosts)
            self._host.loop.run_blocking(
                lambda: the_egress().serve(listener, allowed, self._log),  # it may have to be imported
                lambda proxy, error: self._proxy_began(enclosure, proxy, error),
                apart=True,
            )

    def _serve(self, enclosure: Enclosure) -> JupyterServer | None:
        try:
            return JupyterServer(
                self._host.loop,
                enclosure,
                self._folder / _SERVER,
                self._folder / SHOWN,
                self._host.next_number,
                lambda: not self.is_paused,
            )
        except OSError as error:  # too few descriptors: it can be used without
            _log.error("there is no socket for a Jupyter Server: %s", error)
            return None

    def _proxy_began(self, enclosure: Enclosure, proxy: Service | None, error: Exception | None) -> None:
        if proxy is None:  # there is no way out then
            _log.error("an enclosure has no proxy: %s", error)
        elif enclosure.is_over:
            proxy.close()
        else:
            self._proxy = proxy

    def _over(self, enclosure: Enclosure) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._proxy is not None:
            self._proxy.close()
            self._proxy = None
        self._host.loop.run_blocking(enclosure.remove, self._done, apart=True)

    def _done(self, _: None, error: Exception | None) -> None:
        self._under_way -= 1
        if error is not None:
            _log.error("an enclosure could not be removed: %s", error)
        self._emptied()
