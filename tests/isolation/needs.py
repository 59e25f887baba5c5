"""What isolation these tests take; where there is none they are skipped, or fail if there must be."""

from __future__ import annotations

import os

import pytest

from code_sandboxes.isolation.plan import Method
from code_sandboxes.variants.plans import enforceable, why_not
from conftest import REQUIRES_CONTAINERS, why_no_containers

__all__ = [
    "ENCLOSURES",
    "IN_CONTAINERS",
    "REQUIRED",
    "needs_containers",
    "needs_isolation",
    "needs_limit",
    "not_here",
]

REQUIRED = "CODE_SANDBOXES_REQUIRE_ISOLATION"
"""The environment variable that says that nothing may be missing."""


ENCLOSURES = ["bubblewrap", pytest.param("container", marks=pytest.mark.slow)]
"""The kinds of enclosure, as parameters of a test."""


IN_CONTAINERS = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(why_no_containers()) and not REQUIRES_CONTAINERS, reason=f"NO CONTAINERS: {why_no_containers()}"
    ),
]
"""The marks of a module all of whose tests take a container engine."""


def not_here(reason: str) -> None:
    """The present test cannot run on this machine."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason} (and {REQUIRED} is 1)")
    pytest.skip(reason)


def needs_isolation(method: Method) -> None:
    if method == "container":
        needs_containers()
    elif reason := why_not(method):
        not_here(f"no {method}: {reason}")


def needs_containers() -> None:
    if reason := why_no_containers():
        if REQUIRES_CONTAINERS:
            pytest.fail(f"no containers: {reason} (and CODE_SANDBOXES_REQUIRE_DOCKER is 1)")
        pytest.skip(f"NO CONTAINERS: {reason}")


def needs_limit(method: Method, what: str) -> None:
    """Skip where bubblewrap cannot limit *what*, also where isolation is required: it takes cgroups."""
    needs_isolation(method)
    if method == "bubblewrap" and (reason := enforceable("bubblewrap")[what]):
        pytest.skip(f"no limit of {what}: {reason}")
