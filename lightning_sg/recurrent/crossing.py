"""What happens at a boundary in time while the callback is there: predict at its end, learn at the next start."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sg._compat import value_unchanged
from lightning_sg.crossings.step import Step
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.recurrent.auxiliary import Auxiliary
from lightning_sg.recurrent.boundary import Written
from lightning_sg.recurrent.eligibility import EligibilityTrace
from lightning_sg.recurrent.rows import choose, from_rows, spread, to_rows
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.training import PredictorTrainer


class TimeCrossing:
    """One boundary in time of a module in training.

    A prediction cannot be waited for: its target comes from the future. So what the callback says about true gradients
    at other boundaries (``delay``, ``exact_every``, ``mix``) means nothing here, and during ``warm_up`` nothing is
    injected.

    Args:
        name: The boundary's name.
        trainer: Its gradient predictor.
        step: What is going on in the current step.
        settings: See :class:`ThroughTime`.
        auxiliary: The auxiliary task, if there is one.
        state: Whether it is a state that is carried, from chunk to chunk; else messages, which do not depend on each
            other.
    """

    def __init__(
        self,
        name: str,
        trainer: PredictorTrainer,
        step: Step,
        settings: ThroughTime,
        auxiliary: Auxiliary | None,
        *,
        state: bool,
    ) -> None:
        self.name = name
        self.trainer = trainer
        self._step = step
        self._auxiliary = auxiliary
        decays = settings.trace_decay > 0 and settings.chunks > 1 and state
        self.trace = EligibilityTrace(settings.scale * settings.trace_decay, settings.chunks) if decays else None
        self._new: list[Written] = []
        self._read: list[Written] = []
        self._extra: dict[int, tuple[Tensor, ...]] = {}

    # ------------------------------------------------------------------ what the boundary tells

    def wrote(self, written: Written) -> None:
        """Keeps what this step hands on, until its loss is known."""
        self._new.append(written)

    def reads(self, written: Written) -> None:
        """Gives what an earlier step, or this one, has written: leaves that gather the gradient."""
        if any(written is known for known in self._read):
            return
        written.read = [written.leaves[place].detach().requires_grad_() for place in written.places]
        self._read.append(written)

    def forget(self, written: Written) -> None:
        """What nobody will read has no target."""
        # Written in this very step, it has no number yet, and must be given none: its target would be awaited for ever.
        self._new = [new for new in self._new if new is not written]
        if written.step is not None:
            self.trainer.drop(written.step)
            written.step = None
            if self.trace is not None:
                self.trace.clear()

    # ------------------------------------------------------------------ the step

    def inject(self, loss: Tensor) -> None:
        """Predicts for what this step has written, and makes the backward pass from ``loss`` begin there too.

        The value of ``loss`` stays as it is.
        """
        scale = self._step.gradient_scale()
        read = self._read[-1] if self._read else None
        for earlier in self._read:
            if earlier.step is not None:  # a resumed run may have no other occasion to restore its predictor
                rows = to_rows([leaf.detach().float() for leaf in earlier.read], earlier.dims)
                self.trainer.ready(choose(rows, earlier.going_on), earlier.context, None)
                break
        for written in self._new:
            self._predict(written, loss, scale)
            if self.trace is not None:
                self.trace.advance(read, written)
            self._foretell(read, written)

    def _predict(self, written: Written, loss: Tensor, scale: Tensor | float) -> None:
        numbers = written.going_on
        if not written.carriers or (numbers is not None and not len(numbers)):
            return
        samples = written.carriers[0].shape[written.dims[0]]
        rows = to_rows(written.carriers, written.dims)
        record = self.trainer.prepare(choose(rows, numbers), written.context, None)
        if self.trainer.exact or self.trainer.correction:
            raise SyntheticGradientsError(
                f"{type(self.trainer.predictor).__name__} at boundary in time '{self.name}' needs the true gradient, "
                "which comes from chunks that are still to come. Give it a predictor: "
                f"SyntheticGradients(predictor={{'{self.name}': MLPPredictor()}})."
            )
        self.trainer.await_target(record)
        self.trainer.predict(record)
        written.step = record.step
        if record.prediction is None or self._step.true_share == 1:
            return
        parts = spread(record.prediction, numbers, samples)
        factor = scale / samples
        gradients = from_rows([part * factor for part in parts], written.carriers, written.dims)
        # In place: the loss object is what Lightning goes backward from.
        with value_unchanged(loss):
            loss.add_(_BeginHere.apply(loss.dtype, gradients, *written.carriers))

    def _foretell(self, read: Written | None, written: Written) -> None:
        """The auxiliary task, for what was read at the start of this step and the prediction at its end."""
        if self._auxiliary is None or read is None or read.step is None or written.step is None:
            return
        prediction = self.trainer.pending(written.step).prediction
        if prediction is None:
            return
        samples = read.read[0].shape[read.dims[0]]
        goal = spread(prediction, written.going_on, samples)
        self._extra[read.step] = self._auxiliary.gradient(to_rows(read.read, read.dims), goal, self.trainer.scale.rms)

    def learn(self) -> None:
        """After the backward pass: what was read has its target."""
        scale = self._step.gradient_scale()
        for written in self._read:
            if written.step is None:
                continue
            step, written.step = written.step, None
            extra = self._extra.pop(step, None)
            if all(leaf.grad is None for leaf in written.read):  # as at other boundaries: no gradient, no target
                self.trainer.drop(step)
                continue
            record = self.trainer.pending(step)
            numbers = written.going_on
            samples = written.read[0].shape[written.dims[0]]
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in written.read]
            rows = tuple(row.float() for row in to_rows(gradients, written.dims))
            # Of the mean over the samples that go on, as the trainer takes it.
            rows = tuple(row * (samples / record.samples) / scale for row in choose(rows, numbers))
            if extra is not None:
                rows = tuple(row + more / record.samples for row, more in zip(rows, choose(extra, numbers)))
            record.add_target(rows)
            if self.trace is None:
                self.trainer.learn(record)
            else:
                self.trainer.learn(record, partial(self.trace.echo, numbers=numbers))
                self.trace.shift(written)

    def end(self) -> None:
        """The step is over: lets go of its graph."""
        for written in [*self._new, *self._read]:
            written.carriers, written.read = [], []
        self._new, self._read, self._extra = [], [], {}

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state to save, besides that of the predictor."""
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


class _BeginHere(torch.autograd.Function):
    """Zero forwards; backwards, the given gradients for the given tensors."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.sg_gradients = gradients
        return torch.zeros((), dtype=dtype, device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, *_gradient: Tensor) -> tuple[Any, ...]:
        # The factor on the loss is in the gradients already.
        return (None, None, *ctx.sg_gradients)


__all__ = ["TimeCrossing"]
