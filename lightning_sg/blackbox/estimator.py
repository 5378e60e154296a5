"""The contract of what makes a gradient of the scores of a boundary that nothing can be differentiated behind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_sg._compat import tree_map_only
from lightning_sg.blackbox.sampling import Draw, Sampling
from lightning_sg.predictors.base import Predictor


class Example(NamedTuple):
    """Rows to learn from: what reached a boundary, what went on, and its score.

    Attributes:
        activation: ``(R, ...)``, float32, detached.
        value: What was drawn, ``(R, ...)``.
        spread: The standard deviation of the noise, see :class:`~lightning_sg.blackbox.sampling.Draw`.
        context: What is known besides, with tensors ``(R, ...)``, or ``None``.
        score: ``(R, ...)``: one for each row, or for each row and element.
    """

    activation: Tensor
    value: Tensor
    spread: Tensor
    context: Any
    score: Tensor

    @property
    def scores(self) -> Tensor:
        """The scores of each row side by side, ``(R, K)``; K is 1 if there is one for each row."""
        return self.score.flatten(1) if self.score.ndim > 1 else self.score.unsqueeze(1)

    def of_samples(self) -> tuple[Tensor, Tensor, Any, Tensor]:
        """All that has the rows first: activation, value, context and score."""
        return self.activation, self.value, self.context, self.score

    @classmethod
    def of(cls, of_samples: Any, spread: Any) -> Example:
        """An example of :meth:`of_samples`, and the standard deviation of the noise as a number or a list."""
        activation, value, context, score = of_samples
        return cls(
            activation, value, torch.as_tensor(spread, dtype=activation.dtype, device=activation.device), context, score
        )

    def chosen(self, rows: Any) -> Example:
        """Some of the rows.

        Args:
            rows: What a tensor is indexed by to get them.
        """
        activation, value, context, score = tree_map_only(Tensor, lambda part: part[rows], self.of_samples())
        return Example(activation, value, self.spread, context, score)


class Estimator(Predictor):
    """Makes the gradient at a boundary from the scores of what has crossed it.

    A user's estimator is a template without parameters; each boundary trains a copy. Like a gradient predictor it is
    built when the first sizes are known, and has a loss and an optimizer of its own.

    Attributes:
        sampling: What the boundary does to activations. The boundary sets it.
    """

    #: Whether the gradient of a batch needs the scores of that batch, so that these cannot come later.
    needs_score: ClassVar[bool] = True
    #: Whether values are drawn in antithetic pairs.
    in_pairs: ClassVar[bool] = False
    #: Whether there are parameters to learn.
    learned: ClassVar[bool] = False
    #: Whether the true gradient of what follows goes through the boundary, so that no gradient is made of scores.
    passes: ClassVar[bool] = False
    #: Whether the gradient is made after learning from the batch, which makes it newer, or before, which keeps it
    #: unbiased: what is subtracted from a score must not depend on that score.
    learns_first: ClassVar[bool] = False

    #: The number of rows of an optimizer step, if it learns from earlier batches.
    batch: int = 256
    sampling: Sampling

    @property
    def updates(self) -> int:
        """Optimizer steps for each training batch."""
        return 1

    @property
    def replays(self) -> bool:
        """Whether it learns from scores of earlier batches as well."""
        return False

    def check(self, evaluations: int, explores: bool) -> None:
        """Refuses settings of the boundary that do not go with the estimator.

        Args:
            evaluations: How many values the boundary draws for each sample.
            explores: Whether these differ: there is noise, or they are discrete.

        Raises:
            ValueError: If they do not.
        """

    def build(self, example: Example) -> None:
        """Makes the parameters for rows such as those of ``example``."""

    def loss(self, example: Example, generator: torch.Generator) -> Tensor:
        """The loss that the estimator is trained on.

        Args:
            example: The rows to learn from.
            generator: Of random numbers.

        Returns:
            A scalar.
        """
        return example.score.new_zeros(())

    def forward(self, draw: Draw, context: Any, score: Tensor | None, generator: torch.Generator) -> tuple[Tensor]:
        """:meth:`gradient`, as a learner calls it."""
        return (self.gradient(draw, context, score, generator),)

    @abstractmethod
    def gradient(self, draw: Draw, context: Any, score: Tensor | None, generator: torch.Generator) -> Tensor:
        """The gradient for each row, of the expected score by the activation.

        Args:
            draw: What crossed the boundary.
            context: What is known besides, with tensors ``(R, ...)``, or ``None``.
            score: ``(R, ...)``; ``None`` if it has not come yet, which only happens without ``needs_score``.
            generator: Of random numbers.

        Returns:
            ``(R, ...)``, of the activation's shape, for the mean of a row's scores over its elements.
        """

    def passed(self, activation: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
        """What goes on, with a gradient by ``activation``, if the estimator ``passes``.

        Args:
            activation: ``(R, ...)``, with the graph of the stage before.
            draw: What was drawn.
            generator: Of random numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} passes no gradient on.")


def credit(score: Tensor, like: Tensor) -> Tensor:
    """Scores as factors on the elements of an activation, of a shape that broadcasts to it.

    One score for a row counts for all of its elements. If there is one for each element, each counts for its own, with
    the share that it has in the mean.

    Args:
        score: ``(R,)`` or ``(R, ...)`` with the first dimensions of the activation.
        like: The activation, ``(R, ...)``.
    """
    elements = score[0].numel() if score.shape[0] else 1
    return (score / elements).reshape(*score.shape, *[1] * (like.ndim - score.ndim))


def rows_of(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors ``(R, ...)`` side by side: ``(R, all features)``, float32."""
    return torch.cat([tensor.float().reshape(tensor.shape[0], -1) for tensor in tensors], dim=-1)


__all__ = ["Estimator", "Example", "credit", "rows_of"]
