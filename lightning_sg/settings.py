"""All that a user says to SyntheticGradients, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_sg.arguments import (
    by_name,
    check_fields,
    context_source,
    either,
    instance,
    listed,
    one_of,
    optional,
    text,
    whole,
)
from lightning_sg.batch.context import ContextSource
from lightning_sg.errors import RepeatedBoundaryError
from lightning_sg.finite.policy import OnNonFinite
from lightning_sg.inputs.settings import SyntheticInputs
from lightning_sg.options import ExactGradients, LateGradients, PredictorTraining
from lightning_sg.predictors import AutoPredictor, GradientPredictor
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.replicas import Replicas
from lightning_sg.rules import BoundaryRule
from lightning_sg.training.factory import Template, TrainerFactory
from lightning_sg.training.guard import AlignmentGuard
from lightning_sg.training.trainer import TrainerOptions

#: The most steps that a target may be late. Each step of delay keeps one more batch of activations at each boundary.
MOST_DELAY = 1_000


@dataclass(frozen=True)
class Settings:
    """The options of :class:`~lightning_sg.SyntheticGradients`, which describes them.

    Raises:
        TypeError: If one is of another type.
        ValueError: If one is out of range, or two do not go together.
        BoundaryError: If a boundary is listed more than once.
    """

    boundaries: Sequence[str] | Literal["auto"] | None = None
    predictor: Literal["auto"] | Template | Mapping[str, Template] = "auto"
    delay: int = 1
    context: ContextSource = "auto"
    exact: ExactGradients = ExactGradients()
    training: PredictorTraining = PredictorTraining()
    guard: AlignmentGuard | None = AlignmentGuard()
    through_time: ThroughTime = ThroughTime()
    inputs: SyntheticInputs | None = None
    on_non_finite: OnNonFinite = "raise"
    late: LateGradients | None = None
    metrics: Literal["compact", "all"] = "compact"

    def __post_init__(self) -> None:
        self._check_boundaries()
        template = instance(GradientPredictor, BoundaryRule, words="a gradient predictor or a rule")
        templates = by_name(template, "a dict of predictors and rules by boundary name")
        check_fields(
            "SyntheticGradients",
            self,
            predictor=either(one_of("auto"), template, templates),
            delay=whole(0, MOST_DELAY),
            context=optional(context_source()),
            exact=instance(ExactGradients),
            training=instance(PredictorTraining),
            guard=optional(instance(AlignmentGuard)),
            through_time=instance(ThroughTime),
            inputs=optional(instance(SyntheticInputs)),
            on_non_finite=one_of("raise", "skip", "ignore"),
            late=optional(instance(LateGradients)),
            metrics=one_of("compact", "all"),
        )
        if self.on_non_finite == "skip" and self.inputs is not None:
            raise ValueError(
                "on_non_finite='skip' does not go with SyntheticInputs: a stage that has gone ahead on predicted "
                "activations cannot know that the true ones are not finite. Use 'raise'."
            )
        if self.late is not None and self.exact.correction:
            raise ValueError(
                "LateGradients does not go with ExactGradients(correction=...): both apply late what the true gradient "
                "says, one in a mixture and one on top. Use correction=0."
            )
        if self.late is not None and self.late.recompute and (self.inputs or self.on_non_finite == "skip"):
            raise ValueError(
                "LateGradients(recompute=True) runs batches again as they were given: it does not go with "
                "SyntheticInputs and with on_non_finite='skip'. Use recompute=False."
            )
        if self.late is not None and self.late.share == 1 and self.predictor != "auto":
            raise ValueError(
                "LateGradients(share=1) updates stages with late gradients alone, so that a predictor has nothing to "
                "do. Leave out predictor=..., or use a share below 1."
            )
        if self.exact.correction and self.training.update_probability < 1:
            raise ValueError(
                "ExactGradients(correction=...) does not go with PredictorTraining(update_probability=...) below 1: a "
                "stage that was not updated with a batch has nothing to correct. Use correction=0."
            )

    def _check_boundaries(self) -> None:
        if isinstance(self.boundaries, str) and self.boundaries != "auto":
            raise ValueError(
                "SyntheticGradients(boundaries=...): boundaries takes a list of names: "
                f"boundaries=['{self.boundaries}']."
            )
        names = listed(text(), "a list of names of submodules")
        check_fields("SyntheticGradients", self, boundaries=optional(either(one_of("auto"), names)))
        repeated = sorted({name for name in self.names or () if list(self.names or ()).count(name) > 1})
        if repeated:
            raise RepeatedBoundaryError(
                f"SyntheticGradients(boundaries=...): boundary {repeated} is listed more than once."
            )

    @property
    def automatic(self) -> bool:
        """Whether it is to be chosen where to cut."""
        return self.boundaries == "auto"

    @property
    def names(self) -> list[str] | None:
        """The boundaries that the user names; ``None`` for those in the model, empty where they are to be chosen."""
        if self.boundaries is None:
            return None
        return [] if isinstance(self.boundaries, str) else list(self.boundaries)

    @property
    def template(self) -> Template | Mapping[str, Template]:
        """The predictor or rule at each boundary, or one by boundary name."""
        return AutoPredictor() if isinstance(self.predictor, str) else self.predictor

    def factory(self, in_time: Sequence[str]) -> TrainerFactory:
        """Makes what supplies the gradient at each boundary.

        Args:
            in_time: The module's boundaries in time.
        """
        return TrainerFactory(self.template, self.training, self.exact, in_time, self.late)

    def trainer_options(self, seed: int, replicas: Replicas) -> TrainerOptions:
        """What the trainers of all boundaries are told alike.

        Args:
            seed: Seeds the predictors' initial weights.
            replicas: The replicas whose batches predictors learn from together.
        """
        return TrainerOptions(
            self.delay,
            self.training,
            self.exact.bootstrap,
            self.guard,
            seed,
            replicas,
            only_finite=self.on_non_finite == "skip",
            matching=self.exact.every or 1,
        )


__all__ = ["MOST_DELAY", "Settings"]
