"""Kernels that other Jupyter tools run sandboxed: jupyter_client, nbclient and a Jupyter Server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import nbformat
import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager, KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tornado.websocket import WebSocketClientConnection, websocket_connect

from code_sandboxes import (
    Sandbox,
    SandboxConfigurationError,
    SandboxNotFoundError,
    SandboxNotStartedError,
    kernelspec_command,
)
from code_sandboxes.__main__ import main
from code_sandboxes.isolation.plan import Mount, Plan
from code_sandboxes.isolation.probe import probe
from code_sandboxes.keeper.client import KeeperClient
from code_sandboxes.provisioner import SandboxProvisioner
from code_sandboxes.variants.jupyter import LocalJupyter
from code_sandboxes.variants.plans import seen_as, why_not
from conftest import BUSY, processes_of, sandbox_folders, wait_until

T = TypeVar("T")

needs_bubblewrap = pytest.mark.skipif(bool(probe().bubblewrap), reason=f"no bubblewrap: {probe().bubblewrap}")
needs_memory_limit = pytest.mark.skipif(
    bool(probe().cgroups["memory"]), reason=f"no limit of memory: {probe().cgroups['memory']}"
)

ARGV = ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]

InstallSandboxed = Callable[..., str]


def metadata(settings: Mapping[str, object]) -> dict[str, object]:
    return {"kernel_provisioner": {"provisioner_name": "code-sandboxes", "config": settings}}


@pytest.fixture
def install_sandboxed(install_kernel: Callable[..., str]) -> InstallSandboxed:
    """Installs a sandboxed kernelspec for one test: ``install_sandboxed(**settings)`` returns its name."""

    def install(**settings: object) -> str:
        name = f"sandboxed-{secrets.token_hex(4)}"
        return install_kernel(name, ARGV, language="python", metadata=metadata(settings))

    return install


# Each tool, as a test uses it.


class Tool(Protocol):
    """Runs one kernel, and stays connected to it."""

    def send(self, code: str) -> str:
        """Ask for a run; returns the message's id."""

    def message(self) -> dict[str, Any]:
        """The next message of iopub."""

    def interrupt(self) -> None: ...

    def restart(self) -> None: ...

    def wait_until_ready(self) -> None: ...

    def wait_until_seen_dead(self) -> None: ...

    def is_alive(self) -> bool: ...

    def close(self) -> None: ...


