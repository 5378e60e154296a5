"""Copies in the place of a module's parameters and buffers, for a step on values that changes nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from torch import Tensor, nn


class CopiedTensors(AbstractContextManager["CopiedTensors"]):
    """Replaces the parameters and buffers of ``module`` by copies inside the context.

    Args:
        module: The module that owns the tensors.

    Attributes:
        origin: For the id of each copy, the tensor that it was made from.
    """

    def __init__(self, module: nn.Module) -> None:
        self.origin: dict[int, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        copies: dict[int, Tensor] = {}  # tied parameters stay tied
        for child in module.modules():
            for held in (child._parameters, child._buffers):
                for key, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in copies:
                        copy: Tensor = tensor.detach().clone()
                        if isinstance(tensor, nn.Parameter):
                            copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
                        copies[id(tensor)] = copy
                        self.origin[id(copy)] = tensor
                    self._places.append((held, key, tensor, copies[id(tensor)]))

    def __enter__(self) -> CopiedTensors:
        for held, key, _tensor, copy in self._places:
            held[key] = copy
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for held, key, tensor, _copy in self._places:
            held[key] = tensor


__all__ = ["CopiedTensors"]
