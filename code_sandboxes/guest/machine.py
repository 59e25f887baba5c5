"""Tell what the machine has on which this kernel runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from code_sandboxes.guest.calls import Call

# Seconds: a driver that has slept takes a while.
_PATIENCE = 60.0


class Machine:
    """Tell what the machine has."""

    in_threads = ("machine.gpus",)

    def __init__(self) -> None:
        self.functions: Mapping[str, Callable[..., object]] = {"machine.gpus": self._gpus}

    def close(self) -> None:
        return

    def _gpus(self, call: Call) -> object:
        """The models of the NVIDIA GPUs that code can use, as their driver's own program says."""
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            asked = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=False
            )
        except (OSError, subprocess.TimeoutExpired):  # there is none, or none that can be used
            return []
        if asked.returncode != 0:
            return []
        return [line.strip() for line in asked.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
