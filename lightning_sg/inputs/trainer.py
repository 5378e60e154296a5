"""Trains one boundary's input predictor: it predicts at once and learns when the true activations are due."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg._compat import tree_map_only
from lightning_sg.errors import NonFinitePredictionError, SyntheticGradientsError
from lightning_sg.inputs.base import Activations, InputPredictor
from lightning_sg.inputs.record import ActivationsAtHand, ActivationSource, InputRecord
from lightning_sg.inputs.settings import SyntheticInputs
from lightning_sg.precision import without_autocast
from lightning_sg.predictors.norms import squared_error, squared_norm
from lightning_sg.replicas import Replicas
from lightning_sg.rng import seed_for
from lightning_sg.training.base import Profile
from lightning_sg.training.learner import Learner
from lightning_sg.training.ledger import Ledger
from lightning_sg.training.metrics import all_finite

# Gives the gradient predictor and the input predictor of a boundary different initial weights.
_OF_INPUTS = 0x1A9B7


class InputTrainer:
    """The input predictor of one boundary with its optimizer, and the batches under way there.

    It learns from the true activations of batch ``t`` before it predicts for batch ``t + 1 + delay``, so that the order
    does not depend on where the stages run.

    Attributes:
        name: The boundary's name.
        step: How many batches have crossed the boundary.
        learned: How many batches the predictor has learned from.
        source: Where true activations come from.
        ledger: The batches under way.
        profile: Shows actions to the trainer's profiler.
        inquire: Says why what reaches the boundary of that name is not finite, or ``None`` if nobody knows.

    Args:
        name: The boundary's name, for messages and for the random seed.
        settings: The user's options, with the unbuilt predictor, which is copied.
        delay: Extra steps before the true activations are learned from; 0 means the next step.
        seed: Seeds the predictor's initial weights, together with ``name``.
        replicas: The replicas whose predictors learn together, from the batches of all.
    """

    def __init__(
        self, name: str, settings: SyntheticInputs, *, delay: int, seed: int, replicas: Replicas | None = None
    ) -> None:
        self.name = name
        self.step = 0
        self.learned = 0
        self.source: ActivationSource = ActivationsAtHand()
        self.profile: Profile = nullcontext
        self._delay = delay
        self._replicas = replicas or Replicas()
        self._learner = Learner(
            settings.predictor,
            settings.optimizer,
            seed=seed_for(seed, name) + _OF_INPUTS,
            replicas=self._replicas,
        )
        self._warm_up = settings.warm_up
        self.ledger: Ledger[InputRecord] = Ledger()
        self._metrics: dict[str, Tensor] = {}
        self._restored: dict[str, Any] | None = None
        self.inquire: Callable[[str], str | None] = lambda _boundary: None
        self._finite: Tensor | None = None

    # ------------------------------------------------------------------ one batch

    @property
    def predictor(self) -> InputPredictor:
        """The predictor, which the first batch builds."""
        return self._learner.predictor

    @property
    def ready(self) -> bool:
        """Whether the predictor has its parameters."""
        return self._learner.built

    @property
    def waits(self) -> bool:
        """Whether the next stage waits for the true activations of the next batch."""
        return self.learned == 0 or self.step < self._warm_up

    def learn_due(self) -> None:
        """Learns from the activations that are due before the next batch, waiting for them if necessary."""
        for record in self.ledger.due(self.step):
            self.source.activations(record)
            self._learn(record)

    def cross(
        self, features: Tensor, activations: Sequence[Tensor], *, learns: bool = True, at_hand: bool = True
    ) -> list[Tensor] | None:
        """Takes in the next batch.

        Args:
            features: What the predictor sees of the batch, float32, ``(N, ...)``.
            activations: What crosses the boundary and can carry a gradient, each ``(N, ...)``. If they are not at hand,
                tensors of these shapes and dtypes, with or without data.
            learns: Whether the predictor learns from this batch.
            at_hand: Whether these are the true activations; otherwise the source supplies them later.

        Returns:
            What the next stage is given, of the shapes and dtypes of ``activations``; ``None`` for the true
            activations.

        Raises:
            SyntheticGradientsError: If the predictor cannot work with these shapes.
            NonFinitePredictionError: If the prediction has a NaN or an infinity in it.
        """
        shapes = [tuple(activation.shape) for activation in activations]
        if any(not shape or shape[0] != features.shape[0] for shape in shapes):
            raise SyntheticGradientsError(
                f"Boundary '{self.name}' is crossed by activations of shapes {shapes}, but they are predicted from an "
                f"input of shape {tuple(features.shape)}: both must have the samples first. Choose the input with "
                "SyntheticInputs(source=...), or move the boundary to a place where the samples are first."
            )
        if not self._learner.built:
            self._build(features, [shape[1:] for shape in shapes])
        self.learn_due()
        waits, step = self.waits, self.step
        self.step += 1
        prediction = None if self.learned == 0 else self._predict(features, shapes)
        record = InputRecord(step, features, learns, prediction)
        if at_hand:
            record.take(activations)
        self.ledger.add(step, record, due=step + 1 + self._delay)
        if waits or prediction is None:
            return None
        # Copies, because the next stage may change its inputs in place.
        return [part.to(like.dtype, copy=True) for part, like in zip(prediction, activations)]

    def collect(self) -> None:
        """Waits for all activations under way, without learning from those that are not due."""
        for record in self.ledger:
            self.source.activations(record)

    def take_metrics(self) -> dict[str, Tensor]:
        """The metrics of the last batch learned from, once: scalars by name."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def check_finite(self) -> None:
        """Checks that all predictions since the last check were finite, which synchronizes with the device.

        Raises:
            NonFinitePredictionError: If so.
        """
        finite, self._finite = self._finite, None
        if finite is None or bool(finite):
            return
        cause = self.inquire(self.name) or (
            "Either the input predictor diverged: lower its learning rate (SyntheticInputs(optimizer=...)); or the "
            "activations that it learned from did: lower the learning rate of the stages before the boundary."
        )
        raise NonFinitePredictionError(
            f"The synthetic input at boundary '{self.name}' is not finite (about batch {self.step} since the start). "
            f"{cause}"
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue exactly: tensors, numbers and strings only."""
        if not self._learner.built:
            return self._restored or {"step": self.step, "learned": self.learned, "pending": []}
        self.collect()
        state = {
            "step": self.step,
            "learned": self.learned,
            **self._learner.state_dict(),
            "pending": [record.state_dict() for record in self.ledger],
        }
        # A copy: the saved state must not change as training continues.
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), state)
        saved["pending"] = self._replicas.join(saved["pending"], _samples_of)
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; the predictor follows with the next batch, which shows its sizes."""
        self.step, self.learned = state["step"], state["learned"]
        self._restored = state
        self.ledger.clear()
        self._learner.built = False

    def _restore(self, device: torch.device) -> None:
        # A copy, because optimizers update the tensors that they are given in place.
        state, self._restored = copy.deepcopy(self._restored), None
        if state is None or "predictor" not in state:
            return
        try:
            remarks = self._learner.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise SyntheticGradientsError(
                f"The input predictor saved for boundary '{self.name}' does not fit the one configured now "
                f"({type(self.predictor).__name__}). Resume with the one of the saved run. {error}"
            ) from error
        for remark in remarks:  # not only on rank zero: the one process that has the input predictor restores it
            warnings.warn(f"Input predictor at boundary '{self.name}': {remark}.", stacklevel=2)
        pending = self._replicas.share(state["pending"], _samples_of)
        for entry in tree_map_only(Tensor, lambda tensor: tensor.to(device), pending):
            record = InputRecord(**entry)
            self.ledger.add(record.step, record, record.step + 1 + self._delay)

    # ------------------------------------------------------------------ the work

    def _build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        with self._explaining(features, shapes):
            self._learner.build(features, shapes)
        self._restore(features.device)

    def _predict(self, features: Tensor, shapes: list[tuple[int, ...]]) -> Activations:
        per_sample = [shape[1:] for shape in shapes]
        with (
            self.profile(profiling.PREDICT),
            without_autocast(features.device.type),
            self._explaining(features, per_sample),
        ):
            prediction = self._learner.predict(features) or ()
        found = [tuple(part.shape) for part in prediction]
        if found != shapes:
            raise SyntheticGradientsError(
                f"{type(self.predictor).__name__} at boundary '{self.name}' predicts activations of shapes {found}, "
                f"but {shapes} cross the boundary. The first batch fixed its sizes: only the number of samples may "
                "change."
            )
        finite = all_finite(prediction)
        self._finite = finite if self._finite is None else finite & self._finite
        if finite.device.type == "cpu":  # on any other device this would stall; check_finite asks now and then
            self.check_finite()
        return prediction

    def _learn(self, record: InputRecord) -> None:
        true = record.activations
        if true is None or not record.learns or not record.features.shape[0]:
            return
        features, shapes = record.features, [tuple(part.shape[1:]) for part in true]
        with (
            self.profile(profiling.LEARN),
            without_autocast(features.device.type),
            self._explaining(features, shapes),
        ):
            if record.prediction is not None:
                size = squared_norm(true).clamp_min(1e-24)
                self._metrics["input_error"] = squared_error(record.prediction, true) / size
            self.learned += 1
            self._learner.learn(features, true)

    def _explaining(self, features: Tensor, shapes: list[tuple[int, ...]]) -> AbstractContextManager[None]:
        return _Explaining(
            f"{type(self.predictor).__name__} at boundary '{self.name}' cannot predict activations of {shapes} for each"
            f" sample from {tuple(features.shape)}"
        )


class _Explaining(AbstractContextManager[None]):
    """Re-raises an error with the input predictor, the boundary and the shapes."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (IndexError, RuntimeError, ValueError)) and not isinstance(error, SyntheticGradientsError):
            raise SyntheticGradientsError(
                f"{self._what}: {error} (SyntheticInputs(source=...) chooses its input, "
                "SyntheticInputs(predictor=...) another predictor.)"
            ) from error


def _samples_of(entry: dict[str, Any]) -> int:
    """The number of samples of a saved record."""
    return int(entry["features"].shape[0])


__all__ = ["InputTrainer"]
