"""What a sandbox asks Datalayer for: which environment, by which name, and for how many credits."""

from __future__ import annotations

import math
import os
import re
import sys
from typing import TYPE_CHECKING

from code_sandboxes.errors import (
    SandboxConfigurationError,
    SandboxQuotaExceededError,
    SandboxResourceError,
)
from code_sandboxes.info import SandboxEnvironment
from code_sandboxes.isolation.gpus import is_named
from code_sandboxes.remote.datalayer import Datalayer, unknown_environment
from code_sandboxes.remote.datalayer_creation import Order

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig
    from code_sandboxes.variants.datalayer_shelf import DatalayerShelf

__all__ = ["name_of", "order_of"]

_ENVIRONMENT = "python-cpu-env"
_GPU_ENVIRONMENT = "python-gpu-env"

# Minutes for which credits are reserved if nobody has said how long it may live.
_MINUTES = 10

# What is added to the names that people give, so that no two are the same.
_SUFFIX = re.compile(r"-[0-9a-f]{16}$")
_UNNAMED = "code-sandboxes"
_LONGEST_NAME = 60


def order_of(
    config: SandboxConfig, name: str | None, datalayer: Datalayer, shelf: DatalayerShelf
) -> tuple[Order, SandboxEnvironment]:
    """What is asked for, and of what it is to be made; blocks.

    Raises:
        SandboxResourceError: there is no such environment.
        SandboxConfigurationError: it has not what the settings want.
        SandboxQuotaExceededError: there are no credits.
    """
    environment = _environment(config, datalayer.environments(), shelf.environment)
    given_name = f"{(name or _UNNAMED)[:_LONGEST_NAME]}-{os.urandom(8).hex()}"
    credits = _credits(config, environment, datalayer)
    return Order(environment.name, given_name, credits, shelf.chosen), environment


def name_of(given_name: str) -> str | None:
    """What people have called it."""
    name = _SUFFIX.sub("", given_name)
    return None if name in ("", _UNNAMED) else name


def _environment(
    config: SandboxConfig, known: list[SandboxEnvironment], of_snapshot: str | None
) -> SandboxEnvironment:
    gpu, wanted = config.gpu, config.environment or of_snapshot
    if wanted is None and gpu is not None:
        environment = _with_gpu(known, gpu)
    else:
        wanted = wanted or _ENVIRONMENT
        found = next((each for each in known if each.name == wanted), None)
        if found is None:
            raise unknown_environment(wanted, known)
        environment = found
    if gpu is not None and not environment.gpus:
        with_one = ", ".join(each.name for each in known if each.gpus) or "none"
        why = f"it has none (with a GPU: {with_one})"
        raise _refusal(f"choose a GPU (gpu={gpu!r})", environment, why)
    _check_size("CPUs (cpu=)", config.cpu_limit, environment.cpu, environment)
    _check_size("bytes of memory (memory=)", config.memory_limit, environment.memory, environment)
    return environment


def _with_gpu(known: list[SandboxEnvironment], gpu: str) -> SandboxEnvironment:
    """The one that promises that GPU, or else the usual one with a GPU; it is seen inside what came of it."""
    with_one = [each for each in known if each.gpus]
    named = [each for each in with_one if is_named(gpu, f"{each.name} {each.title}")]
    usual = [each for each in with_one if each.name == _GPU_ENVIRONMENT]
    for environment in (*named, *usual, *with_one):
        return environment
    names = ", ".join(sorted(each.name for each in known)) or "none"
    raise SandboxResourceError(
        f"Datalayer has no environment with a GPU for this account (there are: {names})"
    )


def _check_size(
    what: str, wanted: float | None, there: float | None, environment: SandboxEnvironment
) -> None:
    if wanted is not None and (there is None or wanted > there):
        told = "it does not tell how many it has" if there is None else f"it has {there:,.10g}"
        why = f"{told}; list_environments() tells of others"
        raise _refusal(f"provide {wanted:,.10g} {what}", environment, why)


def _refusal(what: str, environment: SandboxEnvironment, why: str) -> SandboxConfigurationError:
    return SandboxConfigurationError(
        f"datalayer-runtime cannot {what} in the environment {environment.name!r}: {why}"
    )


def _credits(config: SandboxConfig, environment: SandboxEnvironment, datalayer: Datalayer) -> float:
    """How many are to be reserved: what it may cost in its lifetime.

    As long as nobody has chosen one, its default would be a day, and no account would have many of those.
    """
    is_chosen = config.max_lifetime != config.class_traits()["max_lifetime"].default_value
    minutes = math.ceil(config.max_lifetime / 60) if is_chosen else _MINUTES
    credits = environment.burning_rate * 60 * minutes
    if credits <= sys.float_info.epsilon:  # nobody knows what it costs
        credits = 0.5 * datalayer.free_credits()
    if credits <= sys.float_info.epsilon:
        raise SandboxQuotaExceededError(
            f"Datalayer has no credits for a runtime of {environment.name!r}: none are left that are not"
            " reserved for others"
        )
    return credits
