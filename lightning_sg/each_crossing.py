"""What happens at a boundary of this process, each time that a batch crosses it."""

from __future__ import annotations

from torch import Tensor

from lightning_sg.crossings.base import BatchContext, Crossing
from lightning_sg.crossings.evaluations import refuse_another_evaluation
from lightning_sg.crossings.local import LocalCrossing
from lightning_sg.inputs.crossing import PredictedInputs, refuse_several
from lightning_sg.inputs.trainer import InputTrainer
from lightning_sg.lightning_api import pl
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.updates import RandomUpdates


class EachCrossing:
    """A boundary between two stages of this process in one batch.

    A step crosses it as often as it runs the network. Each crossing has its own prediction and its own target.

    Args:
        trainer: Supplies the boundary's gradient.
        inputs: Predicts the activations after it, if they are predicted.
        batch: The batch.
        updates: Which stages are updated at its step.
        module: The module that is trained.
    """

    def __init__(
        self,
        trainer: BoundaryTrainer,
        inputs: InputTrainer | None,
        batch: BatchContext,
        updates: RandomUpdates,
        module: pl.LightningModule,
    ) -> None:
        self._trainer = trainer
        self._inputs = inputs
        self._batch = batch
        self._updates = updates
        self._module = module

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Takes the tensors that reach the boundary; returns those that the next stage goes on with."""
        refuse_another_evaluation(self._batch, self._module)
        return self._next().forward(tensors)

    def _next(self) -> Crossing:
        batch, name = self._batch, self._trainer.name
        local = LocalCrossing(self._trainer, batch, skipped=not self._updates.before(name))
        batch.crossings.append(local)
        if self._inputs is None:
            return local
        refuse_several(name, len(batch.visits[name].records))
        return PredictedInputs(local, self._inputs, batch, learns=self._updates.after(name))


def crossed(batch: BatchContext | None) -> list[LocalCrossing]:
    """The crossings of a batch so far that keep what an exact gradient needs."""
    crossings = [] if batch is None else batch.crossings
    return [each for each in crossings if isinstance(each, LocalCrossing) and each.carriers]


__all__ = ["EachCrossing", "crossed"]
