"""``python -m code_sandboxes build-image``, and what it says where there is no engine to build with."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import sys
import tarfile
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest

from code_sandboxes import SandboxConfigurationError, SandboxConnectionError, SandboxError
from code_sandboxes.__main__ import main
from code_sandboxes.build_image import RECIPE, context_files, narrate, packed, recipe_folder
from code_sandboxes.isolation.engine import connect, told

if TYPE_CHECKING:
    from docker import DockerClient

ROOT = Path(__file__).parent.parent

Fails = Callable[..., str]

needs_unix_sockets = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no Unix sockets")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fails:
    """Runs the command, which has to fail: the one line that it says. Nobody answers where it looks."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")

    def run(*arguments: object) -> str:
        assert main(["build-image", *map(str, arguments)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said.strip()

    return run


# What there is to build.


def test_the_build_gets_the_recipe_the_wheels_and_the_authorities_and_nothing_else(tmp_path: Path) -> None:
    for name in ("one.whl", "two.whl", "notes.txt"):
        (tmp_path / name).write_text(name)
    authorities = tmp_path / "company.pem"
    authorities.write_text("authorities")
    authorities.chmod(0o600)

    with packed(context_files(tmp_path, authorities)) as archive, tarfile.open(fileobj=archive) as tar:
        entries = {entry.name: entry for entry in tar}
        content = tar.extractfile("docker/ca.crt")
        assert content is not None
        assert content.read() == b"authorities"

    added = {"docker/wheels/one.whl", "docker/wheels/two.whl", "docker/ca.crt"}
    assert set(entries) == {f"docker/{name}" for name in RECIPE} | added
    # Whose they are, and who may read them, is the same wherever it is built.
    assert {(e.mode, e.uid, e.uname) for e in entries.values()} == {(0o644, 0, "")}


def test_what_is_not_there_is_told_before_an_engine_is_asked(fails: Fails, tmp_path: Path) -> None:
    said = fails("--wheels", tmp_path)
    assert said.startswith(f"there are no wheels in '{tmp_path}'; ")
    assert f"pip wheel -w {tmp_path} -r {ROOT / 'docker' / 'requirements.txt'}" in said
    assert fails("--ca-file", tmp_path / "ca") == f"there is no file '{tmp_path}/ca' to be --ca-file"


@pytest.mark.parametrize("arguments", [["--label", "version"], ["--tga", "mine"], ["mine"]])
def test_wrong_usage_has_a_status_of_its_own(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["build-image", *arguments])
    assert wrong.value.code == 2
    assert "usage: python -m code_sandboxes" in capsys.readouterr().err


def test_the_recipe_is_found_in_what_was_installed_and_in_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "code_sandboxes"
    (tmp_path / "docker").mkdir()  # beside what was installed there is the package docker
    with pytest.raises(SandboxConfigurationError, match=r"pip install --force-reinstall"):
        recipe_folder(package)
    for folder in (tmp_path / "docker", package / "docker"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "Dockerfile").touch()
        assert recipe_folder(package) == folder


def test_the_whole_recipe_is_in_the_wheel() -> None:
    there = {path.name for path in (ROOT / "docker").iterdir() if not path.name.startswith(".")}
    assert there - {"wheels", "ca.crt"} == set(RECIPE)
    wheel = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in RECIPE:
        assert f'"docker/{name}" = "code_sandboxes/docker/{name}"\n' in wheel


# Where there is no engine.


def test_without_the_package_it_says_how_to_install_it(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    said = fails()
    assert said.startswith("the package docker, which talks to container engines, is missing (")
    assert said.endswith("; install it with: pip install 'code-sandboxes[docker]'")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an engine is started in another way")
def test_where_nobody_listens_it_says_how_to_start_an_engine(fails: Fails, tmp_path: Path) -> None:
    said = fails()
    assert said.startswith(f"no Docker engine answers at unix://{tmp_path}/nobody.sock (No such file or dir")
    assert "sudo systemctl start docker" in said or "sudo apt-get install docker.io" in said


@needs_unix_sockets
def test_an_engine_that_has_ended_answers_no_more(fails: Fails, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(f"{tmp_path}/engine.sock")
    assert "/engine.sock (Connection refused); " in fails("--docker-host", f"unix://{tmp_path}/engine.sock")


@needs_unix_sockets
def test_who_may_not_use_an_engine_is_told_what_would_let_them(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        engine.listen()
        path.chmod(0)
        with not_as_root():
            said = fails("--docker-host", f"unix://{path}")
    assert said.startswith(f"this user may not use the Docker engine at unix://{path}; ")
    assert said.endswith(": sudo usermod -aG docker $USER")


@contextlib.contextmanager
def not_as_root() -> Iterator[None]:
    """To whom what the file system forbids is forbidden."""
    import docker.context  # noqa: F401  root's files are read before there is no root

    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_engine_elsewhere_is_not_started_here(fails: Fails) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{port.getsockname()[1]}"
        assert fails("--docker-host", url).endswith("; start it there, or say in DOCKER_HOST where one is")


@pytest.mark.parametrize(
    ("host", "why"),
    [("ftp://somewhere", "Invalid bind address protocol"), ("tcp://127.0.0.1:99999", "Port out of range")],
)
def test_a_place_that_is_none_is_a_wrong_setting(host: str, why: str) -> None:
    with pytest.raises(SandboxConfigurationError, match=f"the Docker engine at {host} cannot be used: {why}"):
        connect(host)


def test_a_context_that_is_none_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("DOCKER_CONTEXT", "no-such")
    with pytest.raises(SandboxConfigurationError, match="there is no Docker context 'no-such'; choose one"):
        connect()


# What the build says.


def test_what_is_said_is_shown_as_it_comes_and_progress_is_not() -> None:
    shown: list[str] = []
    events: list[dict[str, Any]] = [
        {"stream": "Step 1/2 : FROM python:3.13-slim\n"},
        {"status": "Pulling from library/python", "id": "3.13-slim"},
        {"status": "Downloading", "progressDetail": {"current": 1, "total": 2}, "id": "4f4fb700ef54"},
        {"status": "Pull complete", "progressDetail": {}, "id": "4f4fb700ef54"},
        {"stream": " ---> b4bc4c4e1e2f\n"},
        {"aux": {"ID": "sha256:b4bc4c4e1e2f"}},
    ]
    narrate("mine", events, shown.append)
    assert "".join(shown).splitlines() == [
        "Step 1/2 : FROM python:3.13-slim",
        "3.13-slim Pulling from library/python",
        "4f4fb700ef54 Pull complete",
        " ---> b4bc4c4e1e2f",
    ]


@pytest.mark.parametrize(
    ("step", "error", "told"),
    [
        (
            "Step 12/20 : RUN pip install\n",
            "The command '/bin/sh -c pip install' returned a non-zero code: 1",
            "mine was not built: step 12/20 failed with status 1, and says above why; if it could not fetch"
            " something, see --network, --ca-file and --wheels",
        ),
        (
            "STEP 1/20: FROM nowhere\n",  # as Podman says it
            "pull access denied for nowhere",
            "mine was not built: pull access denied for nowhere; with --base-image, name one that the engine"
            " has, or can fetch",
        ),
        ("", "network nets not found", "mine was not built: network nets not found"),
    ],
)
def test_a_build_that_fails_says_where(step: str, error: str, told: str) -> None:
    with pytest.raises(SandboxError) as failed:
        narrate(
            "mine", [{"stream": step}, {"errorDetail": {"message": error}, "error": error}], lambda _: None
        )
    assert str(failed.value) == told


# With an engine that says what it is told to.


class ScriptedEngine(socketserver.ThreadingUnixStreamServer):
    """Answers every build with the same events, or hangs up in the middle of it."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Answers)
        self.url = f"unix://{path}"
        self.events: list[dict[str, Any]] = [{"stream": "Successfully built 0123456789ab\n"}]
        self.hangs_up = False
        self.asked: dict[str, str] = {}
        self.context = b""


class _Answers(BaseHTTPRequestHandler):
    server: ScriptedEngine
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"ApiVersion": "1.41", "Size": 322_000_000, "Id": "0123456789ab"})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        if not url.path.endswith("/build"):
            return self._answer({"SpaceReclaimed": 0})
        self.server.context = content
        self.server.asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        self._stream("".join(json.dumps(event) + "\r\n" for event in self.server.events).encode())

    def _answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        if self.server.hangs_up:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedEngine]:
    """An engine that is where the command looks."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))  # in which there may be proxies
    with ScriptedEngine(tmp_path / "engine.sock") as engine:
        monkeypatch.setenv("DOCKER_HOST", engine.url)
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
        thread.start()
        yield engine
        engine.shutdown()
        thread.join()


@needs_unix_sockets
def test_it_asks_for_what_it_was_told(
    scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    options = ["--tag", "mine:2", "--base-image", "debian:12", "--network", "host", "--data"]

    assert main(["build-image", *options, "--label", "team=a=b", "--label", "version=2"]) == 0

    assert capsys.readouterr().out.endswith("\nbuilt mine:2 (322 MB)\n")
    asked = scripted.asked
    assert (asked["t"], asked["networkmode"], asked["dockerfile"]) == ("mine:2", "host", "docker/Dockerfile")
    assert json.loads(asked["labels"]) == {"team": "a=b", "version": "2"}
    assert json.loads(asked["buildargs"]) == {
        "BASE_IMAGE": "debian:12",
        "DATA_PACKAGES": "1",
        "PIP_INDEX_URL": "https://mirror.example/simple",
        "https_proxy": "http://proxy.example:3128",
    }
    with tarfile.open(fileobj=BytesIO(scripted.context)) as context:
        assert context.getnames() == [f"docker/{name}" for name in RECIPE]


@needs_unix_sockets
def test_a_build_whose_engine_goes_away_has_failed(
    scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.hangs_up = True
    assert main(["build-image"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("the container engine could not build code-sandboxes-jupyter:latest: ")
    assert said.count("\n") == 1


@needs_unix_sockets
def test_a_name_that_is_none_is_refused(
    scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-image", "--tag", "My Image"]) == 1
    assert "could not build My Image: invalid tag 'My Image'" in capsys.readouterr().err
    assert not scripted.asked


@needs_unix_sockets
def test_what_an_engine_refuses_is_told_in_its_words(scripted: ScriptedEngine) -> None:
    with contextlib.closing(connect()) as engine:
        from docker.errors import APIError

        with (
            pytest.raises(
                SandboxConnectionError, match=r"^the container engine could not do it: no space left$"
            ),
            told("do it"),
        ):
            raise APIError("500 Server Error", explanation="no space left")
        assert engine.version()["ApiVersion"] == "1.41"


# With a real one.


@pytest.fixture
def engine() -> Iterator[DockerClient]:
    try:
        client = connect()
    except SandboxError as error:
        if os.environ.get("CODE_SANDBOXES_REQUIRE_DOCKER") == "1":
            raise
        pytest.skip(f"NO CONTAINERS: {error}")
    with contextlib.closing(client):
        yield client


@pytest.fixture
def tag(engine: DockerClient) -> Iterator[str]:
    tag = f"code-sandboxes-test:{uuid.uuid4().hex[:8]}"
    yield tag
    from docker.errors import ImageNotFound

    with contextlib.suppress(ImageNotFound):
        engine.images.remove(tag)


def without_network(engine: DockerClient) -> list[str]:
    """Arguments to build of what ``tests/engine.sh`` has made; else an index and a registry are asked."""
    wheels = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "code-sandboxes-tests/wheels").expanduser()
    bases = [tag for image in engine.images.list("code-sandboxes-base") for tag in image.tags]
    if not bases or not any(wheels.glob("*.whl")):
        return []
    return ["--base-image", bases[0], "--wheels", str(wheels), "--network", "none"]


LOOK = """
import getpass, ipykernel, json, jupyter_server, os, subprocess, sys
command = [sys.executable, "-v", "-c", "import ipykernel.kernelapp"]
said = subprocess.run(command, capture_output=True, text=True).stderr
compiled = [line for line in said.splitlines() if "code object from" in line and ".pyc" not in line]
print(json.dumps({
    "user": [getpass.getuser(), os.getuid(), os.path.expanduser("~"), os.getcwd()],
    "own": [path for path in ("/workspace", "/data") if os.stat(path).st_uid == os.getuid()],
    "python": sys.executable,
    "compiled at import": compiled,
    "left in /tmp": os.listdir("/tmp"),
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # an index and a registry may be far away
def test_the_image_is_for_a_user_without_rights_and_keeps_nothing_of_its_build(
    engine: DockerClient, tag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = without_network(engine)
    if arguments:
        monkeypatch.setenv("PIP_INDEX_URL", "https://user:pa55w0rd@mirror.example/simple")
    assert main(["build-image", "--tag", tag, *arguments]) == 0
    assert f"\nbuilt {tag} (" in capsys.readouterr().out

    options: dict[str, Any] = {"network_mode": "none", "read_only": True, "cap_drop": ["ALL"], "remove": True}
    seen = json.loads(engine.containers.run(tag, ["python", "-c", LOOK], **options))
    assert seen == {
        "user": ["sandbox", 10001, "/home/sandbox", "/workspace"],
        "own": ["/workspace", "/data"],
        "python": "/opt/sandbox/bin/python",
        "compiled at import": [],
        "left in /tmp": [],
    }
    image = engine.images.get(tag)
    assert image.labels["io.code-sandboxes.image"] == "1"
    assert "pa55w0rd" not in json.dumps([image.attrs, image.history()])
    stages = {"dangling": True, "label": "io.code-sandboxes.image=build"}
    assert engine.images.list(filters=stages) == []
