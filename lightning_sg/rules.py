"""Predictors without parameters: no gradient, the true one, and the true one late."""

from __future__ import annotations

from typing import Any

from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo


class ZeroPredictor(GradientPredictor):
    """No gradient crosses the boundary: exactly as if the activations were detached. ``Detach`` is the same class."""

    needs_target = False

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Needs nothing."""

    def forward(self, activations: Gradients, context: Any) -> None:
        """Returns ``None``: no gradient."""
        return None


class TrueGradient(GradientPredictor):
    """The stage above waits for the true gradient: plain backpropagation through the boundary.

    In one process the result is that of the undivided network bit for bit. Between processes the stages run
    one after the other (backward locking), so this is for comparison, not for speed.
    """

    exact = True

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Needs nothing."""

    def forward(self, activations: Gradients, context: Any) -> None:
        """Is not called: the boundary passes the target on."""
        raise AssertionError("the boundary passes the target on instead of asking for a prediction")


class DelayedGradient(GradientPredictor):
    """The stage above goes on at once, and applies the true gradient when it arrives, some steps late.

    Nothing is predicted and nothing learned. With ``shrink=1`` this is the decoupled parallel backpropagation of
    Huo et al. 2018 (arXiv 1804.10574); smaller values are the gradient shrinking of Zhuang et al. 2019
    (arXiv 1906.09108), which keeps stages stable whose gradients are many steps late.

    Args:
        shrink: What a late gradient is multiplied by, above 0 and at most 1.

    Raises:
        ValueError: If ``shrink`` is out of range.
    """

    def __init__(self, shrink: float = 1.0) -> None:
        super().__init__()
        if not 0 < shrink <= 1:
            raise ValueError(f"DelayedGradient needs 0 < shrink <= 1, not {shrink}.")
        self.correction = self.shrink = float(shrink)

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Needs nothing."""

    def forward(self, activations: Gradients, context: Any) -> None:
        """Returns ``None``: no gradient until the true one is here."""
        return None


#: :class:`ZeroPredictor`, by the name of the operation it amounts to.
Detach = ZeroPredictor

__all__ = ["DelayedGradient", "Detach", "TrueGradient", "ZeroPredictor"]
