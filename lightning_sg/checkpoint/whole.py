"""Gathers the whole model's state from its stages, as an undivided run would have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_sg.partition.placement import Placement

Key = TypeVar("Key")


def gather_weights(module: pl.LightningModule, placement: Placement, ranks: Sequence[int], group: Any) -> None:
    """Sends every parameter and buffer from the process that trains it to all others. A collective.

    Args:
        module: The module; afterwards it is whole on every process.
        placement: Which process holds what.
        ranks: The global ranks in the order of the stages.
        group: A gloo group of these.
    """
    tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        owner = ranks[placement.owner.get(name, placement.processes - 1)]
        on_host = tensor.detach().cpu().contiguous()
        dist.broadcast(on_host, src=owner, group=group)
        if dist.get_rank() != owner and name not in placement.shared:
            tensor.data.copy_(on_host)


def own_optimizer_state(
    optimizer: Optimizer, module: pl.LightningModule, placement: Placement, position: int
) -> dict[str, Any]:
    """The part of an optimizer's state that belongs to this process's stages, on the host.

    Every process has an optimizer over all parameters, though only those of its own stages get gradients. So parameters
    have the numbers of an undivided run, and :func:`gather_union` makes its state from the parts.
    """
    state = optimizer.state_dict()
    elsewhere = placement.elsewhere(position)
    names = {id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    foreign = {number for number, parameter in zip(numbers, parameters) if names.get(id(parameter)) in elsewhere}
    own = {number: value for number, value in state["state"].items() if number not in foreign}
    return {**state, "state": _on_host(own)}


def gather_union(own: dict[Key, Any], group: Any, to: int) -> dict[Key, Any]:
    """The union of the group's disjoint dicts on global rank ``to``; elsewhere, the process's own. A collective."""
    gathered: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank() == to else None
    dist.gather_object(own, gathered, dst=to, group=group)
    return {key: value for part in gathered or [own] for key, value in part.items()}


def _on_host(state: dict[int, Any]) -> dict[int, Any]:
    return {
        number: {key: value.cpu() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state.items()
    }


__all__ = ["gather_union", "gather_weights", "own_optimizer_state"]
