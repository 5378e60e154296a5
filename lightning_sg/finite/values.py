"""Finds NaN and infinity in tensors and in structures of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_DEEPEST = 8  # a structure that contains itself ends here


def named_tensors(value: Any, path: str = "batch", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a batch, each with its path, such as ``batch[0]`` or ``batch['x']``."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth == _DEEPEST or isinstance(value, (str, bytes)):
        return
    for where, part in _parts(value):
        yield from named_tensors(part, f"{path}{where}", depth + 1)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", part) for name, part in zip(value._fields, value)]
    if isinstance(value, (list, tuple)):
        return [(f"[{place}]", part) for place, part in enumerate(value)]
    if is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name, None)) for field in fields(value)]
    return [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, Tensor)]


def count_of_bad(tensor: Tensor) -> int:
    """How many values of a tensor are NaN or infinite; waits for its device."""
    dense = _dense(tensor)
    if not (dense.is_floating_point() or dense.is_complex()):
        return 0
    return int(dense.numel() - dense.isfinite().sum())


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors are free of NaN and infinity. On a CPU their norm tells; waits for any other device."""
    every = [_dense(tensor) for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    if not every or math.isfinite(torch.nn.utils.get_total_norm(every).item()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in every)  # finite values can have an infinite norm


def are_finite_on_device(tensors: Iterable[Tensor]) -> Tensor:
    """The same as a boolean scalar on the device, without a wait; tensors whose norm overflows count as infinite."""
    parts = [_dense(tensor) for tensor in tensors]
    return torch.nn.utils.get_total_norm(
        [part.float() if part.dtype == torch.float16 else part for part in parts]
    ).isfinite()


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().coalesce().values() if tensor.layout == torch.sparse_coo else tensor


__all__ = ["are_finite", "are_finite_on_device", "count_of_bad", "named_tensors"]
