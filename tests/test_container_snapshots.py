"""Snapshots of containers: what is special about them; the rest is in test_snapshots.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import docker
import pytest

from code_sandboxes import Sandbox, SandboxConfigurationError, SandboxPool, SandboxSnapshotError
from code_sandboxes.isolation.container import SNAPSHOTS
from conftest import wait_until
from tests.isolation.needs import IN_CONTAINERS

pytestmark = IN_CONTAINERS


def create(**settings: object) -> Sandbox:
    return Sandbox.create("local-docker", **{"network_policy": "none", **settings})  # type: ignore[arg-type]  # any


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the snapshots of this test are; none of its images may be left."""
    monkeypatch.setenv("CODE_SANDBOXES_SNAPSHOTS", str(tmp_path / "snapshots"))
    before = images()
    yield tmp_path / "snapshots" / "local-docker"
    with create() as sandbox:
        for snapshot in sandbox.list_snapshots():
            sandbox.delete_snapshot(snapshot.id)
    assert images() == before


def images() -> set[str]:
    """The numbers of all that the engine has, but for those that others are made of."""
    with closing(docker.from_env()) as engine:
        return {image.id or "" for image in engine.images.list()}


def names_of_snapshots() -> list[str]:
    with closing(docker.from_env()) as engine:
        return [name for image in engine.images.list(SNAPSHOTS) for name in image.tags]


def end_container(sandbox: Sandbox) -> None:
    (info,) = (info for info in Sandbox.list("local-docker") if info.id == sandbox.id)
    with closing(docker.from_env()) as engine:
        engine.containers.get(str(info.metadata["container"])).kill()


def test_files_variables_and_contexts_are_there_again_in_another_container() -> None:
    with create() as sandbox:
        sandbox.run_code(
            "def twice(x): return 2 * x\nnumbers = [1, 2]\nsame = numbers\nhandle = open('x', 'w')"
        )
        other = sandbox.create_context("other")
        sandbox.run_code("here = 'other'", context=other)
        for path in ("/workspace/a/b.txt", "/data/b.txt", "/home/sandbox/.config"):
            sandbox.files.write(path, path)
        info = sandbox.create_snapshot("mine")
        assert {"twice", "numbers", "same", "other:here"} <= {*info.variables}
        assert [*info.not_carried] == ["handle"]
    assert names_of_snapshots() == [f"{SNAPSHOTS}:{info.id}"]

    with create(snapshot_name="mine") as sandbox:
        assert sandbox.run_code("same.append(twice(21)); numbers").text == "[1, 2, 42]"
        assert sandbox.run_code("here", context="other").text == "'other'"
        for path in ("/workspace/a/b.txt", "/data/b.txt", "/home/sandbox/.config"):
            assert sandbox.files.read(path) == path
        assert [each.id for each in sandbox.list_snapshots()] == [info.id]


def test_what_root_has_changed_in_the_image_is_there_again() -> None:
    with create(user="root") as sandbox:
        sandbox.run_code("x = 1")
        sandbox.files.write("/usr/local/bin/hello", "#!/bin/sh\necho hello\n")
        sandbox.commands.run("chmod +x /usr/local/bin/hello", check=True)
        sandbox.create_snapshot("with-hello")
    with create(user="root", snapshot_name="with-hello") as sandbox:
        assert sandbox.commands.run("hello").stdout == "hello\n"
        assert sandbox.run_code("x").text == "1"
    # Nobody else can change it, but it is there.
    with create(snapshot_name="with-hello") as sandbox:
        assert sandbox.commands.run("hello").stdout == "hello\n"
        assert "Read-only" in str(sandbox.run_code("open('/usr/local/bin/hello', 'w')").error)


def test_a_snapshot_is_made_of_the_image_that_there_was() -> None:
    with closing(docker.from_env()) as engine:
        engine.images.get("code-sandboxes-jupyter:latest").tag("code-sandboxes-tests", "moving")
        with create(image="code-sandboxes-tests:moving") as sandbox:
            sandbox.create_snapshot("mine")
        engine.images.remove("code-sandboxes-tests:moving")
    with create(snapshot_name="mine") as sandbox:
        assert sandbox.run_code("1 + 1").text == "2"


def test_a_snapshot_that_is_in_use_can_be_deleted_and_its_image_goes_with_the_last_user() -> None:
    with create() as sandbox:
        info = sandbox.create_snapshot("mine")
        with create(snapshot_name="mine") as user:
            user.delete_snapshot(info.id)
            assert user.list_snapshots() == []
            end_container(user)  # another one can still be made
            wait_until(lambda: user.run_code("1 + 1").text == "2")
            with pytest.raises(SandboxSnapshotError, match="no snapshot 'mine' of local-docker"):
                create(snapshot_name="mine")


def test_one_that_fails_leaves_no_image(store: Path) -> None:
    with create() as sandbox:
        sandbox.create_snapshot("mine")
        with pytest.raises(SandboxSnapshotError, match="there is a snapshot 'mine' already"):
            sandbox.create_snapshot("mine")
        assert len(names_of_snapshots()) == 1
        assert len(list(store.iterdir())) == 1


def test_a_snapshot_has_an_image_of_its_own() -> None:
    with create() as sandbox:
        sandbox.create_snapshot("mine")
    with pytest.raises(SandboxConfigurationError, match="a snapshot has an image of its own"):
        create(snapshot_name="mine", image="code-sandboxes-jupyter:latest")


def test_a_pool_can_begin_with_one() -> None:
    with create() as sandbox:
        sandbox.run_code("x = 1")
        sandbox.create_snapshot("mine")
    with SandboxPool("local-docker", size=2, snapshot_name="mine", network_policy="none") as pool:
        assert [pool.acquire(timeout=60).run_code("x").text for _ in range(2)] == ["1", "1"]
