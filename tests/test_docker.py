"""local-docker: how its containers are made, what is asked of it, and whatever fails, that nothing is left.

What code cannot do in a container is in tests/isolation, and what it shares with other variants in the tests
that run on all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("containers are on Linux only, for now", allow_module_level=True)

from code_sandboxes import (
    Sandbox,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxNotFoundError,
)
from code_sandboxes.isolation.container import LABEL
from code_sandboxes.isolation.engine import IMAGE, connect
from code_sandboxes.isolation.hosts import HOST_NAME
from code_sandboxes.keeper import client
from conftest import processes_of, sandbox_folders, wait_until
from tests.isolation.needs import IN_CONTAINERS
from tests.isolation.users import NoInterpreterError, ordinary_user
from tests.test_keeper import Program, is_keeper, keeper_of, mounted_tmpfs, nothing_is_left_in
from tests.test_packages import wheel

pytestmark = IN_CONTAINERS

MIB = 1024**2


def create(**settings: object) -> Sandbox:
    return Sandbox.create("local-docker", **settings)  # type: ignore[arg-type]  # any


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    engine = connect()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def contained(runtime_folder: Path) -> Iterator[Sandbox]:
    """A sandbox for tests that leave no trace in it."""
    with create(network_policy="none") as sandbox:
        yield sandbox


def printed(sandbox: Sandbox, code: str, **settings: object) -> str:
    result = sandbox.run_code(code, **settings)  # type: ignore[arg-type]  # any
    assert result.error is None, result.error
    return result.stdout


def containers_of(engine: Any, sandbox: Sandbox) -> list[Any]:
    label = f"{LABEL}.sandbox={sandbox.id}"
    found: list[Any] = engine.containers.list(all=True, filters={"label": label}, ignore_removed=True)
    return found


def container_of(engine: Any, sandbox: Sandbox) -> Any:
    (container,) = containers_of(engine, sandbox)
    return container


def kept_in(engine: Any, folder: Path) -> list[str]:
    """The names of the containers that keepers in *folder* have made."""
    found = engine.api.containers(all=True, filters={"label": LABEL})
    return [each["Names"][0] for each in found if str(folder) in each["Labels"].get(f"{LABEL}.keeper", "")]


# How it is made


def test_a_container_has_no_more_than_code_needs(engine: Any) -> None:
    with create(network_policy="none", memory=300, cpu=0.5, pids=99, disk=64 * MIB) as sandbox:
        about = container_of(engine, sandbox).attrs
        how = about["HostConfig"]
        assert (how["CapDrop"], how["CapAdd"] or []) == (["ALL"], [])
        assert (how["Privileged"], how["ReadonlyRootfs"], how["AutoRemove"]) == (False, True, True)
        assert how["SecurityOpt"] == ["no-new-privileges"]
        assert (how["IpcMode"], how["PidMode"], how["UTSMode"], how["UsernsMode"]) == ("private", "", "", "")
        assert (how["NetworkMode"], how["PortBindings"] or {}) == ("none", {})
        assert (how["Memory"], how["MemorySwap"]) == (300 * MIB, 300 * MIB)
        assert (how["NanoCpus"], how["PidsLimit"]) == (5 * 10**8, 99 + 1)
        assert [how[name] or [] for name in ("Devices", "DeviceRequests", "Binds", "VolumesFrom")] == [[]] * 4
        assert how["LogConfig"]["Type"] == "none"
        assert {mount["RW"] for mount in about["Mounts"]} == {False}
        assert about["Config"]["Healthcheck"] == {"Test": ["NONE"]}
        assert int(about["Config"]["User"].split(":")[0]) >= 0x2000_0000
        labels = about["Config"]["Labels"]
        assert (labels[LABEL], labels[f"{LABEL}.sandbox"]) == ("1", sandbox.id)

        status = printed(sandbox, "print(open('/proc/self/status').read())").splitlines()
        told = {name: value.split() for name, _, value in (line.partition(":") for line in status)}
        assert {told[f"Cap{each}"][0] for each in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (told["NoNewPrivs"], told["Seccomp"]) == (["1"], ["2"])
        assert sandbox.info.isolation.startswith(f"container: the image {IMAGE}, read-only")
        assert "at most 99 processes, 64 MiB of files, 300 MiB of memory, 0.5 CPUs" in sandbox.info.isolation


@pytest.mark.parametrize(
    ("policy", "network"),
    [("inherit", "bridge"), ("none", "none"), ("allowlist", "none")],
)
def test_only_where_all_may_be_reached_it_has_a_network(engine: Any, policy: str, network: str) -> None:
    hosts = ["example.org"] if policy == "allowlist" else []
    with create(network_policy=policy, allowed_hosts=hosts) as sandbox:
        assert container_of(engine, sandbox).attrs["HostConfig"]["NetworkMode"] == network


def test_two_sandboxes_are_two_users_and_see_nothing_of_each_other(contained: Sandbox) -> None:
    look = "import os; print(os.getuid(), *(n for n in os.listdir('/proc') if n.isdecimal()))"
    contained.files.write("/tmp/mine", "")
    with create(network_policy="none") as other:
        one, another = (printed(sandbox, look).split() for sandbox in (contained, other))
        assert one[0] != another[0]
        assert not other.files.exists("/tmp/mine")
        assert len(another) == 3  # itself, and the first process


def test_its_environment_is_the_images_and_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "a secret")
    monkeypatch.setenv("HTTP_PROXY", "http://user:a.secret@example.org")
    with create(env={"GIVEN": "1"}) as sandbox:
        everything = sandbox.commands.run("cat /proc/[0-9]*/environ | tr '\\0' '\\n'").stdout
        assert "GIVEN=1" in everything
        assert "secret" not in everything
        assert os.environ["PATH"] not in everything
        home, path = printed(sandbox, "import os; print(os.environ['HOME'], os.environ['PATH'])").split()
        assert (home, path.split(":")[0]) == ("/home/sandbox", "/home/sandbox/.local/bin")


@pytest.mark.parametrize(
    ("user", "told"),
    [
        ("sandbox", "10001 10001 [10001]"),
        ("nobody:daemon", "65534 1 [1]"),
        ("4242:4243", "4242 4243 [4243]"),
        ("root", "0 0 [0]"),
    ],
)
def test_code_is_who_was_asked_for_and_can_write_where_it_works(user: str, told: str) -> None:
    with create(user=user, network_policy="none") as sandbox:
        code = (
            "import os; print(os.getuid(), os.getgid(), os.getgroups())\n"
            "for folder in ('/workspace', '/data', '/tmp', '/dev/shm', os.path.expanduser('~')):\n"
            "    open(os.path.join(folder, 'x'), 'w').close()"
        )
        assert printed(sandbox, code) == told


def test_a_working_dir_is_one_of_the_sandbox_whoever_code_is() -> None:
    for path, user in (("/opt/project", "root"), ("/data/project", "")):
        settings = {"user": user} if user else {}
        with create(config=SandboxConfig(working_dir=path), network_policy="none", **settings) as sandbox:
            code = "import os; open('x', 'w').close(); print(os.getcwd())"
            assert printed(sandbox, code) == path


def test_a_program_that_lets_nobody_read_its_files_can_have_one(folder: Path) -> None:
    before = os.umask(0o077)  # which a keeper has from the program that starts it
    try:
        with create(network_policy="none") as sandbox:
            assert sandbox.run_code("1 + 1").text == "2"
    finally:
        os.umask(before)


# What cannot be


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"docker_host": "nonsense"}, "use the engine at nonsense: name one that listens at unix:///path"),
        ({"docker_host": "unix:///x", "docker_client": object()}, "honour docker_host and docker_client"),
        ({"gpu": "no such model"}, "choose a GPU (gpu='no such model'): this machine has no such one"),
        ({"environment": "x"}, "it runs an image; choose with image="),
        ({"memory": 1}, "memory must be from 64 MiB"),
        ({"pids": 1}, "pids must be a whole number from 16"),
        ({"disk": 1}, "disk must be a whole number of bytes"),
        ({"disk": MIB, "user": "root"}, "code that is root can write the whole image"),
        ({"disk": MIB, "user": "0:5"}, "code that is root can write the whole image"),
        ({"mounts": {"/no/such": ("/data/x", "ro")}}, "there is no /no/such on this machine"),
        ({"mounts": {"/tmp": ("/proc", "ro")}}, "is the system's"),
        ({"network_policy": "allowlist"}, "allowed_hosts is empty"),
        ({"config": SandboxConfig(working_dir="here")}, "must be an absolute path"),
        ({"image": "no/such:image"}, "build the standard one with `python -m code_sandboxes build-image`"),
        ({"image": "No Name"}, "makes no such container: invalid reference format"),
        ({"user": "nemo"}, f"the image '{IMAGE}' has no user 'nemo'"),
        ({"user": "00"}, f"the user '00' is root in {IMAGE}"),
        ({"user": "nobody:nemo"}, f"the image '{IMAGE}' has no group 'nemo'"),
        ({"cpu": 8000.0}, "makes no such container: Range of CPUs is from"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    engine: Any, runtime_folder: Path, settings: dict[str, object], sentence: str
) -> None:
    before = kept_in(engine, runtime_folder)
    with pytest.raises(SandboxConfigurationError) as refused:
        create(**settings)
    assert sentence in str(refused.value)
    assert kept_in(engine, runtime_folder) == before


@pytest.mark.parametrize("option", ["docker_host", "image", "user"])
def test_an_option_of_another_type_is_one_that_the_program_has_wrong(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} must be a str, not int"):
        create(**{option: 5})
    with pytest.raises(TypeError, match=r"docker_client must be a docker\.DockerClient, not int"):
        create(docker_client=5)
    with pytest.raises(TypeError, match=r"local-docker has no option 'isolation' \(known: disk, docker_c"):
        create(isolation="none")


def test_where_no_engine_is_it_is_said_where_one_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"unix://{tmp_path}/nobody"
    with pytest.raises(SandboxConnectionError, match=f"no Docker engine answers at {nowhere}"):
        create(docker_host=nowhere)
    monkeypatch.setenv("DOCKER_HOST", nowhere)
    with pytest.raises(SandboxConnectionError, match=f"no Docker engine answers at {nowhere}"):
        create()
    capability = Sandbox.capabilities_of("local-docker").memory_limit
    assert not capability
    assert f"no Docker engine answers at {nowhere}" in capability.reason


def test_the_engine_is_the_one_that_the_command_docker_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"unix://{tmp_path}/nobody"
    meta = tmp_path / "contexts/meta" / hashlib.sha256(b"other").hexdigest() / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"Name": "other", "Metadata": {}, "Endpoints": {"docker": {"Host": nowhere}}}))
    (tmp_path / "config.json").write_text(json.dumps({"currentContext": "other"}))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(SandboxConnectionError, match=f"no Docker engine answers at {nowhere}"):
        create()


def test_an_engine_can_be_named_by_a_client_of_it(engine: Any) -> None:
    with create(docker_client=engine, network_policy="none") as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"
    assert engine.ping()  # it is still the program's


# Images


@contextlib.contextmanager
def built(engine: Any, *lines: str) -> Iterator[str]:
    """An image that is built for a test."""
    tag = f"code-sandboxes-test:{random.randrange(10**9)}"
    engine.images.build(fileobj=io.BytesIO("\n".join(lines).encode()), tag=tag, rm=True, forcerm=True)
    try:
        yield tag
    finally:
        engine.images.remove(tag, force=True)


@contextlib.contextmanager
def imported(engine: Any, files: dict[str, bytes]) -> Iterator[str]:
    """An image in which there is nothing else."""
    tag = f"code-sandboxes-test:{random.randrange(10**9)}"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size, about.mode = len(content), 0o755
            tar.addfile(about, io.BytesIO(content))
    name, _, number = tag.partition(":")
    engine.api.import_image_from_data(archive.getvalue(), repository=name, tag=number)
    try:
        yield tag
    finally:
        engine.images.remove(tag, force=True)


def test_an_image_that_cannot_run_a_kernel_is_refused_and_leaves_nothing(
    engine: Any, runtime_folder: Path
) -> None:
    before = kept_in(engine, runtime_folder), sandbox_folders(runtime_folder)
    broken = [f"FROM {IMAGE}", "ENV PATH=/usr/bin:/bin"]
    with imported(engine, {"x": b""}) as empty, built(engine, *broken) as without_ipykernel:
        with pytest.raises(SandboxError, match='"python3": executable file not found'):
            create(image=empty)
        with pytest.raises(SandboxError, match="No module named 'ipykernel'"):
            create(image=without_ipykernel)
        with (
            imported(engine, {"bin/python3": b"#!/no/such/interpreter\n"}) as no_program,
            pytest.raises(SandboxError, match="no such file or directory"),
        ):
            create(image=no_program)
        wait_until(lambda: (kept_in(engine, runtime_folder), sandbox_folders(runtime_folder)) == before)


def test_a_volume_of_the_image_is_no_way_around_the_limit_of_what_can_be_written(engine: Any) -> None:
    before = {volume.id for volume in engine.volumes.list()}
    lines = [f"FROM {IMAGE}", "USER root", "RUN mkdir -m 1777 /volume", "VOLUME /volume", "USER sandbox"]
    with built(engine, *lines) as image:
        with pytest.raises(SandboxConfigurationError, match=r"has volumes of its own \(/volume\)"):
            create(image=image)
        with create(image=image, user="root", network_policy="none") as sandbox:
            assert sandbox.run_code("open('/volume/x', 'w').write('x')").text == "1"
    wait_until(lambda: {volume.id for volume in engine.volumes.list()} <= before)


def test_what_an_image_says_of_how_it_is_to_run_is_not_done(engine: Any) -> None:
    lines = [
        f"FROM {IMAGE}",
        "ENV FROM_THE_IMAGE=1 PYTHONSTARTUP=/no/such",
        "HEALTHCHECK --interval=1s CMD touch /tmp/checked",
        'ENTRYPOINT ["/bin/false"]',
        'CMD ["x"]',
        "EXPOSE 80",
    ]
    with built(engine, *lines) as image, create(image=image, network_policy="none") as sandbox:
        container = container_of(engine, sandbox)
        assert printed(sandbox, "import os; print(os.environ['FROM_THE_IMAGE'])") == "1"
        assert "Health" not in container.attrs["State"]
        assert (container.attrs["HostConfig"]["PortBindings"] or {}) == {}


# Mounts


def test_mounts_are_seen_where_they_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro" / "x").write_text("of this machine")
    (tmp_path / "rw").mkdir()
    (tmp_path / "rw").chmod(0o777)
    (tmp_path / "file").write_text("a file")
    mounts = {
        tmp_path / "ro": ("/data/ro", "ro"),
        str(tmp_path / "rw"): ("/data/rw", "rw"),
        str(tmp_path / "file"): ("/workspace/deep/file", "ro"),
    }
    with create(mounts=mounts, network_policy="none") as sandbox:
        assert sandbox.files.read("/data/ro/x") == "of this machine"
        assert sandbox.files.read("/workspace/deep/file") == "a file"
        for path in ("/data/ro/y", "/data/ro/x", "/workspace/deep/file"):
            with pytest.raises(OSError, match=r"Read-only|Permission denied"):
                sandbox.files.write_bytes(path, b"")
        sandbox.files.write("/data/rw/y", "written")
        assert (tmp_path / "rw" / "y").read_text() == "written"
        sandbox.files.write("/data/own", "beside them")
        assert f"/data/ro ('{tmp_path}/ro', read-only)" in sandbox.info.isolation
    assert (tmp_path / "ro" / "x").read_text() == "of this machine"


def test_nothing_that_is_mounted_below_what_is_read_only_can_be_written(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    outer.chmod(0o755)
    with mounted_tmpfs(outer / "inner", "mode=777") as inner:
        (inner / "x").write_text("of this machine")
        with create(mounts={outer: ("/data/outer", "ro")}, network_policy="none") as sandbox:
            with pytest.raises(OSError, match="Read-only"):
                sandbox.files.write("/data/outer/inner/y", "")
            assert not sandbox.files.exists("/data/outer/inner/x")
        assert os.listdir(inner) == ["x"]


def test_what_is_mounted_later_does_not_appear_in_it(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with (
        create(mounts={tmp_path / "shared": ("/data/shared", "rw")}, network_policy="none") as sandbox,
        mounted_tmpfs(tmp_path / "shared/later", "mode=777") as later,
    ):
        (later / "x").write_text("of this machine")
        assert not sandbox.files.exists("/data/shared/later/x")


# The network


class _Server(http.server.ThreadingHTTPServer):
    """Says hello, or hands out the files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        handler = partial(_Files, directory=str(folder)) if folder else _Hello
        super().__init__(("127.0.0.1", 0), handler)
        self.target = f"{HOST_NAME}:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def server_close(self) -> None:
        self.shutdown()
        self._thread.join()
        super().server_close()


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:
        return


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


