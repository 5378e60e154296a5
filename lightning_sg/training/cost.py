"""Counts the work of predictors, backward passes included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from lightning_sg._compat import TorchDispatchMode
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import move_data_to_device
from lightning_sg.partition.work import Work, bytes_moved
from lightning_sg.predictors.auto import AutoPredictor
from lightning_sg.predictors.base import GradientPredictor, LossInfo
from lightning_sg.predictors.layout import Layout
from lightning_sg.rules import BoundaryRule
from lightning_sg.training.learner import Learner


class OperationCounter(TorchDispatchMode):
    """Counts the work of operations while entered, floating-point operations as torch's ``FlopCounterMode`` does.

    ``FlopCounterMode`` follows modules with hooks on gradients, which ``torch.autograd.grad`` refuses in predictors.

    Attributes:
        work: What was counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=result))
        self.work += Work(flops, bytes_moved(func, args, kwargs, result))
        return result


class OperationCount:
    """The operations of a predictor in training, counted on its first prediction and its first step of learning.

    Args:
        every: On every how many-th batch it learns.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._counted: dict[str, int] = {}
        self._steps = 0  # of learning from targets

    def flops(self, matched: float | None) -> int | None:
        """Floating-point operations for a batch on average; ``None`` until that is known.

        Args:
            matched: The share of the batches it learns from whose target it learns from; on the others it learns in
                the pass in which it predicts. ``None`` if that is not known: then it is taken to be all or none.
        """
        passing, prediction = self._counted.get("passing"), self._counted.get("prediction")
        learning = self._counted.get("learning")
        of_target = None if prediction is None or learning is None else prediction + learning
        if matched is None:
            matched = 1.0 if passing is None else 0.0
        if passing is None and self._steps > 1:  # it has learned twice, and from targets both times
            matched = 1.0
        learned = 0.0
        for share, operations in ((matched, of_target), (1 - matched, passing)):
            if share and operations is None:
                return None
            learned += share * (operations or 0)
        others = passing if prediction is None else prediction
        return int(learned + (others or 0) * (self._every - 1)) // self._every

    @contextmanager
    def counting(self, what: Literal["prediction", "learning", "passing"]) -> Iterator[None]:
        """Counts what is done meanwhile, the first time."""
        self._steps += what == "learning"
        if what in self._counted:
            yield
            return
        with OperationCounter() as counter:
            yield
        self._counted[what] = int(counter.work.flops)


class PredictorCost(NamedTuple):
    """What a predictor would cost at a boundary.

    Attributes:
        words: What predicts there, if targets come that it could match.
        alone: What predicts there if none do.
        predicting: The work of one prediction.
        learning_from_target: The work of one step of learning from a target.
        learning_without: The work of one step on a batch whose target is not learned from.
    """

    words: str
    alone: str
    predicting: Work = Work()
    learning_from_target: Work = Work()
    learning_without: Work = Work()

    def of_batch(self, every: int, targets: float) -> Work:
        """The average work of a batch.

        Args:
            every: The predictor learns from every how many-th batch.
            targets: The share of those batches that has a target to learn from.
        """
        learning = self.learning_from_target * targets + self.learning_without * (1 - targets)
        return self.predicting + learning * (1 / every)


def cost_of_predictor(
    template: GradientPredictor | BoundaryRule,
    name: str,
    shapes: Sequence[tuple[int, ...]],
    context: Any,
    loss: LossInfo | None,
    layout: Layout,
) -> PredictorCost:
    """Builds a predictor, has it predict and learn once on noise, and drops it. Uses up no random numbers.

    Args:
        template: The unbuilt predictor, or a rule, which costs nothing.
        name: The boundary's name, for messages.
        shapes: The shapes of what crosses the boundary and can carry a gradient.
        context: What the predictor is told of the batch.
        loss: The model's own loss, if it is known.
        layout: The order of the dimensions.

    Raises:
        SyntheticGradientsError: If it cannot be built for this boundary.
    """
    if isinstance(template, BoundaryRule) or not shapes:
        return PredictorCost(type(template).__name__, type(template).__name__)
    context = move_data_to_device(context, "cpu")
    learner = Learner(template, None)
    learner.layout = layout
    plain = torch.autocast("cpu", enabled=False)  # as in training
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), plain:
        activations = tuple(torch.randn(shape, dtype=torch.float32) for shape in shapes)
        try:
            learner.build(activations, context, loss)
        except ValueError as error:
            raise SyntheticGradientsError(f"{type(template).__name__} at boundary '{name}': {error}") from error
        predictor = learner.predictor
        with OperationCounter() as predicting:
            learner.predict(activations, context)

        def learning(targets: tuple[torch.Tensor, ...]) -> Work:
            with OperationCounter() as counter:
                learner.learn(activations, context, targets)
            work: Work = counter.work
            return work

        use = predictor.target_use
        with_target = without = learning(activations if use.asks else ()) if learner.learns else Work()
        if learner.learns_in_passing:  # one pass, in place of the prediction
            with OperationCounter() as passing:
                learner.predict_in_passing(activations, context)
            without = passing.work - predicting.work
            with_target = with_target if use.learns_from_targets else without
        elif learner.learns and use.learns_without_targets:
            without = learning(())
    words = alone = type(predictor).__name__
    if isinstance(predictor, AutoPredictor):
        words, alone = predictor.describe(), predictor.describe(matches=False)
    return PredictorCost(words, alone, predicting.work, with_target, without)


__all__ = ["OperationCount", "OperationCounter", "PredictorCost", "cost_of_predictor"]
