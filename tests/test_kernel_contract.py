"""Three real kernels keep the contract: ipykernel, the one in this process, and one that is not Python's.

What ipykernel and the kernel in this process both can do is the same code for both: the one is a fake of the
other, and these tests verify it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import pytest

from code_sandboxes import Sandbox
from code_sandboxes.inprocess.kernel import InProcessKernel
from code_sandboxes.kernel_process import KernelProcess
from code_sandboxes.variants.base import ContextSpec, Variant
from tests.kernel_contract import *  # noqa: F403  (the tests)
from tests.kernel_contract import PNG, Abilities, Conversation

_DISPLAY = "from IPython.display import Image, HTML, clear_output, display, update_display\n"


def _writes(text: str) -> str:
    return f"import sys\nwritten = sys.stdout.write({text!r})"


PYTHON = Abilities(
    language="python",
    prints="print('hello')",
    prints_in_pieces="for number in range(300): print(number, end=' ', flush=number % 100 == 0)\nprint()",
    prints_exactly={
        _writes(text): text
        for text in ("ünï€ \U0001f600", "a\0b", "50 %\r100 %\r\n", "\n\n", "no newline", "\u2028", " \t ")
    },
    assigns="variable = 7",
    recalls="print(variable)",
    fails="print('before'); {}['missing']",
    failure=("KeyError", "'missing'"),
    refuses="print('never')\n1 +",
    spins="variable = 8\nprint('spinning', flush=True)\nwhile True: pass",
    prints_errors="import sys; print('out', end=''); print('err', end='', file=sys.stderr)",
    shows="6 * 7",
    displays=_DISPLAY + "display(HTML('<b>bold</b>'))",
    updates=_DISPLAY + "display(1, display_id='here'); update_display(2, display_id='here')",
    clears=_DISPLAY + "clear_output(); clear_output(wait=True)",
    mixes=_DISPLAY + "print('first'); display(2); print('third')\n4",
    draws=_DISPLAY + f"display(Image({PNG!r}, format='png'))",
    shows_nearly_json=_DISPLAY
    + f"value = {{1: (2, 3), 'bytes': {PNG!r}, 'set': {{4}}, 'not': float('nan')}}\n"
    + "display({'application/json': value, 5: 6}, raw=True)",
    changes_what_it_showed=_DISPLAY
    + "value = {'list': [1]}\ndisplay({'application/json': value}, raw=True)\nvalue['list'].append(2)",
    asks="print(input('name?'))",
    asks_secretly="import getpass; print(getpass.getpass('secret?'))",
    exits="import sys; sys.exit(3)",
    awaits="import asyncio\nprint('waiting', flush=True)\nawait asyncio.Event().wait()",
    welcomes=True,
    keeps_history=True,
    names_interrupts=True,
)

# All it prints goes to one terminal, which ends an unfinished line; its only values are exit codes; it counts
# whatever is not silent; and the status of its reply to what was interrupted, "abort", is no other kernel's.
BASH = Abilities(
    language="bash",
    prints="echo hello",
    prints_in_pieces="for ((number = 0; number < 300; number++)); do printf '%d ' $number; done; echo",
    prints_exactly={
        r"printf 'one\n\ntwo\n'": "one\n\ntwo\n",
        r"printf '50 %%\r100 %%\n'": "50 %\r100 %\n",
        "echo 'ünï€ \U0001f600'": "ünï€ \U0001f600\n",
    },
    assigns="variable=7",
    recalls="echo $variable",
    fails="echo before; (exit 3)",
    failure=("", "3"),
    refuses="echo never; fi",
    spins="variable=8; echo spinning; while true; do :; done",
    displays="echo '<b>bold</b>' | displayHTML",
    updates="echo 1 | displayHTML here; echo 2 | displayHTML here",
    draws=r"printf '\x89PNG\r\n\x1a\n' | display",
    welcomes=True,
)


@dataclass(frozen=True)
class Kind:
    """A kernel, what it can do, how to start one, and whether its tests take their time."""

    name: str
    abilities: Abilities
    launcher: Callable[[Variant], Callable[[], KernelProcess]]
    slow: bool = False


def kernels_of_contexts(jupyter: Variant, kernel_name: str) -> Callable[[], KernelProcess]:
    """Starts kernels, each in a context of its own."""
    numbers = itertools.count()

    def launch() -> KernelProcess:
        context = f"{kernel_name}-{next(numbers)}"
        return jupyter.launcher(ContextSpec(context, context, kernel_name, kernel_name, None, {}))()

    return launch


KINDS = [
    Kind("ipykernel", PYTHON, lambda jupyter: kernels_of_contexts(jupyter, "python3")),
    Kind("inprocess", PYTHON, lambda _: InProcessKernel),
    Kind("bash", BASH, lambda jupyter: kernels_of_contexts(jupyter, "bash"), slow=True),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test the abilities that it names, of each kernel that has them all."""
    needed = [field.name for field in fields(Abilities) if field.name in metafunc.fixturenames]
    params = []
    for kind in KINDS:
        abilities = [getattr(kind.abilities, name) for name in needed]
        if all(abilities):
            marks = [pytest.mark.slow] if kind.slow else []
            params.append(pytest.param(kind, *abilities, id=kind.name, marks=marks))
    metafunc.parametrize(["kind", *needed], params)


@pytest.fixture(scope="module")
def jupyter() -> Iterator[Variant]:
    with Sandbox.create("local-jupyter", isolation="none") as sandbox:
        yield sandbox._core.variant


class Supply:
    """Kernels of one kind. The next ones are on their way already: some take seconds to start."""

    def __init__(self, launch: Callable[[], KernelProcess]) -> None:
        self._launch = launch
        self._coming = deque(Conversation(launch) for _ in range(2))
        self._shared: Conversation | None = None

    def take(self) -> Conversation:
        self._coming.append(Conversation(self._launch))
        kernel = self._coming.popleft()
        kernel.meet()
        return kernel

    def share(self) -> Conversation:
        if self._shared is not None and not self._shared.is_idle:  # a test has failed, which is enough
            self._shared.close()
            self._shared = None
        self._shared = self._shared or self.take()
        return self._shared

    def close(self) -> None:
        for kernel in (*self._coming, *([self._shared] if self._shared else [])):
            kernel.close()


@pytest.fixture(scope="module")
def supplies(jupyter: Variant) -> Iterator[dict[str, Supply]]:
    """By the name of the kind, started on first need."""
    supplies: dict[str, Supply] = {}
    yield supplies
    for supply in supplies.values():
        supply.close()


@pytest.fixture
def supply(kind: Kind, supplies: dict[str, Supply], jupyter: Variant) -> Supply:
    if kind.name not in supplies:
        supplies[kind.name] = Supply(kind.launcher(jupyter))
    return supplies[kind.name]


@pytest.fixture
def kernel(supply: Supply) -> Conversation:
    """A kernel for tests that leave no trace in it."""
    return supply.share()


@pytest.fixture
def new_kernel(supply: Supply) -> Iterator[Conversation]:
    """A kernel that the test may end."""
    kernel = supply.take()
    yield kernel
    kernel.close()
