"""What is asked of a container engine about one container, in a few calls that may block."""

from __future__ import annotations

import contextlib
import io
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

from code_sandboxes.errors import SandboxConfigurationError, SandboxConnectionError
from code_sandboxes.isolation.engine import IMAGE, connect, told
from code_sandboxes.isolation.engine_address import EngineAddress

__all__ = ["Engine", "Printed", "url_of"]

# Seconds that something may take to be gone, and how often to look.
_PATIENCE = 30.0
_LOOK = 0.02

_KEPT_OUTPUT = 4096

# Whether it is the standard image that is missing.
_MENDS = {
    True: "build it with `python -m code_sandboxes build-image`, or name another one with image=",
    False: "pull it, or build the standard one with `python -m code_sandboxes build-image`",
}

# How the tags begin that say that an image goes with its last container.
_RETIRED = "retired-"

# By the URL of each engine that was asked; it does not change.
_HAVE_FEW_USERS: dict[str, bool] = {}


class Engine:
    """A container engine.

    Args:
        url: where it listens; "" for where the ``docker`` command would look.
        client: a ``docker.DockerClient`` of it, which stays its owner's.

    Raises:
        SandboxConfigurationError: nobody can speak to it from here.
        SandboxConnectionError: it does not answer.
    """

    def __init__(self, url: str = "", client: Any = None) -> None:
        self._is_ours = client is None
        self._client = connect(url or None) if client is None else client
        self._api: Any = self._client.api  # the stubs do not say what some of its methods take
        self.url = url_of(self._client)

    @property
    def is_local(self) -> bool:
        """It can hand sockets of this machine to its containers."""
        return self.url.startswith("unix://")

    @property
    def address(self) -> EngineAddress:
        """For connections of another kind than the package docker makes.

        Raises:
            SandboxConfigurationError: its certificates cannot be read.
        """
        return EngineAddress(self.url, self._api.api_version, self._tls())

    def _tls(self) -> ssl.SSLContext | None:
        if not self.url.startswith("https://"):
            return None
        verify, files = self._api.verify, self._api.cert
        try:
            context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
            if not verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if files:
                context.load_cert_chain(*((files,) if isinstance(files, str) else files))
        except OSError as error:
            raise SandboxConfigurationError(
                f"the certificates for the Docker engine at {self.url} cannot be read: {error}"
            ) from None
        return context

    @property
    def version(self) -> str:
        """
        Raises:
            SandboxConnectionError: it does not answer any more.
        """
        with told("tell its version"):
            return str(self._client.version()["Version"])

    @property
    def has_few_users(self) -> bool:
        """Its containers are in a user namespace, in which there are not all numbers of users.

        Raises:
            SandboxConnectionError: it does not answer any more.
        """
        if self.url not in _HAVE_FEW_USERS:
            with told("tell how it is set up"):
                options = self._api.info().get("SecurityOptions") or []
            named = {option.partition("=")[2].partition(",")[0] for option in options}
            _HAVE_FEW_USERS[self.url] = not named.isdisjoint({"rootless", "userns"})
        return _HAVE_FEW_USERS[self.url]

    def has_image(self, name: str) -> bool:
        """
        Raises:
            SandboxConnectionError: it does not answer any more.
        """
        from docker.errors import ImageNotFound

        with told("look for an image"):
            try:
                self._api.inspect_image(name)
            except ImageNotFound:
                return False
        return True

    def environment_of_image(self, name: str) -> Sequence[str]:
        """``NAME=value`` as an image sets them; nothing of one that is not there.

        Raises:
            SandboxConnectionError: it does not answer any more.
        """
        from docker.errors import APIError

        with told("look at an image"):
            try:
                return self._api.inspect_image(name)["Config"].get("Env") or ()
            except APIError as error:
                if error.status_code not in (400, 404):  # which making a container tells better
                    raise
                return ()

    def create(self, name: str, config: Mapping[str, Any]) -> None:
        """A container that does not run yet.

        Args:
            config: as the engine takes it (Docker Engine API, "Create a container").

        Raises:
            SandboxConfigurationError: there is no such image, or it is asked for what cannot be.
            SandboxConnectionError: it cannot be made.
        """
        from docker.errors import APIError, ImageNotFound

        with told("make a container"):
            try:
                answer = self._api.create_container_from_config(dict(config), name)
            except ImageNotFound:
                raise SandboxConfigurationError(
                    f"the container engine has no image {config['Image']!r}:"
                    f" {_MENDS[config['Image'] == IMAGE]}"
                ) from None
            except APIError as error:
                if error.status_code != 400:
                    raise
                raise SandboxConfigurationError(
                    f"the container engine makes no such container: {error.explanation}"
                ) from None
        if ignored := [warning for warning in answer.get("Warnings") or () if "discarded" in warning]:
            raise SandboxConfigurationError(f"the container engine would not limit it: {' '.join(ignored)}")

    def read(self, name: str, path: str) -> bytes:
        """A file of a container, which need not run; nothing if it has none.

        Raises:
            SandboxConnectionError: it is gone.
        """
        import tarfile

        from docker.errors import NotFound

        with told("read in a container"):
            try:
                parts, _ = self._api.get_archive(name, path)
                archive = io.BytesIO(b"".join(parts))
            except NotFound:
                return b""
        with tarfile.open(fileobj=archive) as tar:
            file = tar.extractfile(tar.next() or path)
            return b"" if file is None else file.read()

    def start(self, number: str) -> Printed:
        """Start it; gives what tells what it has printed.

        Raises:
            SandboxConnectionError: it cannot be started.
        """
        with told("start a container"):
            stream = self._api.attach(number, stdout=True, stderr=True, stream=True)
            printed = Printed(stream, partial(self._api.kill, number))
            try:
                self._api.start(number)
            except BaseException:
                printed.close()
                raise
        return printed

    def inspect(self, number: str) -> Mapping[str, Any]:
        """What there is to know of it.

        Raises:
            SandboxConnectionError: it is gone.
        """
        with told("look at a container"):
            about: Mapping[str, Any] = self._api.inspect_container(number)
        return about

    def find(self, *labels: str, status: str = "") -> list[str]:
        """The names of the containers that have all *labels* and are in *status*; without one: that run.

        Raises:
            SandboxConnectionError: it does not answer.
        """
        filters = {"label": list(labels), "status": status or "running"}
        with told("look for a container"):
            found = self._api.containers(all=True, filters=filters)
        return [name.lstrip("/") for each in found for name in each["Names"][:1]]

    def created_at(self, number: str) -> float:
        """Seconds since the epoch, by the engine's clock.

        Raises:
            SandboxConnectionError: it is gone.
        """
        told_time = str(self.inspect(number)["Created"])[:19]  # RFC 3339, with nanoseconds
        return datetime.fromisoformat(told_time).replace(tzinfo=timezone.utc).timestamp()

    def is_running(self, number: str) -> bool:
        try:
            return bool(self.inspect(number)["State"]["Running"])
        except SandboxConnectionError:  # it is gone
            return False

    def commit(self, name: str, image: str) -> None:
        """Make an image of a container as it is; what lies in memory is not in it.

        Raises:
            SandboxConnectionError: it is gone, or there is no room.
        """
        repository, _, tag = image.partition(":")
        with told("make an image of a container"):
            self._api.commit(name, repository, tag)

    def retire_image(self, name: str) -> None:
        """Remove an image; if a container has it, it stays until :meth:`remove_retired` after that one's end.

        Raises:
            SandboxConnectionError: the engine does not answer.
        """
        from docker.errors import APIError, ImageNotFound

        repository, _, tag = name.partition(":")
        with told("remove an image"), contextlib.suppress(ImageNotFound):
            try:
                self._api.remove_image(name)
            except APIError as error:
                if error.status_code != 409:
                    raise
                self._api.tag(name, repository, f"{_RETIRED}{tag}")

    def remove_retired(self, repository: str) -> None:
        """Remove the images of that name that are not wanted any more, and have no container.

        Raises:
            SandboxConnectionError: the engine does not answer.
        """
        from docker.errors import ImageNotFound

        with told("remove images"):
            for image in self._api.images(repository):
                is_retired = any(f":{_RETIRED}" in name for name in image["RepoTags"] or ())
                if is_retired and not self._api.containers(all=True, filters={"ancestor": image["Id"]}):
                    with contextlib.suppress(ImageNotFound):  # by somebody else, just now
                        self._api.remove_image(image["Id"], force=True)

    def remove(self, number: str) -> None:
        """End it and remove it, and wait until it is gone.

        Raises:
            SandboxConnectionError: the engine does not answer.
            TimeoutError: it does not go.
        """
        from docker.errors import APIError, NotFound

        give_up = time.monotonic() + _PATIENCE
        with told("remove a container"):
            while time.monotonic() < give_up:
                try:
                    self._api.remove_container(number, v=True, force=True)
                except NotFound:
                    return
                except APIError as error:
                    if error.status_code != 409:  # it is being removed, since it has ended
                        raise
                time.sleep(_LOOK)
        raise TimeoutError(f"the container {number[:12]} does not go within {_PATIENCE:g} s")

    def close(self) -> None:
        if self._is_ours:
            self._client.close()


