"""What every test shares: the sandbox on every variant, README.md's examples as tests, and a loud end.

A test that asks for ``sandbox`` runs once for each variant that ``--variant`` names (all by default) and that
can do what the test needs, and in a module that says ``EVERY_FRONT = True`` through each front. In a module
that says ``FAST_VARIANT = "..."`` the other variants are for the whole suite only. In one that says
``ISOLATED = True`` sandboxes are isolated where this machine can do that. One that says
``IN_A_CONTAINER = True`` is run on local-docker, too, one that says ``ON_A_SERVER = True`` on
jupyter-gateway, and one that says ``AT_DATALAYER = True`` on datalayer-runtime, against a service on this
machine; the others are only if ``--variant`` names that. Those have one front, and so have tests that take
their time. What cannot run here is skipped with its reason, and all reasons are told again at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import psutil
import pytest

from code_sandboxes import Capabilities, Sandbox, SandboxVariant
from code_sandboxes.isolation.probe import probe
from code_sandboxes.keeper import client
from tests.datalayer_service import DatalayerService, Knobs
from tests.fronts import FRONTS, create
from tests.server_fixtures import needs_server
from tests.servers import JupyterHub, JupyterServer

MakeSandbox = Callable[..., Sandbox]

# What jupyter-gateway can talk to: fixtures of tests/server_fixtures.py.
SERVERS = {
    "enterprise-gateway": "enterprise_gateway",
    "jupyter-server": "jupyter_server",
    "jupyterhub": "jupyter_hub",
    "kernel-gateway": "kernel_gateway",
}

# Variants whose kernels are on a server, and the fixtures of the settings that lead there.
SERVED: dict[str, str] = {
    SandboxVariant.JUPYTER_GATEWAY: "gateway",
    SandboxVariant.DATALAYER_RUNTIME: "datalayer",
}

# And what a module says that is run on them.
SAYS = {
    SandboxVariant.LOCAL_DOCKER: "IN_A_CONTAINER",
    SandboxVariant.JUPYTER_GATEWAY: "ON_A_SERVER",
    SandboxVariant.DATALAYER_RUNTIME: "AT_DATALAYER",
}

pytest_plugins = ["tests.server_fixtures"]

# What says that no isolation is intended, where a variant would have some, or warn that there is none.
UNISOLATED: dict[str, dict[str, object]] = {SandboxVariant.LOCAL_JUPYTER: {"isolation": "none"}}

REQUIRES_CONTAINERS = os.environ.get("CODE_SANDBOXES_REQUIRE_DOCKER") == "1"

# Goes on for a minute, and can be interrupted on every variant: it never waits for long.
BUSY = "for _ in range(6000): __import__('time').sleep(0.01)"

# The same, and waiting in the system where that can be interrupted.
BUSY_OR_WAITING = [
    pytest.param(BUSY, id="busy"),
    pytest.param("import time; time.sleep(60)", id="waiting", marks=pytest.mark.needs("interrupt_blocked")),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--variant", action="append", choices=list(SandboxVariant), help="only this variant; may be repeated"
    )
    parser.addoption(
        "--server", choices=sorted(SERVERS), default="jupyter-server", help="what jupyter-gateway talks to"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--variant") or _variants(metafunc.module)
        fast = getattr(metafunc.module, "FAST_VARIANT", None)
        slow = {
            str(v) for v in chosen if fast not in (None, v) and metafunc.config.getoption("--variant") is None
        }
        variants = [pytest.param(str(v), marks=_marks(v, str(v) in slow)) for v in chosen]
        metafunc.parametrize("variant", variants, scope="session")
    if "front" in metafunc.fixturenames:
        every = getattr(metafunc.module, "EVERY_FRONT", False)
        fronts: tuple[str, ...] = FRONTS if every is True else every or FRONTS[:1]
        if metafunc.definition.get_closest_marker("callbacks"):
            fronts = tuple(front for front in fronts if front != "iterator")
        # What takes its time is about kernels and their servers; how they are driven the quick ones show.
        if any(metafunc.definition.get_closest_marker(marker) for marker in ("one_front", "slow")):
            fronts = fronts[:1]
        # One front is enough for a first answer; the others are the whole suite's.
        marks = {front: () if front == FRONTS[0] else (pytest.mark.slow,) for front in fronts}
        metafunc.parametrize("front", [pytest.param(f, marks=marks[f]) for f in fronts], scope="session")


def _variants(module: object) -> list[SandboxVariant]:
    """Those that the tests of *module* are for, if nobody says otherwise."""
    left_out = {variant for variant, says in SAYS.items() if not getattr(module, says, False)}
    return [variant for variant in SandboxVariant if variant not in left_out]


@cache
def why_no_containers() -> str:
    """Why there are none on this machine; empty if there are."""
    return Sandbox.capabilities_of(SandboxVariant.LOCAL_DOCKER).own_process.reason


def _marks(variant: SandboxVariant | str, is_slow: bool) -> list[pytest.MarkDecorator]:
    # A container takes a second to start. What is special about it, or a server, has modules of its own.
    elsewhere = (SandboxVariant.LOCAL_DOCKER, *SERVED)
    marks = [pytest.mark.slow] if is_slow or variant in elsewhere else []
    if variant == SandboxVariant.LOCAL_DOCKER and (reason := why_no_containers()):
        marks.append(pytest.mark.skipif(not REQUIRES_CONTAINERS, reason=f"NO CONTAINERS: {reason}"))
    return marks


# Modules that look at all that the container engine has: no two of them at once.
_ABOUT_THE_ENGINE = {
    f"tests/test_{name}.py" for name in ("build_image", "container_snapshots", "distant_docker", "docker")
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """The tests of a module run in one process, one after the other, as they share sandboxes and servers."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]  # it has no types

    class ByModule(LoadFileScheduling):  # type: ignore[misc]  # nor has this
        def _split_scope(self, nodeid: str) -> str:
            module: str = super()._split_scope(nodeid)
            return "the engine" if module in _ABOUT_THE_ENGINE else module

    return ByModule(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a variant cannot do: ``@pytest.mark.needs("own_process", "languages.bash")``."""
    left_out = [item for item in items if not _can_run(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _can_run(item: pytest.Item) -> bool:
    needed = [name for marker in item.iter_markers("needs") for name in marker.args]
    callspec = getattr(item, "callspec", None)
    if callspec is None or "variant" not in callspec.params:
        return True
    if callspec.params["variant"] in SAYS and callspec.params.get("front", FRONTS[0]) != FRONTS[0]:
        return False  # to the fronts it is the same as local-jupyter
    if callspec.params["variant"] == SandboxVariant.LOCAL_DOCKER:
        is_left_out = (
            not getattr(getattr(item, "module", None), "IN_A_CONTAINER", False)
            or item.get_closest_marker("not_in_a_container") is not None
            or any(name.startswith("languages.") for name in needed)
        )
        return not is_left_out
    fixtures = getattr(item, "fixturenames", ())
    if callspec.params["variant"] in SERVED and (
        "install_kernel" in fixtures  # on this machine
        or "isolation" not in fixtures  # which is what leads to the server
        or item.get_closest_marker("not_on_a_server") is not None
    ):
        return False
    capabilities = Sandbox.capabilities_of(callspec.params["variant"])
    return all(_has(capabilities, name) for name in needed)


def _has(capabilities: Capabilities, name: str) -> bool:
    if name.startswith("languages."):
        return name.removeprefix("languages.") in capabilities.languages
    return bool(getattr(capabilities, name))


@pytest.fixture
def capabilities(variant: str) -> Capabilities:
    """What the variant can do."""
    return Sandbox.capabilities_of(variant)


# What would lead tests to the servers of whoever runs them.
_OF_WHO_RUNS_THEM = (
    *("CODE_SANDBOXES_VARIANT", "JUPYTER_GATEWAY_URL", "JUPYTER_TOKEN"),
    *("DATALAYER_API_KEY", "DATALAYER_RUN_URL", "DATALAYER_IAM_URL", "DATALAYER_RUNTIMES_URL"),
)


@pytest.fixture(scope="session", autouse=True)
def runtime_folder() -> Iterator[Path]:
    """A runtime folder for these tests alone; at the end nothing must be left but a log."""
    folder = Path(tempfile.mkdtemp(prefix="cs"))
    os.environ["CODE_SANDBOXES_RUNTIME_DIR"] = str(folder)
    for name in _OF_WHO_RUNS_THEM:
        os.environ.pop(name, None)
    yield folder
    assert sandbox_folders(folder) == set(), "sandboxes left something behind"
    client._LINGER = 0.0  # should somebody still be about to ask something
    client.the_keeper(folder).close()
    wait_until(lambda: [path.name for path in folder.iterdir()] in ([], ["keeper.log"]))
    shutil.rmtree(folder)


def sandbox_folders(runtime_folder: Path) -> set[Path]:
    """The folders of the sandboxes that there are; other things in it are their keeper's."""
    return {path for path in runtime_folder.glob("k*-*/*") if path.is_dir()}


def processes_of(runtime_folder: Path) -> list[psutil.Process]:
    """Those whose command line names the folder: its keeper, and every kernel in it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is none any more
            if any(str(runtime_folder) in argument for argument in process.cmdline()):
                found.append(process)
    return found


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def isolation(request: pytest.FixtureRequest, variant: str) -> dict[str, object]:
    """The setting that says which isolation the test's sandboxes have; nothing where there is no choice."""
    seen_from_here = request.node.get_closest_marker("from_this_machine") is not None
    is_isolated = getattr(request.module, "ISOLATED", False) and not seen_from_here
    if variant in SERVED:
        settings: dict[str, object] = request.getfixturevalue(SERVED[variant])
        return settings
    if variant == SandboxVariant.LOCAL_DOCKER and not is_isolated:
        shared = _shared_with_containers(request)
        return {"mounts": {shared: (shared, "rw")}, "user": f"{os.geteuid()}:{os.getegid()}"}
    if is_isolated and not probe().bubblewrap:
        return dict.fromkeys(UNISOLATED.get(variant, {}), "bubblewrap")
    return UNISOLATED.get(variant, {})


@pytest.fixture(scope="session")
def gateway(request: pytest.FixtureRequest) -> dict[str, object]:
    """The settings that lead jupyter-gateway to the server that ``--server`` names."""
    server = request.getfixturevalue(SERVERS[request.config.getoption("--server")])
    os.environ["JUPYTER_TOKEN"] = server.token  # for from_id(), in other programs too
    return {"server_url": _single_user_server(server) if isinstance(server, JupyterHub) else server.url}


def _single_user_server(hub: JupyterHub) -> str:
    """The URL of one that is started for all tests: each would take seconds to start another."""
    hub.user_token("tests")
    hub.request("POST", "/hub/api/users/tests/server").raise_for_status()
    wait_until(lambda: hub.request("GET", "/hub/api/users/tests").json()["servers"][""]["ready"], 60)
    return f"{hub.url}/user/tests"


@pytest.fixture(scope="module")
def datalayer() -> Iterator[dict[str, object]]:
    """The settings that lead datalayer-runtime to a service on this machine."""
    # What has few credits ends early, and tests take their time.
    knobs = Knobs(credits=1e9, quota=1000)
    with DatalayerService(knobs) as service, pytest.MonkeyPatch.context() as monkeypatch:
        # In the environment for from_id(), in other programs too; and by default all is as it was.
        monkeypatch.setenv("DATALAYER_RUN_URL", service.url)
        monkeypatch.setenv("DATALAYER_API_KEY", service.api_key)
        monkeypatch.setenv("CODE_SANDBOXES_VARIANT", SandboxVariant.LOCAL_JUPYTER)
        yield {}


def _shared_with_containers(request: pytest.FixtureRequest) -> str:
    """The folder in which all temporary ones of tests are: a container sees it at the same place."""
    factory: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
    folder = factory.getbasetemp()
    folder.chmod(0o777)  # nobody else can enter what it is in
    if "tmp_path" in request.fixturenames:
        path: Path = request.getfixturevalue("tmp_path")
        path.chmod(0o777)
    return str(folder)


@pytest.fixture
def make_sandbox(variant: str, front: str, isolation: dict[str, object]) -> Iterator[MakeSandbox]:
    """Makes running sandboxes, which end with the test."""
    made: list[Sandbox] = []

    def make(**settings: object) -> Sandbox:
        sandbox = create(front, variant, **{**isolation, **settings})
        made.append(sandbox)
        return sandbox

    yield make
    for sandbox in made:
        sandbox.kill()


@pytest.fixture
def sandbox(make_sandbox: MakeSandbox) -> Sandbox:
    """A sandbox that the test may ruin."""
    return make_sandbox()


@pytest.fixture(scope="module")
def shared_sandboxes(
    request: pytest.FixtureRequest, variant: str, front: str, runtime_folder: Path
) -> Iterator[dict[object, Sandbox]]:
    """By isolation; gone before those of another variant or front come, and at the end of the module."""
    if variant in SERVED:
        request.getfixturevalue(SERVED[variant])  # it has to be there when they end
    made: dict[object, Sandbox] = {}
    yield made
    for sandbox in made.values():
        sandbox.kill()


@pytest.fixture
def shared_sandbox(
    variant: str, front: str, isolation: dict[str, object], shared_sandboxes: dict[object, Sandbox]
) -> Sandbox:
    """A sandbox for tests that leave no trace in it."""
    kind = json.dumps(isolation, sort_keys=True)
    if kind not in shared_sandboxes:
        shared_sandboxes[kind] = create(front, variant, **isolation)
    return shared_sandboxes[kind]


@pytest.fixture
def install_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Installs a kernelspec for one test: ``install_kernel(name, argv, **more)`` returns its name."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))

    def install(name: str, argv: list[str], **more: object) -> str:
        folder = tmp_path / "kernels" / name
        folder.mkdir(parents=True)
        spec = {"argv": argv, "display_name": name, "language": name} | more
        (folder / "kernel.json").write_text(json.dumps(spec))
        return name

    return install


@pytest.fixture
def broken_kernel(install_kernel: Callable[..., str]) -> str:
    """A kernel that dies at start, and says why."""
    program = "import sys; print('no luck', file=sys.stderr); sys.exit(7)"
    return install_kernel("broken", [sys.executable, "-c", program, "{connection_file}"])


# README.md


class ReadmeExample(pytest.Item):
    """One ``python`` block of README.md, run as it stands."""

    def __init__(self, *, code: str, line: int, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]  # pytest's own keywords
        self._code = code
        self._line = line
        self.add_marker(pytest.mark.filterwarnings("ignore::code_sandboxes.SandboxIsolationWarning"))

    def runtest(self) -> None:
        if '"local-docker"' in self._code and why_no_containers() and not REQUIRES_CONTAINERS:
            pytest.skip(f"NO CONTAINERS: {why_no_containers()}")
        before = Path.cwd()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.ExitStack() as running,
            pytest.MonkeyPatch.context() as monkeypatch,
        ):
            monkeypatch.setenv("CODE_SANDBOXES_SNAPSHOTS", f"{folder}/snapshots")
            if '"jupyter-gateway"' in self._code:
                needs_server(JupyterServer)
                server = running.enter_context(JupyterServer(Path(folder, "server")))
                monkeypatch.setenv("JUPYTER_GATEWAY_URL", server.url)
                monkeypatch.setenv("JUPYTER_TOKEN", server.token)
            if '"datalayer-runtime"' in self._code:
                service = running.enter_context(DatalayerService())
                monkeypatch.setenv("DATALAYER_RUN_URL", service.url)
                monkeypatch.setenv("DATALAYER_API_KEY", service.api_key)
            os.chdir(folder)
            try:
                exec(
                    compile("\n" * (self._line - 1) + self._code, str(self.path), "exec"),
                    {"__name__": "readme"},
                )
            finally:
                os.chdir(before)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self._line, self.name


class ReadmeFile(pytest.File):
    def collect(self) -> Iterator[ReadmeExample]:
        text = self.path.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, block.start(1)) + 1
            yield ReadmeExample.from_parent(self, name=f"line {line}", code=block[1], line=line)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> ReadmeFile | None:
    if file_path.name == "README.md" and file_path.parent == parent.config.rootpath:
        return ReadmeFile.from_parent(parent, path=file_path)
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    if not skipped:
        return
    terminalreporter.section("NOT RUN ON THIS MACHINE", sep="!", red=True)
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        terminalreporter.write_line(f"{report.nodeid}: {reason}")


def open_descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))
