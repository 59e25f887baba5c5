"""What a sandbox of local-jupyter is planned to be, and what is refused of what was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from code_sandboxes import Sandbox, SandboxConfig, SandboxConfigurationError
from code_sandboxes.isolation import bubblewrap
from code_sandboxes.isolation.cgroups import LEAST_CPU
from code_sandboxes.isolation.plan import Mount, Plan
from code_sandboxes.isolation.probe import probe
from code_sandboxes.isolation.system import SYSTEM
from code_sandboxes.variants import installations, plans
from code_sandboxes.variants.base import ContextSpec
from code_sandboxes.variants.installations import folders_of, is_visible, mounts_of, own_folders
from code_sandboxes.variants.kernelspecs import installed_kernels
from code_sandboxes.variants.launches import launch_of
from code_sandboxes.variants.plans import describe, plan_of

NEEDS_BUBBLEWRAP = pytest.mark.skipif(
    bool(probe().bubblewrap), reason=f"BUBBLEWRAP DOES NOT WORK HERE: {probe().bubblewrap}"
)
NEEDS_LANDLOCK = pytest.mark.skipif(
    bool(probe().landlock_reason), reason=f"NO LANDLOCK HERE: {probe().landlock_reason}"
)

MakeFolder = Callable[[str], str]


def refuse(setting: str, reason: str) -> SandboxConfigurationError:
    return SandboxConfigurationError(f"cannot {setting}: {reason}")


def planned(config: SandboxConfig | None = None, **options: object) -> Plan:
    options = {"isolation": "bubblewrap", **options}
    return plan_of(config or SandboxConfig(), options, installed_kernels().values(), refuse)


def refused(config: SandboxConfig | None = None, **options: object) -> str:
    """The sentence."""
    with pytest.raises(SandboxConfigurationError) as caught:
        planned(config, **options)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """Makes a folder that everybody can write."""

    def make(name: str) -> str:
        path = tmp_path / name
        path.mkdir()
        path.chmod(0o777)
        return str(path)

    return make


# What can be reached from a sandbox


@NEEDS_BUBBLEWRAP
def test_nothing_is_mounted_through_which_code_could_speak_to_the_keeper(
    monkeypatch: pytest.MonkeyPatch, folder: MakeFolder, tmp_path: Path
) -> None:
    runtime, link = Path(folder("runtime")), tmp_path / "link"
    runtime.chmod(0o700)
    (runtime / "k1").mkdir()
    link.symlink_to(tmp_path)
    monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(link / "runtime"))

    for source in (runtime, runtime / "k1", link, tmp_path, "/"):
        sentence = refused(mounts={source: ("/data/x", "ro")})
        assert f"the runtime folder {runtime} would be seen with it" in sentence
    assert planned(mounts={folder("beside"): ("/data/x", "ro")})


@NEEDS_BUBBLEWRAP
def test_a_runtime_folder_in_an_installation_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: MakeFolder
) -> None:
    prefix = folder("prefix")
    runtime = Path(prefix, "lib", "runtime")
    runtime.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr(sys, "prefix", prefix)

    for isolation in ("bubblewrap", *(["landlock"] if not probe().landlock_reason else [])):
        assert f"cannot show {prefix}/lib to a sandbox" in refused(isolation=isolation)


@NEEDS_BUBBLEWRAP
def test_a_runtime_folder_in_the_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("code_sandboxes.variants.mounts.runtime_root", lambda: Path("/usr/lib"))

    assert "the runtime folder /usr/lib would be seen with it" in refused()


# Places in a sandbox


@NEEDS_BUBBLEWRAP
@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("//data/x", "/data/x"),
        ("///data//x/", "/data/x"),
        ("/data/./y/../x", "/data/x"),
        ("/home/sandbox/x", "/home/sandbox/x"),
        ("/workspace/", "/workspace"),
    ],
)
def test_a_place_is_written_in_one_way(folder: MakeFolder, given: str, place: str) -> None:
    config = SandboxConfig(working_dir=given)

    mount = planned(mounts={folder("x"): (given, "ro")}).mounts[-1]

    assert (mount.target, mount.is_asked_for) == (place, True)
    assert planned(config).working_dir == place


RESERVED = ["/etc/passwd", "/dev", "/dev/shm", "/proc/self", "/run", "/sys", *SYSTEM, "/usr/share", "//bin/x"]


@NEEDS_BUBBLEWRAP
@pytest.mark.parametrize("place", RESERVED)
def test_what_is_the_systems_is_no_place_for_mounts_or_to_start(folder: MakeFolder, place: str) -> None:
    assert "is the system's in the sandbox" in refused(mounts={folder("x"): (place, "ro")})
    assert "is the system's in the sandbox" in refused(SandboxConfig(working_dir=place))


@NEEDS_BUBBLEWRAP
def test_code_can_start_at_the_root_and_at_home() -> None:
    for place in ("/", "/home/sandbox", "/home"):
        assert planned(SandboxConfig(working_dir=place)).working_dir == place


@NEEDS_BUBBLEWRAP
@pytest.mark.parametrize("path", ["/data/\0", "/data/\n", "/data/\x1b[2J", "/data/\udc80"])
def test_what_cannot_be_printed_is_in_no_place(folder: MakeFolder, path: str) -> None:
    assert "cannot be printed" in refused(mounts={folder("x"): (path, "ro")})
    assert "cannot be printed" in refused(SandboxConfig(working_dir=path))


@NEEDS_BUBBLEWRAP
def test_no_mount_hides_what_the_sandbox_needs(folder: MakeFolder) -> None:
    x = folder("x")
    for place in ("/home", "/home/sandbox", "/home/sandbox/", "//home"):
        assert "/home/sandbox, where code is at home, would be hidden" in refused(mounts={x: (place, "ro")})
    for place in ("/nix", "/gnu"):
        assert f"{place}/store, which is the system's in the sandbox, would be hidden" in refused(
            mounts={x: (place, "ro")}
        )
    installed = next(mount for mount in planned().mounts if os.path.isdir(mount.target)).target
    for place in (installed, os.path.dirname(installed), f"{installed}/x"):
        assert f"kernels are installed in {installed}" in refused(mounts={x: (place, "ro")})


@NEEDS_BUBBLEWRAP
def test_two_mounts_are_not_at_one_place(folder: MakeFolder) -> None:
    mounts = {folder("x"): ("/data/x", "ro"), folder("y"): ("/data//x/", "ro")}

    assert "something else is mounted there" in refused(mounts=mounts)


@NEEDS_BUBBLEWRAP
def test_nothing_lies_where_others_can_write(folder: MakeFolder) -> None:
    shared = {folder("shared"): ("/data", "rw")}

    below = refused(mounts={**shared, folder("x"): ("/data/x", "ro")})
    assert 'it lies in /data, which is mounted "rw"' in below
    assert 'it lies in /data, which is mounted "rw"' in refused(
        SandboxConfig(working_dir="/data/x"), mounts=shared
    )
    assert planned(SandboxConfig(working_dir="/data"), mounts=shared)


@NEEDS_BUBBLEWRAP
def test_a_source_with_a_nul_is_refused() -> None:
    assert "no path of this machine has a NUL" in refused(mounts={"/srv/\0": ("/data/x", "ro")})


@NEEDS_BUBBLEWRAP
def test_there_are_not_more_mounts_than_can_be_made_quickly() -> None:
    mounts = {f"/srv/{i}": (f"/data/{i}", "ro") for i in range(101)}

    assert refused(mounts=mounts) == "cannot honour 101 mounts: there may be 100; mount what they are in"


# What is shown of an installation


def test_of_an_installation_only_its_parts_are_shown(
    folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Path(folder("project"))
    for name in ("bin", "lib", "share", "src", ".git", "conda-meta"):
        (project / name).mkdir()
    for name in (".env", "pyvenv.cfg"):
        (project / name).touch()
    (project / "bin" / "kernel").symlink_to(sys.executable)
    parts = [f"{project}/{name}" for name in ("bin", "conda-meta", "lib", "pyvenv.cfg", "share")]

    shown = folders_of([f"{project}/bin/kernel"], "")
    assert [path for path in shown if path.startswith(str(project))] == parts

    monkeypatch.setattr(sys, "prefix", str(project))
    assert [path for path in own_folders() if path.startswith(str(project))] == parts


def test_of_an_interpreter_at_home_only_programs_and_libraries_are_shown(
    folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(folder("home"))
    for name in ("bin", "lib", "share", ".local/bin", ".local/lib", ".local/share"):
        (home / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for prefix in (home, home / ".local"):
        monkeypatch.setattr(sys, "prefix", str(prefix))

        shown = [path for path in own_folders() if path.startswith(str(prefix))]

        assert shown == [f"{prefix}/bin", f"{prefix}/lib"]


@NEEDS_BUBBLEWRAP
def test_every_path_that_this_interpreter_imports_from_is_visible() -> None:
    visible = planned().mounts

    for path in {sys.executable, os.path.realpath(sys.executable), os.__file__, pytest.__file__}:
        assert is_visible(path, visible), path
    assert not is_visible(sys.prefix, visible) or installations._is_system(sys.prefix)


@pytest.mark.slow
@NEEDS_BUBBLEWRAP
def test_a_virtual_environment_in_a_project_runs_and_the_project_is_not_seen(
    folder: MakeFolder, install_kernel: Callable[..., str]
) -> None:
    project = Path(folder("project"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(project)], check=True)
    (project / ".env").write_text("a secret")
    libraries = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    (project / libraries / "packages.pth").write_text(str(Path(pytest.__file__).parent.parent))
    program = f"{project}/bin/python"
    name = install_kernel("project", [program, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    with Sandbox.create("local-jupyter", isolation="bubblewrap", kernel_name=name) as sandbox:
        result = sandbox.run_code("import os, sys; print(sys.prefix, *sorted(os.listdir(sys.prefix)))")

    prefix, *seen = result.stdout.split()
    assert prefix == str(project)
    assert {"bin", "lib", "pyvenv.cfg"} <= set(seen) <= {"bin", "include", "lib", "lib64", "pyvenv.cfg"}


# Limits


@NEEDS_BUBBLEWRAP
@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        (
            {"memory_limit": 10 * 2**20},
            {},
            "memory must be from 64 MiB to 1 PiB, not 10 MiB (memory=10, or memory_limit=10485760 of a"
            " config)",
        ),
        ({"memory_limit": -1}, {}, "memory must be from 64 MiB"),
        ({"memory_limit": 10**400}, {}, "memory must be from 64 MiB"),
        (
            {"cpu_limit": 0.001},
            {},
            "cpu (cpu_limit of a config) must be from 0.01 to 8192 CPUs, not 0.001",
        ),
        ({"cpu_limit": 1e9}, {}, "not 1000000000.0"),
        ({"cpu_limit": float("nan")}, {}, "not nan"),
        ({}, {"pids": 15}, "pids must be a whole number from 16 to 4194304, not 15"),
        ({}, {"pids": 10**30}, "pids must be a whole number from 16"),
        ({}, {"disk": 10**30}, "disk must be a whole number of bytes from 1048576 to 1125899906842624, not"),
    ],
)
def test_a_limit_that_cannot_be_one_is_refused_in_the_words_of_who_set_it(
    monkeypatch: pytest.MonkeyPatch,
    settings: Mapping[str, object],
    options: Mapping[str, object],
    sentence: str,
) -> None:
    monkeypatch.setattr(plans, "enforceable", lambda method: dict.fromkeys(plans._THINGS, ""))

    assert sentence in refused(SandboxConfig(**settings), **options)


@pytest.mark.slow
@NEEDS_BUBBLEWRAP
def test_a_kernel_starts_and_runs_commands_with_the_least_of_everything() -> None:
    can = plans.enforceable("bubblewrap")
    cpu = None if can["cpu"] else LEAST_CPU * 10  # with the least it would take minutes to start
    memory = None if can["memory"] else 64
    with Sandbox.create(
        "local-jupyter", isolation="bubblewrap", pids=16, disk=2**20, cpu=cpu, memory=memory
    ) as sandbox:
        assert sandbox.commands.run("echo started").stdout == "started\n"


# What is said


@NEEDS_BUBBLEWRAP
def test_mounts_that_were_asked_for_are_named_and_that_a_writable_one_has_no_limit(
    folder: MakeFolder,
) -> None:
    x, y = folder("x"), folder("y")

    told = describe(planned(mounts={x: ("/data/x", "ro"), y: ("/data/y", "rw")}))

    assert f"/data/x ('{x}', read-only), /data/y ('{y}', writable, without a limit)" in told
    assert sys.prefix not in told
    assert "of this machine it has" not in describe(planned())


@NEEDS_BUBBLEWRAP
def test_the_program_is_the_one_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    program = shutil.which("bwrap")
    assert program is not None
    monkeypatch.setenv("PATH", "/nowhere")

    plan = planned()

    assert plan.program == os.path.realpath(program)
    assert Plan.from_json(plan.as_json()) == plan


@pytest.mark.parametrize("isolation", ["none", pytest.param("bubblewrap", marks=NEEDS_BUBBLEWRAP)])
def test_the_librarys_own_variables_are_not_the_users(isolation: str) -> None:
    variables = {"CODE_SANDBOXES_PACKAGES": "/tmp"}
    sentence = (
        "env cannot set CODE_SANDBOXES_PACKAGES: names that begin with CODE_SANDBOXES_ are the library's"
    )

    assert sentence in refused(SandboxConfig(env_vars=variables), isolation=isolation)
    context = ContextSpec("id", "name", "python", "python3", None, variables)
    plan = planned(isolation=isolation)
    with pytest.raises(SandboxConfigurationError, match=sentence):
        launch_of(installed_kernels()["python3"], context, plan, "/tmp", {})


# Files of this machine


def test_files_of_this_machine_need_not_be_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_bytes(b"127.0.0.1 caf\xe9\n")
    monkeypatch.setattr(bubblewrap, "_RESOLVING", (str(hosts),))

    assert bubblewrap.data_files(Plan("bubblewrap"), 1)[str(hosts)] == b"127.0.0.1 caf\xe9\n"


# Landlock


@NEEDS_LANDLOCK
def test_with_landlock_code_starts_at_home_or_where_it_can_read(tmp_path: Path) -> None:
    config = SandboxConfig(working_dir=str(tmp_path))
    assert "code has nothing but its home" in refused(config, isolation="landlock")

    plan = planned(isolation="landlock")
    home = tmp_path / "home"
    (home / "below").mkdir(parents=True)
    (home / "link").symlink_to(tmp_path)
    python = installed_kernels()["python3"]
    for cwd in (str(home), str(home / "below"), "/usr"):
        context = ContextSpec("id", "name", "python", "python3", cwd, {})
        assert launch_of(python, context, plan, str(home), {})["cwd"] == cwd
    for cwd in (str(tmp_path), str(home / "link"), "/"):
        context = ContextSpec("id", "name", "python", "python3", cwd, {})
        with pytest.raises(SandboxConfigurationError, match="with isolation='landlock' code has nothing but"):
            launch_of(python, context, plan, str(home), {})


@NEEDS_LANDLOCK
@pytest.mark.skipif(os.geteuid() != 0, reason="this is not root")
def test_with_landlock_root_is_told_what_that_leaves() -> None:
    assert "of root's files it can change modes" in describe(planned(isolation="landlock"))


def test_mounts_of_folders_in_one_another_are_one(folder: MakeFolder) -> None:
    outer = folder("outer")
    Path(outer, "inner").mkdir()

    assert [mount.source for mount in mounts_of([outer, f"{outer}/inner"])] == [outer]
    assert mounts_of([outer])[0] == Mount.of(outer, outer)
