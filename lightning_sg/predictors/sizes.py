"""Brings activations to the sizes that a predictor's layers were made for.

Sequences and feature maps may have another size in each batch. Where a layer sees all positions of a sample at once,
as it does of the sequence and the last states of a recurrent layer together, they are resampled to the first sizes.
"""

from __future__ import annotations

from torch import Tensor

from lightning_sg.predictors.base import Gradients
from lightning_sg.predictors.features import join_rows, sample_dimension
from lightning_sg.predictors.resize import resize


class FirstSizes:
    """The sizes of the first activations at a boundary.

    Args:
        activations: The first activations, each ``(N, ...)``.
    """

    def __init__(self, activations: Gradients) -> None:
        self._shapes = [tuple(activation.shape) for activation in activations]
        self._features = join_rows(activations).shape[-1]

    def rows(self, activations: Gradients) -> tuple[Tensor, Gradients]:
        """As many features in a row as of the first activations.

        Returns:
            What :func:`~lightning_sg.predictors.features.join_rows` makes of the activations, resampled if need be, and
            the activations that it was made of.
        """
        rows = join_rows(activations)
        if rows.shape[-1] != self._features:
            activations = self.of(activations)
            rows = join_rows(activations)
        return rows, activations

    def of(self, activations: Gradients) -> Gradients:
        """The activations, resampled to the first sizes in every dimension but that of the samples."""
        number = activations[0].shape[0]
        return tuple(
            _resampled(activation, shape, sample_dimension(activation, number))
            for activation, shape in zip(activations, self._shapes)
        )

    def back(self, gradients: Gradients, activations: Gradients) -> Gradients:
        """Gradients of resampled activations as gradients of the activations.

        Args:
            gradients: Of what :meth:`of` returned.
            activations: What it was given.
        """
        number = activations[0].shape[0]
        return tuple(
            gradient
            if gradient.shape == activation.shape
            else _resampled(gradient, tuple(activation.shape), sample_dimension(activation, number))
            * (gradient[0].numel() / max(1, activation[0].numel()))
            for gradient, activation in zip(gradients, activations)
        )


def resampled(tensor: Tensor, dimension: int, size: int) -> Tensor:
    """Resamples one dimension: averages to fewer, interpolates linearly to more."""
    if tensor.shape[dimension] == size:
        return tensor
    return resize(tensor.movedim(dimension, -1).unsqueeze(-2), (1, size)).squeeze(-2).movedim(-1, dimension)


def _resampled(tensor: Tensor, shape: tuple[int, ...], samples: int) -> Tensor:
    if tensor.ndim != len(shape):
        raise ValueError(f"activations of shape {tuple(tensor.shape)} had the shape {shape} in the first batch")
    for dimension, size in enumerate(shape):
        if dimension != samples:
            tensor = resampled(tensor, dimension, size)
    return tensor


__all__ = ["FirstSizes", "resampled"]
