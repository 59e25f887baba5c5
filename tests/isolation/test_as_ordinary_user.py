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
        not_here("this is an ordinary user, so nobody runs these tests as root")
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
    options = ("-q", "-p", "no:cacheprovider", "--junitxml", str(report))

    done = somebody.run("-m", "pytest", *options, f"tests/isolation/{module}", timeout=280)

    suite = ElementTree.parse(report).getroot()[0] if report.exists() else {}
    if skipped := [each.get("message", "") for each in getattr(suite, "iter", list)("skipped")]:
        print(f"{len(skipped)} not run: {', '.join(sorted(set(skipped)))}")
    assert done.returncode == 0, done.stdout[-8000:]
    if int(suite.get("skipped", 0)) == int(suite.get("tests", 0)):
        pytest.skip(f"none of them can be run by an ordinary user here: {', '.join(sorted(set(skipped)))}")
