"""Whether what a loss does can be repeated on another batch: it is tried on a smaller one."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sg.batch.program import Program, Value
from lightning_sg.predictors.replayed import ReplayedLoss
from lightning_sg.rng import unchanged_randomness


@dataclass(frozen=True)
class Rows:
    """How many rows tensors of the step have.

    Attributes:
        crossing: Those of what crosses the first boundary: samples, positions, or some of the samples.
        batch: Those of each tensor of the batch.
        crossings: How often the step crosses a boundary.
        by_hand: Whether the step goes backward by hand, so that it may do so again from another loss.
    """

    crossing: int
    batch: tuple[int, ...] = ()
    crossings: int = 1
    by_hand: bool = False

    @property
    def apart(self) -> str:
        """Why a loss that takes nothing from the batch says little of what crosses a boundary; empty if it does not."""
        if self.by_hand:
            return "the loss takes nothing from the batch, and the step may go backward from others"
        if self.crossings > 1:
            return (
                "the loss compares what crosses a boundary at different times of a step: if it can, let the step run "
                "the network on all of it at once, `network(torch.cat([first, second]))`"
            )
        return ""

    def samples_of(self, leaves: list[Value]) -> int:
        """How many samples the batch has, by tensors of it; if there are none, by all of its tensors."""
        sizes = [leaf.shape[0] for leaf in leaves if leaf.shape] or self.batch
        return self.crossing if self.crossing in sizes or not sizes else Counter(sizes).most_common(1)[0][0]


class NotFoundError(Exception):
    """Says why there is nothing to predict from."""


def check_repeatable(entries: list[Value], rows: Rows, replay: ReplayedLoss | None = None) -> None:
    """Repeats everything with one sample less: sizes that are written into the code show.

    Raises:
        NotFoundError: If that fails.
    """
    samples = rows.crossing
    if samples < 2:
        return
    leaves = Program(entries).leaves
    program, batch = Program(entries, leaves), rows.samples_of(leaves)
    try:
        with torch.no_grad(), unchanged_randomness():
            found = program.run(None, [_cut(leaf, batch) for leaf in leaves])
            if replay is not None:
                _try(replay, found, samples, _left(entries, found, samples, batch))
    except Exception as error:  # the operations may be anybody's
        raise NotFoundError(
            f"what the loss does cannot be repeated on a batch of another size ({type(error).__name__}: {error})"
        ) from error


def _cut(leaf: Value, batch: int) -> Tensor:
    tensor: Tensor = leaf.node.tensor  # type: ignore[attr-defined]
    return tensor[: batch - 1] if tensor.ndim and tensor.shape[0] == batch else tensor


def _try(replay: ReplayedLoss, found: list[Any], samples: int, left: list[int]) -> None:
    """Repeats the loss with the first number of rows for which that is possible, if there is any to try.

    Args:
        replay: The loss.
        found: What it takes of the smaller batch.
        samples: How many rows crossed the boundary.
        left: How many rows may cross it of the smaller batch.
    """
    device = next((each.device for each in found if isinstance(each, Tensor)), torch.device("cpu"))
    context = found[0] if len(found) == 1 else dict(zip(replay.names, found))
    parameters = [each.to(device) for each in replay.parameters]
    for number in left:
        outputs = [_zeros(shape, samples, number, device) for shape in replay.shapes]
        with nullcontext() if number == left[-1] else suppress(Exception):
            replay(outputs, context, parameters)
            return


def _left(entries: list[Value], found: list[Any], samples: int, batch: int) -> list[int]:
    """How many rows would cross the boundary of the smaller batch: what is likely first.

    As many as an entry has that had as many as crossed; but another of its sizes may be equal by chance. Rows that are
    drawn from the batch may stay as many as they are.
    """
    pairs = [(entry.shape, smaller) for entry, smaller in zip(entries, found) if isinstance(smaller, Tensor)]
    rows = [int(smaller.shape[0]) for shape, smaller in pairs if shape[:1] == (samples,)]
    rows.sort(key=lambda number: number == samples)
    return list(dict.fromkeys([*rows, *([samples // batch * (batch - 1)] if samples % batch == 0 else [])]))


def _zeros(shape: tuple[int, ...], samples: int, left: int, device: torch.device) -> Tensor:
    """Outputs for the smaller batch; samples may be first, or first together with positions."""
    if shape and shape[0] % samples == 0:
        shape = (shape[0] // samples * left, *shape[1:])
    else:
        shape = tuple(left if size == samples else size for size in shape)
    return torch.zeros(shape, device=device)


__all__ = ["NotFoundError", "Rows", "check_repeatable"]
