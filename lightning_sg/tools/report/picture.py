"""A picture of a report, without the library that drew it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Picture:
    """A picture with its heading and its caption.

    Attributes:
        name: The name of its file, without the suffix.
        title: Its heading.
        caption: How to read it.
        png: The image.
    """

    name: str
    title: str
    caption: str
    png: bytes


__all__ = ["Picture"]