FETCH = """
import socket, urllib.request
def fetch(url):
    try:
        return urllib.request.urlopen(url, timeout=30).read().decode()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
def say(request):
    with socket.create_connection(("127.0.0.1", 3128)) as proxy:
        proxy.sendall(request)
        return proxy.recv(12).decode()
"""


def test_with_an_allowlist_what_is_on_it_is_reached_and_nothing_else_and_all_is_logged() -> None:
    with _Server() as server:
        port = server.server_port
        hosts = [server.target, "*.allowed.test:8080"]
        with create(network_policy="allowlist", allowed_hosts=hosts) as sandbox:
            sandbox.run_code(FETCH)
            assert printed(sandbox, f"print(fetch('http://{server.target}/'))") == "hello"
            command = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode(), end='')"
            ran = sandbox.commands.run(["python3", "-c", command, f"http://{server.target}/"])
            assert ran.stdout == "hello"
            # By its suffix and port, though nobody knows the name; and what only looks like it is refused.
            told = printed(sandbox, "print(fetch('http://a.allowed.test:8080/'))")
            assert "cannot resolve a.allowed.test" in told
            for target in (
                f"{HOST_NAME}:{port - 1}",
                "a.allowed.test",
                "allowed.test:8080",
                "evilallowed.test:8080",
                "a.allowed.test.evil.test:8080",
                f"x.{server.target}",
                f"2130706433:{port}",
                f"[::1]:{port}",
                "169.254.169.254",
                "example.org",
            ):
                assert "blocked by network_policy" in printed(sandbox, f"print(fetch('http://{target}/'))")
            for target in (f"127.0.0.1:{port}", f"{HOST_NAME}@127.0.0.1:{port}", "a.allowed.test:8081"):
                request = f"CONNECT {target} HTTP/1.1\r\nHost: {server.target}\r\n\r\n".encode()
                assert printed(sandbox, f"print(say({request!r}))") in ("HTTP/1.1 403", "HTTP/1.1 400")
            # Past the proxy there is no way.
            for address in (f"('127.0.0.1', {port})", "('172.17.0.1', 80)", "('192.0.2.1', 80)"):
                went = sandbox.run_code(f"socket.create_connection({address}, timeout=5)").error
                assert went is not None
                assert "refused" in went.value or "unreachable" in went.value
            log = [(each.host, each.port, each.allowed) for each in sandbox.network_log()]
            assert log[:3] == [
                (HOST_NAME, port, True),
                (HOST_NAME, port, True),
                ("a.allowed.test", 8080, True),
            ]
            assert ("evilallowed.test", 8080, False) in log
            assert ("example.org", 80, False) in log
            assert [each for each in log[3:] if each[2]] == []


