"""Direct feedback alignment, with the output error estimated at the boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_sg.arguments import checked, number
from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo, TargetUse
from lightning_sg.predictors.head_options import HeadOptions
from lightning_sg.predictors.heads import Head
from lightning_sg.predictors.layers import DEPTH, WIDTH
from lightning_sg.predictors.loss_model import LossModelPredictor
from lightning_sg.predictors.normalize import NORMALIZATION, Normalization
from lightning_sg.predictors.replay_head import ReplayHead
from lightning_sg.predictors.tasks import CLASSES


class FeedbackAlignment(GradientPredictor):
    r"""Predicts ĝ = e B for an estimate e of the output error and a fixed random matrix B.

    Direct feedback alignment (Nøkland 2016, arXiv 1609.01596; after Lillicrap et al. 2016, arXiv 1411.0247)
    sends the error of the network's output, softmax(output) - label, to every layer through a fixed random matrix
    instead of the transposed weights. Waiting for the network's output would lock the stages. So the error here is that
    of a readout A on the boundary's own activations, :math:`e = ∂ℓ(A(h), c)/∂A(h)`, which for cross-entropy is
    softmax(A(h)) - label. The readout learns from its own loss and asks for no target.

    B is drawn once, with the boundary's own seed. Its entries are independent with mean 0 and standard deviation
    ``scale / sqrt(D)`` for D features, so ĝ is about ``scale`` times as long as e. Where the readout sees averages
    (see the table of :class:`~lightning_sg.LossModelPredictor`), e B is divided among the positions or cells.

    Unlike every other predictor it does not start at zero: its feedback is random from the first step.

    Args:
        scale: The length of ĝ relative to that of e, at most 1e6.
        hidden: The width of the readout's hidden layers.
        layers: The number of hidden layers; 0 makes the readout linear.
        normalize: How the readout's input is scaled.
        classes: The number of classes, if the model's own loss does not reveal it.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range.
    """

    target_use = TargetUse.NONE

    def __init__(
        self,
        scale: float = 1.0,
        hidden: int = 128,
        layers: int = 0,
        normalize: Normalization = "layer",
        classes: int | dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.feedback_scale = checked(name, "scale", scale, number(above=0, most=1e6))
        hidden, layers = checked(name, "hidden", hidden, WIDTH), checked(name, "layers", layers, DEPTH)
        classes = checked(name, "classes", classes, CLASSES)
        # samples=0: the error of every class is fed back, so the softmax must be over all of them.
        options = HeadOptions(normalize=checked(name, "normalize", normalize, NORMALIZATION), samples=0)
        self.readout = LossModelPredictor(hidden, layers, classes=classes, head=options)
        self.feedback = nn.ParameterList()

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Makes the readout and draws B."""
        self.readout.build(activations, context, loss)
        matrices = []
        for head in self._heads():
            outputs, features = head.outputs(activations).shape[-1], head.view.rows(activations).shape[-1]
            matrix = torch.randn(outputs, features) * (self.feedback_scale / features**0.5)
            matrices.append(nn.Parameter(matrix.to(activations[0].device), requires_grad=False))
        self.feedback = nn.ParameterList(matrices)

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        """See :meth:`GradientPredictor.forward`."""
        with torch.enable_grad():
            inputs = tuple(activation.detach().requires_grad_() for activation in activations)
            rows = [head.view.rows(inputs) for head in self._heads()]
            fed_back = [error @ matrix for error, matrix in zip(self.errors(activations, context), self.feedback)]
            return torch.autograd.grad(rows, inputs, fed_back)

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """The readout's own loss."""
        return self.readout.loss(activations, context, targets)

    def errors(self, activations: Gradients, context: Any) -> list[Tensor]:
        """The per-sample error at the readout's outputs: for each task a tensor of the outputs' shape."""
        with torch.enable_grad():
            outputs = [head.outputs(activations).detach().requires_grad_() for head in self._heads()]
            value = self.readout.value_of(outputs, context)
            return list(torch.autograd.grad(value.sum(), outputs))

    def _heads(self) -> list[Head | ReplayHead]:
        return [head for head in self.readout.heads if isinstance(head, (Head, ReplayHead))]


__all__ = ["FeedbackAlignment"]
