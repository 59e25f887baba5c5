"""Files that have no name: what a process that is about to start is to read."""

from __future__ import annotations

import os

__all__ = ["memory_file"]


def memory_file(content: bytes) -> int:
    """A file in memory, as a descriptor at its beginning (memfd_create(2)); the caller's to close."""
    descriptor = os.memfd_create("code_sandboxes")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
