"""Run code that nobody has read, in a place where it may run."""

from importlib import import_module
from typing import TYPE_CHECKING

from code_sandboxes.errors import (
    ContextNotFoundError,
    SandboxAuthenticationError,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxExecutionError,
    SandboxIsolationWarning,
    SandboxNotFoundError,
    SandboxNotStartedError,
    SandboxQuotaExceededError,
    SandboxResourceError,
    SandboxSerializationError,
    SandboxSnapshotError,
    SandboxSnapshotWarning,
    SandboxTimeoutError,
    VariableNotFoundError,
)
from code_sandboxes.file_info import FileInfo, FileType, FileWatchEvent, FileWatchEventType
from code_sandboxes.info import (
    Capabilities,
    Capability,
    GPUType,
    ResourceConfig,
    SandboxEnvironment,
    SandboxInfo,
    SandboxStatus,
    SandboxVariant,
)
from code_sandboxes.network_info import NetworkAttempt
from code_sandboxes.process_info import CommandResult, ProcessInfo
from code_sandboxes.results import (
    CodeError,
    Context,
    ExecutionError,
    ExecutionResult,
    ExecutionStatus,
    InputRequest,
    Logs,
    MIMEType,
    OutputMessage,
    Result,
)
from code_sandboxes.sandbox import (
    CodeStream,
    DatalayerSandbox,
    JupyterGatewaySandbox,
    LocalDockerSandbox,
    LocalEvalSandbox,
    LocalJupyterSandbox,
    Sandbox,
)
from code_sandboxes.steps import OutputHandler

if TYPE_CHECKING:
    from code_sandboxes.async_commands import AsyncProcessHandle, AsyncProcessLines, AsyncSandboxCommands
    from code_sandboxes.async_files import AsyncFileWatcher, AsyncSandboxFileHandle, AsyncSandboxFilesystem
    from code_sandboxes.async_sandbox import (
        AsyncCodeStream,
        AsyncDatalayerSandbox,
        AsyncJupyterGatewaySandbox,
        AsyncLocalDockerSandbox,
        AsyncLocalEvalSandbox,
        AsyncLocalJupyterSandbox,
        AsyncSandbox,
    )
    from code_sandboxes.commands import ProcessHandle, ProcessLines, SandboxCommands
    from code_sandboxes.config import SandboxConfig
    from code_sandboxes.files import FileWatcher, SandboxFileHandle, SandboxFilesystem
    from code_sandboxes.pool import AsyncSandboxPool, SandboxPool
    from code_sandboxes.snapshots import SnapshotInfo

__all__ = [
    "AsyncCodeStream",
    "AsyncDatalayerSandbox",
    "AsyncFileWatcher",
    "AsyncJupyterGatewaySandbox",
    "AsyncLocalDockerSandbox",
    "AsyncLocalEvalSandbox",
    "AsyncLocalJupyterSandbox",
    "AsyncProcessHandle",
    "AsyncProcessLines",
    "AsyncSandbox",
    "AsyncSandboxCommands",
    "AsyncSandboxFileHandle",
    "AsyncSandboxFilesystem",
    "AsyncSandboxPool",
    "Capabilities",
    "Capability",
    "CodeError",
    "CodeStream",
    "CommandResult",
    "Context",
    "ContextNotFoundError",
    "DatalayerSandbox",
    "ExecutionError",
    "ExecutionResult",
    "ExecutionStatus",
    "FileInfo",
    "FileType",
    "FileWatchEvent",
    "FileWatchEventType",
    "FileWatcher",
    "GPUType",
    "InputRequest",
    "JupyterGatewaySandbox",
    "LocalDockerSandbox",
    "LocalEvalSandbox",
    "LocalJupyterSandbox",
    "Logs",
    "MIMEType",
    "NetworkAttempt",
    "OutputHandler",
    "OutputMessage",
    "ProcessHandle",
    "ProcessInfo",
    "ProcessLines",
    "ResourceConfig",
    "Result",
    "Sandbox",
    "SandboxAuthenticationError",
    "SandboxCommands",
    "SandboxConfig",
    "SandboxConfigurationError",
    "SandboxConnectionError",
    "SandboxEnvironment",
    "SandboxError",
    "SandboxExecutionError",
    "SandboxFileHandle",
    "SandboxFilesystem",
    "SandboxInfo",
    "SandboxIsolationWarning",
    "SandboxNotFoundError",
    "SandboxNotStartedError",
    "SandboxPool",
    "SandboxQuotaExceededError",
    "SandboxResourceError",
    "SandboxSerializationError",
    "SandboxSnapshotError",
    "SandboxSnapshotWarning",
    "SandboxStatus",
    "SandboxTimeoutError",
    "SandboxVariant",
    "SnapshotInfo",
    "VariableNotFoundError",
]


# Modules that take their time: traitlets, asyncio, or much of our own.
_ON_USE = {
    "config": ("SandboxConfig",),
    "files": ("FileWatcher", "SandboxFileHandle", "SandboxFilesystem"),
    "commands": ("ProcessHandle", "ProcessLines", "SandboxCommands"),
    "pool": ("AsyncSandboxPool", "SandboxPool"),
    "snapshots": ("SnapshotInfo",),
    "async_files": ("AsyncFileWatcher", "AsyncSandboxFileHandle", "AsyncSandboxFilesystem"),
    "async_commands": ("AsyncProcessHandle", "AsyncProcessLines", "AsyncSandboxCommands"),
    "async_sandbox": (
        "AsyncCodeStream",
        "AsyncDatalayerSandbox",
        "AsyncJupyterGatewaySandbox",
        "AsyncLocalDockerSandbox",
        "AsyncLocalEvalSandbox",
        "AsyncLocalJupyterSandbox",
        "AsyncSandbox",
    ),
}


def __getattr__(name: str) -> object:
    for module, names in _ON_USE.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
