"""Start ipykernel without what a sandbox does not need, and with output that is not late.

Run as a script, in place of ``-m ipykernel_launcher``, by whatever Python the kernelspec names. Each change
is guarded: on an ipykernel that does not have what it changes, that version's own behaviour stays.
"""

from __future__ import annotations

import gc
import sys
import warnings
from types import ModuleType
from typing import Any, cast

# Seconds that ipykernel waits for more text before it publishes; 0.2 by default.
FLUSH_INTERVAL = 0.01


def import_kernelapp() -> ModuleType:
    """The module :mod:`ipykernel.kernelapp`, imported without debugpy: 55 ms that nobody uses here."""
    gc.disable()
    blocked = "debugpy" not in sys.modules
    if blocked:
        # None is what makes an import fail (Python reference, section "The module cache").
        sys.modules["debugpy"] = cast(ModuleType, None)
    try:
        import ipykernel.debugger  # noqa: F401  (it is imported now so that it finds no debugpy)
        from ipykernel import kernelapp
    finally:
        if blocked:  # the user's own code may import it
            sys.modules.pop("debugpy", None)
        gc.enable()
    return kernelapp


def publish_sooner() -> None:
    """Make a print arrive within milliseconds, and the end of a cell without empty flushes."""
    from ipykernel.iostream import OutStream

    if hasattr(OutStream, "flush_interval"):
        OutStream.flush_interval = FLUSH_INTERVAL
    if all(hasattr(OutStream, name) for name in ("flush", "_flush", "_flush_buffers", "_schedule_flush")):
        skip_empty_flushes(OutStream)


def skip_empty_flushes(out_stream: Any) -> None:
    """Let ``flush()`` return at once when there is nothing to flush.

    ipykernel flushes four times for each cell, each time waiting for another thread (0.6 ms in all).
    Nothing is to flush when nothing was written since the last flush *ended*: one that is still going on
    has emptied the buffers, but may not have handed over what was in them, and must not be overtaken.
    """
    flush, send = out_stream.flush, out_stream._flush

    def flush_if_needed(self: Any) -> None:
        if self._buffers or getattr(self, "_sending", 0):
            flush(self)

    def counted_send(self: Any) -> None:
        self._sending = getattr(self, "_sending", 0) + 1
        try:
            send(self)
        finally:
            self._sending -= 1

    out_stream.flush, out_stream._flush = flush_if_needed, counted_send


def main() -> None:
    """Start the kernel; returns when it ends."""
    # The folder of this script is no place for the user's imports to find anything.
    sys.path[:] = sys.path[1:]
    # sys.exit() is an outcome here, told as such; IPython's advice on how to leave a terminal is noise.
    warnings.filterwarnings("ignore", message="To exit: use", category=UserWarning)
    kernelapp = import_kernelapp()
    publish_sooner()
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    main()
