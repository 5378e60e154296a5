"""The options of SyntheticGradients, in groups."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable


@dataclass(frozen=True)
class ExactGradients:
    """When exact gradients travel up to all boundaries, and what is done with them.

    Every ``every``-th batch also has a backward pass that no boundary stops. Its gradients reach each boundary late,
    and no stage waits for them. This costs one more backward pass, and the stages before the last process keep that
    batch's activations and weights until its gradient arrives: ``delay + 1`` batches for each boundary on its way.

    Args:
        every: On every how many-th batch the exact gradient travels up; 0 for never. It does so only if a predictor
            learns from targets or ``correction`` is above 0. :class:`~lightning_sg.DelayedGradient` needs it on every
            batch, whatever this says.
        bootstrap: Whether predictors also learn on the batches between, from targets that are themselves predictions
            in part. The targets of the last boundary are always exact.
        correction: How much of the error of its synthetic gradient, g - ĝ, a stage applies when the exact gradient
            arrives. At 1, what the stage applies of that batch in total is the exact gradient, a part of it late. Costs
            the rest of a backward pass.
        warm_up: The number of batches at the start on which every stage waits for the true gradient and uses it, while
            the predictors learn.

    Raises:
        ValueError: If a number is negative, or there is a correction without exact gradients.
    """

    every: int = 4
    bootstrap: bool = False
    correction: float = 0.0
    warm_up: int = 0

    def __post_init__(self) -> None:
        if self.every < 0 or self.warm_up < 0 or self.correction < 0:
            raise ValueError(
                "ExactGradients needs every, warm_up and correction >= 0, not "
                f"{self.every}, {self.warm_up} and {self.correction}."
            )
        if self.correction and not self.every:
            raise ValueError("ExactGradients(correction=...) needs exact gradients: every must be 1 or more.")


@dataclass(frozen=True)
class PredictorTraining:
    """How the gradient predictors are trained.

    Args:
        optimizer: Makes a predictor's optimizer from its parameters. By default the predictor chooses, see
            :meth:`GradientPredictor.default_optimizer`.
        lr_scheduler: Makes a learning-rate schedule from a predictor's optimizer; it is stepped with the optimizer.
        every: Train on every how many-th batch.
        updates: Optimizer steps for each batch that a predictor learns from.
        ema: Decay of an exponential moving average of a predictor's parameters, which then predicts; 0 for none.
        bound: The largest ratio of a prediction's size to that of recent targets.
        seed: Seeds the predictors' initial weights; by default torch's current seed.
        update_probability: With this probability a stage is updated at a step, and its predictor learns from that
            batch. Below 1 only to study stages that are updated at random times.

    Raises:
        ValueError: If a number is out of range.
    """

    optimizer: OptimizerCallable | None = None
    lr_scheduler: LRSchedulerCallable | None = None
    every: int = 1
    updates: int = 1
    ema: float = 0.0
    bound: float = 1.0
    seed: int | None = None
    update_probability: float = 1.0

    def __post_init__(self) -> None:
        if self.every < 1 or self.updates < 1 or self.bound <= 0:
            raise ValueError(
                "PredictorTraining needs every and updates >= 1 and bound > 0, not "
                f"{self.every}, {self.updates} and {self.bound}."
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"PredictorTraining needs ema from 0 to below 1, not {self.ema}.")
        if not 0 < self.update_probability <= 1:
            raise ValueError(
                f"PredictorTraining needs update_probability above 0 and at most 1, not {self.update_probability}."
            )


__all__ = ["ExactGradients", "PredictorTraining"]
