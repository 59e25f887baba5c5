"""Upload and download: that a sandbox can put nothing where it was not asked to, and that nothing is left."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from code_sandboxes import AsyncSandbox, FileType, Sandbox
from code_sandboxes.file_operations import OnProgress
from code_sandboxes.transfers import Entry, FileLanding, FolderLanding, check_entries, entries_of
from conftest import UNISOLATED, wait_until
from tests.test_files import errors_of, is_root
from tests.test_keeper import mounted_tmpfs

IN_A_CONTAINER = True


FAST_VARIANT = "local-jupyter"
EVERY_FRONT = ("blocking", "async")

MIB = 1024**2


def tree(folder: str | Path) -> dict[str, str | int | None]:
    """What is in a folder: the content of files, the targets of links, None for folders."""
    found: dict[str, str | int | None] = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = "-> " + os.readlink(path)
        else:
            found[name] = None if path.is_dir() else path.read_bytes().decode()[:100]
    return found


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where this program works."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Where the sandbox works."""
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


def make_tree(folder: Path) -> None:
    (folder / "b/empty").mkdir(parents=True)
    (folder / "a").write_text("A")
    (folder / "b/c").write_text("C")
    (folder / "b/run").write_text("#!")
    (folder / "b/run").chmod(0o755)
    (folder / "b").chmod(0o700)
    (folder / "b/up").symlink_to("../a")
    (folder / "link").symlink_to("b")
    (folder / "dangling").symlink_to("no")
    (folder / "new\nline").write_text("N")
    (folder / os.fsdecode(b"\xff\xfe")).write_text("U")


# Files.


