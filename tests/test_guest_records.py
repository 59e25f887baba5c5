"""What a service leaves out goes along in a text, which comes through the service as it is."""

from __future__ import annotations

import pickle

import pytest

from code_sandboxes.guest import records


@pytest.mark.parametrize("size", [*range(1700, 1960), 48_000, 49_000, 200_000])
def test_no_pickle_of_it_has_what_the_service_takes_for_its_end(size: int) -> None:
    head = {"names": ["x"]}
    text = records._text(head, b"v" * size, b"")

    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert b"\0\n" not in pickle.dumps(text, protocol)
    assert records._read(text) == (head, b"v" * size, b"")


def test_some_pickles_would_have_it() -> None:
    """Else the test above says nothing."""
    plain = [pickle.dumps("x" * size) for size in range(2400, 2700)]
    assert any(b"\0\n" in each for each in plain)


@pytest.mark.parametrize("value", [None, 5, "", "code_sandboxes-record-1", "code_sandboxes-record-2 e30="])
def test_anything_else_is_no_record(value: object) -> None:
    assert records._read(value) is None
