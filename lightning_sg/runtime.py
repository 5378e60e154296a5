"""What the callback needs from wherever the stages run; this is the answer for one process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_sg.replicas import Replicas

Figures = dict[str, dict[str, Tensor]]


class Exchange:
    """All stages in one process. :class:`~lightning_sg.SyntheticGradientStrategy` brings one for several.

    Attributes:
        split: Whether the stages are on several processes. The strategy then places and checks them.
    """

    split = False

    def __init__(self, replicas: Replicas | None = None) -> None:
        #: The processes that hold the same stages in other replicas.
        self.replicas = replicas or Replicas()

    @property
    def has_loss(self) -> bool:
        """Whether the model's own loss is computed in this process."""
        return True

    @property
    def leaves(self) -> list[Tensor]:
        """What this process received of the current batch from the stage before, and carries a gradient."""
        return []

    def holds(self, parameter: str) -> bool:
        """Whether the parameter of that name is trained in this process."""
        return True

    def flush(self) -> None:
        """Brings in the exact gradients that are under way between processes. A collective."""

    def owns(self, boundary: str) -> bool:
        """Whether the predictor of ``boundary`` lives in this process."""
        return True

    def owns_inputs(self, boundary: str) -> bool:
        """Whether the input predictor of ``boundary`` lives in this process."""
        return True

    def route(self, figures: Figures) -> Figures:
        """Takes this process's figures of one batch and returns those that this process is to log."""
        return figures

    def gather(self, states: dict[str, Any]) -> dict[str, Any]:
        """The union, on global rank 0, of all processes' states by boundary."""
        return states


__all__ = ["Exchange", "Figures"]
