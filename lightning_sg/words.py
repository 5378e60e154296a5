"""Short words about errors and times, for messages."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


__all__ = ["first_line"]
