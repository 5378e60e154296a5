"""Gradient predictors: modules that predict the gradient at a boundary."""

from lightning_sg.predictors.auto import AutoPredictor
from lightning_sg.predictors.base import GradientPredictor, LossInfo, TargetUse
from lightning_sg.predictors.direct import LinearPredictor, MLPPredictor
from lightning_sg.predictors.feedback import FeedbackAlignment
from lightning_sg.predictors.head_options import HeadOptions
from lightning_sg.predictors.local_loss import LocalLoss
from lightning_sg.predictors.loss_model import LossModelPredictor
from lightning_sg.predictors.matching import Matching
from lightning_sg.predictors.own_loss import OwnLoss
from lightning_sg.predictors.tasks import Tasks

__all__ = [
    "AutoPredictor",
    "FeedbackAlignment",
    "GradientPredictor",
    "HeadOptions",
    "LinearPredictor",
    "LocalLoss",
    "LossInfo",
    "LossModelPredictor",
    "MLPPredictor",
    "Matching",
    "OwnLoss",
    "TargetUse",
    "Tasks",
]
