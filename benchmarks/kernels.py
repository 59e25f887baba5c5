"""Kernels of ipykernel that the minimal client starts for itself: as ours are started, or as they come."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

__all__ = ["OwnKernel"]

_CHANNELS = ("shell", "iopub", "stdin", "control", "hb")


class OwnKernel:
    """A kernel process on ``ipc://``.

    Args:
        launcher: ``"tuned"`` is how local-jupyter starts ipykernel, ``"stock"`` is ``ipykernel_launcher``.
    """

    def __init__(self, launcher: Literal["tuned", "stock"]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="k", ignore_cleanup_errors=True)
        self.connection_file = Path(self._folder.name) / "connection.json"
        self.connection_file.write_text(json.dumps(_connection(self.connection_file.parent / "s")))
        self._process = subprocess.Popen(
            [sys.executable, *_arguments(launcher, self.connection_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            start_new_session=True,
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _connection(sockets: Path) -> dict[str, object]:
    ports: dict[str, object] = {f"{name}_port": number for number, name in enumerate(_CHANNELS, start=1)}
    return ports | {
        "transport": "ipc",
        "ip": str(sockets),
        "key": secrets.token_hex(32),
        "signature_scheme": "hmac-sha256",
        "kernel_name": "python3",
    }


def _arguments(launcher: Literal["tuned", "stock"], connection_file: Path) -> list[str]:
    if launcher == "stock":
        return ["-m", "ipykernel_launcher", "-f", str(connection_file)]
    # What they stand for is decided there; a copy here would measure yesterday's kernel.
    from code_sandboxes.variants.kernelspecs import IPYKERNEL_ARGUMENTS, LAUNCH

    return [LAUNCH, "-f", str(connection_file), *IPYKERNEL_ARGUMENTS]
