"""The auxiliary task: predict the synthetic gradient at the end of a chunk from the state at its start."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from lightning_sg.options import PredictorTraining
from lightning_sg.predictors import MLPPredictor
from lightning_sg.predictors.base import GradientPredictor, Gradients
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.replicas import Replicas
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


def make_auxiliary(
    settings: ThroughTime, training: PredictorTraining, name: str, *, seed: int, replicas: Replicas
) -> Auxiliary | None:
    """The auxiliary task at a boundary in time, if one is wanted.

    Args:
        settings: The user's options for boundaries in time.
        training: How predictors are trained.
        name: The boundary's name.
        seed: Seeds the predictor's initial weights, together with ``name``.
        replicas: The replicas whose predictors learn together.
    """
    if not settings.auxiliary:
        return None
    predictor: GradientPredictor = MLPPredictor(conditional=False)
    learner = Learner(
        predictor,
        training.optimizer,
        training.lr_scheduler,
        seed=seed ^ zlib.crc32(f"{name} (auxiliary)".encode()),
        replicas=replicas,
    )
    return Auxiliary(learner, settings.auxiliary)


__all__ = ["Auxiliary", "make_auxiliary"]
