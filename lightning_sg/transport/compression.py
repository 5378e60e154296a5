"""Fewer bytes for activations and targets on their way: as bfloat16, or as int8 with a scale for each block."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

#: How floating-point tensors travel: as they are, as bfloat16, or as int8.
Coding = Literal["full", "bf16", "int8"]
CODINGS: tuple[Coding, ...] = get_args(Coding)

_BLOCK = 256  # values that share a scale: four bytes more on 256


def coding_for(dtype: torch.dtype, wanted: Coding) -> Coding:
    """How a tensor of this type travels: one that would not get smaller, as it is."""
    smaller = {"full": dtype.itemsize, "bf16": torch.bfloat16.itemsize, "int8": torch.int8.itemsize}[wanted]
    return wanted if dtype.is_floating_point and smaller < dtype.itemsize else "full"


def encode(tensor: Tensor, coding: Coding) -> list[Tensor]:
    """The tensors to send for a contiguous one.

    ``"bf16"`` keeps the range of float32 and eight bits of each value. ``"int8"`` rounds to 255 levels between plus
    and minus the largest value of a block of 256 neighbours in memory, as Dettmers et al. 2022, *8-bit Optimizers via
    Block-wise Quantization* (arXiv 2110.02861), do with evenly spaced levels. What is not finite stays so: as a NaN
    for its whole block.
    """
    if coding == "full":
        return [tensor]
    if coding == "bf16":
        return [tensor.bfloat16()]
    values = tensor.flatten().float()
    padded = torch.nn.functional.pad(values, (0, -values.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = padded.abs().amax(dim=1) / 127
    # A block of zeros has scale 0; what an infinite scale makes of values does not matter, they come back as NaN.
    levels = (padded / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).nan_to_num().round()
    return [levels.to(torch.int8).flatten()[: values.numel()].contiguous(), scales]


def empty_parts(shape: list[int], dtype: torch.dtype, coding: Coding, device: torch.device) -> list[Tensor]:
    """Where to receive what :func:`encode` makes of a tensor with this shape and type."""
    if coding == "full":
        return [torch.empty(shape, dtype=dtype, device=device)]
    if coding == "bf16":
        return [torch.empty(shape, dtype=torch.bfloat16, device=device)]
    count = torch.Size(shape).numel()
    scales = torch.empty(-(-count // _BLOCK), device=device)
    return [torch.empty(count, dtype=torch.int8, device=device), scales]


def decode(parts: list[Tensor], shape: list[int], dtype: torch.dtype, coding: Coding) -> Tensor:
    """The inverse of :func:`encode`, up to rounding."""
    if coding != "int8":
        return parts[0].to(dtype)
    levels, scales = parts
    padded = torch.nn.functional.pad(levels, (0, -levels.numel() % _BLOCK)).view(-1, _BLOCK)
    return (padded * scales.unsqueeze(1)).flatten()[: levels.numel()].view(shape).to(dtype)


__all__ = ["CODINGS", "Coding", "coding_for", "decode", "empty_parts", "encode"]
