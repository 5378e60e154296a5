"""Tells what made a batch NaN or infinite: its data, the activations received, the weights, or the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_sg.finite.values import count_of_bad, named_tensors
from lightning_sg.partition.fakes import is_fake

_MOST_NAMES = 4


@dataclass(frozen=True)
class BatchOrigin:
    """Where a batch comes from.

    Attributes:
        epoch: The epoch.
        index: Lightning's ``batch_idx``.
        data: The batch as the user's step is given it.
    """

    epoch: int = 0
    index: int = 0
    data: Any = None

    @property
    def words(self) -> str:
        """Names the batch."""
        return f"training batch {self.index} (batch_idx) of epoch {self.epoch}"


@dataclass(frozen=True)
class Scene:
    """What a process has at hand of a batch that is not finite.

    Attributes:
        origin: The batch.
        module: The model.
        last: The number of the last stage.
        rank: The process's global rank.
        uses: For each parameter the stages that use it.
        holds: Whether this process trains the parameter of that name.
        received: By stage, the activations that it was given by the stage before.
    """

    origin: BatchOrigin
    module: nn.Module
    last: int
    rank: int
    uses: Mapping[str, set[int]]
    holds: Callable[[str], bool]
    received: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)

    def name(self, stage: int) -> str:
        """Names a stage and its process."""
        return f"stage {stage} (rank {self.rank})"

    def stage_of(self, parameter: str) -> int:
        """The first stage that uses the parameter of that name."""
        return min(self.uses.get(parameter, {self.last}))

    def cause(self, stage: int) -> str | None:
        """What is at fault before anything that ``stage`` computes from finite values, and what to do about it."""
        return self._data() or self._activations(stage) or self._parameters(stage)

    def _data(self) -> str | None:
        bad = _counted(named_tensors(self.origin.data))
        if not bad:
            return None
        return (
            f"The data are at fault: {_listed(bad)}. Clean or drop such samples in the dataset, or pass "
            "SyntheticGradients(on_non_finite='skip')."
        )

    def _activations(self, stage: int) -> str | None:
        bad = _counted((f"tensor {place}", part) for place, part in enumerate(self.received.get(stage, ())))
        if not bad:
            return None
        before = self._activations(stage - 1) or self._parameters(stage - 1)
        return before or (
            f"The data are finite; the activations that {self.name(stage)} received from stage {stage - 1} are not: "
            f"{_listed(bad)}. Look there: its weights are broken, or its computation overflows."
        )

    def _parameters(self, stage: int) -> str | None:
        named = [
            (name, parameter)
            for name, parameter in self.module.named_parameters()
            if self.holds(name) and not is_fake(parameter) and stage in self.uses.get(name, {self.last})
        ]
        bad = _counted(named)
        if not bad:
            return None
        return (
            f"The data are finite, but weights of {self.name(stage)} are not: {_listed(bad)}. An earlier step broke "
            "them: lower the learning rate, clip gradients (Trainer(gradient_clip_val=...)), and go on from a "
            "checkpoint from before."
        )


def bad_gradients(scene: Scene) -> tuple[int, str] | None:
    """The first stage with a gradient that is not finite, and the names of these gradients."""
    found: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in scene.module.named_parameters():
        if scene.holds(name) and parameter.grad is not None:
            found.setdefault(scene.stage_of(name), []).append((name, parameter.grad))
    for stage in sorted(found):
        bad = _counted(found[stage])
        if bad:
            return stage, _listed(bad)
    return None


def _counted(named: Any) -> list[tuple[str, int, int]]:
    counts = [(name, count_of_bad(tensor), tensor.numel()) for name, tensor in named]
    return [each for each in counts if each[1]]


def _listed(bad: list[tuple[str, int, int]]) -> str:
    shown = [f"{name} ({count} of {size} values NaN or infinite)" for name, count, size in bad[:_MOST_NAMES]]
    more = len(bad) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


__all__ = ["BatchOrigin", "Scene", "bad_gradients"]