def events(tool: Tool, code: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What comes of a run, until it is over."""
    sent = tool.send(code)
    while True:
        message = tool.message()
        if message["parent_header"].get("msg_id") != sent:
            continue
        yield message["header"]["msg_type"], message["content"]
        if message["content"].get("execution_state") == "idle":
            return


def run(tool: Tool, code: str) -> str:
    """What it printed, and its error."""
    told = ""
    for kind, content in events(tool, code):
        told += content["text"] if kind == "stream" else ""
        told += f"{content['ename']}: {content['evalue']}" if kind == "error" else ""
    return told


class Blocking:
    """``KernelManager`` of jupyter_client."""

    def __init__(self, kernel_name: str, **start: Any) -> None:
        self.manager = KernelManager(kernel_name=kernel_name)
        self.manager.start_kernel(**start)
        self._client = self.manager.client()
        self._client.start_channels()
        self.wait_until_ready()

    def send(self, code: str) -> str:
        return str(self._client.execute(code))

    def message(self) -> dict[str, Any]:
        return self._client.get_iopub_msg(timeout=60)

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def restart(self) -> None:
        self.manager.restart_kernel()

    def wait_until_ready(self) -> None:
        self._client.wait_for_ready(timeout=60)

    def wait_until_seen_dead(self) -> None:
        wait_until(lambda: not self.is_alive())
        self.manager.restart_kernel(now=True)

    def is_alive(self) -> bool:
        return self.manager.is_alive()

    def close(self) -> None:
        self._client.stop_channels()
        self.manager.shutdown_kernel()


class Awaiting:
    """``AsyncKernelManager`` of jupyter_client."""

    def __init__(self, kernel_name: str, **start: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._wait(self._start(kernel_name, start))

    async def _start(self, kernel_name: str, start: Mapping[str, Any]) -> None:
        self._manager = AsyncKernelManager(kernel_name=kernel_name)
        await self._manager.start_kernel(**start)
        self._client: AsyncKernelClient = self._manager.client()
        self._client.start_channels()
        await self._client.wait_for_ready(timeout=60)

    def _wait(self, awaited: Awaitable[T]) -> T:
        async def wait() -> T:
            return await awaited

        return self._loop.run_until_complete(wait())

    def send(self, code: str) -> str:
        return str(self._client.execute(code))

    def message(self) -> dict[str, Any]:
        return self._wait(self._client.get_iopub_msg(timeout=60))

    def interrupt(self) -> None:
        self._wait(self._manager.interrupt_kernel())

    def restart(self) -> None:
        self._wait(self._manager.restart_kernel())

    def wait_until_ready(self) -> None:
        self._wait(self._client.wait_for_ready(timeout=60))

    def wait_until_seen_dead(self) -> None:
        wait_until(lambda: not self.is_alive())
        self._wait(self._manager.restart_kernel(now=True))

    def is_alive(self) -> bool:
        return bool(self._wait(self._manager.is_alive()))

    def close(self) -> None:
        self._client.stop_channels()
        self._wait(self._manager.shutdown_kernel())
        self._loop.close()


class Server:
    """A Jupyter Server, in a process of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.token = secrets.token_hex(16)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._log = (folder / "server.log").open("w")
        options = (f"--port={self.port}", "--port-retries=0", "--no-browser", "--allow-root")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", *options, f"--ServerApp.root_dir={folder}"],
            env={**os.environ, **_jupyter_folders(folder), **environment, "JUPYTER_TOKEN": self.token},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        wait_until(self._answers, 60)

    def _answers(self) -> bool:
        assert self.process.poll() is None, Path(self._log.name).read_text()
        try:
            self.ask("GET", "/api")
        except urllib.error.URLError:
            return False
        return True

    def ask(self, method: str, path: str, content: object = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if content is None else json.dumps(content).encode(),
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def end(self, signum: int = signal.SIGTERM) -> None:
        self.process.send_signal(signum)
        self.process.wait(60)
        self._log.close()


def _jupyter_folders(folder: Path) -> dict[str, str]:
    """Nothing of Jupyter's that whoever runs the tests has set up is to make a difference."""
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    return {name: str(folder / name.lower()) for name in names}


class OnServer:
    """A kernel of a :class:`Server`, by its REST interface and a websocket."""

    def __init__(self, server: Server, kernel_name: str) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self.id = server.ask("POST", "/api/kernels", {"name": kernel_name})["id"]
        where = f"ws://127.0.0.1:{server.port}/api/kernels/{self.id}/channels?token={server.token}"
        self._socket: WebSocketClientConnection = self._loop.run_until_complete(self._connect(where))
        self.wait_until_ready()

    async def _connect(self, where: str) -> WebSocketClientConnection:
        return await websocket_connect(where)

    def send(self, code: str) -> str:
        return self._send("execute_request", {"code": code, "silent": False})

    def _send(self, kind: str, content: Mapping[str, object]) -> str:
        header = {"msg_id": secrets.token_hex(8), "msg_type": kind, "session": "s", "username": "u"}
        message = {"header": {**header, "version": "5.3"}, "parent_header": {}, "metadata": {}}
        document = json.dumps({**message, "content": content, "channel": "shell"})

        async def write() -> None:
            await self._socket.write_message(document)

        self._loop.run_until_complete(write())
        return header["msg_id"]

    def message(self, seconds: float = 60) -> dict[str, Any]:
        async def read() -> str | bytes | None:
            return await asyncio.wait_for(asyncio.shield(self._reading()), seconds)

        while True:
            document = self._loop.run_until_complete(read())
            self._read = None
            assert document is not None, "the server has hung up"
            message: dict[str, Any] = json.loads(document)
            if message["channel"] == "iopub":
                return message

    _read: asyncio.Future[str | bytes | None] | None = None

    def _reading(self) -> asyncio.Future[str | bytes | None]:
        """A read that was given up is not lost."""
        if self._read is None:
            self._read = asyncio.ensure_future(self._socket.read_message())
        return self._read

    def interrupt(self) -> None:
        self._server.ask("POST", f"/api/kernels/{self.id}/interrupt", {})

    def restart(self) -> None:
        self._server.ask("POST", f"/api/kernels/{self.id}/restart", {})

    def wait_until_ready(self) -> None:
        """Until both shell and iopub are connected, again."""

        def answers() -> bool:
            sent = self._send("kernel_info_request", {})
            try:
                while self.message(0.5)["parent_header"].get("msg_id") != sent:
                    pass
            except asyncio.TimeoutError:
                return False
            return True

        wait_until(answers, 60)

    def wait_until_seen_dead(self) -> None:
        """The server starts another one by itself, and says so."""
        while self.message()["content"].get("execution_state") not in ("restarting", "autorestarting"):
            pass

    def is_alive(self) -> bool:
        return any(kernel["id"] == self.id for kernel in self._server.ask("GET", "/api/kernels"))

    def close(self) -> None:
        self._server.ask("DELETE", f"/api/kernels/{self.id}")
        self.hang_up()

    def hang_up(self) -> None:
        async def hang_up() -> None:
            self._socket.close()
            while await self._reading() is not None:
                self._read = None

        self._loop.run_until_complete(hang_up())
        self._loop.close()


SECRET = "the server's own"


@pytest.fixture(scope="module")
def server(runtime_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose kernels are named "sandboxed", and have no network and little memory."""
    folder = tmp_path_factory.mktemp("server")
    for name, settings in {"sandboxed": LIMITED, "impossible": IMPOSSIBLE}.items():
        spec = {"argv": ARGV, "display_name": name, "language": "python", "metadata": metadata(settings)}
        (folder / "share" / "kernels" / name).mkdir(parents=True)
        (folder / "share" / "kernels" / name / "kernel.json").write_text(json.dumps(spec))
    server = Server(folder, {"JUPYTER_PATH": str(folder / "share"), "SECRET": SECRET})
    yield server
    server.end()


LIMITED: dict[str, object] = {
    "network_policy": "none",
    "disk": 64 * 1024**2,
    "env_vars": {"MEANT": "for it"},
    **({} if probe().cgroups["memory"] else {"memory": 256}),
}

IMPOSSIBLE: dict[str, object] = {"memory": 1}


@pytest.fixture(params=["blocking", "awaiting", "server"])
def tool(
    request: pytest.FixtureRequest,
    install_sandboxed: InstallSandboxed,
    monkeypatch: pytest.MonkeyPatch,
    runtime_folder: Path,
) -> Iterator[Tool]:
    """A running sandboxed kernel of each tool; when it has been shut down nothing of it is left."""
    there_before = sandbox_folders(runtime_folder)
    monkeypatch.setenv("SECRET", SECRET)
    tool: Tool
    if request.param == "server":
        tool = OnServer(request.getfixturevalue("server"), "sandboxed")
    else:
        tool = (Blocking if request.param == "blocking" else Awaiting)(install_sandboxed(**LIMITED))
    yield tool
    made = sandbox_folders(runtime_folder) - there_before
    assert len(made) == 1
    tool.close()
    assert not made & sandbox_folders(runtime_folder)


# What each tool does with it.


@needs_bubblewrap
@pytest.mark.slow
def test_code_has_a_machine_of_its_own_and_what_the_metadata_allow(tool: Tool, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.write_text("")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code = (
            "import json, os, shutil, socket\n"
            f"facts = [os.path.exists({str(hidden)!r}),\n"
            f" socket.socket().connect_ex(('127.0.0.1', {port})) == 0,\n"
            " os.getcwd(), os.environ.get('SECRET'), os.environ['MEANT'], 'JPY_SESSION_NAME' in os.environ,\n"
            " shutil.disk_usage('/').total <= 64 * 1024**2]\n"
            "print(json.dumps(facts))"
        )
        facts = json.loads(run(tool, code))

    assert facts == [False, False, "/workspace", None, "for it", False, True]


@needs_bubblewrap
@pytest.mark.slow
def test_code_is_interrupted(tool: Tool) -> None:
    kinds = []
    for kind, content in events(tool, f"print('begun', flush=True)\n{BUSY}"):
        if kind == "stream":
            tool.interrupt()
        kinds.append(content.get("ename", kind))

    assert "KeyboardInterrupt" in kinds
    assert run(tool, "print(6 * 7)") == "42\n"


@needs_bubblewrap
@pytest.mark.slow
def test_a_restart_keeps_the_files_and_the_connection_but_no_variable(tool: Tool) -> None:
    run(tool, "x = 1; open('kept', 'w').write('kept')")

    tool.restart()

    tool.wait_until_ready()
    assert run(tool, "print(open('kept').read())") == "kept\n"
    assert run(tool, "x").startswith("NameError")
    assert tool.is_alive()


@needs_bubblewrap
@pytest.mark.slow
def test_a_kernel_that_dies_is_noticed_and_another_one_takes_its_place(tool: Tool) -> None:
    run(tool, "open('kept', 'w').write('kept')")

    tool.send("import os; os._exit(7)")

    tool.wait_until_seen_dead()
    tool.wait_until_ready()
    assert run(tool, "print(open('kept').read())") == "kept\n"


@needs_memory_limit
@needs_bubblewrap
@pytest.mark.slow
def test_who_uses_up_the_memory_dies_and_the_log_says_why(
    install_sandboxed: InstallSandboxed, caplog: pytest.LogCaptureFixture
) -> None:
    tool = Blocking(install_sandboxed(**LIMITED))
    tool.manager.log.propagate = True

    with caplog.at_level(logging.ERROR):
        tool.send("x = bytearray(600 * 1024**2)")
        wait_until(lambda: not tool.is_alive())

    assert "the sandbox used up its memory of 256 MiB" in caplog.text
    assert isinstance(tool.manager.provisioner, SandboxProvisioner)
    assert asyncio.run(tool.manager.provisioner.poll()) == -signal.SIGKILL
    tool.close()


@needs_bubblewrap
@pytest.mark.slow
def test_a_notebook_is_executed_sandboxed(install_sandboxed: InstallSandboxed, tmp_path: Path) -> None:
    (tmp_path / "hidden").write_text("")
    cells = ["import os; x = 6", f"print(x * 7, os.path.exists({str(tmp_path / 'hidden')!r}))"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])

    NotebookClient(
        notebook, kernel_name=install_sandboxed(), resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    assert notebook.cells[1].outputs[0].text == "42 False\n"


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize(("code", "error"), [("1 / 0", CellExecutionError), ("exit_now()", DeadKernelError)])
def test_a_notebook_that_fails_says_so(
    install_sandboxed: InstallSandboxed, code: str, error: type[Exception]
) -> None:
    cells = [nbformat.v4.new_code_cell(f"import os; exit_now = lambda: os._exit(1)\n{code}")]

    with pytest.raises(error):
        NotebookClient(nbformat.v4.new_notebook(cells=cells), kernel_name=install_sandboxed()).execute()


@needs_bubblewrap
@pytest.mark.slow
def test_a_server_that_is_killed_leaves_nothing(tmp_path: Path, install_sandboxed: InstallSandboxed) -> None:
    name = install_sandboxed()
    folder = Path(tempfile.mkdtemp(prefix="cs"))
    server = Server(tmp_path, {"CODE_SANDBOXES_RUNTIME_DIR": str(folder)})
    OnServer(server, name).hang_up()
    assert len(sandbox_folders(folder)) == 1
    assert processes_of(folder)

    server.end(signal.SIGKILL)

    wait_until(lambda: not processes_of(folder))
    assert [path.name for path in folder.iterdir()] == ["keeper.log"]
    shutil.rmtree(folder)


@needs_bubblewrap
@pytest.mark.slow
def test_a_server_tells_why_the_kernel_of_a_notebook_cannot_be_started(server: Server) -> None:
    session = {"path": "x.ipynb", "type": "notebook", "name": "x", "kernel": {"name": "impossible"}}

    with pytest.raises(urllib.error.HTTPError) as failure:
        server.ask("POST", "/api/sessions", session)

    assert "memory must be from 64 MiB" in failure.value.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["landlock", "none"])
def test_less_than_bubblewrap_is_had_by_who_asks_for_it(
    isolation: Literal["landlock", "none"], install_sandboxed: InstallSandboxed, tmp_path: Path
) -> None:
    if why_not(isolation):
        pytest.skip(f"no {isolation}: {why_not(isolation)}")
    tool = Blocking(install_sandboxed(isolation=isolation), cwd=str(tmp_path))

    assert (run(tool, "import os; print(os.getcwd())") == f"{tmp_path}\n") == (isolation == "none")
    tool.restart()
    tool.wait_until_ready()
    assert run(tool, "print(6 * 7)") == "42\n"
    tool.close()


@needs_bubblewrap
@pytest.mark.slow
def test_nothing_that_waits_is_done_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = []

    def noted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            waiting.append(threading.get_ident())
            return function(*arguments, **options)

        return call

    async def start_and_end() -> None:
        provisioner = sandboxed()
        await provisioner.launch_kernel(**await provisioner.pre_launch())
        await provisioner.cleanup()

    monkeypatch.setattr(KeeperClient, "_ask_once", noted(KeeperClient._ask_once))
    monkeypatch.setattr(LocalJupyter, "__init__", noted(LocalJupyter.__init__))
    asyncio.run(start_and_end())

    assert len(waiting) >= 4
    assert threading.get_ident() not in waiting


# Another process takes over


@needs_bubblewrap
@pytest.mark.slow
def test_a_kernel_can_be_taken_over_when_its_server_has_ended(install_sandboxed: InstallSandboxed) -> None:
    name = install_sandboxed(detached=True, max_lifetime=600)
    program = (
        "import asyncio, json, os, sys; from jupyter_client.manager import KernelManager\n"
        f"manager = KernelManager(kernel_name={name!r}); manager.start_kernel()\n"
        "client = manager.client(); client.start_channels(); client.wait_for_ready(timeout=60)\n"
        "client.execute('x = 6 * 7', reply=True)\n"
        "info = asyncio.run(manager.provisioner.get_provisioner_info())\n"
        "info['connection_info']['key'] = info['connection_info']['key'].decode()\n"
        "print(json.dumps(info), flush=True); os._exit(0)"
    )
    server = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    info = json.loads(server.stdout)
    info["connection_info"]["key"] = info["connection_info"]["key"].encode()
    manager = KernelManager(kernel_name=name)
    manager._attempted_start, manager._launch_args = True, {}
    manager.provisioner = provisioner = sandboxed(detached=True, max_lifetime=600, parent=manager)

    asyncio.run(provisioner.load_provisioner_info(info))

    manager._reconcile_connection_info(provisioner.connection_info)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    assert client.execute("assert x == 42", reply=True)["content"]["status"] == "ok"
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=60)
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    with pytest.raises(SandboxNotFoundError):
        asyncio.run(sandboxed().load_provisioner_info(info))


@needs_bubblewrap
@pytest.mark.slow
def test_a_sandbox_that_has_ended_is_not_made_again(install_sandboxed: InstallSandboxed) -> None:
    tool = Blocking(install_sandboxed(max_lifetime=2))
    wait_until(lambda: not tool.is_alive())

    with pytest.raises(SandboxNotStartedError, match="reached its max_lifetime of 2 s; start another kernel"):
        tool.manager.restart_kernel()

    tool.close()


# What it is asked for, and cannot give


def sandboxed(**settings: Any) -> SandboxProvisioner:
    """A provisioner without a manager."""
    spec = KernelSpec(argv=ARGV, display_name="Sandboxed", language="python")
    return SandboxProvisioner(**{"kernel_id": "k", "kernel_spec": spec, "parent": None, **settings})


def test_a_setting_that_no_sandbox_has_is_refused() -> None:
    with pytest.raises(SandboxConfigurationError, match="'netwrk_policy', which no sandbox has"):
        sandboxed(netwrk_policy="none")


def test_a_setting_of_another_type_is_refused() -> None:
    with pytest.raises(SandboxConfigurationError, match=r"'memory' trait .* expected a float"):
        sandboxed(memory="512")


@needs_bubblewrap
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"network_policy": "nothing"}, "network_policy"),
        ({"memory": 1}, "memory must be from 64 MiB"),
        ({"mounts": {"/nonexistent": ["/x", "ro"]}}, "there is no /nonexistent on this machine"),
        ({"mounts": {"/usr": ["/x", "rx"]}}, 'and "ro" or "rw"'),
        ({"isolation": "chroot"}, "isolation takes 'auto', 'bubblewrap'"),
        ({"detached": True}, "needs max_lifetime or idle_timeout"),
    ],
)
def test_what_cannot_be_enforced_makes_the_start_fail(
    settings: dict[str, object], why: str, install_sandboxed: InstallSandboxed
) -> None:
    manager = KernelManager(kernel_name=install_sandboxed(**settings))

    with pytest.raises(SandboxConfigurationError, match=why):
        manager.start_kernel()

    assert not manager.has_kernel


def test_without_isolation_only_who_says_so_gets_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("code_sandboxes.provisioner.strongest", lambda: "none")

    with pytest.raises(SandboxConfigurationError, match="cannot be sandboxed on this machine"):
        asyncio.run(sandboxed().launch_kernel(ARGV))


@pytest.mark.parametrize("asked", [{"transport_encryption": "required"}, {"preexec_fn": print}])
def test_what_a_sandboxed_kernel_cannot_have_is_refused(asked: dict[str, object]) -> None:
    with pytest.raises(SandboxConfigurationError, match=f"a sandboxed kernel cannot .*{next(iter(asked))}"):
        asyncio.run(sandboxed().pre_launch(env={}, cwd="/", **asked))


def test_it_is_told_that_variables_do_not_arrive(caplog: pytest.LogCaptureFixture) -> None:
    provisioner = sandboxed(log=logging.getLogger("test"))

    asyncio.run(provisioner.pre_launch(env={**os.environ, "JPY_SESSION_NAME": "x", "MEANT": "x"}))

    assert [record.getMessage() for record in caplog.records] == [
        "the sandbox of kernel k does not get the variables that its start was given (MEANT):"
        " set them as env_vars"
    ]


# Where it starts


def test_a_folder_is_found_where_a_mount_shows_it(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "link").symlink_to(deep)
    real = Path(os.path.realpath(tmp_path))
    mounts = Mount(str(real), "/workspace"), Mount(str(real / "a"), "/a")
    plan = Plan("bubblewrap", mounts)

    assert seen_as(str(tmp_path), plan) == "/workspace"
    assert seen_as(str(tmp_path / "link"), plan) == "/a/b"
    assert seen_as(str(tmp_path.parent), plan) is None
    assert seen_as(f"{tmp_path}x", plan) is None
    assert seen_as(str(deep), Plan("none")) == str(deep)


@needs_bubblewrap
@pytest.mark.slow
def test_code_starts_in_the_folder_of_the_notebook_if_a_mount_shows_it(
    install_sandboxed: InstallSandboxed, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own only this user can enter
        Path(folder).chmod(0o755)
        (Path(folder) / "notebooks").mkdir(mode=0o755)
        tool = Blocking(
            install_sandboxed(mounts={folder: ["/project", "ro"]}), cwd=f"{folder}/notebooks", env={}
        )
        assert run(tool, "import os; print(os.getcwd())") == "/project/notebooks\n"
        tool.close()


# Kernelspecs


@pytest.mark.slow
def test_our_own_variant_runs_what_a_sandboxed_kernelspec_wraps(install_sandboxed: InstallSandboxed) -> None:
    name = install_sandboxed(network_policy="none")

    with Sandbox.create("local-jupyter", kernel_name=name, isolation="none") as sandbox:
        assert sandbox.run_code("6 * 7").text == "42"


@needs_bubblewrap
@pytest.mark.slow
def test_a_kernelspec_is_installed_listed_used_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    options = ["--network-policy", "none", "--pids", "64", "--mount", "/usr/share:/data/share:ro"]

    assert main(["kernelspec", "install", "--prefix", str(tmp_path), *options]) == 0

    assert "sandboxed-python3\nbubblewrap: files" in capsys.readouterr().out
    content = json.loads(next(tmp_path.rglob("kernel.json")).read_text())
    assert content["display_name"] == "Python 3 (sandboxed)"
    assert content["metadata"]["kernel_provisioner"]["config"] == {
        "isolation": "bubblewrap",
        "network_policy": "none",
        "pids": 64,
        "mounts": {"/usr/share": ["/data/share", "ro"]},
    }
    tool = Blocking("sandboxed-python3")
    assert run(tool, "import os; print(os.path.isdir('/data/share'))") == "True\n"
    tool.close()
    assert main(["kernelspec", "list"]) == 0
    assert "sandboxed-python3  Python 3 (sandboxed)" in capsys.readouterr().out
    assert main(["kernelspec", "remove", "sandboxed-python3"]) == 0
    assert not list(tmp_path.rglob("kernel.json"))
    assert main(["kernelspec", "remove", "sandboxed-python3"]) == 1
    assert "there is no sandboxed kernelspec 'sandboxed-python3'" in capsys.readouterr().err


@needs_bubblewrap
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--memory", "1"], "memory must be from 64 MiB"),
        (["--kernel", "none"], "no kernelspec 'none' on this machine"),
        (["--name", "python3"], "which is not sandboxed; choose another --name"),
        (["--mount", "/nonexistent:/x:ro"], "there is no /nonexistent on this machine"),
    ],
)
def test_what_cannot_be_run_here_is_not_installed(
    options: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kernelspec", "install", "--prefix", str(tmp_path), *options]) == 1

    assert why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--allow", "pypi.org"], ["--mount", "/usr"], ["--mount", "/a:/b:x"]])
def test_an_installation_that_makes_no_sense_is_wrong_usage(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["kernelspec", "install", *options])


def test_the_kernelspecs_of_others_are_not_ours() -> None:
    assert "python3" not in dict(kernelspec_command.installed())
