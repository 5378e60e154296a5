"""The model's own loss as it was seen in a traced step, to be repeated on guesses of the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sg.batch.program import Program
from lightning_sg.predictors.positions import Crop


@dataclass(frozen=True)
class ReplayedLoss:
    """The operations from the model's last outputs to its loss.

    Attributes:
        program: Computes the loss from the outputs, then the entries of the context, then the parameters.
        shapes: The shapes of the outputs in the traced step.
        names: The names of the entries of the context; it is a tensor if there is one entry, otherwise a dict.
        parameters: Parameters of the model that the loss uses by themselves, as they were; small ones.
        words: The loss in words.
        crops: For each output, which positions of a sequence it has; ``None`` if all that there were.
        alone: Whether it takes nothing from the batch but sizes: it compares the outputs of samples with one another.
    """

    program: Program
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    parameters: tuple[Tensor, ...] = ()
    words: str = "the model's own loss"
    crops: tuple[Crop | None, ...] = ()
    alone: bool = False

    def __deepcopy__(self, _memo: Any) -> ReplayedLoss:
        return self

    def __call__(self, outputs: Sequence[Tensor], context: Any, parameters: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar.

        Args:
            outputs: Tensors of the shapes of :attr:`shapes`, but for the number of samples and of positions.
            context: What the loss used of the batch.
            parameters: In the place of :attr:`parameters`.
        """
        entries = self.entries(context)
        with torch.enable_grad():
            (loss,) = self.program.run(None, [*outputs, *entries, *parameters], outputs[0].device)
        result: Tensor = loss.float()
        return result.reshape(())

    def entries(self, context: Any) -> list[Any]:
        """The entries of a context, in order."""
        if len(self.names) == 1 and not isinstance(context, Mapping):
            return [context]
        return [context[name] for name in self.names]


__all__ = ["ReplayedLoss"]
