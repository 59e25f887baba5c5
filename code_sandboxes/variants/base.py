"""What every variant has to say and do; the fronts and operations know no more of it than this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from code_sandboxes.errors import SandboxConfigurationError
from code_sandboxes.info import Capabilities, SandboxVariant
from code_sandboxes.kernel_process import KernelProcess

if TYPE_CHECKING:
    from code_sandboxes.config import SandboxConfig

__all__ = ["Variant"]


class Variant(ABC):
    """Where the kernels of one sandbox run.

    Args:
        config: the settings; one that cannot be honoured is refused here.
        options: those of the variant itself.

    Raises:
        TypeError: an option is unknown.
        SandboxConfigurationError: a setting cannot be honoured.
    """

    name: ClassVar[SandboxVariant]
    options: ClassVar[frozenset[str]]

    def __init__(self, config: SandboxConfig, options: Mapping[str, object]) -> None:
        unknown = sorted(set(options) - self.options)
        if unknown:
            known = ", ".join(sorted(self.options)) or "none"
            raise TypeError(f"{self.name} has no option {unknown[0]!r} (known: {known})")
        self.config = config

    @classmethod
    @abstractmethod
    def capabilities(cls) -> Capabilities:
        """What it can do on this machine."""

    @property
    @abstractmethod
    def isolation(self) -> str:
        """What separates this sandbox from the machine it runs on, and what does not, in a few words."""

    @property
    @abstractmethod
    def max_output(self) -> int:
        """Bytes of output a run keeps."""

    @abstractmethod
    def kernel_name(self, language: str | None) -> str:
        """The kernel that runs *language*.

        Raises:
            ValueError: there is none.
        """

    @abstractmethod
    def language_of(self, kernel_name: str) -> str:
        """What the kernel *kernel_name* declares to run."""

    @abstractmethod
    def prepare(self) -> None:
        """Make what all kernels of the sandbox share; in the worker thread."""

    @abstractmethod
    def launcher(
        self, kernel_name: str, cwd: str | None, env: Mapping[str, str]
    ) -> Callable[[], KernelProcess]:
        """What starts such a kernel, again and again; it is called in the worker thread."""

    @abstractmethod
    def remove(self) -> None:
        """Remove what :meth:`prepare` made, when no kernel is left; may be called again."""

    @classmethod
    def leave(cls) -> None:
        """The program ends, and none of its sandboxes is left: let go of what they shared, if anything."""
        return

    def refuse(self, setting: str, reason: str) -> SandboxConfigurationError:
        """The error that says that *setting* cannot be honoured."""
        return SandboxConfigurationError(f"{self.name} cannot {setting}: {reason}")
