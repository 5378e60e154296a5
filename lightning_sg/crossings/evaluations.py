"""Refuses to evaluate a step again for the same batch, as some optimizers do."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

from lightning_sg.crossings.base import BatchContext
from lightning_sg.errors import BoundaryError
from lightning_sg.lightning_api import pl


def refuse_another_evaluation(batch: BatchContext, module: pl.LightningModule) -> None:
    """Refuses a step that begins anew although its batch has gone backward.

    A step may run the network several times before its backward pass. With manual optimization it may do so between
    its backward passes, too: then it says itself what follows what.

    Args:
        batch: The current batch.
        module: The module that is trained.

    Raises:
        BoundaryError: If the step of this batch is evaluated for the second time.
    """
    if batch.went_backward and module.automatic_optimization:
        raise evaluated_again(module.trainer.optimizers, f"training batch {batch.number}")


def evaluated_again(optimizers: Iterable[Optimizer], what: str = "a batch") -> BoundaryError:
    """The error for an optimizer that evaluates the step of a batch several times.

    Args:
        optimizers: Those of the trainer.
        what: The batch, in words.
    """
    names = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))
    return BoundaryError(
        f"The step is evaluated several times for {what}, after its backward pass again, as closures of LBFGS and SAM "
        f"are (the optimizers here: {names}). Stages do not wait for each other, so they have no common loss that such "
        "an optimizer could compare. Use one that takes one gradient a step, or manual optimization, where a step may "
        "run the network and go backward several times."
    )


__all__ = ["evaluated_again", "refuse_another_evaluation"]