def test_without_a_network_what_is_tried_is_refused_clearly_and_logged(contained: Sandbox) -> None:
    contained.run_code(FETCH)
    told = printed(contained, "print(fetch('http://example.org/'))")
    assert "403" in told
    assert [(each.host, each.port, each.allowed) for each in contained.network_log()] == [
        ("example.org", 80, False)
    ]
    assert printed(contained, "s = socket.create_server(('127.0.0.1', 0)); print('mine')") == "mine"


def test_with_a_network_its_loopback_is_its_own_and_nobody_keeps_a_log() -> None:
    with _Server() as server, create() as sandbox:
        refused = sandbox.run_code(
            f"import socket; socket.create_connection(('127.0.0.1', {server.server_port}), timeout=5)"
        )
        assert "refused" in str(refused.error)
        assert "eth0" in printed(sandbox, "print(open('/proc/net/dev').read())")
        with pytest.raises(SandboxConfigurationError, match="it uses the machine's network"):
            sandbox.network_log()


# Contexts, packages


def test_contexts_are_kernels_in_one_container_and_restarting_ends_what_they_started(engine: Any) -> None:
    with create(network_policy="none") as sandbox:
        container = container_of(engine, sandbox).id
        other = sandbox.create_context("other", cwd="/tmp", env={"OWN": "1"})
        sandbox.run_code("import os, subprocess; x = 1; open('/data/shared', 'w').write('one place')")
        assert "NameError" in str(sandbox.run_code("x", context=other).error)
        look = "import os; print(os.getcwd(), os.environ['OWN'], open('/data/shared').read())"
        assert printed(sandbox, look, context=other) == "/tmp 1 one place"
        code = "process = subprocess.Popen(['sleep', '1000'], start_new_session=True); print(process.pid)"
        child = printed(sandbox, code)
        sandbox.restart()
        assert "NameError" in str(sandbox.run_code("x").error)
        assert sandbox.files.read("/data/shared") == "one place"
        assert not sandbox.files.exists(f"/proc/{child}")
        assert printed(sandbox, "print('still there')", context=other) == "still there"
        sandbox.delete_context(other)
        assert container_of(engine, sandbox).id == container


