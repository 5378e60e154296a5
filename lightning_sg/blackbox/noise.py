"""Exploration noise: how large it is at each step, and the values that it makes of activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_sg.arguments import MOST_BATCHES, check_fields, either, listed, number, one_of, optional, whole
from lightning_sg.blackbox.sampling import Draw, Sampling, mirrored, repeated

_DEVIATION = number(least=0, most=1e6)


@dataclass(frozen=True)
class Noise:
    """Gaussian exploration noise and its schedule.

    A score tells something about a direction only if the activation has moved in it. More noise shows more with each
    score and shows it less locally: what is learned from is the score averaged over the noise.

    Args:
        deviation: The standard deviation, in units of the activation: one for all elements, or one for each position
            of its last dimension.
        final: What the deviation has become after ``steps`` training batches; by default it stays. With one deviation
            for each position, all shrink in the proportion of ``final`` to the largest of them.
        steps: How many batches that takes.
        schedule: ``"linear"``, ``"exponential"`` (which needs ``final`` above 0) or ``"cosine"``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or ``steps`` and ``final`` do not come together.
    """

    deviation: float | Sequence[float] = 0.1
    final: float | None = None
    steps: int = 0
    schedule: Literal["linear", "exponential", "cosine"] = "linear"

    def __post_init__(self) -> None:
        check_fields(
            "Noise",
            self,
            deviation=either(_DEVIATION, listed(_DEVIATION, "a list of numbers of at least 0")),
            final=optional(_DEVIATION),
            steps=whole(0, MOST_BATCHES),
            schedule=one_of("linear", "exponential", "cosine"),
        )
        if (self.final is None) != (self.steps == 0):
            raise ValueError("Noise(final=..., steps=...): a schedule needs both, constant noise neither.")
        if self.final is not None and not self.largest:
            raise ValueError("Noise(deviation=0, final=...): noise of zero has no schedule. Give it a deviation.")
        if self.schedule == "exponential" and self.final == 0:
            raise ValueError("Noise(schedule='exponential') never gets to 0: give a final above 0.")

    @property
    def largest(self) -> float:
        """The largest deviation at the start; 0 for none."""
        return max(self.deviation, default=0.0) if isinstance(self.deviation, Sequence) else self.deviation

    def at(self, step: int, device: torch.device) -> Tensor:
        """The deviation at a training batch: a scalar, or ``(D,)``."""
        deviation = torch.tensor(self.deviation, dtype=torch.float32, device=device)
        if self.final is None:
            return deviation
        share, end = min(1.0, step / self.steps), float(self.final / self.largest)
        if self.schedule == "exponential":
            return deviation * math.pow(end, share)
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return deviation * (1 + (end - 1) * share)


@dataclass(frozen=True)
class Gaussian(Sampling):
    """The activation plus noise.

    Attributes:
        noise: The noise.
    """

    noise: Noise

    def draw(self, activation: Tensor, evaluations: int, generator: torch.Generator, step: int) -> Draw:
        """See :meth:`Sampling.draw`."""
        rows = repeated(activation, evaluations)
        return self._moved(rows, _normal(rows, generator), evaluations, step)

    def draw_pairs(self, activation: Tensor, pairs: int, generator: torch.Generator, step: int) -> Draw:
        """See :meth:`Sampling.draw_pairs`."""
        normal = _normal(repeated(activation, pairs), generator)
        return self._moved(repeated(activation, 2 * pairs), torch.cat([normal, -normal]), 2 * pairs, step)

    def _moved(self, rows: Tensor, normal: Tensor, evaluations: int, step: int) -> Draw:
        spread = self.noise.at(step, rows.device)
        if spread.ndim and (rows.ndim < 2 or spread.shape[0] != rows.shape[-1]):
            raise ValueError(
                f"Noise has {spread.shape[0]} deviations, one for each position of the last dimension of the "
                f"activation, whose shape is {tuple(rows.shape)}"
            )
        return Draw(rows, rows + spread * normal, spread, evaluations)

    def settled(self, activation: Tensor) -> Tensor:
        """The activation itself."""
        return activation

    def mean(self, activation: Tensor) -> Tensor:
        """The activation itself."""
        return activation

    def reached(self, activation: Tensor, draw: Draw) -> Tensor:
        """The value itself, where the score is known: the mean over the noise is what other estimators estimate."""
        return activation + (draw.value - draw.activation)

    def log_gradient(self, draw: Draw) -> Tensor:
        """(x - h) / σ², and zero where there is no noise."""
        variance = draw.spread.square()
        moved = draw.value - draw.activation
        return torch.where(variance > 0, moved / variance.clamp_min(1e-30), torch.zeros_like(moved))

    def relaxed(self, activation: Tensor, draw: Draw, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Z = h + σε, and z̃ = x, which does not depend on h once it is known: the LAX estimator."""
        return activation + (draw.value - draw.activation), draw.value

    def softened(self, relaxed: Tensor, temperature: Tensor | float) -> Tensor:
        """The value as it is: it is continuous already."""
        return relaxed

    def pair_gradient(self, draw: Draw, scores: Tensor) -> Tensor:
        """(c(h + σε) - c(h - σε)) / 2 · ε / σ for both members of a pair."""
        return (scores - mirrored(scores)) / 2 * self.log_gradient(draw)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


__all__ = ["Gaussian", "Noise"]
