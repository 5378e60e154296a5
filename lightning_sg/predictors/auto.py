"""Chooses a predictor for a boundary from the activations that cross it and the context."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_sg.arguments import checked, instance, optional
from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo
from lightning_sg.predictors.cheap import cheap_predictor
from lightning_sg.predictors.direct import LinearPredictor, MLPPredictor
from lightning_sg.predictors.loss_model import LossModelArguments, LossModelPredictor
from lightning_sg.predictors.replay_head import forms_of
from lightning_sg.predictors.replayed import ReplayedLoss
from lightning_sg.predictors.stage_size import StageSize
from lightning_sg.predictors.tasks import CLASSES, tasks_of
from lightning_sg.predictors.view import place_of

# Makes a predictor and says in words what it is.
Candidate = Callable[[], tuple[GradientPredictor, "Words"]]

#: The options of :class:`~lightning_sg.LossModelPredictor` for each form of task, see :func:`form_of`.
#: docs/results.md has the measurements. A head that learns its own loss on every batch does best. On images of digits
#: it gains from also matching exact gradients. In a character transformer matching does harm, more so the longer it
#: trains, however well the gradient is matched.
FITTING: dict[str, dict[str, Any]] = {
    "vectors": {"objective": "both"},
    "a sequence with a label for each position": {"hidden": 256, "objective": "loss"},
    "a sequence with one label": {"objective": "both"},
    "feature maps": {"objective": "both"},
    "feature maps with dense labels": {"objective": "both"},
}


def form_of(activations: Gradients, context: Any, loss: LossInfo | None = None) -> str:
    """The form of a task, one of the keys of :data:`FITTING`.

    Args:
        activations: The tensors that cross the boundary, each ``(N, ...)``.
        context: Labels or goals: a tensor, or a dict of tensors, whose finest entry decides; ``None`` for one label.
        loss: What is known about the loss that compares them.
    """
    goals = [] if context is None else tasks_of(context).values()
    places = {place_of(activations, goal, loss) for goal in goals}
    if "cell" in places:
        return "feature maps with dense labels"
    if "position" in places:
        return "a sequence with a label for each position"
    if any(activation.ndim > 3 for activation in activations):
        return "feature maps"
    return "a sequence with one label" if any(activation.ndim == 3 for activation in activations) else "vectors"


def form_of_loss(activations: Gradients, loss: ReplayedLoss) -> str:
    """The form of a task whose loss is the model's own operations, one of the keys of :data:`FITTING`.

    Args:
        activations: The tensors that cross the boundary, each ``(N, ...)``.
        loss: The loss.

    Raises:
        ValueError: If they do not fit together.
    """
    places = {form.place for form in forms_of(loss, activations)}
    if "cell" in places:
        return "feature maps with dense labels"
    if "position" in places:
        return "a sequence with a label for each position"
    return form_of(activations, None)


@dataclass(frozen=True)
class Words:
    """What a predictor is.

    Attributes:
        matched: Where targets come that it could match.
        alone: Where none come; empty if that makes no difference.
    """

    matched: str
    alone: str = ""

    @classmethod
    def of_heads(cls, predictor: LossModelPredictor, form: str) -> Words:
        """What a loss model is: a local loss where it matches nothing.

        Args:
            predictor: The loss model, built.
            form: The form of the task.
        """
        alone = f"local loss (LossModelPredictor): {predictor.describe(matches=False)}; for {form}"
        if not predictor.target_use.learns_from_targets:
            return cls(alone, alone)
        return cls(f"LossModelPredictor: {predictor.describe()}; for {form}", alone)


class AutoPredictor(GradientPredictor):
    """Chooses a predictor on the first batch, and acts as that predictor from then on.

    With labels or regression targets as context, it chooses a :class:`~lightning_sg.LossModelPredictor` with the
    options in :data:`FITTING`; its loss is the model's own, by the model's own operations if need be. Without them, or
    if they do not fit the activations, it predicts from the activations alone, with a narrow
    :class:`~lightning_sg.MLPPredictor` of at most a tenth of its stage's parameters and operations. For a state that is
    carried through time it chooses a :class:`~lightning_sg.LinearPredictor`. :attr:`choice` says what was chosen, and
    why.

    Args:
        classes: The number of classes, if the model's own loss does not reveal it; with several tasks, a dict by name.
        options: Arguments of :class:`~lightning_sg.LossModelPredictor` that override the choice, for example
            ``{"hidden": 256}``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there is no such option, or it is out of range.
    """

    def __init__(self, classes: int | dict[str, int] | None = None, options: LossModelArguments | None = None) -> None:
        super().__init__()
        self.classes = checked("AutoPredictor", "classes", classes, CLASSES)
        named = optional(instance(Mapping, words="a dict of arguments of LossModelPredictor"))
        options = checked("AutoPredictor", "options", options, named)
        self.options: dict[str, Any] = {**(options or {})}
        try:
            LossModelPredictor(**self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"AutoPredictor(options=...): options are those of LossModelPredictor. {error}") from error
        self.chosen: GradientPredictor | None = None
        self._of_state = False
        self._stage: StageSize | None = None
        self._words = Words("not chosen yet: the first batch decides")

    def of_state(self) -> AutoPredictor:
        """An unbuilt copy for a state that is carried through time, where what follows has no labels yet."""
        template = copy.deepcopy(self)
        template._of_state = True
        return template

    def for_stage(self, stage: StageSize) -> AutoPredictor:
        """See :meth:`GradientPredictor.for_stage`: a direct predictor is narrow if the stage is small."""
        template = copy.deepcopy(self)
        template._stage = stage
        return template

    @property
    def choice(self) -> str:
        """What was chosen, and why, in words."""
        return self.describe()

    def describe(self, *, matches: bool = True) -> str:
        """What was chosen, and why, in words: a local loss is called by that name.

        Args:
            matches: Whether any targets come that the chosen predictor could match.
        """
        return self._words.matched if matches or not self._words.alone else self._words.alone

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Chooses a predictor and builds it."""
        self.chosen, self._words = self._choose(activations, context, loss)
        self.target_use = self.chosen.target_use

    def wants_exact(self, shapes: Sequence[tuple[int, ...]], context: Any) -> bool:
        """Whether the predictor to be chosen gains from exact targets: on feature maps it does.

        On vectors it does not need them: the target at the last boundary is always exact, so the predictor there
        matches it, and the others learn their own loss. If the answer is no but a direct predictor is chosen in the
        end, it learns from bootstrapped targets. An ``objective`` in the options decides as in
        :class:`~lightning_sg.LossModelPredictor`.
        """
        if not _has_goals(context) and not isinstance(context, Mapping):
            return True
        if "objective" in self.options:
            return bool(self.options["objective"] != "loss")
        return not shapes or any(len(shape) > 3 for shape in shapes)

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """The default optimizer of the chosen predictor."""
        return self._delegate().default_optimizer(parameters)

    def forward(self, activations: Gradients, context: Any) -> Gradients | None:
        """See :meth:`GradientPredictor.forward`."""
        predicted: Gradients | None = self._delegate()(activations, context)
        return predicted

    @property
    def learns_in_passing(self) -> bool:
        """Whether the chosen predictor does."""
        return self._delegate().learns_in_passing

    def forward_and_backward(self, activations: Gradients, context: Any) -> tuple[Gradients, Tensor]:
        """See :meth:`GradientPredictor.forward_and_backward`."""
        return self._delegate().forward_and_backward(activations, context)

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """See :meth:`GradientPredictor.loss`."""
        return self._delegate().loss(activations, context, targets)

    def _choose(self, activations: Gradients, context: Any, loss: LossInfo | None) -> tuple[GradientPredictor, Words]:
        if self._of_state:
            # In the copy task it beats an MLP with a hidden layer (docs/recurrent.md), and the states of LSTMs and GRUs
            # lie between -1 and 1 already.
            linear = LinearPredictor(conditional=False, normalize="none")
            linear.build(activations, context, loss)
            words = "the gradient directly, from the state; what follows has no labels yet"
            return linear, Words(f"LinearPredictor: {words}")
        reasons = []
        for candidate in self._candidates(activations, context, loss):
            try:
                return candidate()
            except ValueError as error:
                if self.classes is not None or self.options:
                    raise
                reasons.append(f"the context does not fit the activations: {error}")
        if not reasons:
            kind = "empty" if context is None else type(context).__name__
            reasons = [f"the context ({kind}) has no labels or regression targets to predict a loss from"]
        if "hidden" in self.options:
            width = self.options["hidden"]
            direct: GradientPredictor = MLPPredictor(hidden=width, conditional=False)
            words = f"a hidden layer of {width}"
        else:
            direct, words = cheap_predictor(activations, self._stage)
        direct.build(activations, context, loss)
        kind = type(direct).__name__
        words = f"the gradient directly, from the activations alone, by {words}; {reasons[0]}"
        return direct, Words(f"{kind}: {words}")

    def _candidates(self, activations: Gradients, context: Any, loss: LossInfo | None) -> list[Candidate]:
        """The loss models to try, the best first."""
        replay = None if loss is None else loss.replay
        replaying: list[Candidate] = [] if replay is None else [partial(self._replaying, activations, context, replay)]
        if not _has_goals(context) or (replaying and loss is not None and loss.kind == "replayed"):
            return replaying
        return [partial(self._comparing, activations, context, loss), *replaying]

    def _comparing(
        self, activations: Gradients, context: Any, loss: LossInfo | None
    ) -> tuple[GradientPredictor, Words]:
        form = form_of(activations, context, loss)
        predictor = LossModelPredictor(**{"classes": self.classes, **FITTING[form], **self.options})
        predictor.build(activations, context, None if loss is None else replace(loss, replay=None))
        return predictor, Words.of_heads(predictor, form)

    def _replaying(self, activations: Gradients, context: Any, loss: ReplayedLoss) -> tuple[GradientPredictor, Words]:
        form = form_of_loss(activations, loss)
        predictor = LossModelPredictor(**{**FITTING[form], **self.options})
        predictor.build_replayed(activations, context, loss)
        if "objective" not in self.options and not predictor.can_match(activations, context):
            predictor = LossModelPredictor(**{**FITTING[form], "objective": "loss", **self.options})
            predictor.build_replayed(activations, context, loss)
        return predictor, Words.of_heads(predictor, form)

    def _delegate(self) -> GradientPredictor:
        if self.chosen is None:
            raise RuntimeError("AutoPredictor cannot predict before build(), which chooses its predictor.")
        if self.chosen.target_rms is not self.target_rms:  # a module takes its time to set an attribute
            self.chosen.target_rms = self.target_rms
        return self.chosen


def _has_goals(context: Any) -> bool:
    if isinstance(context, Mapping):
        return any(isinstance(entry, Tensor) for entry in context.values())
    return isinstance(context, Tensor)


__all__ = ["FITTING", "AutoPredictor", "form_of", "form_of_loss"]
