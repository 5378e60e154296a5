"""Trains one boundary's gradient predictor: remembers predictions until their targets are due, then learns."""

from __future__ import annotations

import copy
import sys
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg._compat import tree_map_only
from lightning_sg.errors import NonFinitePredictionError, SyntheticGradientsError
from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo
from lightning_sg.replicas import Replicas
from lightning_sg.training.bound import TargetScale
from lightning_sg.training.cost import OperationCounter
from lightning_sg.training.guard import AlignmentGuard, Watch
from lightning_sg.training.learner import Learner, OptimizerFactory, SchedulerFactory
from lightning_sg.training.metrics import all_finite, compare, cosine
from lightning_sg.training.record import Record
from lightning_sg.training.teacher import Teacher

#: Takes the predictor, a batch's activations and its targets; returns what is to be learned from it and from others.
Echo = Callable[[Callable[[Gradients, Any], Gradients | None], Gradients, Gradients], tuple[Gradients, Gradients]]


class PredictorTrainer(Teacher[GradientPredictor]):
    """The predictor of one boundary with its optimizer, its pending targets and its figures.

    The order is fixed, so that it does not depend on where the stages run. The next stage's target for batch ``t``
    is learned from before the prediction for batch ``t + 1 + delay``. An exact gradient takes that long for each
    boundary on its way: it is learned from before the prediction for ``t + distance * (1 + delay)``.

    Args:
        name: The boundary's name, for messages and for the random seed.
        template: An unbuilt predictor; it is copied.
        make_optimizer: Makes the predictor's optimizer from its parameters; ``None`` for the predictor's own choice.
        delay: How many steps later than at once the predictor learns from a target.
        train_every: Learn from every how many-th batch.
        bound: See :class:`TargetScale`.
        seed: Seeds the predictor's initial weights, together with ``name``.
        make_scheduler: Makes a learning-rate schedule for that optimizer.
        updates: Optimizer steps for each batch learned from.
        ema: Decay of an average of the predictor's parameters, which then predicts; 0 for none.
        scale: Predictions are multiplied by this before they are used.
        bootstrap: Whether to learn from targets that are predictions in part, between exact ones.
        exact_weight: The share of the exact gradient in the target of a batch that has one.
        guard: Judges the predictions, or ``None``: then one that is not finite is an error.
        replicas: Those whose predictors at this boundary learn from all their batches together.
    """

    def __init__(
        self,
        name: str,
        template: GradientPredictor,
        make_optimizer: OptimizerFactory | None,
        *,
        delay: int,
        train_every: int,
        bound: float,
        seed: int,
        make_scheduler: SchedulerFactory | None = None,
        updates: int = 1,
        ema: float = 0.0,
        scale: float = 1.0,
        bootstrap: bool = True,
        exact_weight: float = 1.0,
        guard: AlignmentGuard | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        replicas = replicas or Replicas()
        seed = seed ^ zlib.crc32(name.encode())
        arguments: dict[str, Any] = {"updates": updates, "ema": ema, "seed": seed, "replicas": replicas}
        learner = Learner(template, make_optimizer, make_scheduler, **arguments)
        super().__init__(name, learner, delay=delay, replicas=replicas)
        self.train_every = train_every
        self.scale = TargetScale(bound)
        #: Boundaries from this one to the end of the network, this one included.
        self.distance = 1
        #: Of what crosses the boundary, as a traced step showed them.
        self.shapes: list[tuple[int, ...]] = []
        #: FLOPs of one prediction and of one step of learning, once both were seen.
        self.flops: int | None = None
        self._factor = scale
        self._template = template
        self._bootstrap = bootstrap
        self._exact_weight = exact_weight
        self._watch = None if guard is None else Watch(guard)
        fallback = guard.fallback if guard is not None and isinstance(guard.fallback, GradientPredictor) else None
        self._fallback: Learner[GradientPredictor] | None = None
        if fallback is not None:
            self._fallback = Learner(fallback, make_optimizer, make_scheduler, **arguments)
        self._loss: LossInfo | None = None
        self._restored: dict[str, Any] | None = None
        self._pending: deque[Record] = deque()
        self._non_finite: tuple[Tensor, Tensor, Record] | None = None
        self._counted: dict[str, int] = {}

    @property
    def exact(self) -> bool:
        """Whether the boundary passes the true gradient on."""
        return self.predictor.exact

    @property
    def correction(self) -> float:
        """The predictor's own share of corrections; the same in every process, built or not."""
        return self._template.correction

    def wants_exact(self, context: Any) -> bool:
        """Whether an exact target is of use to the predictor; the same in every process, built or not."""
        return self._template.wants_exact(self.shapes, context)

    @property
    def guarded(self) -> bool:
        """Whether the guard has taken the boundary from the predictor."""
        return self._watch is not None and self._watch.guarded

    def ready(self, inputs: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Builds the predictor for such inputs, and restores it, unless that is done already.

        Raises:
            SyntheticGradientsError: If the predictor cannot be built for this boundary.
        """
        if not self._learner.built:
            self._loss = loss
            with torch.autocast(inputs[0].device.type, enabled=False), self._explaining(inputs, context):
                self._build(inputs, context)

    def prepare(
        self,
        activations: Iterable[Tensor],
        context: Any,
        loss: LossInfo | None,
        *,
        exact: bool = False,
        true_share: float = 0.0,
        bootstrap: bool = False,
    ) -> Record:
        """Takes in the next batch, without waiting for anything.

        Args:
            activations: What crosses the boundary and can carry a gradient, each ``(N, ...)``.
            context: What the callback took from the batch.
            loss: What is known about the model's own loss.
            exact: Whether the exact gradient of this batch travels up.
            true_share: How much of the gradient to use is the true one, 0 to 1.
            bootstrap: Whether there are no exact gradients at all, and biased targets have to do.

        Returns:
            The batch's record, for :meth:`predict`.

        Raises:
            SyntheticGradientsError: If the predictor cannot be built for this boundary.
        """
        inputs = tuple(activation.detach().float() for activation in activations)
        if any(activation.ndim == 0 for activation in inputs):
            raise SyntheticGradientsError(
                f"A scalar reaches boundary '{self.name}'. What crosses a boundary has the samples first: give it a "
                "batch dimension, or compute it in the stage that uses it."
            )
        self.ready(inputs, context, loss)
        # Of this boundary alone the true gradient may be used: the next stages' is then still biased.
        biased = self.distance > 1 and not exact and true_share < 1
        if self.exact or (self.guarded and self._watch is not None and self._watch.guard.fallback == "couple"):
            true_share = 1.0
        learns = self._learner.learns and (self.step % self.train_every == 0 or exact)
        fit = not biased or not self.predictor.uses_target or self._bootstrap
        wants = learns and self.predictor.needs_target and (fit or bootstrap)
        record = Record(
            self.step,
            inputs,
            context,
            learns_target=fit or (bootstrap and not self.predictor.learns_without_target),
            wants_target=wants or exact or true_share > 0 or self.predictor.correction > 0 or self.guarded,
            due=self.step + 1 + self.delay,
            true_share=true_share,
        )
        if exact:
            record.exact_due = self.step + self.distance * (1 + self.delay)
            record.due = record.exact_due
        self.step += 1
        return record

    def predict(self, record: Record) -> None:
        """Puts the prediction into ``record``, which is then pending.

        First learns from all targets that are due, waiting for those that come from another process.

        Raises:
            NonFinitePredictionError: If the prediction has a NaN or an infinity in it and there is no guard.
        """
        self.settle(record.step)
        self._pending.append(record)
        if self.exact:
            return
        with torch.autocast(record.activations[0].device.type, enabled=False):
            record.prediction = self._predict(record)

    def settle(self, now: int) -> None:
        """Learns from the targets that are due before the prediction for batch ``now``."""
        for record in self._pending:
            if record.step + 1 + self.delay <= now:
                record.collect()
            if record.exact_due is not None and record.exact_due <= now:
                record.collect_exact()
        due = sorted((record.due, record.step) for record in self._pending if record.due <= now)
        for _due, step in due:
            record = next(record for record in self._pending if record.step == step)
            self._pending.remove(record)
            record.collect()
            if not record.skipped:
                self._learn(record)

    def await_target(self, record: Record) -> None:
        """Says that the target of a batch comes at a time of its own: then :meth:`learn` is called, or :meth:`drop`."""
        record.due = sys.maxsize

    def pending(self, step: int) -> Record:
        """The record of the batch that was the ``step``-th here."""
        return next(record for record in self._pending if record.step == step)

    def drop(self, step: int) -> None:
        """No target will come for this batch."""
        self._pending = deque(record for record in self._pending if record.step != step)

    def learn(self, record: Record, echo: Echo | None = None) -> None:
        """Learns from a batch whose target has come.

        Args:
            record: The batch, with its target.
            echo: Adds to what this batch is to learn what others are.
        """
        self.drop(record.step)
        self._learn(record, echo)

    def collect(self) -> None:
        """Waits for all targets under way, without learning from those that are not due."""
        for record in self._pending:
            record.collect()
        for record in self._pending:
            record.collect_exact()

    def check_finite(self) -> None:
        """Asks the device whether a prediction since the last time was not finite, which stops it for a moment.

        Raises:
            NonFinitePredictionError: If so, and there is no guard, or the activations were not finite either.
        """
        if self._non_finite is None:
            return
        (finite, healthy, record), self._non_finite = self._non_finite, None
        if self._replicas.count > 1:  # all start afresh, or none
            shares = self._replicas.average([torch.stack([finite, healthy]).float()])[0]
            finite, healthy = (shares == 1).unbind()
        if bool(finite):
            return
        if bool(healthy) and self._watch is not None:
            self._learner.restart(record.activations, record.context, self._loss)
            self._learner.tell_scale(self.scale.rms)
            self._report(self._watch.restart())
            return
        cause = (
            "The predictor itself diverged: lower its learning rate (SyntheticGradients(optimizer=...)), or let a "
            "guard start it afresh (SyntheticGradients(guard=AlignmentGuard()))."
            if bool(healthy)
            else "The activations were already non-finite: the network above the boundary diverged; lower its "
            "learning rate or clip its gradients."
        )
        raise NonFinitePredictionError(
            f"The synthetic gradient at boundary '{self.name}' is not finite (batch {record.step} since the start). "
            f"No stage was updated with it. {cause}"
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on exactly: tensors, numbers and strings only."""
        if not self._learner.built:
            return self._restored or {"step": self.step, "pending": []}
        self.collect()
        state = {
            "step": self.step,
            **self._learner.state_dict(),
            "scale": self.scale.state_dict(),
            "guard": None if self._watch is None else self._watch.state_dict(),
            "fallback": None if self._fallback is None else self._fallback.state_dict(),
            "pending": [record.state_dict() for record in self._pending],
        }
        # A copy: the saved state must not change when the training goes on.
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), state)
        saved["pending"] = self._replicas.join(saved["pending"], _samples_of)
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, at once or as soon as the predictor's sizes are known."""
        self.step = state["step"]
        self._restored = state
        self._pending.clear()
        self.scale = TargetScale(self.scale.bound)
        self._learner.built = False

    def _restore(self, device: torch.device) -> None:
        # A copy: optimizers go on in the very tensors that they are given.
        state, self._restored = copy.deepcopy(self._restored), None
        if state is None or "predictor" not in state:
            return
        try:
            self._learner.load_state_dict(state)
        except RuntimeError as error:
            raise SyntheticGradientsError(
                f"The predictor saved for boundary '{self.name}' does not fit the one configured now "
                f"({type(self.predictor).__name__}). Resume with the predictor of the saved run. {error}"
            ) from error
        self.scale.load_state_dict(state["scale"], device)
        self._learner.tell_scale(self.scale.rms)
        if self._watch is not None and state["guard"] is not None:
            self._watch.load_state_dict(state["guard"], device)
        if self._fallback is not None and state["fallback"] is not None:
            self._fallback.load_state_dict(state["fallback"])
            self._fallback.tell_scale(self.scale.rms)
        pending = self._replicas.share(state["pending"], _samples_of)
        for entry in tree_map_only(Tensor, lambda tensor: tensor.to(device), pending):
            self._pending.append(Record(**entry))

    # ------------------------------------------------------------------ the work

    def _build(self, inputs: Gradients, context: Any) -> None:
        self._learner.build(inputs, context, self._loss)
        if self._fallback is not None:
            self._fallback.build(inputs, context, self._loss)
        self._restore(inputs[0].device)

    @contextmanager
    def _explaining(self, inputs: Gradients, context: Any) -> Iterator[None]:
        """Says which predictor cannot work with what."""
        try:
            yield
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, SyntheticGradientsError):
                raise
            told = (
                f"context {tuple(context.shape)}"
                if isinstance(context, Tensor)
                else f"context {type(context).__name__}"
            )
            raise SyntheticGradientsError(
                f"{type(self.predictor).__name__} at boundary '{self.name}' cannot work with activations "
                f"{[tuple(tensor.shape) for tensor in inputs]} and {told}: {error} "
                "(SyntheticGradients(context=...) chooses what it is told, SyntheticGradients(predictor=...) another.)"
            ) from error

    def _predict(self, record: Record) -> Gradients | None:
        if record.activations[0].numel() == 0:
            return tuple(torch.zeros_like(activation) for activation in record.activations)
        explaining = self._explaining(record.activations, record.context)
        with self.profile(profiling.PREDICT), explaining, self._counting("prediction"):
            prediction = self._learner.predict(record.activations, record.context)
        if prediction is None:
            return None
        if self.predictor.needs_target:  # the gradient of a loss of one's own has no target to be measured by
            prediction = self.scale.limit(prediction)
        prediction = self._made_finite(prediction, record)
        if not self.guarded:
            return self._scaled(prediction)
        record.shadow = prediction
        if self._fallback is None:
            return None
        with self._explaining(record.activations, record.context):
            prediction = self._fallback.predict(record.activations, record.context)
        return None if prediction is None else self._scaled(self.scale.limit(prediction))

    def _scaled(self, prediction: Gradients) -> Gradients:
        return prediction if self._factor == 1.0 else tuple(part * self._factor for part in prediction)

    def _made_finite(self, prediction: Gradients, record: Record) -> Gradients:
        """The prediction, or zeros if it is not finite: then :meth:`check_finite` says so."""
        finite = all_finite(prediction)
        at_once = finite.device.type == "cpu" and self._replicas.count == 1
        healthy = True if at_once and finite else all_finite(record.activations)
        if at_once:
            if not finite:
                assert isinstance(healthy, Tensor)
                self._non_finite = (finite, healthy, record)
                self.check_finite()
                return tuple(torch.zeros_like(part) for part in prediction)
            return prediction
        # Asking a device stops it, and asking other replicas stops this one: the answer is looked at in check_finite,
        # and until then nothing is harmed.
        assert isinstance(healthy, Tensor)
        if self._non_finite is not None:
            finite, healthy = finite & self._non_finite[0], healthy & self._non_finite[1]
        self._non_finite = (finite, healthy, record)
        return tuple(torch.where(finite, part, torch.zeros_like(part)) for part in prediction)

    def _learn(self, record: Record, echo: Echo | None = None) -> None:
        if record.activations[0].numel() == 0:
            return
        with torch.autocast(record.activations[0].device.type, enabled=False):
            targets = self._target_of(record)
            if targets is None:
                return
            if targets:
                self._measure(record, targets)
                self.scale.update(targets, self._replicas)
                self._learner.tell_scale(self.scale.rms)
            with self.profile(profiling.LEARN), self._explaining(record.activations, record.context):
                if self._learner.learns and (record.learns_target or self.predictor.learns_without_target):
                    inputs, goal = record.activations, targets if record.learns_target else ()
                    if echo is not None and goal:
                        inputs, goal = echo(self._learner.predict, inputs, goal)
                    with self._counting("learning"):
                        self._figures["loss"] = self._learner.learn(inputs, record.context, goal)
                if self.guarded and targets and self._fallback is not None and self._fallback.learns:
                    self._fallback.tell_scale(self.scale.rms)
                    self._fallback.learn(record.activations, record.context, targets)

    def _target_of(self, record: Record) -> Gradients | None:
        """What to learn from; an empty tuple if the predictor needs no target; ``None`` for nothing."""
        if not self.predictor.needs_target and (record.targets is None or not record.wants_target):
            return () if record.step % self.train_every == 0 else None
        targets = record.targets
        if record.exact_due is not None and self.distance > 1:
            exact, weight = record.exact_targets, self._exact_weight
            if exact is None:
                return None
            if targets is None:  # the next stages were given no gradient at all
                targets = tuple(torch.zeros_like(part) for part in exact)
            self._figures["bootstrapped_cosine"] = cosine(targets, exact)
            targets = exact if weight == 1 else tuple(weight * e + (1 - weight) * t for e, t in zip(exact, targets))
        if not record.wants_target and self.predictor.learns_without_target and record.step % self.train_every == 0:
            return ()
        if targets is None or not record.wants_target:
            return None  # the step had no backward pass, or this batch is not one to learn from
        finite = all_finite(targets)
        if finite.device.type != "cpu" or not finite:  # an overflow under mixed precision: nothing to learn
            targets = tuple(torch.where(finite, target, torch.zeros_like(target)) for target in targets)
        return targets

    def _measure(self, record: Record, targets: Gradients) -> None:
        if record.judged is None:
            return
        figures = compare(record.judged, targets)
        self._figures |= figures
        if self._watch is None or not self._learner.learns:
            return
        change = self._watch.see(*self._replicas.average([figures["cosine"], figures["norm_ratio"]]))
        if change is not None:
            self._report(change)
        if self._watch.guarded or change is not None:
            self._figures["guarded"] = torch.tensor(float(self._watch.guarded))

    def _report(self, change: str) -> None:
        # Not only on rank zero: each boundary is watched by the one process that has its predictor.
        warnings.warn(f"Boundary '{self.name}', batch {self.step}: {change}.", stacklevel=2)

    @contextmanager
    def _counting(self, what: str) -> Iterator[None]:
        """Counts the operations of the first prediction and of the first step of learning."""
        if what in self._counted:
            yield
            return
        with OperationCounter() as counter:
            yield
        self._counted[what] = counter.flops
        if len(self._counted) == 2:
            self.flops = self._counted["prediction"] + self._counted["learning"] // self.train_every


def _samples_of(entry: dict[str, Any]) -> int:
    """The number of samples of a saved record."""
    return int(entry["activations"][0].shape[0])


__all__ = ["PredictorTrainer"]
