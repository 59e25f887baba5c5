"""local-docker on an engine elsewhere: an engine behind TCP, which shares no files with this program.

What it has in common with containers on this machine, test_docker.py shows; here is what is different: the
way there, and that there is no keeper.
"""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the engine of the tests is on Linux only", allow_module_level=True)

from code_sandboxes import (
    Sandbox,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxNotFoundError,
    SandboxNotStartedError,
)
from code_sandboxes.isolation.container import LABEL
from code_sandboxes.isolation.distant import DISTANT, STEWARD
from code_sandboxes.isolation.engine import IMAGE, connect
from conftest import wait_until
from tests.distance import Distance
from tests.isolation.needs import IN_CONTAINERS
from tests.test_docker import built
from tests.test_keeper import Program

pytestmark = IN_CONTAINERS

MIB = 1024**2

# Until a container has ended that nobody uses any more: what the steward waits, and some for the engine.
ALONE = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    engine = connect()
    yield engine
    engine.close()


@pytest.fixture
def distance(engine: Any) -> Iterator[Distance]:
    """The way to the engine; when a test is over, no container may be left that it has made."""
    distance = Distance(engine.api._custom_adapter.socket_path)
    before = distant(engine)
    yield distance
    distance.close()
    wait_until(lambda: distant(engine) <= before, seconds=ALONE)


@pytest.fixture(scope="module")
def far(engine: Any) -> Iterator[Sandbox]:
    """A sandbox for tests that leave no trace in it."""
    distance = Distance(engine.api._custom_adapter.socket_path)
    with create(distance, network_policy="none") as sandbox:
        yield sandbox
    distance.close()


def create(distance: Distance, **settings: Any) -> Sandbox:
    return Sandbox.create("local-docker", docker_host=distance.url, **settings)


def distant(engine: Any) -> set[str]:
    found = engine.api.containers(all=True, filters={"label": DISTANT})
    return {each["Id"] for each in found}


def container_of(engine: Any, sandbox: Sandbox) -> Any:
    return engine.containers.get(sandbox.info.metadata["container"])


def printed(sandbox: Sandbox, code: str, **settings: Any) -> str:
    result = sandbox.run_code(code, **settings)
    assert result.error is None, result.error
    return result.stdout


# How it is made


