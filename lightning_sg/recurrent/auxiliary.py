"""The auxiliary task: predict the synthetic gradient at the end of a chunk from the state at its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sg.options import PredictorTraining
from lightning_sg.predictors import MLPPredictor
from lightning_sg.predictors.base import GradientPredictor, Gradients
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.replicas import Replicas
from lightning_sg.rng import seed_for
from lightning_sg.training.learner import Learner


class Auxiliary:
    """A second predictor at a boundary in time, whose loss also trains the network.

    The gradient of its loss is added to the target of the synthetic gradient. The state then also learns to serve the
    chunk after the next, which extends the horizon by a chunk. Source: Jaderberg et al. 2017 (arXiv 1608.05343),
    section 3.2.

    Args:
        learner: The second predictor.
        weight: The weight of its loss, a relative squared error.
    """

    def __init__(self, learner: Learner[GradientPredictor], weight: float) -> None:
        self._learner = learner
        self._weight = weight
        self._restored: dict[str, Any] | None = None

    def gradient(self, state: Gradients, goal: Gradients, rms: Tensor | None) -> Gradients:
        """Trains the predictor on one chunk; returns the gradient of its loss with respect to the state.

        Args:
            state: The state at the start of the chunk, each ``(N, ...)``.
            goal: The per-sample synthetic gradients at the end of the chunk, of the same shapes.
            rms: The usual root mean square of the gradients, one for each tensor; ``None`` if not known yet.

        Returns:
            The per-sample gradient of the weighted loss with respect to ``state``.
        """
        inputs = tuple(part.detach().float().requires_grad_() for part in state)
        detached = tuple(part.detach() for part in inputs)
        if not self._learner.built:
            self._learner.build(detached, None, None)
            if self._restored is not None:
                self._learner.load_state_dict(self._restored)
        self._learner.tell_scale(rms)
        with torch.enable_grad():
            loss = self._learner.predictor.loss(inputs, None, goal)
        gradients = torch.autograd.grad(loss, inputs)
        self._learner.learn(detached, None, goal)
        samples = len(inputs[0])
        return tuple(self._weight * samples * gradient for gradient in gradients)

    def state_dict(self) -> dict[str, Any] | None:
        """The state to save."""
        return self._learner.state_dict() if self._learner.built else self._restored

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restores :meth:`state_dict` with the next chunk, which shows the sizes."""
        self._learner.built, self._restored = False, state


def auxiliary_of(
    through_time: ThroughTime, training: PredictorTraining, replicas: Replicas, seed: int, name: str
) -> Auxiliary | None:
    """The auxiliary task at a boundary in time, if one is wanted.

    Args:
        through_time: Says whether.
        training: How predictors are trained.
        replicas: The replicas whose batches it learns from together.
        seed: Seeds the predictor's initial weights, together with the boundary's name.
        name: The boundary's.
    """
    if not through_time.auxiliary:
        return None
    predictor: GradientPredictor = MLPPredictor(conditional=False)
    learner = Learner(
        predictor,
        training.optimizer,
        training.lr_scheduler,
        seed=seed_for(seed, f"{name} (auxiliary)"),
        replicas=replicas,
    )
    return Auxiliary(learner, through_time.auxiliary)


__all__ = ["Auxiliary", "auxiliary_of"]
