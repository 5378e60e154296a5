"""Trains one boundary's gradient predictor: remembers predictions until their targets are due, then learns."""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sg._compat import tree_map_only
from lightning_sg.errors import NonFinitePredictionError, SyntheticGradientsError
from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]


@dataclass
class Record:
    """One training batch at one boundary, kept until its target is learned from.

    Attributes:
        step: How many training batches crossed the boundary before this one.
        activations: What crossed, detached and in float32, each ``(N, ...)``.
        context: What the callback took from the batch.
        wants_target: Whether the predictor is trained, and measured, on this batch.
        prediction: The per-sample synthetic gradients as used, or ``None`` for none.
        targets: The per-sample targets, once they are here.
        fetch: Brings the targets from another process, or ``None`` if there are none; blocks until then.
    """

    step: int
    activations: Gradients
    context: Any
    wants_target: bool
    prediction: Gradients | None = None
    targets: Gradients | None = None
    fetch: Callable[[], Gradients | None] | None = None

    @property
    def samples(self) -> int:
        """The number of samples N: predictors work with the gradient of the sum over samples."""
        return max(1, self.activations[0].shape[0])

    def add_target(self, gradients: Iterable[Tensor | None]) -> None:
        """Adds to the target the gradients of the mean loss, of the activations' shapes; ``None`` counts as zero."""
        new = tuple(
            torch.zeros_like(activation) if gradient is None else gradient.detach() * float(self.samples)
            for gradient, activation in zip(gradients, self.activations)
        )
        new = tuple(gradient.float() for gradient in new)
        self.targets = new if self.targets is None else tuple(old + more for old, more in zip(self.targets, new))

    def collect(self) -> None:
        """Waits for the target if it comes from another process."""
        if self.fetch is not None:
            fetch, self.fetch = self.fetch, None
            gradients = fetch()
            if gradients is not None:
                self.add_target(gradients)


