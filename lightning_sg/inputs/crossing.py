"""A boundary after which the next stage uses predicted activations."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sg.boundary import differentiable
from lightning_sg.crossings.base import BatchContext, Crossing
from lightning_sg.crossings.inject import replace
from lightning_sg.errors import BoundaryError
from lightning_sg.inputs.trainer import InputTrainer


class PredictedInputs:
    """Replaces the activations that leave another crossing with predicted ones.

    The gradient of a predicted activation is passed back to the true one.

    Args:
        crossing: The crossing that handles the gradient at this boundary.
        trainer: The input predictor.
        batch: The batch.
        learns: Whether the predictor learns from this batch.
    """

    def __init__(self, crossing: Crossing, trainer: InputTrainer, batch: BatchContext, *, learns: bool) -> None:
        self._crossing = crossing
        self._trainer = trainer
        self._features = batch.features
        self._learns = learns

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Crosses the boundary; tensors that carry no gradient are not predicted."""
        places = [place for place, tensor in enumerate(tensors) if differentiable(tensor)]
        crossed = self._crossing.forward(tensors)
        if not torch.is_grad_enabled() or not places:
            return crossed
        assert self._features is not None
        predicted = self._trainer.cross(self._features, [tensors[place] for place in places], learns=self._learns)
        if predicted is None:
            return crossed
        crossed = list(crossed)
        for place, tensor in zip(places, replace(predicted, [crossed[place] for place in places])):
            crossed[place] = tensor
        return crossed

    def before_backward(self, loss: Tensor) -> None:
        """See :meth:`Crossing.before_backward`."""
        self._crossing.before_backward(loss)

    def after_backward(self) -> None:
        """See :meth:`Crossing.after_backward`."""
        self._crossing.after_backward()

    def end(self) -> None:
        """See :meth:`Crossing.end`."""
        self._crossing.end()


def refuse_several(boundary: str, before: int) -> None:
    """Refuses a step that runs the network several times where activations are predicted.

    Args:
        boundary: The boundary's name.
        before: How often this batch has crossed it.

    Raises:
        BoundaryError: If it has crossed it before.
    """
    if before:
        raise BoundaryError(
            f"Boundary '{boundary}' is crossed several times in one step, and SyntheticGradients(inputs=...) predicts "
            "what crosses it from the batch, which is the same each time. Run the network once in a step, on views "
            "that are concatenated, or use inputs=None."
        )


__all__ = ["PredictedInputs", "refuse_several"]
