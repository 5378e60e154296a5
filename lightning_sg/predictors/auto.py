"""Chooses a predictor for a boundary by what crosses it and what there is to predict from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo
from lightning_sg.predictors.direct import LinearPredictor, MLPPredictor
from lightning_sg.predictors.loss_model import LossModelPredictor
from lightning_sg.predictors.tasks import tasks_of
from lightning_sg.predictors.view import place_of

#: What suits which form of task, by :func:`form_of`; what it rests on is in docs/results.md. A head does best that
#: learns its own loss on every batch; on images of digits also one that matches the gradient where the target is exact.
#: In a character transformer that does harm, the more the longer it trains, however well the gradient is matched.
FITTING: dict[str, dict[str, Any]] = {
    "vectors": {"objective": "both"},
    "a sequence with a label for each position": {"hidden": 256, "objective": "loss"},
    "a sequence with one label": {"objective": "both"},
    "feature maps": {"objective": "both"},
    "feature maps with dense labels": {"objective": "both"},
}


def form_of(activations: Gradients, context: Any) -> str:
    """The form of a task, one of the keys of :data:`FITTING`.

    Args:
        activations: What crosses, each ``(N, ...)``.
        context: Labels or goals: a tensor, or a dict with a tensor in it, of which the finest counts.
    """
    places = {place_of(activations, goal) for goal in tasks_of(context).values()}
    if "cell" in places:
        return "feature maps with dense labels"
    if "position" in places:
        return "a sequence with a label for each position"
    if any(activation.ndim > 3 for activation in activations):
        return "feature maps"
    return "a sequence with one label" if any(activation.ndim == 3 for activation in activations) else "vectors"


class AutoPredictor(GradientPredictor):
    """Chooses a predictor when the first batch is there, and is that predictor from then on.

    With labels or goals as context it is a :class:`~lightning_sg.LossModelPredictor` with the options of
    :data:`FITTING`; without, or where they fit no activation, a :class:`~lightning_sg.MLPPredictor` of the activations
    alone. For a state that is carried through time it is a :class:`~lightning_sg.LinearPredictor` of the state.
    :attr:`choice` says which, and why.

    Args:
        classes: The number of classes, where the model's own loss does not tell; for several tasks by name.
        options: Options of :class:`~lightning_sg.LossModelPredictor` in the place of those that would be chosen, for
            example ``{"hidden": 256}``.

    Raises:
        ValueError: If there is no such option, or it is out of range.
    """

    def __init__(self, classes: int | dict[str, int] | None = None, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.classes = classes
        self.options = dict(options or {})
        try:
            LossModelPredictor(**self.options)
        except TypeError as error:
            raise ValueError(f"AutoPredictor: options are those of LossModelPredictor. {error}") from error
        self.chosen: GradientPredictor | None = None
        self._of_state = False
        self._choice = "not chosen yet: the first batch decides"

    def of_state(self) -> AutoPredictor:
        """The same, unbuilt, for a state that is carried through time: what follows it has no labels yet."""
        template = copy.deepcopy(self)
        template._of_state = True
        return template

    @property
    def choice(self) -> str:
        """What was chosen, and why, in words."""
        return self._choice

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Chooses, and builds what was chosen."""
        self.chosen, self._choice = self._choose(activations, context, loss)
        self.exact, self.needs_target = self.chosen.exact, self.chosen.needs_target
        self.learns_without_target = self.chosen.learns_without_target
        self.correction, self.uses_target = self.chosen.correction, self.chosen.uses_target

    def wants_exact(self, shapes: Sequence[tuple[int, ...]], context: Any) -> bool:
        """Whether what fits gains by exact targets: for feature maps it does.

        Vectors do as well without: there the predictor at the last boundary, whose target is always exact, matches it,
        and the others learn their own loss. Should the choice be a direct predictor where this says no, it learns from
        bootstrapped targets. An ``objective`` among the options decides as it does for a ``LossModelPredictor``.
        """
        if not _has_goals(context):
            return True
        if "objective" in self.options:
            return bool(self.options["objective"] != "loss")
        return not shapes or any(len(shape) > 3 for shape in shapes)

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """The one of what was chosen."""
        return self._delegate().default_optimizer(parameters)

    def forward(self, activations: Gradients, context: Any) -> Gradients | None:
        """See :meth:`GradientPredictor.forward`."""
        predicted: Gradients | None = self._delegate()(activations, context)
        return predicted

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """See :meth:`GradientPredictor.loss`."""
        return self._delegate().loss(activations, context, targets)

    def _choose(self, activations: Gradients, context: Any, loss: LossInfo | None) -> tuple[GradientPredictor, str]:
        if self._of_state:
            # Better than an MLP with a hidden layer in the copy task (docs/recurrent.md), and states of LSTMs and GRUs
            # are within -1 and 1 already.
            linear = LinearPredictor(conditional=False, normalize="none")
            linear.build(activations, context, loss)
            return linear, "LinearPredictor: the gradient directly, from the state; what follows has no labels yet"
        if _has_goals(context):
            form = form_of(activations, context)
            predictor = LossModelPredictor(**{"classes": self.classes, **FITTING[form], **self.options})
            try:
                predictor.build(activations, context, loss)
            except ValueError as error:
                if self.classes is not None or self.options:
                    raise
                reason = f"the context does not fit the activations: {error}"
            else:
                return predictor, f"LossModelPredictor: {predictor.describe()}; for {form}"
        else:
            kind = "empty" if context is None else type(context).__name__
            reason = f"the context ({kind}) has no labels or goals to predict a loss from"
        direct = MLPPredictor(conditional=False)
        direct.build(activations, context, loss)
        return direct, f"MLPPredictor: the gradient directly, from the activations alone; {reason}"

    def _delegate(self) -> GradientPredictor:
        if self.chosen is None:
            raise RuntimeError("AutoPredictor has nothing to predict with before build.")
        self.chosen.target_rms = self.target_rms
        return self.chosen


def _has_goals(context: Any) -> bool:
    if isinstance(context, Mapping):
        return any(isinstance(entry, Tensor) for entry in context.values())
    return isinstance(context, Tensor)


__all__ = ["FITTING", "AutoPredictor", "form_of"]
