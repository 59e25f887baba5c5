"""jupyter-gateway: which server, whose kernel, what it refuses. That it does what all variants do is tested
with them; what becomes of it when something breaks, in test_gateway_faults.py."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from code_sandboxes import (
    Sandbox,
    SandboxAuthenticationError,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxNotFoundError,
)
from code_sandboxes.remote.rest import Place
from code_sandboxes.remote.server import KernelSpec
from code_sandboxes.variants.gateway import limits_of
from code_sandboxes.variants.remote_guards import guards
from conftest import wait_until
from tests.server_fixtures import running
from tests.servers import EnterpriseGateway, JupyterHub, JupyterServer, KernelGateway, Server

SOMEWHERE = "http://127.0.0.1:9"  # nobody listens there


@contextmanager
def on(server: Server, **settings: Any) -> Iterator[Sandbox]:
    with Sandbox.create("jupyter-gateway", server_url=server.url, token=server.token, **settings) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def jupyter_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """One of its own, on which no other module has kernels."""
    with running(JupyterServer, tmp_path_factory, "own") as server:
        yield server


def kernels_of(server: Server) -> list[str]:
    return [kernel["id"] for kernel in server.request("GET", "/api/kernels").json()]


# What is refused before anything is asked.


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://host", "begins with http://"),
        ("host:8888", "begins with http://"),
        ("", "needs server_url="),
        ("http://", "begins with http://"),
        ("http://host:port", "must be a URL"),
        ("http://user:word@host/", "given with token="),
        ("http://host/?token=sesame", "given with token="),
        ("http://host/#sesame", "given with token="),
    ],
)
def test_what_is_no_address_of_a_server_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str, why: str
) -> None:
    monkeypatch.delenv("JUPYTER_GATEWAY_URL", raising=False)
    with pytest.raises(SandboxConfigurationError, match=why) as error:
        Sandbox.create("jupyter-gateway", server_url=url)
    assert "sesame" not in str(error.value)
    assert "word" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"network_policy": "none"}, "server's business"),
        ({"network_policy": "allowlist", "allowed_hosts": ["a.org"]}, "server's business"),
        ({"gpu": "T4"}, "server's business"),
        ({"config": SandboxConfig(idle_timeout=5)}, "server's business"),
        ({"environment": "python-cpu-env"}, "kernel_name="),
        ({"kernel_id": "a", "kernel_name": "b"}, "there already"),
        ({"kernel_id": "../../x"}, "id of a kernel"),
        ({"hub_url": SOMEWHERE}, "together with server_url="),
        ({"max_output": 0}, "max_output"),
    ],
)
def test_what_a_server_cannot_be_made_to_do_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(SandboxConfigurationError, match=why):
        Sandbox.create("jupyter-gateway", server_url=SOMEWHERE, **settings)


def test_an_unknown_option_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(TypeError, match="known: hub_url, kernel_id, kernel_name"):
        Sandbox.create("jupyter-gateway", server_url=SOMEWHERE, url="x")


def test_a_server_that_is_not_there_is_told_soon() -> None:
    with pytest.raises(SandboxConnectionError, match=f"{SOMEWHERE} did not answer: .*refused"):
        Sandbox.create("jupyter-gateway", server_url=SOMEWHERE)


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("http://Host:80/", "http://host"),
        ("https://host:443/base/", "https://host/base"),
        ("http://[::1]:8888", "http://[::1]:8888"),
        ("http+unix://%2Ftmp%2Fsocket/base", "http+unix://%2Ftmp%2Fsocket/base"),
    ],
)
def test_the_same_place_has_the_same_name(url: str, same: str) -> None:
    assert Place(url, "server_url").url == same


def test_limits_are_told_an_enterprise_gateway_that_has_containers() -> None:
    proxy = "enterprise_gateway.services.processproxies.k8s.KubernetesProcessProxy"
    assert KernelSpec("a", "python", {"process_proxy": {"class_name": proxy}}).limits_resources
    assert not KernelSpec(
        "a", "python", {"process_proxy": {"class_name": "LocalProcessProxy"}}
    ).limits_resources
    assert not KernelSpec("a", "python").limits_resources
    assert limits_of(SandboxConfig(memory_limit=2**30, cpu_limit=1.5)) == {
        "KERNEL_MEMORY": "1073741824",
        "KERNEL_MEMORY_LIMIT": "1073741824",
        "KERNEL_CPUS": "1.5",
        "KERNEL_CPUS_LIMIT": "1.5",
    }


# On real servers.


@pytest.mark.slow
@pytest.mark.parametrize(
    "fixture", ["jupyter_server", "jupyter_server_on_socket", "jupyter_server_with_base_url"]
)
def test_its_kernels_end_with_it_and_its_id_tells_where_it_is(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    server: JupyterServer = request.getfixturevalue(fixture)
    with on(server, env={"GIVEN": "1"}) as sandbox:
        (kernel,) = kernels_of(server)
        assert sandbox.id == f"jupyter-gateway:{server.url}#{kernel}"
        other = sandbox.create_context("other", env={"GIVEN": "2"}, cwd=str(server.home))
        code = "import os; os.environ['GIVEN'], os.getcwd()"
        assert sandbox.run_code("import os; os.environ['GIVEN']").text == "'1'"
        assert sandbox.run_code(code, context=other).text == repr(("2", str(server.home)))
        assert len(kernels_of(server)) == 2
        assert sandbox.info.metadata["server_url"] == server.url
        sandbox.delete_context(other)
        assert kernels_of(server) == [kernel]
    assert kernels_of(server) == []


@pytest.mark.slow
def test_the_environment_says_where_the_server_is(
    jupyter_server: JupyterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_GATEWAY_URL", jupyter_server.url + "/")
    monkeypatch.setenv("JUPYTER_TOKEN", jupyter_server.token)
    with Sandbox.create("jupyter-gateway") as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "sesame"])
@pytest.mark.parametrize("fixture", ["jupyter_server", "kernel_gateway", "enterprise_gateway"])
def test_a_token_that_is_missing_or_wrong_is_told(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fixture: str, token: str | None
) -> None:
    monkeypatch.delenv("JUPYTER_TOKEN", raising=False)
    why = "does not take this token" if token else "wants a token, and none was given"
    with pytest.raises(SandboxAuthenticationError, match=why) as error:
        Sandbox.create("jupyter-gateway", server_url=request.getfixturevalue(fixture).url, token=token)
    assert "sesame" not in str(error.value)


@pytest.mark.slow
def test_an_unknown_kernelspec_is_told_with_those_that_there_are(jupyter_server: JupyterServer) -> None:
    with (
        pytest.raises(SandboxConfigurationError, match=r"'cobol' .*\(installed: python3\)"),
        on(jupyter_server, kernel_name="cobol"),
    ):
        pass
    assert kernels_of(jupyter_server) == []


@pytest.mark.slow
def test_a_working_directory_that_is_not_there_is_told_and_nothing_is_left(
    jupyter_server: JupyterServer,
) -> None:
    with (
        pytest.raises(SandboxConnectionError, match=r"set up: FileNotFoundError: .*'/nowhere'"),
        on(jupyter_server, config=SandboxConfig(working_dir="/nowhere")),
    ):
        pass
    assert kernels_of(jupyter_server) == []


@pytest.mark.slow
def test_limits_that_the_server_does_not_know_are_refused(
    jupyter_server: JupyterServer, enterprise_gateway: EnterpriseGateway
) -> None:
    for server in (jupyter_server, enterprise_gateway):
        with (
            pytest.raises(SandboxConfigurationError, match=r"limit the memory .*Kubernetes"),
            on(server, memory=512),
        ):
            pass


@pytest.mark.slow
def test_a_kernel_that_it_was_given_is_used_and_not_ended(jupyter_server: JupyterServer) -> None:
    kernel = jupyter_server.request("POST", "/api/kernels", {"name": "python3"}).json()["id"]
    try:
        with on(jupyter_server, kernel_id=kernel) as sandbox:
            sandbox.run_code("kept = 1")
            assert sandbox.create_context("other").name == "other"
        assert kernels_of(jupyter_server) == [kernel]
        with on(jupyter_server, kernel_id=kernel) as sandbox:
            assert sandbox.run_code("kept").text == "1"
    finally:
        jupyter_server.request("DELETE", f"/api/kernels/{kernel}")
    with pytest.raises(SandboxNotFoundError, match=kernel), on(jupyter_server, kernel_id=kernel):
        pass
    assert kernels_of(jupyter_server) == []


FIND = """
import os, sys
from code_sandboxes import Sandbox
sandbox = Sandbox.from_id(sys.argv[1])
print(sandbox.run_code("kept").text, sandbox.files.read("file"), end="")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["jupyter_server", "kernel_gateway"])
def test_another_program_finds_it_by_its_id_and_leaves_it_as_it_ends(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fixture: str
) -> None:
    server: Server = request.getfixturevalue(fixture)
    monkeypatch.setenv("JUPYTER_TOKEN", server.token)
    with on(server) as sandbox:
        sandbox.run_code("kept = 'yes'; open('file', 'w').write('content')")
        found = subprocess.run(
            [sys.executable, "-c", FIND, sandbox.id], capture_output=True, text=True, timeout=60
        )
        assert (found.stdout, found.stderr) == ("'yes' content", "")
        assert sandbox.run_code("kept").text == "'yes'"
        assert pickle.loads(pickle.dumps(sandbox))._core is sandbox._core
        wanted = sandbox.id
    with pytest.raises(SandboxNotFoundError):
        Sandbox.from_id(wanted)


