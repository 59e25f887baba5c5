"""Turn what a kernel publishes into lines and results, and keep them as a notebook would.

No clock: every method that depends on time is told what time it is.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable

from code_sandboxes.protocol.events import (
    Cleared,
    Displayed,
    Event,
    Streamed,
    Updated,
    memory_size,
    utf8_size,
)
from code_sandboxes.results import Logs, OutputMessages, Printed, Result, ResultList

__all__ = ["HOLD", "Displays", "LineSplitter", "LiveResults", "Outputs"]

HOLD = 0.1
"""Seconds an unfinished line is held for the rest of it."""

# What is cut once is cut into pieces of this size, so that little is copied when more has to go.
_PIECE = 64 * 1024

# Output is counted in bytes of text. But text may come in pieces of one byte, and each takes so much beside:
# that counts too, from so many pieces on.
_OVERHEAD = 256
_FREE_PIECES = 65536


class LineSplitter:
    """Give the text of one stream in whole lines, wherever the kernel cut it.

    A ``\\r`` at the end of a chunk may be half of a ``\\r\\n``: it is held like an unfinished line.
    """

    def __init__(self, error: bool) -> None:
        self._error = error
        self._pieces: list[str] = []
        self._carriage_return = False
        self._held_since: float | None = None

    @property
    def deadline(self) -> float | None:
        """When :meth:`flush` is due; None while nothing is held."""
        return None if self._held_since is None else self._held_since + HOLD

    def feed(self, text: str, now: float, timestamp: float) -> list[Printed]:
        """The lines that *text* ends."""
        if self._carriage_return:
            text = "\r" + text
        self._carriage_return = text.endswith("\r")
        if self._carriage_return:
            text = text[:-1]
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
        lines = "".join([*self._pieces, text[:end]]) if end else ""
        if end:
            self._pieces = []
        if end < len(text):
            self._pieces.append(text[end:])
        if not self._pieces and not self._carriage_return:
            self._held_since = None
        elif end or self._held_since is None:
            self._held_since = now
        return [Printed(lines, timestamp, self._error)] if end else []

    def flush(self, timestamp: float) -> list[Printed]:
        """What is held, as a line that is not ended yet."""
        if self._held_since is None:
            return []
        text = "".join(self._pieces) + ("\r" if self._carriage_return else "")
        self._pieces, self._carriage_return, self._held_since = [], False, None
        return [Printed(text, timestamp, self._error)]


class LiveResults(ResultList):
    """The results of a run that may still change: the writing side of :class:`ResultList`.

    Args:
        limit: bytes that all of them may take; an update beyond it is not kept.
    """

    __slots__ = ("_keys", "_limit", "_next_key", "_size", "_sizes", "truncated")

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.truncated = False
        self._limit = limit
        self._next_key = 0
        self._size = 0
        self._sizes: dict[int, int] = {}
        self._keys: dict[str, set[int]] = {}

    def append(self, result: Result, size: int) -> int:
        """Show *result* at the end; returns the key to :meth:`discard` it with."""
        key = self._next_key
        self._items[key] = result
        self._sizes[key] = size
        self._size += size
        self._next_key += 1
        if result.display_id is not None:
            self._keys.setdefault(result.display_id, set()).add(key)
        return key

    def discard(self, key: int) -> bool:
        """Show it no more; False if that was so before."""
        self._size -= self._sizes.pop(key, 0)
        result = self._items.pop(key, None)
        if result is not None and result.display_id is not None:
            keys = self._keys[result.display_id]
            keys.discard(key)
            if not keys:
                del self._keys[result.display_id]
        return result is not None

    def shows(self, display_id: str) -> bool:
        """Is there anything of that id?"""
        return display_id in self._keys

    def clear(self) -> None:
        self._items.clear()
        self._sizes.clear()
        self._keys.clear()
        self._size = 0

    def update(self, event: Updated) -> list[Result]:
        """Replace every display of that id; returns what they are now."""
        shown = [  # the run may be adding to it in another thread
            (key, self._items.get(key)) for key in sorted(self._keys.get(event.display_id, set()).copy())
        ]
        updated = {
            key: Result(event.data, event.metadata, old.is_main_result, event.display_id)
            for key, old in shown
            if old is not None
        }
        size = memory_size(event.data) + memory_size(event.metadata)
        grown = sum(size - self._sizes.get(key, 0) for key in updated)
        if grown > 0 and self._size + grown > self._limit:
            self.truncated = True
            return []
        self._size += grown
        for key in updated:
            self._sizes[key] = size
        self._items.update(updated)
        return list(updated.values())


class Displays:
    """Where each display id of a kernel is shown: in the results of this run, and of earlier ones.

    Results that nobody holds any more are forgotten, and ids that they show no more. Only the run that is on
    adds to it, and tuples are replaced whole, so that an update may come from another thread.
    """

    def __init__(self) -> None:
        self._shown: dict[str, tuple[weakref.ref[LiveResults], ...]] = {}
        self._purge_at = 256

    def __len__(self) -> int:
        return len(self._shown)

    def show(self, display_id: str, results: LiveResults) -> None:
        known = self._shown.get(display_id, ())
        if not any(reference() is results for reference in known):
            self._shown[display_id] = (*_showing(display_id, known), weakref.ref(results))
        if len(self._shown) >= self._purge_at:
            self._purge()

    def update(self, event: Updated) -> list[Result]:
        """Replace it wherever it is shown; an id that was never shown is ignored, as in a notebook."""
        updated: list[Result] = []
        for reference in self._shown.get(event.display_id, ()):
            results = reference()
            if results is not None:
                updated += results.update(event)
        return updated

    def _purge(self) -> None:
        self._shown = {
            display_id: alive
            for display_id, references in self._shown.items()
            if (alive := _showing(display_id, references))
        }
        self._purge_at = max(256, 2 * len(self._shown))


def _showing(
    display_id: str, references: Iterable[weakref.ref[LiveResults]]
) -> tuple[weakref.ref[LiveResults], ...]:
    return tuple(r for r in references if (results := r()) is not None and results.shows(display_id))


class Outputs:
    """Everything one run has produced so far, within a limit.

    Args:
        displays: of the kernel it runs on.
        limit: how many bytes of output to keep; beyond it the first half and the latest rest are kept.
    """

    def __init__(self, displays: Displays, limit: int) -> None:
        self.results = LiveResults(limit)
        self._cut = False
        self._displays = displays
        self._limit = limit
        self._stdout, self._stderr = LineSplitter(error=False), LineSplitter(error=True)
        self._head: list[Printed] = []
        self._tail: deque[tuple[Printed | int, int]] = deque()
        self._head_size = self._tail_size = 0
        self._head_displayed = self._tail_displayed = 0
        self._pieces = 0
        self._clear_at_next_output = False

    @property
    def truncated(self) -> bool:
        """Something was not kept."""
        return self._cut or self.results.truncated

    @property
    def deadline(self) -> float | None:
        """When :meth:`flush_due` has something to give."""
        return min((d for d in (self._stdout.deadline, self._stderr.deadline) if d is not None), default=None)

    def feed(self, event: Event, now: float, timestamp: float) -> list[Printed | Result]:
        """What is to be shown now because of *event*."""
        if isinstance(event, Streamed):
            return [*self._streamed(event, now, timestamp)]
        if isinstance(event, Cleared):
            self._clear(event)
            return []
        shown: list[Printed | Result] = [*self.flush(timestamp)]
        if isinstance(event, Displayed):
            shown.append(self._displayed(event))
        elif isinstance(event, Updated):
            shown += self._displays.update(event)[-1:]
        return shown

    def flush_due(self, now: float, timestamp: float) -> list[Printed]:
        """The unfinished lines that were held long enough."""
        due = [s for s in (self._stdout, self._stderr) if s.deadline is not None and s.deadline <= now]
        return [printed for splitter in due for printed in self._kept(splitter.flush(timestamp))]

    def flush(self, timestamp: float) -> list[Printed]:
        """Every unfinished line: something comes that belongs behind it."""
        return self._kept(self._stdout.flush(timestamp) + self._stderr.flush(timestamp))

    def logs(self) -> Logs:
        """What was printed, as far as it was kept."""
        kept = [*self._head, *(entry for entry, _ in self._tail if isinstance(entry, Printed))]
        return Logs(
            OutputMessages(printed for printed in kept if not printed.error),
            OutputMessages(printed for printed in kept if printed.error),
        )

    def _streamed(self, event: Streamed, now: float, timestamp: float) -> list[Printed]:
        self.clear_if_waiting()
        splitter = self._stderr if event.error else self._stdout
        return self._kept(splitter.feed(event.text, now, timestamp))

    def _displayed(self, event: Displayed) -> Result:
        self.clear_if_waiting()
        result = Result(event.data, event.metadata, event.is_main_result, event.display_id)
        size = memory_size(event.data) + memory_size(event.metadata)
        key = self.results.append(result, size)
        if event.display_id is not None:
            self._displays.show(event.display_id, self.results)
        self._keep_display(key, size)
        return result

    def _clear(self, event: Cleared) -> None:
        if event.wait:
            self._clear_at_next_output = True
        else:
            self._clear_results()

    def clear_if_waiting(self) -> None:
        """Something new is shown: what ``clear_output(wait=True)`` has waited for."""
        if self._clear_at_next_output:
            self._clear_at_next_output = False
            self._clear_results()

    def _clear_results(self) -> None:
        self.results.clear()
        self._head_size -= self._head_displayed
        self._tail_size -= self._tail_displayed
        self._head_displayed = self._tail_displayed = 0
        while self._tail and isinstance(self._tail[-1][0], int):
            self._tail.pop()

    def _kept(self, printed: list[Printed]) -> list[Printed]:
        for each in printed:
            self._pieces += 1
            size = utf8_size(each.text) + (_OVERHEAD if self._pieces > _FREE_PIECES else 0)
            if not self._tail and size <= self._limit // 2 - self._head_size:
                self._head.append(each)
                self._head_size += size
            else:
                self._keep_in_tail(each, size)
        return printed

    def _keep_display(self, key: int, size: int) -> None:
        if not self._tail and self._head_size + size <= self._limit // 2:
            self._head_size += size
            self._head_displayed += size
        else:
            self._tail_displayed += size
            self._keep_in_tail(key, size)

    def _keep_in_tail(self, entry: Printed | int, size: int) -> None:
        self._tail.append((entry, size))
        self._tail_size += size
        while self._tail_size > self._limit - self._head_size:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        entry, size = self._tail.popleft()
        if isinstance(entry, int):
            if not self.results.discard(entry):
                return  # it was cleared
            self._tail_displayed -= size
        self._tail_size -= size
        if isinstance(entry, Printed):
            self._cut_oldest(entry)
        self._cut = True

    def _cut_oldest(self, printed: Printed) -> None:
        """Of the oldest text in the tail keep what fits: at the end of the head, and at its own."""
        data = printed.text.encode("utf-8", "replace")
        if not self._cut:
            first = _decoded(data[: max(0, self._limit // 2 - self._head_size)])
            self._head.append(Printed(first, printed.timestamp, printed.error))
            self._head_size += utf8_size(first)
            data = data[utf8_size(first) :]
        room = max(0, self._limit - self._head_size - self._tail_size)
        data = data[len(data) - min(room, len(data)) :]
        for start in range((len(data) - 1) // _PIECE * _PIECE, -1, -_PIECE) if data else ():
            self._put_back(Printed(_decoded(data[start : start + _PIECE]), printed.timestamp, printed.error))

    def _put_back(self, printed: Printed) -> None:
        size = utf8_size(printed.text)
        self._tail.appendleft((printed, size))
        self._tail_size += size


def _decoded(data: bytes) -> str:
    """Text that was cut anywhere: without the halves of characters at its ends."""
    return data.decode("utf-8", "ignore")
