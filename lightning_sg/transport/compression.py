"""Sends activations and targets in fewer bytes: as bfloat16, or as int8 with a scale for each block."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

#: How floating-point tensors travel: unchanged, as bfloat16, or as int8.
Compression = Literal["full", "bf16", "int8"]
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

_BLOCK = 256  # values that share a scale: four bytes more on 256


def compression_for(dtype: torch.dtype, wanted: Compression) -> Compression:
    """How a tensor of this type travels: unchanged if compression would not make it smaller."""
    smaller = {"full": dtype.itemsize, "bf16": torch.bfloat16.itemsize, "int8": torch.int8.itemsize}[wanted]
    return wanted if dtype.is_floating_point and smaller < dtype.itemsize else "full"


def compress(tensor: Tensor, compression: Compression) -> list[Tensor]:
    """The tensors to send for a contiguous one.

    ``"bf16"`` keeps the range of float32 and eight bits of each value. ``"int8"`` rounds to 255 levels between plus
    and minus the largest value of a block of 256 neighbours in memory, as Dettmers et al. 2022, *8-bit Optimizers via
    Block-wise Quantization* (arXiv 2110.02861), do with evenly spaced levels. A block with a value that is not finite
    arrives as NaN.
    """
    if compression == "full":
        return [tensor]
    if compression == "bf16":
        return [tensor.bfloat16()]
    values = tensor.flatten().float()
    padded = torch.nn.functional.pad(values, (0, -values.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = padded.abs().amax(dim=1) / 127
    # A block of zeros has scale 0. Values under an infinite scale do not matter: they come back as NaN.
    levels = (padded / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).nan_to_num().round()
    return [levels.to(torch.int8).flatten()[: values.numel()].contiguous(), scales]


def empty_parts(shape: list[int], dtype: torch.dtype, compression: Compression, device: torch.device) -> list[Tensor]:
    """Empty tensors to receive what :func:`compress` makes of a tensor with this shape and type."""
    if compression == "full":
        return [torch.empty(shape, dtype=dtype, device=device)]
    if compression == "bf16":
        return [torch.empty(shape, dtype=torch.bfloat16, device=device)]
    count = torch.Size(shape).numel()
    scales = torch.empty(-(-count // _BLOCK), device=device)
    return [torch.empty(count, dtype=torch.int8, device=device), scales]


def decompress(parts: list[Tensor], shape: list[int], dtype: torch.dtype, compression: Compression) -> Tensor:
    """The inverse of :func:`compress`, up to rounding."""
    if compression != "int8":
        return parts[0].to(dtype)
    levels, scales = parts
    padded = torch.nn.functional.pad(levels, (0, -levels.numel() % _BLOCK)).view(-1, _BLOCK)
    return (padded * scales.unsqueeze(1)).flatten()[: levels.numel()].view(shape).to(dtype)


__all__ = ["COMPRESSIONS", "Compression", "compress", "compression_for", "decompress", "empty_parts"]
