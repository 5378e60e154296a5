"""Overrides attributes of modules and other objects for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def shadowed(shadows: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Sets attributes on instances inside the context, given as instance, name and value.

    Attributes that an instance had are restored: compiled modules and some users set ``forward`` on the instance.
    """
    before = [(child, name, child.__dict__.get(name, _ABSENT)) for child, name, _shadow in shadows]
    for child, name, shadow in shadows:
        object.__setattr__(child, name, shadow)
    try:
        yield
    finally:
        for child, name, value in before:
            if value is _ABSENT:
                object.__delattr__(child, name)
            else:
                object.__setattr__(child, name, value)


__all__ = ["shadowed"]
