"""Gradient predictors: what guesses the gradient at a boundary."""

from lightning_sg.predictors.base import GradientPredictor, LossInfo
from lightning_sg.predictors.direct import LinearPredictor, MLPPredictor
from lightning_sg.predictors.fixed import TrueGradient, ZeroPredictor
from lightning_sg.predictors.loss_model import LossModelPredictor

__all__ = [
    "GradientPredictor",
    "LinearPredictor",
    "LossInfo",
    "LossModelPredictor",
    "MLPPredictor",
    "TrueGradient",
    "ZeroPredictor",
]
