"""A pod: a folder, a Jupyter Server in it, and its pre-warmed kernel."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

from tests.datalayer_service import companion
from tests.datalayer_service.janitor import MARK, sweep
from tests.datalayer_service.upstream import ask

__all__ = ["Pod"]

_START_SECONDS = 90.0

# `python -m jupyter_server`, without a grammar of IRIs that takes longer to import than all the rest. It is
# an optional dependency of jsonschema, which does without.
_SERVER = """
import sys
sys.modules["rfc3987_syntax"] = None
from jupyter_server.serverapp import main
sys.exit(main())
"""

_NVIDIA_SMI = """#!/bin/sh
# What a driver's own program answers, for the questions that are asked here.
case "$*" in
-L) format='GPU %s: {gpu} (UUID: GPU-00000000-0000-0000-0000-00000000000%s)\\n' ;;
"--query-gpu=name --format=csv,noheader") format='{gpu}\\n' ;;
*) echo "ERROR: Option $* is not recognized." >&2; exit 2 ;;
esac
for number in {numbers}; do printf "$format" "$number" "$number"; done
"""


class Pod:
    """One that runs from `start` until `end`, for which it need not have started well."""

    def __init__(self, folder: Path, base_url: str) -> None:
        self.folder = folder
        self.base_url = base_url
        self.token = secrets.token_hex(24)
        self.kernel_id: str | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._runtime_folder = folder / "run"

    @property
    def socket(self) -> Path:
        return self.folder / "s"

    @property
    def log(self) -> str:
        """What its server has said."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def start(self, env: Mapping[str, str], gpus: int, gpu: str) -> None:
        for name in ("bin", "etc", "home", "run", "tmp"):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        if gpus:
            self._install_nvidia_smi(gpus, gpu)
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                cwd=self.folder / "home",
                env=self._environ(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for who runs the service
            )
        self._wait_until_it_answers()

    def start_kernel(self, env: Mapping[str, str]) -> None:
        """The pre-warmed kernel, with *env* in its environment and in no other's."""
        status, kernel = ask(
            self.socket, self.token, "POST", f"{self.base_url}/api/kernels", {"name": "python3"}
        )
        if status != 201 or not isinstance(kernel, dict):
            raise RuntimeError(f"no kernel in a new pod: {status} {kernel}")
        self.kernel_id = str(kernel["id"])
        self._evaluate(f"__import__('os').environ.update({dict(env)!r})", _START_SECONDS)

    def dump(self, patience: float) -> tuple[bytes, dict[str, str]]:
        """The variables of the pre-warmed kernel, and why others are left out."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path = Path(folder, "variables")
            skipped = companion.call(self._connection_file, "dump", repr(str(path)), patience)
            return path.read_bytes(), json.loads(str(skipped))

    def load(self, data: bytes, patience: float, *, splits_at_nul: bool) -> None:
        """Add the variables in *data* to the pre-warmed kernel's; nobody is told which cannot be loaded."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path = Path(folder, "variables")
            path.write_bytes(data)
            companion.call(self._connection_file, "load", f"{str(path)!r}, {splits_at_nul}", patience)

    def end(self) -> None:
        """End its processes, whatever they are, and remove its folder."""
        if self.process is not None:
            self.process.kill()  # first: it would start its kernels anew
            self.process.wait()
        sweep(str(self.folder))

    @property
    def _connection_file(self) -> Path:
        return self._runtime_folder / f"kernel-{self.kernel_id}.json"

    def _evaluate(self, expression: str, patience: float) -> object:
        return companion.evaluate(self._connection_file, expression, patience)

    def _configure(self) -> None:
        settings = {
            "ServerApp": {
                "sock": str(self.socket),  # a port could be somebody else's in the meantime
                "base_url": f"{self.base_url}/",
                "root_dir": str(self.folder / "home"),
                "allow_root": True,
                "open_browser": False,
            },
            "IdentityProvider": {"token": self.token},
            "KernelManager": {"transport": "ipc"},  # for the same reason
        }
        path = self.folder / "etc" / "jupyter_server_config.json"
        # Not on the command line, nor in the environment, which kernels inherit.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(settings, file)

    def _install_nvidia_smi(self, gpus: int, gpu: str) -> None:
        program = self.folder / "bin" / "nvidia-smi"
        numbers = " ".join(str(number) for number in range(gpus))
        program.write_text(_NVIDIA_SMI.format(gpu=gpu, numbers=numbers), encoding="utf-8")
        program.chmod(0o755)

    def _environ(self, env: Mapping[str, str]) -> dict[str, str]:
        """A pod's: of this process's it has only what programs need to be found."""
        folders = [
            str(self.folder / "bin"),
            str(Path(sys.executable).parent),
            os.environ.get("PATH", os.defpath),
        ]
        inherited = {
            name: os.environ[name] for name in ("LD_LIBRARY_PATH", "LANG", "TZ") if name in os.environ
        }
        return {
            **inherited,
            "PATH": os.pathsep.join(folders),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "IPYTHONDIR": str(self.folder / "etc" / "ipython"),
            "JUPYTER_CONFIG_DIR": str(self.folder / "etc"),
            "JUPYTER_DATA_DIR": str(self.folder / "etc" / "data"),
            **env,
            MARK: str(self._runtime_folder),
        }

    def _wait_until_it_answers(self) -> None:
        give_up = time.monotonic() + _START_SECONDS
        while time.monotonic() < give_up:
            if self.process is None or self.process.poll() is not None:
                break
            try:
                if ask(self.socket, self.token, "GET", f"{self.base_url}/api")[0] == 200:
                    return
            except (OSError, HTTPException):  # its socket is not there yet, or nobody listens
                time.sleep(0.02)
        raise RuntimeError(f"a pod's server did not start; it said:\n{self.log}")
