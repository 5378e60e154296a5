"""Gives a model that was made on the meta device memory and initial values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_sg.errors import PartitionError


def materialize(module: nn.Module) -> None:
    """Replaces every parameter and buffer on the meta device by a real one on the host, module by module.

    Each module initializes its own tensors with ``reset_parameters``, which torch's layers have and which Lightning's
    sharded strategies require too. The order is that of ``module.modules()``, in which most models make their layers:
    with the same seed they start as if they had been made on the host.

    Raises:
        PartitionError: If a module with parameters or buffers on the meta device has no ``reset_parameters``.
    """
    made: dict[int, nn.Parameter] = {}  # by id, so that tied parameters stay tied
    for name, child in module.named_modules():
        parameters = {key: value for key, value in child._parameters.items() if value is not None and value.is_meta}
        buffers = {key: value for key, value in child._buffers.items() if value is not None and value.is_meta}
        if not parameters and not buffers:
            continue
        if not callable(getattr(child, "reset_parameters", None)):
            raise PartitionError(
                f"Module '{name}' ({type(child).__name__}) has {sorted([*parameters, *buffers])} on the meta device "
                "and no `reset_parameters()` to initialize them. Write one, or make this module outside "
                "`torch.device('meta')`."
            )
        for key, parameter in parameters.items():
            new = made.get(id(parameter))
            if new is None:
                new = made[id(parameter)] = nn.Parameter(_empty(parameter), parameter.requires_grad)
            setattr(child, key, new)  # registers it, so that paging takes it
        for key, buffer in buffers.items():
            child._buffers[key] = _empty(buffer)
        child.reset_parameters()


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu")


__all__ = ["materialize"]
