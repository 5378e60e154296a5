"""Decoupled greedy learning: every stage has a loss of its own."""

from __future__ import annotations

from lightning_sg.predictors.base import TargetUse
from lightning_sg.predictors.head_options import HeadOptions
from lightning_sg.predictors.loss_model import LossModelPredictor
from lightning_sg.predictors.own_loss import OwnLoss
from lightning_sg.predictors.tasks import Tasks


class LocalLoss(LossModelPredictor):
    """Trains each stage on the loss of its own small head, without any gradient from later stages.

    Source: Belilovsky et al. 2020, *Decoupled Greedy Learning of CNNs* (arXiv 1901.08164). This is a
    :class:`~lightning_sg.LossModelPredictor` with ``objective="loss"`` that asks for no target: nothing is sent back,
    and gradients are not bounded. Unlike in the paper, the head is updated ``delay + 1`` batches after the stage.

    Args:
        hidden: The width of the head's hidden layers.
        layers: The number of hidden layers; 0 makes the head linear.
        classes: The number of classes; see :class:`~lightning_sg.LossModelPredictor`.
        head: Other options of the head. The paper's auxiliary networks have convolutions:
            ``HeadOptions(conv_layers=1)`` or more.
        own_loss: A loss of your own.
        tasks: The losses and weights of several tasks.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of range, or options exclude each other.
    """

    def __init__(
        self,
        hidden: int = 64,
        layers: int = 1,
        classes: int | dict[str, int] | None = None,
        head: HeadOptions = HeadOptions(),
        own_loss: OwnLoss | None = None,
        tasks: Tasks = Tasks(),
    ) -> None:
        super().__init__(hidden, layers, classes=classes, head=head, own_loss=own_loss, tasks=tasks)
        self.target_use = TargetUse.NONE


__all__ = ["LocalLoss"]
