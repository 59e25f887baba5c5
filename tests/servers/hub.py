"""JupyterHub with its proxy: any user has servers, which are processes of this machine."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from tests.servers.installed import HUB, HUB_PROXY, Installation
from tests.servers.processes import MARK
from tests.servers.server import Server, free_port

__all__ = ["JupyterHub"]

# What a program needs that starts servers for users and works with them.
_SCOPES = ["admin:users", "servers", "access:servers", "tokens", "read:hub"]


class JupyterHub(Server):
    """:attr:`token` is that of a service, which may start, stop and use everybody's servers.

    The Hub's own API is below ``/hub/api``, and a server of a user below ``/user/NAME/SERVER/``.
    """

    installations: ClassVar[tuple[Installation, ...]] = (HUB, HUB_PROXY)
    _READY = "/hub/api"

    def __init__(
        self, folder: Path, *, base_url: str = "/", settings: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(folder, base_url=base_url, settings=settings)
        self._hub_port, self._proxy_port = free_port(), free_port()
        self._proxy_token = secrets.token_hex(24)

    def user_token(self, user: str, **more: object) -> str:
        """A token of *user*, who is there from then on; *more* is the Hub's, such as ``scopes=[...]``."""
        self.request("POST", f"/hub/api/users/{user}")  # refused if there already
        answer = self.request("POST", f"/hub/api/users/{user}/tokens", json=more)
        answer.raise_for_status()
        return str(answer.json()["token"])

    def _command(self) -> list[str]:
        return [str(HUB.python()), "-m", "jupyterhub", f"--config={self._config_file}"]

    def _config(self) -> dict[str, object]:
        singleuser = HUB.folder() / "bin" / "jupyterhub-singleuser"
        homes = self.folder / "homes"
        homes.mkdir(exist_ok=True)
        inherited = (MARK, "LANG", "JUPYTER_PATH")
        environment = {name: value for name, value in self._environment().items() if name in inherited}
        return {
            "JupyterHub.bind_url": f"http://127.0.0.1:{self.port}{self.base}/",
            "JupyterHub.hub_bind_url": f"http://127.0.0.1:{self._hub_port}",
            "ConfigurableHTTPProxy.api_url": f"http://127.0.0.1:{self._proxy_port}",
            "ConfigurableHTTPProxy.command": [str(HUB_PROXY.program())],
            "ConfigurableHTTPProxy.auth_token": self._proxy_token,
            "JupyterHub.db_url": f"sqlite:///{self.folder / 'hub.sqlite'}",
            "JupyterHub.authenticator_class": "dummy",
            "Authenticator.allow_all": True,
            "JupyterHub.spawner_class": "simple",
            "SimpleLocalProcessSpawner.home_dir_template": f"{homes}/{{username}}",
            "Spawner.cmd": [str(singleuser)],
            "Spawner.args": ["--allow-root"],
            "Spawner.environment": environment,
            "JupyterHub.allow_named_servers": True,
            "JupyterHub.services": [{"name": "tests", "api_token": self.token}],
            "JupyterHub.load_roles": [{"name": "tests", "scopes": _SCOPES, "services": ["tests"]}],
        }