@pytest.mark.parametrize("size", [0, 1, 9 * MIB + 3])
def test_a_file_goes_there_and_back(shared_sandbox: Sandbox, here: Path, there: Path, size: int) -> None:
    content = (os.urandom(1024) * (size // 1024 + 1))[:size]
    (here / "f").write_bytes(content)
    (here / "f").chmod(0o750)
    told: list[tuple[int, int]] = []
    shared_sandbox.files.upload(here / "f", there / "made/f", on_progress=lambda *args: told.append(args))
    shared_sandbox.files.download(there / "made/f", here / "back", on_progress=lambda *a: told.append(a))

    assert (here / "back").read_bytes() == (there / "made/f").read_bytes() == content
    assert stat.S_IMODE((there / "made/f").stat().st_mode) == 0o750
    assert stat.S_IMODE((here / "back").stat().st_mode) == 0o750
    assert told.count((size, size)) == (2 if size else 0)
    assert all(0 < done <= total == size for done, total in told)


def test_relative_names_are_local_here_and_the_kernels_there(
    sandbox: Sandbox, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sandbox.capabilities.own_process:
        pytest.skip("they are the same")
    monkeypatch.chdir(here)
    sandbox.run_code(f"import os; os.chdir({str(there)!r})")
    Path("local_file.txt").write_text("x")
    sandbox.files.upload("local_file.txt", "remote/file.txt")
    sandbox.files.download("remote/file.txt", "downloaded.txt")

    assert tree(there) == {"remote": None, "remote/file.txt": "x"}
    assert Path("downloaded.txt").read_text() == "x"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failed_download_leaves_the_local_file_as_it_was(
    shared_sandbox: Sandbox, here: Path, there: Path, error: type[BaseException]
) -> None:
    (here / "f").write_text("old")
    (there / "big").write_bytes(bytes(20 * MIB))

    def stop(done: int, total: int) -> None:
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        else:
            raise error

    assert errors_of(lambda: shared_sandbox.files.download(there / "no", here / "f"))[1] == "ENOENT"
    with pytest.raises(error):
        shared_sandbox.files.download(there / "big", here / "f", on_progress=stop)
    assert tree(here) == {"f": "old"}
    with pytest.raises(error):
        shared_sandbox.files.upload(there / "big", there / "f", on_progress=stop)
    wait_until(lambda: os.listdir(there) == ["big"])


@is_root
def test_a_full_disk_here_leaves_the_local_file_as_it_was(
    shared_sandbox: Sandbox, tmp_path: Path, there: Path
) -> None:
    (there / "big").write_bytes(bytes(20 * MIB))
    os.makedirs(there / "d/e")
    (there / "d/e/big").write_bytes(bytes(20 * MIB))
    with mounted_tmpfs(tmp_path / "small", "size=1m") as small:
        (small / "f").write_text("old")
        local = str(small / "f")

        assert errors_of(lambda: shared_sandbox.files.download(there / "big", local))[1:] == ("ENOSPC", local)
        assert errors_of(lambda: shared_sandbox.files.download(there / "d", small / "d"))[1] == "ENOSPC"
        assert tree(small) == {"f": "old"}


def test_a_download_goes_where_a_link_of_the_users_leads_and_not_onto_a_folder(
    shared_sandbox: Sandbox, here: Path, there: Path
) -> None:
    (there / "f").write_text("new")
    (here / "target").write_text("old")
    (here / "link").symlink_to("target")
    (here / "folder").mkdir()
    shared_sandbox.files.download(there / "f", here / "link")

    assert tree(here) == {"folder": None, "link": "-> target", "target": "new"}
    local = str(here / "folder")
    assert errors_of(lambda: shared_sandbox.files.download(there / "f", local)) == (
        IsADirectoryError,
        "EISDIR",
        local,
    )
    assert errors_of(lambda: shared_sandbox.files.download(there, here / "target"))[1] == "ENOTDIR"
    assert errors_of(lambda: shared_sandbox.files.download(there / "f", here / "no/f"))[1] == "ENOENT"


# Folders.


def test_a_folder_goes_there_and_back(shared_sandbox: Sandbox, here: Path, there: Path) -> None:
    (here / "d").mkdir(0o750)
    make_tree(here / "d")
    (here / "d/big").write_bytes(b"b" * (9 * MIB))
    told: list[tuple[int, int]] = []
    shared_sandbox.files.upload(here / "d", there / "made/d", on_progress=lambda *args: told.append(args))
    shared_sandbox.files.download(there / "made/d", here / "back", on_progress=lambda *a: told.append(a))

    assert tree(there / "made/d") == tree(here / "back") == tree(here / "d")
    assert (here / "back/big").stat().st_size == 9 * MIB
    for arrived in (there / "made/d", here / "back"):
        modes = [stat.S_IMODE((arrived / name).stat().st_mode) for name in ("", "b", "b/run", "b/empty")]
        assert modes == [0o750, 0o700, 0o755, 0o755]
    total = 9 * MIB + 6
    assert told.count((total, total)) == 2
    assert sorted(os.listdir(here)) == ["back", "d"]


def test_a_folder_comes_into_the_one_that_is_there(shared_sandbox: Sandbox, here: Path, there: Path) -> None:
    make_tree(there)
    (here / "d/b").mkdir(parents=True)
    (here / "d/a").write_text("old")
    (here / "d/b/kept").write_text("kept")
    (here / "outside").write_text("outside")
    (here / "d/b/c").symlink_to(here / "outside")
    shared_sandbox.files.download(there, here / "d")

    assert tree(here / "d") == {**tree(there), "b/kept": "kept"}
    assert (here / "outside").read_text() == "outside"
    shared_sandbox.files.upload(here / "d", there)
    assert tree(there) == tree(here / "d")


@pytest.mark.parametrize("in_the_way", ["link", "file", "folder"])
def test_what_is_in_the_way_is_told_before_anything_is_changed(
    shared_sandbox: Sandbox, here: Path, there: Path, in_the_way: str
) -> None:
    make_tree(there)
    (here / "d").mkdir()
    (here / "outside").mkdir()
    if in_the_way == "link":
        (here / "d/b").symlink_to(here / "outside")
    elif in_the_way == "file":
        (here / "d/b").write_text("b")
    else:
        (here / "d/a").mkdir()
    before = tree(here)

    assert errors_of(lambda: shared_sandbox.files.download(there, here / "d"))[2] == str(
        here / ("d/a" if in_the_way == "folder" else "d/b")
    )
    assert tree(here) == before


def test_an_upload_that_would_meet_what_cannot_be_sent_sends_nothing(
    shared_sandbox: Sandbox, here: Path, there: Path
) -> None:
    (here / "d/e").mkdir(parents=True)
    (here / "d/a").write_text("A")
    os.mkfifo(here / "d/e/fifo")

    assert errors_of(lambda: shared_sandbox.files.upload(here / "d", there / "d")) == (
        OSError,
        "EINVAL",
        str(here / "d/e/fifo"),
    )
    assert errors_of(lambda: shared_sandbox.files.upload(here / "no", there / "d"))[1:] == (
        "ENOENT",
        str(here / "no"),
    )
    assert os.listdir(there) == []


def test_an_upload_follows_no_link_but_the_one_that_is_named(
    shared_sandbox: Sandbox, here: Path, there: Path
) -> None:
    (here / "secret").write_text("secret")
    (here / "d").mkdir()
    (here / "d/link").symlink_to("../secret")
    (here / "d/absolute").symlink_to("/etc")
    (here / "named").symlink_to("d")
    shared_sandbox.files.upload(here / "named", there / "d")

    assert tree(there / "d") == {"absolute": "-> /etc", "link": "-> ../secret"}


# Tricks.


def outward(name: str, target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "b").mkdir()
        (folder / name).symlink_to(target)

    return make


def special(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if name == "fifo":
            os.mkfifo(folder / name)
        elif name == "device":
            os.mknod(folder / name, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        else:
            with socket.socket(socket.AF_UNIX) as listener:
                before = os.getcwd()
                os.chdir(folder)
                listener.bind(name)
                os.chdir(before)

    return make


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(outward("evil", "/etc/passwd"), "evil", id="absolute"),
        pytest.param(outward("evil", "../outside"), "evil", id="above"),
        pytest.param(outward("b/evil", "../../outside"), "b/evil", id="above_from_below"),
        pytest.param(outward("evil", "b/../../outside"), "evil", id="down_and_up"),
        pytest.param(outward("b/evil", "../b/.."), "b/evil", id="up_down_up"),
        pytest.param(outward("evil", ".."), "evil", id="parent"),
        pytest.param(special("fifo"), "fifo", id="fifo"),
        pytest.param(special("socket"), "socket", id="socket"),
        pytest.param(special("device"), "device", id="device", marks=is_root),
    ],
)
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "merged"])
def test_what_may_lead_elsewhere_is_refused_by_name_and_nothing_is_changed(
    shared_sandbox: Sandbox,
    here: Path,
    there: Path,
    make: Callable[[Path], None],
    name: str,
    is_there: bool,
) -> None:
    make(there)
    (there / "a").write_text("new")
    if is_there:
        (here / "d").mkdir()
        (here / "d/a").write_text("old")
    before = tree(here)

    found = errors_of(lambda: shared_sandbox.files.download(there, here / "d"))
    assert found == (OSError, "EINVAL", f"{there}/{name}")
    assert tree(here) == before


def test_hard_links_arrive_as_files_of_their_own(shared_sandbox: Sandbox, here: Path, there: Path) -> None:
    (there / "a").write_text("A")
    os.link(there / "a", there / "b")
    shared_sandbox.files.download(there, here / "d")

    assert tree(here / "d") == {"a": "A", "b": "A"}
    assert (here / "d/a").stat().st_nlink == 1


def test_a_link_in_the_place_of_a_folder_is_not_read_through(
    shared_sandbox: Sandbox, here: Path, there: Path
) -> None:
    """What is swapped after the folder was listed; the progress of the first file is the moment."""
    (there / "secret").write_text("s" * 5)
    (there / "d/z").mkdir(parents=True)
    (there / "d/a").write_text("A")
    (there / "d/big").write_bytes(bytes(9 * MIB))
    (there / "d/z/secret").write_bytes(bytes(9 * MIB))

    def swap(done: int, total: int) -> None:
        if (there / "d/z").is_symlink():
            return
        os.rename(there / "d/z", there / "d/y")
        (there / "d/z").symlink_to("..")

    found = errors_of(lambda: shared_sandbox.files.download(there / "d", here / "d", on_progress=swap))
    assert found[1] in ("ENOTDIR", "ELOOP")
    assert found[2] == f"{there}/d/z/secret"
    assert tree(here) == {}


FILE, DIRECTORY, SYMLINK = FileType.FILE, FileType.DIRECTORY, FileType.SYMLINK


@pytest.mark.parametrize(
    "parts",
    [(), ("",), (".",), ("..",), ("a", ".."), ("a/b",), ("", "etc", "passwd"), ("a\0b",), ("a", "", "b")],
    ids=repr,
)
def test_names_that_cannot_be_are_refused(parts: tuple[str, ...]) -> None:
    with pytest.raises(OSError, match="as none can be named") as caught:
        check_entries([Entry(("fine",), FILE), Entry(parts, FILE)], "/remote")
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("parts", "target", "stays"),
    [
        (("l",), "a", True),
        (("l",), "./a//b/", True),
        (("d", "l"), "..", True),
        (("d", "l"), "../a", True),
        (("l",), "", False),
        (("l",), None, False),
        (("l",), "/", False),
        (("l",), "..", False),
        (("d", "l"), "../..", False),
        (("d", "e", "l"), "../a/../../..", False),
        (("d", "l"), "./../../a", False),
        (("l",), "a/..", False),
        (("l",), "a\0", False),
    ],
)
def test_links_stay_inside_or_are_refused(parts: tuple[str, ...], target: str | None, stays: bool) -> None:
    entry = Entry(parts, SYMLINK, target=target)
    if stays:
        check_entries([entry], "/remote")
    else:
        with pytest.raises(OSError, match="a link that may lead out of the folder"):
            check_entries([entry], "/remote")


