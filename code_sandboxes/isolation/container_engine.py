"""What is asked of a container engine about one container, in a few calls that may block."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Mapping
from typing import Any

from code_sandboxes.errors import SandboxConfigurationError, SandboxConnectionError
from code_sandboxes.isolation.engine import IMAGE, connect, told

__all__ = ["Engine", "url_of"]

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

    Raises:
        SandboxConfigurationError: nobody can speak to it from here.
        SandboxConnectionError: it does not answer.
    """

    def __init__(self, url: str = "") -> None:
        self._client = connect(url or None)
        self._api: Any = self._client.api  # the stubs do not say what some of its methods take
        self.url = url_of(self._client)

    @property
    def is_local(self) -> bool:
        """It can hand sockets of this machine to its containers."""
        return self.url.startswith("unix://")

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

    def start(self, number: str) -> Callable[[], str]:
        """Start it; gives what tells what it has printed, once it has ended.

        Raises:
            SandboxConnectionError: it cannot be started.
        """
        with told("start a container"):
            printed = self._api.attach(number, stdout=True, stderr=True, stream=True)
            self._api.start(number)

        def said() -> str:
            with contextlib.suppress(Exception):  # of a container that is gone there is no more to know
                self._api.kill(number)
            text = b""
            for part in printed:
                text = (text + part)[-_KEPT_OUTPUT:]
            return text.decode("utf-8", "replace").strip()

        return said

    def inspect(self, number: str) -> Mapping[str, Any]:
        """What there is to know of it.

        Raises:
            SandboxConnectionError: it is gone.
        """
        with told("look at a container"):
            about: Mapping[str, Any] = self._api.inspect_container(number)
        return about

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
        self._client.close()


def url_of(client: object) -> str:
    """Where the engine of a ``docker.DockerClient`` listens.

    Raises:
        TypeError: it is none.
    """
    api = getattr(client, "api", None)
    adapter = getattr(api, "_custom_adapter", None)  # its base_url does not tell where a Unix socket is
    url = getattr(adapter, "socket_path", None) or getattr(api, "base_url", None)
    if not isinstance(url, str):
        raise TypeError(f"docker_client must be a docker.DockerClient, not {type(client).__name__}")
    return f"unix://{url}" if url.startswith("/") else url