@pytest.mark.slow
def test_one_that_is_detached_goes_on(jupyter_server: JupyterServer) -> None:
    with on(jupyter_server) as sandbox:
        sandbox.run_code("kept = 1")
        sandbox.detach()
    found = Sandbox.from_id(sandbox.id, token=jupyter_server.token)
    assert found.run_code("kept").text == "1"
    assert found.info.created_at is None  # the server does not know
    found.terminate()
    assert kernels_of(jupyter_server) == []


# It is killed before it can end what it has.

KILLED = """
import json, os, signal, sys
from code_sandboxes import Sandbox
sandbox = Sandbox.create("jupyter-gateway", **json.loads(sys.argv[1]))
sandbox.create_context("other")
print(json.dumps([sandbox.id, *sandbox.info.metadata["kernel_ids"]]), flush=True)
if sys.argv[2] == "detached":
    sandbox.detach()
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_with(settings: dict[str, str], token: str, how: str = "") -> list[str]:
    """The id of the sandbox of a program that was killed, and those of its two kernels."""
    program = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(settings), how],
        env={**os.environ, "JUPYTER_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (program.returncode, program.stderr) == (-signal.SIGKILL, "")
    ids: list[str] = json.loads(program.stdout)
    assert len(ids) == 3
    return ids


def is_there(server: Server, kernel_id: str) -> bool:
    return server.request("GET", f"/api/kernels/{kernel_id}").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "fixture", ["jupyter_server", "jupyter_server_on_socket", "kernel_gateway", "enterprise_gateway"]
)
def test_its_program_is_killed_and_its_kernels_end(request: pytest.FixtureRequest, fixture: str) -> None:
    server: Server = request.getfixturevalue(fixture)
    _, *kernels = killed_with({"server_url": server.url}, server.token)
    wait_until(lambda: not any(is_there(server, kernel) for kernel in kernels))


@pytest.mark.slow
def test_its_program_is_killed_and_the_server_of_the_hub_ends(jupyter_hub: JupyterHub) -> None:
    token = jupyter_hub.user_token("grace")
    killed_with({"hub_url": jupyter_hub.url}, token)
    wait_until(lambda: jupyter_hub.request("GET", "/hub/api/users/grace").json()["servers"] == {})


@pytest.mark.slow
def test_its_program_is_killed_and_what_is_not_its_own_goes_on(jupyter_server: JupyterServer) -> None:
    given = jupyter_server.request("POST", "/api/kernels", {"name": "python3"}).json()["id"]
    url = jupyter_server.url
    detached, *kernels = killed_with({"server_url": url}, jupyter_server.token, "detached")
    _, _, own = killed_with({"server_url": url, "kernel_id": given}, jupyter_server.token)
    wait_until(lambda: not is_there(jupyter_server, own))
    assert set(kernels_of(jupyter_server)) == {given, *kernels}
    Sandbox.from_id(detached, token=jupyter_server.token).terminate()
    for kernel in (given, kernels[1]):
        jupyter_server.request("DELETE", f"/api/kernels/{kernel}")
    assert kernels_of(jupyter_server) == []


@pytest.mark.parametrize(
    "wrong", ["jupyter-gateway:", "jupyter-gateway:http://127.0.0.1:9", "jupyter-gateway:x#y"]
)
def test_what_is_no_id_is_not_found(wrong: str) -> None:
    with pytest.raises((SandboxNotFoundError, SandboxConfigurationError)):
        Sandbox.from_id(wrong)


# Servers of a Hub.


@pytest.mark.slow
def test_a_server_of_a_hub_is_started_for_it_and_ends_with_it(jupyter_hub: JupyterHub) -> None:
    token = jupyter_hub.user_token("ada")

    def servers() -> list[str]:
        return list(jupyter_hub.request("GET", "/hub/api/users/ada").json()["servers"])

    with Sandbox.create("jupyter-gateway", hub_url=jupyter_hub.url, token=token) as sandbox:
        (name,) = servers()
        assert name.startswith("code-sandboxes-")
        assert sandbox.run_code("kept = 6 * 7; kept").text == "42"
        sandbox.detach()
    found = Sandbox.from_id(sandbox.id, token=token)
    assert found.run_code("kept").text == "42"
    found.terminate()
    assert servers() == []


@pytest.mark.slow
def test_a_token_that_is_nobodys_has_to_say_whose_server_it_means(jupyter_hub: JupyterHub) -> None:
    with pytest.raises(SandboxConfigurationError, match="ends in /user/NAME"):
        Sandbox.create("jupyter-gateway", hub_url=jupyter_hub.url, token=jupyter_hub.token)


@pytest.mark.slow
def test_a_hub_without_named_servers_says_what_to_do(
    new_jupyter_hub: Callable[..., JupyterHub],
) -> None:
    hub = new_jupyter_hub(settings={"JupyterHub.allow_named_servers": False})
    before = set(guards._guarded)
    token = hub.user_token("ada")
    with pytest.raises(SandboxConfigurationError, match=r"no named servers .*server_url="):
        Sandbox.create("jupyter-gateway", hub_url=hub.url, token=token)
    with pytest.raises(SandboxAuthenticationError):
        Sandbox.create("jupyter-gateway", hub_url=hub.url, token="sesame")
    assert guards._guarded <= before  # nothing has come of it that could be left


# The suite, in short, on the other servers; ``pytest --variant jupyter-gateway --server ...`` is all of it.


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["kernel_gateway", "enterprise_gateway"])
def test_a_gateway_does_all_that_a_server_does(request: pytest.FixtureRequest, fixture: str) -> None:
    server: KernelGateway = request.getfixturevalue(fixture)
    lines: list[str] = []
    with on(server, env={"GIVEN": "1"}) as sandbox:
        result = sandbox.run_code(
            "import os\nfor i in range(3): print(i)\nos.environ['GIVEN']",
            on_stdout=lambda m: lines.append(m.line),
        )
        assert (result.text, lines) == ("'1'", ["0", "1", "2"])
        late = sandbox.run_code("while True: pass", timeout=0.5)
        assert (late.status, late.state_preserved) == ("timed_out", True)
        content = os.urandom(3_000_000)
        sandbox.files.write_bytes("big", content)
        assert sandbox.files.read_bytes("big") == content
        assert sandbox.commands.run("echo $GIVEN").stdout == "1\n"
        sandbox.set_variable("given", {"a": [1, 2.5, None]})
        assert sandbox.get_variable("given") == {"a": [1, 2.5, None]}
        died = sandbox.run_code("os._exit(1)")
        assert (died.status, died.state_preserved) == ("kernel_died", False)
        assert sandbox.run_code("'given' in globals()").text == "False"
