"""What stages apply of true gradients that come late: corrections, mixtures, or what the rules of boundaries say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lightning_sg.options import ExactGradients, LateGradients
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.record import Applied


class LatePolicy(Protocol):
    """Says on which batches true gradients travel to be applied, and with what weights."""

    @property
    def ever(self) -> bool:
        """Whether anything is applied late."""

    def applies(self, number: int) -> Applied:
        """What stages apply of the exact gradient of batch ``number``."""

    def weight(self, trainer: BoundaryTrainer) -> float:
        """The weight of what the stage before a boundary applies late; 0 for nothing."""

    def newest(self, trainer: BoundaryTrainer) -> float:
        """The weight of the newest batch's gradient in a step of that stage in which something late is applied too."""


class CorrectionPolicy:
    """Exact minus used gradient on top of the used one; what boundaries with a late rule say for themselves.

    Args:
        options: What the user said of exact gradients.
        trainers: What supplies the gradient at each boundary between stages.
    """

    def __init__(self, options: ExactGradients, trainers: Mapping[str, BoundaryTrainer]) -> None:
        self._options = options
        self._trainers = trainers

    @property
    def ever(self) -> bool:
        """See :attr:`LatePolicy.ever`."""
        return self._options.correction > 0 or self._ruled

    def applies(self, number: int) -> Applied:
        """See :meth:`LatePolicy.applies`: a rule needs every batch's."""
        due = self._ruled or (self.ever and number % self._options.every == 0)
        return Applied.DIFFERENCE if due else Applied.NOTHING

    def weight(self, trainer: BoundaryTrainer) -> float:
        """See :meth:`LatePolicy.weight`."""
        return trainer.late_share or self._options.correction

    def newest(self, trainer: BoundaryTrainer) -> float:
        """See :meth:`LatePolicy.newest`: all of it."""
        return 1.0

    @property
    def _ruled(self) -> bool:
        return any(trainer.late_share > 0 for trainer in self._trainers.values())


class MixturePolicy:
    """(1 - share) × the newest synthetic gradient + share × the true gradient of an earlier batch.

    A boundary with a rule of its own, which waits for the true gradient or applies it late, keeps to that.

    Args:
        options: The share, and on which batches.
    """

    ever = True

    def __init__(self, options: LateGradients) -> None:
        self._options = options

    def applies(self, number: int) -> Applied:
        """See :meth:`LatePolicy.applies`."""
        if number % self._options.every:
            return Applied.NOTHING
        return Applied.RECOMPUTED if self._options.recompute else Applied.WHOLE

    def weight(self, trainer: BoundaryTrainer) -> float:
        """See :meth:`LatePolicy.weight`."""
        return trainer.late_share if trainer.needs_true_gradient else self._options.share

    def newest(self, trainer: BoundaryTrainer) -> float:
        """See :meth:`LatePolicy.newest`."""
        return 1.0 if trainer.needs_true_gradient else 1 - self._options.share


def late_policy(
    exact: ExactGradients, late: LateGradients | None, trainers: Mapping[str, BoundaryTrainer]
) -> LatePolicy:
    """What the user's options ask for."""
    return CorrectionPolicy(exact, trainers) if late is None else MixturePolicy(late)


__all__ = ["CorrectionPolicy", "LatePolicy", "MixturePolicy", "late_policy"]
