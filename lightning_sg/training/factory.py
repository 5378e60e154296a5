"""Makes what supplies the gradient at each boundary, and tells beforehand what it would cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.options import ExactGradients, LateGradients, PredictorTraining
from lightning_sg.partition.told import Told
from lightning_sg.partition.trace import Trace
from lightning_sg.partition.work import StageWork, Work
from lightning_sg.predictors import AutoPredictor, GradientPredictor
from lightning_sg.predictors.layout import Layout
from lightning_sg.rules import BoundaryRule, DelayedGradient
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.cost import PredictorCost, cost_of_predictor
from lightning_sg.training.ruled import RuledBoundary
from lightning_sg.training.trainer import PredictorTrainer, TrainerOptions

#: What a user can put at a boundary.
Template = GradientPredictor | BoundaryRule


class TrainerFactory:
    """Knows what the user wants at each boundary of one module.

    Args:
        predictor: The predictor or rule at each boundary, or one by boundary name.
        training: How predictors are trained.
        exact: When exact gradients travel up.
        in_time: The module's boundaries in time.
        late: When true gradients travel up to be applied late, if they do.
    """

    def __init__(
        self,
        predictor: Template | Mapping[str, Template],
        training: PredictorTraining,
        exact: ExactGradients,
        in_time: Sequence[str] = (),
        late: LateGradients | None = None,
    ) -> None:
        self._predictor = predictor
        self._training = training
        self._exact = exact
        self._in_time = in_time
        self._late = late

    def templates(self, between_stages: Sequence[str]) -> dict[str, Template]:
        """The unbuilt predictor, or the rule, at each boundary: of those between stages, then of those in time.

        Raises:
            SyntheticGradientsError: If predictors are given by name, but for other boundaries.
        """
        names = [*between_stages, *self._in_time]
        if not isinstance(self._predictor, Mapping):
            alone = self._late is not None and self._late.share == 1
            between = DelayedGradient() if alone else self._predictor
            return {**dict.fromkeys(between_stages, between), **dict.fromkeys(self._in_time, self._predictor)}
        if set(self._predictor) != set(names):
            raise SyntheticGradientsError(
                f"SyntheticGradients(predictor=...) names the boundaries {sorted(self._predictor)}, but the model has "
                f"{sorted(names)}. Give one predictor for each, or one for all."
            )
        return {name: self._predictor[name] for name in names}

    def make(
        self, between_stages: Sequence[str], carried: Collection[str], options: TrainerOptions
    ) -> dict[str, BoundaryTrainer]:
        """Makes the trainer of each boundary.

        Args:
            between_stages: The boundaries between stages.
            carried: The boundaries that carry a state through time.
            options: What all trainers are told.

        Raises:
            SyntheticGradientsError: If predictors are given by name, but for other boundaries.
        """
        guard = options.guard
        of_states = replace(options, guard=None if guard is None else guard.of_state(), matching=1)
        return {
            name: _trainer(name, _of_state(template), of_states)
            if name in carried
            else _trainer(name, template, options)
            for name, template in self.templates(between_stages).items()
        }

    def costs(
        self, trace: Trace, told: Told, batch: Any, names: Sequence[str] | None = None, *, leave_out: bool = False
    ) -> dict[str, tuple[str, Work]]:
        """What predictors would cost at the boundaries of a traced step.

        Args:
            trace: The step.
            told: What the predictors are told of a batch.
            batch: The batch.
            names: Of which boundaries; by default of all.
            leave_out: Leave out those that cannot be built for their boundary.

        Returns:
            For each boundary, in words what predicts there, and its work for a batch on average.

        Raises:
            SyntheticGradientsError: If one cannot be built, unless those are left out.
        """
        templates, context, loss = self.templates(trace.order), told.of(batch), told.loss
        known: dict[Any, PredictorCost] = {}
        costs = {}
        for name in trace.order if names is None else names:
            shapes, template = trace.shapes[name], templates[name]
            stage = trace.size_of(trace.order.index(name))
            layout = trace.layouts.get(name, Layout())
            key = (id(template), stage, layout, *shapes)
            if isinstance(template, GradientPredictor):
                template = template.for_stage(stage)
            try:
                if key not in known:
                    known[key] = cost_of_predictor(template, name, shapes, context, loss, layout)
            except SyntheticGradientsError:
                if leave_out:
                    continue
                raise
            matched = 1 / (self._exact.every or 1)
            targets = matched if name == trace.order[-1] else self._exact_share(template, shapes, context)
            cost = known[key]
            costs[name] = (cost.words if targets else cost.alone, cost.of_batch(self._training.every, targets))
        return costs

    def work(self, trace: Trace, told: Told, batch: Any, names: Sequence[str] | None = None) -> dict[str, Work]:
        """The work alone, of those predictors that can be built; see :meth:`costs`."""
        costs = self.costs(trace, told, batch, names, leave_out=True)
        return {name: work for name, (_words, work) in costs.items()}

    def late_work(self, trace: Trace) -> dict[str, Work]:
        """The work that late gradients are for the stage before each boundary, for a batch on average.

        That is a second backward pass, and with ``recompute`` the forward pass again. Boundaries with a rule of their
        own have none.

        Args:
            trace: A traced step.
        """
        late = self._late
        if late is None:
            return {}
        templates = self.templates(trace.order)

        def added(work: StageWork) -> Work:
            backward = work.step - work.forward if late.share != 1 else Work()
            return (backward + work.forward * late.recompute) * (1 / late.every)

        return {
            name: added(trace.work[stage])
            for stage, name in enumerate(trace.order)
            if late.share == 1 or isinstance(templates[name], GradientPredictor)
        }

    def _exact_share(self, template: Template, shapes: list[tuple[int, ...]], context: Any) -> float:
        """On which share of the batches a boundary before the last has a target to learn from."""
        if not isinstance(template, GradientPredictor):
            return 0.0
        every = [self._exact.every] if template.wants_exact(shapes, context) and self._exact.every else []
        if self._late is not None and not template.target_use.learns_without_targets:
            every.append(self._late.every)
        return sum(1 / each for each in every) - (1 / math.lcm(*every) if len(every) > 1 else 0.0)


def _trainer(name: str, template: Template, options: TrainerOptions) -> BoundaryTrainer:
    if isinstance(template, BoundaryRule):
        return RuledBoundary(name, template, options.delay, options.replicas)
    return PredictorTrainer(name, template, options)


def _of_state(template: Template) -> Template:
    return template.of_state() if isinstance(template, AutoPredictor) else template


__all__ = ["Template", "TrainerFactory"]
