"""Jupyter Server 2, as it is without any settings: rate limits, buffering, pings and all."""

from __future__ import annotations

from typing import ClassVar

from tests.servers.installed import JUPYTER, Installation
from tests.servers.server import Server

__all__ = ["JupyterServer"]


class JupyterServer(Server):
    """``JupyterServer(folder, unix=True)`` listens at a Unix socket, and at nothing else."""

    installations: ClassVar[tuple[Installation, ...]] = (JUPYTER,)

    def _command(self) -> list[str]:
        return [str(JUPYTER.python()), "-m", "jupyter_server", f"--config={self._config_file}"]

    def _config(self) -> dict[str, object]:
        place = {"ServerApp.sock": str(self.socket)} if self.socket else {"ServerApp.port": self.port}
        return {
            **place,
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port_retries": 0,  # another port is not the address that was promised
            "ServerApp.base_url": f"{self.base}/",
            "ServerApp.open_browser": False,
            "ServerApp.allow_root": True,
            "ServerApp.root_dir": str(self.files),
            "IdentityProvider.token": self.token,
        }
