"""What of the cloud's behaviour a test may choose; the defaults are the honest cloud."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

__all__ = ["SNAPSHOT_PATHS", "CreateFault", "Environment", "Knobs"]

SNAPSHOT_PATHS = ("runtime-snapshots", "sandbox-snapshots")


@dataclass(frozen=True)
class Environment:
    """What a runtime is made from."""

    name: str
    title: str
    burning_rate: float = 0.008  # credits a second
    gpus: int = 0
    env: Mapping[str, str] = field(default_factory=dict)  # of every process in the runtime
    origin: Literal["platform", "user"] = "platform"
    docker_image: str = "jupyter-python:0.2.0"


class CreateFault(Enum):
    """What may go wrong with one creation."""

    NO_CAPACITY = "no pod is free: 503, and nothing is created"
    BAD_GATEWAY = "the gateway in front answers 502 in HTML, and nothing is created"
    FAILED_WITH_200 = "200 with success: false and a reason, and nothing is created"
    GATEWAY_TIMEOUT = "the runtime is created, and the gateway in front answers 504 in HTML"
    SILENCE = "the runtime is created, and no answer ever comes"
    ACCEPTED = "202 with a Location, at which the answer comes once the runtime is there"


def _environments() -> list[Environment]:
    return [
        Environment("python-cpu-env", "Python CPU"),
        Environment("python-gpu-env", "Python GPU", burning_rate=0.05, gpus=1),
        Environment("ai-agents-env", "AI Agents"),
    ]


@dataclass
class Knobs:
    """The choices of one service. They may be turned while it runs, and hold for what comes after."""

    # Accounts
    credits: float = 100.0  # there are at the start; later ones are the ledger's
    credits_quota: float | None = None  # then `credits` of the answer are those used up of it
    credits_field: Literal["available", "credits_available", "remaining"] | None = None

    # Environments
    environments: list[Environment] = field(default_factory=_environments)
    page_size: int | None = None  # the most environments in one answer; None is all

    # Creation of runtimes
    bodies: Literal["A", "B", "AB"] = "AB"  # the generations of bodies that are understood
    rejects_unknown_keys: bool = False  # 422, as pydantic's `extra="forbid"`
    quota: int = 5  # the most runtimes at a time
    quota_status: int = 403  # with 200 the answer says success: false
    create_fault: CreateFault | None = None  # of every creation
    next_creates: list[CreateFault | None] = field(default_factory=list)  # of one each; None goes well
    silence_seconds: float = 600.0  # before the connection of an unanswered request is closed
    accepted_polls: int = 2  # at least so often is 202 answered at the Location
    location: Literal["relative", "absolute", "other_scheme", "malformed"] = "relative"

    # Runtimes
    spelling: Literal["A", "B", "AB"] = "AB"  # of their names and environments in answers
    times: Literal["numeric_string", "number", "iso", "null", "empty"] = "numeric_string"
    has_reservation_id: bool = True
    get_key: Literal["runtime", "kernel"] = "runtime"  # of the answer to GET of one
    delete_status: Literal[200, 204] = 200
    update_status: Literal[200, 201, 202] = 200
    clock_speed: float = 1.0  # how many of the cloud's seconds, which cost credits, one of ours has
    pre_warmed: bool = True  # there is a kernel in a new runtime
    gpu: str = "Tesla T4"  # what nvidia-smi says

    # Snapshots
    snapshot_paths: tuple[str, ...] = SNAPSHOT_PATHS
    snapshot_answer: Literal["snapshot", "no_snapshot", "accepted"] = (
        "snapshot"  # accepted is 202 with no body
    )
    snapshot_seconds: float = 0.0  # until an accepted one is in the list
    snapshot_delete_status: Literal[200, 202, 204] = 200
    snapshot_patience: float = 30.0  # for how long a busy kernel is waited for
    splits_at_nul: bool = (
        True  # loading: a pickle in which NUL and a newline are is broken, as in the browser
    )

    # Ingress
    warm_up: int = 0  # so many first requests to a runtime are not served
    warm_up_status: Literal[502, 503, 504, 404] = 503
    ingress_schemes: tuple[str, ...] = ("token", "bearer")  # of Authorization, in lower case
    selects_v1: bool = True  # else websockets know no subprotocol
    end_code: int = 1001  # of the websockets of a runtime that ends; 1006 is no close frame

    # Gateway in front of the control plane
    error_shape: Literal["envelope", "detail", "detail_message", "registry", "html"] = "envelope"
    bad_gateways: int = 0  # so many next GET and DELETE are answered with 502 in HTML, and not done