def test_a_language_that_is_not_pythons_is_refused(contained: Sandbox) -> None:
    assert contained.run_code("1 + 1", language="python").text == "2"
    with pytest.raises(ValueError, match="only runs the Python of its image, not the language 'bash'"):
        contained.run_code("1", language="bash")


def test_packages_are_installed_from_a_file_without_a_network(contained: Sandbox, tmp_path: Path) -> None:
    inside = "/tmp/contained_package-1.0-py3-none-any.whl"
    contained.files.upload(str(wheel(tmp_path, "contained_package")), inside)
    contained.install_packages([inside])
    code = "import contained_package; print(contained_package.__file__)"
    for context in (None, contained.create_context("later")):
        assert printed(contained, code, context=context).startswith("/home/sandbox/.local/lib/")
    contained.delete_context("later")


# A repository with one package, and what lets apt take it.
REPOSITORY = """
import hashlib, os, subprocess
os.makedirs("/repository/tiny/DEBIAN"); os.makedirs("/repository/tiny/usr/bin")
def write(path, text, mode=0o755):
    with open(path, "w") as file: file.write(text)
    os.chmod(path, mode)
write("/repository/tiny/usr/bin/tiny", "#!/bin/sh\\necho installed by $(cat /var/lib/tiny)\\n")
write("/repository/tiny/DEBIAN/postinst", "#!/bin/sh\\nset -e\\nid -un > /var/lib/tiny\\n")
about = "Package: tiny\\nVersion: 1\\nArchitecture: all\\nMaintainer: a test <a@test>\\nDescription: tiny\\n"
write("/repository/tiny/DEBIAN/control", about, 0o644)
subprocess.run(["dpkg-deb", "--build", "/repository/tiny", "/repository/tiny.deb"], check=True)
with open("/repository/tiny.deb", "rb") as file: data = file.read()
sums = f"Size: {len(data)}\\nSHA256: {hashlib.sha256(data).hexdigest()}\\n"
write("/repository/Packages", f"{about}Filename: ./tiny.deb\\n{sums}", 0o644)
"""
SOURCES = """
for path in glob.glob("/etc/apt/sources.list.d/*") + glob.glob("/etc/apt/sources.list"): os.remove(path)
write("/etc/apt/sources.list", f"deb [trusted=yes] http://{TARGET} ./\\n", 0o644)
"""


