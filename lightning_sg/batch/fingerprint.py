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

_SAMPLED = 1024  # about how many values of each tensor enter the checksum


def fingerprint(batch: Any) -> int:
    """Computes a checksum from a sample of each tensor's values. Different batches share it only by chance.

    Args:
        batch: Tensors, arrays, numbers and strings in any nesting of sequences, mappings and dataclasses. Other objects
            are ignored.
    """
    checksum = 0
    waiting = [batch]
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
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            waiting += [getattr(part, entry.name) for entry in dataclasses.fields(part)]
    return checksum


def _sample(tensor: Tensor) -> bytes:
    """A tensor's shape and dtype, and some of its values if reading them does not synchronize a device."""
    form = str((tuple(tensor.shape), tensor.dtype)).encode()
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
        return form
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous()
    return form + sample.view(torch.uint8).numpy().tobytes()


__all__ = ["fingerprint"]
