"""Exact gradients at the boundaries: where the loss is, at once; in the stages before, when they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sg.crossings.local import LocalCrossing
from lightning_sg.crossings.step import unscaled
from lightning_sg.training import Record

Parameters = dict[str, nn.Parameter]


@dataclass
class ExactPass:
    """One more backward pass, before the batch's own, that no boundary stops.

    Attributes:
        leaves: The exact gradients of the mean loss with respect to what was received from the stage before.
        parameters: Those with respect to parameters of stages that are given a synthetic gradient.
    """

    leaves: list[Tensor | None] = field(default_factory=list)
    parameters: dict[str, Tensor | None] = field(default_factory=dict)
    _before: dict[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    def run(
        cls,
        loss: Tensor,
        crossings: Sequence[LocalCrossing],
        leaves: Sequence[Tensor],
        parameters: Parameters,
        scale: Tensor | float,
    ) -> ExactPass:
        """Goes backward from ``loss``, whose graph is kept for the batch's own backward pass.

        Args:
            loss: The loss, times ``scale``.
            crossings: The boundaries in this process; their records get the exact targets.
            leaves: What was received from the stage before.
            parameters: Those to be corrected later.
            scale: The factor on the loss.
        """
        if not crossings or not loss.requires_grad:
            return cls()  # with no boundary on the way, the batch's own backward pass has the exact gradients
        carriers = [tensor for crossing in crossings for tensor in crossing.carriers]
        inputs = [*carriers, *leaves, *parameters.values()]
        for crossing in crossings:  # one that the loss does not depend on is not reached
            crossing.record.exact_targets = crossing.record.per_sample([None for _ in crossing.carriers])
        # The carriers are asked for only so that the boundaries are reached: what arrives there is the exact target,
        # but the gradient of a carrier also has in it what comes by way of others that depend on it.
        with _passing(crossings, "exact"):
            gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        found = iter([None if each is None else unscaled(each, scale) for each in gradients][len(carriers) :])
        before = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        return cls([next(found) for _ in leaves], {name: next(found) for name in parameters}, before)

    def corrections(self, parameters: Parameters, scale: Tensor | float) -> dict[str, Tensor]:
        """After the batch's own backward pass: the exact gradients less those that it gave."""
        corrections = {}
        for name, parameter in parameters.items():
            exact, before, after = self.parameters.get(name), self._before.get(name), parameter.grad
            given = None if after is None else (after if before is None else after - before) / scale
            if exact is not None and given is not None:
                corrections[name] = (exact - given).detach()
            elif exact is not None or given is not None:
                corrections[name] = exact.detach() if exact is not None else -given.detach()  # type: ignore[union-attr]
            if name in corrections:  # an overflow under mixed precision, which the gradient scaler skips
                found = corrections[name]
                corrections[name] = torch.where(found.isfinite(), found, torch.zeros_like(found))
        return corrections


@dataclass
class KeptGraph:
    """One batch's forward pass through a process's stages, until its exact gradient arrives.

    Attributes:
        number: The number of the batch, for the neighbours.
        carriers: What was sent to the next stage and carries a gradient, with its graph.
        record: The batch at the boundary there.
        crossings: The boundaries between this process's own stages.
        leaves: What was received from the stage before and carries a gradient.
        scale: The factor on the gradients of the batch's own backward pass, which this one has on its way too.
    """

    number: int
    carriers: list[Tensor]
    record: Record
    crossings: list[LocalCrossing]
    leaves: list[Tensor]
    scale: Tensor | float

    def backward(self, parameters: Parameters) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Goes backward with what the exact gradient is more than the one used, and lets go of the graph.

        Boundaries on the way add what their own exact gradient is more than the one used there; their records get
        the exact targets.

        Args:
            parameters: Those to be corrected.

        Returns:
            What the exact gradients of the leaves are more than those sent as targets, and the corrections of the
            parameters; both of the mean loss.
        """
        record = self.record
        if record.exact_targets is None:
            return [None] * len(self.leaves), {}
        local = [tensor for crossing in self.crossings for tensor in crossing.carriers]
        inputs = [*local, *self.leaves, *parameters.values()]
        if not inputs:
            return [], {}
        outputs, excess = [], []
        for carrier, exact, used in zip(self.carriers, record.exact_targets, record.used):
            if carrier.requires_grad:
                outputs.append(carrier)
                excess.append(((exact - used) * (self.scale / record.samples)).to(carrier.dtype))
        with _passing(self.crossings, "excess"):
            scaled = torch.autograd.grad(outputs, inputs, excess, allow_unused=True)
        gradients = iter([None if gradient is None else unscaled(gradient, self.scale) for gradient in scaled])
        for _ in local:
            next(gradients)
        leaves: list[Tensor | None] = [next(gradients) for _ in self.leaves]
        found = {name: next(gradients) for name in parameters}
        return leaves, {name: gradient for name, gradient in found.items() if gradient is not None}


@contextmanager
def _passing(crossings: Sequence[LocalCrossing], how: Literal["exact", "excess"]) -> Iterator[None]:
    before = [crossing.passing for crossing in crossings]
    for crossing in crossings:
        crossing.passing = how
    try:
        yield
    finally:
        for crossing, passing in zip(crossings, before):
            crossing.passing = passing


def keeping_weights(module: nn.Module) -> AbstractContextManager[Any]:
    """While entered, what autograd saves of the module's parameters and buffers is a copy.

    The optimizer changes them in place before a kept graph is used, whose gradients are those of its own batch's
    weights.
    """
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if not _without_data(tensor)}

    def pack(tensor: Tensor) -> Tensor:
        shares = not _without_data(tensor) and tensor.untyped_storage().data_ptr() in storages
        # Detached: an operation that saves its own output would else keep itself alive, in a cycle unseen by Python.
        return tensor.detach().clone() if shares else tensor.detach()

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _without_data(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided


__all__ = ["ExactPass", "KeptGraph", "keeping_weights"]
