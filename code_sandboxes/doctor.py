"""What sandboxes of each local variant are kept from on this machine, and what would mend what is missing."""

from __future__ import annotations

import getpass
import json
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from code_sandboxes.errors import SandboxConnectionError
from code_sandboxes.info import Capabilities, Capability, SandboxVariant
from code_sandboxes.isolation import landlock
from code_sandboxes.isolation.container_engine import Engine
from code_sandboxes.isolation.engine import IMAGE
from code_sandboxes.isolation.probe import Facts, probe
from code_sandboxes.sandbox import Sandbox
from code_sandboxes.variants.kernelspecs import installed_kernels
from code_sandboxes.variants.plans import strongest

__all__ = ["Report", "VariantReport", "as_json", "as_text", "examine"]

_THINGS: Mapping[str, str] = {
    "files": "files",
    "network_none": 'network "none"',
    "network_allowlist": 'network "allowlist"',
    "memory_limit": "memory limit",
    "cpu_limit": "CPU limit",
    "pids_limit": "process limit",
    "disk_limit": "disk limit",
}
"""What is told of a variant: all but the first are fields of :class:`~code_sandboxes.info.Capabilities`."""

_GREEN, _RED, _BOLD, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"

# The width of the column on the left.
_LABELS = 23


@dataclass(frozen=True, slots=True)
class VariantReport:
    """
    Args:
        isolation: what ``isolation="auto"`` is.
        enforces: whether it can keep code from each thing, by the names that capabilities have.
    """

    isolation: str
    enforces: Mapping[str, Capability]

    @property
    def missing(self) -> list[str]:
        return [name for name, capability in self.enforces.items() if not capability]


@dataclass(frozen=True, slots=True)
class Report:
    """
    Args:
        machine: what was found on it, in words.
    """

    machine: Mapping[str, str]
    variants: Mapping[str, VariantReport]

    @property
    def missing(self) -> list[str]:
        """What local-jupyter, of which most can be expected, does not enforce."""
        return self.variants[SandboxVariant.LOCAL_JUPYTER].missing


def examine() -> Report:
    """Look at this machine as this process, for this user, finds it."""
    facts = probe()
    containers = Sandbox.capabilities_of(SandboxVariant.LOCAL_DOCKER)
    return Report(
        machine=_machine(facts, containers.own_process),
        variants={
            SandboxVariant.LOCAL_EVAL.value: _eval(Sandbox.capabilities_of(SandboxVariant.LOCAL_EVAL)),
            SandboxVariant.LOCAL_JUPYTER.value: _jupyter(
                Sandbox.capabilities_of(SandboxVariant.LOCAL_JUPYTER), facts
            ),
            SandboxVariant.LOCAL_DOCKER.value: VariantReport(
                "a container", {"files": containers.own_process, **_limits(containers)}
            ),
        },
    )


def _eval(capabilities: Capabilities) -> VariantReport:
    # Whoever has no process of its own has no files of its own.
    return VariantReport("none", {"files": capabilities.own_process, **_limits(capabilities)})


def _jupyter(capabilities: Capabilities, facts: Facts) -> VariantReport:
    method = strongest()
    files = Capability(True)
    if method == "none":
        files = Capability(False, f"that takes bubblewrap or Landlock: {facts.bubblewrap}")
    return VariantReport(method, {"files": files, **_limits(capabilities)})


def _limits(capabilities: Capabilities) -> dict[str, Capability]:
    return {name: getattr(capabilities, name) for name in _THINGS if name != "files"}


def _machine(facts: Facts, containers: Capability) -> dict[str, str]:
    limited = [name for name, reason in facts.cgroups.items() if not reason]
    return {
        "code_sandboxes": _version("code-sandboxes"),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "user": _user(),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "ipykernel": _version("ipykernel"),
        "kernelspecs": ", ".join(installed_kernels()) or "none",
        "bubblewrap": _yes_or_no(facts.bubblewrap, f"{facts.bubblewrap_version} ({facts.bubblewrap_path})"),
        "Landlock": _yes_or_no(facts.landlock_reason, f"version {facts.landlock}"),
        "system call filter": _yes_or_no(facts.seccomp, "yes"),
        "cgroups": ", ".join(limited) if limited else f"no: {facts.cgroups['memory']}",
        "container engine": _engine() if containers else str(containers),
    }


def _engine() -> str:
    engine = Engine()
    try:
        image = IMAGE
        if not engine.has_image(IMAGE):
            image = "no image yet: run `python -m code_sandboxes build-image`"
        return f"Docker {engine.version} ({engine.url}), {image}"
    except SandboxConnectionError as error:
        return f"no: {error}"
    finally:
        engine.close()


def _yes_or_no(reason: str, yes: str) -> str:
    return f"no: {reason}" if reason else yes


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # nobody has given this number a name (3.13: OSError)
        name = "without a name"
    return f"{name} ({os.geteuid()})" if hasattr(os, "geteuid") else name


# For a program.


def as_json(report: Report) -> str:
    """As in :class:`Report`, and ``missing``: the same that decides the exit status."""
    return json.dumps({**asdict(report), "missing": report.missing}, indent=2)


# For a person.


def as_text(report: Report, *, width: int = 80, colour: bool = False) -> str:
    """A table of at most *width* columns; with *colour* it has escape sequences of a terminal."""
    paint = _paint if colour else _leave
    lines = [paint("This machine", _BOLD), *_rows(report.machine, width, paint)]
    for name, variant in report.variants.items():
        lines += ["", paint(f"{name}, isolation: {variant.isolation}", _BOLD)]
        lines += _rows({_THINGS[what]: str(each) for what, each in variant.enforces.items()}, width, paint)
        if variant.isolation == "landlock":
            lines += _wrapped(f"It is not complete: {landlock.not_enforced()}.", width)
    return "\n".join([*lines, "", *_wrapped(_verdict(report), width)])


def _paint(text: str, colour: str) -> str:
    return f"{colour}{text}{_PLAIN}" if colour else text


def _leave(text: str, colour: str) -> str:
    return text


def _rows(values: Mapping[str, str], width: int, paint: Callable[[str, str], str]) -> Iterator[str]:
    before = ""
    for name, value in values.items():
        shown = "no: as above" if value == before and value.startswith("no: ") else value
        before = value
        first, *others = textwrap.wrap(
            shown, max(width - _LABELS, 20), break_long_words=False, break_on_hyphens=False
        )
        mark, rest = first.partition(" ")[::2] if first.startswith("no: ") else (first, "")
        colour = _RED if mark == "no:" else _GREEN if mark == "yes" else ""
        yield f"  {name:<{_LABELS - 2}}{paint(mark, colour)}{' ' * bool(rest)}{rest}"
        yield from (" " * _LABELS + line for line in others)


def _verdict(report: Report) -> str:
    if report.missing:
        missing = ", ".join(_THINGS[name] for name in report.missing)
        return f"local-jupyter does not enforce here: {missing}."
    return "local-jupyter is isolated here, and enforces every limit."


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
