"""Says at the start what the predictors predict from."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sg.lightning_api import rank_zero_info, rank_zero_warn
from lightning_sg.partition.told import Told
from lightning_sg.predictors import AutoPredictor
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.trainer import PredictorTrainer

_ADVICE = (
    "Say what to predict from: SyntheticGradients(context=...), a key, an index or a function of the batch; "
    "context=None if there is nothing."
)


def announce_context(told: Told, trainers: Iterable[BoundaryTrainer], *, found: bool) -> None:
    """Says where in the batch the context is and by which loss, or warns that there is none.

    Args:
        told: What predictors are told.
        trainers: What supplies the gradients.
        found: Whether the first batch has a context.
    """
    predictors = [trainer for trainer in trainers if isinstance(trainer, PredictorTrainer)]
    if not predictors:
        return
    if told.words is not None:
        rank_zero_info(f"SyntheticGradients predicts from {told.words}.")
    elif told.guesses and found:
        rank_zero_info(
            "SyntheticGradients predicts from what it takes for the labels, the second element of the batch or an "
            f"entry with a usual name: the step could not be followed to its loss. {_ADVICE}"
        )
    elif (told.guesses or told.missing is not None) and any(_chooses(trainer) for trainer in predictors):
        reason = told.missing or "the step could not be followed"
        rank_zero_warn(
            "context='auto' finds nothing in the batch that the loss compares the network with, so gradients are "
            f"predicted from activations alone, by small predictors, which is far worse: {reason}. {_ADVICE}"
        )


def _chooses(trainer: PredictorTrainer) -> bool:
    return isinstance(trainer.predictor, AutoPredictor)


__all__ = ["announce_context"]
