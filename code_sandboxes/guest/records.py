"""Keep in a variable what is left out by a service that keeps variables, and take it out of there again.

Such a service (Datalayer) pickles each variable by itself, and leaves out modules, functions and classes,
whatever is made of the latter, and files. So a text is made of these for it, in a variable that is there
only while it looks. It has all variables, if they have room: only together can they share what they shared.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from io import BytesIO
from pickle import dumps
from time import monotonic
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from code_sandboxes.guest.calls import Call

MOST = 32 * 1024**2
"""Bytes of variables, and of files."""

# What the text begins with; its other words are the base64 of JSON, of variables and of files.
_MAGIC = "code_sandboxes-record-1"

# Below the home: nobody would miss the first, and the second is full of what was installed.
_CACHE, _INSTALLED = ".cache", ".local"

_DEFINITIONS = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)

# What the service splits records at; it must not be in the pickle of the text, by whatever protocol.
_SPLITS = b"\0\n"
_PROTOCOLS = (2, 3, 4, 5)

_MOST_ATTEMPTS = 100


class Full(Exception):
    """There is no room for more."""


class _Sink:
    """Takes what is written, as long as there is room; then it is closed."""

    def __init__(self, call: Call) -> None:
        self.stop = call.stop_thread
        self.clock = monotonic
        self.data = bytearray()
        self.is_full = False
        self._call = call

    @property
    def is_closed(self) -> bool:
        return self.is_full or self._call.is_stopped

    def write(self, data: Any) -> None:
        self.is_full = self.is_full or len(self.data) + len(data) > MOST
        if not self.is_full:
            self.data += data

    def restart(self) -> None:
        """What was written is worth nothing."""
        del self.data[:]


class _Source(BytesIO):
    """Gives what was written."""

    def __init__(self, data: bytes, call: Call) -> None:
        super().__init__(data)
        self.stop = call.stop_thread
        self.clock = monotonic
        self.is_closed = False


class Records:
    """Keep and take records.

    Args:
        namespace: gives that of ``__main__``.
        hidden: gives what of it is not the user's, as IPython knows it.
        parts: the modules of the guest, by name.
    """

    in_threads = ("records.keep", "records.missing", "records.take")

    def __init__(
        self,
        namespace: Callable[[], dict[str, Any]],
        hidden: Callable[[], Mapping[str, Any]],
        parts: Mapping[str, Any],
    ) -> None:
        self.functions: Mapping[str, Callable[..., object]] = {
            "records.keep": self._keep,
            "records.drop": self._drop,
            "records.missing": self._missing,
            "records.take": self._take,
        }
        self._namespace = namespace
        self._hidden = hidden
        self._archive, self._variables = parts["archive"], parts["namespace"]
        self._definitions, self._salvage = parts["definitions"], parts["salvage"]
        self._home = os.environ.get("HOME", os.curdir)  # before code can say something else

    def close(self) -> None:
        return

    def _keep(self, call: Call, variable: str) -> object:
        """Make a record of all that there is; which variables there are, and what was left out, is told."""
        main = self._namespace()
        main.pop(variable, None)  # of another time
        users = self._variables.users_variables(main, self._hidden())
        files, left = self._files(call)
        variables, left_variables = self._saved(call, users)
        left.update(left_variables)
        told = self._variables.told
        packages, others = _packages()
        head = {
            "names": [told(name) for name in users],
            "left": left,
            "packages": packages,
            "others": others,
        }
        main[variable] = _text(head, variables, files)
        return {"names": [name for name in head["names"] if name not in left], "left": left}

    def _drop(self, call: Call, variable: str) -> None:
        self._namespace().pop(variable, None)

    def _missing(self, call: Call, variable: str) -> object:
        """Is there a record; and which packages were there and are not now: for pip, and from elsewhere."""
        found = _read(self._namespace().get(variable))
        if found is None:
            return {"found": False, "packages": [], "others": []}
        here, others = _packages()
        there = {_normal(name) for name in (*here, *others)}
        packages = found[0]["packages"].items()
        return {
            "found": True,
            "packages": [name + "==" + version for name, version in packages if _normal(name) not in there],
            "others": [name for name in found[0]["others"] if _normal(name) not in there],
        }

    def _take(self, call: Call, variable: str) -> object:
        """Let all be there of which there is a record; what is not, is told."""
        main = self._namespace()
        found = _read(main.pop(variable, None))
        if found is None:
            raise LookupError("there is no record")
        head, variables, files = found
        left = {name: why for name, why in head["left"].items() if name not in head["names"]}
        left.update(self._load_files(files))
        reasons = {**head["left"], **self._load(call, variables)}
        there = {self._variables.told(name) for name in main if isinstance(name, str)}
        for name in head["names"]:
            if name not in there:
                left[name] = reasons.get(name, "the service did not restore it")
        return {"left": left}

    # Variables.

    def _saved(self, call: Call, users: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
        """As many of the user's variables as have room, and which of them were left out for other reasons."""
        told = self._variables.told
        for is_needed in (_is_something, _is_left_out, _is_definition):
            sink = _Sink(call)
            chosen = {name: value for name, value in users.items() if is_needed(name, value)}
            try:
                left = self._variables.save(chosen, self._namespace(), sink, self._definitions)
            except BaseException:  # of whatever kind: it is raised where it was found to be closed
                if not sink.is_full:
                    raise
            else:
                return bytes(sink.data), {told(name): why for name, why in left.items()}
        no_room = "there is no room for it: it takes more than " + str(MOST) + " bytes"
        return b"", {told(name): no_room for name, value in users.items() if _is_left_out(name, value)}

    def _load(self, call: Call, data: bytes) -> dict[str, str]:
        """Set the variables; those that cannot be, with the reason."""
        if not data:
            return {}
        told = self._variables.told
        salvage, without = None, set[str]()
        for _ in range(_MOST_ATTEMPTS):
            source = _Source(data, call)
            left, again, slow = self._variables.load(
                self._namespace(), source, self._definitions, salvage, without
            )
            if not again:
                break
            salvage = self._salvage
            if slow is not None:
                without.add(told(slow))
        return {told(name): why for name, why in left.items()}

    # Files.

    def _files(self, call: Call) -> tuple[bytes, dict[str, str]]:
        sink = _Sink(call)

        def write(data: Any) -> None:
            sink.write(data)
            if sink.is_closed:
                raise Full

        left = self._archive.Left("~/", self._variables.told)
        if os.path.exists(os.path.join(self._home, _INSTALLED)):
            left.add(_INSTALLED, "what was installed is not carried")
        try:
            self._archive.save(self._home, [""], (_CACHE, _INSTALLED), write, left)
        except Full:
            return b"", {"~": "there is no room for its files: they take more than " + str(MOST) + " bytes"}
        except OSError as error:  # there is no home, say
            return b"", {"~": self._variables.told(error.strerror or str(error))}
        return bytes(sink.data), left.reasons

    def _load_files(self, data: bytes) -> dict[str, str]:
        left = self._archive.Left("~/", self._variables.told)
        if data:
            try:
                self._archive.load(self._home, [""], BytesIO(data), left)
            except OSError as error:
                return {"~": self._variables.told(error.strerror or str(error))}
        reasons: dict[str, str] = left.reasons
        return reasons


