"""Who may import whom, and what is public (DESIGN: arrows go down only)."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import code_sandboxes

ROOT = Path(code_sandboxes.__file__).parent

# From the top down; a module imports from its own layer and from those below.
LAYERS = [
    {"__main__"},
    {"build_image", "doctor", "kernelspec_command"},
    {"provisioner"},
    {"__init__"},
    {"pool"},
    {"async_sandbox"},
    {"sandbox"},
    {"front"},
    {"async_commands", "async_files"},
    {"commands", "files"},
    {"awaiting", "blocking"},
    {"snapshot_operations", "system_packages"},
    {"shelf_operations"},
    {"package_operations"},
    {"command_operations", "file_operations", "snapshot_steps", "variable_operations"},
    {"processes", "transfers"},
    {"operations"},
    {"guest_calls"},
    {"variants"},
    {"kernel", "keeper", "inprocess", "remote"},
    {"steps", "guest_link"},
    {"guest_boot"},
    {"arrow", "guest_values", "kernel_process", "runs", "snapshots"},
    {"isolation"},
    {"inbox", "transports", "guest", "reaper"},
    {"protocol"},
    {"config", "info"},
    {"checks", "file_info", "forks", "frames", "network_info", "process_info", "results"},
    {"errors"},
]

# Each foreign library is the business of these modules alone.
FOREIGN = {
    "docker": {"isolation/container_engine.py", "isolation/engine.py", "isolation/engine_ssh.py"},
    "requests": {
        "isolation/container_engine.py",
        "isolation/engine.py",
        "isolation/engine_ssh.py",
        "remote/rest.py",
    },
    "urllib3": {"isolation/engine.py", "isolation/engine_ssh.py", "remote/rest.py"},
    "websockets": {"transports/websocket.py"},
    "zmq": {"guest/launch.py"},
    "jupyter_client": {"kernelspec_command.py", "provisioner.py", "variants/kernelspecs.py"},
    "traitlets": {"config.py", "provisioner.py", "variants/kernelspecs.py"},
    "ipykernel": {"guest/launch.py"},
    "IPython": {"guest/apart.py", "guest/launch.py", "inprocess/actor.py", "inprocess/display.py"},
}

SANS_IO = {"socket", "selectors", "select", "threading", "asyncio", "time", "datetime", "os", "subprocess"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(_without_type_checking(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_type_checking(tree: ast.Module) -> ast.Module:
    return ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])


def layer_of(parts: list[str]) -> int:
    name = parts[0].removesuffix(".py")
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize(("path", "tree"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_arrows_go_down_only(path: str, tree: ast.Module) -> None:
    own = layer_of(path.split("/"))
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "code_sandboxes" and len(parts) > 1:
            try:
                other = layer_of(parts[1:])
            except StopIteration:
                continue  # a name of the package itself
            assert own <= other, f"{path} imports {name}"


@pytest.mark.parametrize(("path", "tree"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_foreign_library_is_imported_where_it_is_used(path: str, tree: ast.Module) -> None:
    for name in imports(tree):
        top = name.split(".")[0]
        assert path in FOREIGN.get(top, {path}), f"{path} imports {top}"
        if path.startswith("protocol/"):
            assert top not in SANS_IO, f"{path} imports {top}"


def test_import_brings_no_library_along_that_only_a_variant_needs() -> None:
    program = "import sys, code_sandboxes; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    libraries = {"docker", "jupyter_client", "ipykernel", "asyncio", "tornado", "traitlets", "zmq"}
    assert not libraries & set(loaded.stdout.split())


@pytest.mark.slow
def test_every_module_lists_what_it_offers_and_the_package_what_is_public() -> None:
    assert code_sandboxes.__all__ == sorted(code_sandboxes.__all__)
    for name in code_sandboxes.__all__:
        assert hasattr(code_sandboxes, name)
    for path, _ in modules():
        if path.startswith("guest/") or path.endswith("__init__.py"):
            continue
        module = importlib.import_module("code_sandboxes." + path.removesuffix(".py").replace("/", "."))
        assert all(hasattr(module, name) for name in module.__all__), path


def test_the_guest_is_written_for_the_oldest_python() -> None:
    for path in (ROOT / "guest").glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
