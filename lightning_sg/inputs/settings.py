"""The user's options for synthetic inputs."""

from __future__ import annotations

from lightning_sg.arguments import MOST_BATCHES, checked, context_source, function, instance, optional, whole
from lightning_sg.batch.context import ContextSource
from lightning_sg.inputs.base import InputPredictor
from lightning_sg.inputs.mlp import MLPInputPredictor
from lightning_sg.lightning_api import OptimizerCallable


class SyntheticInputs:
    """Predicts the activation at each boundary from the batch, and gives the next stage the prediction.

    Pass it to :class:`~lightning_sg.SyntheticGradients` as ``inputs``. A stage then waits neither for the stages after
    it (backward locking) nor for those before it (forward locking). The input predictor learns from the true
    activation ``1 + delay`` batches later. Validation, test and prediction use the network as it is. Source: Jaderberg
    et al. 2017, arXiv 1608.05343 (*complete unlock*).

    Args:
        predictor: The input predictor at each boundary (each gets its own copy); by default
            :class:`~lightning_sg.MLPInputPredictor`.
        optimizer: Makes an input predictor's optimizer from its parameters; by default the predictor chooses.
        source: What input predictors see of a batch: a key, an index, or a function of the batch; ``"auto"`` is the
            first tensor whose key is not a usual name for labels. Predictors see labels only if this names them.
        warm_up: For how many batches the next stage waits for the true activation while the input predictors learn.
            It always waits until they have learned from one batch.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``warm_up`` is out of range or ``source`` is ``None``.
    """

    def __init__(
        self,
        predictor: InputPredictor | None = None,
        optimizer: OptimizerCallable | None = None,
        source: ContextSource = "auto",
        warm_up: int = 0,
    ) -> None:
        name = type(self).__name__
        if source is None:
            raise ValueError("SyntheticInputs(source=None) leaves nothing to predict from. Name an entry of the batch.")
        predictor = checked(name, "predictor", predictor, optional(instance(InputPredictor)))
        self.predictor = MLPInputPredictor() if predictor is None else predictor
        makes = function("a function of the parameters that makes an optimizer, such as a class")
        self.optimizer = checked(name, "optimizer", optimizer, optional(makes))
        self.source = checked(name, "source", source, context_source())
        self.warm_up = checked(name, "warm_up", warm_up, whole(0, MOST_BATCHES))


__all__ = ["SyntheticInputs"]
