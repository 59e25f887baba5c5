"""RUNS IN THE KERNEL: what the cloud's companion does to its variables.

The format is that of the cloud's own loader in the browser: name, newline, pickle, newline, NUL, newline,
for each variable. Whatever cannot be pickled or loaded is left out, and the others are not the worse for it.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import types
from typing import Any

END = b"\n\0\n"

_LEFT_OUT_TYPES = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    types.TracebackType,
)
_LEFT_OUT_CLASSES = ("ExitAutocall", "InteractiveShell")
_LEFT_OUT_NAMES = ("In", "Out")


def dump(namespace: dict[str, Any], path: str) -> str:
    """Write the variables in *namespace*; tell, as JSON, which are left out for their value, and why."""
    skipped = {}
    with open(path, "wb") as file:
        for name, value in list(namespace.items()):
            if not is_variable(name, value):
                continue
            try:
                data = pickle.dumps(value)
            except Exception as error:  # of the user's own code, too
                skipped[name] = type(error).__name__
            else:
                file.write(name.encode() + b"\n" + data + END)
    return json.dumps(skipped)


def load(namespace: dict[str, Any], path: str, splits_at_nul: bool) -> str:
    """Add the variables in the file to *namespace*; tell which could not be loaded, and why."""
    with open(path, "rb") as file:
        whole = file.read()
    skipped = {}
    for name, data in records(whole, splits_at_nul):
        try:
            namespace[name.decode()] = pickle.loads(data)
        except Exception as error:
            skipped[name.decode(errors="replace")] = type(error).__name__
    return json.dumps(skipped)


def records(whole: bytes, splits_at_nul: bool) -> list[tuple[bytes, bytes]]:
    """Each variable's name and pickle; *splits_at_nul* is how the cloud's own loader does it."""
    if splits_at_nul:
        parts = [part.partition(b"\n") for part in whole.split(b"\0\n") if part]
        return [(name, data) for name, _, data in parts]
    found = []
    while whole:
        name, _, rest = whole.partition(b"\n")
        at = _pickle_end(rest)
        found.append((name, rest[:at]))
        whole = rest[at + len(END) :]
    return found


def _pickle_end(data: bytes) -> int:
    return max(at for _, _, at in pickletools.genops(data) if at is not None) + 1


def is_variable(name: str, value: object) -> bool:
    if name.startswith("_") or name in _LEFT_OUT_NAMES or isinstance(value, _LEFT_OUT_TYPES):
        return False
    return not any(kind.__name__ in _LEFT_OUT_CLASSES for kind in type(value).__mro__)
