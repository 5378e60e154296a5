"""The boundary between two stages of one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sg.boundary import differentiable
from lightning_sg.crossings.base import BatchContext, PlainCrossing
from lightning_sg.crossings.inject import Optional, blocked, cut
from lightning_sg.crossings.passing import Passing
from lightning_sg.crossings.replay import ToRecord
from lightning_sg.errors import BoundaryError
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.record import Record


class LocalCrossing(PlainCrossing):
    """Identity in the forward pass; in the backward pass, passes on the synthetic gradient in place of the target.

    Needs no change to the loss, the optimizer or the loop, and works under any strategy. The prediction is made in the
    forward pass, so that it is the one that a stage in another process would make.

    Attributes:
        passing: What a backward pass does here.
        record: The batch at this boundary, once it has crossed.
        carriers: Of a batch with an exact gradient, the tensors that carry one, as they left the stage before.

    Args:
        trainer: Supplies the boundary's gradient.
        batch: The batch.
        skipped: Whether the predictor does not learn from this batch.
    """

    def __init__(self, trainer: BoundaryTrainer, batch: BatchContext, *, skipped: bool = False) -> None:
        self.passing = Passing.SYNTHETIC
        self.record: Record | None = None
        self.carriers: list[Tensor] = []
        self._trainer = trainer
        self._batch = batch
        self._skipped = skipped
        self._passed = False
        self._withheld = False  # a part of the target was not finite

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Crosses the boundary; tensors that carry no gradient pass untouched."""
        places = [place for place, tensor in enumerate(tensors) if differentiable(tensor)]
        if not torch.is_grad_enabled() or not places:
            return tensors
        carriers = [tensors[place] for place in places]
        batch, trainer = self._batch, self._trainer
        if batch.finite.crosses(trainer.name, carriers, trainer.told(batch.context)):
            trainer.pass_by(batch.plan, batch.visits[trainer.name])
            return _put(tensors, places, blocked(carriers))
        visits = batch.visits[trainer.name]
        record = trainer.open(carriers, batch.context, batch.loss, batch.plan, skipped=self._skipped, visits=visits)
        trainer.receive_due(record.step)
        trainer.learn_due(record.step)
        trainer.predict(record)
        self.record = record
        if batch.plan.keeps_graph:
            self.carriers = carriers
        if batch.replayed is not None:
            batch.replayed.note(trainer.name, record)
            carries = [place in places for place in range(len(tensors))]
            batch.replayed.note_inputs(trainer.name, tensors, carries, ToRecord(record))
        dtypes = [tensor.dtype for tensor in carriers]

        def backward(gradients: Optional) -> Optional:
            return self._backward(record, gradients, dtypes)

        return _put(tensors, places, cut(backward, carriers))

    def end(self) -> None:
        """The batch is over: its target is no good if the next stage has left the batch out."""
        if self.record is not None and (self._withheld or self._batch.finite.withholds(self._trainer.name)):
            self.record.targets = None

    @property
    def name(self) -> str:
        """The boundary's name."""
        return self._trainer.name

    def expect_exact(self) -> None:
        """Takes zero for the exact target, as long as no backward pass brings another."""
        if self.record is not None and self.record.exact_targets is None:
            self.record.exact_targets = self.record.per_sample([None for _ in self.carriers])

    def _backward(self, record: Record, gradients: Optional, dtypes: Sequence[torch.dtype]) -> Optional:
        if torch.is_grad_enabled():
            raise BoundaryError(
                f"A gradient of a gradient (`create_graph=True`) was asked for across boundary '{self._trainer.name}'. "
                "A synthetic gradient has none: keep penalties on gradients within one stage."
            )
        if self.passing is Passing.EXACT:
            record.add_exact(self._batch.scale.all_removed(gradients))
            return gradients
        if self.passing is Passing.RESIDUAL:
            record.add_residual(self._batch.scale.all_removed(gradients))
            assert record.residual is not None
            return self._batch.scale.applied(record.residual, record.samples, dtypes)
        return self._synthetic(record, gradients, dtypes)

    def _synthetic(self, record: Record, gradients: Optional, dtypes: Sequence[torch.dtype]) -> Optional:
        known = [gradient for gradient in gradients if gradient is not None]
        teaches = self._batch.finite.teaches(self._trainer.name, known)
        self._withheld = self._withheld or not teaches
        # As between processes: where no gradient arrives at all, there is no target.
        if record.wants_target and known and teaches:
            record.add_target(self._batch.scale.all_removed(gradients))
        if record.coupled:
            return gradients if teaches else (None,) * len(gradients)
        # A second backward pass through the same batch adds to the target; the prediction is for their sum.
        if record.prediction is None or self._passed:
            return (None,) * len(gradients)
        self._passed = True
        return self._batch.scale.applied(record.prediction, record.samples, dtypes)


def _put(tensors: list[Tensor], places: Sequence[int], crossed: Sequence[Tensor]) -> list[Tensor]:
    """A copy of ``tensors`` with others at some places."""
    tensors = list(tensors)
    for place, tensor in zip(places, crossed):
        tensors[place] = tensor
    return tensors


__all__ = ["LocalCrossing"]
