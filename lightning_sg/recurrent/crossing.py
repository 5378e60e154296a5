"""A boundary in time during training: predicts at the end of a chunk, learns at the start of the next."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import value_unchanged
from lightning_sg.crossings.base import BatchContext
from lightning_sg.crossings.inject import inject
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.gradient_flow import Blocked, blocked
from lightning_sg.recurrent.auxiliary import Auxiliary
from lightning_sg.recurrent.eligibility import EligibilityTrace
from lightning_sg.recurrent.rows import choose, from_rows, spread, to_rows
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.time_boundary import Written
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.ledger import NEVER


@dataclass
class _Open:
    """The boundary during one training step.

    Attributes:
        new: What the step has written so far.
        read: What the step has read so far.
        extra: The auxiliary task's part of each target, by the step that wrote.
    """

    new: list[Written] = field(default_factory=list)
    read: list[Written] = field(default_factory=list)
    extra: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


class TimeCrossing:
    """One boundary in time of a module in training.

    Nothing here can wait for a target, which comes from the future. So the options on true gradients (``delay``,
    ``exact``) do not apply, and during the warm-up nothing is injected.

    Args:
        name: The boundary's name.
        trainer: Supplies its gradient.
        settings: See :class:`ThroughTime`.
        auxiliary: The auxiliary task, or ``None``.
        state: Whether the boundary carries a state from chunk to chunk; otherwise it carries messages, which do not
            depend on each other.
    """

    def __init__(
        self, name: str, trainer: BoundaryTrainer, settings: ThroughTime, auxiliary: Auxiliary | None, *, state: bool
    ) -> None:
        self.name = name
        self.trainer = trainer
        self._auxiliary = auxiliary
        decays = settings.trace_decay > 0 and settings.chunks > 1 and state
        self.trace = EligibilityTrace(settings.scale * settings.trace_decay, settings.chunks) if decays else None
        self._discount = settings.scale if state else 1.0
        self._is_state = state
        self._told = False
        self._batch: BatchContext | None = None
        self._open = _Open()

    def begin(self, batch: BatchContext) -> None:
        """Starts a training step."""
        self._batch = batch
        batch.crossings.append(self)

    # ------------------------------------------------------------------ called by the boundary

    def wrote(self, written: Written) -> None:
        """Keeps what this step wrote until its loss is known."""
        self._open.new.append(written)
        if not written.places and not self._told:
            self._tell_of_detached(written)

    def reads(self, written: Written) -> None:
        """Hands out what was written as leaves, which collect the gradient."""
        if any(written is known for known in self._open.read):
            return
        written.read = [written.leaves[place].detach().requires_grad_() for place in written.places]
        self._open.read.append(written)

    def forget(self, written: Written) -> None:
        """Drops the prediction for what nobody will read: it will get no target."""
        # If this very step wrote it, it has no number yet. It must not get one: its target would never come.
        self._open.new = [new for new in self._open.new if new is not written]
        if written.step is not None:
            self.trainer.ledger.drop(written.step)
            written.step = None
            if self.trace is not None:
                self.trace.clear()

    def _tell_of_detached(self, written: Written) -> None:
        """Warns, once, that no synthetic gradient can reach what wrote a value; a state may consist of counters."""
        tensors = [leaf for leaf in written.leaves if isinstance(leaf, Tensor)]
        why = blocked([leaf for leaf in tensors if leaf.is_floating_point()] if self._is_state else tensors)
        if why is None or (self._is_state and why is Blocked.INTEGERS):
            return
        self._told = True
        warnings.warn(
            f"Boundary in time '{self.name}' {why.seen}: no synthetic gradient reaches what it carries. {why.advice}, "
            "unless you mean it. This is said only once.",
            stacklevel=2,
        )

    # ------------------------------------------------------------------ the step

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Returns the tensors unchanged: nothing crosses within a step."""
        return tensors

    def before_backward(self, loss: Tensor) -> None:
        """Predicts for what this step wrote, and injects the predictions into the backward pass from ``loss``.

        The value of ``loss`` does not change.
        """
        read = self._open.read[-1] if self._open.read else None
        for earlier in self._open.read:
            if earlier.step is not None:  # a resumed run may have no other chance to restore its predictor
                rows = to_rows([leaf.detach().float() for leaf in earlier.read], earlier.dims)
                self.trainer.prepare(choose(rows, earlier.going_on), earlier.context, None)
                break
        for written in self._open.new:
            self._predict(written, loss)
            if self.trace is not None:
                self.trace.advance(read, written)
            self._train_auxiliary(read, written)

    def _predict(self, written: Written, loss: Tensor) -> None:
        assert self._batch is not None
        numbers = written.going_on
        if not written.carriers or (numbers is not None and not len(numbers)):
            return
        samples = written.carriers[0].shape[written.dims[0]]
        rows = to_rows(written.carriers, written.dims)
        if self.trainer.needs_true_gradient:
            raise SyntheticGradientsError(
                f"{self.trainer.described} at boundary in time '{self.name}' needs the true gradient, which comes from "
                "later chunks. Give it a predictor: "
                f"SyntheticGradients(predictor={{'{self.name}': MLPPredictor()}})."
            )
        record = self.trainer.open(choose(rows, numbers), written.context, None)
        record.due = NEVER  # not fixed in advance: after_backward learns once the target is there
        self.trainer.predict(record)
        if record.prediction is not None and self._discount != 1.0:
            record.prediction = tuple(part * self._discount for part in record.prediction)
        written.step = record.step
        if record.prediction is None or self._batch.plan.coupled:
            return
        parts = spread(record.prediction, numbers, samples)
        factor = self._batch.scale.factor / samples
        gradients = from_rows([part * factor for part in parts], written.carriers, written.dims)
        # In place, because Lightning goes backward from this very tensor.
        with value_unchanged(loss):
            loss.add_(inject(gradients, written.carriers, dtype=loss.dtype))

    def _train_auxiliary(self, read: Written | None, written: Written) -> None:
        """Trains the auxiliary task to predict, from what the step read, the prediction for what it wrote."""
        if self._auxiliary is None or read is None or read.step is None or written.step is None:
            return
        prediction = self.trainer.ledger[written.step].prediction
        if prediction is None:
            return
        samples = read.read[0].shape[read.dims[0]]
        goal = spread(prediction, written.going_on, samples)
        rows = to_rows(read.read, read.dims)
        self._open.extra[read.step] = self._auxiliary.gradient(rows, goal, self.trainer.target_rms)

    def after_backward(self) -> None:
        """Learns from what the step read, which now has its target."""
        assert self._batch is not None
        for written in self._open.read:
            if written.step is None:
                continue
            step, written.step = written.step, None
            extra = self._open.extra.pop(step, None)
            if all(leaf.grad is None for leaf in written.read):  # as at other boundaries: no gradient, no target
                self.trainer.ledger.drop(step)
                continue
            record = self.trainer.ledger[step]
            numbers = written.going_on
            samples = written.read[0].shape[written.dims[0]]
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in written.read]
            rows = tuple(row.float() for row in to_rows(gradients, written.dims))
            # Of the mean over the samples that go on, as the trainer takes it.
            share = samples / record.samples
            rows = tuple(row * share / self._batch.scale.factor for row in choose(rows, numbers))
            if extra is not None:
                rows = tuple(row + more / record.samples for row, more in zip(rows, choose(extra, numbers)))
            record.add_target(rows)
            if self.trace is None:
                self.trainer.learn(record)
            else:
                self.trainer.learn(record, partial(self.trace.echo, numbers=numbers))
                self.trace.shift(written)

    def end(self) -> None:
        """Releases the step's graph."""
        for written in [*self._open.new, *self._open.read]:
            written.carriers, written.read = [], []
        self._open, self._batch = _Open(), None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state to save, without the predictor's."""
        return {
            "trace": None if self.trace is None else self.trace.state_dict(),
            "auxiliary": None if self._auxiliary is None else self._auxiliary.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if self.trace is not None and state["trace"] is not None:
            self.trace.load_state_dict(state["trace"])
        if self._auxiliary is not None:
            self._auxiliary.load_state_dict(state["auxiliary"])
        elif state["auxiliary"] is not None:
            warnings.warn(f"The auxiliary predictor of boundary '{self.name}' is dropped.", stacklevel=2)


__all__ = ["TimeCrossing"]
