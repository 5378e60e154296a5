"""What the callback logs and says about predictors."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_sg.lightning_api import LOGGER, pl
from lightning_sg.past_log import to_loggers
from lightning_sg.predictors import AutoPredictor
from lightning_sg.runtime import Metrics
from lightning_sg.session import Session
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.trainer import PredictorTrainer

# A predictor with more than this share of its stage's parameters or operations is warned of.
_LARGE = 0.25

# Metrics are computed at least once in so many batches.
_MEASURED = 10

# What only `metrics="all"` logs: it explains the rest, and doubles the number of columns.
_DETAILS = ("loss", "bias", "variance", "bootstrapped_cosine")

# Lightning's own, which its users see; each boundary speaks in the one process that has its predictor.
_log = logging.getLogger(LOGGER)


class MetricsLog:
    """Collects the metrics of all boundaries until they are logged, and says once what was chosen where."""

    def __init__(self) -> None:
        self._waiting: Metrics = {}
        self._announced: set[str] = set()
        self._logged: dict[str, float] = {}

    def of_process(self, session: Session) -> Metrics:
        """The metrics of the targets that this process learned from in this batch, by boundary."""
        metrics = {name: _metrics_of(trainer, session) for name, trainer in session.all_trainers.items()}
        for name, trainer in session.inputs.trainers.items():
            metrics.setdefault(name, {}).update(trainer.take_metrics())
        for name, scored in session.boxes.trainers.items():
            metrics.setdefault(name, {}).update(scored.take_metrics())
        for stage, count in (session.finite.skipped or {}).items():
            order = session.watched.order
            if stage < len(order):
                metrics.setdefault(order[stage], {})["skipped"] = torch.tensor(float(count))
        return metrics

    def add(self, metrics: Metrics) -> None:
        """Keeps metrics until they are logged; newer ones take the place of older ones."""
        for name, values in metrics.items():
            self._waiting.setdefault(name, {}).update(values)

    def write(self, session: Session) -> dict[str, Tensor]:
        """Logs what was kept; returns the cosines among it."""
        module, watched, skipped = session.module, session.watched, session.finite.skipped
        if skipped is not None and watched.has_loss:
            count = float(skipped.get(watched.last, 0))
            module.log("sg/skipped", count, on_step=True, on_epoch=False, batch_size=1)
        for name, values in self._waiting.items():
            for key, value in values.items():
                if key == "cost":
                    self._log_change(module, f"sg/{name}/{key}", value)
                elif key not in _DETAILS or session.settings.metrics == "all":
                    module.log(f"sg/{name}/{key}", value, on_step=True, on_epoch=False, batch_size=1)
        cosines = {name: values["cosine"] for name, values in self._waiting.items() if "cosine" in values}
        if cosines:
            mean = torch.stack([value.float().cpu() for value in cosines.values()]).mean()
            module.log("sg/cosine", mean, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        self._waiting = {}
        return cosines

    def _log_change(self, module: pl.LightningModule, name: str, value: Tensor) -> None:
        """Logs what hardly changes when it does: Lightning would repeat it in every row of an epoch."""
        module.log(name, value, logger=False, on_step=True, on_epoch=False, batch_size=1)
        if self._logged.get(name) != float(value):
            self._logged[name] = float(value)
            to_loggers(module.trainer, {name: float(value)})

    def announce(self, session: Session) -> None:
        """Says, once, what was chosen for each boundary and what it costs."""
        trainers = [(name, each) for name, each in session.all_trainers.items() if isinstance(each, PredictorTrainer)]
        if len(self._announced) == len(trainers):
            return
        for name, trainer in trainers:
            if name in self._announced or trainer.operations is None:
                continue
            predictor = trainer.predictor
            self._announced.add(name)
            _warn_of_size(name, trainer)
            if not isinstance(predictor, AutoPredictor):
                continue
            own = sum(parameter.numel() for parameter in predictor.parameters())
            size = sum(parameter.numel() for parameter in session.module.parameters())
            share = f"{own / size:.1%} of the model's parameters" if size else ""
            cost = _cost_of(trainer, session)
            if share and cost is not None:
                share += f" and {cost:.1%} of its operations"
            _log.info(f"Boundary '{name}': {predictor.describe(matches=trainer.matches)}; {share}.")


def is_measured(trainer: Any, session: Session, batch_idx: int) -> bool:
    """Whether the metrics of a batch are computed: of every tenth, and shortly before they are logged.

    In a split run, the metrics of one stage reach the loggers with the batches that follow, through the stages between.

    Args:
        trainer: The trainer.
        session: The run.
        batch_idx: The number of the batch in its epoch.
    """
    on_the_way = 2 * len(session.trainers) if session.ownership.split else 0
    steps = -trainer.global_step % max(1, trainer.log_every_n_steps)
    left = [steps, trainer.num_training_batches - 1 - batch_idx, trainer.max_steps - trainer.global_step]
    return session.batches % _MEASURED == 0 or any(0 <= number <= on_the_way for number in left)


def _warn_of_size(name: str, trainer: PredictorTrainer) -> None:
    """Warns of a predictor that is large for its stage: decoupling has to gain more than it costs."""
    stage, operations = trainer.stage, trainer.operations
    if stage is None or operations is None:
        return
    own = sum(parameter.numel() for parameter in trainer.predictor.parameters())
    parameters = own / stage.parameters if stage.parameters else 0.0
    share = operations / stage.operations if stage.operations else 0.0
    if max(parameters, share) > _LARGE:
        warnings.warn(
            f"The predictor at boundary '{name}' has {parameters:.0%} of the parameters of the stage before it, and "
            f"{share:.0%} of its operations. Make the predictor smaller (AutoPredictor(options={{'hidden': ...}})), or "
            "the stages larger (fewer boundaries).",
            stacklevel=2,
        )


def _metrics_of(trainer: BoundaryTrainer, session: Session) -> dict[str, Tensor]:
    metrics = trainer.take_metrics()
    cost = _cost_of(trainer, session) if metrics else None
    if cost is not None:
        metrics["cost"] = torch.tensor(cost)
    return metrics


def _cost_of(trainer: BoundaryTrainer, session: Session) -> float | None:
    """The predictor's operations as a share of the model's, once both were counted."""
    own = trainer.operations if isinstance(trainer, PredictorTrainer) else None
    model = 0 if session.trace is None else sum(session.trace.flops)
    # A training step is about three forward passes.
    return own / (3 * model) if own is not None and model else None


__all__ = ["MetricsLog", "is_measured"]
