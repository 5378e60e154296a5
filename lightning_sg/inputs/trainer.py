"""Trains one boundary's input predictor: predicts at once, and learns when the true activations are due."""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg._compat import tree_map_only
from lightning_sg.errors import NonFinitePredictionError, SyntheticGradientsError
from lightning_sg.inputs.base import Activations, InputPredictor
from lightning_sg.inputs.record import InputRecord
from lightning_sg.inputs.settings import SyntheticInputs
from lightning_sg.predictors.base import squared_error, squared_norm
from lightning_sg.replicas import Replicas
from lightning_sg.training.learner import Learner
from lightning_sg.training.metrics import all_finite
from lightning_sg.training.teacher import Teacher

# The weights of gradient and input predictors at one boundary begin from different numbers.
_OF_INPUTS = 0x1A9B7


class InputTrainer(Teacher[InputPredictor]):
    """The input predictor of one boundary with its optimizer, its pending activations and its figures.

    The order is fixed, so that it does not depend on where the stages run: the true activations of batch ``t`` are
    learned from before the prediction for batch ``t + 1 + delay``.

    Args:
        name: The boundary's name, for messages and for the random seed.
        settings: The unbuilt predictor, which is copied, and what else the user said.
        delay: How many steps later than at once it learns.
        seed: Seeds the predictor's initial weights, together with ``name``.
        replicas: Those whose predictors at this boundary learn from all their batches together.
    """

    def __init__(
        self, name: str, settings: SyntheticInputs, *, delay: int, seed: int, replicas: Replicas | None = None
    ) -> None:
        replicas = replicas or Replicas()
        seed = (seed ^ zlib.crc32(name.encode())) + _OF_INPUTS
        learner = Learner(settings.predictor, settings.optimizer, seed=seed, replicas=replicas)
        super().__init__(name, learner, delay=delay, replicas=replicas)
        #: How many batches it has learned from.
        self.learned = 0
        self._warm_up = settings.warm_up
        self._pending: deque[InputRecord] = deque()
        self._restored: dict[str, Any] | None = None
        self._finite: Tensor | None = None

    # ------------------------------------------------------------------ one batch

    @property
    def waits(self) -> bool:
        """Whether the next stage goes on with the true activations of the batch that comes."""
        return self.learned == 0 or self.step < self._warm_up

    def settle(self) -> None:
        """Learns from the activations that are due before the batch that comes, waiting for them if need be."""
        while self._pending and self._pending[0].step + 1 + self.delay <= self.step:
            record = self._pending.popleft()
            record.collect()
            self._learn(record)

    def cross(
        self,
        features: Tensor,
        activations: Sequence[Tensor],
        *,
        learns: bool = True,
        fetch: Callable[[], Activations] | None = None,
    ) -> list[Tensor] | None:
        """Takes in the next batch.

        Args:
            features: What the boundary is told of it, float32, ``(N, ...)``.
            activations: What crosses the boundary and can carry a gradient, each ``(N, ...)``; with ``fetch``, tensors
                of these shapes and dtypes, with or without data.
            learns: Whether this batch is one to learn from.
            fetch: Brings the true activations later.

        Returns:
            What the next stage goes on with, of the shapes and dtypes of ``activations``; ``None`` for those.

        Raises:
            SyntheticGradientsError: If the predictor cannot work with these shapes.
            NonFinitePredictionError: If the prediction has a NaN or an infinity in it.
        """
        shapes = [tuple(activation.shape) for activation in activations]
        if any(not shape or shape[0] != features.shape[0] for shape in shapes):
            raise SyntheticGradientsError(
                f"Boundary '{self.name}' is crossed by activations of shapes {shapes}, but what they are predicted "
                f"from has the shape {tuple(features.shape)}: both must have the samples first. Choose the input by "
                "SyntheticInputs(source=...), or move the boundary to where the samples are first."
            )
        if not self._learner.built:
            self._build(features, [shape[1:] for shape in shapes])
        self.settle()
        waits, number = self.waits, self.step
        self.step += 1
        prediction = None if self.learned == 0 else self._predict(features, shapes)
        true = None if fetch is not None else tuple(activation.detach().float() for activation in activations)
        self._pending.append(InputRecord(number, features, learns, prediction, true, fetch))
        if waits or prediction is None:
            return None
        # Copies: the next stage may change its own in place.
        return [part.to(like.dtype, copy=True) for part, like in zip(prediction, activations)]

    def collect(self) -> None:
        """Waits for all activations under way, without learning from those that are not due."""
        for record in self._pending:
            record.collect()

    def check_finite(self) -> None:
        """Asks the device whether a prediction since the last time was not finite, which stops it for a moment.

        Raises:
            NonFinitePredictionError: If so.
        """
        finite, self._finite = self._finite, None
        if finite is None or bool(finite):
            return
        raise NonFinitePredictionError(
            f"The synthetic input at boundary '{self.name}' is not finite (about batch {self.step} since the start). "
            "Either the input predictor diverged: lower its learning rate (SyntheticInputs(optimizer=...)); or the "
            "activations that it learned from did: lower the learning rate of the stages before the boundary."
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on exactly: tensors, numbers and strings only."""
        if not self._learner.built:
            return self._restored or {"step": self.step, "learned": self.learned, "pending": []}
        self.collect()
        state = {
            "step": self.step,
            "learned": self.learned,
            **self._learner.state_dict(),
            "pending": [record.state_dict() for record in self._pending],
        }
        # A copy: the saved state must not change when the training goes on.
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), state)
        saved["pending"] = self._replicas.join(saved["pending"], _samples_of)
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, the predictor as soon as its sizes are known."""
        self.step, self.learned = state["step"], state["learned"]
        self._restored = state
        self._pending.clear()
        self._learner.built = False

    def _restore(self, device: torch.device) -> None:
        # A copy: optimizers go on in the very tensors that they are given.
        state, self._restored = copy.deepcopy(self._restored), None
        if state is None or "predictor" not in state:
            return
        try:
            self._learner.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise SyntheticGradientsError(
                f"The input predictor saved for boundary '{self.name}' does not fit the one configured now "
                f"({type(self.predictor).__name__}). Resume with the one of the saved run. {error}"
            ) from error
        pending = self._replicas.share(state["pending"], _samples_of)
        for entry in tree_map_only(Tensor, lambda tensor: tensor.to(device), pending):
            self._pending.append(InputRecord(**entry))

    # ------------------------------------------------------------------ the work

    def _build(self, features: Tensor, shapes: list[tuple[int, ...]]) -> None:
        with self._explaining(features, shapes):
            self._learner.build(features, shapes)
        self._restore(features.device)

    def _predict(self, features: Tensor, shapes: list[tuple[int, ...]]) -> Activations:
        per_sample = [shape[1:] for shape in shapes]
        with (
            self.profile(profiling.PREDICT),
            torch.autocast(features.device.type, enabled=False),
            self._explaining(features, per_sample),
        ):
            prediction = self._learner.predict(features) or ()
        found = [tuple(part.shape) for part in prediction]
        if found != shapes:
            raise SyntheticGradientsError(
                f"{type(self.predictor).__name__} at boundary '{self.name}' predicts activations of shapes {found} "
                f"where {shapes} cross. Its sizes are those of the first batch: shapes may differ in the number of "
                "samples only."
            )
        finite = all_finite(prediction)
        self._finite = finite if self._finite is None else finite & self._finite
        if finite.device.type == "cpu":  # asking another device would stop it: check_finite does, now and then
            self.check_finite()
        return prediction

    def _learn(self, record: InputRecord) -> None:
        true = record.activations
        if true is None or not record.learns or not record.features.shape[0]:
            return
        features, shapes = record.features, [tuple(part.shape[1:]) for part in true]
        with (
            self.profile(profiling.LEARN),
            torch.autocast(features.device.type, enabled=False),
            self._explaining(features, shapes),
        ):
            if record.prediction is not None:
                size = squared_norm(true).clamp_min(1e-24)
                self._figures["input_error"] = squared_error(record.prediction, true) / size
            self.learned += 1
            self._learner.learn(features, true)

    def _explaining(self, features: Tensor, shapes: list[tuple[int, ...]]) -> AbstractContextManager[None]:
        return _Explaining(
            f"{type(self.predictor).__name__} at boundary '{self.name}' cannot predict activations of {shapes} for each"
            f" sample from {tuple(features.shape)}"
        )


class _Explaining(AbstractContextManager[None]):
    """Says which input predictor cannot work with what."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (IndexError, RuntimeError, ValueError)) and not isinstance(error, SyntheticGradientsError):
            raise SyntheticGradientsError(
                f"{self._what}: {error} (SyntheticInputs(source=...) chooses what it is told, "
                "SyntheticInputs(predictor=...) another.)"
            ) from error


def _samples_of(entry: dict[str, Any]) -> int:
    """The number of samples of a saved record."""
    return int(entry["features"].shape[0])


__all__ = ["InputTrainer"]
