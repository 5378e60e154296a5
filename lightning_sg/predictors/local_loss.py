"""Decoupled greedy learning: every stage has a loss of its own."""

from __future__ import annotations

from typing import Any

from lightning_sg.predictors.loss_model import LossModelPredictor


class LocalLoss(LossModelPredictor):
    """Each stage is trained on the loss of a small head of its own, and hears nothing of the stages after it.

    Source: Belilovsky et al. 2020, *Decoupled Greedy Learning of CNNs* (arXiv 1901.08164). It is a
    :class:`~lightning_sg.LossModelPredictor` with ``objective="loss"`` that asks for no target: nothing is sent
    back, and nothing bounds the gradients but the head's loss. Unlike there, the head is updated ``delay`` + 1 batches
    after the stage has used it.

    Args:
        options: All arguments of :class:`~lightning_sg.LossModelPredictor` but ``objective``, ``gradient_weight``,
            ``between`` and ``match``. The paper's auxiliary networks have convolutions: ``conv_layers=1`` or more.
    """

    needs_target = False

    def __init__(self, **options: Any) -> None:
        super().__init__(objective="loss", gradient_weight=0.0, between=False, match="normalized", **options)


__all__ = ["LocalLoss"]
