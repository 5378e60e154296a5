"""The estimator of one scored boundary as it learns: with its optimizer, its replay and its random numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sg import profiling
from lightning_sg._compat import tree_map_only
from lightning_sg.blackbox.boundary import ScoredBoundary
from lightning_sg.blackbox.estimator import Estimator, Example
from lightning_sg.blackbox.numbers import Numbers
from lightning_sg.blackbox.replay import Replay
from lightning_sg.blackbox.sampling import Draw
from lightning_sg.errors import NonFinitePredictionError, SyntheticGradientsError
from lightning_sg.options import PredictorTraining
from lightning_sg.replicas import Replicas, is_of_a_collective
from lightning_sg.rng import seed_for
from lightning_sg.training.base import Profile
from lightning_sg.training.learner import Learner


@dataclass(frozen=True)
class ScoredOptions:
    """What all scored boundaries are told alike.

    Attributes:
        delay: Extra steps before scores that come later are learned from; 0 means the next step.
        training: How estimators are trained.
        seed: Seeds initial weights, exploration and the choice of rows to learn from, with the boundary's name.
        replicas: The replicas whose estimators learn together.
        leaves_out: Whether rows whose score is not finite are left out; else they are an error.
    """

    delay: int = 1
    training: PredictorTraining = PredictorTraining()
    seed: int = 0
    replicas: Replicas = Replicas()
    leaves_out: bool = False


class Learning:
    """An estimator that learns.

    Attributes:
        numbers: The boundary's random numbers.
        profile: Shows actions to the trainer's profiler.

    Args:
        name: The boundary's name, for messages and for random numbers.
        boundary: The boundary.
        options: What all boundaries are told alike.
    """

    def __init__(self, name: str, boundary: ScoredBoundary, options: ScoredOptions) -> None:
        self._name = name
        self._options = options
        self.profile: Profile = nullcontext
        training, seed = options.training, seed_for(options.seed, name)
        template = copy.deepcopy(boundary.estimator)
        template.sampling = boundary.sampling
        self._learner: Learner[Estimator] = Learner(
            template, training.optimizer, training.lr_scheduler, ema=training.ema, seed=seed, replicas=options.replicas
        )
        self.numbers = Numbers(seed, options.replicas.index)
        self._replay = Replay(boundary.replay) if boundary.replay and template.replays else None
        self._like: Example | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def estimator(self) -> Estimator:
        """The estimator, built once the first scores are known."""
        return self._learner.predictor

    @property
    def ready(self) -> bool:
        """Whether the estimator has its parameters."""
        return self._learner.built

    def prepare(self, example: Example) -> None:
        """Builds the estimator for rows such as these, unless that is done already."""
        if not self.ready:
            with self.explaining():
                self._learner.build(example)
            self._like = example.chosen(slice(0, 1))

    def learn(self, example: Example, batch: int, visit: int = 0) -> Tensor | None:
        """Takes in rows with their scores; returns the loss, if it was time to learn.

        Args:
            example: The rows.
            batch: The number of the training batch.
            visit: Which call of the boundary in the batch they are of.
        """
        empty = not len(example.score)  # all rows were left out
        if self._options.leaves_out:
            empty = self._options.replicas.any(empty)  # they learn together, or not at all
        if empty:
            return None
        self.prepare(example)
        if self._replay is not None:
            with self.explaining():
                self._replay.add(example)
        training, estimator = self._options.training, self.estimator
        if not self._learner.learns or batch % training.every:
            return None
        rows, loss = example, None
        generator = self.numbers.of(batch, "learn", visit, example.score.device)
        with self.profile(profiling.LEARN), self.explaining():
            for _ in range(estimator.updates * training.updates):
                if self._replay is not None:
                    rows = self._replay.sample(estimator.batch, generator)
                loss = self._learner.learn(rows, generator)
        return loss

    def gradient(self, draw: Draw, context: Any, score: Tensor | None, batch: int, visit: int) -> Tensor:
        """The gradient for each row, ``(R, ...)``.

        Args:
            draw: What crossed.
            context: What is known besides.
            score: The scores, if they have come.
            batch: The number of the training batch.
            visit: Which call of the boundary in the batch this is.

        Raises:
            NonFinitePredictionError: If it is NaN or infinite.
        """
        generator = self.numbers.of(batch, "estimate", visit, draw.value.device)
        with self.profile(profiling.PREDICT), self.explaining():
            found = self._learner.predict(draw, context, score, generator)
        assert found is not None
        gradient = found[0]
        if gradient.device.type == "cpu" and not bool(gradient.isfinite().all()):
            raise NonFinitePredictionError(
                f"The gradient that {type(self.estimator).__name__} makes at '{self._name}' is not finite (training "
                f"batch {batch}). Lower its learning rate (PredictorTraining(optimizer=...)), or bound the activation."
            )
        return gradient

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Says which estimator cannot work with what."""
        try:
            yield
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, SyntheticGradientsError) or is_of_a_collective(error):
                raise
            raise SyntheticGradientsError(
                f"{type(self.estimator).__name__} at '{self._name}' cannot work with what crosses it: {error}. From "
                "batch to batch, only the number of samples may change (`context=` of the call chooses what the "
                "estimator is told)."
            ) from error

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The estimator with its optimizer, and the replay; empty before the first scores. A collective."""
        if not self.ready or self._like is None:
            return self._restored or {}
        rows = None if self._replay is None else self._replay.rows()
        state = {
            "like": list(self._like),
            **self._learner.kinds(),
            **self._learner.state_dict(),
            "replay": [] if rows is None else [{"rows": [*rows.of_samples()], "spread": rows.spread.tolist()}],
        }
        saved: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), state)
        saved["replay"] = self._options.replicas.join(saved["replay"], _rows_of)
        return saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict` with the next :meth:`restore`."""
        self._restored = state or None
        self._learner.built = False

    def restore(self, device: torch.device) -> None:
        """Restores what was loaded, if anything was.

        Raises:
            SyntheticGradientsError: If it is of another estimator.
        """
        state, self._restored = copy.deepcopy(self._restored), None
        if state is None:
            return
        state = tree_map_only(Tensor, lambda tensor: tensor.to(device), state)
        try:
            self.prepare(Example(*state["like"]))
            remarks = self._learner.load_state_dict(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise SyntheticGradientsError(
                f"The estimator saved for '{self._name}' does not fit the one configured now "
                f"({type(self.estimator).__name__}). Resume with the estimator of the saved run. {error}"
            ) from error
        for remark in remarks:
            warnings.warn(f"'{self._name}': {remark.replace('predictor', 'estimator')}.", stacklevel=2)
        if self._replay is not None:
            for entry in self._options.replicas.share(state["replay"], _rows_of):
                self._replay.add(Example.of(entry["rows"], entry["spread"]))


def _rows_of(entry: dict[str, Any]) -> int:
    """The number of rows of a saved replay."""
    return int(entry["rows"][0].shape[0])


__all__ = ["Learning", "ScoredOptions"]
