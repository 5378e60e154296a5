"""The loss-model predictor: its prediction is the gradient of a small head's own loss."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sg.arguments import checked, instance, one_of, optional
from lightning_sg.predictors.base import GradientPredictor, Gradients, LossInfo, TargetUse
from lightning_sg.predictors.head_options import HeadOptions
from lightning_sg.predictors.heads import Head, HeadFactory
from lightning_sg.predictors.layers import DEPTH, WIDTH
from lightning_sg.predictors.matching import Matching
from lightning_sg.predictors.own_loss import OwnLoss
from lightning_sg.predictors.replay_head import ReplayHead
from lightning_sg.predictors.replayed import ReplayedLoss
from lightning_sg.predictors.tasks import CLASSES, Tasks, loss_of_task, tasks_of

Objective = Literal["loss", "gradient", "both"]


class LossModelArguments(TypedDict, total=False):
    """Any of the arguments of :class:`LossModelPredictor`, as a dict."""

    hidden: int
    layers: int
    objective: Objective
    matching: Matching
    classes: int | dict[str, int] | None
    head: HeadOptions
    own_loss: OwnLoss | None
    tasks: Tasks


class LossModelPredictor(GradientPredictor):
    r"""Predicts ĝ = ∂ℓ(A(h), c)/∂h for a small head A and the task's own loss ℓ.

    The head predicts the model's output from the activation h, and the context c (the labels) is what its output is
    compared with. Its loss falls where the model's loss falls, so even a rough head gives a useful direction, unlike a
    direct predictor. This is the critic of Czarnecki et al. 2017, *Sobolev Training* (arXiv 1706.04859, section 4.2);
    with ``objective="both"`` it learns value and derivative.

    ==============================  =============================  ==================================================
    activations                     context                        the head
    ==============================  =============================  ==================================================
    ``(N, D)``                      ``(N,)``                       on each sample
    ``(N, T, D)``                   ``(N, T)``                     on each position, with a loss for each
    ``(N, T, D)``                   ``(N,)``                       on the mean over positions
    ``(N, C, H, W)``                ``(N,)``                       on the map, averaged to a few cells
    ``(N, C, H, W)``                ``(N, H', W')`` or             on each of at most 64 × 64 cells; its outputs are
                                    ``(N, K, H', W')``             interpolated towards the labels' resolution
    ==============================  =============================  ==================================================

    An integer context holds class labels and gets cross-entropy, with the ``label_smoothing`` and ``ignore_index`` of
    the model's own. Other contexts are regression targets, for which the model's own loss is used as well (mse, l1,
    smooth_l1, huber or binary cross-entropy). If the model's loss is none of these, and the context is what a traced
    step found, the head's loss is the model's own: its operations, repeated on the head's outputs. A context of the
    user's choice that is a dict of tensors gets one head for each entry, and the loss is their weighted sum.

    Args:
        hidden: The width of the head's hidden layers.
        layers: The number of hidden layers; 0 makes the head linear.
        objective: What the head is trained on: its own ``"loss"``, matching the target ``"gradient"``, or ``"both"``.
        matching: How the target gradient is matched, if ``objective`` includes it.
        classes: The number of classes, if the model's own loss does not reveal it; without either, the first batch is
            counted. With several tasks, a dict by name.
        head: Other options of the head.
        own_loss: A loss of your own, in place of the model's.
        tasks: The losses and weights of several tasks.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range, or options exclude each other.
    """

    def __init__(
        self,
        hidden: int = 64,
        layers: int = 1,
        objective: Objective = "loss",
        matching: Matching = Matching(),
        classes: int | dict[str, int] | None = None,
        head: HeadOptions = HeadOptions(),
        own_loss: OwnLoss | None = None,
        tasks: Tasks = Tasks(),
    ) -> None:
        super().__init__()
        name = type(self).__name__
        hidden, layers = checked(name, "hidden", hidden, WIDTH), checked(name, "layers", layers, DEPTH)
        objective = checked(name, "objective", objective, one_of(*get_args(Objective)))
        matching = checked(name, "matching", matching, instance(Matching))
        classes = checked(name, "classes", classes, CLASSES)
        head = checked(name, "head", head, instance(HeadOptions))
        own_loss = checked(name, "own_loss", own_loss, optional(instance(OwnLoss)))
        tasks = checked(name, "tasks", tasks, instance(Tasks))
        if own_loss is not None and (classes or tasks != Tasks()):
            raise ValueError(f"{name}: own_loss replaces classes and tasks. Remove them, or remove own_loss.")
        self.objective = objective
        self.matching = matching
        self.classes = classes
        self.own_loss = own_loss
        self.tasks = tasks
        self.target_use = TargetUse.REQUIRED
        if objective == "loss":
            self.target_use = TargetUse.BOUND
        elif objective == "both" and matching.between:
            self.target_use = TargetUse.OPTIONAL
        self.factory = HeadFactory(hidden, layers, head)
        #: One name for each head; ``""`` for a context that is no dict.
        self.task_names: list[str] = []
        self.heads = nn.ModuleList()

    @property
    def hidden(self) -> int:
        """The width of the heads' hidden layers."""
        return self.factory.hidden

    @property
    def head(self) -> nn.Sequential:
        """The layers of the first task's head."""
        return self._head(0).net

    @property
    def kind(self) -> str:
        """The loss of the first task's head."""
        return str(getattr(self._head(0).criterion, "kind", ""))

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        """Makes the heads: K outputs for labels of K classes, otherwise one for each regression target of a row."""
        if self.own_loss is not None:
            self.task_names = [""]
            self.heads = nn.ModuleList([self.factory.make_own(activations, context, self.own_loss)])
            self._sample_losses(activations, context)  # raises if the function returns something else than losses
            return
        if loss is not None and loss.kind == "replayed" and loss.replay is not None and self.tasks == Tasks():
            self.build_replayed(activations, context, loss.replay)
            return
        try:
            self._build_comparing(activations, context, loss)
        except ValueError:
            # The model's own operations may fit where labels and activations do not.
            replay = None if loss is None else loss.replay
            if replay is None or self.tasks != Tasks() or self.classes is not None:
                raise
            self.build_replayed(activations, context, replay)

    def _build_comparing(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        tasks = tasks_of(context, self.tasks.losses)
        classes = self.classes if isinstance(self.classes, dict) else dict.fromkeys(tasks, self.classes)
        unknown = sorted({*self.tasks.weights, *classes} - set(tasks))
        if unknown:
            raise ValueError(
                f"weights or classes are given for {unknown}, but the context has "
                f"{'no dict of tasks' if isinstance(context, Tensor) else sorted(tasks)}."
            )
        self.task_names = list(tasks)
        self.heads = nn.ModuleList(
            self.factory.make(
                activations,
                labels,
                loss_of_task(name, tasks, loss),
                kind=self.tasks.losses.get(name),
                classes=classes.get(name),
                task=name,
            )
            for name, labels in tasks.items()
        )

    def build_replayed(self, activations: Gradients, context: Any, loss: ReplayedLoss) -> None:
        """Makes one head for the model's loss as a traced step showed it.

        Args:
            activations: As in :meth:`build`.
            context: As in :meth:`build`.
            loss: The loss.

        Raises:
            ValueError: If they do not fit together.
        """
        self.task_names = [""]
        self.heads = nn.ModuleList([self.factory.make_replayed(activations, context, loss)])

    def can_match(self, activations: Gradients, context: Any) -> bool:
        """Whether it can learn from targets if it wants to: torch cannot differentiate every loss twice.

        Args:
            activations: As in :meth:`build`, which was called before.
            context: As in :meth:`build`.
        """
        if not self.target_use.learns_from_targets:
            return True
        copied = copy.deepcopy(self)  # whose running statistics may change
        try:
            _value, gradients = copied._value_and_gradient(activations, context, create_graph=True)
            size = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
            torch.autograd.grad(size, [*copied.parameters()], allow_unused=True)
        except RuntimeError:
            return False
        return True

    def default_optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """AdamW with learning rate 3e-3 and weight decay 0.3, because a head that fits its batches has no gradient."""
        return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.3, fused=True)

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        """See :meth:`GradientPredictor.forward`."""
        found = self._in_closed_form(activations, context, learns=False)
        if found is not None:
            return found[1]
        return self._value_and_gradient(activations, context, create_graph=False)[1]

    @property
    def learns_in_passing(self) -> bool:
        """Whether there are batches on which it learns from its own loss alone, whose gradient is the prediction.

        A subclass with a loss or a prediction of its own does both as the contract says.
        """
        kind = type(self)
        own = kind.loss is LossModelPredictor.loss and kind.forward is LossModelPredictor.forward
        return own and self.target_use.learns_without_targets

    def forward_and_backward(self, activations: Gradients, context: Any) -> tuple[Gradients, Tensor]:
        """See :meth:`GradientPredictor.forward_and_backward`."""
        for place in range(len(self.heads)):
            self._head(place).update(activations)
        closed = self._in_closed_form(activations, context, learns=True)
        if closed is not None:
            return closed[1], closed[0]
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            inputs = tuple(activation.detach().requires_grad_() for activation in activations)
            value = self._sample_losses(inputs, context).mean()
            found = torch.autograd.grad(value, [*inputs, *parameters], allow_unused=True)
        for parameter, gradient in zip(parameters, found[len(inputs) :]):
            parameter.grad = gradient
        samples = activations[0].shape[0]
        prediction = tuple(
            torch.zeros_like(activation) if gradient is None else gradient * samples
            for activation, gradient in zip(activations, found)
        )
        return prediction, value.detach()

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        """The head's mean loss, the error of its gradient, or their weighted sum."""
        for place in range(len(self.heads)):
            self._head(place).update(activations)
        if self.objective == "loss" or not targets:
            return self._sample_losses(activations, context).mean()
        value, gradients = self._value_and_gradient(activations, context, create_graph=True)
        error = self.matching.error(gradients, targets, self.target_rms)
        if self.objective == "gradient":
            return error
        return value / activations[0].shape[0] + self.matching.weight * error

    def value_of(self, outputs: Sequence[Tensor], context: Any) -> Tensor:
        """The loss of each sample for given outputs of the heads.

        Args:
            outputs: One tensor for each task, ``(N, K)``, ``(N, T, K)`` or ``(N, H, W, K)``.
            context: As in :meth:`build`.

        Returns:
            ``(N,)``.
        """
        if self._whole:
            return self._head(0).criterion(outputs[0], context)
        tasks = tasks_of(context, self.task_names)
        return self._weighted(
            self._head(place).criterion(outputs[place], tasks[name]) for place, name in enumerate(self.task_names)
        )

    def describe(self, *, matches: bool = True) -> str:
        """Describes the heads, and what they are trained on, in words; call it after :meth:`build`.

        Args:
            matches: Whether any targets come that they could match.
        """
        heads = [self._head(place).describe() for place in range(len(self.heads))]
        named = [f"{name}: {head}" if name else head for name, head in zip(self.task_names, heads)]
        matching = self.matching
        trained = {
            "loss": "its own loss",
            "gradient": f"the target gradient ({matching.measure})",
            "both": f"its own loss and {matching.weight:g} × the target gradient ({matching.measure})",
        }
        return f"{'; '.join(named)}; trained on {trained[self.objective if matches else 'loss']}"

    def _in_closed_form(self, activations: Gradients, context: Any, *, learns: bool) -> tuple[Tensor, Gradients] | None:
        """The mean loss and the per-sample prediction, if a single head has a closed form."""
        head = self._head(0)
        if self._whole or len(self.heads) > 1 or self.tasks.weights or not isinstance(head, Head):
            return None
        labels = tasks_of(context, self.task_names)[self.task_names[0]]
        return head.gradients(activations, labels, learns=learns)

    def _value_and_gradient(self, activations: Gradients, context: Any, create_graph: bool) -> tuple[Tensor, Gradients]:
        with torch.enable_grad():
            inputs = tuple(activation.detach().requires_grad_() for activation in activations)
            value = self._sample_losses(inputs, context).sum()
            gradients = torch.autograd.grad(
                value, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        return value, gradients

    def _sample_losses(self, activations: Gradients, context: Any) -> Tensor:
        """The loss of each sample, ``(N,)``: the weighted sum over tasks."""
        if self._whole:
            return self._head(0).sample_losses(activations, context)
        tasks = tasks_of(context, self.task_names)
        return self._weighted(
            self._head(place).sample_losses(activations, tasks[name]) for place, name in enumerate(self.task_names)
        )

    def _weighted(self, losses: Iterable[Tensor]) -> Tensor:
        weights = [self.tasks.weights.get(name, 1.0) for name in self.task_names]
        if weights == [1.0]:
            return next(iter(losses))
        return torch.stack([weight * loss for weight, loss in zip(weights, losses)]).sum(0)

    @property
    def _whole(self) -> bool:
        """Whether one head takes the whole context."""
        return self.own_loss is not None or isinstance(self.heads[0], ReplayHead)

    def _head(self, place: int) -> Head | ReplayHead:
        head = self.heads[place]
        assert isinstance(head, (Head, ReplayHead))
        return head


__all__ = ["LossModelArguments", "LossModelPredictor", "Objective"]
