"""Exact gradients in the stages before the loss: a batch's graph is kept until its gradient arrives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.crossings.exact_pass import Parameters
from lightning_sg.crossings.local import LocalCrossing
from lightning_sg.crossings.passing import Passing, passing
from lightning_sg.crossings.scale import GradientScale
from lightning_sg.training.record import Applied, Record


@dataclass
class KeptGraph:
    """One batch's forward pass through a process's stages, until its exact gradient arrives.

    Attributes:
        carriers: What was sent to the next stage and carries a gradient, with its graph: for each crossing, its own.
        crossings: Those of the boundaries between this process's own stages that the batch crossed.
        received: What was received from the stage before and carries a gradient, for each crossing of its boundary.
        scale: The factor on the gradients of the batch's own backward pass, which this one has on its way too.
        applies: What stages apply of the exact gradient.
    """

    carriers: list[list[Tensor]]
    crossings: Sequence[LocalCrossing]
    received: list[list[Tensor]]
    scale: GradientScale
    applies: Applied = Applied.DIFFERENCE

    @property
    def leaves(self) -> list[Tensor]:
        """What was received, of all crossings."""
        return [leaf for each in self.received for leaf in each]

    def backward(
        self, records: Sequence[Record], parameters: Parameters
    ) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Backpropagates exact minus used gradient, or the exact one where it is applied whole; then frees the graph.

        Boundaries on the way add their own exact minus used gradient, or let the exact one pass; their records get the
        exact targets.

        Args:
            records: Of the crossings of the boundary at the end of the graph, with their exact targets.
            parameters: Those that it is applied to.

        Returns:
            What goes to the stage before, for each leaf, its exact gradient minus target or its exact gradient; and
            what is applied to the parameters. Both of the mean loss.
        """
        whole = self.applies is Applied.WHOLE
        outputs, seeds = [], []
        for record, carriers in zip(records, self.carriers):
            entering = record.exact_targets if whole else record.residual
            if entering is None:
                continue
            scaled = self.scale.applied(entering, record.samples, [carrier.dtype for carrier in carriers])
            for carrier, seed in zip(carriers, scaled):
                if carrier.requires_grad:
                    outputs.append(carrier)
                    seeds.append(seed)
        local = [tensor for crossing in self.crossings for tensor in crossing.carriers]
        received = self.leaves
        inputs = [*local, *received, *parameters.values()]
        if not inputs or not outputs:
            return [None] * len(received), {}
        with passing(self.crossings, Passing.EXACT if whole else Passing.RESIDUAL):
            found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
        gradients = iter(self.scale.all_removed(found)[len(local) :])
        leaves: list[Tensor | None] = [next(gradients) for _ in received]
        corrections = {name: next(gradients) for name in parameters}
        return leaves, {name: gradient for name, gradient in corrections.items() if gradient is not None}


def keeping_weights(module: nn.Module) -> AbstractContextManager[Any]:
    """Makes autograd save copies of parameters and buffers, so that optimizer steps cannot corrupt a kept graph.

    The optimizer changes them in place before a kept graph is used, whose gradients are those of its own batch's
    weights.
    """
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if not _without_data(tensor)}

    def pack(tensor: Tensor) -> Tensor:
        shares = not _without_data(tensor) and tensor.untyped_storage().data_ptr() in storages
        # Detached: an operation that saves its own output would keep itself alive, in a cycle that Python does not see.
        return tensor.detach().clone() if shares else tensor.detach()

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _without_data(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided


__all__ = ["KeptGraph", "keeping_weights"]
