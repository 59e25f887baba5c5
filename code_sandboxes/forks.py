"""What a forked child of the program must not touch.

Threads do not come along into a child, but the objects they worked with do: closing them there, or only
collecting them, could reach into the parent's epoll set or corrupt its sockets. They are let go of without
that, and kept, unused, for as long as the child lives.
"""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["in_forked_child"]

_left_to_parent: list[object] = []


def in_forked_child(let_go: Callable[[], object]) -> None:
    """In every child forked from now on call *let_go*, and keep what it returns."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _left_to_parent.append(let_go()))
