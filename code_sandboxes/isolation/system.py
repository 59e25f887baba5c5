"""The folders of this machine with what everybody runs: programs and libraries, and nothing of its users."""

from __future__ import annotations

__all__ = ["MERGED", "SYSTEM", "UNMERGED", "is_below"]

UNMERGED = ("/usr", "/nix/store", "/gnu/store")

MERGED = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Those that on many systems are links into ``/usr`` (file-hierarchy(7))."""

SYSTEM = (*UNMERGED, *MERGED)


def is_below(path: str, folder: str) -> bool:
    """Is *path* that of *folder*, or of something in it? Both are absolute."""
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")