class TargetScale:
    """The running size of the targets at one boundary, and the bound it puts on predictions.

    The rule: the root mean square of a prediction is at most ``bound`` times the root mean square of the
    targets seen, an exponential average over their squares that weights recent ones. Without it the prediction
    error feeds on itself in networks without normalisation layers and runs to NaN.

    Args:
        bound: The largest ratio of prediction to target.
        decay: The weight of the past in the average; 0.9 remembers about ten targets.
    """

    def __init__(self, bound: float = 1.0, decay: float = 0.9) -> None:
        self.bound = bound
        self.decay = decay
        self._sum: Tensor | None = None  # decayed sum of mean squares, one for each activation
        self._weight = 0.0

    @property
    def rms(self) -> Tensor | None:
        """The running root mean square, one for each activation; ``None`` before the first target."""
        return None if self._sum is None else (self._sum / self._weight).sqrt()

    def update(self, targets: Gradients) -> None:
        """Takes one batch's targets into the average."""
        squares = torch.stack([mean_square(target) for target in targets])
        self._sum = squares if self._sum is None else self._sum * self.decay + squares
        self._weight = self._weight * self.decay + 1.0

    def limit(self, predictions: Gradients) -> Gradients:
        """Shrinks each prediction to the bound; before the first target the bound is zero."""
        rms = self.rms
        if rms is None:
            return tuple(torch.zeros_like(prediction) for prediction in predictions)
        limited = []
        for prediction, size in zip(predictions, rms):
            own = mean_square(prediction).sqrt()
            limited.append(prediction * (self.bound * size / own.clamp_min(1e-30)).clamp_max(1.0))
        return tuple(limited)

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores :meth:`state_dict`."""
        self._sum = None if state["sum"] is None else state["sum"].to(device)
        self._weight = state["weight"]


class PredictorTrainer:
    """The predictor of one boundary with its optimizer, its pending targets and its figures.

    The order is fixed, so that it does not depend on where the stages run: the prediction for batch ``t`` comes
    from a predictor that has learned from the targets of batches ``0 .. t - 1 - delay``, in order.

    Args:
        name: The boundary's name, for messages and for the random seed.
        template: An unbuilt predictor; it is copied.
        make_optimizer: Makes the predictor's optimizer from its parameters.
        delay: How many steps later than at once the predictor learns from a target.
        train_every: Learn from every how many-th batch.
        bound: See :class:`TargetScale`.
        seed: Seeds the predictor's initial weights, together with ``name``.
    """

    def __init__(
        self,
        name: str,
        template: GradientPredictor,
        make_optimizer: OptimizerFactory,
        *,
        delay: int,
        train_every: int,
        bound: float,
        seed: int,
    ) -> None:
        self.name = name
        self.predictor = self._template = template
        self.delay = delay
        self.train_every = train_every
        self.scale = TargetScale(bound)
        self.step = 0
        self._make_optimizer = make_optimizer
        self._optimizer: Optimizer | None = None
        self._seed = seed ^ zlib.crc32(name.encode())
        self._built = False
        self._restored: dict[str, Any] | None = None
        self._pending: deque[Record] = deque()
        self._figures: dict[str, Tensor] = {}
        self._non_finite: tuple[Tensor, Tensor, int] | None = None

    @property
    def exact(self) -> bool:
        """Whether the boundary passes the true gradient on."""
        return self.predictor.exact

    def prepare(self, activations: Iterable[Tensor], context: Any, loss: LossInfo | None) -> Record:
        """Takes in the next batch, without waiting for anything.

        Args:
            activations: What crosses the boundary and can carry a gradient, each ``(N, ...)``.
            context: What the callback took from the batch.
            loss: What is known about the model's own loss.

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
        if not self._built:
            with torch.autocast(inputs[0].device.type, enabled=False):
                self._build(inputs, context, loss)
        learns = self._optimizer is not None and self.step % self.train_every == 0
        record = Record(self.step, inputs, context, wants_target=learns or self.exact)
        self.step += 1
        return record

    def predict(self, record: Record) -> None:
        """Puts the prediction into ``record``, which is then pending.

        First learns from all targets that are due, waiting for those that come from another process.

        Raises:
            NonFinitePredictionError: If the prediction has a NaN or an infinity in it.
        """
        self.settle(record.step - 1 - self.delay)
        self._pending.append(record)
        if self.exact:
            return
        with torch.no_grad(), torch.autocast(record.activations[0].device.type, enabled=False):
            record.prediction = self._predict(record)

    def settle(self, last: int) -> None:
        """Learns from the targets of the batches up to ``last``."""
        while self._pending and self._pending[0].step <= last:
            self._learn(self._pending.popleft())

    def collect(self) -> None:
        """Waits for all targets under way, without learning from those that are not due."""
        for record in self._pending:
            record.collect()

    def take_figures(self) -> dict[str, Tensor]:
        """The figures of the last batch learned from, once: scalars ``loss``, ``cosine`` and ``norm_ratio``."""
        figures, self._figures = self._figures, {}
        return figures

    def check_finite(self) -> None:
        """Asks the device whether a prediction since the last time was not finite, which stops it for a moment.

        Raises:
            NonFinitePredictionError: If so.
        """
        if self._non_finite is None:
            return
        (finite, healthy, step), self._non_finite = self._non_finite, None
        if bool(finite):
            return
        cause = (
            "The predictor itself diverged: lower its learning rate (SyntheticGradients(optimizer=...))."
            if bool(healthy)
            else "The activations were already non-finite: the network above the boundary diverged; lower its "
            "learning rate or clip its gradients."
        )
        raise NonFinitePredictionError(
            f"The synthetic gradient at boundary '{self.name}' is not finite (batch {step} since the start). "
            f"No stage was updated with it. {cause}"
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on exactly: tensors, numbers and strings only."""
        if not self._built:
            return self._restored or {"step": self.step, "pending": []}
        self.collect()
        pending = [
            {
                "step": record.step,
                "activations": record.activations,
                "context": record.context,
                "wants_target": record.wants_target,
                "prediction": record.prediction,
                "targets": record.targets,
            }
            for record in self._pending
        ]
        state = {
            "step": self.step,
            "predictor": self.predictor.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "scale": self.scale.state_dict(),
            "pending": pending,
        }
        # A copy: the saved state must not change when the training goes on.
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), state)
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, at once or as soon as the predictor's sizes are known."""
        self.step = state["step"]
        self._restored = state
        self._pending.clear()
        self.scale = TargetScale(self.scale.bound)
        self._built = False

    def _restore(self, device: torch.device) -> None:
        # A copy: optimizers go on in the very tensors that they are given.
        state, self._restored = copy.deepcopy(self._restored), None
        if state is None or "predictor" not in state:
            return
        try:
            self.predictor.load_state_dict(state["predictor"])
        except RuntimeError as error:
            raise SyntheticGradientsError(
                f"The predictor saved for boundary '{self.name}' does not fit the one configured now "
                f"({type(self.predictor).__name__}). Resume with the predictor of the saved run. {error}"
            ) from error
        if self._optimizer is not None and state["optimizer"] is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self.scale.load_state_dict(state["scale"], device)
        self.predictor.target_rms = self.scale.rms
        for entry in tree_map_only(Tensor, lambda tensor: tensor.to(device), state["pending"]):
            self._pending.append(Record(**entry))

    # ------------------------------------------------------------------ the work

    def _build(self, inputs: Gradients, context: Any, loss: LossInfo | None) -> None:
        device = inputs[0].device
        devices = [device] if device.type == "cuda" else []
        self.predictor = copy.deepcopy(self._template)
        # The user's random numbers are the same with and without predictors.
        default = torch.get_default_dtype()
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(self._seed)
            torch.set_default_dtype(torch.float32)  # under "bf16-true" and "64-true" Lightning changes it
            try:
                with self._explaining(inputs, context):
                    self.predictor.build(inputs, context, loss)
            finally:
                torch.set_default_dtype(default)
        self.predictor.to(device)
        self.predictor.train()
        parameters = [parameter for parameter in self.predictor.parameters() if parameter.requires_grad]
        self._optimizer = self._make_optimizer(parameters) if parameters else None
        self._built = True
        self._restore(device)

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
        with self._explaining(record.activations, record.context):
            prediction = self.predictor(record.activations, record.context)
        if prediction is None:
            return None
        prediction = self.scale.limit(tuple(part.detach() for part in prediction))
        finite = all_finite(prediction)
        if finite.device.type == "cpu":
            if not finite:
                self._non_finite = (finite, all_finite(record.activations), record.step)
                self.check_finite()
            return prediction
        # Asking a device stops it: the answer is looked at in check_finite, and until then nothing is harmed.
        healthy = all_finite(record.activations)
        if self._non_finite is not None:
            finite, healthy = finite & self._non_finite[0], healthy & self._non_finite[1]
        self._non_finite = (finite, healthy, record.step)
        return tuple(torch.where(finite, part, torch.zeros_like(part)) for part in prediction)

    def _learn(self, record: Record) -> None:
        record.collect()
        if record.targets is None or not record.wants_target or record.activations[0].numel() == 0:
            return  # the step had no backward pass, this batch is not one to learn from, or it is empty
        with torch.autocast(record.activations[0].device.type, enabled=False):
            targets = record.targets
            finite = all_finite(targets)
            if finite.device.type != "cpu" or not finite:  # an overflow under mixed precision: nothing to learn
                targets = tuple(torch.where(finite, target, torch.zeros_like(target)) for target in targets)
            if record.prediction is not None:
                self._figures = compare(record.prediction, targets)
            self.scale.update(targets)
            self.predictor.target_rms = self.scale.rms
            if self._optimizer is None:
                return
            with torch.enable_grad(), self._explaining(record.activations, record.context):
                loss = self.predictor.loss(record.activations, record.context, targets)
                self._optimizer.zero_grad()
                loss.backward()
            self._optimizer.step()
            self._figures["loss"] = loss.detach()


def compare(prediction: Gradients, targets: Gradients) -> dict[str, Tensor]:
    """How well a prediction meets its target.

    Args:
        prediction: Synthetic gradients of any shapes.
        targets: Targets of the same shapes.

    Returns:
        Scalars ``cosine`` (similarity, -1 to 1; 0 if either is zero) and ``norm_ratio`` (of prediction to target).
    """
    dot = torch.stack([torch.dot(p.reshape(-1), t.reshape(-1)) for p, t in zip(prediction, targets)]).sum()
    size = torch.stack([torch.linalg.vector_norm(p) for p in prediction]).norm()
    goal = torch.stack([torch.linalg.vector_norm(t) for t in targets]).norm()
    tiny = 1e-30
    return {"cosine": dot / (size * goal).clamp_min(tiny), "norm_ratio": size / goal.clamp_min(tiny)}


def mean_square(tensor: Tensor) -> Tensor:
    """The mean of the squares, in one pass and without a copy."""
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat) / flat.numel()


def all_finite(tensors: Gradients) -> Tensor:
    """Whether there is no NaN and no infinity in ``tensors``, a boolean scalar; their sum tells in one pass."""
    return torch.stack([tensor.sum() for tensor in tensors]).isfinite().all()


__all__ = ["OptimizerFactory", "PredictorTrainer", "Record", "TargetScale", "compare"]
