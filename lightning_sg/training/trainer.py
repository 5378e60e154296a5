"""Trains one boundary's gradient predictor."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.finite.values import are_finite
from lightning_sg.options import PredictorTraining
from lightning_sg.precision import without_autocast
from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo
from lightning_sg.replicas import Replicas, is_of_a_collective
from lightning_sg.rng import seed_for
from lightning_sg.training.base import BoundaryTrainer, Echo
from lightning_sg.training.bound import TargetScale
from lightning_sg.training.cost import OperationCount
from lightning_sg.training.guard import AlignmentGuard
from lightning_sg.training.learner import Learner
from lightning_sg.training.metrics import all_finite, known_finite, norms
from lightning_sg.training.predictions import Predictions
from lightning_sg.training.record import Record, TargetPlan

#: The batches at the start whose targets are all looked at: heads have everything to learn, and sizes change quickly.
_KNOWN = 64


@dataclass(frozen=True)
class TrainerOptions:
    """What the trainers of all boundaries are told alike.

    Attributes:
        delay: Extra steps before a target is learned from; 0 means the next step.
        training: How predictors are trained.
        bootstrap: Whether to learn from biased targets, between exact ones.
        guard: Judges the predictions, or ``None``: then one that is not finite is an error.
        seed: Seeds the predictors' initial weights, together with the boundary's name.
        replicas: The replicas whose predictors learn from all their batches together.
        only_finite: Whether nothing is learned from a target that is not finite; else such values count as zero.
        matching: On every how many-th batch that it learns from a predictor with a loss of its own also looks at the
            target, after the first batches: to match it where it is always exact, and to be bounded and judged by it.
    """

    delay: int = 1
    training: PredictorTraining = PredictorTraining()
    bootstrap: bool = True
    guard: AlignmentGuard | None = None
    seed: int = 0
    replicas: Replicas = Replicas()
    only_finite: bool = False
    matching: int = 1

    def learner(self, name: str, template: GradientPredictor) -> Learner[GradientPredictor]:
        """An untrained copy of ``template`` for the boundary ``name``."""
        training = self.training
        return Learner(
            template,
            training.optimizer,
            training.lr_scheduler,
            updates=training.updates,
            ema=training.ema,
            seed=seed_for(self.seed, name),
            replicas=self.replicas,
        )


class PredictorTrainer(BoundaryTrainer):
    """Has the gradient predictor of one boundary predict for each batch and learn from the targets that are due.

    Args:
        name: The boundary's name, for messages and for the random seed.
        template: An unbuilt predictor; it is copied.
        options: What all trainers are told alike.
    """

    def __init__(self, name: str, template: GradientPredictor, options: TrainerOptions) -> None:
        super().__init__(name, options.delay, options.replicas)
        self._operations = OperationCount(options.training.every)
        guard = options.guard
        fallback = guard.fallback if guard is not None and isinstance(guard.fallback, GradientPredictor) else None
        self._template = template
        self._options = options
        self._untaught = False
        self._learner = options.learner(name, template)
        self._predictions = Predictions(
            name,
            self._learner,
            None if fallback is None else options.learner(name, fallback),
            guard,
            options.training.bound,
            options.replicas,
            lambda arrives_finite: self.inquire(name, arrives_finite=arrives_finite),
        )

    @property
    def predictor(self) -> GradientPredictor:
        """The predictor, built once the first batch is known."""
        return self._learner.predictor

    @property
    def described(self) -> str:
        """The name of the predictor's class."""
        return type(self.predictor).__name__

    @property
    def ready(self) -> bool:
        """Whether the predictor has its parameters."""
        return self._learner.built

    @property
    def matches(self) -> bool:
        """Whether the predictor learns from targets: it can, and such as it can learn from come, at times or always."""
        use = self.predictor.target_use
        unbiased = self.distance == 1 or not self._untaught
        return use.learns_from_targets and (unbiased or self._options.bootstrap or not use.learns_without_targets)

    @property
    def operations(self) -> int | None:
        """Its floating-point operations for a batch on average, forward and backward; ``None`` until that is known."""
        if not self.ready:
            return None
        if not self._learner.learns_in_passing:
            return self._operations.flops(matched=1.0)
        return self._operations.flops(1 / self._options.matching if self.matches and self.distance == 1 else None)

    @property
    def scale(self) -> TargetScale:
        """The running size of the targets."""
        return self._predictions.scale

    @property
    def target_rms(self) -> Tensor | None:
        """See :attr:`BoundaryTrainer.target_rms`."""
        return self.scale.rms

    @property
    def guard(self) -> AlignmentGuard | None:
        """The guard that judges the predictions, if there is one."""
        return self._options.guard

    @property
    def guarded(self) -> bool:
        """Whether the guard has taken the boundary from the predictor."""
        return self._predictions.guarded

    @property
    def waits(self) -> bool:
        """Whether the guard has its stage wait for the true gradient."""
        return self._predictions.couples

    def wants_exact(self, context: Any) -> bool:
        """Whether an exact target is of use to the predictor; the same in every process, built or not."""
        return self._template.wants_exact(self.shapes, context)

    def check_finite(self) -> None:
        """Asks the device whether a prediction since the last time was not finite, which stops it for a moment.

        Raises:
            NonFinitePredictionError: If so, and there is no guard, or the activations were not finite either.
        """
        self._predictions.check_finite()

    def take_metrics(self) -> dict[str, Tensor]:
        """See :meth:`BoundaryTrainer.take_metrics`."""
        return {**self._predictions.take_metrics(), **super().take_metrics()}

    # ------------------------------------------------------------------ one batch

    def prepare(self, inputs: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Builds the predictor for such inputs, and restores it, unless that is done already.

        Raises:
            SyntheticGradientsError: If the predictor cannot be built for this boundary.
        """
        if not self._learner.built:
            self._learner.layout = self.layout
            if self.stage is not None:
                self._learner.take_template(self._template.for_stage(self.stage))
            with without_autocast(inputs[0].device.type), self._explaining(inputs, context):
                self._predictions.build(inputs, context, loss)
                self._restore(inputs[0].device)

    def _asks(self, plan: TargetPlan, step: int) -> tuple[bool, bool]:
        use = self.predictor.target_use
        self._untaught = plan.bootstrap or plan.local
        biased = self.distance > 1 and not plan.exact and not plan.coupled
        fit = not biased or not use.learns_from_targets or self._options.bootstrap
        learns = self._learner.learns and (step % self._options.training.every == 0 or plan.exact)
        wants = learns and use.asks and (fit or plan.bootstrap)
        learns_target = fit or (plan.bootstrap and not use.learns_without_targets)
        taught = plan.teaches or biased or self.distance == 1
        learns_target = learns_target and (taught or not use.learns_without_targets)
        must = plan.exact or plan.coupled or self._distrusted
        if use.learns_without_targets and not must:
            looks = step < _KNOWN or step % (self._options.training.every * self._options.matching) == 0
            learns_target = learns_target and (looks or self.distance > 1 or not use.learns_from_targets)
            wants = wants and (looks or (learns_target and use.learns_from_targets))
        return wants or must, learns_target

    @property
    def _distrusted(self) -> bool:
        return self.waits or self.guarded

    def _predict(self, record: Record) -> Gradients | None:
        if record.empty:
            return tuple(torch.zeros_like(activation) for activation in record.activations)
        if self._learns_in_passing(record):
            prediction = self._predict_and_learn(record)
        else:
            explaining = self._explaining(record.activations, record.context)
            with self.profile(profiling.PREDICT), explaining, self._operations.counting("prediction"):
                raw = self._learner.predict(record.activations, record.context)
            if raw is None:
                return None
            prediction = self._predictions.bounded(raw, record)
        if not self.guarded:
            return prediction
        record.shadow = prediction
        with self._explaining(record.activations, record.context):
            return self._predictions.guarded_prediction(record)

    def _learns_in_passing(self, record: Record) -> bool:
        """Whether the predictor learns from a batch when it predicts for it, as no target is needed."""
        if record.skipped or not self._learner.learns_in_passing:
            return False
        if self.predictor.target_use.learns_from_targets and record.wants_target and record.learns_target:
            return False
        return record.step % self._options.training.every == 0

    def _predict_and_learn(self, record: Record) -> Gradients:
        """One pass for both; nothing is learned from a prediction that is not finite."""
        explaining = self._explaining(record.activations, record.context)
        with self.profile(profiling.PREDICT), explaining, self._operations.counting("passing"):
            raw, loss = self._learner.predict_in_passing(record.activations, record.context)
        prediction = self._predictions.bounded(raw, record)
        with self.profile(profiling.LEARN):
            self._learner.learn_in_passing(record.activations, record.context, ())
        self._metrics["loss"] = loss
        record.learned = True
        return prediction

    def _learn(self, record: Record, echo: Echo | None = None) -> None:
        if record.empty or (record.learned and not record.wants_target):
            return
        with without_autocast(record.activations[0].device.type):
            targets = self._goal(record)
            if targets is None:
                return
            if targets:
                targets, sizes = _without_overflow(targets)
                self._predictions.take_target(record, targets, sizes, self.step)
            with self.profile(profiling.LEARN), self._explaining(record.activations, record.context):
                self._take_step(record, targets if record.learns_target else (), echo)
                if targets:
                    self._predictions.teach_fallback(record, targets)

    def _take_step(self, record: Record, targets: Gradients, echo: Echo | None) -> None:
        without = self.predictor.target_use.learns_without_targets
        if record.learned or not self._learner.learns or not (record.learns_target or without):
            return
        inputs = record.activations
        if echo is not None and targets:
            inputs, targets = echo(self._learner.predict, inputs, targets)
        with self._operations.counting("learning"):
            self._metrics["loss"] = self._learner.learn(inputs, record.context, targets)

    def _goal(self, record: Record) -> Gradients | None:
        """What to learn from; an empty tuple for the predictor's own loss alone; ``None`` for nothing."""
        use, own_turn = self.predictor.target_use, record.step % self._options.training.every == 0
        if not use.asks and (record.targets is None or not record.wants_target):
            return () if own_turn else None
        targets = self._best_target(record)
        if targets is None and record.exact_due is not None and self.distance > 1:
            return None
        if not record.wants_target and use.learns_without_targets and own_turn:
            return ()
        if targets is None or not record.wants_target:
            return None  # the step had no backward pass, or this batch is not one to learn from
        if self._options.only_finite and self._replicas.any(not are_finite(targets)):
            return None
        return targets

    @contextmanager
    def _explaining(self, inputs: Gradients, context: Any) -> Iterator[None]:
        """Says which predictor cannot work with what."""
        try:
            yield
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, SyntheticGradientsError) or is_of_a_collective(error):
                raise
            told = (
                f"context {tuple(context.shape)}"
                if isinstance(context, Tensor)
                else f"context {type(context).__name__}"
            )
            raise SyntheticGradientsError(
                f"{self.described} at boundary '{self.name}' cannot work with activations "
                f"{[tuple(tensor.shape) for tensor in inputs]} and {told}: {error} "
                "(SyntheticGradients(context=...) chooses what it is told, SyntheticGradients(predictor=...) another.)"
            ) from error

    # ------------------------------------------------------------------ checkpoints

    def kinds(self) -> dict[str, Any]:
        """See :meth:`BoundaryTrainer.kinds`; with the predictor's optimizer and its schedule."""
        return {**super().kinds(), **self._learner.kinds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`BoundaryTrainer.load_state_dict`."""
        super().load_state_dict(state)
        self._learner.built = False

    def _own_state(self) -> dict[str, Any]:
        return {**self._learner.state_dict(), **self._predictions.state_dict()}

    def _restore(self, device: torch.device) -> None:
        # A copy: optimizers go on in the very tensors that they are given.
        state, self._restored = copy.deepcopy(self._restored), None
        if state is None or not state.keys() & {"predictor", "rule"}:  # saved before the first batch
            return
        try:
            if "rule" in state:
                raise RuntimeError(f"It was saved with {state['rule']}, which has no predictor.")
            remarks = self._learner.load_state_dict(state)
            remarks += self._predictions.load_state_dict(state, device)
        except (KeyError, RuntimeError, ValueError) as error:
            raise SyntheticGradientsError(
                f"The predictor saved for boundary '{self.name}' does not fit the one configured now "
                f"({self.described}). Resume with the predictor of the saved run. {error}"
            ) from error
        for remark in remarks:  # not only on rank zero: the one process that has the boundary's predictor restores it
            warnings.warn(f"Boundary '{self.name}': {remark}.", stacklevel=2)
        self._restore_batches(state["pending"], device)


def _without_overflow(targets: Gradients) -> tuple[Gradients, list[Tensor]]:
    """The targets and their norms; zeros if they overflowed under mixed precision, as there is nothing to learn."""
    sizes = norms(targets)
    if known_finite(sizes):
        return targets, sizes
    finite = all_finite(targets)
    targets = tuple(torch.where(finite, target, torch.zeros_like(target)) for target in targets)
    return targets, [torch.where(finite, size, torch.zeros_like(size)) for size in sizes]


__all__ = ["PredictorTrainer", "TrainerOptions"]
