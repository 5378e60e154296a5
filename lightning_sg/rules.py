"""Fixed rules for the gradient that crosses a boundary, in the place of a predictor."""

from __future__ import annotations

from lightning_sg.arguments import checked, number


class BoundaryRule:
    """What a stage is given at its end without a prediction; the base class is for the rules of this package.

    Attributes:
        waits: Whether the stage waits for the true gradient and uses it.
    """

    waits = False

    def late_share(self, distance: int) -> float:
        """How much of the true gradient the stage applies when it arrives, some batches late.

        Args:
            distance: The number of boundaries from this one to the end of the network, this one included.
        """
        return 0.0


class ZeroPredictor(BoundaryRule):
    """No gradient crosses the boundary: exactly as if the activations were detached."""


class TrueGradient(BoundaryRule):
    """The stage before the boundary waits for the true gradient: plain backpropagation through the boundary.

    In one process the result is that of the undivided network bit for bit. Between processes the stages run
    one after the other (backward locking), so this is for comparison, not for speed.
    """

    waits = True


class DelayedGradient(BoundaryRule):
    """The stage before the boundary goes on at once and applies the true gradient when it arrives, some steps late.

    Nothing is predicted and nothing learned. With ``shrink=1`` this is the decoupled parallel backpropagation of
    Huo et al. 2018 (arXiv 1804.10574). Smaller values are the gradient shrinking of Zhuang et al. 2019
    (arXiv 1906.09108), which keeps stages stable whose gradients are many steps late.

    Args:
        shrink: What a late gradient is multiplied by for each boundary on its way, above 0 and at most 1.

    Raises:
        TypeError: If ``shrink`` is no number.
        ValueError: If ``shrink`` is out of range.
    """

    def __init__(self, shrink: float = 1.0) -> None:
        self.shrink = float(checked(type(self).__name__, "shrink", shrink, number(above=0, most=1)))

    def late_share(self, distance: int) -> float:
        """See :meth:`BoundaryRule.late_share`."""
        return float(self.shrink**distance)


__all__ = ["BoundaryRule", "DelayedGradient", "TrueGradient", "ZeroPredictor"]
