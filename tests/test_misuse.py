"""Bad input: the exact sentence for each, and nothing left behind."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from code_sandboxes import ContextNotFoundError, Sandbox, SandboxConfig
from code_sandboxes.keeper import client
from conftest import open_descriptors, sandbox_folders, wait_until

IN_A_CONTAINER = True


KERNELS = r"bash, .*python, python3"
REFUSED = "SandboxConfigurationError"
HERE = "the code runs in this process, with all that this process may do; use local-jupyter"
PROCESS_WIDE = "that would hold for this whole process, in which the code runs; use local-jupyter"
NEEDS_ISOLATION = "that takes (isolation=.bubblewrap.|bubblewrap; .*)"

AT_CREATE: list[tuple[dict[str, object], str, str]] = [
    (
        {"variant": "local-jupiter"},
        "ValueError",
        r"no sandbox variant 'local-jupiter' \(known: datalayer-runtime, jupyter-gateway, local-docker,"
        r" local-eval, local-jupyter\)",
    ),
    (
        {"colour": "red"},
        "TypeError",
        r"local-jupyter has no option 'colour'"
        r" \(known: disk, isolation, kernel_name, max_output, mounts, pids, preload\)",
    ),
    ({"config": {"timeout": 3}}, "TypeError", "config must be a SandboxConfig, not dict"),
    ({"timeout": -1}, "ValueError", "timeout must be 0 or more seconds, not -1.0"),
    ({"timeout": float("nan")}, "ValueError", "timeout must be 0 or more seconds, not nan"),
    ({"timeout": "3"}, "SandboxConfigurationError", "The 'timeout' trait of a SandboxConfig instance .*"),
    ({"env": {"A": 1}}, "TypeError", "env must map str to str, not int"),
    (
        {"env": {"A=B": "1"}},
        "ValueError",
        "env has a variable 'A=B': a name is not empty, without '=' and NUL",
    ),
    ({"env": {"A": "\0"}}, "ValueError", "env has a NUL in the value of 'A'"),
    (
        {"memory": 512},
        "SandboxConfigurationError",
        rf"local-jupyter cannot limit the memory \(memory_limit=536870912\): {NEEDS_ISOLATION}",
    ),
    (
        {"cpu": 2.0},
        "SandboxConfigurationError",
        rf"local-jupyter cannot limit the CPUs \(cpu_limit=2.0\): {NEEDS_ISOLATION}",
    ),
    (
        {"gpu": "T4"},
        "SandboxConfigurationError",
        r"local-jupyter cannot choose a GPU \(gpu='T4'\): .*",
    ),
    ({"memory": "512"}, "TypeError", "memory must be a number of MiB, not str"),
    ({"name": 5}, "TypeError", "name must be a str, not int"),
    ({"tags": 5}, "TypeError", "tags must be a mapping, not int"),
    ({"tags": {"a": 5}}, "TypeError", "tags must map str to str, not int"),
    ({"kernel_name": []}, "TypeError", "kernel_name must be a str, not list"),
    (
        {"preload": ["numpy"]},
        "SandboxConfigurationError",
        r"local-jupyter cannot preload \['numpy'\]: its kernels are started one by one yet",
    ),
    (
        {"network_policy": "none"},
        "SandboxConfigurationError",
        f"local-jupyter cannot enforce network_policy='none': {NEEDS_ISOLATION}",
    ),
    ({"network_policy": "some"}, "SandboxConfigurationError", ".*'network_policy' trait.*"),
    (
        {"pids": 5},
        "SandboxConfigurationError",
        rf"local-jupyter cannot limit the processes \(pids=5\): {NEEDS_ISOLATION}",
    ),
    (
        {"disk": 2**30},
        "SandboxConfigurationError",
        rf"local-jupyter cannot limit what can be written \(disk={2**30}\): {NEEDS_ISOLATION}",
    ),
    (
        {"mounts": {"/tmp": ("/data", "ro")}},
        "SandboxConfigurationError",
        f"local-jupyter cannot mount '/tmp': {NEEDS_ISOLATION}",
    ),
    (
        {"isolation": "docker"},
        "SandboxConfigurationError",
        "local-jupyter cannot isolate with 'docker':"
        " isolation takes 'auto', 'bubblewrap', 'landlock', 'none'",
    ),
    (
        {"environment": "python-cpu-env"},
        "SandboxConfigurationError",
        "local-jupyter cannot provide the environment 'python-cpu-env': it runs what is installed on this"
        " machine; choose with kernel_name=",
    ),
    (
        {"config": SandboxConfig(working_dir="/nowhere")},
        "SandboxConfigurationError",
        "local-jupyter cannot start in working_dir='/nowhere': there is no such directory on this machine",
    ),
    (
        {"snapshot_name": "no such snapshot"},
        "SandboxSnapshotError",
        r"no snapshot 'no such snapshot' of local-jupyter \(known: .*\)",
    ),
    (
        {"kernel_name": "cobol"},
        "SandboxConfigurationError",
        r"no kernelspec 'cobol' on this machine \(installed: bash, .*python3.*\)",
    ),
    (
        {"max_output": 0},
        "SandboxConfigurationError",
        "max_output must be a positive number of bytes, not 0",
    ),
    *(
        ({"variant": "local-eval", **settings}, kind, f"local-eval {sentence}")
        for settings, kind, sentence in (
            ({"isolation": "none"}, "TypeError", r"has no option 'isolation' \(known: none\)"),
            ({"memory": 512}, REFUSED, rf"cannot limit the memory \(memory_limit=536870912\): {HERE}"),
            ({"cpu": 2.0}, REFUSED, rf"cannot limit the CPUs \(cpu_limit=2.0\): {HERE}"),
            ({"gpu": "T4"}, REFUSED, rf"cannot choose a GPU \(gpu='T4'\): {HERE}"),
            ({"environment": "e"}, REFUSED, rf"cannot provide an environment \(environment='e'\): {HERE}"),
            ({"network_policy": "none"}, REFUSED, f"cannot enforce network_policy='none': {HERE}"),
            ({"network_policy": "allowlist"}, REFUSED, f"cannot enforce network_policy='allowlist': {HERE}"),
            ({"env": {"A": "1"}}, REFUSED, rf"cannot set environment variables \(A\): {PROCESS_WIDE}"),
            (
                {"config": SandboxConfig(working_dir="/tmp")},
                REFUSED,
                f"cannot start in the working directory '/tmp': {PROCESS_WIDE}",
            ),
            (
                {"config": SandboxConfig(idle_timeout=5)},
                REFUSED,
                "cannot enforce idle_timeout: nothing watches idle kernels yet; use max_lifetime",
            ),
            (
                {"snapshot_name": "mine"},
                REFUSED,
                "cannot make or restore snapshots: it cannot do that yet",
            ),
        )
    ),
]


@pytest.mark.parametrize(("settings", "kind", "sentence"), AT_CREATE, ids=lambda v: str(v)[:40])
def test_what_cannot_be_honoured_is_refused_at_create(
    runtime_folder: Path, settings: dict[str, object], kind: str, sentence: str
) -> None:
    keeper = client.the_keeper(runtime_folder)
    keeper.start()  # it would be connected to anyway, for a while
    wait_until(lambda: keeper.ask_if_running("ping") is not None)
    before = set(runtime_folder.iterdir()), open_descriptors()
    chosen = {} if "variant" in settings else {"variant": "local-jupyter", "isolation": "none"}
    arguments: dict[str, object] = {**chosen, **settings}
    with pytest.raises(Exception, match=f"^{sentence}$") as caught:
        Sandbox.create(**arguments)  # type: ignore[arg-type]  # on purpose

    assert type(caught.value).__name__ == kind
    assert (set(runtime_folder.iterdir()), open_descriptors()) == before


def test_an_unknown_setting_names_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"SandboxConfig has no setting 'time_out' \(known: .*timeout.*\)"):
        SandboxConfig(time_out=3)


def test_secrets_do_not_show_in_the_representation_of_a_config() -> None:
    assert "hunter2" not in repr(SandboxConfig(env_vars={"PASSWORD": "hunter2"}))


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"code": 5}, TypeError, "code must be a str, not int"),
        ({"code": b"1"}, TypeError, "code must be a str, not bytes"),
        ({"timeout": -1}, ValueError, "timeout must be 0 or more seconds, not -1"),
        ({"timeout": "1"}, TypeError, "timeout must be a number of seconds, not str"),
        ({"timeout": True}, TypeError, "timeout must be a number of seconds, not bool"),
        ({"language": 5}, TypeError, "language must be a str, not int"),
        ({"context": "nope"}, LookupError, r"no context 'nope' in this sandbox \(known: default\)"),
        ({"on_stdout": "print"}, TypeError, "on_stdout must be a function, not str"),
    ],
)
def test_a_bad_argument_of_a_run_is_refused_and_the_sandbox_goes_on(
    shared_sandbox: Sandbox, arguments: dict[str, object], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=f"^{sentence}$"):
        shared_sandbox.run_code(**({"code": "1"} | arguments))  # type: ignore[arg-type]  # on purpose
    assert shared_sandbox.run_code("1 + 1").text == "2"


UNKNOWN_LANGUAGE = {
    "local-docker": "local-docker only runs the Python of its image, not the language 'cobol'",
    "local-eval": "local-eval only supports Python, not the language 'cobol'",
    "local-jupyter": rf"no kernel for the language 'cobol' \(installed: {KERNELS}.*\)",
    "jupyter-gateway": r"no kernel for the language 'cobol' \(installed: .*python, python3\)",
    "datalayer-runtime": r"no kernel for the language 'cobol' \(installed: .*python, python3\)",
}


def test_an_unknown_language_is_refused_and_the_known_ones_named(
    shared_sandbox: Sandbox, variant: str
) -> None:
    sentence = UNKNOWN_LANGUAGE[variant]
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        shared_sandbox.run_code("1", language="cobol")
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        shared_sandbox.create_context(language="cobol")


def test_a_kernel_that_dies_at_start_is_told_with_what_it_said(
    runtime_folder: Path, broken_kernel: str
) -> None:
    _assert_start_fails(
        runtime_folder,
        broken_kernel,
        "the kernel 'broken' exited with code 7 before it answered; it said: no luck",
    )


def test_a_kernel_whose_program_is_missing_is_told(
    runtime_folder: Path, install_kernel: Callable[..., str], tmp_path: Path
) -> None:
    name = install_kernel("gone", ["no-such-program", "{connection_file}"])
    _assert_start_fails(
        runtime_folder,
        name,
        f"the kernel 'gone' could not be started: its kernelspec in {tmp_path}/kernels/gone names the"
        " program 'no-such-program', which is not there",
    )


def test_a_kernel_that_never_answers_is_given_up_and_killed(
    runtime_folder: Path, install_kernel: Callable[..., str]
) -> None:
    program = "import time; time.sleep(600)"
    name = install_kernel("silent", [sys.executable, "-c", program, "{connection_file}"])
    _assert_start_fails(
        runtime_folder,
        name,
        "the kernel 'silent' did not answer within 0.5 s; it said nothing",
        config=SandboxConfig(start_timeout=0.5),
    )


@pytest.mark.needs("languages.bash")
def test_a_kernelspec_that_is_no_json_does_not_harm_the_others(
    install_kernel: Callable[..., str], tmp_path: Path, shared_sandbox: Sandbox
) -> None:
    install_kernel("ok", [sys.executable])
    (tmp_path / "kernels" / "ok" / "kernel.json").write_text("{")
    with pytest.raises(ValueError, match="no kernel for the language 'cobol'"):
        shared_sandbox.run_code("1", language="cobol")


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("/dev/null/no", "cannot make the runtime folder /dev/null/no: Not a directory; set"),
        ("/usr", "the runtime folder /usr is not a folder that only this user can enter; set"),
        ("{tmp}/" + "long" * 20, r"the path of the runtime folder .* bytes too long for sockets; set"),
    ],
)
def test_a_runtime_folder_that_cannot_be_used_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, sentence: str
) -> None:
    monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", folder.format(tmp=tmp_path))
    with pytest.raises(Exception, match=f"^{sentence} CODE_SANDBOXES_RUNTIME_DIR to a "):
        Sandbox.create("local-jupyter", isolation="none")


def test_a_relative_runtime_folder_is_as_good_as_any(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODE_SANDBOXES_RUNTIME_DIR", "run")
    with Sandbox.create("local-jupyter", isolation="none") as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"
    assert sandbox_folders(tmp_path / "run") == set()


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ContextNotFoundError("a", ["b"])))

    assert str(error) == "no context 'a' in this sandbox (known: b)"


def test_the_front_itself_is_no_sandbox() -> None:
    with pytest.raises(TypeError, match=r"Sandbox is made by Sandbox\.create\(\)"):
        Sandbox()


def test_the_variant_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE_SANDBOXES_VARIANT", "local-moon")
    with pytest.raises(ValueError, match="no sandbox variant 'local-moon'"):
        Sandbox.create()


def _assert_start_fails(
    runtime_folder: Path, kernel_name: str, sentence: str, config: SandboxConfig | None = None
) -> None:
    before = set(runtime_folder.iterdir()), open_descriptors()
    with pytest.raises(ConnectionError) as caught:
        Sandbox.create("local-jupyter", isolation="none", kernel_name=kernel_name, config=config)

    assert str(caught.value) == sentence
    assert (set(runtime_folder.iterdir()), open_descriptors()) == before
