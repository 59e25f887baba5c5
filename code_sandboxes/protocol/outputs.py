"""Turn what a kernel publishes into lines and results, and keep them as a notebook would.

No clock: every method that depends on time is told what time it is.
"""

from __future__ import annotations

import re
import weakref
from collections import deque

from code_sandboxes.protocol.events import Cleared, Displayed, Event, Streamed, Updated, json_size, utf8_size
from code_sandboxes.results import Logs, OutputMessage, Result, ResultList

__all__ = ["HOLD", "Displays", "LineSplitter", "LiveResults", "Outputs"]

HOLD = 0.1
"""Seconds an unfinished line is held for the rest of it."""

_LINE_END = re.compile(r"(\r\n|\r|\n)")


class LineSplitter:
    """Cut one stream into messages, a line each, wherever the kernel cut it.

    A ``\\r`` at the end of a chunk may be half of a ``\\r\\n``: it is held like an unfinished line.
    """

    def __init__(self, error: bool) -> None:
        self._error = error
        self._pieces: list[str] = []
        self._size_of_pieces = 0
        self._carriage_return = False
        self._held_since: float | None = None

    @property
    def held(self) -> int:
        """How many bytes are held."""
        return self._size_of_pieces + self._carriage_return

    @property
    def deadline(self) -> float | None:
        """When :meth:`flush` is due; None while nothing is held."""
        return None if self._held_since is None else self._held_since + HOLD

    def feed(self, text: str, now: float, timestamp: float) -> list[OutputMessage]:
        """The lines that *text* ends."""
        if self._carriage_return:
            text = "\r" + text
        self._carriage_return = text.endswith("\r")
        if self._carriage_return:
            text = text[:-1]
        messages = self._complete(text, timestamp)
        if not self._pieces and not self._carriage_return:
            self._held_since = None
        elif messages or self._held_since is None:
            self._held_since = now
        return messages

    def flush(self, timestamp: float) -> list[OutputMessage]:
        """What is held, as a line that is not ended yet."""
        if self._held_since is None:
            return []
        message = OutputMessage(
            "".join(self._pieces), "\r" if self._carriage_return else "", timestamp, self._error
        )
        self._pieces, self._size_of_pieces = [], 0
        self._carriage_return, self._held_since = False, None
        return [message]

    def _complete(self, text: str, timestamp: float) -> list[OutputMessage]:
        error = self._error
        if "\r" in text:
            *parts, rest = _LINE_END.split(text)
            messages = [
                OutputMessage(line, end, timestamp, error)
                for line, end in zip(parts[::2], parts[1::2], strict=True)
            ]
        else:
            *lines, rest = text.split("\n")
            messages = [OutputMessage(line, "\n", timestamp, error) for line in lines]
        if messages and self._pieces:
            first = messages[0]
            messages[0] = OutputMessage("".join(self._pieces) + first.line, first.end, timestamp, error)
            self._pieces, self._size_of_pieces = [], 0
        if rest:
            self._pieces.append(rest)
            self._size_of_pieces += utf8_size(rest)
        return messages


class LiveResults(ResultList):
    """The results of a run that may still change: the writing side of :class:`ResultList`.

    Args:
        limit: bytes that all of them may take; an update beyond it is not kept.
    """

    __slots__ = ("_limit", "_next_key", "_sizes", "truncated")

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.truncated = False
        self._limit = limit
        self._next_key = 0
        self._sizes: dict[int, int] = {}

    def append(self, result: Result, size: int) -> int:
        """Show *result* at the end; returns the key to :meth:`discard` it with."""
        key = self._next_key
        self._items[key] = result
        self._sizes[key] = size
        self._next_key += 1
        return key

    def discard(self, key: int) -> bool:
        """Show it no more; False if that was so before."""
        self._sizes.pop(key, None)
        return self._items.pop(key, None) is not None

    def clear(self) -> None:
        self._items.clear()
        self._sizes.clear()

    def update(self, event: Updated) -> list[Result]:
        """Replace every display of that id; returns what they are now."""
        updated = {
            key: Result(event.data, event.metadata, old.is_main_result, event.display_id)
            for key, old in list(self._items.items())  # the run may be adding to it in another thread
            if old.display_id == event.display_id
        }
        size = json_size(event.data) + json_size(event.metadata)
        grown = sum(size - self._sizes.get(key, 0) for key in updated)
        if grown > 0 and sum(list(self._sizes.values())) + grown > self._limit:
            self.truncated = True
            return []
        for key in updated:
            self._sizes[key] = size
        self._items.update(updated)
        return list(updated.values())


