"""The variables of a namespace as bytes, and back: all that can be carried, each of the rest with its reason.

They are pickled one after the other by one pickler, so that what they share is shared afterwards, too. In
that, and on the way back, code of theirs is called, of which nobody knows what it does: it may raise, and
then the variable is left out; or not come to an end, and then it is left alone in its thread.

The bytes are records: what it is, how many bytes follow, and these::

    V   the name of a variable
    P   a piece of its pickle
    B   a buffer, of an array say, of its pickle
    E   its end
    Z   there are no more variables
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from struct import Struct
from threading import Event, Lock, Thread, get_ident
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import ModuleType

PATIENCE = 20.0
"""Seconds that a variable may take."""

ALTOGETHER = 300.0
"""Seconds after which no variable is begun with any more."""

LARGEST = 4 * 1024**3
"""Bytes of a variable."""

# Characters of a name, and of a reason.
_LONGEST = 300

# Seconds between two looks at what the thread does.
_LOOK = 0.1

_HEAD = Struct(">cQ")

# IPython's own, and what modules have by themselves.
_NOT_THE_USERS = re.compile(
    r"_{1,3}|_i{1,3}|_i?\d+|_[iod]h|_exit_code|In|Out|__(?:name|doc|package|loader|spec|file|cached|builtins?|"
    r"annotations|annotate|conditional_annotations|warningregistry)__"
)

# Errors of which the text says enough.
_PLAIN = (
    *("TypeError", "PicklingError", "UnpicklingError", "TimeoutError"),
    *("OtherPython", "TooLarge", "Unreadable"),
)


class Stream(Protocol):
    """To or from whoever keeps the bytes."""

    is_closed: bool
    """The other side is gone."""

    def clock(self) -> float:
        """Seconds that have gone by, without those in which it waited for the other side."""

    def stop(self, thread: int) -> None:
        """Raise something in that thread, if it runs Python code, that is no :class:`Exception`."""


class Sink(Stream, Protocol):
    def write(self, data: Any) -> object: ...

    def restart(self) -> None:
        """What was written is worth nothing."""


class Source(Stream, Protocol):
    def read(self, size: int) -> bytes:
        """So many bytes; fewer only at the end."""

    def readinto(self, buffer: Any) -> int:
        """The same, into *buffer*."""


class Damaged(Exception):
    """What is read was not written here."""


class TooLarge(Exception):
    """A variable has more bytes than are carried."""


class _Left(BaseException):
    """Raised in a thread that is left alone when it wants to go on."""


def users_variables(namespace: Mapping[Any, Any], hidden: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that are the user's own.

    Args:
        hidden: those that IPython has put there, with their values.
    """
    missing = object()
    return {
        name: value
        for name, value in list(namespace.items())
        if isinstance(name, str)
        and not _NOT_THE_USERS.fullmatch(name)
        and hidden.get(name, missing) is not value
    }


def save(
    variables: Mapping[str, Any], main: Mapping[str, Any], sink: Sink, definitions: ModuleType
) -> dict[str, str]:
    """Write *variables*, which are some of *main*.

    Args:
        definitions: the module ``definitions.py``.

    Returns:
        Those that were left out, and why.

    Raises:
        TimeoutError: they fail another way each time.
    """
    deadline = sink.clock() + ALTOGETHER
    left: dict[str, str] = {}
    whole: set[str] = set()
    while True:
        rest = {name: value for name, value in variables.items() if name not in left}
        saving = _Saving(rest, whole, deadline, main, sink, definitions)
        saving.run()
        if not saving.failures:
            return left
        if sink.clock() > deadline + ALTOGETHER:
            raise TimeoutError("each time other variables cannot be carried")
        left.update(saving.failures)
        sink.restart()


def load(
    main: dict[str, Any],
    source: Source,
    definitions: ModuleType,
    salvage: ModuleType | None,
    without: Collection[str] = (),
) -> tuple[dict[str, str], bool, str | None]:
    """Read variables into *main*.

    Without *salvage* it ends at the first that cannot be read. To go on after that it has to be known which
    others have something of it, and that takes another attempt.

    Args:
        definitions: the module ``definitions.py``.
        salvage: the module ``salvage.py``.
        without: those that take too long.

    Returns:
        Those that were left out, and why; whether there is to be another attempt, with nothing left of this
        one; and which one took too long.

    Raises:
        Damaged: this is something else.
    """
    loading = _Loading(main, source, definitions, salvage, without)
    loading.run()
    again = loading.is_left or (bool(loading.failures) and salvage is None)
    if again:
        for name in loading.names:
            main.pop(name, None)
    return loading.failures, again, loading.too_slow


