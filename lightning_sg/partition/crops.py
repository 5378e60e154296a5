"""Finds where, on the way to its loss, a network leaves positions of a sequence out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_sg.batch.program import Operation, Value
from lightning_sg.predictors.positions import Crop

_SPLITS = frozenset(["split", "split_with_sizes", "tensor_split", "chunk"])


def crop_of(output: Value, samples: int) -> Crop | None:
    """The last operation that made a sequence as short as an output of the network is.

    Args:
        output: The output: ``(N, T', ...)``, ``(N, K, T')`` or ``(N T', ...)``.
        samples: The number N of samples.

    Returns:
        Which positions it kept; ``None`` if the output is of the length that sequences have before.
    """
    if not samples or not output.shape:
        return None
    lengths = {size for size in output.shape[1:3] if output.shape[0] == samples}
    if output.shape[0] % samples == 0:
        lengths.add(output.shape[0] // samples)
    seen, pending = {output}, deque([output])
    while pending:
        value = pending.popleft()
        node = value.node
        if not isinstance(node, Operation):
            continue
        found = _crop(value, node)
        if found is not None and found.left in lengths and value.shape[0] == samples:
            return found
        new = [each for each in node.inputs if each.node.network and each not in seen]
        seen.update(new)
        pending.extend(new)
    return None


def _crop(value: Value, node: Operation) -> Crop | None:
    """The crop that an operation is, if it keeps a part of the second or a later dimension and all of the others."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Value) or len(source.shape) != len(value.shape):
        return None
    changed = [place for place, (had, has) in enumerate(zip(source.shape, value.shape)) if had != has]
    if len(changed) != 1 or changed[0] == 0 or value.shape[changed[0]] > source.shape[changed[0]]:
        return None
    (place,) = changed
    had, left = source.shape[place], value.shape[place]
    kept = _range(value, node, place, had)
    return None if kept is None else Crop(had, left, *kept)


def _range(value: Value, node: Operation, place: int, had: int) -> tuple[int | None, int | None] | None:
    """Start and stop of the range that an operation keeps in one dimension; ``None`` if it keeps no range."""
    left = value.shape[place]
    if node.name == "getitem":
        part = _index(node.args[1], len(value.shape))[place]
        if not isinstance(part, slice) or part.step not in (None, 1):
            return None
        start, stop = part.start, part.stop
        if not isinstance(start, Value) and not isinstance(stop, Value):
            return start, stop
        # An end that was computed is as far from the end of another sequence as it is here.
        if start is None:
            return None, left - had
        return (had - left, None) if stop is None else None
    if node.name == "narrow":
        start = node.args[2] if len(node.args) > 2 else node.kwargs.get("start")
    elif node.name in _SPLITS:
        start = sum(shape[place] for shape in node.shapes[: value.place or 0])
    else:
        return None
    if not isinstance(start, int):
        return None
    start += had if start < 0 else 0
    return (start, None) if start + left == had else (start or None, start + left - had)


def _index(index: Any, dimensions: int) -> Sequence[Any]:
    """An index with a part for each dimension; the parts of dimensions that are indexed otherwise mean nothing."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is None or isinstance(part, (bool, Value, Tensor, list)) for part in parts):
        return [None] * dimensions
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        parts[place : place + 1] = [slice(None)] * (dimensions - len(parts) + 1)
    return [*parts, *[slice(None)] * (dimensions - len(parts))]


__all__ = ["crop_of"]
