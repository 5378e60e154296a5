"""The boundary between two stages of one process, as an autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sg.boundary import differentiable
from lightning_sg.crossings.step import Step, unscaled
from lightning_sg.errors import BoundaryError
from lightning_sg.inputs.trainer import InputTrainer
from lightning_sg.training import PredictorTrainer, Record

Optional = tuple[Tensor | None, ...]


class LocalCrossing:
    """Identity forwards; backwards, keeps the gradient that arrives as the target and passes the prediction on.

    Needs no change to the loss, the optimizer or the loop, and works under any strategy. The prediction is made on
    the way forwards, so that it is the one that a stage in another process would make.

    Attributes:
        record: The current batch at this boundary.
        carriers: The tensors of it that carry a gradient, as they left the stage before.
        passing: What a gradient that arrives is turned into: ``"synthetic"``, ``"exact"`` or ``"excess"``, the methods
            of these names. By name, as a bound method here would be a cycle, and what a batch holds not be let go.

    Args:
        trainer: The boundary's predictor.
        step: What is going on in the current step.
        inputs: Predicts what the next stage goes on with in the activations' place, or ``None``.
    """

    record: Record
    carriers: list[Tensor]

    def __init__(self, trainer: PredictorTrainer, step: Step, inputs: InputTrainer | None = None) -> None:
        self.trainer = trainer
        self._inputs = inputs
        self._step = step
        self.passing: Literal["synthetic", "exact", "excess"] = "synthetic"
        self._passed = False

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Crosses the boundary with ``tensors``; those that carry no gradient pass untouched."""
        places = [place for place, tensor in enumerate(tensors) if differentiable(tensor)]
        if not torch.is_grad_enabled() or not places:
            return tensors
        carriers = [tensors[place] for place in places]
        step = self._step
        self.record = self.trainer.prepare(
            carriers, step.context, step.loss, exact=step.exact, true_share=step.true_share, bootstrap=step.bootstrap
        )
        self.record.skipped = not step.updates.before(self.trainer.name)
        self.trainer.predict(self.record)
        ahead = None
        if self._inputs is not None:
            learns = step.updates.after(self.trainer.name)
            ahead = self._inputs.cross(step.inputs.of_batch, carriers, learns=learns)
        self._scale = step.gradient_scale()
        self._dtypes = [tensor.dtype for tensor in carriers]
        if step.exact:
            self.carriers = carriers
            step.crossings.append(self)
        crossed = _Cut.apply(self._backward, ahead, *carriers)
        tensors = list(tensors)
        for place, tensor in zip(places, crossed):
            tensors[place] = tensor
        return tensors

    def _backward(self, gradients: Optional) -> Optional:
        if torch.is_grad_enabled():
            raise BoundaryError(
                f"A gradient of a gradient (`create_graph=True`) was asked for across boundary '{self.trainer.name}'. "
                "A synthetic gradient has none: keep penalties on gradients within one stage."
            )
        passed: Optional = getattr(self, self.passing)(gradients)
        return passed

    def synthetic(self, gradients: Optional) -> Optional:
        """Keeps the target, and passes the prediction on."""
        record = self.record
        # As between processes: where no gradient arrives at all, there is no target.
        if record.wants_target and any(gradient is not None for gradient in gradients):
            record.add_target(self._unscaled(gradients))
        if record.true_share == 1:
            return gradients
        if record.prediction is None and record.true_share == 0:
            return (None,) * len(gradients)
        share = record.true_share
        true = [None if gradient is None or not share else share * gradient for gradient in gradients]
        # A second backward pass through the same batch adds to the target; the prediction is for their sum.
        if self._passed or record.prediction is None:
            return tuple(true)
        self._passed = True
        factor = (1 - share) * self._scale / record.samples
        parts = [(part * factor).to(dtype) for part, dtype in zip(record.prediction, self._dtypes)]
        return tuple(part if more is None else part + more for part, more in zip(parts, true))

    def exact(self, gradients: Optional) -> Optional:
        """Takes the true gradient as the exact target and passes it on, as if there were no boundary."""
        self.record.exact_targets = self.record.per_sample(self._unscaled(gradients))
        return gradients

    def excess(self, gradients: Optional) -> Optional:
        """Takes what the exact gradient is more than the target; passes on what it is more than the one used."""
        record = self.record
        record.add_excess(self._unscaled(gradients))
        exact = record.exact_targets or record.targets
        if exact is None:
            return gradients
        factor = self._scale / record.samples
        return tuple(((true - used) * factor).to(dtype) for true, used, dtype in zip(exact, record.used, self._dtypes))

    def _unscaled(self, gradients: Optional) -> Optional:
        return tuple(None if gradient is None else unscaled(gradient, self._scale) for gradient in gradients)


class _Cut(torch.autograd.Function):
    """Identity, or other values in the tensors' place, whose gradient is what ``backward`` returns."""

    @staticmethod
    def forward(
        ctx: Any, backward: Callable[..., Any], values: list[Tensor] | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sg_backward = backward
        ctx.set_materialize_grads(False)  # an output that the loss does not use has no gradient, not a zero one
        if values is not None:
            return tuple(values)
        # A copy, so that an in-place operation in the next stage cannot reach what the predictor learns from.
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.sg_backward(gradients))


__all__ = ["LocalCrossing"]
