"""A container of an engine elsewhere: nothing of this machine is in it, and only the engine leads there.

``guest/steward.py``, which is sent as an argument, is the first process in it, under the same hardening,
limits and filter as ``guest/init.py`` is in a container on this machine. It has no port: what goes in and out
goes through the connection to the engine (:mod:`code_sandboxes.remote.exec_stream`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from code_sandboxes import guest
from code_sandboxes.isolation.container import (
    LABEL,
    check_volumes,
    hardened,
    own_configuration,
    path_of,
    user_of,
)
from code_sandboxes.isolation.container_engine import Engine, Printed
from code_sandboxes.isolation.enclosure import LIMITS
from code_sandboxes.isolation.plan import Plan
from code_sandboxes.isolation.seccomp import CORE, deny_filter

__all__ = ["DISTANT", "SERVER", "STEWARD", "find", "make", "source_of", "sweep"]

DISTANT = f"{LABEL}.distant"
"""The label of such a container; its value is the version of what is spoken with its steward."""

STEWARD = "@code-sandboxes-steward"
"""Where it listens: an abstract socket (unix(7)), whose place nobody can take."""

SERVER = "/tmp/code-sandboxes-jupyter"
"""Where the Jupyter server in it listens."""

_VERSION = "1"

# Processes and threads that are not the code's: the steward, the server with its threads, relays.
_OWN_PROCESSES = 32

# Seconds that it may take until somebody is there, and that nobody may be.
_PATIENCE, _GRACE = 90.0, 10.0

# Seconds after which a container that was made and never started is nobody's.
_ABANDONED = 600.0

_COMMAND = (
    *("python3", "-m", "jupyter_server"),
    f"--ServerApp.sock={SERVER}",
    # Relays are another user's than the server, and who is in the container is code, whose server it is.
    "--ServerApp.sock_mode=0666",
    "--IdentityProvider.token=",
    "--ServerApp.password=",
    "--ServerApp.disable_check_xsrf=True",
    "--ServerApp.allow_root=True",
    "--ServerApp.open_browser=False",
    "--ServerApp.terminals_enabled=False",
    "--ZMQChannelsWebsocketConnection.limit_rate=False",  # which drops output
    "--KernelRestarter.time_to_dead=0.5",
)


def make(engine: Engine, plan: Plan, name: str, sandbox_id: str, variables: Mapping[str, str]) -> Printed:
    """Make one, and start it; gives what tells what it has printed. Blocks.

    Args:
        variables: of the server and its kernels, besides the image's.

    Raises:
        SandboxConfigurationError: there is no such image, or it cannot be as planned.
        SandboxConnectionError: it did not start.
    """
    assert plan.container is not None
    labels = {LABEL: "1", DISTANT: _VERSION, f"{LABEL}.sandbox": sandbox_id}
    user = user_of(plan.container, engine, name, labels)
    config = hardened(plan, labels, user)
    host = config["HostConfig"]
    if plan.bounds.pids is not None:
        host["PidsLimit"] = plan.bounds.pids + _OWN_PROCESSES
    if plan.container.gpus:
        host["DeviceRequests"] = [{"Driver": "", "Count": 1, "Capabilities": [["gpu"]]}]
    path = path_of(engine.environment_of_image(plan.container.image), plan.container.home)
    argument = json.dumps(_argument(plan, {"HOME": plan.container.home, "PATH": path, **variables}))
    config["Entrypoint"] = ["python3", "-I", "-S", "-c", source_of("steward"), argument]
    with contextlib.ExitStack() as undo:
        undo.callback(engine.remove, name)
        engine.create(name, config)
        said = engine.start(name)
        undo.callback(said.close)
        check_volumes(engine.inspect(name), plan)
        undo.pop_all()
    return said


def find(engine: Engine, sandbox_id: str) -> str | None:
    """The name of that sandbox's container; None if none runs.

    Raises:
        SandboxConnectionError: the engine does not answer.
    """
    found = engine.find(f"{LABEL}.sandbox={sandbox_id}", f"{DISTANT}={_VERSION}")
    return found[0] if found else None


def sweep(engine: Engine) -> None:
    """Remove what a program has left that was killed between making a container and starting it.

    Raises:
        SandboxConnectionError: the engine does not answer.
    """
    for name in engine.find(DISTANT, status="created"):
        if time.time() - engine.created_at(name) > _ABANDONED:
            engine.remove(name)


def source_of(name: str) -> str:
    """What is run in a container of the module *name* of the guest."""
    return (Path(guest.__file__).parent / f"{name}.py").read_text(encoding="utf-8")


def _argument(plan: Plan, variables: Mapping[str, str]) -> dict[str, object]:
    return {
        "sources": {name: source_of(name) for name in ("init", "confine")},
        "configure": {**own_configuration(plan), "proxy": False, "mounts": [], "core": CORE},
        "filters": {
            machine: base64.b64encode(deny_filter(machine=machine)).decode()
            for machine in ("x86_64", "aarch64")
        },
        "limits": LIMITS,
        "steward": STEWARD,
        "socket": SERVER,
        "command": [*_COMMAND, f"--ServerApp.root_dir={plan.working_dir}"],
        "env": {**variables, "JUPYTER_PLATFORM_DIRS": "1"},
        "cwd": plan.working_dir,
        "patience": _PATIENCE,
        "grace": _GRACE,
    }
