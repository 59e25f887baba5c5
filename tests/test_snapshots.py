"""Snapshots: what was there is there again in another sandbox, what is not is named, and nobody is harmed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from code_sandboxes import (
    AsyncSandbox,
    LocalJupyterSandbox,
    Sandbox,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxPool,
    SandboxSnapshotError,
    SandboxSnapshotWarning,
    SnapshotInfo,
)
from code_sandboxes.isolation.probe import probe
from conftest import MakeSandbox, sandbox_folders, wait_until

ISOLATED = True
EVERY_FRONT = ("blocking", "async")

pytestmark = [
    pytest.mark.needs("snapshots"),
    pytest.mark.not_in_a_container("what is special about it is in test_container_snapshots.py"),
]

MIB = 1024**2

# Of the guest in a kernel, as code finds it that means harm.
GUEST = """
import gc
guest = next(o for o in gc.get_objects() if type(o).__name__ == "Guest" and hasattr(o, "_functions"))
part = next(each for each in guest._parts if type(each).__name__ == "Snapshots")
"""

# Waits, as it is pickled, for a file.
WAITING = """
import os, time
class Waiting:
    def __reduce__(self):
        open("waits", "w").close()
        while not os.path.exists("go"): time.sleep(0.01)
        return int, ()
waiting = Waiting()
"""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the snapshots of this test are."""
    monkeypatch.setenv("CODE_SANDBOXES_SNAPSHOTS", str(tmp_path / "snapshots"))
    return tmp_path / "snapshots" / "local-jupyter"


def text_of(sandbox: Sandbox, code: str, **settings: Any) -> str | None:
    result = sandbox.run_code(code, **settings)
    assert result.error is None, result.error
    return result.text


# What was there is there again.


def test_files_are_there_again(sandbox: Sandbox, make_sandbox: MakeSandbox) -> None:
    sandbox.files.write_bytes("big", os.urandom(5 * MIB))
    sandbox.files.write("folder/module.py", "value = 7")
    sandbox.run_code(
        "import os\nos.symlink('folder', 'link')\nos.link('big', 'hard')\n"
        "os.chmod('folder/module.py', 0o640)\nos.mkfifo('fifo')\n"
        "os.makedirs(os.path.expanduser('~/.config'))\n"
        "open(os.path.expanduser('~/.config/mine'), 'w').write('x')\nimport folder.module as module"
    )
    content = sandbox.files.read_bytes("big")

    info = sandbox.create_snapshot("mine")
    restored = make_sandbox(snapshot_name="mine")

    assert info.size > 5 * MIB
    assert restored.files.read_bytes("big") == content
    assert restored.files.get_info("link").symlink_target == "folder"
    assert restored.files.get_info("folder/module.py").mode == 0o640
    assert not restored.files.exists("fifo")
    assert text_of(restored, "import os\nmodule.value, os.path.samefile('big', 'hard')") == "(7, True)"
    assert text_of(restored, "open(os.path.expanduser('~/.config/mine')).read()") == "'x'"


def test_variables_functions_and_classes_are_there_again(sandbox: Sandbox, make_sandbox: MakeSandbox) -> None:
    sandbox.run_code(
        "import dataclasses, enum, numpy as np, pandas as pd\n"
        "def plus(x): return x + offset\n"
        "offset = 10\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n    def moved(self): return Point(plus(self.x))\n"
        "class Color(enum.Enum):\n    RED = 1\n"
        "point, red = Point(1), Color.RED\n"
        "array = np.arange(1_000_000)\n"
        "frame = pd.DataFrame({'a': [1, 2]})\n"
        "shared = [point]\n"
        "one, two = {'s': shared}, (shared, array)"
    )

    info = sandbox.create_snapshot("mine")
    restored = make_sandbox(snapshot_name="mine")

    assert info.not_carried == {}
    assert {"plus", "Point", "point", "np", "frame"} <= set(info.variables)
    assert text_of(restored, "offset = 20\npoint.moved()") == "Point(x=21)"
    assert text_of(restored, "type(point) is Point, red is Color.RED, isinstance(frame, pd.DataFrame)") == (
        "(True, True, True)"
    )
    assert text_of(restored, "one['s'] is shared is two[0], two[1] is array, shared[0] is point") == (
        "(True, True, True)"
    )
    assert text_of(restored, "int(array.sum()), int(frame.a.sum())") == "(499999500000, 3)"
    assert restored.info.metadata["snapshot"] == "mine"
    assert restored.info.metadata["not_restored"] == {}


