"""Finds tensors in a batch of any structure by identity, and the same place in the next batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sg.batch.attributes import stored_in
from lightning_sg.errors import SyntheticGradientsError

# A batch that has more objects than this in it is looked through only so far.
_MOST_OBJECTS = 10_000
_LEAVES = (str, bytes, int, float, complex, bool, type(None), np.ndarray, np.generic, nn.Module, type, torch.Generator)


@dataclass(frozen=True)
class Entry:
    """An entry by key or index, as in ``batch["x"]`` and ``batch[0]``."""

    key: Any

    def of(self, value: Any) -> Any:
        """The entry of ``value``."""
        return value[self.key]

    def __str__(self) -> str:
        return f"[{self.key!r}]" if not isinstance(self.key, str) else f'["{self.key}"]'


@dataclass(frozen=True)
class Attribute:
    """An attribute, as in ``batch.x``."""

    name: str

    def of(self, value: Any) -> Any:
        """The attribute of ``value``."""
        return getattr(value, self.name)

    def __str__(self) -> str:
        return f".{self.name}"


@dataclass(frozen=True)
class Path:
    """A place in a batch.

    Attributes:
        steps: The way from the batch to the place.
    """

    steps: tuple[Entry | Attribute, ...] = ()

    def of(self, batch: Any) -> Any:
        """What is at this place of a batch.

        Raises:
            SyntheticGradientsError: If the batch has no such place.
        """
        value = batch
        for step in self.steps:
            try:
                value = step.of(value)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise SyntheticGradientsError(
                    f"The first training batch had {self}, from which the predictors predict, but this batch, a "
                    f"{type(batch).__name__}, has not. Give every batch the same structure, or say what to predict "
                    "from: SyntheticGradients(context=lambda batch: ...)."
                ) from error
        return value

    def __str__(self) -> str:
        return f"batch{''.join(map(str, self.steps))}"


def tensors_in(batch: Any) -> Iterator[tuple[Path, Tensor]]:
    """All tensors in a batch, each once, with the shortest path to it.

    It looks into mappings, sequences, named tuples, data classes, and the attributes and slots of any other object.

    Args:
        batch: A batch as the user's step receives it.
    """
    pending: deque[tuple[Path, Any]] = deque([(Path(), batch)])
    seen: set[int] = set()
    while pending and len(seen) < _MOST_OBJECTS:
        path, value = pending.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield _plainest(path, value, batch), value
        else:
            pending.extend((Path((*path.steps, step)), part) for step, part in _parts(value))


def _plainest(path: Path, tensor: Tensor, batch: Any) -> Path:
    """The name that users write: containers such as PyG's ``Data`` offer their private entries as attributes."""
    last = path.steps[-1] if path.steps else None
    if len(path.steps) > 1 and isinstance(last, Entry) and isinstance(last.key, str):
        try:
            if getattr(batch, last.key, None) is tensor:
                return Path((Attribute(last.key),))
        except Exception:  # a property of the user's may raise anything
            return path
    return path


def _parts(value: Any) -> list[tuple[Entry | Attribute, Any]]:
    if isinstance(value, Mapping):
        return [(Entry(key), value[key]) for key in value]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(Attribute(name), getattr(value, name)) for name in value._fields]
    if isinstance(value, (list, tuple, deque)) or (isinstance(value, Sequence) and not hasattr(value, "__dict__")):
        return [(Entry(place), part) for place, part in enumerate(value)]
    stored = sorted(stored_in(value).items(), key=lambda part: part[0].startswith("_"))
    return [(Attribute(name), part) for name, part in stored if not callable(part) or isinstance(part, Tensor)]


__all__ = ["Attribute", "Entry", "Path", "tensors_in"]
