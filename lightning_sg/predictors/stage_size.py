"""The size of the stage that a predictor belongs to, by which its own is judged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class StageSize:
    """The size of a stage.

    Attributes:
        parameters: The number of elements of its parameters.
        operations: The floating-point operations of its training step, backward pass included; 0 if unknown.
    """

    parameters: int
    operations: float = 0.0

    @classmethod
    def of_equal_share(cls, module: nn.Module, stages: int) -> StageSize:
        """The size of one of so many stages where no step could be followed, as if all were alike."""
        return cls(sum(parameter.numel() for parameter in module.parameters()) // stages)


__all__ = ["StageSize"]
