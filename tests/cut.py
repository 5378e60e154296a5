"""Whether a module still is cut at a boundary."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_sg import SyntheticGradients


def is_cut(module: nn.Module, callback: SyntheticGradients, x: Tensor) -> bool:
    """Whether a forward pass reaches a boundary of the callback's session, which it does not once they are removed."""
    reached = []

    def note(tensors: list[Tensor]) -> list[Tensor]:
        reached.append(len(tensors))
        return tensors

    boundaries = callback.session.boundaries
    for site in boundaries.sites:
        site.open(note)
    module(x)
    boundaries.close()
    return bool(reached)
