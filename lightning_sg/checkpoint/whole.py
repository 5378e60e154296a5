"""Gathers the whole model's state from its stages, as an undivided run would have it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_sg.lightning_api import pl
from lightning_sg.partition.placement import Placement
from lightning_sg.partition.replaced import named_tensors
from lightning_sg.transport import Chain


def gather_weights(module: pl.LightningModule, placement: Placement, chain: Chain) -> None:
    """Sends every parameter and buffer from the process that trains it to all others. A collective.

    Args:
        module: The module; afterwards it is whole on every process.
        placement: Which process holds what.
        chain: The processes of this replica.
    """
    last = placement.processes - 1
    tensors = {name: (tensor, placement.owner.get(name, last)) for name, tensor in named_tensors(module).items()}
    chain.spread("gathering weights", tensors, keeps=placement.shared)


def own_optimizer_state(
    optimizer: Optimizer, module: pl.LightningModule, placement: Placement, position: int
) -> dict[str, Any]:
    """The part of an optimizer's state that belongs to this process's stages, on the host.

    Every process has an optimizer over all parameters, though only those of its own stages get gradients. So parameters
    have the numbers of an undivided run, and the parts together are its state.
    """
    state = optimizer.state_dict()

    def is_foreign(name: str | None) -> bool:
        return name is not None and name in placement.owner and not placement.trains(position, name)

    names = {id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    foreign = {number for number, parameter in zip(numbers, parameters) if is_foreign(names.get(id(parameter)))}
    own = {number: value for number, value in state["state"].items() if number not in foreign}
    return {**state, "state": _on_host(own)}


def _on_host(state: dict[int, Any]) -> dict[int, Any]:
    return {
        number: {key: value.cpu() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state.items()
    }


__all__ = ["gather_weights", "own_optimizer_state"]
