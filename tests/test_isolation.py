"""What isolation means for whoever uses a sandbox of local-jupyter: options, files, contexts, packages.

What code cannot do in it is in tests/isolation.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from code_sandboxes import (
    NetworkAttempt,
    Sandbox,
    SandboxConfig,
    SandboxConfigurationError,
    SandboxConnectionError,
)
from code_sandboxes.isolation.landlock import why_not as why_no_landlock
from code_sandboxes.isolation.probe import probe
from code_sandboxes.variants import plans
from conftest import wait_until
from tests.test_packages import wheel

pytestmark = pytest.mark.skipif(bool(probe().bubblewrap), reason=f"no bubblewrap: {probe().bubblewrap}")

needs_memory_limit = pytest.mark.skipif(
    bool(probe().cgroups["memory"]), reason=f"no limit of memory: {probe().cgroups['memory']}"
)
needs_landlock = pytest.mark.skipif(bool(why_no_landlock()), reason=f"no Landlock: {why_no_landlock()}")


@pytest.fixture(scope="module")
def isolated(runtime_folder: Path) -> Iterator[Sandbox]:
    """A sandbox for tests that leave no trace in it."""
    with Sandbox.create("local-jupyter", isolation="bubblewrap") as sandbox:
        yield sandbox


def printed(sandbox: Sandbox, code: str, **settings: object) -> str:
    result = sandbox.run_code(code, **settings)  # type: ignore[arg-type]  # any
    assert result.error is None, result.error
    return result.stdout


# What it is


def test_isolation_is_what_a_sandbox_has_that_asks_for_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Sandbox.create("local-jupyter") as sandbox:
            assert sandbox.info.isolation.startswith("bubblewrap: ")
            assert "256 processes, 1024 MiB of files" in sandbox.info.isolation
            assert "not limited: memory, cpu" in sandbox.info.isolation
            assert sandbox.capabilities == Sandbox.capabilities_of("local-jupyter")


def test_code_sees_a_machine_of_its_own(isolated: Sandbox) -> None:
    code = "import os, socket; print(os.getcwd(), os.path.expanduser('~'), socket.gethostname(), os.getuid())"

    *place, user = printed(isolated, code).split()

    assert place == ["/workspace", "/home/sandbox", "sandbox"]
    assert int(user) > 1000
    assert "sandbox" in isolated.commands.run("whoami").stdout
    assert int(printed(isolated, "print(len([p for p in os.listdir('/proc') if p.isdigit()]))")) < 10


def test_any_path_can_be_written_and_nothing_of_this_machine_appears(isolated: Sandbox) -> None:
    for path in ("/data/test.txt", "/remote/deep/file.txt", "/tmp/x", "/x", "/workspace/x"):
        isolated.files.write(path, path)
        assert isolated.files.read(path) == path
    assert not Path("/remote").exists()
    assert not isolated.files.exists(__file__)
    assert not isolated.files.exists("/etc/shadow")
    with pytest.raises(OSError, match="Read-only file system"):
        isolated.files.write("/usr/x", "")
    with pytest.raises(OSError, match="Read-only file system"):
        isolated.files.write(f"{sys.prefix}/lib/x", "")


def test_its_environment_has_nothing_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "a secret")
    with Sandbox.create("local-jupyter", isolation="bubblewrap", env={"GIVEN": "1"}) as sandbox:
        everything = sandbox.commands.run("cat /proc/[0-9]*/environ | tr '\\0' '\\n'").stdout
        assert "GIVEN=1" in everything
        assert "a secret" not in everything
        assert os.environ["PATH"] not in everything


# What lasts


@pytest.mark.slow
def test_files_are_those_of_all_contexts_and_of_kernels_to_come(isolated: Sandbox) -> None:
    other = isolated.create_context("other")
    isolated.files.write("/data/shared", "one sandbox")
    isolated.run_code("open('/dev/shm/shared', 'w').write('memory')")

    assert printed(isolated, "print(open('/data/shared').read())", context=other) == "one sandbox"
    assert printed(isolated, "print(open('/dev/shm/shared').read())", context=other) == "memory"

    assert isolated.run_code("import os; os._exit(3)", context=other).status == "kernel_died"
    assert printed(isolated, "print(open('/data/shared').read())", context=other) == "one sandbox"
    isolated.delete_context(other)


@pytest.mark.slow
def test_another_program_has_the_same_sandbox(isolated: Sandbox) -> None:
    isolated.files.write("/data/mine", "seen")
    isolated.run_code("x = 42")
    program = (
        f"from code_sandboxes import Sandbox; s = Sandbox.from_id({isolated.id!r});"
        "print(s.run_code('x').text, s.files.read('/data/mine'), s.info.isolation);"
        "c = s.create_context('theirs'); print(s.run_code(\"open('/data/mine').read()\", context=c).text)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ran.stdout.splitlines() == [f"42 seen {isolated.info.isolation}", "'seen'"]
    assert "theirs" in [context.name for context in isolated.list_contexts()]
    isolated.delete_context("theirs")


def test_what_was_printed_before_a_death_is_not_lost(isolated: Sandbox) -> None:
    result = isolated.run_code("import os, signal; print('last words'); os.kill(os.getpid(), signal.SIGKILL)")

    assert (result.status, result.stdout) == ("kernel_died", "last words")
    assert "signal 9" in str(result.error)
    assert not result.state_preserved


@pytest.mark.slow
def test_what_a_kernel_started_ends_with_it(isolated: Sandbox) -> None:
    context = isolated.create_context("parent")
    code = "import subprocess; p = subprocess.Popen(['sleep', '1000'], start_new_session=True); print(p.pid)"
    child = int(printed(isolated, code, context=context))
    assert isolated.files.exists(f"/proc/{child}")

    isolated.run_code("import os; os._exit(1)", context=context)

    wait_until(lambda: not isolated.files.exists(f"/proc/{child}"))
    isolated.delete_context(context)


@pytest.mark.slow
def test_a_sandbox_whose_first_process_is_killed_says_that_its_files_are_gone_and_goes_on() -> None:
    with Sandbox.create("local-jupyter", isolation="bubblewrap") as sandbox:
        sandbox.files.write("/data/x", "x")
        first = _first_process_of(sandbox)
        os.kill(first, signal.SIGKILL)
        result = sandbox.run_code("1")
        if result.status == "kernel_died":
            assert "the whole sandbox was ended, and its files with it" in str(result.error)
        assert sandbox.run_code("1 + 1").text == "2"
        assert not sandbox.files.exists("/data/x")
        assert _first_process_of(sandbox) != first


def _first_process_of(sandbox: Sandbox) -> int:
    """Its number on this machine."""
    mark = printed(sandbox, "import os; print(os.environ['CODE_SANDBOXES_KERNEL'])")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"CODE_SANDBOXES_KERNEL={mark}\0".encode() in (process / "environ").read_bytes():
                status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                return int(status["PPid"])
        except OSError:  # it has ended, or is another user's
            continue
    raise AssertionError("no kernel")


# Other kernels


@pytest.mark.slow
def test_a_kernel_of_another_language_is_in_the_same_place(isolated: Sandbox) -> None:
    isolated.files.write("/data/for_bash", "from python")

    result = isolated.run_code("cat /data/for_bash; echo; id -un", language="bash")

    assert result.stdout.splitlines() == ["from python", "sandbox"]
    numbers = isolated.run_code("seq 1 500", language="bash").stdout.split()
    assert numbers == [str(number) for number in range(1, 501)]


def test_a_kernel_that_was_installed_later_is_refused_with_the_reason(
    isolated: Sandbox, install_kernel: Callable[..., str], tmp_path: Path
) -> None:
    interpreter = tmp_path / "venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    (tmp_path / "venv" / "lib").mkdir()
    interpreter.symlink_to(sys.executable)
    name = install_kernel("later", [str(interpreter), "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    with pytest.raises(SandboxConnectionError, match="only a new one sees"):
        isolated.create_context("c", language=name)


def test_a_kernel_below_a_home_folder_shows_no_more_than_itself(
    isolated: Sandbox, install_kernel: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    program = tmp_path / "bin" / "kernel"
    program.parent.mkdir()
    (tmp_path / "lib").mkdir()
    program.symlink_to(sys.executable)
    name = install_kernel("homely", [str(program), "-f", "{connection_file}"])

    with pytest.raises(SandboxConnectionError, match=r"cannot be enclosed: its program .* mounts="):
        isolated.create_context("c", language=name)


@pytest.mark.slow
def test_packages_are_installed_for_all_contexts_and_the_installation_does_not_change(
    isolated: Sandbox, tmp_path: Path
) -> None:
    inside = "/tmp/sandboxed_package-1.0-py3-none-any.whl"
    isolated.files.upload(str(wheel(tmp_path, "sandboxed_package")), inside)
    isolated.install_packages([inside])
    code = "import sandboxed_package; print(sandboxed_package.__file__)"

    for context in (None, isolated.create_context("later")):
        assert printed(isolated, code, context=context).startswith("/home/sandbox/.local/lib/")
    assert "/home/sandbox/.local" in isolated.commands.run(["python", "-c", code]).stdout
    isolated.delete_context("later")


# Options


def test_mounts_are_seen_where_they_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro" / "x").write_text("of this machine")
    (tmp_path / "rw").mkdir(mode=0o777)
    (tmp_path / "rw").chmod(0o777)
    (tmp_path / "file").write_text("a file")
    mounts = {
        tmp_path / "ro": ("/data/ro", "ro"),
        str(tmp_path / "rw"): ("/data/rw", "rw"),
        str(tmp_path / "file"): ("/workspace/deep/file", "ro"),
    }
    with Sandbox.create("local-jupyter", isolation="bubblewrap", mounts=mounts) as sandbox:
        assert sandbox.files.read("/data/ro/x") == "of this machine"
        assert sandbox.files.read("/workspace/deep/file") == "a file"
        with pytest.raises(OSError, match="Read-only"):
            sandbox.files.write("/data/ro/y", "")
        sandbox.files.write("/data/rw/y", "written")
        assert (tmp_path / "rw" / "y").read_text() == "written"
        sandbox.files.write("/data/own", "beside them")
    assert (tmp_path / "ro").stat().st_uid == os.getuid(), "what is mounted stays its owner's"


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("isolation", "docker", "isolation takes 'auto', 'bubblewrap', 'landlock', 'none'"),
        ("mounts", "/data", "it takes {host: "),
        ("mounts", {"/tmp": "/data"}, '"ro" or "rw"'),
        ("mounts", {"/usr": ("data", "ro")}, "must be an absolute path"),
        ("mounts", {"/tmp": ("/data", "w")}, '"ro" or "rw"'),
        ("mounts", {"/no/such/place": ("/data", "ro")}, "there is no /no/such/place on this machine"),
        ("mounts", {"/tmp": ("/proc/x", "ro")}, "is the system's"),
        ("mounts", {"/tmp": ("/data/../usr/lib", "ro")}, "is the system's"),
        ("mounts", {"/tmp": ("/", "ro")}, "is the system's"),
        ("mounts", {5: ("/data", "ro")}, "a path of this machine"),
        ("pids", 0, "pids must be a whole number"),
        ("pids", "many", "pids must be a whole number"),
        ("disk", 1, "disk must be a whole number"),
        ("disk", True, "disk must be a whole number"),
        ("working_dir", "here", "must be an absolute path"),
        ("allowed_hosts", ["http://example.org/"], "http://example.org/"),
        ("gpu", "T4", "hides the GPUs"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(option: str, value: object, sentence: str) -> None:
    settings: dict[str, object] = {option: value}
    if option == "working_dir":
        settings = {"config": SandboxConfig(working_dir=value)}
    if option == "allowed_hosts":
        settings["network_policy"] = "allowlist"
    with pytest.raises(SandboxConfigurationError) as refused:
        Sandbox.create("local-jupyter", **settings)  # type: ignore[arg-type]  # that is the point
    assert sentence in str(refused.value)


def test_a_working_dir_is_one_of_the_sandbox() -> None:
    config = SandboxConfig(working_dir="/opt/project")
    with Sandbox.create("local-jupyter", config=config) as sandbox:
        assert printed(sandbox, "import os; open('x', 'w').close(); print(os.getcwd())") == "/opt/project"
        assert not Path("/opt/project").exists()
        context = sandbox.create_context("tmp", cwd="/tmp")
        assert printed(sandbox, "import os; print(os.getcwd())", context=context) == "/tmp"
        with pytest.raises(SandboxConnectionError, match="/no/such"):
            sandbox.create_context("lost", cwd="/no/such")


def test_bubblewrap_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "why_not", lambda method: "" if method == "none" else "it is not installed")

    with pytest.raises(SandboxConfigurationError, match="isolate with 'bubblewrap': it is not installed"):
        Sandbox.create("local-jupyter", isolation="bubblewrap")


@pytest.mark.parametrize("option", [{"pids": 5}, {"disk": 2**30}, {"memory": 512}, {"cpu": 1.0}])
@pytest.mark.parametrize("isolation", ["none", pytest.param("landlock", marks=needs_landlock)])
def test_what_only_bubblewrap_can_enforce_is_refused_without_it(
    isolation: str, option: dict[str, object]
) -> None:
    with pytest.raises(SandboxConfigurationError, match=r"that takes .*bubblewrap"):
        Sandbox.create("local-jupyter", isolation=isolation, **option)  # type: ignore[arg-type]  # any


# Limits


@needs_memory_limit
@pytest.mark.slow
def test_a_kernel_that_uses_up_the_memory_is_told_apart_from_one_that_was_killed() -> None:
    with Sandbox.create("local-jupyter", memory=256) as sandbox:
        assert sandbox.info.resources.memory == 256 * 1024**2
        result = sandbox.run_code("x = bytearray(10**9)")
        assert result.status == "kernel_died"
        assert "used up its memory of 256 MiB" in str(result.error)
        assert sandbox.run_code("1 + 1").text == "2"
        assert sandbox.run_code("import os; os.kill(os.getpid(), 9)").status == "kernel_died"
        assert "used up" not in str(sandbox.run_code("import os; os.kill(os.getpid(), 9)").error)


# Network


@pytest.mark.slow
def test_what_code_tries_to_reach_is_refused_clearly_and_logged() -> None:
    code = (
        "import urllib.request\n"
        "try: urllib.request.urlopen('http://example.org/')\n"
        "except Exception as error: print(error, error.read().decode())"
    )
    with Sandbox.create("local-jupyter", network_policy="none") as sandbox:
        before = time.time()
        assert 'network_policy is "none"' in printed(sandbox, code)
        (attempt,) = sandbox.network_log()
        assert isinstance(attempt, NetworkAttempt)
        assert (attempt.host, attempt.port, attempt.allowed) == ("example.org", 80, False)
        assert before - 1 < attempt.time < time.time() + 1
        assert printed(sandbox, "import socket; s = socket.create_server(('127.0.0.1', 0)); print(1)") == "1"


def test_a_network_that_nobody_watches_has_no_log(isolated: Sandbox) -> None:
    with pytest.raises(SandboxConfigurationError, match="it uses the machine's network"):
        isolated.network_log()


# Landlock


@needs_landlock
@pytest.mark.slow
def test_landlock_keeps_files_apart_where_there_are_no_enclosures(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with Sandbox.create("local-jupyter", isolation="landlock", network_policy="none") as sandbox:
        assert sandbox.info.isolation.startswith("landlock: ")
        code = f"open({str(tmp_path / 'secret')!r}).read()"
        assert "PermissionError" in str(sandbox.run_code(code).error)
        assert "PermissionError" in str(sandbox.run_code("open('/etc/shadow').read()").error)
        assert sandbox.run_code("open('own', 'w').write('own'); open('own').read()").text == "'own'"
        sandbox.files.write("a/b", "c")
        assert sandbox.commands.run("cat a/b").stdout == "c"
        result = sandbox.run_code("import socket; socket.socket()")
        assert "Address family not supported" in str(result.error)
        assert sandbox.run_code("import os; os._exit(2)").status == "kernel_died"
        assert sandbox.run_code("1 + 1").text == "2"
