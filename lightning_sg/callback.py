"""The callback that attaches gradient predictors to the boundaries of a LightningModule and trains them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sg.boundary import Boundaries
from lightning_sg.context import ContextSource, context_of
from lightning_sg.crossing import LocalCrossing
from lightning_sg.errors import PartitionError, SyntheticGradientsError
from lightning_sg.exchange import Exchange
from lightning_sg.partition.checks import check_cuts, check_trainable
from lightning_sg.partition.trace import Trace, copy_of, trace_step
from lightning_sg.predictors import GradientPredictor, LossModelPredictor
from lightning_sg.step import Step
from lightning_sg.training import PredictorTrainer


class SyntheticGradients(Callback):
    """Trains the stages of a network decoupled, with synthetic gradients at its boundaries.

    Every stage is updated with a predicted gradient instead of waiting for the backward pass of the stages after
    it; the predictors are trained towards the gradients that those stages then return. Source: Jaderberg et al.
    2017, *Decoupled Neural Interfaces using Synthetic Gradients* (arXiv 1608.05343).

    The callback alone works under any single-device strategy. With ``strategy="synthetic_gradients"`` the stages
    run on several processes and compute the same. Validation, test and prediction use the network as it is.

    Logged for each boundary, about the last batch that its predictor learned from: ``sg/<boundary>/loss`` (of the
    predictor), ``sg/<boundary>/cosine`` and ``sg/<boundary>/norm_ratio`` (of prediction to target).

    Args:
        boundaries: Names of submodules, as in ``model.named_modules()``, to cut after. By default every
            :class:`~lightning_sg.Boundary` in the model.
        predictor: The predictor at each boundary (each gets its own copy), or one by boundary name.
        optimizer: Makes a predictor's optimizer from its parameters; by default Adam with a learning rate of 1e-3.
        delay: How many steps later than at once a predictor learns from a target. With the stages on several
            processes, a stage may be so many batches ahead of the next; 0 leaves it least time to wait for, larger
            values ride out longer hiccups.
        train_every: Train the predictors on every how many-th batch.
        context: What predictors are told of a batch besides activations: ``"auto"`` (the labels of an ``(x, y)``
            pair, or of a dict under the usual names), a key, an index, a function of the batch, or ``None``.
        bound: The largest ratio of a prediction's size to that of recent targets.
        seed: Seeds the predictors' initial weights; by default torch's current seed.

    Raises:
        BoundaryError: At the start of training, if a boundary is unknown, not reached, or gone around.
    """

    def __init__(
        self,
        boundaries: Sequence[str] | None = None,
        predictor: GradientPredictor | Mapping[str, GradientPredictor] = LossModelPredictor(),  # noqa: B008 (a template, copied before use)
        optimizer: OptimizerCallable | None = None,
        delay: int = 1,
        train_every: int = 1,
        context: ContextSource = "auto",
        bound: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if delay < 0 or train_every < 1 or bound <= 0:
            raise ValueError(
                "SyntheticGradients needs delay >= 0, train_every >= 1 and bound > 0, "
                f"not {delay}, {train_every} and {bound}."
            )
        if isinstance(boundaries, str):
            raise ValueError(f"boundaries takes a list of names: boundaries=['{boundaries}'].")
        self.names = None if boundaries is None else list(boundaries)
        self.predictor = predictor
        self.optimizer = optimizer
        self.delay = delay
        self.train_every = train_every
        self.context = context
        self.bound = bound
        self.seed = seed
        self.step = Step()
        self.exchange = Exchange()
        self.boundaries: Boundaries | None = None
        self.trainers: dict[str, PredictorTrainer] = {}
        self.trace: Trace | None = None
        self._module: pl.LightningModule | None = None
        self._restored: dict[str, Any] = {}

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Cuts the module at its boundaries."""
        # The strategy says where the stages are; any other strategy has them in one process.
        self.exchange = getattr(trainer.strategy, "exchange", None) or Exchange()
        self.boundaries = Boundaries(pl_module, self.names)
        if not self.exchange.split and trainer.world_size > 1:
            raise SyntheticGradientsError(
                f"SyntheticGradients does not support {trainer.world_size} replicas under "
                f"{type(trainer.strategy).__name__} yet. Use one device, or strategy='synthetic_gradients' "
                "to put the stages on several."
            )
        self.trace = None
        names = [site.name for site in self.boundaries.sites]
        if self._module is not pl_module or list(self.trainers) != names:
            self._module = pl_module
            self.trainers = self._new_trainers(trainer, names)

    def _new_trainers(self, trainer: pl.Trainer, names: list[str]) -> dict[str, PredictorTrainer]:
        seed = trainer.strategy.broadcast(torch.initial_seed()) if self.seed is None else self.seed
        if isinstance(self.predictor, Mapping):
            templates = dict(self.predictor)
            if set(templates) != set(names):
                raise SyntheticGradientsError(
                    f"SyntheticGradients(predictor=...) names the boundaries {sorted(templates)}, but the model has "
                    f"{sorted(names)}. Give one predictor for each, or one for all."
                )
        else:
            templates = dict.fromkeys(names, self.predictor)
        trainers = {
            name: PredictorTrainer(
                name,
                templates[name],
                self.optimizer or _adam,
                delay=self.delay,
                train_every=self.train_every,
                bound=self.bound,
                seed=seed & (2**63 - 1),
            )
            for name in names
        }
        for name, state in self._restored.items():
            self._load(trainers, name, state)
        self._restored = {}
        return trainers

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was: without hooks, an ordinary LightningModule."""
        self.step.end()
        if self.boundaries is not None:
            self.boundaries.remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was: Lightning calls no ``teardown`` after an error."""
        self.teardown(trainer, pl_module, "")

    def accept(self, trace: Trace) -> None:
        """Takes what a traced step showed about the model."""
        self.trace = trace
        self.step.loss = trace.loss

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tells the boundaries about the batch; checks the cut on the first one."""
        assert self.boundaries is not None
        if self.trace is None and len(self.boundaries) and not self.exchange.split:
            self._check(trainer, pl_module, batch, batch_idx)
        self.step.begin(trainer, context_of(batch, self.context))
        if not self.exchange.split:
            for site in self.boundaries.sites:
                site.open(LocalCrossing(self.trainers[site.name], self.step), without_gradient=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the figures of the targets that were learned from in this step."""
        assert self.boundaries is not None
        self.step.end()
        self.boundaries.close()
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            for trained in self.trainers.values():
                trained.check_finite()
        figures = {name: trained.take_figures() for name, trained in self.trainers.items()}
        for name, values in self.exchange.route(figures).items():
            for key, value in values.items():
                pl_module.log(f"sg/{name}/{key}", value, on_step=True, on_epoch=False, batch_size=1)

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Follows one step without data: is every boundary reached, and does nothing go around it?"""
        assert self.boundaries is not None
        takes_index = len(inspect.signature(module.training_step).parameters) > 1

        copied = copy_of(batch)

        def run() -> Any:
            with trainer.precision_plugin.train_step_context():
                return module.training_step(*((copied, batch_idx) if takes_index else (copied,)))

        try:
            trace = trace_step(module, self.boundaries.sites, run, trainer.strategy.root_device, without_gradient=False)
        except PartitionError as error:
            rank_zero_warn(f"The boundaries could not be checked before training, which goes on. {error}")
            self.trace = Trace()
            return
        if trace.cut_short is not None:
            rank_zero_warn(
                f"The check of the boundaries ended in the last stage, at {trace.cut_short}. If an activation of an "
                "earlier stage is used after that, its gradient goes around the boundary."
            )
        check_cuts(trace, split=False)
        check_trainable(module, trace)
        self.accept(trace)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The predictors with their optimizers and the targets under way, by boundary."""
        states = {name: trained.state_dict() for name, trained in self.trainers.items() if self.exchange.owns(name)}
        return {"boundaries": self.exchange.gather(states)} if self.trainers else {"boundaries": self._restored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; a boundary that the saved run did not have starts afresh."""
        if not self.trainers:
            self._restored = state_dict["boundaries"]
            return
        for name, state in state_dict["boundaries"].items():
            self._load(self.trainers, name, state)

    @staticmethod
    def _load(trainers: dict[str, PredictorTrainer], name: str, state: dict[str, Any]) -> None:
        if name in trainers:
            trainers[name].load_state_dict(state)
        else:
            rank_zero_warn(f"The checkpoint has a predictor for boundary '{name}', which this model does not have.")


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


__all__ = ["SyntheticGradients"]