def test_contexts_are_there_again(sandbox: Sandbox, make_sandbox: MakeSandbox) -> None:
    sandbox.run_code("import os\nx = 1\nos.makedirs(os.path.expanduser('~/work/here'))")
    home = (text_of(sandbox, "os.path.expanduser('~')") or "").strip("'")
    worker = sandbox.create_context("worker", cwd=f"{home}/work", env={"MINE": "5"})
    sandbox.run_code(
        "import os\nx = 2\ndef f(): return x, os.environ['MINE'], os.listdir()\ng = (i for i in 'ab')",
        context=worker,
    )

    info = sandbox.create_snapshot("mine")
    restored = make_sandbox(snapshot_name="mine")

    assert {"x", "worker:x", "worker:f"} <= set(info.variables)
    assert info.not_carried == {"worker:g": "cannot pickle 'generator' object"}
    assert text_of(restored, "x") == "1"
    assert text_of(restored, "f()", context="worker") == "(2, '5', ['here'])"
    assert [context.name for context in restored.list_contexts()] == ["default", "worker"]


@pytest.mark.one_front
def test_a_context_that_cannot_be_made_again_is_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with Sandbox.create("local-jupyter", isolation="none") as sandbox:
        sandbox.run_code("x = 1")
        sandbox.create_context("worker", cwd=str(tmp_path / "gone"))
        sandbox.create_snapshot("mine")
    (tmp_path / "gone").rmdir()

    with pytest.warns(SandboxSnapshotWarning, match=r"worker:\*"):
        restored = Sandbox.create("local-jupyter", isolation="none", snapshot_name="mine")

    with restored:
        assert text_of(restored, "x") == "1"
        assert [context.name for context in restored.list_contexts()] == ["default"]


@pytest.mark.one_front
@pytest.mark.needs("languages.bash")
def test_contexts_in_other_languages_are_made_again_without_variables(
    sandbox: Sandbox, make_sandbox: MakeSandbox
) -> None:
    sandbox.create_context("shell", language="bash")
    sandbox.run_code("x=1", context="shell")

    info = sandbox.create_snapshot("mine")
    restored = make_sandbox(snapshot_name="mine")

    assert info.not_carried == {"shell:*": "the variables of bash cannot be carried"}
    assert restored.run_code('echo "x is $x"', context="shell").stdout == "x is "


@pytest.mark.one_front
def test_one_snapshot_begins_many_sandboxes_and_is_made_of_one_that_began_so(
    sandbox: Sandbox, make_sandbox: MakeSandbox
) -> None:
    sandbox.run_code("x = [1]\ndef f(): x.append(len(x) + 1); return x")
    sandbox.create_snapshot("first")
    second = make_sandbox(snapshot_name="first")
    text_of(second, "f()")
    second.create_snapshot("second")

    assert text_of(make_sandbox(snapshot_name="first"), "f()") == "[1, 2]"
    assert text_of(make_sandbox(snapshot_name="second"), "f()") == "[1, 2, 3]"


@pytest.mark.one_front
def test_a_pool_can_begin_with_one(sandbox: Sandbox, variant: str, isolation: dict[str, Any]) -> None:
    sandbox.run_code("x = 1")
    sandbox.create_snapshot("mine")

    with SandboxPool(variant, size=1, snapshot_name="mine", **isolation) as pool:
        assert text_of(pool.acquire(timeout=60), "x") == "1"
    with (
        SandboxPool(variant, size=1, snapshot_name="another", **isolation) as pool,
        pytest.raises(SandboxSnapshotError, match="no snapshot 'another'"),
    ):
        pool.acquire(timeout=60)


# What cannot be carried is named.


