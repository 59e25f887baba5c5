"""Turn objects into MIME bundles, as IPython does, for code that runs without an IPython.

Source: IPython documentation, section "Integrating your objects with IPython" (``_repr_html_()`` and its
kin); messaging documentation, sections "Display data" and "Execution results".
"""

from __future__ import annotations

import base64
import json
import numbers
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from code_sandboxes.inprocess.gate import uninterrupted

__all__ = ["Bundle", "as_sent", "bundle_of"]

Bundle = Mapping[str, object]

# What IPython shows as repr() does; it takes 0.2 s to import.
_PLAIN = (bool, int, float, complex, str, bytes)


def bundle_of(value: object, include: Any = None, exclude: Any = None) -> tuple[Bundle, Bundle]:
    """The data and metadata that show *value*; both are empty if it has shown itself."""
    if type(value) in _PLAIN and include is None and exclude is None:
        try:
            return {"text/plain": repr(value)}, {}
        except ValueError:  # an int of too many digits (sys.set_int_max_str_digits): IPython says so
            pass
    with uninterrupted():
        formatter = _formatter()
    data, metadata = formatter.format(value, include=include, exclude=exclude)
    return data, metadata


@cache
def _formatter() -> Any:  # IPython's own annotations are few
    from IPython.core.formatters import DisplayFormatter

    formatter = DisplayFormatter()
    formatter.formatters["image/png"].for_type_by_name("matplotlib.figure", "Figure", _png_of_figure)
    return formatter


def _png_of_figure(figure: Any) -> object:
    from IPython.core import pylabtools

    encode: Any = pylabtools.print_figure
    return encode(figure, "png")


def as_sent(bundle: Bundle) -> dict[str, object]:
    """*bundle* as it would come over a wire: nothing in it can change any more, or run code where it is read.

    Raises:
        TypeError: something in it is no JSON, and nothing that ipykernel makes JSON of.
    """
    return {_text(key): _sent(value) for key, value in bundle.items()}


def _sent(value: object) -> object:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    # JSON has neither NaN nor infinity: ipykernel sends Python's names for them.
    return json.loads(json.dumps(value, default=_nearly_json), parse_constant=lambda name: repr(float(name)))


def _nearly_json(value: object) -> object:
    """As jupyter_client has it, with which ipykernel sends; numpy's numbers and arrays are among these."""
    if isinstance(value, bytes):
        return _sent(value)
    if isinstance(value, Iterable):
        return list(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"an object of type {type(value).__name__} is no JSON")


def _text(value: object) -> str:
    return str.__str__(value if isinstance(value, str) else str(value))