class Printed:
    """What a container prints: called, it ends the container and tells the last of it."""

    def __init__(self, stream: Any, kill: Callable[[], object]) -> None:
        self._stream = stream
        self._kill = kill

    def __call__(self) -> str:
        with contextlib.suppress(Exception):  # of a container that is gone there is no more to know
            self._kill()
        text = b""
        for part in self._stream:
            text = (text + part)[-_KEPT_OUTPUT:]
        return text.decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Nobody wants to know any more."""
        response = getattr(self._stream, "_response", None)  # close() of the stream is not for all engines
        if response is not None:
            response.close()


def url_of(client: object) -> str:
    """Where the engine of a ``docker.DockerClient`` listens.

    Raises:
        TypeError: it is none.
    """
    api = getattr(client, "api", None)
    adapter = getattr(api, "_custom_adapter", None)  # its base_url does not tell where a Unix socket is
    url = getattr(adapter, "socket_path", None) or getattr(api, "base_url", None)
    if isinstance(host := getattr(adapter, "ssh_host", None), str):
        url = f"ssh://{host.removeprefix('ssh://')}"
    if not isinstance(url, str):
        raise TypeError(f"docker_client must be a docker.DockerClient, not {type(client).__name__}")
    return f"unix://{url}" if url.startswith("/") else url
