"""Copies in the place of a module's parameters and buffers, for a step on values that changes nothing."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_sg.partition.replaced import ReplacedTensors


class CopiedTensors(ReplacedTensors):
    """Replaces the parameters and buffers of ``module`` by copies inside the context.

    Args:
        module: The module that owns the tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, _copy_of, lambda _held: True)


def _copy_of(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


__all__ = ["CopiedTensors"]