def landed(path: Path, entries: list[Entry], content: bytes = b"x") -> None:
    """Build what a sandbox might say, as a download does but without a check."""
    landing = FolderLanding(str(path))
    try:
        landing.begin()
        landing.make_folders([entry for entry in entries if entry.type is DIRECTORY])
        for entry in entries:
            if entry.type is FILE:
                landing.put(entry, content)
        landing.make_links([entry for entry in entries if entry.type is SYMLINK])
        landing.commit()
    finally:
        landing.abort()


@pytest.mark.parametrize(
    "entries",
    [
        [Entry(("a",), FILE), Entry(("a",), FILE)],
        [Entry(("a",), SYMLINK, target="b"), Entry(("a", "f"), FILE)],
        [Entry(("a",), FILE), Entry(("a",), SYMLINK, target="b")],
        [Entry(("a",), DIRECTORY), Entry(("a",), SYMLINK, target="b")],
        [Entry(("a",), FILE), Entry(("a", "b"), FILE)],
        [Entry(("no", "f"), FILE)],
        [Entry(("no", "d"), DIRECTORY)],
        [Entry(("a",), SYMLINK, target="b"), Entry(("a",), SYMLINK, target="c")],
    ],
    ids=lambda entries: ",".join("/".join(each.parts) + ":" + each.type for each in entries),
)
def test_a_folder_that_contradicts_itself_is_refused_and_nothing_is_left(
    here: Path, entries: list[Entry]
) -> None:
    with pytest.raises(OSError, match=r"Errno"):
        landed(here / "d", entries)
    assert tree(here) == {}


