"""Exact gradients where the loss is: one more backward pass that no boundary stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_sg.crossings.passing import PassedBackward, Passing, passing
from lightning_sg.crossings.scale import GradientScale
from lightning_sg.training.record import Applied

Parameters = dict[str, nn.Parameter]


@dataclass
class ExactPass:
    """What the backward pass found, which comes before the batch's own.

    Attributes:
        leaves: The exact gradients of the mean loss with respect to what was received from the stage before.
        parameters: Those with respect to parameters of stages that are given a synthetic gradient.
        before: The gradients of these parameters before the batch's own backward pass.
    """

    leaves: list[Tensor | None] = field(default_factory=list)
    parameters: dict[str, Tensor | None] = field(default_factory=dict)
    before: dict[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    def run(
        cls,
        loss: Tensor,
        crossings: Sequence[PassedBackward],
        leaves: Sequence[Tensor],
        parameters: Parameters,
        scale: GradientScale,
    ) -> ExactPass:
        """Goes backward from ``loss``, whose graph is kept for the batch's own backward pass.

        Args:
            loss: The loss, times the scale.
            crossings: Those of the boundaries in this process that the batch crossed; their records get the exact
                targets.
            leaves: What was received from the stage before.
            parameters: Those to be corrected later.
            scale: The factor on the loss.
        """
        if not crossings or not loss.requires_grad:
            return cls()  # with no boundary on the way, the batch's own backward pass has the exact gradients
        carriers = [tensor for crossing in crossings for tensor in crossing.carriers]
        inputs = [*carriers, *leaves, *parameters.values()]
        for crossing in crossings:  # the backward pass does not reach one that the loss does not depend on
            crossing.expect_exact()
        # The carriers are asked for only so that the pass reaches the boundaries. What arrives there is the exact
        # target; the gradient of a carrier also contains what comes by way of others that depend on it.
        with passing(crossings, Passing.EXACT):
            gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        found = iter(scale.all_removed(gradients)[len(carriers) :])
        before = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        return cls([next(found) for _ in leaves], {name: next(found) for name in parameters}, before)

    def applied(self, parameters: Parameters, scale: GradientScale, applies: Applied) -> dict[str, Tensor]:
        """After the batch's own backward pass: what is to be applied late to each parameter.

        Args:
            parameters: Those that anything is applied to.
            scale: The factor on the loss.
            applies: Whether that is the exact gradient, or exact minus given gradient.
        """
        if applies is Applied.WHOLE:
            exact_ones = {name: self.parameters.get(name) for name in parameters}
            return {name: exact.detach() for name, exact in exact_ones.items() if exact is not None}
        return self._differences(parameters, scale)

    def _differences(self, parameters: Parameters, scale: GradientScale) -> dict[str, Tensor]:
        corrections = {}
        for name, parameter in parameters.items():
            exact, before, after = self.parameters.get(name), self.before.get(name), parameter.grad
            given = None if after is None else (after if before is None else after - before) / scale.factor
            if exact is not None and given is not None:
                corrections[name] = (exact - given).detach()
            elif exact is not None or given is not None:
                corrections[name] = exact.detach() if exact is not None else -given.detach()  # type: ignore[union-attr]
        return corrections


def without_overflow(corrections: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero in the place of an overflow under mixed precision, which the gradient scaler skips."""
    return {name: torch.where(c.isfinite(), c, torch.zeros_like(c)) for name, c in corrections.items()}


__all__ = ["ExactPass", "Parameters", "without_overflow"]
