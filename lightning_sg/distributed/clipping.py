"""Clips gradients by the norm of the whole model, whose gradients are in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sg.distributed.runtime import StageRuntime


class ClippingOverModel:
    """Takes the place of the precision plugin's ``clip_grad_by_norm``. A collective.

    Args:
        runtime: This process's part of the run.
        parameters_of: The parameters of an optimizer, as the precision plugin has them.
    """

    def __init__(self, runtime: StageRuntime, parameters_of: Callable[[Optimizer], Iterable[nn.Parameter]]) -> None:
        self._runtime = runtime
        self._parameters_of = parameters_of

    def __call__(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips by the norm that the gradients of all processes have together."""
        if clip_val <= 0:
            return
        parameters = [p for p in self._parameters_of(optimizer) if p.grad is not None]
        borrowed = self._runtime.borrowed  # of a weight with copies in several processes, one counts
        counted = (p.grad for p in parameters if p.grad is not None and id(p) not in borrowed)
        norm = torch.nn.utils.get_total_norm(counted)
        squares = self._runtime.meetings.gather("clipping gradients", norm.double().item() ** 2)
        whole = torch.tensor(squares, dtype=torch.float64).sum().sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, float(clip_val), whole.to(norm))


__all__ = ["ClippingOverModel"]
