"""Many messages in one, as ``guest/envelopes.py`` sends them; nothing in it is believed before it fits."""

from __future__ import annotations

from code_sandboxes.protocol.messages import Message
from code_sandboxes.protocol.wire import MalformedMessageError, message_of

__all__ = ["opened"]

_MOST_MESSAGES = 65536


def opened(envelope: Message) -> list[Message]:
    """The messages that are in *envelope*, a ``comm_msg`` on iopub.

    Raises:
        MalformedMessageError: it is none.
    """
    data = envelope.content.get("data")
    sizes = data.get("messages") if isinstance(data, dict) else None
    if not isinstance(sizes, list) or not len(sizes) <= _MOST_MESSAGES or len(envelope.buffers) != 1:
        raise MalformedMessageError("an envelope without sizes or content")
    content = memoryview(envelope.buffers[0])
    messages = []
    position = 0
    for parts_sizes in sizes:
        parts = []
        if not isinstance(parts_sizes, list) or len(parts_sizes) < 4:
            raise MalformedMessageError("a message in an envelope that has too few parts")
        for size in parts_sizes:
            if not isinstance(size, int) or not 0 <= size <= len(content) - position:
                raise MalformedMessageError("sizes in an envelope that do not fit")
            parts.append(content[position : position + size])
            position += size
        # Copied, so that nothing that is kept of one message keeps all the others.
        pieces = [bytes(part) for part in parts]
        messages.append(message_of("iopub", pieces[:4], pieces[4:]))
    return messages
