"""Looks up entries of a batch by key, index or function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_sg.errors import SyntheticGradientsError


def entry_of(batch: Any, source: str | int | Callable[[Any], Any], option: str) -> Any:
    """Takes an entry from a batch.

    Args:
        batch: What the data loader gave.
        source: A key or an index of the batch, or a function of it.
        option: The argument that names the entry, for messages.

    Raises:
        SyntheticGradientsError: If the batch has no such key or index.
    """
    if callable(source):
        return source(batch)
    try:
        return batch[source]
    except (KeyError, IndexError, TypeError) as error:
        kind = f"keys {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise SyntheticGradientsError(f"{option}: the batch has no such entry ({kind}).") from error


__all__ = ["entry_of"]