def test_even_unchecked_links_are_not_written_through(here: Path) -> None:
    """Links are made last, and what is there already is replaced, not followed."""
    (here / "d").mkdir()
    (here / "outside").write_text("outside")
    landed(here / "d", [Entry(("l",), SYMLINK, target="../outside")])
    landed(here / "d", [Entry(("l",), FILE)], b"inside")

    assert tree(here) == {"d": None, "d/l": "inside", "outside": "outside"}
    landed(here / "d", [Entry(("m",), SYMLINK, target="..")])
    with pytest.raises(NotADirectoryError):
        landed(here / "d", [Entry(("m",), DIRECTORY), Entry(("m", "outside"), FILE)])
    assert (here / "outside").read_text() == "outside"


def test_permissions_are_no_more_than_this_process_gives(here: Path) -> None:
    before = os.umask(0o027)
    try:
        landed(here / "d", [Entry(("s",), FILE, mode=0o6777), Entry(("e",), DIRECTORY, mode=0o7777)])
        landing = FileLanding(str(here / "f"), 0o6777)
        landing.begin()
        landing.commit()
    finally:
        os.umask(before)

    modes = {name: stat.S_IMODE((here / name).stat().st_mode) for name in ("d", "d/s", "d/e", "f")}
    assert modes == {"d": 0o750, "d/s": 0o750, "d/e": 0o750, "f": 0o750}


def test_a_landing_that_was_given_up_makes_nothing_any_more(here: Path) -> None:
    landings: list[FileLanding | FolderLanding] = [
        FileLanding(str(here / "f"), 0o600),
        FolderLanding(str(here / "d")),
    ]
    for landing in landings:
        landing.abort()
        with pytest.raises(OSError, match="ancel"):
            landing.begin()
    assert os.listdir(here) == []


def test_a_local_folder_is_looked_at_parents_first(here: Path) -> None:
    make_tree(here)
    found = entries_of(str(here))

    assert found[0].parts == ()
    seen: set[tuple[str, ...]] = {()}
    for entry in found[1:]:
        assert entry.parts[:-1] in seen
        seen.add(entry.parts)
    assert {"/".join(parts) for parts in seen if parts} == set(tree(here))


# Giving up.


@pytest.mark.not_in_a_container("it has other folders")
@pytest.mark.slow
def test_a_transfer_that_is_cancelled_leaves_nothing_on_either_side(
    variant: str, here: Path, there: Path
) -> None:
    (here / "big").write_bytes(bytes(64 * MIB))
    (there / "d").mkdir()
    (there / "d/big").write_bytes(bytes(64 * MIB))

    async def main() -> None:
        settings: dict[str, object] = UNISOLATED.get(variant, {})
        async with AsyncSandbox.create(variant, **settings) as sandbox:  # type: ignore[arg-type]  # any
            transfers: list[Callable[[OnProgress], Coroutine[None, None, None]]] = [
                lambda told: sandbox.files.upload(here / "big", there / "up", on_progress=told),
                lambda told: sandbox.files.download(there / "d/big", here / "down", on_progress=told),
                lambda told: sandbox.files.download(there / "d", here / "down", on_progress=told),
            ]
            for transfer in transfers:
                begun = asyncio.Event()

                async def tell(done: int, total: int, begun: asyncio.Event = begun) -> None:
                    begun.set()
                    await asyncio.sleep(0)

                task = asyncio.create_task(transfer(tell))
                await begun.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert os.listdir(here) == ["big"]
            assert await sandbox.files.exists(there / "d")
            assert os.listdir(there) == ["d"]

    asyncio.run(main())
