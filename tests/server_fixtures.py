"""Fixtures that start real servers, once for all tests or for one; where they cannot be had, that is told.

A plugin: ``pytest_plugins = ["tests.server_fixtures"]``. What the tests of a run ask for is installed before
the first of them, as an installation may take longer than a test is given.

With ``CODE_SANDBOXES_REQUIRE_SERVERS=1`` a server that is not to be had is a failure; else its tests are
skipped, and pytest's summary at the end says so.

PYTEST_DONT_REWRITE: nothing is asserted here, and a test may import this before it is known as a plugin.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.servers import (
    EnterpriseGateway,
    JupyterHub,
    JupyterServer,
    KernelGateway,
    NotInstalledError,
    Server,
)

__all__ = [
    "REQUIRED",
    "enterprise_gateway",
    "jupyter_hub",
    "jupyter_server",
    "jupyter_server_on_socket",
    "jupyter_server_with_base_url",
    "kernel_gateway",
    "needs_server",
    "new_enterprise_gateway",
    "new_jupyter_hub",
    "new_jupyter_server",
    "new_kernel_gateway",
    "running",
]

REQUIRED = "CODE_SANDBOXES_REQUIRE_SERVERS"
"""The environment variable that says that no server may be missing."""

S = TypeVar("S", bound=Server)

# By the names of the fixtures.
_SERVERS: dict[str, type[Server]] = {
    "jupyter_server": JupyterServer,
    "jupyter_server_on_socket": JupyterServer,
    "jupyter_server_with_base_url": JupyterServer,
    "kernel_gateway": KernelGateway,
    "enterprise_gateway": EnterpriseGateway,
    "jupyter_hub": JupyterHub,
    "new_jupyter_server": JupyterServer,
    "new_kernel_gateway": KernelGateway,
    "new_enterprise_gateway": EnterpriseGateway,
    "new_jupyter_hub": JupyterHub,
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Install what the tests will ask for."""
    if session.testsfailed or session.config.option.collectonly:
        return
    names = {name for item in session.items for name in _names(item)}
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    kinds = [kind for name, kind in _SERVERS.items() if name in names]
    for installation in dict.fromkeys(each for kind in kinds for each in kind.installations):
        if not installation.is_there():
            if reporter is not None:
                reporter.write_line(f"installing {installation}")
            with suppress(NotInstalledError):  # the tests that ask for it will say so
                installation.folder()


def _names(item: pytest.Item) -> Iterator[str]:
    """What may be the name of a fixture: tests ask for one by ``request.getfixturevalue(...)``, too."""
    yield from getattr(item, "fixturenames", ())
    callspec = getattr(item, "callspec", None)
    if callspec is not None:
        # By its type: a value may be something that does not like to be asked for its class.
        yield from (value for value in callspec.params.values() if type(value) is str)


def needs_server(kind: type[Server]) -> None:
    """Skip the present test where there is none, or fail it if there must be."""
    try:
        for installation in kind.installations:
            installation.folder()
    except NotInstalledError as error:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"no {kind.__name__}: {error} (and {REQUIRED} is 1)")
        pytest.skip(f"NO SERVER: no {kind.__name__}: {error}")


@contextmanager
def running(
    kind: type[S], tmp_path_factory: pytest.TempPathFactory, name: str, **settings: Any
) -> Iterator[S]:
    """A server of that kind, in a folder of that name."""
    needs_server(kind)
    with kind(tmp_path_factory.mktemp(name), **settings) as server:
        yield server


# One for all tests that leave nothing in it.


@pytest.fixture(scope="session")
def jupyter_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    with running(JupyterServer, tmp_path_factory, "jupyter") as server:
        yield server


@pytest.fixture(scope="session")
def jupyter_server_on_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    with running(JupyterServer, tmp_path_factory, "unix", unix=True) as server:
        yield server


@pytest.fixture(scope="session")
def jupyter_server_with_base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    with running(JupyterServer, tmp_path_factory, "based", base_url="/some/where") as server:
        yield server


@pytest.fixture(scope="session")
def kernel_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelGateway]:
    with running(KernelGateway, tmp_path_factory, "gateway") as server:
        yield server


@pytest.fixture(scope="session")
def enterprise_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnterpriseGateway]:
    with running(EnterpriseGateway, tmp_path_factory, "enterprise") as server:
        yield server


@pytest.fixture(scope="session")
def jupyter_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterHub]:
    with running(JupyterHub, tmp_path_factory, "hub") as server:
        yield server


# As many as one test wants for itself: ``new_jupyter_server(settings={...})`` is one that runs.


@pytest.fixture
def new_jupyter_server(tmp_path: Path) -> Iterator[Callable[..., JupyterServer]]:
    with _new(JupyterServer, tmp_path) as new:
        yield new


@pytest.fixture
def new_kernel_gateway(tmp_path: Path) -> Iterator[Callable[..., KernelGateway]]:
    with _new(KernelGateway, tmp_path) as new:
        yield new


@pytest.fixture
def new_enterprise_gateway(tmp_path: Path) -> Iterator[Callable[..., EnterpriseGateway]]:
    with _new(EnterpriseGateway, tmp_path) as new:
        yield new


@pytest.fixture
def new_jupyter_hub(tmp_path: Path) -> Iterator[Callable[..., JupyterHub]]:
    with _new(JupyterHub, tmp_path) as new:
        yield new


@contextmanager
def _new(kind: type[S], folder: Path) -> Iterator[Callable[..., S]]:
    needs_server(kind)
    with ExitStack() as started:

        def new(**options: object) -> S:
            place = folder / f"s{len(list(folder.glob('s*')))}"
            place.mkdir()
            server = kind(place, **options)  # type: ignore[arg-type]  # the kind's own options
            started.callback(server.stop)
            return server.start()

        yield new