def test_packages_of_the_system_are_installed_where_code_is_root_and_has_a_network(tmp_path: Path) -> None:
    with _Server(tmp_path) as server:
        settings = {"network_policy": "allowlist", "allowed_hosts": [server.target]}
        with create(user="root", **settings) as sandbox:
            assert sandbox.capabilities.system_packages
            made = sandbox.run_code(REPOSITORY)
            assert made.error is None, made.error
            for name in ("Packages", "tiny.deb"):
                sandbox.files.download(f"/repository/{name}", tmp_path / name)
            sandbox.run_code(f"import glob\nTARGET = {server.target!r}{SOURCES}").raise_for_status()

            sandbox.commands.install_system_packages(["tiny"])

            assert sandbox.commands.run("tiny").stdout == "installed by root\n"


def test_packages_of_the_system_are_refused_where_they_cannot_be_installed(contained: Sandbox) -> None:
    with pytest.raises(SandboxConfigurationError, match=r"code is not root in the .*create it with user="):
        contained.commands.install_system_packages(["curl"])
    with create(user="root", network_policy="none") as sandbox:
        assert "code is root in it, without most privileges" in sandbox.info.isolation
        assert "not limited: files" in sandbox.info.isolation
        assert not sandbox.capabilities.system_packages
        with pytest.raises(
            SandboxConfigurationError, match="it has no network; create it with a network_pol"
        ):
            sandbox.commands.install_system_packages(["curl"])


# Other programs, and time


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder of the test's own, with a keeper of its own; at the end nothing must be left in it."""
    folder = Path(tempfile.mkdtemp(prefix="cs"))
    monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(client, "_LINGER", 0.2)
    yield folder
    client.the_keeper(folder).close()
    wait_until(lambda: nothing_is_left_in(folder), seconds=20)
    shutil.rmtree(folder)


StartProgram = Callable[[], Program]


@pytest.fixture
def start_program(folder: Path) -> Iterator[StartProgram]:
    programs: list[Program] = []

    def start() -> Program:
        programs.append(Program(folder))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def test_a_detached_sandbox_is_found_by_another_program_with_all_that_is_in_it(
    start_program: StartProgram, engine: Any, folder: Path
) -> None:
    maker, finder = start_program(), start_program()
    sandbox_id = maker.tell("""
        sandbox = Sandbox.create("local-docker", name="mine", tags={"job": "1"}, network_policy="none")
        sandbox.run_code("x = 42; open('file', 'w').write('kept')")
        sandbox.create_context("other"); sandbox.run_code("y = 'in other'", context="other")
        sandbox.detach()
        print(sandbox.id)
    """)
    assert sandbox_id.startswith("local-docker:")
    maker.close()
    assert finder.tell(f"""
        (found,) = Sandbox.list("local-docker", tags={{"job": "1"}})
        print(found.id == {sandbox_id!r}, found.name, found.status, Sandbox.list("local-jupyter"))
        sandbox = Sandbox.from_id({sandbox_id!r})
        print(sandbox.run_code("x, open('file').read()").text, sandbox.run_code("y", context="other").text)
        print(sandbox.info.isolation == found.isolation, sandbox.network_log())
        sandbox.set_tags({{"job": "2"}}); sandbox.set_timeout(1000)
        print(sandbox.terminate(), Sandbox.list())
    """).splitlines() == ["True mine running []", "(42, 'kept') 'in other'", "True []", "True []"]
    assert kept_in(engine, folder) == []
    with pytest.raises(SandboxNotFoundError, match="it has ended, or never was"):
        Sandbox.from_id(sandbox_id)


