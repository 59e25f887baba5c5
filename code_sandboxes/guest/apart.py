"""Load the guest apart from what the user's code can reach and change.

Code patches modules, by accident and on purpose: ``os.open``, ``subprocess.Popen``, ``builtins.open``. The
guest gets copies of its own of the modules that are written in Python, and of the built-in names, so that a
call works whatever has become of those that everybody shares.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

# What the guest uses that is written in Python and is patched by people; in the order of their dependencies.
SHARED = ("stat", "genericpath", "posixpath", "os", "selectors", "subprocess", "shutil", "tarfile")

PREFIX = "_code_sandboxes_"
PARTS = (
    *("calls", "files", "watching", "processes", "values", "variables", "packages"),
    *("definitions", "salvage", "namespace", "archive", "snapshots", "records", "machine", "comms"),
)


# What else a kernel gets that somebody else has started.
EXTRAS = ("launch", "envelopes")


def boot(sources: Mapping[str, str]) -> None:
    """Serve the functions of the guest in this kernel, which was started without.

    Args:
        sources: of the parts, by name.
    """
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    parts = load(lambda name: _compiled(sources, name))
    parts["comms"].install(shell.kernel, parts)


def set_up(given: Mapping[str, Any]) -> None:
    """Make of this kernel, which somebody else has started, what one is that we start.

    Args:
        given: ``sources`` of the parts and of the extras, by name; ``env``, pairs of environment variables;
            ``cwd``, where its code begins, or None.
    """
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    os: Any = sys.modules["os"]
    os.environ.update(given["env"])
    if given["cwd"] is not None:
        os.chdir(given["cwd"])
    extras = {name: _compiled(given["sources"], name) for name in EXTRAS}
    launch, envelopes = (_execute(ModuleType(PREFIX + name), extras[name], vars(builtins)) for name in EXTRAS)
    launch.improve(shell.kernel, copy)
    envelopes.install(shell.kernel)
    boot(given["sources"])


def load(code_of: Callable[[str], CodeType]) -> dict[str, Any]:
    """The parts of the guest, by name.

    Args:
        code_of: gives the compiled source of a part.
    """
    own_builtins = dict(vars(builtins))
    kept = {name: sys.modules[name] for name in (*SHARED, "os.path") if name in sys.modules}
    try:
        for name in SHARED:
            sys.modules[name] = copy(name, own_builtins)
        for name in ("genericpath", "posixpath"):  # they and os import each other
            vars(sys.modules[name])["os"] = sys.modules["os"]
        if "os" in kept:  # there is one environment, and code changes it by that one
            vars(sys.modules["os"])["environ"] = kept["os"].environ
        return {name: _execute(ModuleType(PREFIX + name), code_of(name), own_builtins) for name in PARTS}
    finally:
        for name in SHARED:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def _compiled(sources: Mapping[str, str], name: str) -> CodeType:
    return compile(sources[name], "<" + PREFIX + name + ">", "exec", dont_inherit=True)


def copy(name: str, own_builtins: dict[str, Any]) -> Any:
    """A module of the standard library once more, with these built-in names."""
    spec = _find(name)
    module = ModuleType(name)
    module.__spec__ = spec
    module.__file__ = spec.origin
    loader: Any = spec.loader
    return _execute(module, loader.get_code(name), own_builtins)


def _find(name: str) -> ModuleSpec:
    finders: Sequence[Any] = sys.meta_path
    for finder in finders:
        spec: ModuleSpec | None = finder.find_spec(name, None)
        if spec is not None and hasattr(spec.loader, "get_code"):
            return spec
    raise ImportError(name)


def _execute(module: Any, code: CodeType, own_builtins: dict[str, Any]) -> Any:
    vars(module)["__builtins__"] = own_builtins
    exec(code, vars(module))
    return module
