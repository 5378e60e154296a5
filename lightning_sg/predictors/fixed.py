"""Predictors without parameters: no gradient, and the true one."""

from __future__ import annotations

from typing import Any

from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo


class ZeroPredictor(GradientPredictor):
    """No gradient crosses the boundary: exactly as if the activations were detached."""

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


__all__ = ["TrueGradient", "ZeroPredictor"]
