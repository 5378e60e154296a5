"""Gradients where there are none: stages that cannot be differentiated, whose scores come back instead."""

from lightning_sg.blackbox.boundary import Bernoulli, BlackBox, Categorical, ScoredBoundary
from lightning_sg.blackbox.critic import Critic
from lightning_sg.blackbox.estimator import Estimator
from lightning_sg.blackbox.evolution import Evolution
from lightning_sg.blackbox.noise import Noise
from lightning_sg.blackbox.pathwise import GumbelSoftmax, StraightThrough
from lightning_sg.blackbox.score_function import ScoreFunction
from lightning_sg.blackbox.variate import ControlVariate

__all__ = [
    "Bernoulli",
    "BlackBox",
    "Categorical",
    "ControlVariate",
    "Critic",
    "Estimator",
    "Evolution",
    "GumbelSoftmax",
    "Noise",
    "ScoreFunction",
    "ScoredBoundary",
    "StraightThrough",
]
