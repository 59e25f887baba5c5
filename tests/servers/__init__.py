"""Real servers of others, on this machine alone, for tests of what talks to them.

``with JupyterServer(folder) as server:`` starts one; it answers then at ``server.url``. Fixtures are in
``tests/server_fixtures.py``.
"""

from __future__ import annotations

from tests.servers.gateways import EnterpriseGateway, KernelGateway
from tests.servers.hub import JupyterHub
from tests.servers.installed import NotInstalledError
from tests.servers.jupyter import JupyterServer
from tests.servers.server import Server, ServerStartError

__all__ = [
    "EnterpriseGateway",
    "JupyterHub",
    "JupyterServer",
    "KernelGateway",
    "NotInstalledError",
    "Server",
    "ServerStartError",
]
