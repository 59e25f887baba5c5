"""The contestant's side of the conversation: do what each line asks for, answer with one line.

Only the standard library and old syntax are used: it runs in the environments of peers too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping

__all__ = ["serve", "timed"]


def serve(actions: Mapping[str, Callable[..., object]], end: Callable[[], object]) -> None:
    """Do what is asked for until nothing more comes, then *end*."""
    # Nobody else may write into the answers: whatever is printed goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        for line in sys.stdin:
            answers.write(json.dumps(_answer(actions, json.loads(line))) + "\n")
            answers.flush()
    finally:
        end()


def _answer(actions: Mapping[str, Callable[..., object]], request: list[object]) -> dict[str, object]:
    name, *arguments = request
    try:
        return {"value": actions[str(name)](*arguments)}
    except Exception as error:  # whatever it is, the one who asked wants to know
        return {"error": f"{type(error).__name__}: {error}"}


def timed(call: Callable[[], object], repetitions: int) -> list[float]:
    """Seconds that each repetition of *call* takes, after one that is not counted.

    That one comes out of a sleep of the process, in which others had the caches.
    """
    call()
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds
