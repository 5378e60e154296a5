"""All scored boundaries of one module, and what is done about them in each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_sg.batch.context import ContextSource, context_of
from lightning_sg.blackbox.boundary import ScoredBoundary, scored_boundaries
from lightning_sg.blackbox.learning import ScoredOptions
from lightning_sg.blackbox.trainer import ScoredTrainer
from lightning_sg.crossings.base import BatchContext
from lightning_sg.errors import BoundaryError, SyntheticGradientsError
from lightning_sg.lightning_api import rank_zero_warn
from lightning_sg.training.base import Profile


class ScoredBoundaries:
    """The scored boundaries of a module and their trainers.

    Attributes:
        trainers: By the name of the boundary.

    Args:
        module: The module.
        options: What all trainers are told alike.
        source: What estimators are told of a batch, see :class:`~lightning_sg.SyntheticGradients`.
        automatic: Whether it is to be chosen where the module is cut.

    Raises:
        SyntheticGradientsError: If it is, and there are scored boundaries.
    """

    def __init__(self, module: nn.Module, options: ScoredOptions, source: ContextSource, *, automatic: bool) -> None:
        self._boundaries: dict[str, ScoredBoundary] = scored_boundaries(module)
        self._source = source
        self.trainers = {name: ScoredTrainer(name, each, options) for name, each in self._boundaries.items()}
        if automatic and self.trainers:
            kinds = ", ".join(f"'{name}' ({type(each).__name__})" for name, each in self._boundaries.items())
            raise SyntheticGradientsError(
                f"SyntheticGradients(boundaries='auto') cannot cut a model with {kinds}: where to cut is chosen by a "
                "traced step, and none can be followed through a black box. Put `Boundary()` into the model, or name "
                "the boundaries, all of them before it."
            )
        self._restored: dict[str, Any] = {}
        self.install()

    def __len__(self) -> int:
        return len(self.trainers)

    def install(self) -> None:
        """Connects the trainers to the boundaries."""
        for name, boundary in self._boundaries.items():
            boundary.connect(self.trainers[name])

    def remove(self) -> None:
        """Disconnects the trainers."""
        for name, boundary in self._boundaries.items():
            self.trainers[name].end()
            boundary.connect(None)

    def show_to(self, profile: Profile) -> None:
        """Shows the estimators' actions to the trainer's profiler."""
        for trainer in self.trainers.values():
            trainer.learning.profile = profile

    def begin(self, batch: BatchContext) -> None:
        """Opens the boundaries for a training batch."""
        if not self.trainers:
            return
        told = batch.context
        if told is None and self._source is not None:
            told = context_of(batch.origin.data, self._source)
        for trainer in self.trainers.values():
            trainer.begin(batch, told)

    def check(self) -> None:
        """Refuses to go backward from a step in which something crossed whose score has not come back.

        Raises:
            BoundaryError: If there is such a boundary.
        """
        for name, trainer in self.trainers.items():
            if trainer.unscored:
                raise BoundaryError(
                    f"'{name}' was crossed in training batch {trainer.number}, but its `loss` was not called, so what "
                    f"is before it would never train. Return `{name}.loss(cost)` from training_step, or add it to the "
                    "loss, with one cost for each sample. With stages on several processes, both must be in the last "
                    "stage: no boundary may come after it."
                )

    def end(self) -> None:
        """The training batch is over."""
        for trainer in self.trainers.values():
            trainer.end()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, *, split: bool) -> dict[str, Any]:
        """The states of the boundaries in this process, by name. A collective.

        Args:
            split: Whether the stages are in several processes; then a boundary is here if scores have come here.
        """
        here = {name: each for name, each in self.trainers.items() if not split or each.learning.ready}
        return {name: trainer.state_dict() for name, trainer in here.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; a boundary that the saved run did not have starts afresh."""
        for name, saved in state.items():
            if name in self.trainers:
                self.trainers[name].load_state_dict(saved)
            else:
                rank_zero_warn(f"The checkpoint has an estimator for '{name}', which this model does not have.")


__all__ = ["ScoredBoundaries"]