def test_what_is_not_carried_is_named(sandbox: Sandbox, make_sandbox: MakeSandbox) -> None:
    sandbox.run_code(
        "import subprocess, threading\n"
        "lines, lock = (i for i in 'ab'), threading.Lock()\n"
        "file = open('f', 'w')\n"
        "process = subprocess.Popen(['sleep', '60'])\n"
        "class Bad:\n    def __reduce__(self): raise ValueError('never')\n"
        "bad = Bad()\n"
        "x = [1]\n"
        "holds = {'x': x, 'lock': lock}"
    )

    info = sandbox.create_snapshot("mine")
    restored = make_sandbox(snapshot_name="mine")
    sandbox.run_code("process.kill(); process.wait()")

    assert set(info.not_carried) == {"lines", "lock", "file", "process", "bad", "holds"}
    assert info.not_carried["lines"] == "cannot pickle 'generator' object"
    assert info.not_carried["bad"] == "ValueError: never"
    assert text_of(restored, "x") == "[1]"
    assert restored.run_code("holds").error is not None


@pytest.mark.one_front
def test_what_does_not_come_to_an_end_is_named(sandbox: Sandbox, make_sandbox: MakeSandbox) -> None:
    sandbox.run_code(
        f"{GUEST}part._variables.PATIENCE = 1.0\ndel guest, part, gc\nimport threading\n"
        "class Blocked:\n    def __reduce__(self): threading.Event().wait()\n"
        "class Busy:\n    def __reduce__(self):\n        while True: pass\n"
        "blocked, busy, x = Blocked(), Busy(), [1]"
    )

    info = sandbox.create_snapshot("mine")

    assert info.not_carried == dict.fromkeys(("blocked", "busy"), "it takes longer than 1 s")
    assert sandbox.run_code("x").text == text_of(make_sandbox(snapshot_name="mine"), "x") == "[1]"


@pytest.mark.slow
def test_what_does_not_come_back_is_named(sandbox: Sandbox, make_sandbox: MakeSandbox) -> None:
    sandbox.run_code(
        "import threading\nclass Blocked:\n    def __setstate__(self, state): threading.Event().wait()\n"
        "blocked = Blocked()\nblocked.x = x = [1]\nholds = (blocked, x)"
    )
    sandbox.create_snapshot("mine")

    with pytest.warns(SandboxSnapshotWarning):
        restored = make_sandbox(snapshot_name="mine")

    left = restored.info.metadata["not_restored"]
    assert left == dict.fromkeys(("blocked", "holds"), "it takes longer than 20 s")
    assert text_of(restored, "x") == "[1]"


def test_what_cannot_be_built_again_is_named_in_a_warning(
    sandbox: Sandbox, make_sandbox: MakeSandbox
) -> None:
    sandbox.run_code(
        f"{GUEST}part._definitions.MAGIC_NUMBER, part._definitions.PYTHON = b'other', '2.7'\n"
        "del guest, part, gc\n"
        "def f(): pass\n"
        "class Bad:\n    def __setstate__(self, state): raise OSError('no')\n"
        "x = [1]"
    )
    sandbox.create_snapshot("mine")

    with pytest.warns(
        SandboxSnapshotWarning, match=r"^not everything of the snapshot 'mine' was restored: f, Bad"
    ):
        restored = make_sandbox(snapshot_name="mine")

    left = restored.info.metadata["not_restored"]
    assert isinstance(left, dict)
    assert set(left) == {"f", "Bad"}
    assert left["f"].startswith("it has code of Python 2.7, which Python 3.")
    assert text_of(restored, "x") == "[1]"


def test_the_warning_is_about_whoever_has_made_the_sandbox(
    sandbox: Sandbox, isolation: dict[str, Any]
) -> None:
    sandbox.run_code(
        "class Bad:\n    def __setstate__(self, state): raise OSError('no')\nbad = Bad()\nbad.x = 1"
    )
    sandbox.create_snapshot("mine")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Sandbox.create("local-jupyter", snapshot_name="mine", **isolation).kill()

    assert [(each.category, each.filename) for each in caught] == [(SandboxSnapshotWarning, __file__)]


