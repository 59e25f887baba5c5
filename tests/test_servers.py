"""The servers that other tests talk to: each is what it says it is, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import websocket

from conftest import wait_until
from tests.server_fixtures import REQUIRED, needs_server
from tests.servers import (
    JupyterHub,
    JupyterServer,
    KernelGateway,
    NotInstalledError,
    Server,
    ServerStartError,
)
from tests.servers.channels import printed
from tests.servers.installed import Installation, NodePackage, PythonPackages
from tests.servers.processes import MARK

pytest_plugins = ["tests.server_fixtures"]

NewServer = Callable[..., Server]

# A websocket's first subprotocol, which carries bytes (PROTOCOL.md, 3.5).
V1 = "v1.kernel.websocket.jupyter.org"

SHARED = [
    "jupyter_server",
    "jupyter_server_on_socket",
    "jupyter_server_with_base_url",
    "kernel_gateway",
    "enterprise_gateway",
    "jupyter_hub",
]

NEW = ["new_jupyter_server", "new_kernel_gateway", "new_enterprise_gateway", "new_jupyter_hub"]


@pytest.fixture(params=SHARED)
def server(request: pytest.FixtureRequest) -> Server:
    """One of each kind, shared by all tests."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=NEW)
def new_server(request: pytest.FixtureRequest) -> NewServer:
    new: NewServer = request.getfixturevalue(request.param)
    return new


def kernels_of(server: Server) -> str:
    """Where its kernels are; those of a Hub are in a server of a user, which is started first."""
    if not isinstance(server, JupyterHub):
        return "/api/kernels"
    server.request("POST", "/hub/api/users/ada")  # 409 if there
    server.request("POST", "/hub/api/users/ada/servers/one").raise_for_status()

    def is_ready() -> bool:
        servers = server.request("GET", "/hub/api/users/ada").json()["servers"]
        return bool(servers.get("one", {}).get("ready"))

    wait_until(is_ready, 60)
    return "/user/ada/one/api/kernels"


def start_kernel(server: Server) -> tuple[str, list[psutil.Process]]:
    """The path of a new kernel, and all processes that there are then."""
    kernels = kernels_of(server)
    answer = server.request("POST", kernels, json={"name": "python3"})
    assert answer.status_code == 201, answer.text
    path = f"{kernels}/{answer.json()['id']}"
    there = server.processes()
    # The server, one of a user with its Hub and proxy, and the kernel.
    assert len(there) == (4 if isinstance(server, JupyterHub) else 2)
    return path, there


def have_ended(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


# What a server does.


@pytest.fixture(scope="session")
def kernels() -> dict[str, str]:
    """Where they are, by the address of the server, as it takes its time to start one of a Hub."""
    return {}


@pytest.fixture
def place(server: Server, kernels: dict[str, str]) -> str:
    """Where the kernels of *server* are."""
    if server.url not in kernels:
        kernels[server.url] = kernels_of(server)
    return kernels[server.url]


@pytest.mark.slow
def test_kernel_is_started_and_deleted_with_the_token(server: Server, place: str) -> None:
    answer = server.request("POST", place, json={"name": "python3"})
    assert answer.status_code == 201, answer.text
    path = f"{place}/{answer.json()['id']}"
    assert server.request("GET", path).json()["name"] == "python3"
    assert server.request("DELETE", path).status_code == 204
    assert server.request("GET", path).status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_wrong_token_is_refused(server: Server, place: str, method: str) -> None:
    refused = 401 if server.__class__.__name__.endswith("Gateway") else 403
    assert server.request(method, place, token="wrong").status_code == refused


@pytest.mark.slow
def test_kernel_is_one_of_the_python_of_the_tests(server: Server, place: str) -> None:
    path = f"{place}/{server.request('POST', place, json={'name': 'python3'}).json()['id']}"
    with closing(channels_of(server, path)) as channels:
        assert printed(channels, "import sys; print(sys.executable)") == f"{sys.executable}\n"
        assert int(printed(channels, "import ipykernel; print(ipykernel.version_info[0])")) >= 7
    server.request("DELETE", path)


@pytest.mark.slow
def test_subprotocol_is_selected_by_who_is_offered_it(server: Server, place: str) -> None:
    path = f"{place}/{server.request('POST', place, json={'name': 'python3'}).json()['id']}"
    with closing(channels_of(server, path, subprotocols=[V1])) as channels:
        assert channels.getsubprotocol() == V1
    server.request("DELETE", path)


@pytest.mark.slow
def test_token_is_where_nobody_else_reads_it(server: Server, place: str) -> None:
    path = f"{place}/{server.request('POST', place, json={'name': 'python3'}).json()['id']}"
    assert not [p.cmdline() for p in server.processes() if server.token in " ".join(p.cmdline())]
    kernels = [p for p in server.processes() if "ipykernel_launcher" in p.cmdline()]
    assert kernels
    assert not [p for p in kernels if server.token in p.environ().values()]
    assert (server.folder / "server_config.py").stat().st_mode & 0o777 == 0o600
    server.request("DELETE", path)


@pytest.mark.slow
def test_environment_is_the_server_s_own(server: Server) -> None:
    environment = psutil.Process(server.process.pid).environ()
    assert environment.keys() <= {"PATH", "LANG", "HOME", "USER", "LOGNAME", "IPYTHONDIR", MARK} | {
        name for name in environment if name.startswith("JUPYTER_")
    }
    ours = [v for k, v in environment.items() if k == "HOME" or k.startswith("JUPYTER_")]
    assert all(value.startswith(str(server.folder)) for value in ours)


def channels_of(server: Server, path: str, **options: Any) -> websocket.WebSocket:
    """The websocket of the kernel at *path*."""
    place = server.url.replace("http://", "ws://") + path
    if server.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(server.socket))
        options["socket"] = connection
        place = f"ws://localhost{path}"
    header = [f"Authorization: token {server.token}"]
    return websocket.create_connection(f"{place}/channels", header=header, timeout=60, **options)


