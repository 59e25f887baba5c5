"""The files of a sandbox, for the asyncio front; what each method means is documented in ``files.py``."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from code_sandboxes import file_operations as operations
from code_sandboxes.awaiting import documented_by, drive
from code_sandboxes.file_info import FileInfo, FileWatchEvent
from code_sandboxes.file_operations import Content, OnProgress, OpenFile, Path, Watcher
from code_sandboxes.files import (
    FileWatcher,
    SandboxFileHandle,
    SandboxFilesystem,
    open_handle,
    plain_mode,
)
from code_sandboxes.results import Context

if TYPE_CHECKING:
    from code_sandboxes.operations import Core

__all__ = ["AsyncFileWatcher", "AsyncSandboxFileHandle", "AsyncSandboxFilesystem"]

T = TypeVar("T")


class AsyncSandboxFilesystem:
    __doc__ = SandboxFilesystem.__doc__

    def __init__(self, core: Core) -> None:
        self._core = core

    # Reading and writing.

    @documented_by(SandboxFilesystem.read)
    async def read(self, path: Path, *, context: Context | str | None = None) -> str:
        return await drive(operations.read(self._core.guest(context), path))

    @documented_by(SandboxFilesystem.read_bytes)
    async def read_bytes(
        self,
        path: Path,
        offset: int = 0,
        length: int | None = None,
        *,
        context: Context | str | None = None,
    ) -> bytes:
        return await drive(operations.read_bytes(self._core.guest(context), path, offset, length))

    @documented_by(SandboxFilesystem.read_stream)
    async def read_stream(self, path: Path, *, context: Context | str | None = None) -> AsyncIterator[bytes]:
        reading = operations.stream(self._core.guest(context), path)
        try:
            await drive(reading.open())
            while piece := await drive(reading.next()):
                yield bytes(piece)
        finally:
            reading.close()

    @documented_by(SandboxFilesystem.write)
    async def write(
        self, path: Path, content: Content, make_dirs: bool = True, *, context: Context | str | None = None
    ) -> None:
        await drive(operations.write(self._core.guest(context), path, _unblocking(content), make_dirs))

    @documented_by(SandboxFilesystem.write_bytes)
    async def write_bytes(
        self, path: Path, content: Content, make_dirs: bool = True, *, context: Context | str | None = None
    ) -> None:
        await drive(operations.write(self._core.guest(context), path, _unblocking(content), make_dirs))

    @documented_by(SandboxFilesystem.write_files)
    async def write_files(
        self, files: Mapping[str, Content], *, context: Context | str | None = None
    ) -> None:
        guest = self._core.guest(context)
        if isinstance(files, Mapping):
            files = {path: _unblocking(content) for path, content in files.items()}
        await drive(operations.write_files(guest, files))

    @documented_by(SandboxFilesystem.open)
    def open(
        self,
        path: Path,
        mode: str = "r",
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        context: Context | str | None = None,
    ) -> _Opening[AsyncSandboxFileHandle]:
        async def open_it() -> AsyncSandboxFileHandle:
            file = OpenFile(self._core.guest(context), path, plain_mode(mode))
            opening = partial(open_handle, file, path, mode, encoding, errors, newline)
            return AsyncSandboxFileHandle(await asyncio.to_thread(opening))

        return _Opening(open_it)

    # Looking.

    @documented_by(SandboxFilesystem.list)
    async def list(
        self, path: Path = "/", depth: int = 1, *, context: Context | str | None = None
    ) -> list[FileInfo]:
        return await drive(operations.list_folder(self._core.guest(context), path, depth))

    @documented_by(SandboxFilesystem.exists)
    async def exists(self, path: Path, *, context: Context | str | None = None) -> bool:
        return await drive(operations.exists(self._core.guest(context), path))

    @documented_by(SandboxFilesystem.is_file)
    async def is_file(self, path: Path, *, context: Context | str | None = None) -> bool:
        return await drive(operations.is_file(self._core.guest(context), path))

    @documented_by(SandboxFilesystem.is_dir)
    async def is_dir(self, path: Path, *, context: Context | str | None = None) -> bool:
        return await drive(operations.is_dir(self._core.guest(context), path))

    @documented_by(SandboxFilesystem.get_info)
    async def get_info(self, path: Path, *, context: Context | str | None = None) -> FileInfo:
        return await drive(operations.get_info(self._core.guest(context), path))

    @documented_by(SandboxFilesystem.watch)
    def watch(
        self, path: Path, recursive: bool = False, *, context: Context | str | None = None
    ) -> _Opening[AsyncFileWatcher]:
        async def open_it() -> AsyncFileWatcher:
            return AsyncFileWatcher(await drive(operations.watch(self._core.guest(context), path, recursive)))

        return _Opening(open_it)

    # Changing what there is.

    @documented_by(SandboxFilesystem.mkdir)
    async def mkdir(self, path: Path, parents: bool = True, *, context: Context | str | None = None) -> None:
        await drive(operations.mkdir(self._core.guest(context), path, parents))

    @documented_by(SandboxFilesystem.rm)
    async def rm(self, path: Path, recursive: bool = False, *, context: Context | str | None = None) -> None:
        await drive(operations.rm(self._core.guest(context), path, recursive))

    @documented_by(SandboxFilesystem.copy)
    async def copy(self, source: Path, target: Path, *, context: Context | str | None = None) -> None:
        await drive(operations.copy(self._core.guest(context), source, target))

    @documented_by(SandboxFilesystem.move)
    async def move(self, source: Path, target: Path, *, context: Context | str | None = None) -> None:
        await drive(operations.move(self._core.guest(context), source, target))

    # Between here and there.

    @documented_by(SandboxFilesystem.upload)
    async def upload(
        self,
        local: Path,
        remote: Path,
        on_progress: OnProgress | None = None,
        *,
        context: Context | str | None = None,
    ) -> None:
        await drive(operations.upload(self._core.guest(context), local, remote, on_progress))

    @documented_by(SandboxFilesystem.download)
    async def download(
        self,
        remote: Path,
        local: Path,
        on_progress: OnProgress | None = None,
        *,
        context: Context | str | None = None,
    ) -> None:
        await drive(operations.download(self._core.guest(context), remote, local, on_progress))


class _Unblocking:
    """A binary file that is read in another thread."""

    def __init__(self, read: Callable[[int], object]) -> None:
        self._read = read

    def read(self, size: int, /) -> Awaitable[object]:
        return asyncio.to_thread(self._read, size)


def _unblocking(content: Content) -> Content:
    """*content*, of which a file must not hold up the event loop; one that can be awaited does not."""
    read = getattr(content, "read", None)
    if not callable(read) or inspect.iscoroutinefunction(read):
        return content
    return _Unblocking(read)


class _Closeable(Protocol):
    async def close(self) -> None: ...

    def __aiter__(self) -> AsyncIterator[Any]: ...


OpenT = TypeVar("OpenT", bound=_Closeable)


class _Opening(Generic[OpenT]):
    """Something that can be awaited, used directly in ``async with``, or iterated over."""

    def __init__(self, open_it: Callable[[], Awaitable[OpenT]]) -> None:
        self._open = open_it
        self._opened: OpenT | None = None

    def __await__(self) -> Generator[Any, None, OpenT]:
        return self._open().__await__()

    async def __aenter__(self) -> OpenT:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._opened is not None
        await self._opened.close()

    async def __aiter__(self) -> AsyncIterator[Any]:
        opened = await self._open()
        try:
            async for each in opened:
                yield each
        finally:
            await opened.close()


class AsyncSandboxFileHandle:
    __doc__ = SandboxFileHandle.__doc__

    def __init__(self, handle: SandboxFileHandle) -> None:
        self._handle = handle

    def __repr__(self) -> str:
        return repr(self._handle).replace("<", "<Async", 1)

    @property
    @documented_by(SandboxFileHandle.name)
    def name(self) -> str:
        return self._handle.name

    @property
    def mode(self) -> str:
        return self._handle.mode

    @property
    def closed(self) -> bool:
        return self._handle.closed

    @documented_by(SandboxFileHandle.read)
    async def read(self, size: int = -1) -> str | bytes:
        return await asyncio.to_thread(self._handle.read, size)

    @documented_by(SandboxFileHandle.readline)
    async def readline(self, size: int = -1) -> str | bytes:
        return await asyncio.to_thread(self._handle.readline, size)

    @documented_by(SandboxFileHandle.readlines)
    async def readlines(self, hint: int = -1) -> list[str | bytes]:
        return await asyncio.to_thread(self._handle.readlines, hint)

    @documented_by(SandboxFileHandle.write)
    async def write(self, content: str | bytes | bytearray | memoryview) -> int:
        return await asyncio.to_thread(self._handle.write, content)

    @documented_by(SandboxFileHandle.writelines)
    async def writelines(self, lines: Iterable[str | bytes]) -> None:
        await asyncio.to_thread(self._handle.writelines, lines)

    @documented_by(SandboxFileHandle.seek)
    async def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return await asyncio.to_thread(self._handle.seek, offset, whence)

    @documented_by(SandboxFileHandle.tell)
    async def tell(self) -> int:
        return await asyncio.to_thread(self._handle.tell)

    @documented_by(SandboxFileHandle.truncate)
    async def truncate(self, size: int | None = None) -> int:
        return await asyncio.to_thread(self._handle.truncate, size)

    @documented_by(SandboxFileHandle.flush)
    async def flush(self) -> None:
        await asyncio.to_thread(self._handle.flush)

    @documented_by(SandboxFileHandle.close)
    async def close(self) -> None:
        await asyncio.to_thread(self._handle.close)

    async def __aenter__(self) -> AsyncSandboxFileHandle:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[str | bytes]:
        return self

    async def __anext__(self) -> str | bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line


class AsyncFileWatcher:
    __doc__ = FileWatcher.__doc__

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        watcher.close_after(self)

    @documented_by(FileWatcher.close)
    async def close(self) -> None:
        self._watcher.close()

    async def __aenter__(self) -> AsyncFileWatcher:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[FileWatchEvent]:
        return self

    async def __anext__(self) -> FileWatchEvent:
        event = await drive(self._watcher.next())
        if event is None:
            raise StopAsyncIteration
        return event