# What is there.


def test_snapshots_are_listed_and_deleted(sandbox: Sandbox, store: Path) -> None:
    sandbox.run_code("x = 1")
    first, second = sandbox.create_snapshot("first"), sandbox.create_snapshot("the second, \u00e9")

    assert isinstance(first, SnapshotInfo)
    assert sandbox.list_snapshots() == [first, second]
    assert (first.name, first.variant, first.variables) == ("first", "local-jupyter", ("x",))
    assert 0 < first.created_at <= second.created_at
    sandbox.delete_snapshot(first.id)
    assert sandbox.list_snapshots() == [second]
    with pytest.raises(
        SandboxSnapshotError, match=rf"no snapshot '{first.id}' of local-jupyter \(known: 'the"
    ):
        sandbox.delete_snapshot(first.id)
    sandbox.delete_snapshot("the second, \u00e9")
    assert (sandbox.list_snapshots(), list(store.iterdir())) == ([], [])


def test_a_name_is_given_once(sandbox: Sandbox, store: Path) -> None:
    first = sandbox.create_snapshot("mine")

    with pytest.raises(
        SandboxSnapshotError, match=rf"^there is a snapshot 'mine' already, {first.id}: delete it"
    ):
        sandbox.create_snapshot("mine")

    assert sandbox.list_snapshots() == [first]
    assert [path.name for path in store.iterdir()] == [first.id]


@pytest.mark.parametrize("name", ["", " ", "a/b", "..\\up", "a:b", "\n", "x" * 101, "\ud800"])
def test_a_name_can_be_told(shared_sandbox: Sandbox, name: str) -> None:
    with pytest.raises(ValueError, match="a snapshot cannot be named"):
        shared_sandbox.create_snapshot(name)


@pytest.mark.parametrize("name", [None, 5, b"mine"])
def test_a_name_is_a_text(shared_sandbox: Sandbox, name: Any) -> None:
    with pytest.raises(TypeError, match=r"^the name of a snapshot must be a str, not"):
        shared_sandbox.create_snapshot(name)
    with pytest.raises(TypeError, match=r"^the id of a snapshot must be a str, not"):
        shared_sandbox.delete_snapshot(name)
    if name is not None:
        with pytest.raises(TypeError, match=r"^snapshot_name must be a str, not"):
            LocalJupyterSandbox(snapshot_name=name)


def test_an_unknown_snapshot_is_told_before_anything_is_started(
    make_sandbox: MakeSandbox, sandbox: Sandbox, runtime_folder: Path
) -> None:
    sandbox.create_snapshot("mine")
    before = sandbox_folders(runtime_folder)

    with pytest.raises(
        SandboxSnapshotError, match=r"^no snapshot 'other' of local-jupyter \(known: 'mine'\)$"
    ):
        make_sandbox(snapshot_name="other")

    assert sandbox_folders(runtime_folder) == before


@pytest.mark.one_front
def test_a_variant_without_snapshots_refuses() -> None:
    why = r"^local-eval cannot make or restore snapshots: "
    with pytest.raises(SandboxConfigurationError, match=why):
        Sandbox.create("local-eval", snapshot_name="mine")
    with Sandbox.create("local-eval") as sandbox:
        assert not sandbox.capabilities.snapshots
        with pytest.raises(SandboxConfigurationError, match=why):
            sandbox.create_snapshot("mine")
        with pytest.raises(SandboxConfigurationError, match=why):
            sandbox.list_snapshots()
        with pytest.raises(SandboxConfigurationError, match=why):
            sandbox.delete_snapshot("mine")


@pytest.mark.one_front
def test_another_isolation_is_refused_before_anything_is_started(store: Path, runtime_folder: Path) -> None:
    if probe().bubblewrap:
        pytest.skip(f"no bubblewrap: {probe().bubblewrap}")
    with Sandbox.create("local-jupyter", isolation="bubblewrap") as sandbox:
        sandbox.create_snapshot("mine")
    before = sandbox_folders(runtime_folder)

    with pytest.raises(SandboxSnapshotError, match=r"it has the files of /, and this sandbox .* in ~ only"):
        Sandbox.create("local-jupyter", isolation="none", snapshot_name="mine")

    assert sandbox_folders(runtime_folder) == before


