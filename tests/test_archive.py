"""Files as a tar, and back: what is kept, and that what was made by somebody else leads nowhere."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from code_sandboxes.guest import archive
from tests.memory import Memory

MIB = 1024**2


def saved(root: Path, *leave_out: str) -> tuple[bytes, dict[str, str]]:
    """What is below *root*, and what was left out."""
    sink, left = Memory(), archive.Left("/", str)
    archive.save(str(root), [""], leave_out, sink.write, left)
    return bytes(sink.data), left.reasons


def loaded(root: Path, data: bytes) -> dict[str, str]:
    """Make it below *root*; what was left out."""
    left = archive.Left("/", str)
    archive.load(str(root), [""], Memory(data), left)
    return left.reasons


def tar_of(*entries: tarfile.TarInfo) -> bytes:
    """A tar that somebody else has made; each file has its own name as content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            content = os.path.basename(entry.name).encode() if entry.isreg() else b""
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, mode
    return info


def look(root: Path) -> dict[str, object]:
    """All there is below *root*: what it is, and what it has."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = (path.read_bytes(), status.st_mtime, status.st_nlink)
        found[str(path.relative_to(root))] = (stat.filemode(status.st_mode), content)
    return found


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


def test_everything_is_as_it_was(here: Path, there: Path) -> None:
    (here / "folder/empty").mkdir(parents=True)
    (here / "folder/locked").mkdir(mode=0o500)
    (here / "text").write_text("hello")
    (here / "program").write_text("#!")
    (here / "program").chmod(0o750)
    (here / "folder" / ("long" * 50)).write_bytes(os.urandom(3 * MIB + 17))
    Path(os.fsdecode(os.fsencode(here) + b"/no utf-8 \xff")).write_text("odd")
    os.utime(here / "text", (1e9, 1.5e9))
    (here / "link").symlink_to("folder")
    (here / "dangling").symlink_to("/nowhere/\u00e9")
    os.link(here / "text", here / "folder" / "hard")
    os.utime(here / "folder", (1e9, 1.25e9))

    data, left = saved(here)
    assert left == {}
    assert loaded(there, data) == {}

    assert look(there) == look(here)
    assert (there / "folder").stat().st_mtime == 1.25e9
    assert (there / "text").stat().st_ino == (there / "folder" / "hard").stat().st_ino


def test_what_nobody_would_miss_is_left_out(here: Path, there: Path) -> None:
    (here / "run/below").mkdir(parents=True)
    (here / "kept").write_text("1")
    (here / ".code_sandboxes-12.new").write_text("half")
    os.mkfifo(here / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(here)
        listener.bind("socket")
    os.chdir("/")

    data, left = saved(here, "run")
    loaded(there, data)

    assert left == {}
    assert set(look(there)) == {"kept"}


def test_a_hole_stays_one(here: Path, there: Path) -> None:
    with (here / "holes").open("wb") as file:
        file.truncate(50 * MIB)
        file.seek(20 * MIB)
        file.write(b"x")

    loaded(there, saved(here)[0])

    assert (there / "holes").read_bytes() == (here / "holes").read_bytes()
    assert (there / "holes").stat().st_blocks < 10 * MIB / 512


def test_what_is_nothing_but_holes_is_named(here: Path) -> None:
    with (here / "huge").open("wb") as file:
        file.truncate(2**42)

    data, left = saved(here)

    assert left == {"/huge": "it has holes, without which it is larger than the disk"}
    assert len(data) < MIB


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_what_cannot_be_read_is_named(here: Path) -> None:
    (here / "secret").write_text("x")
    (here / "secret").chmod(0)
    (here / "closed").mkdir(mode=0)

    _, left = saved(here)
    (here / "closed").chmod(0o700)

    assert left == dict.fromkeys(("/secret", "/closed"), "Permission denied")


def test_a_file_that_becomes_shorter_is_filled_and_named(here: Path, there: Path) -> None:
    (here / "log").write_bytes(b"x" * 3 * MIB)
    sink, left = Memory(), archive.Left("/", str)

    def write(data: bytes) -> None:
        os.truncate(here / "log", MIB)
        sink.write(data)

    archive.save(str(here), [""], (), write, left)
    (here / "after").write_text("1")

    assert list(left.reasons) == ["/log"]
    assert loaded(there, bytes(sink.data)) == {}
    assert (there / "log").stat().st_size == 3 * MIB


def test_only_so_many_are_named() -> None:
    left = archive.Left("/", str)
    for number in range(archive.MOST_NAMED + 5):
        left.add(str(number), "why")

    assert len(left.reasons) == archive.MOST_NAMED + 1
    assert left.reasons["..."] == "5 more files"


# A tar that was made to do harm.


@pytest.mark.parametrize(
    "name", ["../out", "a/../../out", "/out", "//out", "a//b", "./out", "..", "a/./b"], ids=lambda name: name
)
def test_no_name_leads_out(name: str, there: Path) -> None:
    left = loaded(there, tar_of(entry(name)))

    assert list(left.values()) == ["a file of which the name leads elsewhere"]
    assert [path.name for path in there.parent.rglob("*")] in (["there"], ["there", "a"])


@pytest.mark.parametrize(
    "entries",
    [
        [entry("link", tarfile.SYMTYPE, ".."), entry("link/out")],
        [entry("a/link", tarfile.SYMTYPE, "../.."), entry("a/link/out")],
        [entry("link", tarfile.SYMTYPE, "/tmp"), entry("link/sub/out")],
        [entry("hard", tarfile.LNKTYPE, "../secret")],
        [entry("link", tarfile.SYMTYPE, ".."), entry("hard", tarfile.LNKTYPE, "link/secret")],
        [entry("link", tarfile.SYMTYPE, ".."), entry("link", tarfile.DIRTYPE, mode=0o777), entry("link/out")],
    ],
)
def test_no_link_leads_out(entries: list[tarfile.TarInfo], there: Path) -> None:
    (there.parent / "secret").write_text("secret")
    before = set(os.listdir(there.parent)), there.parent.stat().st_mode

    left = loaded(there, tar_of(*entries))

    assert left
    assert (set(os.listdir(there.parent)), there.parent.stat().st_mode) == before
    assert (there.parent / "secret").stat().st_nlink == 1


def test_a_link_in_the_way_of_a_file_is_not_followed(there: Path) -> None:
    victim = there.parent / "victim"
    victim.write_text("untouched")
    (there / "file").symlink_to(victim)

    loaded(there, tar_of(entry("link", tarfile.SYMTYPE, str(victim)), entry("link"), entry("file")))

    assert victim.read_text() == "untouched"
    assert (there / "link").read_text() == "link"
    assert (there / "file").read_text() == "file"


def test_nobody_gains_rights_or_devices(there: Path) -> None:
    kinds = [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
    entries = [entry(f"special{number}", kind) for number, kind in enumerate(kinds)]

    loaded(there, tar_of(entry("set", mode=0o6777), entry("dir", tarfile.DIRTYPE, mode=0o7777), *entries))

    assert stat.S_IMODE((there / "set").stat().st_mode) == 0o777
    assert stat.S_IMODE((there / "dir").stat().st_mode) == 0o1777
    assert all(path.is_file() or path.is_dir() for path in there.iterdir())


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.isdir("/dev/shm"), reason="needs another file system")
def test_nothing_is_written_to_what_is_mounted(tmp_path: Path) -> None:
    left, before = archive.Left("/", str), set(os.listdir("/dev/shm"))
    entries = [
        entry("dev/shm/out"),
        entry("dev/shm/sub/out"),
        entry("dev/shm", tarfile.DIRTYPE, mode=0o700),
        entry("dev/shm/folder", tarfile.DIRTYPE),
        entry("dev/shm/link", tarfile.SYMTYPE, "out"),
    ]
    archive.load("/", [str(tmp_path).strip("/")], Memory(tar_of(*entries)), left)

    assert set(os.listdir("/dev/shm")) == before
    assert stat.S_IMODE(os.stat("/dev/shm").st_mode) == 0o1777
    assert left.reasons == dict.fromkeys(
        (f"/{each.name}" for each in entries), "something else is mounted there"
    )


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.isdir("/dev/shm"), reason="needs another file system")
def test_what_is_mounted_is_not_kept(here: Path, there: Path) -> None:
    (here / "mounted").mkdir()
    (here / "own").write_text("1")
    if subprocess.run(["mount", "--bind", "/dev/shm", here / "mounted"]).returncode:
        pytest.skip("this root may not mount")
    try:
        (here / "mounted/other").write_text("2")
        loaded(there, saved(here)[0])
    finally:
        (here / "mounted/other").unlink()
        subprocess.run(["umount", here / "mounted"], check=True)

    assert set(look(there)) == {"own"}


@pytest.mark.parametrize(
    "damage", [lambda data: data[:700], lambda data: b"x" * 5000, lambda data: data[:200]]
)
def test_what_is_no_tar_is_damaged(damage: Callable[[bytes], bytes], there: Path) -> None:
    data = tar_of(entry("a"), entry("b"))

    with pytest.raises(archive.Damaged, match="no tar"):
        loaded(there, damage(data))


def test_no_time_is_too_odd(there: Path) -> None:
    infos = [entry(f"f{number}") for number in range(4)]
    for info, when in zip(infos, (float("nan"), float("inf"), 1e300, -1e300), strict=True):
        info.pax_headers = {"mtime": repr(when)}

    loaded(there, tar_of(*infos))

    assert sorted(os.listdir(there)) == ["f0", "f1", "f2", "f3"]