@pytest.mark.parametrize("end", ["max_lifetime", "set_timeout", "idle_timeout", "program"])
def test_a_sandbox_ends_in_time_although_nobody_is_attached(
    start_program: StartProgram, engine: Any, folder: Path, end: str
) -> None:
    program = start_program()
    # The container has to be there before its lifetime is over.
    config = {"max_lifetime": "max_lifetime=4", "idle_timeout": "idle_timeout=1"}.get(end, "")
    program.tell(f"""
        sandbox = Sandbox.create("local-docker", config=SandboxConfig({config}), network_policy="none")
        sandbox.run_code("x = 1")
    """)
    assert len(kept_in(engine, folder)) == 1
    if end == "set_timeout":
        program.tell("sandbox.set_timeout(1)")
    if end != "program":
        program.tell("sandbox.detach()")
    program.close()
    wait_until(lambda: not kept_in(engine, folder) and nothing_is_left_in(folder), seconds=10)


# Whatever fails


def test_root_pauses_and_ends_what_it_has_started_as_somebody_else() -> None:
    code = "import os, time; os.setuid(1234); print('on', flush=True); time.sleep(600)"
    with create(user="root") as sandbox:
        process = sandbox.commands.exec("python3", "-c", code)
        assert next(iter(process.stdout)) == "on\n"
        sandbox.pause()
        sandbox.resume()
        process.kill()
        assert process.wait(30) == -9


def test_ten_at_once_do_not_mix(engine: Any, runtime_folder: Path) -> None:
    before = kept_in(engine, runtime_folder)

    def work(number: int) -> tuple[str | None, str]:
        with create(network_policy="none") as sandbox:
            sandbox.run_code(f"import os; x = {number}; open('/data/x', 'w').write('{number}')")
            (told,) = printed(sandbox, "print(*os.listdir('/data'))").split()
            assert told == "x"
            return sandbox.run_code("x").text, sandbox.files.read("/data/x")

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(work, range(10))) == [(str(number), str(number)) for number in range(10)]
    assert kept_in(engine, runtime_folder) == before


@pytest.mark.parametrize("end", ["kill", "remove", "stop"])
def test_a_container_that_is_ended_from_outside_is_told_and_the_next_run_has_another(
    engine: Any, contained: Sandbox, end: str
) -> None:
    ends = {
        "kill": lambda container: container.kill(),
        "remove": lambda container: container.remove(force=True),
        "stop": lambda container: container.stop(),
    }
    with create(network_policy="none", timeout=60) as sandbox:
        sandbox.files.write("/data/x", "x")
        container = container_of(engine, sandbox)
        began = time.monotonic()
        result = sandbox.run_code(
            "print('on', flush=True); import time; time.sleep(50)",
            on_stdout=lambda _: ends[end](container),
        )
        assert time.monotonic() - began < 10  # it is 0.3 here
        assert (result.status, result.stdout, result.state_preserved) == ("kernel_died", "on", False)
        assert "the whole sandbox was ended, and its files with it" in str(result.error)
        assert sandbox.run_code("1 + 1").text == "2"
        assert not sandbox.files.exists("/data/x")
        assert container_of(engine, sandbox).id != container.id
        assert contained.run_code("1 + 1").text == "2"


def test_a_container_that_ends_while_nothing_runs_is_replaced(engine: Any) -> None:
    with create(network_policy="none") as sandbox:
        sandbox.create_context("other")
        container_of(engine, sandbox).kill()
        wait_until(lambda: sandbox.run_code("1 + 1").text == "2")
        wait_until(lambda: sandbox.run_code("1 + 1", context="other").text == "2")
        container_of(engine, sandbox)  # both have one


def test_a_run_in_a_paused_container_ends_in_time_and_the_next_has_another(engine: Any) -> None:
    with create(network_policy="none", config=SandboxConfig(interrupt_grace=0.2)) as sandbox:
        sandbox.run_code("x = 1")
        container = container_of(engine, sandbox)
        began = time.monotonic()
        result = sandbox.run_code(
            "print('on', flush=True)\nimport time\nwhile True: time.sleep(0.01)",
            timeout=0.5,
            on_stdout=lambda _: container.pause(),
        )
        assert time.monotonic() - began < 15  # timeout, grace, and the 5 s that a killed process may take
        assert result.status in ("timed_out", "kernel_died")
        assert not result.state_preserved
        assert sandbox.run_code("1 + 1").text == "2"
        assert container_of(engine, sandbox).id != container.id


def test_a_paused_container_ends_with_its_sandbox(engine: Any) -> None:
    for end in (Sandbox.kill, Sandbox.terminate):
        sandbox = create(network_policy="none")
        container_of(engine, sandbox).pause()
        began = time.monotonic()
        end(sandbox)
        assert time.monotonic() - began < 10
        assert containers_of(engine, sandbox) == []


