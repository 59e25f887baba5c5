"""What can go wrong with a message on its way out."""

from __future__ import annotations

__all__ = ["MessageTooLargeError", "PlaceGoneError"]


class MessageTooLargeError(ValueError):
    """A message for which there is no way: who is in between would not take one of that size."""


class PlaceGoneError(ConnectionError):
    """There is nobody to connect to, and there will not be."""
