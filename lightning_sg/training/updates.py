"""Random asynchronous updates: at each step, which stages are updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from lightning_sg.errors import SyntheticGradientsError


class RandomUpdates:
    """Decides for each stage and step whether the stage is updated, and drops the gradients of the others.

    The decision depends on seed, stage and step alone: every process takes the same, and so does a resumed run.
    Source: Jaderberg et al. 2017, arXiv 1608.05343 (*asynchronous updates*).

    Args:
        probability: The probability of an update, above 0 and at most 1; at 1 nothing is drawn.
    """

    def __init__(self, probability: float = 1.0) -> None:
        self.probability = probability
        self._seed: int | None = None
        self._number = 0
        self._order: list[str] = []
        self._uses: dict[str, set[int]] = {}

    @property
    def certain(self) -> bool:
        """Whether every stage is updated at every step."""
        return self.probability == 1

    def start(self, seed: int) -> None:
        """Sets the seed, unless a checkpoint has brought one."""
        if self._seed is None:
            self._seed = seed

    def forget(self) -> None:
        """The next run begins afresh."""
        self._seed = None

    def accept(self, order: Sequence[str], uses: Mapping[str, set[int]], boundaries: int) -> None:
        """Takes what a traced step showed: which parameter belongs to which stage.

        Args:
            order: The boundaries in the order of the data.
            uses: For each parameter the stages that use it.
            boundaries: How many boundaries there are.

        Raises:
            SyntheticGradientsError: If the step could not be followed.
        """
        if not self.certain and len(order) < boundaries:
            raise SyntheticGradientsError(
                "PredictorTraining(update_probability=...) needs to know which stage a parameter belongs to, but the "
                "step could not be followed on tensors without data (see the warning at the start). Use "
                "update_probability=1 with this model, or move the code that reads values behind the last boundary."
            )
        self._order, self._uses = list(order), dict(uses)

    def begin(self, number: int) -> None:
        """A batch of optimizer step ``number`` begins; batches that are accumulated share a step."""
        self._number = number

    def updates(self, stage: int) -> bool:
        """Whether ``stage`` is updated at the current step."""
        if self.certain:
            return True
        assert self._seed is not None
        drawn = np.random.SeedSequence([self._seed, stage, self._number]).generate_state(1, np.uint64)[0]
        return bool(drawn / 2.0**64 < self.probability)

    def before(self, boundary: str) -> bool:
        """Whether the stage before ``boundary``, to which its gradient predictor belongs, is updated."""
        return self.certain or self.updates(self._order.index(boundary))

    def after(self, boundary: str) -> bool:
        """Whether the stage after ``boundary``, to which its input predictor belongs, is updated."""
        return self.certain or self.updates(self._order.index(boundary) + 1)

    def drop(self, module: nn.Module) -> None:
        """Before an optimizer step: removes the gradients of stages that are not updated.

        A parameter that several stages use follows the first of them; one that no traced stage used follows the last.
        """
        if self.certain:
            return
        last = len(self._order)
        updated = [self.updates(stage) for stage in range(last + 1)]
        for name, parameter in module.named_parameters():
            if not updated[min(self._uses.get(name, {last}))]:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The state to save."""
        return {"seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._seed = state.get("seed", self._seed)


__all__ = ["RandomUpdates"]
