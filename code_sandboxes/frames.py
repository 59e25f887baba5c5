"""How far it is from here to the program that uses this package: where a warning belongs."""

from __future__ import annotations

import sys

__all__ = ["frames_of_this_package"]


def frames_of_this_package() -> int:
    """How many frames, from the caller up, lie between it and the program that uses this package."""
    frame = sys._getframe(1)
    count = 0
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("code_sandboxes."):
        count, frame = count + 1, frame.f_back
    return count
