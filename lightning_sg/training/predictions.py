"""Makes the predictions of one boundary: bounded, finite, and watched by the guard."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sg.errors import NonFinitePredictionError
from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo
from lightning_sg.replicas import Replicas
from lightning_sg.training.bound import TargetScale
from lightning_sg.training.guard import AlignmentGuard, Watch
from lightning_sg.training.learner import Learner
from lightning_sg.training.metrics import all_finite, compare, known_finite, norms, products
from lightning_sg.training.record import Record


class Predictions:
    """A predictor's output as a stage can use it.

    A prediction is at most ``bound`` times as large as recent targets. One that is not finite is replaced by zero and
    reported. While the guard distrusts the predictor, its fallback takes its place.

    Args:
        name: The boundary's name, for messages.
        learner: The predictor.
        fallback: The guard's fallback, if it is a predictor.
        guard: Judges the predictions, or ``None``: then one that is not finite is an error.
        bound: See :class:`TargetScale`.
        replicas: The replicas that the guard judges together.
        inquire: Says why a prediction is not finite, told whether what reaches the boundary is, or ``None`` if nobody
            knows.
    """

    def __init__(
        self,
        name: str,
        learner: Learner[GradientPredictor],
        fallback: Learner[GradientPredictor] | None,
        guard: AlignmentGuard | None,
        bound: float,
        replicas: Replicas,
        inquire: Callable[[bool], str | None] = lambda _arrives_finite: None,
    ) -> None:
        self.scale = TargetScale(bound)
        self._name = name
        self._learner = learner
        self._fallback = fallback
        self._watch = None if guard is None else Watch(guard)
        self._replicas = replicas
        self._inquire = inquire
        self._loss: LossInfo | None = None
        self._suspect: _Suspect | None = None
        self._compared: tuple[Gradients, Gradients] | None = None  # of the last target, for the metrics
        self._changed = False  # the guard has changed its mind since the last metrics

    @property
    def guarded(self) -> bool:
        """Whether the guard has taken the boundary from the predictor."""
        return self._watch is not None and self._watch.guarded

    @property
    def couples(self) -> bool:
        """Whether the stage waits for the true gradient in the predictor's place."""
        return self._watch is not None and self._watch.guarded and self._watch.guard.fallback == "couple"

    def build(self, inputs: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Builds the predictor, and the fallback if that is one."""
        self._loss = loss
        self.scale = TargetScale(self.scale.bound)
        self._learner.build(inputs, context, loss)
        if self._fallback is not None:
            self._fallback.build(inputs, context, loss)

    # ------------------------------------------------------------------ predicting

    def bounded(self, prediction: Gradients, record: Record) -> Gradients:
        """A raw prediction within the bound, or zeros if it is not finite."""
        sizes = norms(prediction)
        # The gradient of a loss of the predictor's own has no target to be bounded by.
        if self._learner.predictor.target_use.asks:
            prediction = self.scale.limit(prediction, sizes)
        if self._replicas.count == 1 and known_finite(sizes):
            return prediction
        return self._made_finite(prediction, record)

    def guarded_prediction(self, record: Record) -> Gradients | None:
        """What is used while the guard distrusts the predictor: the fallback's prediction, or nothing."""
        if self._fallback is None:
            return None
        prediction = self._fallback.predict(record.activations, record.context)
        return None if prediction is None else self.scale.limit(prediction)

    def _made_finite(self, prediction: Gradients, record: Record) -> Gradients:
        """The prediction, or zeros if it is not finite: then :meth:`check_finite` says so."""
        finite = all_finite(prediction)
        if finite.device.type == "cpu" and self._replicas.count == 1:
            if finite:
                return prediction
            self._suspect = _Suspect(finite, all_finite(record.activations), record)
            self.check_finite()
            return tuple(torch.zeros_like(part) for part in prediction)
        # Asking a device stops it, and asking other replicas stops this one. check_finite looks at the answer; until
        # then the prediction is harmless.
        found = _Suspect(finite, all_finite(record.activations), record)
        self._suspect = found if self._suspect is None else self._suspect.joined(found)
        finite = self._suspect.finite
        return tuple(torch.where(finite, part, torch.zeros_like(part)) for part in prediction)

    def check_finite(self) -> None:
        """Asks the device whether a prediction since the last time was not finite, which stops it for a moment.

        Raises:
            NonFinitePredictionError: If so, and there is no guard, or the activations were not finite either.
        """
        suspect, self._suspect = self._suspect, None
        if suspect is None:
            return
        finite, healthy = suspect.finite, suspect.healthy
        if self._replicas.count > 1:  # all start afresh, or none
            shares = self._replicas.average([torch.stack([finite, healthy]).float()])[0]
            finite, healthy = (shares == 1).unbind()
        if bool(finite):
            return
        record = suspect.record
        if bool(healthy) and self._watch is not None:
            self._learner.restart(record.activations, record.context, self._loss)
            self._learner.tell_scale(self.scale.rms)
            self._report(self._watch.restart(), record.step + 1)
            return
        cause = self._inquire(bool(healthy)) or (
            "The predictor itself diverged: lower its learning rate "
            "(SyntheticGradients(training=PredictorTraining(optimizer=...))), or let a guard start it afresh "
            "(SyntheticGradients(guard=AlignmentGuard()))."
            if bool(healthy)
            else "The activations were already not finite. Either the data of a batch are not, or the stages before "
            "the boundary diverged or overflowed; then lower their learning rate or clip their gradients."
        )
        raise NonFinitePredictionError(
            f"The synthetic gradient at boundary '{self._name}' is not finite (batch {record.step} since the start). "
            f"No stage was updated with it. {cause}"
        )

    # ------------------------------------------------------------------ targets

    def take_target(self, record: Record, targets: Gradients, sizes: Sequence[Tensor], step: int) -> None:
        """Judges a batch's prediction by its target, and takes the target's size into the bound.

        Args:
            record: The batch.
            targets: Its per-sample target.
            sizes: The norms of the target.
            step: How many batches have crossed the boundary, for messages.
        """
        if record.judged is not None:
            self._compared = record.judged, targets
            if self._watch is not None and self._learner.learns:
                change = self._watch.see(products(record.judged, targets, sizes), self._replicas)
                self._changed = self._changed or change is not None
                if change is not None:
                    self._report(change, step)
        self.scale.update(targets, self._replicas, sizes)
        self._learner.tell_scale(self.scale.rms)

    def take_metrics(self) -> dict[str, Tensor]:
        """How well the last prediction met its target, once; see :func:`~lightning_sg.training.metrics.compare`."""
        if self._compared is None:
            return {}
        metrics = compare(*self._compared)
        if self._watch is not None and (self._watch.guarded or self._changed):
            metrics["guarded"] = torch.tensor(float(self._watch.guarded))
        self._compared, self._changed = None, False
        return metrics

    def teach_fallback(self, record: Record, targets: Gradients) -> None:
        """Has the fallback learn while it is in use."""
        if self.guarded and self._fallback is not None and self._fallback.learns:
            self._fallback.tell_scale(self.scale.rms)
            self._fallback.learn(record.activations, record.context, targets)

    def _report(self, change: str, step: int) -> None:
        # Not only on rank zero: the one process that has the boundary's predictor watches it.
        warnings.warn(f"Boundary '{self._name}', batch {step}: {change}.", stacklevel=2)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state to save, besides that of the predictor."""
        return {
            "scale": self.scale.state_dict(),
            "guard": None if self._watch is None else self._watch.state_dict(),
            "fallback": None if self._fallback is None else self._fallback.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> list[str]:
        """Restores :meth:`state_dict` after :meth:`build`; returns what of it is not used, as sentences."""
        self.scale.load_state_dict(state["scale"], device)
        self._learner.tell_scale(self.scale.rms)
        if self._watch is not None and state["guard"] is not None:
            self._watch.load_state_dict(state["guard"], device)
        if self._fallback is None:
            return [] if state["fallback"] is None else ["the predictor that the guard fell back to is dropped"]
        if state["fallback"] is None:
            return ["the predictor that the guard falls back to starts afresh"]
        remarks = self._fallback.load_state_dict(state["fallback"])
        self._fallback.tell_scale(self.scale.rms)
        return [f"{remark} (of the predictor that the guard falls back to)" for remark in remarks]


class _Suspect:
    """Whether predictions since the last check were finite, on the device.

    Args:
        finite: Whether they were, a boolean scalar.
        healthy: Whether the activations were, a boolean scalar.
        record: The newest of the batches.
    """

    def __init__(self, finite: Tensor, healthy: Tensor, record: Record) -> None:
        self.finite = finite
        self.healthy = healthy
        self.record = record

    def joined(self, newer: _Suspect) -> _Suspect:
        """Both together."""
        return _Suspect(newer.finite & self.finite, newer.healthy & self.healthy, newer.record)


__all__ = ["Predictions"]