def test_a_container_has_no_more_than_code_needs_no_port_and_nothing_of_this_machine(
    engine: Any, distance: Distance
) -> None:
    with create(distance, network_policy="none", memory=300, cpu=0.5, pids=99, disk=64 * MIB) as sandbox:
        about = container_of(engine, sandbox).attrs
        how = about["HostConfig"]
        assert (how["CapDrop"], how["CapAdd"] or []) == (["ALL"], [])
        assert (how["Privileged"], how["ReadonlyRootfs"], how["AutoRemove"]) == (False, True, True)
        assert how["SecurityOpt"] == ["no-new-privileges"]
        assert (how["NetworkMode"], how["PortBindings"] or {}) == ("none", {})
        assert (how["Memory"], how["MemorySwap"]) == (300 * MIB, 300 * MIB)
        assert (how["NanoCpus"], how["PidsLimit"]) == (5 * 10**8, 99 + 32)
        assert [how[name] or [] for name in ("Devices", "DeviceRequests", "Binds", "VolumesFrom")] == [[]] * 4
        assert about["Mounts"] == []
        assert int(about["Config"]["User"].split(":")[0]) >= 0x2000_0000
        assert about["Config"]["Labels"][f"{LABEL}.sandbox"] == sandbox.id

        status = printed(sandbox, "print(open('/proc/self/status').read())").splitlines()
        told = {name: value.split() for name, _, value in (line.partition(":") for line in status)}
        assert {told[f"Cap{each}"][0] for each in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert (told["NoNewPrivs"], told["Seccomp"]) == (["1"], ["2"])
        isolation = sandbox.info.isolation
        assert isolation.startswith(
            f"container: the image {IMAGE} on the engine at {distance.url}, read-only"
        )
        assert "at most 99 processes, 64 MiB of files, 300 MiB of memory, 0.5 CPUs" in isolation
        assert [each.id for each in Sandbox.list("local-docker")] == [sandbox.id]


def test_its_environment_is_the_images_and_what_it_was_given(
    distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "a secret")
    with create(distance, env={"GIVEN": "1"}, config=SandboxConfig(working_dir="/data/here")) as sandbox:
        everything = sandbox.commands.run("cat /proc/[0-9]*/environ | tr '\\0' '\\n'; env; pwd").stdout
        assert "GIVEN=1" in everything
        assert everything.endswith("/data/here\n")
        assert "secret" not in everything
        home, path = printed(sandbox, "import os; print(os.environ['HOME'], os.environ['PATH'])").split()
        assert (home, path.split(":")[0]) == ("/home/sandbox", "/home/sandbox/.local/bin")


@pytest.mark.parametrize(("user", "told"), [("nobody:daemon", "65534 1"), ("root", "0 0")])
def test_code_is_who_was_asked_for_and_can_write_where_it_works(
    distance: Distance, user: str, told: str
) -> None:
    with create(distance, user=user, network_policy="none") as sandbox:
        code = (
            "import os; print(os.getuid(), os.getgid())\n"
            "for folder in ('/workspace', '/data', '/tmp', '/dev/shm', os.path.expanduser('~')):\n"
            "    open(os.path.join(folder, 'x'), 'w').close()"
        )
        assert printed(sandbox, code) == told


# What it does


def test_output_is_live(far: Sandbox) -> None:
    lines: list[str] = []
    seen = threading.Event()

    def heard(message: Any) -> None:
        lines.append(message.line)
        seen.set()
        far.files.write("/tmp/go-on", "")

    code = (
        "import os, time\nprint('first', flush=True)\n"
        "while not os.path.exists('/tmp/go-on'): time.sleep(0.01)\nprint('last')"
    )
    assert far.run_code(code, on_stdout=heard).success
    assert seen.is_set()
    assert lines == ["first", "last"]


def test_much_output_comes_whole(far: Sandbox) -> None:
    result = far.run_code("for n in range(200_000): print('line', n)")
    assert result.success
    assert result.stdout == "\n".join(f"line {n}" for n in range(200_000))
    assert not result.truncated


def test_files_go_both_ways(far: Sandbox, tmp_path: Path) -> None:
    content = os.urandom(20 * MIB)
    (tmp_path / "there").write_bytes(content)
    far.files.upload(str(tmp_path / "there"), "/data/there")
    far.files.download("/data/there", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == content
    far.files.rm("/data/there")


def test_commands_run_and_their_output_is_live(far: Sandbox) -> None:
    assert far.commands.run("echo out; echo err >&2; exit 3").exit_code == 3
    process = far.commands.spawn("echo first; read line; echo $line")
    assert next(process.stdout) == "first\n"
    process.write_stdin("second\n")
    assert list(process.stdout) == ["second\n"]
    assert process.wait() == 0


def test_contexts_are_kernels_of_their_own(far: Sandbox) -> None:
    other = far.create_context("other", cwd="/data", env={"OF": "other"})
    far.run_code("x = 1")
    assert far.run_code("x", context=other).error is not None
    assert printed(far, "import os; print(os.getcwd(), os.environ['OF'])", context=other) == "/data other"
    far.delete_context(other)
    assert [context.name for context in far.list_contexts()] == ["default"]


def test_what_does_not_end_is_interrupted_and_variables_stay(far: Sandbox) -> None:
    far.run_code("kept = 5")
    result = far.run_code("import time; time.sleep(60)", timeout=0.5)
    assert (result.status, result.state_preserved) == ("timed_out", True)
    assert far.run_code("kept").text == "5"


def test_a_kernel_that_died_is_told_and_the_next_run_has_another(far: Sandbox) -> None:
    result = far.run_code("import os; print('before', flush=True); os._exit(3)")
    assert (result.status, result.stdout) == ("kernel_died", "before")
    assert far.run_code("1 + 1").text == "2"


def test_when_the_server_in_it_has_died_the_next_run_has_another(distance: Distance) -> None:
    with create(distance, network_policy="none") as sandbox:
        time.sleep(5)  # the steward does not begin a server again that ends at once
        kill = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
        assert sandbox.run_code(kill).status in ("kernel_died", "connection_lost")
        wait_until(lambda: sandbox.run_code("1 + 1").text == "2", seconds=40)


def test_who_uses_up_the_memory_is_told_so(distance: Distance) -> None:
    with create(distance, network_policy="none", memory=300) as sandbox:
        result = sandbox.run_code("x = bytearray(2**29)")
        assert result.status == "kernel_died"
        assert "the sandbox used up its memory of 300 MiB" in str(result.error)
        assert sandbox.run_code("1 + 1").text == "2"


def test_without_a_network_there_is_none(far: Sandbox) -> None:
    code = """
import socket, os
print(sorted(os.listdir('/sys/class/net')))
for address in (('1.1.1.1', 53), ('172.17.0.1', 2375)):
    try: socket.create_connection(address, 3)
    except OSError as error: print(error.strerror)
with socket.create_server(('127.0.0.1', 0)) as s: socket.create_connection(s.getsockname()); print('loopback')
"""
    assert printed(far, code).splitlines() == ["['lo']", *["Network is unreachable"] * 2, "loopback"]


def test_with_one_it_is_on_the_engines_bridge(engine: Any, distance: Distance) -> None:
    with create(distance) as sandbox:
        assert container_of(engine, sandbox).attrs["HostConfig"]["NetworkMode"] == "bridge"
        assert "eth0" in printed(sandbox, "import os; print(os.listdir('/sys/class/net'))")


def test_code_in_it_cannot_speak_to_the_steward_or_hold_a_relay_up(far: Sandbox) -> None:
    code = f"""
import os, signal, socket
with socket.socket(socket.AF_UNIX) as s:
    s.connect({chr(0) + STEWARD[1:]!r})
    s.sendall(b'{{"detach": true}}\\n')
    try: print(s.recv(100))
    except ConnectionResetError: print(b'')
held = 0
for pid in filter(str.isdigit, os.listdir('/proc')):
    if os.stat('/proc/' + pid).st_uid == 0 and pid != '1':
        try: os.kill(int(pid), signal.SIGSTOP); held += 1
        except PermissionError: print('refused')
os.kill(1, signal.SIGKILL)
print(held)
"""
    said = printed(far, code).splitlines()
    assert (said[0], said[-1], set(said[1:-1])) == ("b''", "0", {"refused"})


def test_a_lost_connection_is_made_again_and_nothing_is_missing(distance: Distance) -> None:
    with create(distance, network_policy="none") as sandbox:
        cut = [0]

        def heard(message: Any) -> None:
            if message.line == "100":
                cut[0] += 1
                distance.cut()

        code = "import time\nfor n in range(300): print(n, flush=True); time.sleep(0.01)"
        result = sandbox.run_code(code, on_stdout=heard)
        assert cut == [1]
        assert result.success or result.truncated, result.error
        assert sandbox.run_code("n").text == "299"


# Other programs, and time


@pytest.fixture
def start_program(runtime_folder: Path) -> Iterator[Callable[[], Program]]:
    programs: list[Program] = []

    def start() -> Program:
        programs.append(Program(runtime_folder))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


def test_a_detached_sandbox_is_found_by_another_program_with_all_that_is_in_it(
    engine: Any, distance: Distance, start_program: Callable[[], Program]
) -> None:
    sandbox = create(distance, network_policy="none", name="mine", tags={"a": "1"}, pids=77)
    sandbox.run_code("x = 5")
    sandbox.create_context("other", cwd="/data")
    sandbox.run_code("y = 6", context="other")
    sandbox.set_tags({"a": "2"})
    sandbox.detach()
    time.sleep(12)  # longer than it would be there without
    program = start_program()
    program.tell(f"s = Sandbox.from_id({sandbox.id!r}, docker_host={distance.url!r})")
    assert program.tell("print(s.name, s.tags, s.run_code('x').text)") == "mine {'a': '2'} 5"
    assert program.tell("print(s.run_code('y', context='other').text)") == "6"
    assert program.tell("print(s.run_code('import os; os.getcwd()', context='other').text)") == "'/data'"
    assert program.tell("print(s.info.isolation)").count("at most 77 processes") == 1
    program.tell("s.terminate()")
    with pytest.raises(SandboxNotFoundError, match="has ended, or never was"):
        Sandbox.from_id(sandbox.id, docker_host=distance.url)


def test_what_another_program_uses_goes_on_when_the_first_one_ends(
    engine: Any, distance: Distance, start_program: Callable[[], Program]
) -> None:
    first, second = start_program(), start_program()
    sandbox_id = first.tell(
        f"s = Sandbox.create('local-docker', docker_host={distance.url!r}, network_policy='none')\n"
        "s.run_code('x = 5'); print(s.id)"
    )
    second.tell(f"s = Sandbox.from_id({sandbox_id!r}, docker_host={distance.url!r})")
    first.close()
    assert second.tell("print(s.run_code('x').text)") == "5"
    time.sleep(7)
    assert second.tell("print(s.run_code('x').text)") == "5"
    second.close()  # in an orderly way, so that it does not take long
    wait_until(
        lambda: not engine.api.containers(filters={"label": f"{LABEL}.sandbox={sandbox_id}"}), seconds=6
    )


def test_a_program_that_is_killed_leaves_no_container(
    engine: Any, distance: Distance, start_program: Callable[[], Program]
) -> None:
    program = start_program()
    program.tell(f"s = Sandbox.create('local-docker', docker_host={distance.url!r}, network_policy='none')")
    sandbox_id = program.tell("print(s.id)")
    program.begin("s.run_code('import time; time.sleep(1000)', timeout=0)")
    found = {"label": f"{LABEL}.sandbox={sandbox_id}"}
    assert len(engine.api.containers(filters=found)) == 1
    program.kill()
    wait_until(lambda: not engine.api.containers(all=True, filters=found), seconds=ALONE)


def test_its_lifetime_ends_it_although_nobody_is_attached(engine: Any, distance: Distance) -> None:
    sandbox = create(distance, network_policy="none")
    container = container_of(engine, sandbox)
    sandbox.set_timeout(4)
    sandbox.detach()
    assert container.status == "running"
    wait_until(lambda: container.id not in distant(engine), seconds=ALONE)


def test_a_lifetime_that_is_over_is_told(distance: Distance) -> None:
    sandbox = create(distance, network_policy="none")
    sandbox.set_timeout(0.1)
    wait_until(lambda: sandbox.status == "stopped")
    with pytest.raises(SandboxError, match=r"0\.1 s that set_timeout\(\) gave it are over"):
        sandbox.run_code("1")
    sandbox.terminate()


def test_a_container_that_is_ended_from_outside_is_told(engine: Any, distance: Distance) -> None:
    with create(distance, network_policy="none") as sandbox:
        container = container_of(engine, sandbox)
        threading.Timer(1.0, container.kill).start()
        result = sandbox.run_code("import time; time.sleep(1000)", timeout=100)
        assert result.status == "connection_lost"
        assert re.search("No such container|is not running", str(result.error))
        wait_until(lambda: sandbox.status == "stopped")
        with pytest.raises(SandboxNotStartedError, match="is terminated: its container has ended"):
            sandbox.files.list("/data")


def test_a_sandbox_that_another_program_ends_is_over_here_too(
    distance: Distance, start_program: Callable[[], Program]
) -> None:
    sandbox = create(distance, network_policy="none")
    program = start_program()
    program.tell(f"Sandbox.from_id({sandbox.id!r}, docker_host={distance.url!r}).terminate()")
    wait_until(lambda: sandbox.status == "stopped")
    assert not sandbox.terminate()


# What cannot be


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mounts": {"/tmp": ("/data/x", "ro")}}, "the files of this machine are not there"),
        ({"network_policy": "allowlist", "allowed_hosts": ["a.org"]}, "the proxy is on this machine"),
        ({"config": SandboxConfig(idle_timeout=5)}, "nobody watches for it"),
        ({"environment": "x"}, "it runs an image; choose with image="),
        ({"snapshot_name": "x"}, "on an engine elsewhere it cannot do that yet"),
        ({"memory": 100}, "a Jupyter server has its part"),
        ({"pids": 1}, "pids must be a whole number from 16"),
        ({"disk": MIB, "user": "root"}, "code that is root can write the whole image"),
        ({"env": {"CODE_SANDBOXES_X": "1"}}, "the library's own"),
        ({"image": ""}, "an empty name says nothing"),
        ({"image": "no/such:image"}, "build the standard one with `python -m code_sandboxes build-image`"),
        ({"user": "nemo"}, f"the image '{IMAGE}' has no user 'nemo'"),
        ({"cpu": 8000.0}, "makes no such container: Range of CPUs is from"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason_and_leaves_nothing(
    distance: Distance, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SandboxConfigurationError) as refused:
        create(distance, **settings)
    assert sentence in str(refused.value)


def test_what_it_cannot_do_is_refused_with_the_reason(far: Sandbox) -> None:
    for attempt in (far.pause, lambda: far.create_snapshot("x"), far.network_log):
        with pytest.raises(SandboxConfigurationError, match="on an engine elsewhere"):
            attempt()
    with pytest.raises(TypeError, match=r"local-docker has no option 'isolation' \(known: disk, docker_c"):
        Sandbox.create("local-docker", docker_host="tcp://127.0.0.1:9", isolation="none")
    with pytest.raises(TypeError, match="takes docker_host= or docker_client="):
        Sandbox.from_id("local-docker:x", token="y")


def test_a_gpu_that_the_engine_does_not_have_is_an_error_that_leaves_nothing(distance: Distance) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine may have one")
    with pytest.raises(SandboxError, match="could not select device driver"):
        create(distance, gpu="H100")


def test_an_image_that_cannot_run_a_server_is_told_and_leaves_nothing(
    engine: Any, distance: Distance
) -> None:
    with (
        built(engine, f"FROM {IMAGE}", "ENV PATH=/usr/bin:/bin") as without,
        pytest.raises(SandboxError, match="No module named jupyter_server"),
    ):
        create(distance, image=without)


def test_where_no_engine_is_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SandboxConnectionError, match=r"no Docker engine answers at tcp://127\.0\.0\.1:9"):
        Sandbox.create("local-docker", docker_host="tcp://127.0.0.1:9")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    capability = Sandbox.capabilities_of("local-docker").memory_limit
    assert "no Docker engine answers at tcp://127.0.0.1:9" in capability.reason


def test_an_engine_can_be_named_by_a_client_and_by_the_environment(
    distance: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(distance.url)
    with Sandbox.create("local-docker", docker_client=client, network_policy="none") as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"
    assert client.ping()  # it is still the program's
    client.close()
    monkeypatch.setenv("DOCKER_HOST", distance.url)
    assert not Sandbox.capabilities_of("local-docker").mounts
    sandbox = Sandbox.create("local-docker", network_policy="none")
    sandbox.detach()
    again = Sandbox.from_id(sandbox.id)
    assert again.run_code("1 + 1").text == "2"
    again.terminate()


# Other ways there


def test_an_engine_is_reached_by_tls_with_the_certificates_of_the_command_docker(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "ca.pem"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    distance = Distance(engine.api._custom_adapter.socket_path, context)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # which requests takes before what it is told
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
    with create(distance, network_policy="none") as sandbox:
        content = os.urandom(20 * MIB)
        sandbox.files.write_bytes("/data/x", content)
        assert sandbox.files.read_bytes("/data/x") == content
        assert sandbox.run_code("for n in range(100_000): print(n)").stdout.endswith("99999")
    distance.close()


def certify(folder: Path) -> None:
    """The files that ``DOCKER_CERT_PATH`` has, with one certificate for both sides."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    shutil.copy(folder / "cert.pem", folder / "ca.pem")


def test_an_engine_is_reached_over_ssh(
    engine: Any, distance: Distance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ssh"
    program.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift 2\nexec sh -c "$*"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with Sandbox.create("local-docker", docker_host="ssh://me@far", network_policy="none") as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"
        content = os.urandom(3 * MIB)
        sandbox.files.write_bytes("/data/x", content)
        assert sandbox.files.read_bytes("/data/x") == content