@pytest.mark.one_front
def test_snapshots_are_this_users(sandbox: Sandbox, store: Path) -> None:
    info = sandbox.create_snapshot("mine")

    paths = [store, *store.rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o600}
    store.chmod(0o755)
    with pytest.raises(SandboxConfigurationError, match="is not a folder that only this user can enter"):
        sandbox.list_snapshots()
    store.chmod(0o700)
    (store / info.id / "snapshot.json").write_text("{}")
    assert sandbox.list_snapshots() == []


# It has its turn.


def test_nothing_changes_where_it_is_made(sandbox: Sandbox) -> None:
    sandbox.run_code("x = 1")
    look = "import sys\n(sorted(globals()), len(In), len(Out), '_code_sandboxes_builders' in sys.modules)"
    before = sandbox.run_code(look)

    sandbox.create_snapshot("mine")
    after = sandbox.run_code(look)

    assert after.execution_count == (before.execution_count or 0) + 1
    names, ins, outs, has_module = eval(before.text or "")
    new = {
        f"_i{before.execution_count}",
        f"_{before.execution_count}",
        f"_i{after.execution_count}",
        "__warningregistry__",
    }
    after_names, after_ins, after_outs, after_has_module = eval(after.text or "")
    assert set(after_names) - set(names) <= new
    assert (after_ins, after_outs, after_has_module) == (ins + 1, outs + 1, has_module)
    assert not has_module


@pytest.mark.one_front
def test_it_waits_for_the_end_of_a_run_and_the_next_one_for_its_own(sandbox: Sandbox) -> None:
    sandbox.run_code(WAITING)
    kernel = sandbox._core._contexts["default"].kernel
    with ThreadPoolExecutor() as threads:
        threads.submit(
            sandbox.run_code,
            "x = 1\nopen('begun', 'w').close()\nwhile not os.path.exists('end'): time.sleep(0.01)",
        )
        wait_until(lambda: sandbox.files.exists("begun"))
        snapshot = threads.submit(sandbox.create_snapshot, "mine")
        wait_until(lambda: len(kernel._queue) == 1)
        assert not sandbox.files.exists("waits")
        sandbox.files.write("end", "")
        wait_until(lambda: sandbox.files.exists("waits"))
        later = threads.submit(sandbox.run_code, "x = 2")
        wait_until(lambda: len(kernel._queue) == 1)
        assert sandbox.interrupt()  # nothing runs that it would interrupt
        sandbox.files.write("go", "")

        assert "x" in snapshot.result().variables
        assert later.result().success
    with Sandbox.create(
        "local-jupyter", isolation=sandbox.info.isolation.partition(":")[0], snapshot_name="mine"
    ) as restored:
        assert text_of(restored, "x") == "1"


def test_it_does_not_wait_for_a_run_in_whose_callback_it_is(sandbox: Sandbox) -> None:
    with pytest.raises(RuntimeError, match="from inside a callback"):
        sandbox.run_code("print(1)", on_stdout=lambda _: sandbox.create_snapshot("mine"))

    assert sandbox.list_snapshots() == []


@pytest.mark.one_front
def test_who_gives_up_waiting_leaves_nothing(store: Path, isolation: dict[str, Any]) -> None:
    async def main() -> None:
        async with AsyncSandbox.create("local-jupyter", **isolation) as sandbox:
            await sandbox.run_code(WAITING)
            making = asyncio.create_task(sandbox.create_snapshot("mine"))
            while not await sandbox.files.exists("waits"):
                assert not making.done()
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making
            assert await sandbox.list_snapshots() == []
            await sandbox.files.write("go", "")
            assert (await sandbox.run_code("1 + 1")).text == "2"

    asyncio.run(main())
    assert list(store.iterdir()) == []


# What goes wrong leaves nothing.


def test_a_kernel_that_is_killed_in_the_middle_leaves_nothing(sandbox: Sandbox, store: Path) -> None:
    sandbox.run_code(
        "import os\nclass Deadly:\n    def __reduce__(self): os.kill(os.getpid(), 9)\n"
        "x, deadly = os.urandom(3 * 1024**2), Deadly()"
    )

    with pytest.raises(SandboxConnectionError, match="died with signal 9"):
        sandbox.create_snapshot("mine")

    assert (sandbox.list_snapshots(), list(store.iterdir())) == ([], [])
    result = sandbox.run_code("1 + 1")
    assert (result.text, result.state_preserved) == ("2", False)
    sandbox.create_snapshot("mine")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "none", folder]).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.one_front
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_leaves_nothing(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "small"):
        monkeypatch.setenv("CODE_SANDBOXES_SNAPSHOTS", str(tmp_path / "small"))
        sandbox.files.write_bytes("big", os.urandom(20 * MIB))
        why = r"^the snapshot 'mine' was given up after 1\d(\.\d)? MiB: in .*/local-jupyter there is no room"
        with pytest.raises(SandboxSnapshotError, match=why):
            sandbox.create_snapshot("mine")
        assert list((tmp_path / "small" / "local-jupyter").iterdir()) == []
        sandbox.files.rm("big")
        sandbox.create_snapshot("mine")
        sandbox.delete_snapshot("mine")


@pytest.mark.one_front
def test_what_a_killed_program_has_left_is_removed(sandbox: Sandbox, store: Path) -> None:
    sandbox.create_snapshot("mine")
    for name in (".snapshot-left", ".snapshot-busy"):
        (store / name).mkdir()
        (store / name / "files.tar").write_text("half")
    busy = os.open(store / ".snapshot-busy", os.O_RDONLY)
    fcntl.flock(busy, fcntl.LOCK_EX)

    assert [info.name for info in sandbox.list_snapshots()] == ["mine"]
    sandbox.create_snapshot("other")

    assert {path.name for path in store.iterdir() if path.name.startswith(".")} == {".snapshot-busy"}
    os.close(busy)


@pytest.mark.one_front
def test_a_restoration_that_fails_leaves_nothing(
    sandbox: Sandbox, make_sandbox: MakeSandbox, store: Path, runtime_folder: Path
) -> None:
    info = sandbox.create_snapshot("mine")
    for part in (store / info.id).glob("variables-*"):
        part.write_bytes(b"V" + bytes(8) + b"garbage" * 10)
    before = sandbox_folders(runtime_folder)

    with pytest.raises(SandboxSnapshotError, match=r"^the snapshot 'mine' could not be restored: .*Damaged"):
        make_sandbox(snapshot_name="mine")

    assert sandbox_folders(runtime_folder) == before


@pytest.mark.one_front
def test_files_that_have_no_room_are_no_sandbox(
    sandbox: Sandbox, make_sandbox: MakeSandbox, runtime_folder: Path
) -> None:
    if not sandbox.capabilities.disk_limit:
        pytest.skip(sandbox.capabilities.disk_limit.reason)
    sandbox.files.write_bytes("big", os.urandom(6 * MIB))
    sandbox.create_snapshot("mine")
    before = sandbox_folders(runtime_folder)

    with pytest.raises(SandboxSnapshotError, match="No space left on device"):
        make_sandbox(snapshot_name="mine", disk=4 * MIB)

    assert sandbox_folders(runtime_folder) == before


# What means harm does none.


@pytest.mark.one_front
def test_what_is_unpickled_is_unpickled_in_the_sandbox(
    sandbox: Sandbox, make_sandbox: MakeSandbox, tmp_path: Path
) -> None:
    if not sandbox.info.isolation.startswith("bubblewrap"):
        pytest.skip("without isolation code can write anywhere")
    sandbox.run_code(
        f"class Evil:\n    def __reduce__(self): return open, ({str(tmp_path / 'out')!r}, 'w')\n"
        "evil, x = Evil(), 1"
    )
    sandbox.create_snapshot("mine")

    with pytest.warns(SandboxSnapshotWarning, match="evil"):
        restored = make_sandbox(snapshot_name="mine")

    assert not (tmp_path / "out").exists()
    assert text_of(restored, "x") == "1"


