"""The requests that bring the guest into a Python kernel that was started without it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache

from code_sandboxes import guest
from code_sandboxes.guest.apart import EXTRAS, PARTS
from code_sandboxes.guest.comms import FEATURE, TARGET
from code_sandboxes.kernel_process import Prologue
from code_sandboxes.protocol.events import failure
from code_sandboxes.protocol.messages import execute_content

__all__ = ["boot_content", "boot_metadata", "prologue", "why_prologue_failed"]

# The sources travel in the metadata: IPython looks at code several times before it runs it. And this code is
# one expression without a name in it, since any name may mean something else by now.
_BUILTINS = "(0 for _ in ()).gi_frame.f_builtins"
_METADATA = f"{_BUILTINS}['__import__']('IPython').get_ipython().kernel.get_parent()['metadata']['{TARGET}']"
_CODE = f"{_BUILTINS}['exec']({_METADATA}['boot'], {{'given': {_METADATA}}})"


def boot_content() -> dict[str, object]:
    """The content of the ``execute_request``: it leaves no trace in history and namespace."""
    content = execute_content(_CODE, allow_stdin=False)
    return {**content, "silent": True, "store_history": False, "stop_on_error": False}


@cache
def boot_metadata() -> Mapping[str, object]:
    """Its metadata: the sources of the guest."""
    return {TARGET: {"boot": _source("apart") + "\nboot(given['sources'])\n", "sources": _sources()}}


def prologue(env: Mapping[str, str], cwd: str | None) -> Prologue:
    """What brings the guest, and much else that a kernel of ours has from its start, into a new one.

    Args:
        env: more environment variables.
        cwd: where its code begins; None for where it is.
    """
    sources = {**_sources(), **{name: _source(name) for name in EXTRAS}}
    boot = _source("apart") + "\nset_up(given)\n"
    given = {"boot": boot, "sources": sources, "env": list(env.items()), "cwd": cwd}
    # Not as code: IPython would put the old write() of the streams back, which it has found before the cell.
    content = {**boot_content(), "code": "", "user_expressions": {TARGET: _CODE}}
    return Prologue(content, {TARGET: given}, (FEATURE,))


def why_prologue_failed(reply: Mapping[str, object]) -> str:
    """What the reply to a :func:`prologue` says has gone wrong; empty if nothing has."""
    told = reply.get("user_expressions")
    answer = told.get(TARGET) if isinstance(told, dict) else None
    if isinstance(answer, dict) and answer.get("status") == "ok":
        return ""
    why = failure(answer if isinstance(answer, dict) else reply)
    return f"{why.name}: {why.value}"


@cache
def _sources() -> Mapping[str, str]:
    return {name: _source(name) for name in PARTS}


@cache
def _source(name: str) -> str:
    path = os.path.join(os.path.dirname(guest.__file__), name + ".py")
    with open(path, encoding="utf-8") as file:
        return file.read()
