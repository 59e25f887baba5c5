"""The Jupyter Server of a container: there when somebody asks for it, and not before."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

import pytest
import websocket

from code_sandboxes import Sandbox
from conftest import wait_until
from tests.isolation.needs import IN_CONTAINERS
from tests.servers.channels import printed

pytestmark = IN_CONTAINERS


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox.create("local-docker", network_policy="none") as sandbox:
        yield sandbox


def connect(sandbox: Sandbox) -> socket.socket:
    url = str(sandbox.info.metadata["jupyter_server"])
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    try:
        connection.connect(unquote(url.removeprefix("http+unix://")))
    except OSError:
        connection.close()
        raise
    return connection


def kernels(sandbox: Sandbox) -> list[str]:
    """The ids of those that the server tells."""
    with closing(http.client.HTTPConnection("localhost")) as asking:
        asking.sock = connect(sandbox)
        asking.request("GET", "/api/kernels")
        answer = asking.getresponse()
        assert answer.status == 200
        return [kernel["id"] for kernel in json.loads(answer.read())]


def run(sandbox: Sandbox, kernel: str, code: str) -> str:
    """What *code* prints, run through the server."""
    session = secrets.token_hex(16)
    channels = websocket.create_connection(
        f"ws://localhost/api/kernels/{kernel}/channels?session_id={session}", socket=connect(sandbox)
    )
    with closing(channels):
        return printed(channels, code, session)


def test_its_kernels_are_the_contexts(sandbox: Sandbox) -> None:
    sandbox.run_code("x = 41")
    (kernel,) = kernels(sandbox)
    assert run(sandbox, kernel, "x += 1; print(x)") == "42\n"
    assert sandbox.run_code("x").text == "42"
    context = sandbox.create_context()
    both = kernels(sandbox)
    assert len(both) == 2
    (added,) = {*both} - {kernel}
    assert run(sandbox, added, "print('x' in globals())") == "False\n"
    sandbox.delete_context(context)
    assert kernels(sandbox) == [kernel]


def test_it_begins_again_after_its_end(sandbox: Sandbox) -> None:
    assert len(kernels(sandbox)) == 1
    ended = sandbox.run_code(
        "import glob, os\n"
        "for path in glob.glob('/proc/[0-9]*/cmdline'):\n"
        "    if b'jupyter_server' in open(path, 'rb').read():\n"
        "        os.kill(int(path.split('/')[2]), 9); print('ended')"
    )
    assert ended.stdout == "ended"
    # Who connects in the moment between is hung up on.
    for _ in range(20):
        try:
            assert len(kernels(sandbox)) == 1
            break
        except ConnectionError:
            continue
    else:
        pytest.fail("it did not begin again")
    assert sandbox.run_code("1 + 1").text == "2"


def test_code_does_not_see_how_its_kernels_are_reached_until_somebody_asks(sandbox: Sandbox) -> None:
    look = (
        "import os, pathlib\n"
        "def told(path):\n"
        "    try: return len(path.read_text() if path.suffix else os.listdir(path)) > 0\n"
        "    except OSError as error: return type(error).__name__\n"
        "host = pathlib.Path('/opt/code-sandboxes/host')\n"
        "sorted({str(told(path)) for path in host.iterdir()})"
    )
    assert sandbox.run_code(look).text == "['PermissionError']"
    assert len(kernels(sandbox)) == 1
    # The keys of its own kernels; which folders have what, it still does not learn.
    assert sandbox.run_code(look).text == "['PermissionError', 'True']"
    assert "Error" in str(sandbox.run_code("open('/opt/code-sandboxes/host/x', 'w')").error)


def test_it_is_of_no_other_user_and_goes_with_the_sandbox(sandbox: Sandbox) -> None:
    url = sandbox.info.metadata["jupyter_server"]
    assert url
    path = Path(unquote(str(url).removeprefix("http+unix://")))
    assert path.is_socket()
    with connect(sandbox) as connection:
        sandbox.terminate()
        assert connection.recv(1) == b""
    assert not path.exists()


def test_code_in_the_place_of_the_server_harms_nobody_else(sandbox: Sandbox) -> None:
    # As it is looked for first, and does with its socket what it likes.
    sandbox.files.write(
        "/home/sandbox/.local/bin/python3",
        "#!/opt/sandbox/bin/python3\nimport os, socket\n"
        "s = socket.socket(socket.AF_UNIX)\ns.bind('/tmp/code-sandboxes-jupyter')\ns.listen()\n"
        "s.shutdown(socket.SHUT_RDWR)\nopen('/tmp/began', 'a').write('x')\n",
    )
    sandbox.commands.run("chmod +x /home/sandbox/.local/bin/python3", check=True)
    with connect(sandbox) as connection:
        wait_until(lambda: sandbox.files.exists("/tmp/began"))
        with Sandbox.create("local-jupyter", network_policy="none") as other:
            assert other.run_code("1 + 1").text == "2"
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert sandbox.run_code("1 + 1").text == "2"
    assert len(sandbox.files.read("/tmp/began")) <= 3


def test_nothing_begins_in_one_that_is_paused(sandbox: Sandbox) -> None:
    sandbox.pause()
    with connect(sandbox):
        with Sandbox.create("local-jupyter", network_policy="none") as other:
            assert other.run_code("1 + 1").text == "2"
        sandbox.resume()
        assert len(kernels(sandbox)) == 1
