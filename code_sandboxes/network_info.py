"""What users get to see of the network: what a sandbox tried to reach."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NetworkAttempt"]


@dataclass(frozen=True, slots=True)
class NetworkAttempt:
    """Something in the sandbox wanted to reach a host.

    Args:
        time: when, in seconds since the epoch.
        host: as it was asked for: a name or an address; what is no host at all is shortened and escaped.
        port: 0 where none could be made out.
        allowed: by the network policy; whether somebody answered is another matter.
        reason: why it was refused; empty where it was allowed.
        address: what it was connected to; empty where it came to no connection.
    """

    time: float
    host: str
    port: int
    allowed: bool
    reason: str = ""
    address: str = ""
