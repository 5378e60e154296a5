"""Clips gradients by norm, where the gradients of the model are in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.distributed.support import may_wait, warn_of_clipping
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.partition.dependence import unwatched


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
        """Clips by the norm that the gradients of all processes have together.

        Raises:
            SyntheticGradientsError: If a stage may wait for the gradient of a step that is not over.
        """
        if clip_val <= 0:
            return
        session = self._runtime.stage.session
        if not session.module.automatic_optimization and may_wait(session.settings, session.trainers.values()):
            raise SyntheticGradientsError(
                "clip_over='model' does not go with manual optimization where the true gradient is waited for "
                "(warm_up, TrueGradient, 'couple'): it comes when the step is over, and all stages clip together "
                "within it. Clip by value, or over the stages."
            )
        with unwatched():
            self._clip(optimizer, clip_val)

    def _clip(self, optimizer: Optimizer, clip_val: int | float) -> None:
        parameters = [p for p in self._parameters_of(optimizer) if p.grad is not None]
        borrowed = self._runtime.borrowed  # of a weight with copies in several processes, one counts
        counted = (p.grad for p in parameters if p.grad is not None and id(p) not in borrowed)
        norm = torch.nn.utils.get_total_norm(counted)
        squares = self._runtime.meetings.gather("clipping gradients", norm.double().item() ** 2)
        whole = torch.tensor(squares, dtype=torch.float64).sum().sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, float(clip_val), whole.to(norm))


class ClippingOverStages:
    """Takes the place of the precision plugin's ``clip_grad_by_norm``: says once whose norm it takes.

    Args:
        precision: The precision plugin.
        said: Whether that has been said.
    """

    def __init__(self, precision: Any, *, said: bool) -> None:
        vars(precision).pop("clip_grad_by_norm", None)  # of a run before
        self._clip = precision.clip_grad_by_norm
        self._said = said

    def __call__(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips by the norm of the gradients of this process."""
        if not self._said:
            self._said = True
            warn_of_clipping("clip_gradients")
        with unwatched():
            self._clip(optimizer, clip_val)


__all__ = ["ClippingOverModel", "ClippingOverStages"]
