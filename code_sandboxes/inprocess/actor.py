"""A kernel in this process as its code sees it: the streams and functions that are the kernel's own."""

from __future__ import annotations

import builtins
import functools
import io
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Protocol

from code_sandboxes.inprocess import stage
from code_sandboxes.inprocess.display import Bundle, as_sent, bundle_of
from code_sandboxes.inprocess.gate import uninterrupted
from code_sandboxes.inprocess.streams import AskingStream, TellingStream

__all__ = ["Actor", "Audience"]


class Audience(Protocol):
    """Who hears what the code says."""

    def hear(self, stream: str, text: str) -> None: ...

    def see(self, msg_type: str, content: Mapping[str, object]) -> None: ...

    def answer(self, prompt: str, *, password: bool) -> str: ...


class Actor:
    """What the code of one kernel prints to, reads from, and shows things with."""

    def __init__(self, audience: Audience) -> None:
        self._audience = audience
        self._pid = os.getpid()
        self.stdout = self.__stdout__ = TellingStream("stdout", functools.partial(self._write, "stdout"))
        self.stderr = self.__stderr__ = TellingStream("stderr", functools.partial(self._write, "stderr"))
        self.stdin = self.__stdin__ = AskingStream(self.input)

    def namespace(self) -> dict[str, object]:
        """A new one for variables: only its builtins differ from those of any other module."""
        own = ModuleType("builtins", builtins.__doc__)
        vars(own).update(vars(builtins))
        vars(own).update(print=self._print_function(), input=self._input_function(), display=self.display)
        return {"__name__": "__main__", "__doc__": None, "__builtins__": own}

    def _write(self, stream: str, text: str) -> None:
        """For whoever calls: what code keeps of its streams (a handler of logging) others write to, too."""
        who = stage.acting.get()
        if who is not None:
            who.tell(stream, text)
        elif (theirs := getattr(sys, stream)) is not None:
            theirs.write(text)

    def tell(self, stream: str, text: str) -> None:
        with uninterrupted():
            self._audience.hear(stream, text)

    def _print_function(self) -> Callable[..., None]:
        """``print()``, of threads that outlive their run too: no stage is set for them any more.

        What one call prints stays together, whatever other threads print.
        """

        @functools.wraps(builtins.print)
        def print(*values: object, file: Any = None, flush: bool = False, **settings: Any) -> None:
            if file is None and os.getpid() == self._pid:
                file = self.stdout
            if not isinstance(file, TellingStream):
                builtins.print(*values, file=file, flush=flush, **settings)
                return
            text = io.StringIO()
            builtins.print(*values, file=text, **settings)
            before = stage.acting.set(self)  # a thread that such a thread has started does not inherit it
            try:
                file.write(text.getvalue())
            finally:
                stage.acting.reset(before)

        return print

    def _input_function(self) -> Callable[..., str]:
        @functools.wraps(builtins.input)
        def input(prompt: object = "", /) -> str:
            return self.input(str(prompt))

        return input

    def input(self, prompt: str = "") -> str:
        with uninterrupted():
            return self._audience.answer(prompt, password=False)

    def getpass(self, prompt: str = "Password: ", stream: object = None) -> str:
        with uninterrupted():
            return self._audience.answer(str(prompt), password=True)

    # IPython's display functions, by their names there.

    def display(
        self,
        *objs: object,
        include: Any = None,
        exclude: Any = None,
        metadata: Bundle | None = None,
        transient: Bundle | None = None,
        display_id: str | bool | None = None,
        raw: bool = False,
        clear: bool = False,
        **kwargs: Any,
    ) -> object:
        """Show objects; with *display_id* what is shown can be updated, by the handle that is returned."""
        settings = {"transient": dict(transient or {}), "update": kwargs.get("update", False)}
        if display_id:
            display_id = os.urandom(16).hex() if display_id is True else display_id
            settings["transient"]["display_id"] = display_id
        if settings["update"] and "display_id" not in settings["transient"]:
            raise TypeError("display_id required for update_display")
        if clear:
            self.clear_output(wait=True)
        for each in objs or ([{}] if display_id else []):
            shown: tuple[Any, Any] = (each, {}) if raw or not objs else bundle_of(each, include, exclude)
            if shown[0] or raw or not objs:
                self.publish_display_data(shown[0], {**shown[1], **(metadata or {})}, **settings)
        return _handle(display_id) if display_id else None

    def publish_display_data(
        self,
        data: Bundle,
        metadata: Bundle | None = None,
        *,
        transient: Bundle | None = None,
        update: bool = False,
        **_: object,
    ) -> None:
        """Show a MIME bundle."""
        content = {
            "data": as_sent(data),
            "metadata": as_sent(metadata or {}),
            "transient": as_sent(transient or {}),
        }
        with uninterrupted():
            self._audience.see("update_display_data" if update else "display_data", content)

    def clear_output(self, wait: bool = False) -> None:
        """Clear what the run has shown, now or with *wait* when there is something new."""
        with uninterrupted():
            self._audience.see("clear_output", {"wait": bool(wait)})


def _handle(display_id: object) -> object:
    with uninterrupted():
        from IPython.display import DisplayHandle

    return DisplayHandle(display_id)  # type: ignore[no-untyped-call]  # IPython's
