"""Run code that nobody has read, in a place where it may run."""

from typing import TYPE_CHECKING

from code_sandboxes.errors import (
    ContextNotFoundError,
    SandboxConfigurationError,
    SandboxConnectionError,
    SandboxError,
    SandboxExecutionError,
    SandboxIsolationWarning,
    SandboxNotFoundError,
    SandboxNotStartedError,
    SandboxTimeoutError,
)
from code_sandboxes.info import (
    Capabilities,
    Capability,
    ResourceConfig,
    SandboxInfo,
    SandboxStatus,
    SandboxVariant,
)
from code_sandboxes.operations import OutputHandler
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
from code_sandboxes.sandbox import CodeStream, LocalEvalSandbox, LocalJupyterSandbox, Sandbox

if TYPE_CHECKING:
    from code_sandboxes.async_sandbox import (
        AsyncCodeStream,
        AsyncLocalEvalSandbox,
        AsyncLocalJupyterSandbox,
        AsyncSandbox,
    )
    from code_sandboxes.config import SandboxConfig
    from code_sandboxes.pool import AsyncSandboxPool, SandboxPool

__all__ = [
    "AsyncCodeStream",
    "AsyncLocalEvalSandbox",
    "AsyncLocalJupyterSandbox",
    "AsyncSandbox",
    "AsyncSandboxPool",
    "Capabilities",
    "Capability",
    "CodeError",
    "CodeStream",
    "Context",
    "ContextNotFoundError",
    "ExecutionError",
    "ExecutionResult",
    "ExecutionStatus",
    "InputRequest",
    "LocalEvalSandbox",
    "LocalJupyterSandbox",
    "Logs",
    "MIMEType",
    "OutputHandler",
    "OutputMessage",
    "ResourceConfig",
    "Result",
    "Sandbox",
    "SandboxConfig",
    "SandboxConfigurationError",
    "SandboxConnectionError",
    "SandboxError",
    "SandboxExecutionError",
    "SandboxInfo",
    "SandboxIsolationWarning",
    "SandboxNotFoundError",
    "SandboxNotStartedError",
    "SandboxPool",
    "SandboxStatus",
    "SandboxTimeoutError",
    "SandboxVariant",
]


def __getattr__(name: str) -> object:
    if name == "SandboxConfig":  # brings traitlets along, which takes its time
        from code_sandboxes.config import SandboxConfig

        return SandboxConfig
    if name in ("AsyncSandboxPool", "SandboxPool"):  # brings asyncio along
        from code_sandboxes import pool

        return getattr(pool, name)
    if name.startswith("Async") and name in __all__:  # so do these
        from code_sandboxes import async_sandbox

        return getattr(async_sandbox, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
