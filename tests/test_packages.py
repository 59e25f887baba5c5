"""Packages: installed for the interpreter of the kernel, and their names are never anything else."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from code_sandboxes import Sandbox, SandboxConfigurationError, SandboxExecutionError
from conftest import MakeSandbox

IN_A_CONTAINER = True
EVERY_FRONT = ("blocking", "async")


@pytest.mark.parametrize(
    ("packages", "error"),
    [
        (["--index-url=http://example.org"], ValueError),
        (["-r", "/etc/passwd"], ValueError),
        ([" --user"], ValueError),
        (["\t-e."], ValueError),
        ([""], ValueError),
        ([" "], ValueError),
        (["a\n--user"], ValueError),
        (["a\0b"], ValueError),
        (["numpy", "-U"], ValueError),
        ([], ValueError),
        ("numpy", TypeError),
        ([b"numpy"], TypeError),
        ({"numpy"}, TypeError),
        (None, TypeError),
    ],
)
def test_what_is_no_package_is_refused(
    shared_sandbox: Sandbox, packages: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error, match="package"):
        shared_sandbox.install_packages(packages)


def test_a_file_of_requirements_that_is_missing_is_named(shared_sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        shared_sandbox.install_requirements(tmp_path / "nothing.txt")
    assert raised.value.filename == str(tmp_path / "nothing.txt")
    with pytest.raises(TypeError, match="path must be a str or a path, not int"):
        shared_sandbox.install_requirements(5)  # type: ignore[arg-type]


# The rest needs an interpreter of its own to install into: this one's packages, and a place for more.


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("venv")
    folder.chmod(0o755)  # in a sandbox code is another user
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "ours.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture
def sandbox_to_install_in(
    make_sandbox: MakeSandbox, install_kernel: Callable[..., str], interpreter: Path
) -> Sandbox:
    argv = [str(interpreter), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    name = install_kernel("own", argv, language="python")
    return make_sandbox(kernel_name=name, env={"PIP_NO_INDEX": "1"})


def wheel(folder: Path, name: str) -> Path:
    """A package with one module that says its name."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": f"NAME = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={digest(text)},{len(text)}\n" for path, text in files.items())
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            archive.writestr(each, text)
    return path


def digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@pytest.mark.not_in_a_container("it runs its image's kernel")
@pytest.mark.needs("own_process")
@pytest.mark.slow
def test_what_is_installed_can_be_imported_in_the_next_cell(
    sandbox_to_install_in: Sandbox, tmp_path: Path, front: str
) -> None:
    sandbox, name = sandbox_to_install_in, f"packaged_for_{front}"
    code = f"import {name}; {name}.NAME"
    missing = sandbox.run_code(code)
    assert missing.error is not None
    assert missing.error.name == "ModuleNotFoundError"

    result = sandbox.install_packages([str(wheel(tmp_path, name))])

    assert result.success
    assert "Successfully installed" in result.stdout
    assert sandbox.run_code(code).text == repr(name)


@pytest.mark.not_in_a_container("it runs its image's kernel")
@pytest.mark.needs("own_process")
@pytest.mark.slow
def test_requirements_of_this_machine_are_installed_and_leave_no_file(
    sandbox_to_install_in: Sandbox, tmp_path: Path, front: str
) -> None:
    sandbox, name = sandbox_to_install_in, f"required_for_{front}"
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"# what we need\n{wheel(tmp_path, name)}\n")
    look = "import glob, tempfile; glob.glob(tempfile.gettempdir() + '/requirements-*.txt')"
    before = sandbox.run_code(look).text

    assert sandbox.install_requirements(requirements).success

    assert sandbox.run_code(f"import {name}; {name}.NAME").text == repr(name)
    assert sandbox.run_code(look).text == before


@pytest.mark.not_in_a_container("it runs its image's kernel")
@pytest.mark.needs("own_process")
@pytest.mark.slow
def test_a_failure_says_what_pip_said(sandbox_to_install_in: Sandbox, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for package in ("surely-there-is-none", f"x; touch {trap}", f"$(touch {trap})", f"`touch {trap}`"):
        with pytest.raises(SandboxExecutionError, match="pip did not install") as raised:
            sandbox_to_install_in.install_packages([package])
        assert raised.value.result is not None
        assert not raised.value.result.success
    assert "surely-there-is-none" in str(raised.value) or "ERROR" in str(raised.value)
    assert not trap.exists()


@pytest.mark.needs("languages.bash")
@pytest.mark.slow
def test_packages_for_another_language_are_refused(sandbox: Sandbox) -> None:
    context = sandbox.create_context("shell", language="bash")
    with pytest.raises(SandboxConfigurationError, match="packages are for Python, and the context 'shell'"):
        sandbox.install_packages(["numpy"], context=context)
