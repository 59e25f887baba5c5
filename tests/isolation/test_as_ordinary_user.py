"""What code cannot do is run again by an ordinary user, where root runs these tests.

Root and others make an enclosure in two ways: without a user namespace, and with one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.isolation.needs import needs_isolation, not_here
from tests.isolation.users import NoInterpreterError, OrdinaryUser, ordinary_user

pytestmark = pytest.mark.slow

MODULES = ("test_attacks.py", "test_leftovers.py", "test_limits.py")


@pytest.fixture(scope="module")
def somebody() -> Iterator[OrdinaryUser]:
    if os.geteuid() != 0:
        pytest.skip("this is an ordinary user, so nobody has run the tests of isolation as root")
    needs_isolation("bubblewrap")
    folder = Path(tempfile.mkdtemp(prefix="cs-user"))
    try:
        yield ordinary_user(folder)
    except NoInterpreterError as error:
        not_here(str(error))
    finally:
        shutil.rmtree(folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("module", MODULES)
def test_it_is_the_same_for_an_ordinary_user(somebody: OrdinaryUser, module: str) -> None:
    report = somebody.folder / "home" / f"{module}.xml"
    # What the program makes of a kernel's end is the same whoever has it: rows 57 and 58.
    # Who may use a container engine is no ordinary user.
    left_out = "not row_57 and not row_58 and not container"
    options = ("-q", "-p", "no:cacheprovider", "--junitxml", str(report), "-k", left_out)

    done = somebody.run("-m", "pytest", *options, f"tests/isolation/{module}", timeout=280)

    assert done.returncode == 0, done.stdout[-8000:]
    suite = ElementTree.parse(report).getroot()[0]
    skipped = sorted({each.get("message", "") for each in suite.iter("skipped")})
    if int(suite.get("skipped", 0)) == int(suite.get("tests", 0)):
        pytest.skip(f"none of them can be run by an ordinary user here: {', '.join(skipped)}")
    if skipped:
        print(f"{suite.get('skipped')} were not run: {', '.join(skipped)}")
