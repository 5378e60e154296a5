"""Computes a checksum of a batch, by which neighbouring stages check that they got the same one."""

from __future__ import annotations

import dataclasses
import numbers
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sg.batch.attributes import attributes_of
from lightning_sg.subclasses import plain_tensor

_SAMPLED = 1024  # about how many values of each tensor enter the checksum
_MOST_OBJECTS = 10_000  # that are looked into; a batch that refers to much else is not read whole in every step


def fingerprint(batch: Any) -> int:
    """Computes a checksum from a sample of each tensor's values. Different batches share it only by chance.

    Args:
        batch: Tensors, arrays, numbers and strings in any nesting of sequences, mappings, dataclasses and other
            objects. Of an object's private attributes, which may hold times and addresses, numbers and strings do not
            count.
    """
    checksum = 0
    waiting = [batch]
    seen: dict[int, Any] = {}  # objects; they may refer to each other
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            checksum = zlib.crc32(_sample(part), checksum)
        elif isinstance(part, np.ndarray) and part.dtype.kind in "biufSU":
            flat = part.reshape(-1)
            sample = flat[:: max(1, flat.size // _SAMPLED)]
            checksum = zlib.crc32(str((part.shape, part.dtype)).encode() + sample.tobytes(), checksum)
        elif isinstance(part, (str, bytes, numbers.Number)):
            checksum = zlib.crc32(repr(part).encode(), checksum)
        elif isinstance(part, Mapping):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple)):
            waiting += part
        elif isinstance(part, np.ndarray) and part.dtype.kind == "O":
            waiting += part.reshape(-1).tolist()
        elif id(part) not in seen and len(seen) < _MOST_OBJECTS:
            seen[id(part)] = part
            waiting += _parts_of(part)
    return checksum


def _parts_of(value: Any) -> list[Any]:
    """What an object holds: the fields of a dataclass, the attributes of any other."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, entry.name) for entry in dataclasses.fields(value) if hasattr(value, entry.name)]
    return [
        part
        for name, part in sorted(attributes_of(value).items())
        if not (name.startswith("_") and isinstance(part, (str, bytes, numbers.Number)))
    ]


def _sample(tensor: Tensor) -> bytes:
    """A tensor's shape and dtype, and some of its values if reading them does not synchronize a device."""
    form = str((tuple(tensor.shape), tensor.dtype)).encode()
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
        return form
    flat = plain_tensor(tensor).detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous()
    return form + sample.view(torch.uint8).numpy().tobytes()


__all__ = ["fingerprint"]
