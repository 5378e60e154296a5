"""The alignment guard: replaces a predictor while its predictions do harm."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sg.arguments import MOST_BATCHES, checked, either, instance, number, one_of, optional, whole
from lightning_sg.predictors.base import GradientPredictor
from lightning_sg.replicas import Replicas
from lightning_sg.training.metrics import TINY


class AlignmentGuard:
    """Watches how well a boundary's predictions align with their targets, and decides when not to use them.

    The guard keeps a running mean of the cosine similarity of prediction and target. When it falls below
    ``threshold``, the boundary falls back. The predictor goes on learning and being measured; its predictions are used
    again when the mean is above ``threshold + margin``. A predictor that returns NaN or infinity falls back too, and
    restarts from new weights. On a CPU that happens at once; on other devices, and with replicas, at the next logging
    step, and until then the prediction is zero. Each change is a warning.

    The guard reads the mean after every tenth target, so that it hardly ever stops a device. A predictor with a loss of
    its own asks for a target on every eighth batch, after the first 64 (``ExactGradients(every=...)``).

    Args:
        threshold: The smallest mean cosine that is trusted, -1 to 1. By default 0: only predictions that point away
            from the target are refused. For states that are carried through time the default is -0.2: the future is
            uncertain, and cosines are so small that their mean falls below zero by chance now and then.
        margin: How far the mean must rise above the threshold before predictions are used again, 0 to 2.
        patience: The number of targets to see before the guard judges.
        fallback: What the stage gets instead: ``"zero"`` (no gradient, as if detached), ``"couple"`` (the target, for
            which the stage then waits), or a predictor such as ``LocalLoss()``, which learns while it is in use.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or there is no such fallback.
    """

    def __init__(
        self,
        threshold: float | None = None,
        margin: float = 0.05,
        patience: int = 50,
        fallback: Literal["zero", "couple"] | GradientPredictor = "zero",
    ) -> None:
        name = type(self).__name__
        self._by_default = threshold is None
        threshold = checked(name, "threshold", threshold, optional(number(least=-1, below=1)))
        self.threshold = 0.0 if threshold is None else threshold
        self.margin = checked(name, "margin", margin, number(least=0, most=2))
        self.patience = checked(name, "patience", patience, whole(1, MOST_BATCHES))
        instead = either(one_of("zero", "couple"), instance(GradientPredictor))
        self.fallback = checked(name, "fallback", fallback, instead)

    def of_state(self) -> AlignmentGuard:
        """The guard for a state that is carried through time: with another default threshold."""
        return AlignmentGuard(-0.2, self.margin, self.patience, self.fallback) if self._by_default else self


class Watch:
    """The guard's state at one boundary.

    Attributes:
        guarded: Whether the boundary has fallen back.
    """

    def __init__(self, guard: AlignmentGuard) -> None:
        self.guard = guard
        self.guarded = False
        self._mean = 0.0
        self._weight = 0.0
        self._seen = 0
        self._waiting: list[Tensor] = []  # on their device: asking it for each batch would stop it

    def see(self, found: Tensor, replicas: Replicas) -> str | None:
        """Takes one batch's prediction and target; returns what to tell the user if the guard changes its mind.

        It looks at them after every tenth batch, together with those since the last time. That is a collective of the
        replicas.

        Args:
            found: The :func:`~lightning_sg.training.metrics.products` of the batch.
            replicas: The replicas that decide together.
        """
        self._waiting.append(found)
        self._seen += 1
        if self._seen % _INTERVAL:
            return None
        self._take_in(replicas)
        if self._seen < self.guard.patience:
            return None
        mean = self._mean / self._weight
        if not self.guarded and mean < self.guard.threshold:
            self.guarded = True
            return (
                f"predictions have pointed away from their targets (mean cosine {mean:.2f}, below "
                f"{self.guard.threshold:g}), so it falls back to {self._fallback()} until they are better"
            )
        if self.guarded and mean > self.guard.threshold + self.guard.margin:
            self.guarded = False
            return f"predictions are used again (mean cosine {mean:.2f})"
        return None

    def _take_in(self, replicas: Replicas) -> None:
        """Takes the batches since the last time into the mean."""
        waiting, self._waiting = torch.stack(self._waiting), []
        dot, size, goal = waiting[:, 0], waiting[:, 1].sqrt(), waiting[:, 2].sqrt()
        both = torch.stack([dot / (size * goal).clamp_min(TINY), size / goal.clamp_min(TINY)], dim=1)
        (both,) = replicas.average([both])
        for cosine, norm_ratio in both.tolist():
            # An untrained predictor predicts zero, which is no misalignment.
            if 0 < norm_ratio < 1e20 and math.isfinite(cosine):
                self._mean = _MEMORY * self._mean + (1 - _MEMORY) * cosine
            self._weight = _MEMORY * self._weight + 1 - _MEMORY

    def restart(self) -> str:
        """Falls back because the predictor was not finite; returns what to tell the user."""
        self.guarded = True
        self._mean, self._weight, self._seen, self._waiting = 0.0, 0.0, 0, []
        return (
            "the prediction was not finite: the predictor starts afresh, and until it is good the boundary falls back "
            f"to {self._fallback()}"
        )

    def _fallback(self) -> str:
        names = {"zero": "no gradient", "couple": "the true gradient, for which it waits"}
        fallback = self.guard.fallback
        return names[fallback] if isinstance(fallback, str) else type(fallback).__name__

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""
        mean = torch.tensor(self._mean, dtype=torch.float64)
        state = {"guarded": self.guarded, "mean": mean, "weight": self._weight, "seen": self._seen}
        return {**state, "waiting": list(self._waiting)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores :meth:`state_dict`."""
        self.guarded, self._weight, self._seen = state["guarded"], state["weight"], state["seen"]
        self._mean = 0.0 if state["mean"] is None else float(state["mean"])
        # Earlier versions took each batch into the mean at once.
        self._waiting = [found.to(device) for found in state.get("waiting", [])]


_MEMORY = 0.95  # of the running mean of cosines: about twenty batches
_INTERVAL = 10

__all__ = ["AlignmentGuard", "Watch"]
