"""The reason why bubblewrap cannot be used is the one that holds: each is brought about here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from code_sandboxes.isolation.probe import probe
from code_sandboxes.isolation.seccomp import deny_filter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is nothing to be found")

ASK = "from code_sandboxes.isolation.probe import probe; print(probe().bubblewrap)"

# What it imports as it goes, this user may not be able to read.
ASK_AS_USER = """
import os, resource
from code_sandboxes.isolation import probe
os.setgroups([]); os.setresgid(12345, 12345, 12345); os.setresuid(12345, 12345, 12345)
print(probe.probe().bubblewrap)
"""

NEEDS_BUBBLEWRAP = pytest.mark.skipif(
    bool(probe().bubblewrap), reason=f"BUBBLEWRAP DOES NOT WORK HERE: {probe().bubblewrap}"
)
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")

# A place like this machine, for another user.
ELSEWHERE = (
    "bwrap",
    "--unshare-user",
    "--uid",
    "1000",
    "--bind",
    "/",
    "/",
    "--dev",
    "/dev",
    "--proc",
    "/proc",
)

WITHOUT_CAPABILITIES = "--ambient-caps=-all --inh-caps=-all"


def said_by(*command: str, ask: str = ASK, path: str | None = None, fds: tuple[int, ...] = ()) -> str:
    """What is told against bubblewrap by a Python that *command* starts."""
    result = subprocess.run(
        [*command, sys.executable, "-c", ask],
        capture_output=True,
        text=True,
        pass_fds=fds,
        env=os.environ | {"PATH": path or os.environ["PATH"]},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_it_is_quick_and_done_once() -> None:
    probe.cache_clear()
    before = time.perf_counter()
    facts = probe()
    assert time.perf_counter() - before < 1  # it is 0.01 here
    assert probe() is facts


@NEEDS_BUBBLEWRAP
def test_what_works_has_no_reason_against_it() -> None:
    facts = probe()
    assert facts.bubblewrap == ""
    assert facts.bubblewrap_path == shutil.which("bwrap")
    assert facts.bubblewrap_version in subprocess.check_output(["bwrap", "--version"], text=True)


@NEEDS_BUBBLEWRAP
@NEEDS_ROOT
def test_it_works_for_an_ordinary_user_too() -> None:
    assert said_by(ask=ASK_AS_USER) == ""


def test_what_is_not_installed_is_named_with_its_package() -> None:
    said = said_by(path="/nonexistent")
    assert said.startswith("bubblewrap is not installed; install it (")
    assert "bubblewrap)" in said


def fake(folder: Path, says: str) -> str:
    """A PATH with a bwrap that fails saying that."""
    program = folder / "bwrap"
    version = '[ "$1" = --version ] && echo bubblewrap 0.4.1 && exit'
    program.write_text(f'#!/bin/sh\n{version}\necho "bwrap: {says}" >&2\nexit 1\n')
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_one_that_is_too_old_is_told_with_what_it_lacks(tmp_path: Path) -> None:
    said = said_by(path=fake(tmp_path, "Unknown option --size"))
    assert said == f"bubblewrap 0.4.1 ({tmp_path}/bwrap) has no --size; install 0.7 or newer"


def test_what_nobody_has_thought_of_is_told_as_it_is(tmp_path: Path) -> None:
    said = said_by(path=fake(tmp_path, "the moon is full"))
    assert said == "bubblewrap does not work: the moon is full"


def test_one_that_cannot_be_executed_is_told(tmp_path: Path) -> None:
    (tmp_path / "bwrap").write_text("not a program")
    (tmp_path / "bwrap").chmod(0o755)
    assert "cannot be run" in said_by(path=str(tmp_path))


@NEEDS_BUBBLEWRAP
@pytest.mark.parametrize("kind", ["user", "net", "pid"])
def test_a_sysctl_that_allows_no_namespaces_is_named(kind: str) -> None:
    forbid = f'echo 0 > /proc/sys/user/max_{kind}_namespaces; exec setpriv {WITHOUT_CAPABILITIES} "$@"'
    said = said_by(*ELSEWHERE, "--cap-add", "CAP_SYS_RESOURCE", "sh", "-c", forbid, "sh")
    assert f"there may be none (user.max_{kind}_namespaces is 0)" in said
    assert f"as root: sysctl -w user.max_{kind}_namespaces=" in said


@NEEDS_BUBBLEWRAP
def test_a_user_with_capabilities_is_told_to_drop_them() -> None:
    said = said_by(*ELSEWHERE, "--cap-add", "CAP_SYS_RESOURCE")
    assert said.startswith("bubblewrap cannot be run by a user who has capabilities without being root")
    assert WITHOUT_CAPABILITIES in said


@NEEDS_BUBBLEWRAP
def test_no_more_user_namespaces_in_a_sandbox() -> None:
    said = said_by(*ELSEWHERE, "--disable-userns")
    assert "there are too many, or too many in one another, as in another sandbox" in said


@NEEDS_BUBBLEWRAP
def test_a_proc_that_is_partly_covered_is_told() -> None:
    said = said_by(*ELSEWHERE)
    assert said.startswith("bubblewrap cannot mount /proc: parts of that of this machine are covered")
    assert "systempaths=unconfined" in said


@NEEDS_BUBBLEWRAP
def test_a_filter_of_system_calls_is_told_from_other_refusals() -> None:
    fd = os.memfd_create("filter")
    os.write(fd, deny_filter())
    os.lseek(fd, 0, os.SEEK_SET)
    said = said_by(*ELSEWHERE, "--seccomp", str(fd), fds=(fd,))
    os.close(fd)
    assert said.startswith("bubblewrap cannot make a user namespace: a filter of system calls forbids it")


@NEEDS_BUBBLEWRAP
@NEEDS_ROOT
@pytest.mark.parametrize("capability", ["sys_admin", "net_admin", "setuid"])
def test_a_root_that_may_not_is_told_what_it_lacks(capability: str) -> None:
    without = (f"--bounding-set=-{capability}", f"--inh-caps=-{capability}")
    said = said_by("setpriv", *without)
    assert f"this root has no CAP_{capability.upper()}, as in a container" in said


@NEEDS_BUBBLEWRAP
@NEEDS_ROOT
def test_a_user_in_a_chroot_is_told_that(tmp_path: Path) -> None:
    enter = f'mount --rbind / {tmp_path} && exec chroot {tmp_path} "$@"'
    said = said_by("unshare", "-m", "sh", "-c", enter, "sh", ask=ASK_AS_USER)
    assert said.startswith("bubblewrap cannot make a user namespace: the system forbids it to this user")
    assert "in a chroot" in said


def test_landlock_is_of_use_or_has_a_reason_against_it() -> None:
    assert (probe().landlock >= 3) != bool(probe().landlock_reason)
