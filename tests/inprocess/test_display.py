"""Bundles: what shows an object, as JSON that nothing can change any more."""

from __future__ import annotations

import io
import math
import numbers
from collections.abc import Mapping
from contextlib import redirect_stderr
from fractions import Fraction

import pytest

from code_sandboxes.inprocess.display import as_sent, bundle_of


@pytest.mark.parametrize("value", [True, 5, 1.5, 2j, "text", b"octets"])
def test_plain_values_are_shown_as_repr_does(value: object) -> None:
    assert bundle_of(value) == ({"text/plain": repr(value)}, {})


def test_an_object_shows_itself_in_every_way_it_knows() -> None:
    class Page:
        def __repr__(self) -> str:
            return "a page"

        def _repr_html_(self) -> str:
            return "<p>"

        def _repr_png_(self) -> bytes:
            return b"\x89PNG"

    data, _ = bundle_of(Page())
    assert data == {"text/plain": "a page", "text/html": "<p>", "image/png": b"\x89PNG"}
    assert as_sent(data)["image/png"] == "iVBORw=="


def test_an_object_may_give_its_bundle_with_metadata() -> None:
    class Drawing:
        def _repr_mimebundle_(
            self, include: object, exclude: object
        ) -> tuple[Mapping[str, object], Mapping[str, object]]:
            return {"text/plain": "drawing", "image/svg+xml": "<svg>"}, {"image/svg+xml": {"width": 5}}

    assert bundle_of(Drawing()) == (
        {"text/plain": "drawing", "image/svg+xml": "<svg>"},
        {"image/svg+xml": {"width": 5}},
    )


def test_what_is_asked_for_is_given_and_what_is_not_is_not() -> None:
    class Page:
        def _repr_html_(self) -> str:
            return "<p>"

    assert bundle_of(Page(), include=["text/html"])[0] == {"text/html": "<p>"}
    assert "text/html" not in bundle_of(Page(), exclude=["text/html"])[0]
    assert bundle_of(5, include=["text/html"])[0] == {}


def test_an_object_that_has_shown_itself_is_not_shown_again() -> None:
    class Shown:
        def _ipython_display_(self) -> None:
            shown.append(self)

    shown: list[object] = []
    assert bundle_of(Shown()) == ({}, {})
    assert len(shown) == 1


class Broken:
    def __repr__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize("value", [10**5000, Broken()], ids=["a number of too many digits", "broken"])
def test_an_object_that_fails_to_show_itself_says_so_on_standard_error(value: object) -> None:
    with redirect_stderr(io.StringIO()) as errors:
        assert bundle_of(value) == ({}, {})
    assert "Traceback" in errors.getvalue()


def test_an_interrupt_while_an_object_shows_itself_is_none_of_its_errors() -> None:
    class Endless:
        def __repr__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle_of(Endless())


# As it is sent.


def test_what_was_sent_does_not_change_with_the_object() -> None:
    numbers = [1]
    sent = as_sent({"application/json": {"numbers": numbers}})
    numbers.append(2)

    assert sent == {"application/json": {"numbers": [1]}}


def test_text_of_a_subclass_is_sent_as_plain_text() -> None:
    class Text(str):
        def __str__(self) -> str:
            raise AssertionError("code of the text's own was run")

    (key, value), *_ = as_sent({Text("text/plain"): Text("a")}).items()
    assert (key, value) == ("text/plain", "a")
    assert (type(key), type(value)) == (str, str)


@numbers.Integral.register
class Five:
    """A number as those of numpy are: no int, but an integer."""

    def __int__(self) -> int:
        return 5


def test_what_is_nearly_json_is_sent_as_json() -> None:
    sent = as_sent(
        {
            "application/json": {
                "tuple": (1, 2),
                "range": range(2),
                "bytes": b"a",
                "nan": math.nan,
                "infinity": -math.inf,
                "integer": Five(),
                "real": Fraction(1, 2),
            }
        }
    )
    assert sent["application/json"] == {
        "tuple": [1, 2],
        "range": [0, 1],
        "bytes": "YQ==",
        "nan": "nan",
        "infinity": "-inf",
        "integer": 5,
        "real": 0.5,
    }


def test_what_is_no_json_is_refused_by_its_type() -> None:
    with pytest.raises(TypeError, match="an object of type object is no JSON"):
        as_sent({"application/json": [object()]})
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        as_sent({"application/json": loop})
