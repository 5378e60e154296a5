"""Gradient predictors: what guesses the gradient at a boundary."""

from lightning_sg.predictors.auto import AutoPredictor
from lightning_sg.predictors.base import GradientPredictor, LossInfo
from lightning_sg.predictors.direct import LinearPredictor, MLPPredictor
from lightning_sg.predictors.feedback import FeedbackAlignment
from lightning_sg.predictors.local_loss import LocalLoss
from lightning_sg.predictors.loss_model import LossModelPredictor
from lightning_sg.rules import DelayedGradient, Detach, TrueGradient, ZeroPredictor

__all__ = [
    "AutoPredictor",
    "DelayedGradient",
    "Detach",
    "FeedbackAlignment",
    "GradientPredictor",
    "LinearPredictor",
    "LocalLoss",
    "LossInfo",
    "LossModelPredictor",
    "MLPPredictor",
    "TrueGradient",
    "ZeroPredictor",
]
