"""The loss-model predictor: a small head whose own loss's gradient is the prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo
from lightning_sg.predictors.criteria import Kind, check_kind
from lightning_sg.predictors.heads import Head, HeadOptions, make_head, make_own_head
from lightning_sg.predictors.layers import HiddenNorm, check_hidden_norm
from lightning_sg.predictors.matching import Match, check_match, gradient_error
from lightning_sg.predictors.normalize import InputScale, Normalization
from lightning_sg.predictors.tasks import loss_of_task, tasks_of

Objective = Literal["loss", "gradient", "both"]


class LossModelPredictor(GradientPredictor):
    r"""Predicts :math:`ĝ = ∂ℓ(A(h), c)/∂h` for a small head A and the task's own loss ℓ.

    The head guesses the model's output from the activation, with the context c (the labels) as its goal. Its
    loss falls where the model's loss falls, so even a rough head gives a useful direction, unlike a direct
    predictor. This is the critic of Czarnecki et al. 2017, *Sobolev Training* (arXiv 1706.04859, section 4.2):
    with ``objective="both"`` it learns value and derivative.

    ==============================  =============================  ==================================================
    activations                     context                        the head
    ==============================  =============================  ==================================================
    ``(N, D)``                      ``(N,)``                       on each sample
    ``(N, T, D)``                   ``(N, T)``                     on each position; one loss a position
    ``(N, T, D)``                   ``(N,)``                       on the mean of the positions
    ``(N, C, H, W)``                ``(N,)``                       on the map, averaged to a few cells
    ``(N, C, H, W)``                ``(N, H', W')`` or             on each cell, at most 64 × 64 of them; outputs are
                                    ``(N, K, H', W')``             interpolated towards the labels' resolution
    ==============================  =============================  ==================================================

    Integer context is labels of classes, with cross-entropy (and its ``label_smoothing`` and ``ignore_index``); other
    numbers are goals. Which loss they have (mse, l1, smooth_l1, huber, binary cross-entropy) is taken from the model's
    own. Context that is a dict of tensors has one head for each entry, and the loss is their weighted sum.

    Args:
        hidden: Width of the head's hidden layers.
        layers: Number of hidden layers; 0 makes the head linear.
        objective: What the head is trained on: its own ``"loss"``, matching the target ``"gradient"``, or ``"both"``.
        gradient_weight: With ``"both"``, the weight of the gradient error beside the own loss.
        normalize: How the head's input is scaled, see :class:`~lightning_sg.predictors.normalize.InputScale`.
        classes: The number of classes, where the model's own loss is not one that tells: then they would be counted in
            the first batch. For several tasks by name.
        between: With ``"both"``, whether to learn from the own loss alone on batches that have no exact target.
            Otherwise they are left out.
        match: How the gradient error is measured: ``"normalized"`` by the size of the batch's targets, ``"l2"`` by
            the running size, ``"cosine"`` by the angle alone; see
            :func:`~lightning_sg.predictors.matching.gradient_error`.
        rank: Makes the last layer a product of two, with this width between them. By default 64 where the layer would
            have more than 2**20 weights; 0 for never.
        samples: Takes the softmax over a sample of the classes: those of up to so many labels of the batch, and at
            least as many others. By default 1024 with more than 8192 classes; 0 for never. See
            :class:`~lightning_sg.predictors.sampled.SampledSoftmax`.
        conv_layers: Number of 3 × 3 convolutions before the head's other layers; for feature maps only.
        conv_width: Channels of these.
        pooled_side: With one label for each sample, feature maps are averaged to at most so many cells a side.
        hidden_norm: What normalises each hidden layer before its ReLU: ``"batch"`` over the samples of the batch, as
            in the networks that have BatchNorm, ``"layer"`` each row by itself, or ``"none"``.
        loss: A loss of your own, ``loss(outputs, context)``, of the head's outputs and the context as it is. It
            returns either the losses of the samples, ``(N,)``, or one number, which is taken for their mean. Outputs
            are ``(N, outputs)``, ``(N, T, outputs)`` for context with positions, or ``(N, outputs, H', W')`` for
            dense context.
        outputs: How many outputs the head has for ``loss``.
        losses: The loss of each task where the context is a dict: ``"cross_entropy"``, ``"binary_cross_entropy"``,
            ``"mse"``, ``"l1"``, ``"smooth_l1"`` or ``"huber"``. Only the entries named are used; by default all, each
            with the loss for its kind of numbers.
        weights: The weight of each task's loss, 1 for those not named.

    Raises:
        ValueError: If an option is out of range, or options do not go together.
    """

    def __init__(
        self,
        hidden: int = 64,
        layers: int = 1,
        objective: Objective = "loss",
        gradient_weight: float = 0.5,
        between: bool = True,
        normalize: Normalization = "none",
        classes: int | dict[str, int] | None = None,
        match: Match = "normalized",
        rank: int | None = None,
        samples: int | None = None,
        conv_layers: int = 0,
        conv_width: int = 64,
        pooled_side: int = 7,
        hidden_norm: HiddenNorm = "batch",
        loss: Callable[[Tensor, Any], Any] | None = None,  # jsonargparse takes `Tensor` for a class to make
        outputs: int | None = None,
        losses: dict[str, Kind] | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if hidden < 1 or layers < 0:
            raise ValueError(f"{name} needs hidden >= 1 and layers >= 0, not {hidden} and {layers}.")
        if conv_layers < 0 or conv_width < 1 or pooled_side < 1:
            raise ValueError(
                f"{name} needs conv_layers >= 0, conv_width >= 1 and pooled_side >= 1, "
                f"not {conv_layers}, {conv_width} and {pooled_side}."
            )
        if min(rank or 0, samples or 0) < 0:
            raise ValueError(f"{name} needs rank >= 0 and samples >= 0, not {rank} and {samples}.")
        if objective not in ("loss", "gradient", "both"):
            raise ValueError(f"objective must be 'loss', 'gradient' or 'both', not '{objective}'.")
        if (loss is None) != (outputs is None) or (outputs is not None and outputs < 1):
            raise ValueError(
                f"{name} with a loss of your own needs both, loss=... and the number of outputs=... of the head "
                f"that it is for (at least 1), not loss={loss!r} and outputs={outputs}."
            )
        if loss is not None and not callable(loss):
            raise ValueError(f"{name}: loss must be a function of (outputs, context), not {loss!r}.")
        if loss is not None and (losses or weights or classes):
            raise ValueError(f"{name}: a loss of your own leaves nothing for losses, weights and classes to say.")
        check_match(match)
        check_hidden_norm(hidden_norm)
        for kind in (losses or {}).values():
            check_kind(kind)
        InputScale(normalize)  # says so now if there is no such normalization
        self.options = HeadOptions(
            hidden, layers, normalize, rank, samples, conv_layers, conv_width, pooled_side, hidden_norm
        )
        self.hidden = hidden
        self.layers = layers
        self.objective = objective
        self.uses_target = objective != "loss"
        self.gradient_weight = gradient_weight
        self.learns_without_target = between and objective == "both"
        self.match = match
        self.classes = classes
        self.own_loss = loss
        self.own_outputs = outputs
        self.losses = dict(losses or {})
        self.weights = dict(weights or {})
        self.tasks: list[str] = []
        self.heads = nn.ModuleList()

    @property
    def head(self) -> nn.Sequential:
        """The layers of the first task's head."""
        return self._head(0).net

    @property
    def kind(self) -> str:
        """The loss of the first task's head."""
        return str(getattr(self._head(0).criterion, "kind", ""))

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Makes the heads: K outputs for labels of K classes, else as many as a row has goals."""
        if self.own_loss is not None and self.own_outputs is not None:
            self.tasks = [""]
            head = make_own_head(self.options, activations, context, self.own_loss, self.own_outputs)
            self.heads = nn.ModuleList([head])
            self._sample_losses(activations, context)  # a loss that does not do says so now
            return
        tasks = tasks_of(context, self.losses)
        unknown = sorted({*self.weights, *(self.classes if isinstance(self.classes, dict) else ())} - set(tasks))
        if unknown:
            raise ValueError(
                f"weights or classes are given for {unknown}, but the context has "
                f"{'no dict of tasks' if isinstance(context, Tensor) else sorted(tasks)}."
            )
        self.tasks = list(tasks)
        self.heads = nn.ModuleList(
            make_head(
                self.options,
                activations,
                goal,
                loss_of_task(name, tasks, loss),
                kind=self.losses.get(name),
                classes=self.classes.get(name) if isinstance(self.classes, dict) else self.classes,
                task=name,
            )
            for name, goal in tasks.items()
        )

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """AdamW, learning rate 3e-3, weight decay 0.3: a head that fits its batches too well has little to say."""
        return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.3, fused=True)

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        """See :meth:`GradientPredictor.forward`."""
        return self._value_and_gradient(activations, context, create_graph=False)[1]

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """The head's mean loss, the error of its gradient, or their weighted sum."""
        for place in range(len(self.heads)):
            self._head(place).update(activations)
        if self.objective == "loss" or not targets:
            return self._sample_losses(activations, context).mean()
        value, gradients = self._value_and_gradient(activations, context, create_graph=True)
        error = gradient_error(self.match, gradients, targets, self.target_rms)
        if self.objective == "gradient":
            return error
        return value / activations[0].shape[0] + self.gradient_weight * error

    def value_of(self, outputs: Sequence[Tensor], context: Any) -> Tensor:
        """The loss of each sample for given outputs of the heads.

        Args:
            outputs: One tensor for each task, ``(N, K)``, ``(N, T, K)`` or ``(N, H, W, K)``.
            context: As in :meth:`build`.

        Returns:
            ``(N,)``.
        """
        tasks = tasks_of(context, self.tasks)
        return self._weighted(
            self._head(place).criterion(outputs[place], tasks[name]) for place, name in enumerate(self.tasks)
        )

    def describe(self) -> str:
        """The heads and what they are trained on, in words; after :meth:`build`."""
        heads = [self._head(place).describe() for place in range(len(self.heads))]
        named = [f"{name}: {head}" if name else head for name, head in zip(self.tasks, heads)]
        trained = {
            "loss": "its own loss",
            "gradient": f"the target gradient ({self.match})",
            "both": f"its own loss and {self.gradient_weight:g} × the target gradient ({self.match})",
        }
        return f"{'; '.join(named)}; trained on {trained[self.objective]}"

    def _value_and_gradient(self, activations: Gradients, context: Any, create_graph: bool) -> tuple[Tensor, Gradients]:
        with torch.enable_grad():
            inputs = tuple(activation.detach().requires_grad_() for activation in activations)
            value = self._sample_losses(inputs, context).sum()
            gradients = torch.autograd.grad(value, inputs, create_graph=create_graph)
        return value, gradients

    def _sample_losses(self, activations: Gradients, context: Any) -> Tensor:
        """The loss of each sample, ``(N,)``; the weighted sum of the tasks'."""
        if self.own_loss is not None:
            return self._head(0).sample_losses(activations, context)
        tasks = tasks_of(context, self.tasks)
        return self._weighted(
            self._head(place).sample_losses(activations, tasks[name]) for place, name in enumerate(self.tasks)
        )

    def _weighted(self, losses: Iterable[Tensor]) -> Tensor:
        return torch.stack([self.weights.get(name, 1.0) * loss for name, loss in zip(self.tasks, losses)]).sum(0)

    def _head(self, place: int) -> Head:
        head = self.heads[place]
        assert isinstance(head, Head)
        return head


__all__ = ["LossModelPredictor", "Objective"]
