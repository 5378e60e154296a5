"""What users say about synthetic inputs."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable

from lightning_sg.batch.context import ContextSource
from lightning_sg.inputs.base import InputPredictor
from lightning_sg.inputs.mlp import MLPInputPredictor


class SyntheticInputs:
    """Has the activation at each boundary predicted from the batch, and the next stage go on with the prediction.

    Given to :class:`~lightning_sg.SyntheticGradients` as ``inputs``. A stage then waits neither for the stages after
    it (backward locking) nor for those before it (forward locking). The input predictor learns from the true
    activation ``1 + delay`` batches later. Validation, test and prediction use the network as it is. Source: Jaderberg
    et al. 2017, arXiv 1608.05343 (*complete unlock*).

    Args:
        predictor: The input predictor at each boundary (each gets its own copy); by default
            :class:`~lightning_sg.MLPInputPredictor`.
        optimizer: Makes an input predictor's optimizer from its parameters; by default the predictor's own choice.
        source: What input predictors are told of a batch: ``"auto"``, its first tensor that is no label under a usual
            name; a key, an index, or a function of the batch. Labels are seen only if this names them.
        warm_up: For how many batches the next stage goes on with the true activation, which it waits for, while the
            input predictors learn. It does so in any case until they have learned from a batch.

    Raises:
        ValueError: If ``warm_up`` is negative.
    """

    def __init__(
        self,
        predictor: InputPredictor | None = None,
        optimizer: OptimizerCallable | None = None,
        source: ContextSource = "auto",
        warm_up: int = 0,
    ) -> None:
        if warm_up < 0:
            raise ValueError(f"SyntheticInputs needs warm_up >= 0, not {warm_up}.")
        if source is None:
            raise ValueError("SyntheticInputs(source=None) leaves nothing to predict from. Name an entry of the batch.")
        self.predictor = predictor or MLPInputPredictor()
        self.optimizer = optimizer
        self.source = source
        self.warm_up = warm_up


__all__ = ["SyntheticInputs"]
