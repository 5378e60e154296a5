"""Weighs the newest batch's gradients where late ones are added to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class NewestGradient:
    """Weighs what one batch's backward passes add to the gradients of parameters.

    The weights count while a backward pass of the batch is going on, before gradients are accumulated, averaged over
    replicas or clipped. What the pass sends to the stage before is the whole gradient: it is not weighed.

    Args:
        weights: For each parameter that is weighed, by what.
    """

    def __init__(self, weights: Sequence[tuple[nn.Parameter, float]] = ()) -> None:
        self._weights = weights
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """A backward pass of the batch is about to begin."""
        self.end()
        self._hooks = [parameter.register_hook(partial(_weighed, weight)) for parameter, weight in self._weights]

    def end(self) -> None:
        """The backward pass is over, or was broken off."""
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()


def _weighed(weight: float, gradient: Tensor | None) -> Tensor | None:
    """Autograd has no gradient at all for a parameter whose stage is given none."""
    return None if gradient is None else gradient * weight


__all__ = ["NewestGradient"]
