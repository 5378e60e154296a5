"""The interface of an input predictor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sg.predictors.base import Predictor
from lightning_sg.predictors.norms import relative_error

Activations = tuple[Tensor, ...]


class InputPredictor(Predictor):
    """Predicts the activations that cross one boundary from the batch.

    Pass an unbuilt one to :class:`~lightning_sg.SyntheticInputs`: each boundary gets a deep copy, and :meth:`build`
    makes its parameters once the sizes are known. Source: Jaderberg et al. 2017, arXiv 1608.05343 (*synthetic inputs*).

    It should soon predict the mean of the activations, or something as sensible: the next stage trains on its
    predictions as soon as it has learned from one batch.
    """

    @abstractmethod
    def build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        """Makes the parameters; called once, with the random seed set per boundary.

        Args:
            features: What the predictor sees of the batch, float32, ``(N, ...)``.
            shapes: The shape of each activation without the samples: ``(256,)`` for ``(N, 256)``.

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
        r"""The training loss; by default :math:`\lVert ĥ - h \rVert^2 / \lVert h \rVert^2`.

        Args:
            features: As in :meth:`build`.
            activations: The true activations, float32, each ``(N, *shape)``.

        Returns:
            A scalar.
        """
        return relative_error(self(features), activations)

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """Makes the optimizer unless ``SyntheticInputs(optimizer=...)`` does: Adam with learning rate 3e-3.

        The rate is no lower than stages usually have, because the activations move as the stages learn.

        Args:
            parameters: All parameters of the predictor, after :meth:`build`.
        """
        return torch.optim.Adam(parameters, lr=3e-3, fused=True)


__all__ = ["Activations", "InputPredictor"]
