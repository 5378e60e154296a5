"""Zeros in the place of tensors without data, for operations whose result has a shape that depends on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import tree_map_only
from lightning_sg.batch.program import mapped
from lightning_sg.partition.fakes import is_fake


def with_zeros(func: Callable[..., Any], args: Any, kwargs: Any, fakes: list[Tensor]) -> Any:
    """What an operation returns for zeros in the place of tensors without data, as tensors without data."""

    def real(argument: Any) -> Any:
        if is_fake(argument):
            return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
        return argument

    mode, link = fakes[0].fake_mode, [fake for fake in fakes if fake.requires_grad]  # type: ignore[attr-defined]

    def fake(tensor: Tensor) -> Tensor:
        made: Tensor = mode.from_tensor(tensor)
        return made + link[0].sum() * 0 if link else made

    def without_data(tensor: Tensor) -> Tensor:
        return fake(tensor) if tensor.is_floating_point() else tensor  # lengths and places depend on the batch alone

    return tree_map_only(Tensor, without_data, func(*mapped(tuple(args), real), **mapped(kwargs, real)))


__all__ = ["with_zeros"]
