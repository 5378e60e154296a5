"""What stages apply of true gradients that come late: corrections, mixtures, or what the rules of boundaries say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch.optim import NAdam, Optimizer

from lightning_sg.options import ExactGradients, LateGradients
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.record import Applied

# The weight of a late gradient of that age, in batches, at the highest rate. Chosen on a small transformer, one seed;
# a larger one upset an MLP of nine stages without normalisation. See docs/late.md.
_AGE = 2
_SHARE, _SHARE_WITHOUT_LOOK_AHEAD = 0.2, 0.05


class LatePolicy(Protocol):
    """Says on which batches true gradients travel to be applied, and with what weights."""

    @property
    def ever(self) -> bool:
        """Whether anything is applied late."""

    @property
    def whole(self) -> bool:
        """Whether that is exact gradients themselves, not what they differ by from those that were applied."""

    def applies(self, number: int) -> Applied:
        """What stages apply of the exact gradient of batch ``number``."""

    def begin(self, number: int, optimizers: Iterable[Optimizer]) -> None:
        """Training batch ``number`` begins, which the model's optimizers are to step for."""

    def concerns(self, trainer: BoundaryTrainer) -> bool:
        """Whether the stage before a boundary applies anything late."""

    def weight(self, trainer: BoundaryTrainer, number: int) -> float:
        """The weight of what that stage applies of batch ``number``, late."""

    def newest(self, trainer: BoundaryTrainer, number: int) -> float:
        """The weight of the newest batch's gradient in the step in which that stage applies something of ``number``."""


class CorrectionPolicy:
    """Exact minus used gradient on top of the used one; what boundaries with a late rule say for themselves.

    Args:
        options: What the user said of exact gradients.
        trainers: What supplies the gradient at each boundary between stages.
    """

    whole = False

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

    def begin(self, number: int, optimizers: Iterable[Optimizer]) -> None:
        """See :meth:`LatePolicy.begin`: no weight depends on it."""

    def concerns(self, trainer: BoundaryTrainer) -> bool:
        """See :meth:`LatePolicy.concerns`."""
        return (trainer.late_share or self._options.correction) > 0

    def weight(self, trainer: BoundaryTrainer, number: int) -> float:
        """See :meth:`LatePolicy.weight`."""
        return trainer.late_share or self._options.correction

    def newest(self, trainer: BoundaryTrainer, number: int) -> float:
        """See :meth:`LatePolicy.newest`: all of it."""
        return 1.0

    @property
    def _ruled(self) -> bool:
        return any(trainer.late_share > 0 for trainer in self._trainers.values())


class FallingRate:
    """How far the model's learning rate has fallen since its peak, at each batch that is under way.

    Attributes:
        peak: The highest rate so far.

    Args:
        kept: How many batches a gradient is late at most.
    """

    def __init__(self, kept: int) -> None:
        self.peak = 0.0
        self._kept = kept
        self._left: dict[int, float] = {}

    def begin(self, number: int, optimizers: Iterable[Optimizer]) -> None:
        """Notes the rate of batch ``number``, the highest of all groups, and forgets those of too old batches."""
        rate = max((float(group["lr"]) for each in optimizers for group in each.param_groups), default=0.0)
        self.peak = max(self.peak, rate)
        self._left = {each: left for each, left in self._left.items() if each >= number - self._kept}
        self._left[number] = rate / self.peak if self.peak else 1.0

    def at(self, number: int) -> float:
        """What was left of the peak at batch ``number``: at most 1; 1 if that is not known."""
        return self._left.get(number, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The state to save, the same in all processes."""
        return {"peak": self.peak, "left": {str(number): left for number, left in self._left.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; checkpoints of earlier versions have none."""
        self.peak = state.get("peak", 0.0)
        self._left = {int(number): left for number, left in state.get("left", {}).items()}


class MixturePolicy:
    """(1 - share) × the newest synthetic gradient + share × the true gradient of an earlier batch.

    A boundary with a rule of its own, which waits for the true gradient or applies it late, keeps to that.

    Args:
        options: The share, and on which batches.
        rate: The model's learning rate.
    """

    ever = True
    whole = True

    def __init__(self, options: LateGradients, rate: FallingRate) -> None:
        self._options = options
        self._rate = rate
        self._at_peak = _SHARE if options.share is None else options.share

    def applies(self, number: int) -> Applied:
        """See :meth:`LatePolicy.applies`."""
        if number % self._options.every:
            return Applied.NOTHING
        return Applied.RECOMPUTED if self._options.recompute else Applied.WHOLE

    def begin(self, number: int, optimizers: Iterable[Optimizer]) -> None:
        """See :meth:`LatePolicy.begin`."""
        if self._options.share is None:
            self._at_peak = usual_share(optimizers)
        if self._options.adapts:  # a rate may be a tensor on a device, which reading stops
            self._rate.begin(number, optimizers)

    def concerns(self, trainer: BoundaryTrainer) -> bool:
        """See :meth:`LatePolicy.concerns`."""
        return not trainer.needs_true_gradient or trainer.late_share > 0

    def weight(self, trainer: BoundaryTrainer, number: int) -> float:
        """See :meth:`LatePolicy.weight`."""
        return trainer.late_share if trainer.needs_true_gradient else self._share(trainer, number)

    def newest(self, trainer: BoundaryTrainer, number: int) -> float:
        """See :meth:`LatePolicy.newest`."""
        return 1.0 if trainer.needs_true_gradient else 1 - self._share(trainer, number)

    def _share(self, trainer: BoundaryTrainer, number: int) -> float:
        if not self._options.adapts:
            return self._at_peak
        # Of two independent errors, the best share if the late one is in proportion to rate and age.
        moved = self._rate.at(number) * trainer.age / _AGE
        return 1 / (1 + (1 / self._at_peak - 1) * moved**2)


def usual_share(optimizers: Iterable[Optimizer]) -> float:
    """The share of late gradients, unless the user says another, with the model's optimizers.

    Momentum that looks back pushes on where the weights have gone already. That of Nesterov is a step ahead.
    """
    ahead = all(
        isinstance(optimizer, NAdam) or all(group.get("nesterov") for group in optimizer.param_groups)
        for optimizer in optimizers
    )
    return _SHARE if ahead else _SHARE_WITHOUT_LOOK_AHEAD


def late_policy(
    exact: ExactGradients, late: LateGradients | None, trainers: Mapping[str, BoundaryTrainer], rate: FallingRate
) -> LatePolicy:
    """What the user's options ask for."""
    return CorrectionPolicy(exact, trainers) if late is None else MixturePolicy(late, rate)


__all__ = ["CorrectionPolicy", "FallingRate", "LatePolicy", "MixturePolicy", "late_policy", "usual_share"]
