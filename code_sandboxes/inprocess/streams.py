"""Standard streams for code in this process: what it prints is told, and what it reads is asked for."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["AskingStream", "TellingStream"]


class TellingStream(io.TextIOBase):
    """Standard output or error of a kernel.

    Args:
        name: ``stdout`` or ``stderr``.
        tell: gets the text.
    """

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        self.name = f"<{name}>"
        self.buffer = _Bytes(self)
        self._tell = tell

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the base class has it read only too
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]  # the same
        return "replace"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        text = str.__str__(text)  # and none of a subclass
        self._tell(text)
        return len(text)

    def close(self) -> None:
        """It stays open: it is there for the next run too."""


class _Bytes(io.RawIOBase):
    """What ``sys.stdout.buffer`` is: a character may come in pieces."""

    def __init__(self, text: TellingStream) -> None:
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        octets = bytes(memoryview(data))
        self._text.write(self._decoder.decode(octets))
        return len(octets)

    def close(self) -> None:
        """It stays open, as its text does."""


class AskingStream(io.TextIOBase):
    """Standard input of a kernel; each line is asked for.

    Args:
        ask: gives the answer to a prompt.
    """

    name = "<stdin>"

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the base class has it read only too
        return "utf-8"

    def readable(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]  # as io.TextIOWrapper's
        return self._ask("") + "\n"

    def close(self) -> None:
        """It stays open: ``exit()`` closes it, and there is a next run."""
