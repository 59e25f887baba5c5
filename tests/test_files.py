"""``sandbox.files``: what it reads, writes, finds and refuses, on every variant."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from code_sandboxes import (
    FileType,
    FileWatchEvent,
    FileWatchEventType,
    OutputMessage,
    Sandbox,
    SandboxConnectionError,
    SandboxNotStartedError,
)
from code_sandboxes.guest import files as guest_files, watching as guest_watching
from conftest import BUSY, open_descriptors, wait_until
from tests.test_keeper import mounted_tmpfs

IN_A_CONTAINER = True
ON_A_SERVER = True

FAST_VARIANT = "local-jupyter"
EVERY_FRONT = ("blocking", "async")

MIB = 1024**2

is_root = pytest.mark.skipif(os.getuid() != 0, reason="needs the rights of root")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


def errors_of(call: Callable[[], object]) -> tuple[type[BaseException], str | None, object]:
    """What *call* raises: the class, the name of the number and the path."""
    with pytest.raises(OSError, match=r"Errno") as caught:
        call()
    return type(caught.value), errno.errorcode.get(caught.value.errno or 0), caught.value.filename


# Reading and writing.


@pytest.mark.parametrize("text", ["", "Hello World", "\u00e9\U0001f600\r\n\0\n"])
def test_text_is_read_as_it_was_written(shared_sandbox: Sandbox, folder: str, text: str) -> None:
    shared_sandbox.files.write(f"{folder}/made/for/it.txt", text)

    assert shared_sandbox.files.read(f"{folder}/made/for/it.txt") == text
    assert Path(folder, "made/for/it.txt").read_bytes() == text.encode()


@pytest.mark.parametrize("size", [1, 4 * MIB, 4 * MIB + 1, 13 * MIB + 7])
def test_content_of_any_size_is_read_as_it_was_written(
    shared_sandbox: Sandbox, folder: str, size: int
) -> None:
    content = os.urandom(1000) * (size // 1000 + 1)
    content = content[:size]
    files = shared_sandbox.files
    path = f"{folder}/content"
    files.write_bytes(path, content)

    assert files.read_bytes(path) == content
    assert b"".join(files.read_stream(path)) == content
    assert files.read_bytes(path, offset=size // 2) == content[size // 2 :]
    assert files.read_bytes(path, size // 3, 5 * MIB) == content[size // 3 :][: 5 * MIB]
    assert files.read_bytes(path, offset=size + 1) == b""


@pytest.mark.parametrize(
    "content",
    [
        lambda: bytearray(b"\xff\x00abc"),
        lambda: memoryview(b"\xff\x00abc"),
        lambda: memoryview(b"\xff_\x00_a_b_c_")[::2],
        lambda: io.BytesIO(b"\xff\x00abc"),
    ],
    ids=["bytearray", "memoryview", "strided", "file"],
)
def test_whatever_holds_bytes_can_be_written(
    shared_sandbox: Sandbox, folder: str, content: Callable[[], bytes]
) -> None:
    shared_sandbox.files.write_bytes(f"{folder}/f", content())

    assert shared_sandbox.files.read_bytes(f"{folder}/f") == b"\xff\x00abc"


def test_many_files_are_written(shared_sandbox: Sandbox, folder: str) -> None:
    contents: dict[str, str | bytes | io.BytesIO] = {f"{folder}/d/{i}": f"{i}" for i in range(40)}
    contents |= {f"{folder}/big": bytes(5 * MIB), f"{folder}/file": io.BytesIO(b"x")}
    shared_sandbox.files.write_files(contents)

    assert [shared_sandbox.files.read(f"{folder}/d/{i}") for i in range(40)] == [f"{i}" for i in range(40)]
    assert Path(folder, "big").stat().st_size == 5 * MIB
    assert Path(folder, "file").read_bytes() == b"x"


def test_text_that_is_no_utf8_is_an_error_and_can_be_read_as_bytes(
    shared_sandbox: Sandbox, folder: str
) -> None:
    shared_sandbox.files.write(f"{folder}/f", b"\xff")

    with pytest.raises(UnicodeDecodeError):
        shared_sandbox.files.read(f"{folder}/f")


def test_what_is_no_content_no_path_and_no_number_is_refused(shared_sandbox: Sandbox, folder: str) -> None:
    files = shared_sandbox.files
    wrong: list[Callable[[], object]] = [
        lambda: files.write(f"{folder}/f", 5),  # type: ignore[arg-type]  # that is the test
        lambda: files.write(f"{folder}/f", io.StringIO("text")),
        lambda: files.write(5, "x"),  # type: ignore[arg-type]  # that is the test
        lambda: files.read(None),  # type: ignore[arg-type]  # that is the test
        lambda: files.read_bytes("f", offset=1.5),  # type: ignore[arg-type]  # that is the test
        lambda: files.list(folder, depth="2"),  # type: ignore[arg-type]  # that is the test
        lambda: files.write_files(["f"]),  # type: ignore[arg-type]  # that is the test
        lambda: files.upload("f", "f", on_progress=5),  # type: ignore[arg-type]  # that is the test
    ]
    for call in wrong:
        with pytest.raises(TypeError):
            call()
    invalid: list[tuple[Callable[[], object], str]] = [
        (lambda: files.read_bytes("f", offset=-1), "offset must be 0 or more"),
        (lambda: files.read_bytes("f", length=-1), "length must be 0 or more"),
        (lambda: files.list(folder, depth=0), "depth must be 1 or more"),
        (lambda: files.read("a\0b"), "embedded null"),
        (lambda: files.open(f"{folder}/f", "rw").close(), "invalid mode: 'rw'"),
        (lambda: files.open(f"{folder}/f", "rb", encoding="utf-8").close(), "binary mode takes no encoding"),
    ]
    for call, message in invalid:
        with pytest.raises(ValueError, match=message):
            call()
    assert os.listdir(folder) == []


def test_a_file_that_is_replaced_keeps_its_permissions_and_links_stay(
    shared_sandbox: Sandbox, folder: str
) -> None:
    target = Path(folder, "target")
    target.write_text("old")
    target.chmod(0o751)
    Path(folder, "link").symlink_to("target")
    Path(folder, "dangling").symlink_to("to_be_made")
    shared_sandbox.files.write(f"{folder}/link", "new")
    shared_sandbox.files.write(f"{folder}/dangling", "made")

    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o751
    assert Path(folder, "link").is_symlink()
    assert Path(folder, "to_be_made").read_text() == "made"
    assert sorted(os.listdir(folder)) == ["dangling", "link", "target", "to_be_made"]


def test_a_write_that_fails_leaves_the_old_file(shared_sandbox: Sandbox, folder: str) -> None:
    path = Path(folder, "f")
    path.write_text("old")

    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 5 * MIB:
                raise ZeroDivisionError
            return super().read(size)

    with pytest.raises(ZeroDivisionError):
        shared_sandbox.files.write(str(path), Breaking(bytes(9 * MIB)))
    wait_until(lambda: os.listdir(folder) == ["f"])
    assert path.read_text() == "old"


@pytest.mark.not_in_a_container("it does not see what is mounted later")
@is_root
@pytest.mark.parametrize("size", [2 * MIB, 20 * MIB], ids=["small", "big"])
def test_a_full_disk_leaves_the_old_file(shared_sandbox: Sandbox, tmp_path: Path, size: int) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=1m") as small:
        shared_sandbox.files.write(str(small / "f"), "old")
        path = str(small / "f")

        assert errors_of(lambda: shared_sandbox.files.write(path, bytes(size))) == (OSError, "ENOSPC", path)
        wait_until(lambda: os.listdir(small) == ["f"])
        assert (small / "f").read_text() == "old"


def test_a_stream_that_is_left_closes_its_file(shared_sandbox: Sandbox, folder: str) -> None:
    Path(folder, "f").write_bytes(bytes(30 * MIB))

    def kernels_files() -> int:
        return int(shared_sandbox.run_code("len(__import__('os').listdir('/proc/self/fd'))").stdout or 0)

    shared_sandbox.files.list(folder)
    stream = shared_sandbox.files.read_stream(f"{folder}/f")
    opened = [path.path for path in psutil.Process(_kernel(shared_sandbox)).open_files()]
    assert f"{folder}/f" not in opened
    assert len(next(stream)) == 4 * MIB
    stream.close()  # type: ignore[attr-defined]  # it is a generator

    def is_open() -> bool:
        return f"{folder}/f" in [file.path for file in psutil.Process(_kernel(shared_sandbox)).open_files()]

    wait_until(lambda: not is_open())


def _kernel(sandbox: Sandbox) -> int:
    result = sandbox.run_code("import os; os.getpid()")
    assert result.text is not None
    return int(result.text)


# Names.


@pytest.mark.parametrize(
    "name", ["with space", "quo'te\"s", "new\nline", "\u00e9\u4e16", "\udcff\udcfe", "-rf"]
)
def test_names_are_data(shared_sandbox: Sandbox, folder: str, name: str) -> None:
    files = shared_sandbox.files
    path = f"{folder}/{name}"
    files.write(path, "x")
    Path(folder, "link").symlink_to(name)

    listed = {info.name: info for info in files.list(folder)}
    assert set(listed) == {name, "link"}
    assert listed["link"].symlink_target == name
    assert files.read(listed[name].path) == "x"
    assert files.read(os.fsencode(path)) == "x"
    assert errors_of(lambda: files.list(path)) == (NotADirectoryError, "ENOTDIR", path)
    files.move(path, path + "2")
    files.rm(path + "2")
    assert os.listdir(folder) == ["link"]


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_relative_paths_start_where_the_context_is(sandbox: Sandbox, folder: str) -> None:
    os.mkdir(f"{folder}/below")
    context = sandbox.create_context("other", cwd=f"{folder}/below")
    sandbox.run_code(f"import os; os.chdir({folder!r})")
    sandbox.files.write("here", "1")
    sandbox.files.write("there", "2", context=context)
    sandbox.files.write(Path("by_path"), "3", context="other")

    assert Path(folder, "here").read_text() == "1"
    assert Path(folder, "below/there").read_text() == "2"
    assert [info.path for info in sandbox.files.list(".", context=context)] == [
        f"{folder}/below/by_path",
        f"{folder}/below/there",
    ]


@pytest.mark.slow
@pytest.mark.needs("languages.bash")
def test_contexts_in_other_languages_have_files_too(sandbox: Sandbox, folder: str) -> None:
    context = sandbox.create_context(language="bash", cwd=folder)
    sandbox.files.write("f", "text", context=context)

    assert sandbox.run_code("cat f", context=context).stdout == "text"


# Errors.


def test_errors_are_those_of_python_with_number_and_path(shared_sandbox: Sandbox, folder: str) -> None:
    files = shared_sandbox.files
    Path(folder, "file").write_text("x")
    Path(folder, "loop").symlink_to("loop")
    Path(folder, "dangling").symlink_to("nowhere")
    os.mkfifo(f"{folder}/fifo")
    no, file, fifo, loop = (f"{folder}/{name}" for name in ("no", "file", "fifo", "loop"))
    below = f"{file}/below"
    missing = (FileNotFoundError, "ENOENT", no)
    for call in [
        lambda: files.read(no),
        lambda: files.read_bytes(no),
        lambda: next(iter(files.read_stream(no))),
        lambda: files.list(no),
        lambda: files.rm(no),
        lambda: files.get_info(no),
        lambda: files.copy(no, file),
        lambda: files.move(no, file),
        lambda: files.open(no).close(),
        lambda: files.download(no, f"{folder}/local"),
        lambda: files.watch(no).close(),
    ]:
        assert errors_of(call) == missing
    assert errors_of(lambda: files.write(f"{no}/f", "x", make_dirs=False))[1] == "ENOENT"
    assert errors_of(lambda: files.mkdir(f"{no}/d", parents=False))[1] == "ENOENT"
    assert errors_of(lambda: files.read("")) == (FileNotFoundError, "ENOENT", "")
    is_folder = (IsADirectoryError, "EISDIR", folder)
    assert errors_of(lambda: files.read(folder)) == is_folder
    assert errors_of(lambda: files.write(folder, "x")) == is_folder
    assert errors_of(lambda: files.write(folder, bytes(9 * MIB))) == is_folder
    assert errors_of(lambda: files.rm(folder)) == is_folder
    assert errors_of(lambda: files.open(folder).close()) == is_folder
    no_folder = (NotADirectoryError, "ENOTDIR", below)
    assert errors_of(lambda: files.read(below)) == no_folder
    assert errors_of(lambda: files.mkdir(below)) == no_folder
    assert errors_of(lambda: files.get_info(below)) == no_folder
    assert errors_of(lambda: files.write(below, "x")) == (NotADirectoryError, "ENOTDIR", file)
    assert errors_of(lambda: files.list(file)) == (NotADirectoryError, "ENOTDIR", file)
    assert errors_of(lambda: files.mkdir(file)) == (FileExistsError, "EEXIST", file)
    assert errors_of(lambda: files.mkdir(folder, parents=False)) == (FileExistsError, "EEXIST", folder)
    assert errors_of(lambda: files.open(file, "x").close()) == (FileExistsError, "EEXIST", file)
    assert errors_of(lambda: files.read(loop)) == (OSError, "ELOOP", loop)
    assert errors_of(lambda: files.write(loop, "x")) == (OSError, "ELOOP", loop)
    assert errors_of(lambda: files.read(fifo)) == (OSError, "EINVAL", fifo)
    assert errors_of(lambda: files.write(fifo, "x"))[1] == "EINVAL"
    assert errors_of(lambda: files.open(fifo, "w").close())[1] in ("EINVAL", "ENXIO")
    assert errors_of(lambda: files.copy(fifo, no)) == (OSError, "EINVAL", fifo)
    assert errors_of(lambda: files.write(f"{folder}/{'x' * 300}", "x"))[1] == "ENAMETOOLONG"
    assert sorted(os.listdir(folder)) == ["dangling", "fifo", "file", "loop"]


@pytest.mark.not_in_a_container("root, as who the test is there, may do it")
@is_root
@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_what_is_not_allowed_is_a_permission_error(sandbox: Sandbox, folder: str) -> None:
    Path(folder, "secret").write_text("x")
    os.chmod(f"{folder}/secret", 0o000)
    os.mkdir(f"{folder}/closed", 0o700)
    for path in (Path(folder), *Path(folder).parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    sandbox.run_code("import os; os.setegid(65534); os.seteuid(65534)")
    secret, closed = f"{folder}/secret", f"{folder}/closed"

    # Rights are those of each thread on Linux; commands have those of the process.
    sandbox.run_code("import ctypes; ctypes.CDLL(None).seteuid(65534)")
    denied = PermissionError, "EACCES"
    assert errors_of(lambda: sandbox.files.read(secret)) == (*denied, secret)
    assert errors_of(lambda: sandbox.files.write(secret, "y")) == (*denied, secret)
    assert errors_of(lambda: sandbox.files.list(closed)) == (*denied, closed)
    assert errors_of(lambda: sandbox.files.write(f"{closed}/f", "y"))[:2] == denied
    assert errors_of(lambda: sandbox.files.exists(f"{closed}/f"))[:2] == denied


def test_a_sandbox_that_is_not_running_has_no_files(sandbox: Sandbox) -> None:
    sandbox.kill()

    with pytest.raises(SandboxNotStartedError):
        sandbox.files.read("f")


# Looking.


def test_what_is_in_a_folder_is_listed_by_path(shared_sandbox: Sandbox, folder: str) -> None:
    files = shared_sandbox.files
    os.makedirs(f"{folder}/b/c/d")
    Path(folder, "b/c/f").write_bytes(b"12345")
    Path(folder, "b/c/f").chmod(0o640)
    Path(folder, "a").symlink_to("b")
    Path(folder, "dangling").symlink_to("/no/where")
    os.mkfifo(f"{folder}/fifo")

    assert [info.name for info in files.list(folder)] == ["a", "b", "dangling", "fifo"]
    assert [info.path for info in files.list(folder + "/", depth=2)] == [
        f"{folder}/{name}" for name in ("a", "b", "b/c", "dangling", "fifo")
    ]
    listed = {info.path.removeprefix(folder + "/"): info for info in files.list(folder, depth=9)}
    assert list(listed) == ["a", "b", "b/c", "b/c/d", "b/c/f", "dangling", "fifo"]
    assert [listed[name].type for name in ("a", "b", "dangling", "fifo", "b/c/f")] == [
        FileType.SYMLINK,
        FileType.DIRECTORY,
        FileType.SYMLINK,
        FileType.OTHER,
        FileType.FILE,
    ]
    assert listed["dangling"].symlink_target == "/no/where"
    info = listed["b/c/f"]
    found = os.stat(f"{folder}/b/c/f")
    assert (info.size, info.mode, info.permissions, info.modified) == (5, 0o640, "-rw-r-----", found.st_mtime)
    assert (info.owner, info.group) == (Path(info.path).owner(), Path(info.path).group())
    assert files.get_info(info.path) == info
    assert files.list(f"{folder}/b/c/d") == []


@pytest.mark.slow
def test_more_files_than_one_answer_holds_are_listed(shared_sandbox: Sandbox, folder: str) -> None:
    names = [f"{i:05}" for i in range(2 * guest_files.BATCH + 3)]
    for name in names:
        Path(folder, name).touch()

    assert [info.name for info in shared_sandbox.files.list(folder)] == names


def test_questions_follow_links_and_swallow_nothing(shared_sandbox: Sandbox, folder: str) -> None:
    files = shared_sandbox.files
    Path(folder, "file").touch()
    for name, target in (("to_file", "file"), ("to_folder", "."), ("dangling", "no"), ("loop", "loop")):
        Path(folder, name).symlink_to(target)
    asked = {
        name: (files.exists(path), files.is_file(path), files.is_dir(path))
        for name in ("file", "to_file", ".", "to_folder", "dangling", "no", "file/below")
        for path in [f"{folder}/{name}"]
    }

    assert asked["file"] == asked["to_file"] == (True, True, False)
    assert asked["."] == asked["to_folder"] == (True, False, True)
    assert asked["dangling"] == asked["no"] == asked["file/below"] == (False, False, False)
    assert errors_of(lambda: files.exists(f"{folder}/loop"))[1] == "ELOOP"


# Changing what there is.


def test_folders_are_made_copied_moved_and_removed(shared_sandbox: Sandbox, folder: str) -> None:
    files = shared_sandbox.files
    files.mkdir(f"{folder}/a/b")
    files.mkdir(f"{folder}/a/b")
    files.mkdir(f"{folder}/c", parents=False)
    Path(folder, "a/f").write_text("x")
    Path(folder, "a/f").chmod(0o741)
    os.utime(f"{folder}/a/f", (1000, 1000))
    Path(folder, "a/link").symlink_to("/no/where")
    files.copy(f"{folder}/a", f"{folder}/copy")

    copied = os.stat(f"{folder}/copy/f")
    assert (stat.S_IMODE(copied.st_mode), copied.st_mtime) == (0o741, 1000)
    assert os.readlink(f"{folder}/copy/link") == "/no/where"
    assert os.path.isdir(f"{folder}/copy/b")
    assert errors_of(lambda: files.copy(f"{folder}/a", f"{folder}/c"))[1] == "EEXIST"
    assert errors_of(lambda: files.copy(f"{folder}/a", f"{folder}/a/b/new"))[1] == "EINVAL"
    assert errors_of(lambda: files.move(f"{folder}/a", f"{folder}/a/b"))[1] == "EINVAL"
    files.copy(f"{folder}/a/f", f"{folder}/c")
    files.move(f"{folder}/a", f"{folder}/c")
    assert sorted(os.listdir(f"{folder}/c")) == ["a", "f"]
    files.mkdir(f"{folder}/a")
    assert errors_of(lambda: files.move(f"{folder}/a", f"{folder}/c"))[1:] == ("EEXIST", f"{folder}/c/a")
    files.rm(f"{folder}/c/a/link")
    files.rm(f"{folder}/c", recursive=True)
    assert sorted(os.listdir(folder)) == ["a", "copy"]


def test_a_copy_that_fails_leaves_no_half(shared_sandbox: Sandbox, folder: str) -> None:
    os.mkdir(f"{folder}/a")
    Path(folder, "a/f").write_text("x")
    os.mkfifo(f"{folder}/a/z")

    assert errors_of(lambda: shared_sandbox.files.copy(f"{folder}/a", f"{folder}/b"))[1:] == (
        "EINVAL",
        f"{folder}/a/z",
    )
    assert os.listdir(folder) == ["a"]


def test_a_file_is_copied_to_a_device(shared_sandbox: Sandbox, folder: str) -> None:
    Path(folder, "f").write_text("x")
    shared_sandbox.files.copy(f"{folder}/f", "/dev/null")

    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_removing_does_not_follow_links(shared_sandbox: Sandbox, folder: str) -> None:
    os.makedirs(f"{folder}/kept/d")
    os.mkdir(f"{folder}/removed")
    Path(folder, "removed/link").symlink_to(f"{folder}/kept")
    Path(folder, "direct").symlink_to("kept")
    shared_sandbox.files.rm(f"{folder}/removed", recursive=True)
    shared_sandbox.files.rm(f"{folder}/direct", recursive=True)

    assert os.listdir(folder) == ["kept"]
    assert os.listdir(f"{folder}/kept") == ["d"]


# Handles.


def test_a_handle_reads_and_writes_as_pythons_own(shared_sandbox: Sandbox, folder: str) -> None:
    files = shared_sandbox.files
    path = f"{folder}/f"
    with files.open(path, "w") as handle:
        assert handle.write("eins\nzw\u00e9i\n") == 10
        handle.writelines(["drei", "\n"])
    with files.open(path, "a") as handle:
        handle.write("vier")
    with files.open(path) as handle:
        assert (handle.name, handle.mode, handle.closed) == (path, "r", False)
        assert handle.readline() == "eins\n"
        assert list(handle) == ["zw\u00e9i\n", "drei\n", "vier"]
        assert handle.seek(0) == 0
        assert handle.read(3) == "ein"
        assert handle.readlines() == ["s\n", "zw\u00e9i\n", "drei\n", "vier"]
    assert handle.closed
    with pytest.raises(ValueError, match="closed"):
        handle.read()
    with files.open(path, "r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        assert handle.tell() == 16
        assert handle.read() == b"vier"
        handle.seek(0)
        handle.write(b"EINS")
        handle.flush()
        assert Path(path).read_bytes()[:5] == b"EINS\n"
        assert handle.truncate(5) == 5
    assert Path(path).read_bytes() == b"EINS\n"
    with files.open("/dev/null", "r+b") as handle:
        assert handle.seek(0) == 0
    with files.open(path, "rb") as handle, pytest.raises(io.UnsupportedOperation):
        handle.write(b"x")
    with files.open(path, "w") as handle, pytest.raises(io.UnsupportedOperation):
        handle.read()


def test_a_handle_reads_and_writes_much(shared_sandbox: Sandbox, folder: str) -> None:
    content = os.urandom(10 * MIB + 5)
    with shared_sandbox.files.open(f"{folder}/f", "wb") as handle:
        assert handle.write(content) == len(content)
    with shared_sandbox.files.open(f"{folder}/f", "rb") as handle:
        assert handle.read(9 * MIB) == content[: 9 * MIB]
        assert handle.read() == content[9 * MIB :]


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_a_handle_outlives_its_kernel_only_as_an_error(sandbox: Sandbox, folder: str) -> None:
    with sandbox.files.open(f"{folder}/f", "w") as handle:
        handle.write("kept")
    reading = sandbox.files.open(f"{folder}/f")
    sandbox.restart()

    with pytest.raises(SandboxConnectionError):
        reading.read()
    reading.close()
    assert sandbox.files.read(f"{folder}/f") == "kept"


# While code runs.


def during(sandbox: Sandbox, code: str, body: Callable[[], object]) -> None:
    """Call *body* while *code* runs, which prints when it has begun."""
    begun = threading.Event()
    runner = threading.Thread(
        target=lambda: sandbox.run_code(code, on_stdout=lambda _: begun.set(), on_input=lambda _: wait())
    )
    over = threading.Event()

    def wait() -> str:
        over.wait(60)
        return ""

    runner.start()
    try:
        assert begun.wait(60)
        body()
        assert runner.is_alive()
    finally:
        over.set()
        sandbox.interrupt()
        runner.join()


@pytest.mark.parametrize("code", [BUSY, "while True: pass", "input()"], ids=["waiting", "spinning", "asking"])
def test_files_are_there_while_code_runs(shared_sandbox: Sandbox, folder: str, code: str) -> None:
    def body() -> None:
        shared_sandbox.files.write(f"{folder}/f", "x")
        assert shared_sandbox.files.read(f"{folder}/f") == "x"
        assert [info.name for info in shared_sandbox.files.list(folder)] == ["f"]

    during(shared_sandbox, f"print('begun', flush=True)\n{code}", body)


def test_callbacks_may_use_files(shared_sandbox: Sandbox, folder: str) -> None:
    def keep(message: OutputMessage) -> None:
        if message.line:
            shared_sandbox.files.write(f"{folder}/{message.line}", "x")

    shared_sandbox.run_code("print('a'); print('b')", on_stdout=keep)

    assert sorted(os.listdir(folder)) == ["a", "b"]


PATCHES = """
import builtins, io, os, posixpath, selectors, shutil, stat
def broken(*args, **kwargs): raise RuntimeError('patched')
builtins.open = io.open = stat.S_ISDIR = selectors.DefaultSelector = broken
for module in (os, shutil, posixpath):
    for name in NAMES & set(dir(module)):
        setattr(module, name, broken)
