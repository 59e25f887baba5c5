"""Read and set the user's variables.

A value is a form and bytes, see ``values.py``. Few bytes go along with the call or its answer; many go in
parts, under a number that the program has chosen: :data:`Variables.functions` ``variables.part`` and
``variables.put``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from code_sandboxes.guest.calls import Call, Link

_MISSING: Any = object()


class Variables:
    """Read and set the user's variables.

    Args:
        namespace: gives the one that they stand in.
        values: the module ``values.py``.
    """

    # What they do with a large value takes its time, and so does the import of a library.
    in_threads = ("variables.get", "variables.set")

    def __init__(self, namespace: Callable[[], dict[str, Any]], values: Any) -> None:
        self.functions: Mapping[str, Callable[..., object]] = {
            "variables.get": self._get,
            "variables.part": self._part,
            "variables.put": self._put,
            "variables.set": self._set,
            "variables.release": self._release,
        }
        self._namespace = namespace
        self._values = values
        self._under_way: dict[tuple[Link, int], _UnderWay] = {}

    def close(self) -> None:
        self._under_way.clear()

    def _get(self, call: Call, variable: str, transfer: int, at_once: int) -> object:
        """The form of a variable and its size; its bytes come along if they are no more than *at_once*."""
        value = self._namespace().get(variable, _MISSING)
        if value is _MISSING:
            return {"missing": True}
        try:
            form, data = self._values.encode(value)
        except self._values.NotTransferable as error:
            return self._refused(error)
        if len(data) > at_once:
            self._keep(call.link, transfer, data)
        elif data:
            call.attach(bytes(data))
        return {"form": form, "size": len(data)}

    def _part(self, call: Call, transfer: int, offset: int, size: int) -> None:
        """So many bytes of a variable."""
        data = self._find(call, transfer).data
        call.attach(bytes(data[offset : offset + size]))

    def _put(self, call: Call, transfer: int, offset: int) -> None:
        """The next bytes of a value come along."""
        if offset == 0:
            self._keep(call.link, transfer, BytesIO())
        data = self._find(call, transfer).data
        if data.tell() != offset:
            raise LookupError("a part of a value is missing, or came twice")
        for buffer in call.buffers:
            data.write(buffer)

    def _set(self, call: Call, values: list[dict[str, Any]]) -> object:
        """Set variables, all or none; the bytes of each came in parts, or come along, in the same order."""
        decoded, buffers = {}, list(call.buffers)
        for each in values:
            data = self._data(call, each, buffers)
            try:
                decoded[each["name"]] = self._values.decode(each["form"], data)
            except self._values.NotTransferable as error:
                return {**self._refused(error), "name": each["name"]}
        self._namespace().update(decoded)
        return {}

    def _data(self, call: Call, value: Mapping[str, Any], buffers: list[Any]) -> BytesIO:
        if "transfer" not in value:
            return BytesIO(buffers.pop(0)) if value["size"] else BytesIO()
        kept = self._find(call, value["transfer"])
        self._release(call, value["transfer"])
        data: BytesIO = kept.data
        return data

    def _refused(self, error: Any) -> dict[str, object]:
        if isinstance(error, self._values.NotInstalled):
            how = "{} in the sandbox; install_packages([{!r}]) does it"
            return {"refused": how.format(error, error.package)}
        return {"refused": str(error)}

    def _find(self, call: Call, transfer: int) -> _UnderWay:
        found = self._under_way.get((call.link, transfer))
        if found is None:
            raise LookupError("the transfer of this value was cut off")
        return found

    def _keep(self, link: Link, transfer: int, data: Any) -> None:
        kept = _UnderWay(data, lambda: self._under_way.pop((link, transfer), None))
        self._under_way[link, transfer] = kept
        link.on_close.append(kept.forget)
        if link.is_closed:  # it has called what it had by then
            kept.forget()

    def _release(self, call: Call, transfer: int) -> None:
        """It is over with this transfer."""
        kept = self._under_way.pop((call.link, transfer), None)
        if kept is not None and kept.forget in call.link.on_close:
            call.link.on_close.remove(kept.forget)


class _UnderWay:
    """A value of which parts come or go."""

    def __init__(self, data: Any, forget: Callable[[], object]) -> None:
        self.data = data
        self.forget = forget
