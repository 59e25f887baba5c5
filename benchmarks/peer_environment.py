"""The environment of code-sandboxes 1.10.0, made on first use in ``.venv-peer``."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

from benchmarks.contestant import ROOT, Contestant

__all__ = ["PEER", "PeerMissingError", "peer_python", "start_peer"]

PEER = "code-sandboxes 1.10.0 (jupyter-server)"

_FOLDER = ROOT / ".venv-peer"
_PYTHON = _FOLDER / "bin" / "python"
_CONFIG = _FOLDER / "jupyter-config"
_REQUIREMENT = "code-sandboxes==1.10.0"
# It asks for no kernel; it gets the same as ours, so that the libraries differ and not the kernels.
_KERNEL = f"ipykernel=={version('ipykernel')}"


class PeerMissingError(RuntimeError):
    """The peer could not be installed."""


def peer_python() -> Path:
    """Its interpreter.

    Raises:
        PeerMissingError: it cannot be installed here; why is in the message.
    """
    if not (_CONFIG / "jupyter_server_config.json").exists():
        _install()
    return _PYTHON


def start_peer() -> Contestant:
    """A process that drives it."""
    return Contestant("peer", python=peer_python(), env={"JUPYTER_CONFIG_DIR": str(_CONFIG)})


def _install() -> None:
    print(f"installing {_REQUIREMENT} in {_FOLDER.name} ...", file=sys.stderr)
    try:
        venv.create(_FOLDER, with_pip=True, clear=True)
        done = subprocess.run(
            [_PYTHON, "-m", "pip", "install", "--quiet", _REQUIREMENT, _KERNEL],
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerMissingError(f"no environment for {_REQUIREMENT}: {error}") from error
    if done.returncode:
        raise PeerMissingError(f"{_REQUIREMENT} cannot be installed: {done.stderr.strip()[-500:]}")
    _CONFIG.mkdir()
    # Its Jupyter Server refuses to run as root without this, and its API has no way to say so.
    (_CONFIG / "jupyter_server_config.json").write_text(json.dumps({"ServerApp": {"allow_root": True}}))
