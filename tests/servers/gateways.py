"""Jupyter Kernel Gateway and Jupyter Enterprise Gateway: kernels by HTTP, and nothing else."""

from __future__ import annotations

from typing import ClassVar

from tests.servers.installed import ENTERPRISE_GATEWAY, JUPYTER, Installation
from tests.servers.server import Server

__all__ = ["EnterpriseGateway", "KernelGateway"]


class KernelGateway(Server):
    installations: ClassVar[tuple[Installation, ...]] = (JUPYTER,)

    def _command(self) -> list[str]:
        return [str(JUPYTER.python()), "-m", "kernel_gateway", f"--config={self._config_file}"]

    def _config(self) -> dict[str, object]:
        return {
            "KernelGatewayApp.ip": "127.0.0.1",
            "KernelGatewayApp.port": self.port,
            "KernelGatewayApp.port_retries": 0,
            "KernelGatewayApp.base_url": f"{self.base}/",
            "KernelGatewayApp.auth_token": self.token,
        }


class EnterpriseGateway(Server):
    """Its kernels are processes of this machine; elsewhere they take a cluster."""

    installations: ClassVar[tuple[Installation, ...]] = (ENTERPRISE_GATEWAY,)

    def _command(self) -> list[str]:
        return [str(ENTERPRISE_GATEWAY.python()), "-m", "enterprise_gateway", f"--config={self._config_file}"]

    def _config(self) -> dict[str, object]:
        return {
            "EnterpriseGatewayApp.ip": "127.0.0.1",
            "EnterpriseGatewayApp.port": self.port,
            "EnterpriseGatewayApp.port_retries": 0,
            "EnterpriseGatewayApp.base_url": f"{self.base}/",
            "EnterpriseGatewayApp.auth_token": self.token,
        }
