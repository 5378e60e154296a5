"""How many floating-point operations something takes, the backward passes in it included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.flop_counter import flop_registry

from lightning_sg._compat import TorchDispatchMode
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.predictors.base import GradientPredictor, LossInfo
from lightning_sg.training.learner import Learner


class OperationCounter(TorchDispatchMode):
    """Counts while entered, as torch's ``FlopCounterMode`` does.

    That one follows modules with hooks on gradients, which ``torch.autograd.grad`` refuses inside of predictors.

    Attributes:
        flops: What was counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=result))
        return result


class PredictorCost(NamedTuple):
    """What a predictor would cost at a boundary, in floating-point operations for a batch.

    Attributes:
        words: What predicts there.
        predicting: Of a prediction.
        learning_from_target: Of a step of learning from a target.
        learning_without: Of a step of learning where the target is not to be learned from: without it, if it can.
    """

    words: str
    predicting: float
    learning_from_target: float
    learning_without: float

    def of_batch(self, train_every: int, targets: float) -> float:
        """Of a batch on average, if it learns from every ``train_every``-th, and has a target for a share of those."""
        learning = targets * self.learning_from_target + (1 - targets) * self.learning_without
        return self.predicting + learning / train_every


def cost_of_predictor(
    template: GradientPredictor, name: str, shapes: Sequence[tuple[int, ...]], context: Any, loss: LossInfo | None
) -> PredictorCost:
    """Builds a predictor, lets it predict and learn once on noise, and throws it away. No random numbers are used up.

    Args:
        template: The unbuilt predictor.
        name: The boundary's name, for messages.
        shapes: Of what crosses the boundary and can carry a gradient.
        context: What the predictor is told of the batch.
        loss: What is known about the model's own loss.

    Raises:
        SyntheticGradientsError: If it cannot be built for this boundary.
    """
    if template.exact or not shapes:
        return PredictorCost(type(template).__name__, 0.0, 0.0, 0.0)
    context = move_data_to_device(context, "cpu")
    learner = Learner(template, None)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        activations = tuple(torch.randn(shape, dtype=torch.float32) for shape in shapes)
        try:
            learner.build(activations, context, loss)
        except ValueError as error:
            raise SyntheticGradientsError(f"{type(template).__name__} at boundary '{name}': {error}") from error
        predictor = learner.predictor
        with OperationCounter() as predicting:
            learner.predict(activations, context)

        def learning(targets: tuple[torch.Tensor, ...]) -> float:
            with OperationCounter() as counter:
                learner.learn(activations, context, targets)
            return float(counter.flops)

        with_target = without = learning(activations if predictor.needs_target else ()) if learner.learns else 0.0
        if learner.learns and predictor.learns_without_target:
            without = learning(())
    words = str(getattr(predictor, "choice", type(predictor).__name__))
    return PredictorCost(words, float(predicting.flops), with_target, without)


__all__ = ["OperationCounter", "PredictorCost", "cost_of_predictor"]