def _is_something(name: str, value: object) -> bool:
    return True


def _is_left_out(name: str, value: object) -> bool:
    """The service leaves it out, or cannot restore it."""
    return name.startswith("_") or type(value).__module__ == "__main__" or _is_definition(name, value)


def _is_definition(name: str, value: object) -> bool:
    return isinstance(value, _DEFINITIONS)


def _text(head: object, *parts: bytes) -> str:
    words = [json.dumps(head).encode(), *parts]
    text = " ".join([_MAGIC, *(b64encode(word).decode("ascii") for word in words)])
    while any(_SPLITS in dumps(text, protocol) for protocol in _PROTOCOLS):
        text += " "  # another length
    return text


def _read(text: object) -> tuple[Any, bytes, bytes] | None:
    """What a text was made of; None if it is none that was made here."""
    if not isinstance(text, str) or not text.startswith(_MAGIC + " "):
        return None
    # An empty part leaves nothing between two blanks.
    head, variables, files = (b64decode(word) for word in text.split(" ")[1:4])
    return json.loads(head), variables, files


# Packages.


def _packages() -> tuple[dict[str, str], list[str]]:
    """What is installed: with its version, from an index; by its name alone, from elsewhere."""
    from importlib.metadata import distributions

    found: dict[str, str] = {}
    others: list[str] = []
    for each in distributions():
        name = each.metadata["Name"]
        if not isinstance(name, str):  # it is half removed
            continue
        if each.read_text("direct_url.json"):
            others.append(name)
        else:
            found.setdefault(name, each.version)
    return found, others


def _normal(name: str) -> str:
    """As names of packages are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
