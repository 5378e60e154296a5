"""Synthetic gradients for PyTorch Lightning: stages of one network that do not wait for each other."""

from lightning_sg.batch.chunks import Chunk, Chunks, parallel_streams
from lightning_sg.blackbox import (
    Bernoulli,
    BlackBox,
    Categorical,
    ControlVariate,
    Critic,
    Evolution,
    GumbelSoftmax,
    Noise,
    ScoreFunction,
    StraightThrough,
)
from lightning_sg.boundary import Boundary
from lightning_sg.callback import SyntheticGradients
from lightning_sg.checkpoint.plugin import AtomicCheckpointIO
from lightning_sg.decoupling import Decoupled, decouple
from lightning_sg.errors import (
    BatchMismatchError,
    BoundaryError,
    CheckpointError,
    NonFiniteLossError,
    NonFinitePredictionError,
    PartitionError,
    StageLostError,
    SyntheticGradientsError,
)
from lightning_sg.inputs import InputPredictor, MLPInputPredictor, SyntheticInputs
from lightning_sg.lightning_api import StrategyRegistry as _StrategyRegistry
from lightning_sg.mixture import watch as _watch_for_mixtures
from lightning_sg.options import ExactGradients, LateGradients, PredictorTraining
from lightning_sg.predictors import (
    AutoPredictor,
    FeedbackAlignment,
    GradientPredictor,
    HeadOptions,
    LinearPredictor,
    LocalLoss,
    LossModelPredictor,
    Matching,
    MLPPredictor,
    OwnLoss,
    TargetUse,
    Tasks,
)
from lightning_sg.recurrent import ThroughTime
from lightning_sg.rules import DelayedGradient, TrueGradient, ZeroPredictor
from lightning_sg.strategy import SyntheticGradientStrategy
from lightning_sg.time_boundary import MessageBoundary, TimeBoundary
from lightning_sg.tools.advise import advise
from lightning_sg.tools.timeline import Timeline
from lightning_sg.training import AlignmentGuard
from lightning_sg.transport import Away

__version__ = "0.1.0"

__all__ = [
    "AlignmentGuard",
    "AtomicCheckpointIO",
    "AutoPredictor",
    "Away",
    "BatchMismatchError",
    "Bernoulli",
    "BlackBox",
    "Boundary",
    "BoundaryError",
    "Categorical",
    "CheckpointError",
    "Chunk",
    "Chunks",
    "ControlVariate",
    "Critic",
    "Decoupled",
    "DelayedGradient",
    "Evolution",
    "ExactGradients",
    "FeedbackAlignment",
    "GradientPredictor",
    "GumbelSoftmax",
    "HeadOptions",
    "InputPredictor",
    "LateGradients",
    "LinearPredictor",
    "LocalLoss",
    "LossModelPredictor",
    "MLPInputPredictor",
    "MLPPredictor",
    "Matching",
    "MessageBoundary",
    "Noise",
    "NonFiniteLossError",
    "NonFinitePredictionError",
    "OwnLoss",
    "PartitionError",
    "PredictorTraining",
    "ScoreFunction",
    "StageLostError",
    "StraightThrough",
    "SyntheticGradientStrategy",
    "SyntheticGradients",
    "SyntheticGradientsError",
    "SyntheticInputs",
    "TargetUse",
    "Tasks",
    "ThroughTime",
    "TimeBoundary",
    "Timeline",
    "TrueGradient",
    "ZeroPredictor",
    "advise",
    "decouple",
    "parallel_streams",
]

# Lightning has no entry point for strategies, so the names exist from this import on. As with Lightning's own, there is
# one for each way to start processes.
_NAME = SyntheticGradientStrategy.strategy_name
_STARTS = {_NAME: "popen", f"{_NAME}_notebook": "fork", f"{_NAME}_spawn": "spawn", f"{_NAME}_fork": "fork"}
for _name, _method in _STARTS.items():
    if _name not in _StrategyRegistry:
        _StrategyRegistry.register(
            _name,
            SyntheticGradientStrategy,
            description="Stages of one network on several processes, decoupled by synthetic gradients",
            start_method=_method,
        )
_watch_for_mixtures(*_STARTS)