def test_an_image_that_is_gone_when_another_container_is_needed_is_named(engine: Any) -> None:
    image = engine.images.get(IMAGE)
    tag = f"code-sandboxes-test:{random.randrange(10**9)}"
    image.tag(tag)
    with create(image=tag, network_policy="none") as sandbox:
        engine.images.remove(tag, force=True)
        assert sandbox.run_code("1 + 1").text == "2"
        assert sandbox.run_code("import os; os._exit(1)").status == "kernel_died"
        assert sandbox.run_code("1 + 1").text == "2"  # in the same container
        container_of(engine, sandbox).kill()
        wait_until(lambda: sandbox.run_code("1").status == "aborted")
        assert f"the container engine has no image '{tag}'" in str(sandbox.run_code("1").error)
        image.tag(tag)
        assert sandbox.run_code("1 + 1").text == "2"
    engine.images.remove(tag)


def test_a_sandbox_without_room_goes_on_and_can_be_emptied() -> None:
    with create(network_policy="none", disk=8 * MIB) as sandbox:
        code = (
            "import os\n"
            "for folder in ('/workspace', '/home/sandbox', '/data', '/tmp', '/dev/shm'):\n"
            "    try:\n"
            "        with open(folder + '/full', 'wb', buffering=0) as file:\n"
            "            while True: file.write(bytes(4096))\n"
            "    except OSError as error: print(error.strerror)"
        )
        assert set(printed(sandbox, code).splitlines()) == {"No space left on device"}
        assert sandbox.run_code("1 + 1").text == "2"
        with pytest.raises(OSError, match="No space left on device"):
            sandbox.files.write("x", "x" * 100_000)
        assert sandbox.commands.run("echo said").stdout == "said\n"
        sandbox.restart()
        sandbox.create_context("other")
        sandbox.commands.run("rm -f /*/full /home/sandbox/full /dev/shm/full")
        sandbox.files.write("x", "x" * 100_000)
        assert sandbox.run_code("1 + 1").text == "2"
        assert sandbox.run_code("1 + 1", context="other").text == "2"


