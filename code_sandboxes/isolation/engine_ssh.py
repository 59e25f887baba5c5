"""A client of a container engine over ``ssh://``, by the command ``ssh``, as the command ``docker`` does it.

That has the user's keys, hosts and settings. The package docker would take another package, paramiko, for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from code_sandboxes.isolation.engine_address import EngineAddress

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["over_ssh"]

# Of the interface, until the engine has said which it has (the least that the package docker speaks is 1.24).
_VERSION = "1.30"


def over_ssh(url: str) -> DockerClient:
    """
    Raises:
        DockerException, requests.RequestException: nobody answers there.
    """
    import requests
    from docker import DockerClient
    from urllib3 import HTTPConnectionPool
    from urllib3.connection import HTTPConnection
    from urllib3.exceptions import NewConnectionError

    address = EngineAddress(url, _VERSION)

    class Connection(HTTPConnection):
        def _new_conn(self) -> Any:
            try:
                return address.dial()
            except OSError as error:  # there is no such command
                raise NewConnectionError(self, str(error)) from error

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class Adapter(requests.adapters.HTTPAdapter):
        ssh_host = url

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = {"http": Pool}

    client = DockerClient(base_url="http://localhost:2375", version=_VERSION)
    api: Any = client.api
    api.trust_env = False  # a proxy has no part in it
    api._custom_adapter = Adapter()
    api.mount("http://", api._custom_adapter)
    try:
        api._version = api.version(api_version=False)["ApiVersion"]
    except BaseException:
        client.close()
        raise
    return client
