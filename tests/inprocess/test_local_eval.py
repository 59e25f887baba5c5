"""local-eval against code that means it no good, and against what it may meet in a program."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from code_sandboxes import Sandbox, SandboxConfig

IN_TIME = 30.0


@contextlib.contextmanager
def after_all() -> Iterator[None]:
    """What is done here leaves no trace in the program: neither streams nor threads."""
    before = [vars(sys)[name] for name in ("stdin", "stdout", "stderr", "__stdout__")], sys.unraisablehook
    yield
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "code_sandboxes-eval"])
    after = [vars(sys)[name] for name in ("stdin", "stdout", "stderr", "__stdout__")], sys.unraisablehook
    assert before == after


def wait_until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + IN_TIME
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with after_all(), Sandbox.create("local-eval", config=SandboxConfig(interrupt_grace=0.5)) as sandbox:
        yield sandbox