@pytest.mark.slow
def test_settings_are_those_of_the_server(new_jupyter_server: Callable[..., JupyterServer]) -> None:
    server = new_jupyter_server(
        settings={"MappingKernelManager.cull_idle_timeout": 1, "MappingKernelManager.cull_interval": 1}
    )
    path, _ = start_kernel(server)
    wait_until(lambda: server.request("GET", path).status_code == 404)


@pytest.mark.slow
def test_server_that_ends_at_start_tells_why(new_kernel_gateway: Callable[..., KernelGateway]) -> None:
    with pytest.raises(ServerStartError, match="no-such-kernel"):
        new_kernel_gateway(
            settings={"KernelGatewayApp.prespawn_count": 1, "KernelGatewayApp.seed_uri": "no-such-kernel"}
        )


@pytest.mark.slow
def test_token_of_a_user_is_for_the_servers_of_the_user(jupyter_hub: JupyterHub) -> None:
    token = jupyter_hub.user_token("bob")
    assert jupyter_hub.request("GET", "/hub/api/user", token=token).json()["name"] == "bob"
    assert jupyter_hub.request("GET", "/hub/api/users/bob", token=token).status_code == 200
    assert jupyter_hub.request("GET", "/hub/api/users/ada", token=token).status_code == 404


# What is left of it.


@pytest.mark.slow
def test_stopped_server_leaves_no_process(new_server: NewServer) -> None:
    server = new_server()
    _, there = start_kernel(server)
    server.stop()
    assert have_ended(there)
    assert server.processes() == []
    assert "is killed" not in server.log.read_text(), "it did not end by itself"


@pytest.mark.slow
def test_killed_server_leaves_no_process_and_starts_where_it_was(new_server: NewServer) -> None:
    server = new_server()
    path, there = start_kernel(server)
    address, token = server.url, server.token
    server.kill()
    assert have_ended(there)
    server.start()
    assert (server.url, server.token) == (address, token)
    # A Hub sends who asks for a server that is down to a page of its own.
    assert server.request("GET", path).status_code == (302 if isinstance(server, JupyterHub) else 404)


@pytest.mark.slow
def test_server_restarts_on_the_same_address(new_jupyter_server: Callable[..., JupyterServer]) -> None:
    server = new_jupyter_server()
    first, address = server.process.pid, server.url
    server.restart_on_same_address()
    assert server.url == address
    assert server.process.pid != first
    assert server.request("GET", "/api/status").status_code == 200


@pytest.mark.slow
def test_server_ends_with_tests_that_are_killed(
    new_jupyter_server: Callable[..., JupyterServer], tmp_path: Path
) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from tests.servers import JupyterServer

        server = JupyterServer(Path(sys.argv[1])).start()
        server.request("POST", "/api/kernels").raise_for_status()
        print(*[process.pid for process in server.processes()], flush=True)
        time.sleep(600)
    """
    folder = tmp_path / "killed"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(folder)], stdout=subprocess.PIPE, text=True
    ) as tests:
        assert tests.stdout is not None
        there = [psutil.Process(int(number)) for number in tests.stdout.readline().split()]
        assert len(there) == 2
        tests.send_signal(signal.SIGKILL)
    wait_until(lambda: have_ended(there))


# What cannot be had.


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with nothing installed, nor anything that installs."""
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setenv("PYENV_ROOT", os.devnull)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Nowhere(JupyterServer):
    installations: ClassVar[tuple[Installation, ...]] = (NodePackage("a-server", "1.0"),)


@pytest.mark.usefixtures("no_programs")
def test_what_is_missing_is_named() -> None:
    with pytest.raises(NotInstalledError, match=r"a-program@1\.0 takes node, and there is none"):
        NodePackage("a-program", "1.0").folder()
    with pytest.raises(NotInstalledError, match=r"takes a Python between 3\.9 and 3\.9, and there is none"):
        PythonPackages("a-package", ("a==1",), newest=(3, 9)).folder()


@pytest.mark.usefixtures("no_programs")
def test_missing_server_is_told_of_loudly_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"NO SERVER: no Nowhere: a-server@1\.0 takes node"):
        needs_server(Nowhere)
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=f"no Nowhere: .* {REQUIRED} is 1"):
        needs_server(Nowhere)