class _Mute:
    """Listens as an engine, and says nothing; or what *answers* has, one after the other."""

    def __init__(self, folder: Path, *answers: bytes) -> None:
        self.url = f"unix://{folder}/mute"
        self.heard: list[bytes] = []
        self._answers = list(answers)
        self._held: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{folder}/mute")
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            self.heard.append(connection.recv(65536))
            if self._answers:
                connection.sendall(self._answers.pop(0))
                connection.close()
            else:
                self._held.append(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._held:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def test_an_engine_that_does_not_answer_holds_up_no_other_sandbox(
    start_program: StartProgram, tmp_path: Path
) -> None:
    mute = _Mute(tmp_path)
    program = start_program()
    program.begin(f"Sandbox.create('local-docker', docker_host={mute.url!r})")
    wait_until(lambda: mute.heard)
    with Sandbox.create("local-jupyter", isolation="none") as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"
    with create(network_policy="none") as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"
    mute.close()
    program.kill()


WHO = [("program",), ("keeper",), ("program", "keeper")]


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("killed", WHO, ids="+".join)
def test_who_is_killed_leaves_no_container_no_process_and_no_folder(
    start_program: StartProgram, engine: Any, folder: Path, killed: Sequence[str], paused: bool
) -> None:
    program = start_program()
    code = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    program.tell(f"sandbox = Sandbox.create('local-docker'); sandbox.run_code({code!r})")
    (name,) = kept_in(engine, folder)
    process = engine.containers.get(name).attrs["State"]["Pid"]
    if paused:
        engine.containers.get(name).pause()
    kill(program, folder, killed)

    wait_until(lambda: not kept_in(engine, folder) and nothing_is_left_in(folder), seconds=10)
    wait_until(lambda: not Path(f"/proc/{process}").exists())


def kill(program: Program, folder: Path, killed: Sequence[str]) -> None:
    if "keeper" in killed:
        keeper_of(folder).kill()
    if "program" in killed:
        program.process.kill()


@pytest.mark.parametrize("killed", WHO, ids="+".join)
def test_who_is_killed_while_containers_are_made_leaves_none(
    start_program: StartProgram, engine: Any, folder: Path, killed: Sequence[str]
) -> None:
    for _ in range(2):
        program = start_program()
        program.begin("""
            with contextlib.suppress(SandboxError):
                sandboxes = [Sandbox.create("local-docker") for _ in range(3)]
        """)
        wait_until(lambda: list(folder.glob("k*-*/*/containers")))
        time.sleep(random.random() * 0.5)
        kill(program, folder, killed)
        if "program" not in killed:
            program.heard()
            program.process.kill()

        try:
            wait_until(lambda: not kept_in(engine, folder) and nothing_is_left_in(folder), seconds=10)
        except AssertionError:
            pytest.fail(f"{kept_in(engine, folder)} {processes_of(folder)} {sorted(folder.rglob('*'))}")


def test_what_an_engine_still_makes_when_its_keeper_is_killed_is_removed_later(tmp_path: Path) -> None:
    missing, removed = (
        f"HTTP/1.1 {status}\r\n\r\n".encode() for status in ("404 Not Found", "204 No Content")
    )
    engine = _Mute(tmp_path, missing, missing, removed)
    code = (
        "import sys\n"
        "from code_sandboxes.reaper import Reaper\n"
        "Reaper().guard_container(sys.argv[1], 'made-late')\n"
        "print('guarded', flush=True); sys.stdin.read()"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code, engine.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"guarded\n"
    program.kill()
    program.communicate()
    wait_until(lambda: len(engine.heard) == 3, seconds=10)
    assert {request.split(b"?")[0] for request in engine.heard} == {b"DELETE /containers/made-late"}
    engine.close()


def test_when_keeper_and_watcher_are_killed_at_once_the_next_keeper_removes_its_containers(
    engine: Any, folder: Path
) -> None:
    sandbox = create(network_policy="none")
    (name,) = kept_in(engine, folder)
    engine.containers.get(name).pause()  # so that it does not notice by itself
    keeper = keeper_of(folder)
    watchers = [child for child in keeper.children() if "reaper.py" in " ".join(child.cmdline())]
    for process in (*watchers, keeper):
        process.suspend()
    for process in (*watchers, keeper):
        process.kill()
    wait_until(lambda: not any(map(is_keeper, processes_of(folder))))
    assert kept_in(engine, folder) == [name]
    with Sandbox.create("local-jupyter", isolation="none") as another:
        assert another.run_code("1").text == "1"
        wait_until(lambda: not kept_in(engine, folder), seconds=10)
    sandbox.kill()


# An engine that ends


class PrivateEngine:
    """One of the test's own, in namespaces of its own, so that it disturbs no other.

    Args:
        folder: for all that it has.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = f"unix://{folder}/s"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        paths = ("--data-root", "data"), ("--exec-root", "exec"), ("--pidfile", "pid")
        # There are no other networks to spoil in its own.
        command = ["unshare", "--net", "--mount", "dockerd", "--iptables=false", "--bridge=none"]
        command += ["--host", self.url, "--log-level", "warn"]
        command += [part for name, path in paths for part in (name, str(self._folder / path))]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, seconds=60)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()[-3000:]
        with contextlib.suppress(SandboxConnectionError):
            connect(self.url).close()
            return True
        return False

    def end(self, how: signal.Signals) -> None:
        assert self._process is not None
        helper = self._folder / "exec/containerd/containerd.pid"
        number = helper.read_text()
        self._process.send_signal(how)
        self._process.wait()
        # Which ends with it, but a moment later, and must not be taken for one that goes on.
        wait_until(lambda: not Path(f"/proc/{number}").exists())

    def load(self, engine: Any, image: str) -> None:
        own = connect(self.url)
        own.images.load(engine.images.get(image).save(named=True))
        own.close()

    def containers(self) -> list[Any]:
        own = connect(self.url)
        found: list[Any] = own.api.containers(all=True)
        own.close()
        return found

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def private_engine(engine: Any) -> Iterator[PrivateEngine]:
    if os.geteuid() != 0 or not shutil.which("dockerd") or not shutil.which("unshare"):
        pytest.skip("an engine of its own takes root, dockerd and unshare")
    # In memory where there is some: an image of 300 MB is to be loaded.
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 2 * 1024**3
    folder = Path(tempfile.mkdtemp(prefix="cs-engine", dir=memory if fits else None))
    private = PrivateEngine(folder)
    try:
        private.start()
        private.load(engine, IMAGE)
        yield private
    finally:
        private.close()
        shutil.rmtree(folder)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_an_engine_that_is_started_again_has_sandboxes_as_before(
    private_engine: PrivateEngine, folder: Path, how: signal.Signals
) -> None:
    with create(docker_host=private_engine.url, network_policy="none") as sandbox:
        sandbox.run_code("x = 1")
        private_engine.end(how)
        try:
            without = sandbox.run_code("1 + 1")
            # Containers go on where an engine was killed, and end where it has ended.
            assert without.text == "2" or without.status in ("kernel_died", "aborted")
            if how is signal.SIGTERM:
                again = sandbox.run_code("1 + 1")
                assert (again.status, again.text) == ("aborted", None)
                assert f"no Docker engine answers at {private_engine.url}" in str(again.error)
        finally:
            private_engine.start()
        wait_until(lambda: sandbox.run_code("1 + 1").text == "2")
        assert len(private_engine.containers()) == 1
    assert private_engine.containers() == []


@pytest.mark.timeout(180)
def test_a_sandbox_that_ends_while_there_is_no_engine_leaves_nothing_in_the_next(
    private_engine: PrivateEngine, folder: Path
) -> None:
    sandbox = create(docker_host=private_engine.url, network_policy="none")
    private_engine.end(signal.SIGKILL)
    try:
        began = time.monotonic()
        sandbox.terminate()
        assert time.monotonic() - began < 20
    finally:
        private_engine.start()
    wait_until(lambda: private_engine.containers() == [])


# Somebody else


def test_an_ordinary_user_who_may_use_the_engine_has_sandboxes_that_write_as_that_user(engine: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    path = engine.api._custom_adapter.socket_path
    folder = Path(tempfile.mkdtemp(prefix="cs-user"))
    try:
        try:
            somebody = ordinary_user(folder)
        except NoInterpreterError as error:
            pytest.skip(str(error))
        code = """if True:
            import os, sys
            from code_sandboxes import Sandbox
            os.mkdir("mine")
            settings = {"docker_host": sys.argv[1], "network_policy": "none"}
            with Sandbox.create("local-docker", mounts={"mine": ("/data/mine", "rw")}, **settings) as s:
                s.files.write("/data/mine/x", "written")
                print(open("mine/x").read(), os.stat("mine/x").st_uid == os.getuid())
            with Sandbox.create("local-docker", **settings) as s:
                print(int(s.run_code("import os; os.getuid()").text) != os.getuid())
        """
        ran = subprocess.run(
            somebody.command("-c", code, f"unix://{path}"),
            cwd=folder / "home",
            env={**somebody.environment(), "PYTHONPATH": str(folder / "project")},
            user=somebody.uid,
            group=somebody.uid,
            extra_groups=[os.stat(path).st_gid],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.stdout.split("\n")[:2] == ["written True", "True"], ran.stderr
    finally:
        shutil.rmtree(folder)
