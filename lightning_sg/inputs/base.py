"""The contract of an input predictor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sg.predictors.base import Predictor, relative_error

Activations = tuple[Tensor, ...]


class InputPredictor(Predictor):
    """Predicts, from the batch, the activations that cross one boundary.

    It is given to :class:`~lightning_sg.SyntheticInputs` as a template without parameters; each boundary gets a deep
    copy, and :meth:`build` makes its parameters once sizes are known. Source: Jaderberg et al. 2017, arXiv 1608.05343
    (*synthetic inputs*).

    Before its first optimizer step it should predict the mean of the activations, or something as sensible: the next
    stage trains on what it says from the second batch that it has learned from.
    """

    @abstractmethod
    def build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        """Makes the parameters; called once, with the random seed set per boundary.

        Args:
            features: What the boundary is told of the batch, float32, ``(N, ...)``.
            shapes: For each activation its shape without the samples: ``(256,)`` for one of ``(N, 256)``.

        Raises:
            ValueError: If the predictor cannot work with these shapes.
        """

    @abstractmethod
    def forward(self, features: Tensor) -> Activations:
        """Predicts the activations.

        Args:
            features: As in :meth:`build`.

        Returns:
            One float32 tensor ``(N, *shape)`` for each shape given to :meth:`build`.
        """

    def loss(self, features: Tensor, activations: Activations) -> Tensor:
        r"""The loss that it is trained on: by default :math:`\lVert ĥ - h \rVert^2 / \lVert h \rVert^2`.

        Args:
            features: As in :meth:`build`.
            activations: The true ones, float32, each ``(N, *shape)``.

        Returns:
            A scalar.
        """
        return relative_error(self(features), activations)

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Makes the optimizer where ``SyntheticInputs(optimizer=...)`` names none: Adam, learning rate 3e-3.

        As quick as stages usually learn, or quicker: what it is to predict moves with them.

        Args:
            parameters: The predictor's, all of them, after :meth:`build`.
        """
        return torch.optim.Adam(parameters, lr=3e-3, fused=True)


__all__ = ["Activations", "InputPredictor"]
