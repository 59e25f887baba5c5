"""``python -m code_sandboxes``: what can be asked from a shell."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from code_sandboxes import build_image, kernelspec_command

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what *arguments* say, by default those of this process; returns the exit status.

    Raises:
        SystemExit: they make no sense (2), or ask for help (0).
    """
    chosen = _parser().parse_args(arguments)
    status: int = chosen.run(chosen)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m code_sandboxes",
        description="Run code that nobody has read, in a place where it may run.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_doctor(commands)
    kernelspec_command.add_to(commands)
    build_image.add_to(commands)
    return parser


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="tell what can be enforced on this machine, and what would mend what is missing",
        description="Tell what sandboxes can be kept from here, and what would mend what is missing.",
        epilog="Exit status: 0 if local-jupyter is isolated with all limits, 1 if something is missing,"
        " 2 on wrong usage.",
    )
    doctor.add_argument("--json", action="store_true", help="for a program to read")
    doctor.set_defaults(run=_doctor)


def _doctor(chosen: argparse.Namespace) -> int:
    from code_sandboxes.doctor import as_json, as_text, examine

    report = examine()
    if chosen.json:
        print(as_json(report))
    else:
        is_terminal = sys.stdout.isatty()
        width = min(shutil.get_terminal_size().columns, 100) if is_terminal else 80
        # no-color.org
        print(as_text(report, width=width, colour=is_terminal and not os.environ.get("NO_COLOR")))
    return 1 if report.missing else 0


if __name__ == "__main__":
    sys.exit(main())
