"""The request that brings the guest into a Python kernel that was started without it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

from code_sandboxes import guest
from code_sandboxes.guest.apart import PARTS
from code_sandboxes.guest.comms import TARGET
from code_sandboxes.protocol.messages import execute_content

__all__ = ["boot_content", "boot_metadata"]

# The sources travel in the metadata: IPython looks at code several times before it runs it. And this code is
# one expression without a name in it, since any name may mean something else by now.
_BUILTINS = "(0 for _ in ()).gi_frame.f_builtins"
_METADATA = f"{_BUILTINS}['__import__']('IPython').get_ipython().kernel.get_parent()['metadata']['{TARGET}']"
_CODE = f"{_BUILTINS}['exec']({_METADATA}['boot'], {{'sources': {_METADATA}['sources']}})"


def boot_content() -> dict[str, object]:
    """The content of the ``execute_request``: it leaves no trace in history and namespace."""
    content = execute_content(_CODE, allow_stdin=False)
    return {**content, "silent": True, "store_history": False, "stop_on_error": False}


@cache
def boot_metadata() -> Mapping[str, object]:
    """Its metadata: the sources of the guest."""
    sources = {name: _source(name) for name in PARTS}
    return {TARGET: {"boot": _source("apart") + "\nboot(sources)\n", "sources": sources}}


def _source(name: str) -> str:
    path = os.path.join(os.path.dirname(guest.__file__), name + ".py")
    with open(path, encoding="utf-8") as file:
        return file.read()