class Displays:
    """Where each display id of a kernel is shown: in the results of this run, and of earlier ones.

    Results that nobody holds any more are forgotten. Only the run that is on adds to it, and tuples are
    replaced whole, so that an update may come from another thread.
    """

    def __init__(self) -> None:
        self._shown: dict[str, tuple[weakref.ref[LiveResults], ...]] = {}
        self._purge_at = 256

    def __len__(self) -> int:
        return len(self._shown)

    def show(self, display_id: str, results: LiveResults) -> None:
        known = self._shown.get(display_id, ())
        if not any(reference() is results for reference in known):
            self._shown[display_id] = (*(r for r in known if r() is not None), weakref.ref(results))
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
            if (alive := tuple(r for r in references if r() is not None))
        }
        self._purge_at = max(256, 2 * len(self._shown))


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
        self._head: list[OutputMessage] = []
        self._tail: deque[tuple[OutputMessage | int, int]] = deque()
        self._head_size = self._tail_size = 0
        self._head_displayed = self._tail_displayed = 0
        self._clear_at_next_output = False

    @property
    def truncated(self) -> bool:
        """Something was not kept."""
        return self._cut or self.results.truncated

    @property
    def deadline(self) -> float | None:
        """When :meth:`flush_due` has something to give."""
        return min((d for d in (self._stdout.deadline, self._stderr.deadline) if d is not None), default=None)

    def feed(self, event: Event, now: float, timestamp: float) -> list[OutputMessage | Result]:
        """What is to be shown now because of *event*."""
        if isinstance(event, Streamed):
            return [*self._streamed(event, now, timestamp)]
        if isinstance(event, Cleared):
            self._clear(event)
            return []
        shown: list[OutputMessage | Result] = [*self.flush(timestamp)]
        if isinstance(event, Displayed):
            shown.append(self._displayed(event))
        elif isinstance(event, Updated):
            shown += self._displays.update(event)[-1:]
        return shown

    def flush_due(self, now: float, timestamp: float) -> list[OutputMessage]:
        """The unfinished lines that were held long enough."""
        due = [s for s in (self._stdout, self._stderr) if s.deadline is not None and s.deadline <= now]
        return [message for splitter in due for message in self._flush(splitter, timestamp)]

    def flush(self, timestamp: float) -> list[OutputMessage]:
        """Every unfinished line: something comes that belongs behind it."""
        return self._flush(self._stdout, timestamp) + self._flush(self._stderr, timestamp)

    def _flush(self, splitter: LineSplitter, timestamp: float) -> list[OutputMessage]:
        size = splitter.held
        held = splitter.flush(timestamp)
        self._keep_messages(held, size)
        return held

    def logs(self) -> Logs:
        """What was printed, as far as it was kept."""
        kept = [*self._head, *(entry for entry, _ in self._tail if isinstance(entry, OutputMessage))]
        return Logs([m for m in kept if not m.error], [m for m in kept if m.error])

    def _streamed(self, event: Streamed, now: float, timestamp: float) -> list[OutputMessage]:
        self.clear_if_waiting()
        splitter = self._stderr if event.error else self._stdout
        size = splitter.held + utf8_size(event.text)
        messages = splitter.feed(event.text, now, timestamp)
        self._keep_messages(messages, size - splitter.held)
        return messages

    def _displayed(self, event: Displayed) -> Result:
        self.clear_if_waiting()
        result = Result(event.data, event.metadata, event.is_main_result, event.display_id)
        size = json_size(event.data) + json_size(event.metadata)
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

    def _keep_messages(self, messages: list[OutputMessage], size: int) -> None:
        """Keep *messages*, which take *size* bytes together."""
        if not self._tail and self._head_size + size <= self._limit // 2:
            self._head += messages
            self._head_size += size
            return
        for message in messages:
            self._keep_message(message, utf8_size(message.line) + len(message.end))

    def _keep_message(self, message: OutputMessage, size: int) -> None:
        room = self._limit // 2 - self._head_size
        if not self._tail and size <= room:
            self._keep_in_head(message, size)
            return
        if size > self._limit - self._head_size:
            self._keep_cut(message, 0 if self._tail else room)
        else:
            self._keep_in_tail(message, size)

    def _keep_cut(self, message: OutputMessage, room: int) -> None:
        """Keep the first *room* bytes of a line that is too long, and of what follows as much as fits."""
        self._cut = True
        first = _first_bytes(message.line, room)
        if first:
            self._keep_in_head(OutputMessage(first, "", message.timestamp, message.error), utf8_size(first))
        room = self._limit - self._head_size
        end = message.end[-room:]
        last = _last_bytes(message.line, room - len(end))
        self._keep_in_tail(OutputMessage(last, end, message.timestamp, message.error), room)

    def _keep_in_head(self, message: OutputMessage, size: int) -> None:
        self._head.append(message)
        self._head_size += size

    def _keep_display(self, key: int, size: int) -> None:
        if not self._tail and self._head_size + size <= self._limit // 2:
            self._head_size += size
            self._head_displayed += size
        else:
            self._tail_displayed += size
            self._keep_in_tail(key, size)

    def _keep_in_tail(self, entry: OutputMessage | int, size: int) -> None:
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
        self._cut = True


def _first_bytes(text: str, size: int) -> str:
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


def _last_bytes(text: str, size: int) -> str:
    return text.encode("utf-8", "replace")[-size:].decode("utf-8", "ignore") if size else ""
