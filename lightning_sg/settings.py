"""All that a user says to SyntheticGradients, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_sg.batch.context import ContextSource
from lightning_sg.inputs.settings import SyntheticInputs
from lightning_sg.options import ExactGradients, PredictorTraining
from lightning_sg.predictors import AutoPredictor
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.training.factory import Template
from lightning_sg.training.guard import AlignmentGuard


@dataclass(frozen=True)
class Settings:
    """The options of :class:`~lightning_sg.SyntheticGradients`, which describes them.

    Raises:
        ValueError: If one is out of range, or two do not go together.
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

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"SyntheticGradients needs delay >= 0, not {self.delay}.")
        if self.exact.correction and self.training.update_probability < 1:
            raise ValueError(
                "ExactGradients(correction=...) does not go with PredictorTraining(update_probability=...) below 1: a "
                "stage that was not updated with a batch has nothing to correct. Use correction=0."
            )
        if isinstance(self.boundaries, str) and self.boundaries != "auto":
            raise ValueError(f"boundaries takes a list of names: boundaries=['{self.boundaries}'].")
        if isinstance(self.predictor, str) and self.predictor != "auto":
            raise ValueError(f"predictor must be 'auto', a predictor, or one by boundary name, not '{self.predictor}'.")

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


__all__ = ["Settings"]
