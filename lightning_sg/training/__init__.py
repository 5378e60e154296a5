"""Trains the gradient predictors: what they learn from, when, and how far they are trusted."""

from lightning_sg.training.bound import TargetScale
from lightning_sg.training.guard import AlignmentGuard
from lightning_sg.training.metrics import compare
from lightning_sg.training.record import Record
from lightning_sg.training.trainer import PredictorTrainer, TrainerOptions

__all__ = [
    "AlignmentGuard",
    "PredictorTrainer",
    "Record",
    "TargetScale",
    "TrainerOptions",
    "compare",
]
