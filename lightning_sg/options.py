"""The options of SyntheticGradients, in groups."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_sg.arguments import MOST_BATCHES, check_fields, flag, function, number, optional, whole
from lightning_sg.lightning_api import LRSchedulerCallable, OptimizerCallable


@dataclass(frozen=True)
class ExactGradients:
    """When exact gradients travel up to all boundaries, and what is done with them.

    Every ``every``-th batch also has a backward pass that no boundary stops. Its gradients reach each boundary late,
    and no stage waits for them. This costs one more backward pass, and the stages before the last process keep that
    batch's activations and weights until its gradient arrives: ``delay + 1`` batches for each boundary on its way.

    Args:
        every: On every how many-th batch the exact gradient travels up; 0 for never. It does so only if a predictor
            learns from targets or ``correction`` is above 0. :class:`~lightning_sg.DelayedGradient` needs it on every
            batch, whatever this says. After the first 64 batches, predictors with a loss of their own look at targets
            on as many batches only, to be bounded and judged by them, and at the last boundary, where all are exact,
            to match them. There, 0 means on all batches.
        bootstrap: Whether predictors also learn on the batches between, from targets that are themselves predictions
            in part. The targets of the last boundary are always exact.
        correction: How much of the error of its synthetic gradient, g - ĝ, a stage applies when the exact gradient
            arrives, 0 to 100. At 1, what the stage applies of that batch in total is the exact gradient, a part of it
            late. Costs the rest of a backward pass.
        warm_up: The number of batches at the start on which every stage waits for the true gradient and uses it, while
            the predictors learn.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or there is a correction without exact gradients.
    """

    every: int = 8
    bootstrap: bool = False
    correction: float = 0.0
    warm_up: int = 0

    def __post_init__(self) -> None:
        check_fields(
            "ExactGradients",
            self,
            every=whole(0, MOST_BATCHES),
            bootstrap=flag(),
            correction=number(least=0, most=100),
            warm_up=whole(0, MOST_BATCHES),
        )
        if self.correction and not self.every:
            raise ValueError("ExactGradients(correction=...) needs exact gradients: every must be 1 or more.")


@dataclass(frozen=True)
class LateGradients:
    """True gradients of earlier batches, mixed with the synthetic gradient of the newest one; no stage waits for them.

    At each step a stage before the last boundary applies (1 - ``share``) × the synthetic gradient of the newest batch,
    plus ``share`` × the true gradient of an earlier batch, each through its own graph. That batch is
    ``m * (1 + delay)`` older at the m-th boundary from the end. Where no true gradient has come, as in the first steps,
    the synthetic one has its full weight. A synthetic gradient is biased and up to date, a late one is exact and old:
    together they are better than either. This costs one more backward pass, and memory for the batches under way.

    Late gradients are worth most with an optimizer that looks ahead: ``torch.optim.NAdam(parameters, lr, betas=(0.95,
    0.999), decoupled_weight_decay=True)``. With others, such as AdamW, they do harm while the learning rate is high, so
    that they need a small share then. Source: Ajanthan et al. 2025, *Nesterov Method for Asynchronous Pipeline Parallel
    Optimization* (arXiv 2505.01099).

    Args:
        share: The weight of a true gradient that is two batches old, while the model's learning rate is highest; above
            0 and at most 1. At 1 nothing is predicted, and a stage is updated with late gradients alone, as with
            :class:`~lightning_sg.DelayedGradient`. By default 0.2 if all of the model's optimizers look ahead (NAdam,
            or SGD with Nesterov's momentum), else 0.05.
        every: The true gradient of every how many-th batch is sent; at the steps between, the synthetic one has its
            full weight.
        recompute: Run the earlier batch again, with the newest weights, in place of keeping its graph: less memory, one
            more forward pass, and a late gradient whose weights at least are not old. What the step does to Python
            objects, it then does twice. For steps that run the network once, with automatic optimization.
        adapts: Whether the weight depends on the model's learning rate and on how old the gradient is: it is
            1 / (1 + (1 / share - 1) × (r × age / 2)²), where r is the rate over the highest so far. What makes an old
            gradient wrong is how far the weights have moved since then, while the error of a synthetic one does not
            depend on that. With ``False`` it is always ``share``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range.
    """

    share: float | None = None
    every: int = 1
    recompute: bool = False
    adapts: bool = True

    def __post_init__(self) -> None:
        check_fields(
            "LateGradients",
            self,
            share=optional(number(above=0, most=1)),
            every=whole(1, MOST_BATCHES),
            recompute=flag(),
            adapts=flag(),
        )


@dataclass(frozen=True)
class PredictorTraining:
    """How the gradient predictors are trained.

    Args:
        optimizer: Makes a predictor's optimizer from its parameters. By default the predictor chooses, see
            :meth:`GradientPredictor.default_optimizer`.
        lr_scheduler: Makes a learning-rate schedule from a predictor's optimizer; it is stepped with the optimizer.
        every: Train on every how many-th batch.
        updates: Optimizer steps for each batch that a predictor learns from, at most 1,000.
        ema: Decay of an exponential moving average of a predictor's parameters, which then predicts; 0 for none.
        bound: The largest ratio of a prediction's size to that of recent targets; 1e9 bounds nothing.
        seed: Seeds the predictors' initial weights, 0 to 2**64 - 1; by default torch's current seed.
        update_probability: With this probability a stage is updated at a step, and its predictor learns from that
            batch. Below 1 only to study stages that are updated at random times.

    Raises:
        TypeError: If an argument is of another type.
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
        check_fields(
            "PredictorTraining",
            self,
            optimizer=optional(function("a function of the parameters that makes an optimizer, such as a class")),
            lr_scheduler=optional(function("a function of the optimizer that makes a schedule, such as a class")),
            every=whole(1, MOST_BATCHES),
            updates=whole(1, 1_000),
            ema=number(least=0, below=1),
            bound=number(above=0, most=1e12),
            seed=optional(whole(0, 2**64 - 1)),
            update_probability=number(above=0, most=1),
        )


__all__ = ["ExactGradients", "LateGradients", "PredictorTraining"]
