"""A runtime of Datalayer in the making: there will be one of it or none, whatever happens meanwhile.

It costs credits for every second that it is there, and to ask for one twice makes two. So each has a name of
ours that no other has; by that it is looked for whenever nobody knows what has become of a request, before it
is asked for once more, and in the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from code_sandboxes.errors import (
    SandboxConnectionError,
    SandboxError,
    SandboxResourceError,
    SandboxSnapshotError,
)
from code_sandboxes.remote.datalayer import UNCERTAIN, Datalayer, pauses, unknown_environment
from code_sandboxes.remote.datalayer_values import Runtime, number, runtime_of
from code_sandboxes.remote.rest import Answer, HttpError

__all__ = ["Creation", "Order"]

# How often it is asked for, and the seconds before it is asked for the second time; twice as many each time.
_ATTEMPTS = 4
_PAUSE = 1.0

# Seconds until a runtime is in the list, once there will be no answer: nearly always, and at the latest.
_APPEARS, _LATEST = 5.0, 300.0


@dataclass(frozen=True, slots=True)
class Order:
    """A runtime that is wanted.

    Args:
        given_name: no other has it.
        credits: the most that it may cost: when they are used up, it is ended.
        snapshot: the uid of the one with whose variables it begins.
    """

    environment: str
    given_name: str
    credits: float
    snapshot: str | None = None


class Creation:
    """Makes the runtime of an order, and ends it; from any thread, one after the other.

    Args:
        seconds: that it may take.
        is_unwanted: nobody waits for it any more.
    """

    def __init__(
        self, datalayer: Datalayer, order: Order, seconds: float, is_unwanted: Callable[[], bool]
    ) -> None:
        self._datalayer = datalayer
        self._order = order
        self._seconds = seconds
        self._is_unwanted = is_unwanted
        self._turn = Lock()
        self._until = 0.0
        self._location = ""
        self._requests = 0  # of which something has come, or may come
        self._asked_at = 0.0
        self._runtime: Runtime | None = None

    def make(self) -> Runtime:
        """
        Raises:
            SandboxQuotaExceededError: there are too many, or not credits enough.
            SandboxResourceError: there is none to be had now.
            SandboxSnapshotError: there is no such snapshot.
            SandboxError: the service does not answer; something may be there that is to be ended.
        """
        with self._turn:
            self._until = time.monotonic() + self._seconds
            for attempt in range(_ATTEMPTS):
                try:
                    self._runtime = self._ask()
                    break
                except _Passing as passing:
                    found = [] if passing.is_certain else self._there(_APPEARS)
                    if found:
                        self._runtime = found[0]
                        break
                    pause = max(_PAUSE * 2**attempt, passing.retry_after)
                    is_late = time.monotonic() + pause > self._until
                    if self._location or is_late or attempt == _ATTEMPTS - 1:
                        raise passing.error from None
                    self._sleep(pause)
            assert self._runtime is not None
            self._end_others(self._runtime)
            return self._runtime

    def undo(self) -> bool:
        """End what there is of it; False if there may still come something of it.

        Raises:
            SandboxError: something is there still, for all that is known.
        """
        with self._turn:
            if self._location:
                self._wait_for_its_end()
            ended = 0
            if self._runtime is not None:
                self._datalayer.delete(self._runtime.name)
                self._runtime, ended = None, 1
            if self._requests > ended:
                for runtime in self._there(0.0 if ended else _APPEARS):
                    self._datalayer.delete(runtime.name)
                    ended += 1
            self._requests = max(0, self._requests - ended)
            return self._requests == 0 or time.monotonic() - self._asked_at > _LATEST

    def _ask(self) -> Runtime:
        """
        Raises:
            _Passing: it has to be asked for once more.
        """
        if self._is_unwanted():
            raise _unwanted()
        order = self._order
        wanted: dict[str, object] = {
            "type": "notebook",
            "given_name": order.given_name,
            "credits_limit": order.credits,
        }
        if order.snapshot is not None:
            wanted["from"] = order.snapshot
        self._requests += 1
        self._asked_at = time.monotonic()
        try:
            seconds = max(1.0, self._until - time.monotonic())
            answer = self._datalayer.ask_for_runtime(wanted, order.environment, seconds)
            if answer.status == 202 and answer.location:
                self._location = answer.location
                answer = self._answer_at(answer.location)
                self._location = ""
        except SandboxConnectionError as error:  # there is no answer
            raise _Passing(error, is_certain=False) from None
        return self._made(answer)

    def _made(self, answer: Answer) -> Runtime:
        try:
            told = self._datalayer.checked(answer, "the creation of a runtime").get("runtime")
        except SandboxResourceError as error:
            self._requests -= 1
            after = number(answer.mapping.get("retry_after_seconds")) or answer.retry_after or 0.0
            raise _Passing(error, is_certain=True, retry_after=after) from None
        except HttpError as error:
            if error.status in UNCERTAIN:
                raise _Passing(error, is_certain=False) from None
            if error.status < 500:
                self._requests -= 1
            raise self._not_found(answer) if error.status == 404 else error from None
        except SandboxError:
            self._requests -= 1
            raise
        if not isinstance(told, dict):
            what = SandboxConnectionError("Datalayer does not tell of the runtime that it has made")
            raise _Passing(what, is_certain=False)
        return runtime_of(told)

    def _not_found(self, answer: Answer) -> SandboxError:
        """Of what it is to be made, something is not there."""
        if self._order.snapshot is not None and "snapshot" in answer.reason().lower():
            return SandboxSnapshotError(
                f"there is no snapshot {self._order.snapshot!r} at Datalayer any more"
            )
        return unknown_environment(self._order.environment, self._datalayer.environments())

    def _answer_at(self, location: str) -> Answer:
        """The answer that will be there."""
        for pause in pauses():
            self._sleep(pause)
            answer = self._datalayer.ask_at(location)
            if answer.status != 202:
                return answer
            if time.monotonic() > self._until:
                break
        raise SandboxConnectionError(f"Datalayer did not make a runtime within {self._seconds:g} s")

    def _wait_for_its_end(self) -> None:
        """What is under way will be there: it can be ended only then."""
        until = time.monotonic() + self._seconds
        for pause in pauses():
            try:
                if self._datalayer.ask_at(self._location).status != 202 or time.monotonic() > until:
                    break
            except SandboxError:  # whatever that means, what there is can be looked for
                break
            time.sleep(pause)
        self._location = ""

    def _there(self, patience: float) -> list[Runtime]:
        """What there is of it, once it is in the list."""
        until = time.monotonic() + patience
        for pause in pauses():
            found = [each for each in self._datalayer.runtimes() if each.given_name == self._order.given_name]
            if found or time.monotonic() + pause > until:
                break
            time.sleep(pause)
        return found

    def _end_others(self, runtime: Runtime) -> None:
        """Of a request that was taken for lost, one may be there after all."""
        if self._requests > 1:
            for each in self._there(0.0):
                if each.name != runtime.name:
                    self._datalayer.delete(each.name)

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        if self._is_unwanted():
            raise _unwanted()


class _Passing(Exception):
    """It failed for reasons that may pass.

    Args:
        is_certain: there is nothing; else nobody knows.
        retry_after: seconds before which there is no use in trying.
    """

    def __init__(self, error: SandboxError, *, is_certain: bool, retry_after: float = 0.0) -> None:
        super().__init__(error)
        self.error = error
        self.is_certain = is_certain
        self.retry_after = retry_after


def _unwanted() -> SandboxConnectionError:
    return SandboxConnectionError("nobody waits for this runtime any more")