EVIL_TAR = """
import io, tarfile
def evil(root, folders, leave_out, write, left):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, target in [
            ("{up}/out", tarfile.REGTYPE, ""),
            ("{out}", tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, "{folder}"),
            ("link/out", tarfile.REGTYPE, ""),
            ("hard", tarfile.LNKTYPE, "{up}/victim"),
            ("victim", tarfile.SYMTYPE, "{victim}"),
            ("victim", tarfile.REGTYPE, ""),
            ("device", tarfile.CHRTYPE, ""),
            ("fine", tarfile.REGTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, target, 0o6777
            info.size = 4 if info.isreg() else 0
            tar.addfile(info, io.BytesIO(b"evil"))
    write(buffer.getvalue())
part._archive.save = evil
"""


@pytest.mark.one_front
def test_no_tar_reaches_out_of_a_sandbox(tmp_path: Path) -> None:
    """Where nothing else would keep it from that."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    places = {"up": "../" * 20 + str(tmp_path), "out": tmp_path / "out", "folder": tmp_path, "victim": victim}
    with Sandbox.create("local-jupyter", isolation="none") as sandbox:
        code = EVIL_TAR
        for name, place in places.items():
            code = code.replace("{" + name + "}", str(place))
        assert sandbox.run_code(GUEST + code).success
        sandbox.create_snapshot("mine")

    with pytest.warns(SandboxSnapshotWarning):
        restored = Sandbox.create("local-jupyter", isolation="none", snapshot_name="mine")
    with restored:
        assert restored.files.read("fine") == restored.files.read("victim") == "evil"
        assert restored.files.get_info("fine").mode == 0o777
        assert not restored.files.exists("device")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshots", "victim"]
    assert victim.read_text() == "untouched"


@pytest.mark.one_front
@pytest.mark.parametrize(
    "evil",
    [
        "lambda call, folders: 5",
        "lambda call, folders: {}",
        "lambda call, folders: {'left': [1]}",
        "lambda call, folders: {'left': {'a': 5}}",
        "lambda call, folders: {'left': {str(n): '' for n in range(100_001)}}",
        "lambda call, folders: call.channel.send(5) or {'left': {}}",
        "lambda call, folders: call.channel.send({}, [bytes(9 * 1024**2)]) or {'left': {}}",
        "lambda call, folders: [call.channel.send({'again': 1}) for _ in range(101)] and {'left': {}}",
        "lambda call, folders: call.channel.end(None) or {'left': {}}",
        "lambda call, folders: 1 / 0",
    ],
)
def test_a_guest_that_lies_is_not_believed(sandbox: Sandbox, store: Path, evil: str) -> None:
    assert sandbox.run_code(f"{GUEST}guest._functions['snapshots.save_files'] = {evil}").success

    with pytest.raises(SandboxError):
        sandbox.create_snapshot("mine")

    assert (sandbox.list_snapshots(), list(store.iterdir())) == ([], [])
    assert sandbox.run_code("1 + 1").text == "2"


@pytest.mark.one_front
def test_files_do_not_come_into_what_is_mounted(
    sandbox: Sandbox, make_sandbox: MakeSandbox, tmp_path: Path
) -> None:
    if not sandbox.capabilities.mounts:
        pytest.skip(sandbox.capabilities.mounts.reason)
    shown = tmp_path / "shown"
    shown.mkdir()
    shown.chmod(0o777)
    (shown / "mine").write_text("this machine's")
    sandbox.run_code("open('/data/mine', 'w').write('the snapshot')\nopen('/data/new', 'w').write('x')")
    sandbox.create_snapshot("mine")

    with pytest.warns(SandboxSnapshotWarning):
        restored = make_sandbox(snapshot_name="mine", mounts={str(shown): ("/data", "rw")})

    assert (shown / "mine").read_text() == "this machine's"
    assert os.listdir(shown) == ["mine"]
    left = restored.info.metadata["not_restored"]
    assert left == dict.fromkeys(("/data", "/data/mine", "/data/new"), "something else is mounted there")
