"""A kernel that the keeper owns, as one of the programs that use it sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from code_sandboxes.guest import journal
from code_sandboxes.keeper.client import KeeperClient
from code_sandboxes.protocol.events import Streamed
from code_sandboxes.protocol.messages import Message
from code_sandboxes.transports.loop import Loop
from code_sandboxes.transports.zmq import ConnectionInfo, ZmqTransport

__all__ = ["KeptKernel", "Kernels"]

_KEEPER_GONE = (
    "the keeper of local kernels is gone, and with it the kernel, its variables and the files of the sandbox;"
    " the next run has a new one"
)


class Kernels:
    """The kernels of one sandbox that this program uses, by the keeper's number; in the I/O thread."""

    def __init__(self) -> None:
        self.keepers_lost = 0
        self._watched: dict[int, KeptKernel] = {}
        self._ended_before: dict[int, Mapping[str, Any]] = {}

    def watch(self, kernel: KeptKernel) -> None:
        self._watched[kernel.number] = kernel
        if kernel.keepers_lost != self.keepers_lost:
            self._end(kernel, None)
        elif kernel.number in self._ended_before:
            self._end(kernel, self._ended_before.pop(kernel.number))

    def forget(self, kernel: KeptKernel) -> None:
        self._watched.pop(kernel.number, None)

    def ended(self, event: Mapping[str, Any]) -> None:
        kernel = self._watched.get(event["kernel"])
        if kernel is None:  # so soon that nobody has come to watch it yet
            self._ended_before[event["kernel"]] = event
        else:
            self._end(kernel, event)

    def turn_wanted(self, number: int) -> None:
        kernel = self._watched.get(number)
        if kernel is not None:
            kernel.turn_wanted()

    def turn_lost(self, number: int) -> None:
        kernel = self._watched.get(number)
        if kernel is not None:
            kernel.turn_lost()

    def lost(self) -> None:
        """The keeper is gone; the next one counts from the beginning."""
        self.keepers_lost += 1
        self._ended_before.clear()
        for kernel in list(self._watched.values()):
            self._end(kernel, None)

    def _end(self, kernel: KeptKernel, event: Mapping[str, Any] | None) -> None:
        del self._watched[kernel.number]
        kernel.has_ended(event)


class KeptKernel:
    """A kernel that the keeper owns; a :class:`code_sandboxes.kernel_process.KernelProcess`.

    Args:
        kernels: those of its sandbox.
        handed_out: what the keeper says of it.
    """

    how_killed = "its kernel was killed; its variables are gone"
    prologue = None  # it has begun with everything
    may_go_on = False

    def __init__(
        self,
        keeper: KeeperClient,
        sandbox_id: str,
        kernels: Kernels,
        keepers_lost: int,
        handed_out: Mapping[str, Any],
    ) -> None:
        self.number: int = handed_out["kernel"]
        self.keepers_lost = keepers_lost
        self._keeper = keeper
        self._sandbox_id = sandbox_id
        self._kernels = kernels
        self._connection = ConnectionInfo(**handed_out["connection"])
        self._interrupt_mode: Literal["signal", "message"] = (
            "message" if handed_out["interrupt_mode"] == "message" else "signal"
        )
        self._is_fresh: bool = handed_out["fresh"]
        path, device, inode = handed_out["journal"]
        self._journal = path, (device, inode)
        self._ended: Callable[[], None] = _nothing
        self._exit_code: int | None = None
        self._output = ""
        self._why_lost = ""
        self._why_ended = ""
        self._has_turn = self._is_fresh
        self._is_running = False  # a run of ours is on, as far as turns are concerned
        self._turn_wanted = False

    def transport(
        self, loop: Loop, identity: str, receive: Callable[[Message], None], max_message: int
    ) -> ZmqTransport:
        return ZmqTransport(loop, self._connection, identity, receive, max_message)

    @property
    def connection(self) -> ConnectionInfo:
        """Where it listens."""
        return self._connection

    @property
    def interrupt_mode(self) -> Literal["signal", "message"]:
        return self._interrupt_mode

    @property
    def is_fresh(self) -> bool:
        return self._is_fresh

    @property
    def why_ended(self) -> str:
        return self._why_ended

    @property
    def why_lost(self) -> str:
        return self._why_lost

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._kernels.watch(self)

    def has_ended(self, event: Mapping[str, Any] | None) -> None:
        """What the keeper says of its end; None if the keeper has ended itself."""
        if event is None:
            self._why_lost = _KEEPER_GONE
        else:
            self._exit_code, self._output = event["exit_code"], event["output"]
            self._why_ended = event["why"]
        self._ended()

    def exit_code(self) -> int | None:
        return self._exit_code

    def output(self) -> str:
        return self._output

    def written(self) -> list[int]:
        return journal.read_totals(*self._journal) or [0, 0]

    def unpublished(self, published: Sequence[int]) -> list[Streamed]:
        left: list[Streamed] = []
        if not self._has_turn:  # another program's run was on: it is told there
            return left
        for stream, (total, latest) in enumerate(journal.read(*self._journal)):
            missing = min(len(latest), total - published[stream])
            if missing > 0:
                left.append(Streamed(latest[-missing:].decode("utf-8", "replace"), error=stream == 1))
        return left

    def claim(self, granted: Callable[[], None]) -> None:
        def answered(answer: Mapping[str, Any] | None) -> None:
            if answer is not None and "error" not in answer:  # else it has ended, which is told
                self._has_turn = self._is_running = True
                granted()

        if self._has_turn:
            self._is_running = True
            granted()
        else:
            self._keeper.request("turn", answered, sandbox=self._sandbox_id, kernel=self.number)

    def rest(self) -> None:
        self._is_running = False
        if self._turn_wanted:
            self._give_turn()

    def turn_wanted(self) -> None:
        """Another program waits for its turn."""
        self._turn_wanted = True
        if not self._is_running:
            self._give_turn()

    def turn_lost(self) -> None:
        """It was taken away: this program was not heard for a while."""
        self._has_turn = self._turn_wanted = False

    def _give_turn(self) -> None:
        self._has_turn = self._turn_wanted = False
        self._keeper.tell("give_turn", sandbox=self._sandbox_id, kernel=self.number)

    def interrupt(self) -> None:
        self._signal("interrupt")

    def terminate(self) -> None:
        self._signal("terminate")

    def kill(self) -> None:
        self._signal("kill")

    def leave(self) -> None:
        self._kernels.forget(self)

    def release(self) -> None:
        self._keeper.tell("release", sandbox=self._sandbox_id, kernel=self.number)

    def _signal(self, what: str) -> None:
        self._keeper.demand("signal", sandbox=self._sandbox_id, kernel=self.number, signal=what)


def _nothing() -> None:
    return
