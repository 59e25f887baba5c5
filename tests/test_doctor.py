"""``python -m code_sandboxes doctor`` tells what holds here, and what would mend the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from code_sandboxes import Sandbox
from code_sandboxes.__main__ import main
from code_sandboxes.doctor import examine
from code_sandboxes.isolation.probe import probe


def doctor(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "code_sandboxes", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path or os.environ["PATH"]},
    )


def test_its_status_says_whether_anything_is_missing() -> None:
    result = doctor("doctor")
    assert result.stderr == ""
    assert result.returncode == bool(examine().missing)
    assert ("enforces every limit" in result.stdout) == (result.returncode == 0)


def test_it_tells_what_the_capabilities_tell() -> None:
    report = examine()
    for name, variant in report.variants.items():
        capabilities = Sandbox.capabilities_of(name)
        for field, capability in variant.enforces.items():
            if field != "files":
                assert capability == getattr(capabilities, field)
    assert report.variants["local-eval"].missing == list(report.variants["local-eval"].enforces)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere bubblewrap would not help")
def test_without_bubblewrap_it_names_what_is_missing_and_the_package_in_eighty_columns() -> None:
    result = doctor("doctor", path="/nonexistent")
    told = " ".join(result.stdout.split())
    assert result.returncode == 1
    assert "bubblewrap no: bubblewrap is not installed; install it (" in told
    assert 'local-jupyter does not enforce here: network "allowlist", memory limit' in told
    # A path is never broken, so that it can be copied.
    assert all(len(line) <= 80 or sys.executable in line for line in result.stdout.splitlines())
    assert "\x1b" not in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals to be had")
def test_at_a_terminal_it_has_colours() -> None:
    master, slave = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    command = [sys.executable, "-m", "code_sandboxes", "doctor"]
    with subprocess.Popen(command, stdout=slave, env=environment) as process:
        os.close(slave)
        said = b""
        try:
            while part := os.read(master, 65536):
                said += part
        except OSError:  # EIO: its end, where the other side was closed (pty(7))
            pass
        finally:
            os.close(master)
    assert process.returncode in (0, 1)
    assert b"\x1b[31mno:\x1b[0m" in said


@pytest.mark.slow
def test_a_program_can_read_it() -> None:
    result = doctor("doctor", "--json")
    told = json.loads(result.stdout)
    assert told["missing"] == examine().missing
    assert told["variants"]["local-eval"]["enforces"]["memory_limit"]["supported"] is False
    assert told["machine"]["bubblewrap"].startswith(probe().bubblewrap_version or "no: ")


@pytest.mark.parametrize("arguments", [[], ["docotr"], ["doctor", "--jsno"]])
def test_wrong_usage_has_a_status_of_its_own(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(arguments)
    assert wrong.value.code == 2
    assert "usage: python -m code_sandboxes" in capsys.readouterr().err