class _Attempt:
    """Does something with one variable after the other, in a thread of its own.

    Attributes:
        failures: with which it could not be done, and why.
        is_left: it takes too long with one of them, or nobody waits for it any more: it is left alone.
        too_slow: the one with which it takes too long.
    """

    def __init__(self, stream: Stream) -> None:
        self.failures: dict[str, str] = {}
        self.is_left = False
        self.too_slow: str | None = None
        self._stream = stream
        self._going_on = Lock()  # whoever has it goes on with the stream, or says that this is over
        self._name: str | None = None
        self._since = 0.0
        self._thread = 0
        self._ended = Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Return when it has ended, or is left alone.

        Raises:
            BaseException: why it could not go on.
        """
        Thread(target=self._work, daemon=True).start()
        try:
            while not self._ended.wait(_LOOK):
                if self._takes_too_long() and self._leave():
                    return
        except BaseException:  # nobody waits any more
            self._leave()
            raise
        if self._error is not None:
            raise self._error

    def work(self) -> None:
        raise NotImplementedError

    def begin(self, name: str) -> None:
        """From now on it is about this one."""
        self._since = self._stream.clock()
        self._name = name

    def why(self, error: BaseException) -> str:
        """Why the variable cannot be carried.

        Raises:
            BaseException: it is not its fault.
        """
        self.check()
        if isinstance(error, Damaged):
            raise error
        return reason(error)

    def check(self) -> None:
        """
        Raises:
            _Left: this is over.
        """
        if self.is_left or self._stream.is_closed:
            raise _Left

    def _takes_too_long(self) -> bool:
        return self._name is not None and self._stream.clock() - self._since > PATIENCE

    def _leave(self) -> bool:
        """Leave it alone, if it has not ended."""
        with self._going_on:
            if self._ended.is_set():
                return False
            self.is_left, self.too_slow = True, self._name
            if self._name is not None:
                self.failures[self._name] = _too_slow()
        self._stream.stop(self._thread)
        return True

    def _work(self) -> None:
        self._thread = get_ident()
        try:
            self.work()
        except BaseException as error:  # of whatever kind: it is told
            self._error = error
        finally:
            self._ended.set()


class _Saving(_Attempt):
    """Writes variables; from the first failure on only finds out which other ones fail.

    Args:
        whole: those that were written before; those that are, now, are added.
        deadline: of the sink's clock, after which nothing is begun that is not among these.
    """

    def __init__(
        self,
        variables: Mapping[str, Any],
        whole: set[str],
        deadline: float,
        main: Mapping[str, Any],
        sink: Sink,
        definitions: Any,
    ) -> None:
        super().__init__(sink)
        self._variables = variables
        self._whole = whole
        self._deadline = deadline
        self._main = main
        self._sink = sink
        self._definitions = definitions
        self._size = 0

    def work(self) -> None:
        pickler = self._definitions.DefinitionPickler(self, self._main, self._give)
        with self._definitions.builders_in_reach():
            for name, value in self._variables.items():
                self.begin(name)
                try:
                    self._save(pickler, name, value)
                except BaseException as error:  # of whatever kind: code of theirs may have raised it
                    self.failures[name] = self.why(error)
        self._record(b"Z", b"")

    def _save(self, pickler: Any, name: str, value: object) -> None:
        if name not in self._whole and self._sink.clock() > self._deadline:
            raise TimeoutError("there was no time left for it")
        self._size = 0
        self._record(b"V", name.encode("utf-8", "surrogatepass"))
        pickler.dump(value)
        self._record(b"E", b"")
        self._whole.add(name)

    def write(self, data: Any) -> int:
        """For the pickler."""
        self._record(b"P", data)
        return len(data)

    def _give(self, buffer: Any) -> None:
        with buffer.raw() as data:
            self._record(b"B", data)

    def _record(self, kind: bytes, data: Any) -> None:
        self._size += len(data)
        if self._size > LARGEST:
            raise TooLarge("it takes more than " + str(LARGEST) + " bytes; use files for that")
        with self._going_on:
            self.check()
            if not self.failures:
                self._sink.write(_HEAD.pack(kind, len(data)))
                self._sink.write(data)


class _Loading(_Attempt):
    """Reads variables.

    Attributes:
        names: those that were read.
    """

    def __init__(
        self, main: dict[str, Any], source: Source, definitions: Any, salvage: Any, without: Collection[str]
    ) -> None:
        super().__init__(source)
        self.names: list[str] = []
        self._main = main
        self._records = records = _Records(source, self.check)
        self._without = without
        self._is_careful = salvage is not None
        if salvage is None:
            self._unpickler = definitions.DefinitionUnpickler(records, main, records)
        else:
            self._unpickler = salvage.Salvage(records, main, records, definitions, self.why)

    def work(self) -> None:
        while (name := self._records.next_variable()) is not None:
            self.begin(name)
            try:
                self._set(name, self._load(name))
            except BaseException as error:  # of whatever kind: code of theirs may have raised it
                self.failures[name] = self.why(error)
                if not self._is_careful:
                    return
            self._records.end_variable()

    def _load(self, name: str) -> object:
        if not self._is_careful:
            return self._unpickler.load()
        self._unpickler.why_not = _too_slow() if told(name) in self._without else ""
        try:
            value = self._unpickler.load()
        except Exception as error:  # those of others it catches
            raise Damaged(self.why(error)) from None
        self._unpickler.check(value)
        return value

    def _set(self, name: str, value: object) -> None:
        with self._going_on:
            self.check()
            self._main[name] = value
            self.names.append(name)


class _Records:
    """What was recorded of variables: of each, its pickle as a file, and its buffers one by one."""

    def __init__(self, source: Source, check: Callable[[], None]) -> None:
        self._source = source
        self._check = check
        self._left = 0  # bytes of the piece that is being read
        self._is_over = True
        self._buffers: deque[bytearray] = deque()

    def next_variable(self) -> str | None:
        """The name of the next one; None if there is none."""
        kind, size = self._head()
        if kind == b"Z":
            return None
        if kind != b"V" or size > 4 * 1024**2:
            raise Damaged("there is something else in the place of a variable")
        self._is_over = False
        return self._exactly(size).decode("utf-8", "surrogatepass")

    def end_variable(self) -> None:
        """Skip what was not read of it."""
        while self._more():
            while self._left:
                self._left -= len(self._exactly(min(self._left, 1024**2)))
        self._buffers.clear()

    def __iter__(self) -> Iterator[bytearray]:
        return self

    def __next__(self) -> bytearray:
        if not self._buffers:
            raise StopIteration
        return self._buffers.popleft()

    def read(self, size: int) -> bytes:
        pieces = []
        while size and self._more():
            pieces.append(self._exactly(min(size, self._left)))
            self._left -= len(pieces[-1])
            size -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._more():
            part = view[done : done + self._left]
            self._fill(part)
            self._left -= len(part)
            done += len(part)
        return done

    def readline(self) -> bytes:
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = self.read(1)
            if not byte:
                break
            line += byte
        return bytes(line)

    def _more(self) -> bool:
        """There is more of the pickle of this variable."""
        while not self._left and not self._is_over:
            kind, size = self._head()
            if kind == b"P":
                self._left = size
            elif kind == b"B" and size <= LARGEST:
                self._buffers.append(bytearray(size))
                self._fill(self._buffers[-1])
            elif kind == b"E":
                self._is_over = True
            else:
                raise Damaged("there is something else in the place of a variable's content")
        return bool(self._left)

    def _head(self) -> tuple[bytes, int]:
        self._check()
        kind, size = _HEAD.unpack(self._exactly(_HEAD.size))
        return kind, size

    def _exactly(self, size: int) -> bytes:
        data = self._source.read(size)
        if len(data) != size:
            raise Damaged("it ends too early")
        return data

    def _fill(self, buffer: Any) -> None:
        if self._source.readinto(buffer) != len(buffer):
            raise Damaged("it ends too early")


def reason(error: BaseException) -> str:
    """Why, in a few words."""
    try:
        text, kind = str(error), type(error).__name__
    except BaseException:  # code of theirs has raised it
        return "an error that cannot be told"
    if not text:
        return told(kind)
    return told(text if kind in _PLAIN else kind + ": " + text)


def _too_slow() -> str:
    return "it takes longer than " + str(int(PATIENCE)) + " s"


def told(text: str) -> str:
    """*text* as it can be told to anybody."""
    return text[:_LONGEST].encode("utf-8", "backslashreplace").decode("utf-8")
