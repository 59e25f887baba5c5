"""What runs in the kernel: that it changes what it means to change, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ipykernel import kernelbase
from ipykernel.iostream import OutStream
from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel

from code_sandboxes import Sandbox
from code_sandboxes.guest import journal
from code_sandboxes.guest.launch import publishable

pytestmark = pytest.mark.needs("own_process")


def test_ipykernel_still_has_what_the_launcher_changes() -> None:
    """Where it has not, its own behaviour stays, and this test tells."""
    for name in ("flush_interval", "flush", "_flush", "write", "_schedule_flush"):
        assert hasattr(OutStream, name)
    assert hasattr(IPKernelApp, "init_iopub")
    assert hasattr(Kernel, "pre_handler_hook")
    assert hasattr(Kernel, "post_handler_hook")
    assert hasattr(kernelbase, "default_int_handler")
    assert "_execute_sleep" in Kernel.class_trait_names(config=True)


@pytest.mark.not_on_a_server("it is started by others")
def test_the_kernel_is_tuned(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "import sys; k = get_ipython().kernel\n"
        "print(k._execute_sleep, sys.stdout.flush_interval, get_ipython().history_manager.enabled,"
        " k.iopub_thread.socket.sndhwm)"
    )

    assert result.stdout == "0.0 0.005 False 0"


@pytest.mark.not_on_a_server("its event loop runs already when it is changed")
def test_an_interrupt_that_reaches_the_event_loop_does_not_end_the_kernel(sandbox: Sandbox) -> None:
    result = sandbox.run_code(
        "kept = 1\n"
        "import asyncio\n"
        "def raise_there(): raise KeyboardInterrupt\n"
        "for _ in range(3): asyncio.get_event_loop().call_soon(raise_there)"
    )

    assert result.success
    assert sandbox.run_code("kept").text == "1"


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("plain", "plain"),
        ("\u00e9\U0001f600", "\u00e9\U0001f600"),
        ("a\udcffb", "a\ufffdb"),
        ("a\ud800b", "a?b"),
    ],
)
def test_text_is_made_publishable(text: str, published: str) -> None:
    assert publishable(text) == published


def test_a_print_of_no_string_fails_as_it_does_elsewhere(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code("import sys; sys.stdout.write(5)")

    assert result.error is not None
    assert result.error.name == "TypeError"


def test_prints_of_a_forked_child_arrive_once(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "import os, time\npid = os.fork()\n"
        "if not pid:\n    print('child', flush=True); time.sleep(0.3); os._exit(0)\n"
        "os.waitpid(pid, 0); print('parent')"
    )

    assert sorted(result.stdout.splitlines()) == ["child", "parent"]


def test_prints_of_many_threads_are_all_there(shared_sandbox: Sandbox) -> None:
    result = shared_sandbox.run_code(
        "import threading\n"
        "def work(i):\n    for n in range(2000): print(f'{i}.{n}\\n', end='')\n"
        "threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]\n"
        "for t in threads: t.start()\nfor t in threads: t.join()"
    )

    assert sorted(result.stdout.splitlines()) == sorted(f"{i}.{n}" for i in range(8) for n in range(2000))


# The journal


@pytest.fixture
def written(tmp_path: Path) -> tuple[str, tuple[int, int], journal.Journal]:
    path = str(tmp_path / "journal")
    identity = journal.create(path)
    return path, identity, journal.Journal(os.open(path, os.O_RDWR))


Written = tuple[str, "tuple[int, int]", journal.Journal]


def test_what_was_recorded_is_read(written: Written) -> None:
    path, identity, writer = written
    writer.record(0, "out \u00e9")
    writer.record(1, "err")
    writer.record(0, "\n")

    assert journal.read(path, identity) == [(7, "out \u00e9\n".encode()), (3, b"err")]
    assert journal.read_totals(path, identity) == [7, 3]


@pytest.mark.parametrize("size", [1, 1000, 65537, journal.RING - 1, journal.RING, journal.RING * 2 + 5])
def test_the_ring_keeps_the_latest_whatever_the_sizes(written: Written, size: int) -> None:
    path, identity, writer = written
    text = "".join(chr(65 + i % 26) for i in range(size))
    total = 0
    for _ in range(max(3, 3 * journal.RING // size) if size >= 1000 else 3):
        writer.record(0, text)
        total += size
    ((written_total, latest), _) = journal.read(path, identity)

    assert written_total == total
    assert latest.decode() == (text * (journal.RING // size + 2))[-min(total, journal.RING) :]


def test_a_file_in_the_place_of_the_journal_is_not_read(written: Written, tmp_path: Path) -> None:
    path, identity, _ = written
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 3 * journal.RING)
    replacements: list[Callable[[], None]] = [
        lambda: os.symlink(secret, path),
        lambda: os.mkfifo(path),
        lambda: os.link(secret, path),
        lambda: os.mkdir(path),
    ]
    for replace in replacements:
        os.unlink(path)
        replace()
        assert journal.read(path, identity) == []
        assert journal.read_totals(path, identity) == []


def test_a_journal_that_lies_is_bounded(written: Written) -> None:
    path, identity, _ = written
    with open(path, "r+b") as file:
        file.write(b"\xff" * 8)

    ((total, latest), _) = journal.read(path, identity)
    assert total == 2**64 - 1
    assert len(latest) == journal.RING
    os.truncate(path, 10)
    assert journal.read(path, identity) == []
