"""The boundary between two stages of one process, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sg.boundary import differentiable
from lightning_sg.errors import BoundaryError
from lightning_sg.step import Step
from lightning_sg.training import PredictorTrainer, Record


class LocalCrossing:
    """Identity forwards; backwards, keeps the gradient that arrives as the target and passes the prediction on.

    Needs no change to the loss, the optimizer or the loop, and works under any strategy. The prediction is made on
    the way forwards, so that it is the one that a stage in another process would make.

    Args:
        trainer: The boundary's predictor.
        step: What is going on in the current step.
    """

    def __init__(self, trainer: PredictorTrainer, step: Step) -> None:
        self._trainer = trainer
        self._step = step

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Crosses the boundary with ``tensors``; those that carry no gradient pass untouched."""
        places = [place for place, tensor in enumerate(tensors) if differentiable(tensor)]
        if not torch.is_grad_enabled() or not places:
            return tensors
        record = self._trainer.prepare([tensors[place] for place in places], self._step.context, self._step.loss)
        self._trainer.predict(record)
        carriers = [tensors[place] for place in places]
        crossed = _Cut.apply(_Backward(self._trainer, record, self._step.gradient_scale(), carriers), *carriers)
        tensors = list(tensors)
        for place, tensor in zip(places, crossed):
            tensors[place] = tensor
        return tensors


class _Backward:
    """What happens at the boundary backwards."""

    def __init__(self, trainer: PredictorTrainer, record: Record, scale: Tensor | float, tensors: list[Tensor]) -> None:
        self._name = trainer.name
        self._record = record
        self._scale = scale
        self._exact = trainer.exact
        self._dtypes = [tensor.dtype for tensor in tensors]
        self._passed = False

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BoundaryError(
                f"A gradient of a gradient (`create_graph=True`) was asked for across boundary '{self._name}'. A "
                "synthetic gradient has none: keep penalties on gradients within one stage."
            )
        if self._record.wants_target:
            self._record.add_target(None if gradient is None else gradient / self._scale for gradient in gradients)
        if self._exact:
            return gradients
        # A second backward pass through the same batch adds to the target; the prediction is for their sum.
        if self._record.prediction is None or self._passed:
            return (None,) * len(gradients)
        self._passed = True
        return tuple(
            (part * (self._scale / self._record.samples)).to(dtype)
            for part, dtype in zip(self._record.prediction, self._dtypes)
        )


class _Cut(torch.autograd.Function):
    """Identity whose gradient is what ``backward`` returns."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sg_backward = backward
        ctx.set_materialize_grads(False)  # an output that the loss does not use has no gradient, not a zero one
        # A copy, so that an in-place operation in the next stage cannot reach what the predictor learns from.
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.sg_backward(gradients))


__all__ = ["LocalCrossing"]
