"""How long things take here, against a minimal client, jupyter_client and the published 1.10.0.

Every contestant is a process of its own; their turns interleave, so that what disturbs the machine disturbs
all of them. Times are reported, never asserted: see ``python -m benchmarks --help``.
"""