"""
PATCHED = (
    "open stat lstat scandir listdir mkdir makedirs replace rename unlink remove rmdir access "
    "readlink symlink close lseek fsencode fsdecode getcwd join dirname isdir exists islink "
    "realpath isabs lexists samefile rmtree copystat copy2 pipe set_blocking dup fstat fchmod fchown "
    "ftruncate"
)


@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_code_that_patches_what_files_need_does_not_matter(sandbox: Sandbox, folder: str) -> None:
    kernel = psutil.Process(_kernel(sandbox))
    sandbox.run_code(f"NAMES = set({PATCHED!r}.split())" + PATCHES)
    files = sandbox.files
    files.write(f"{folder}/a/f", "x")
    files.write(f"{folder}/big", bytes(9 * MIB))
    files.copy(f"{folder}/a", f"{folder}/b")
    files.rm(f"{folder}/a", recursive=True)

    assert files.read(f"{folder}/b/f") == "x"
    assert len(files.read_bytes(f"{folder}/big")) == 9 * MIB
    assert [info.name for info in files.list(folder)] == ["b", "big"]
    with files.watch(folder) as watcher:
        files.write(f"{folder}/new", "x")
        assert next(watcher).path == f"{folder}/new"
    assert kernel.is_running()


# Watching.


def events(watcher: Iterator[FileWatchEvent], until: str) -> list[tuple[str, str, str | None]]:
    """What happens before and to the file *until*."""
    found = []
    for event in watcher:
        found.append(
            (
                str(event.event_type),
                os.path.basename(event.path),
                event.new_path and os.path.basename(event.new_path),
            )
        )
        if os.path.basename(event.path) == until:
            return found
    raise AssertionError(f"only {found}")


def test_what_happens_in_a_folder_is_told(shared_sandbox: Sandbox, folder: str) -> None:
    with shared_sandbox.files.watch(folder) as watcher:
        Path(folder, "a").touch()
        os.rename(f"{folder}/a", f"{folder}/b")
        os.remove(f"{folder}/b")
        shared_sandbox.files.write(f"{folder}/c", "1")
        shared_sandbox.files.write(f"{folder}/c", "2")
        os.mkdir(f"{folder}/end")
        told = events(watcher, "end")

    assert [event for event in told if event != ("modify", "a", None)] == [
        ("create", "a", None),
        ("rename", "a", "b"),
        ("delete", "b", None),
        ("create", "c", None),
        ("modify", "c", None),
        ("create", "end", None),
    ]


def test_folders_that_are_made_are_watched_from_their_beginning(shared_sandbox: Sandbox, folder: str) -> None:
    os.mkdir(f"{folder}/old")
    with shared_sandbox.files.watch(folder, recursive=True) as watcher:
        for i in range(30):
            os.makedirs(f"{folder}/n{i}/m/k")
            Path(folder, f"n{i}/m/k/f{i}").touch()
        os.rename(f"{folder}/n3", f"{folder}/moved")
        Path(folder, "moved/m/in_moved").touch()
        Path(folder, "old/end").touch()
        told = events(watcher, "end")
    created = [name for kind, name, _ in told if kind == "create"]

    assert sorted(name for name in created if name[0] == "f") == sorted(f"f{i}" for i in range(30))
    assert sorted(name for name in created if name[0] == "n") == sorted(f"n{i}" for i in range(30))
    assert ("rename", "n3", "moved") in told
    assert "in_moved" in created


def test_one_file_is_watched_through_its_replacements(shared_sandbox: Sandbox, folder: str) -> None:
    path = f"{folder}/f"
    Path(path).write_text("1")
    with shared_sandbox.files.watch(path) as watcher:
        Path(folder, "other").touch()
        shared_sandbox.files.write(path, "2")
        event = next(watcher)
        assert (event.event_type, event.path) == (FileWatchEventType.MODIFY, path)
        os.rename(path, f"{folder}/g")
        event = next(watcher)
        assert (event.event_type, event.new_path) == (FileWatchEventType.RENAME, f"{folder}/g")


def test_a_watch_ends_with_its_folder_and_when_it_is_closed(shared_sandbox: Sandbox, folder: str) -> None:
    os.mkdir(f"{folder}/d")
    watcher = shared_sandbox.files.watch(f"{folder}/d")
    os.rmdir(f"{folder}/d")
    assert [event.event_type for event in watcher] == ["delete"]

    watcher = shared_sandbox.files.watch(folder)
    listening = threading.Thread(target=lambda: list(watcher))
    listening.start()
    watcher.close()
    listening.join(30)
    assert not listening.is_alive()
    assert list(watcher) == []


def test_a_watch_that_is_abandoned_leaves_nothing_in_the_kernel(shared_sandbox: Sandbox, folder: str) -> None:
    count = (
        "import os\n"
        "links = (f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd'))\n"
        "sum('inotify' in os.readlink(link) for link in links if os.path.islink(link))"
    )

    def queues() -> str | None:
        return shared_sandbox.run_code(count).text

    before = queues()
    for number in range(3):
        watcher = shared_sandbox.files.watch(folder)
        Path(folder, str(number)).touch()
        for event in watcher:
            assert event.path == f"{folder}/{number}"
            break
        del watcher
    wait_until(lambda: queues() == before)


@pytest.mark.needs("own_process")
def test_a_watch_says_so_when_the_kernel_dies(sandbox: Sandbox, folder: str) -> None:
    watcher = sandbox.files.watch(folder)
    sandbox.run_code("import os; os._exit(1)")

    with pytest.raises(SandboxConnectionError):
        next(watcher)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/sys/fs/inotify/max_queued_events").exists(), reason="needs inotify")
def test_events_that_were_lost_are_told_and_those_before_are_there(
    shared_sandbox: Sandbox, folder: str
) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    watcher = shared_sandbox.files.watch(folder)
    for _ in range(most // 2 + 64 * guest_watching.BATCH):
        os.mkdir(f"{folder}/d")
        os.rmdir(f"{folder}/d")
    told: list[FileWatchEvent] = []
    with pytest.raises(OSError, match="Value too large") as caught:
        told.extend(iter(watcher))

    assert caught.value.errno == errno.EOVERFLOW
    assert len(told) > most


# Endings.


@pytest.mark.not_in_a_container("its processes have other numbers there")
@pytest.mark.slow
@pytest.mark.needs("own_process")
def test_a_transfer_whose_kernel_dies_says_so_and_leaves_nothing_here(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    def kill(kernel: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            kernel.kill()

    big, local = tmp_path / "big", tmp_path / "local"
    with open(big, "wb") as file:
        file.truncate(256 * MIB)
    kernel = psutil.Process(_kernel(sandbox))
    for transfer in (sandbox.files.upload, sandbox.files.download):
        with pytest.raises(SandboxConnectionError):
            transfer(big, local, on_progress=lambda *_, kernel=kernel: kill(kernel))
        kernel = psutil.Process(_kernel(sandbox))
        assert not local.exists()
    wait_until(lambda: [name for name in os.listdir(tmp_path) if "code_sandboxes" not in name] == ["big"])


@pytest.mark.needs("own_process")
def test_what_was_open_in_a_kernel_that_died_is_not_asked_of_the_next(sandbox: Sandbox, folder: str) -> None:
    sandbox.files.write(f"{folder}/f", b"x" * 20 * MIB)
    stream = sandbox.files.read_stream(f"{folder}/f")
    with sandbox.files.open(f"{folder}/f") as file:
        next(stream)
        sandbox.run_code("import os; os._exit(3)")
        assert sandbox.run_code("2").text == "2"
        for use in (lambda: list(stream), file.read):
            with pytest.raises(SandboxConnectionError, match=r"the kernel (exited with code 3|ended)"):
                use()


# Speed and memory.


@pytest.mark.slow
@pytest.mark.needs("own_process")
@pytest.mark.timeout(300)
def test_transfers_of_a_gigabyte_hold_a_few_mebibytes(sandbox: Sandbox, tmp_path: Path) -> None:
    local, back = tmp_path / "local", tmp_path / "back"
    block = os.urandom(MIB)
    with open(local, "wb") as file:
        for i in range(1024):
            file.write(i.to_bytes(8, "big") + block[8:])
    kernel, client = psutil.Process(_kernel(sandbox)), psutil.Process()
    sandbox.files.write(str(tmp_path / "warm"), bytes(20 * MIB))
    before = [process.memory_info().rss for process in (client, kernel)]
    grown = [0, 0]

    def measure(done: int, total: int) -> None:
        assert 0 < done <= total == 1024 * MIB
        if done % (64 * MIB) == 0:
            now = [process.memory_info().rss for process in (client, kernel)]
            grown[:] = [max(most, n - b) for most, n, b in zip(grown, now, before, strict=True)]

    descriptors = open_descriptors()
    sandbox.files.upload(local, tmp_path / "remote", on_progress=measure)
    sandbox.files.download(tmp_path / "remote", back, on_progress=measure)

    assert open_descriptors() <= descriptors
    assert [growth < 64 * MIB for growth in grown] == [True, True], grown
    with open(local, "rb") as first, open(back, "rb") as second:
        while piece := first.read(8 * MIB):
            assert piece == second.read(8 * MIB)
        assert second.read() == b""
