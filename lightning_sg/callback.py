"""The callback that attaches gradient predictors to the boundaries of a LightningModule and trains them."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lightning_sg._compat import logs_now
from lightning_sg.batch.context import ContextSource, context_of
from lightning_sg.boundary import Boundaries
from lightning_sg.crossings.corrections import Corrections
from lightning_sg.crossings.exact import ExactPass, Parameters
from lightning_sg.crossings.local import LocalCrossing
from lightning_sg.crossings.step import Step
from lightning_sg.errors import PartitionError, SyntheticGradientsError
from lightning_sg.inputs import InputBoundaries, SyntheticInputs
from lightning_sg.options import ExactGradients, PredictorTraining
from lightning_sg.partition.automatic import choose_boundaries
from lightning_sg.partition.checks import check_cuts, check_trainable
from lightning_sg.partition.trace import Trace, call_training_step, trace_step
from lightning_sg.predictors import AutoPredictor, GradientPredictor, MLPPredictor
from lightning_sg.recurrent.auxiliary import Auxiliary
from lightning_sg.recurrent.boundary import TimeBoundary, boundaries_in_time
from lightning_sg.recurrent.crossings import TimeCrossings
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.runtime import Exchange, Figures
from lightning_sg.training import AlignmentGuard, PredictorTrainer
from lightning_sg.training.cost import PredictorCost, cost_of_predictor
from lightning_sg.training.learner import Learner
from lightning_sg.training.updates import RandomUpdates

# Lightning's own, which its users see; each boundary speaks in the one process that has its predictor.
_log = logging.getLogger("lightning.pytorch")


class SyntheticGradients(Callback):
    """Trains the stages of a network decoupled, with synthetic gradients at its boundaries.

    Every stage is updated with a predicted gradient instead of waiting for the backward pass of the stages after
    it; the predictors are trained towards the gradients that those stages then return. Source: Jaderberg et al.
    2017, *Decoupled Neural Interfaces using Synthetic Gradients* (arXiv 1608.05343).

    The callback alone works under any single-device strategy. With ``strategy="synthetic_gradients"`` the stages
    run on several processes and compute the same. Validation, test and prediction use the network as it is.

    Logged for each boundary, about the last batch that its predictor learned from: ``sg/<boundary>/loss`` (of the
    predictor), ``cosine`` and ``norm_ratio`` (of prediction to target), ``bias`` and ``variance`` (of its error, see
    :func:`~lightning_sg.training.compare`), ``bootstrapped_cosine`` (of the next stage's target with the exact one, on
    batches that have both), ``guarded`` (when the guard changes its mind, and while it has taken over) and ``cost``
    (the predictor's operations as a share of the model's). With ``inputs`` also ``input_error``, the relative squared
    error of the predicted activations.

    Args:
        boundaries: Names of submodules, as in ``model.named_modules()``, to cut after. By default every
            :class:`~lightning_sg.Boundary` in the model. ``"auto"`` cuts it at the first batch into as many stages as
            ``strategy="synthetic_gradients"`` has processes, of about equal cost, and says where; a resumed run keeps
            the cuts of its checkpoint.
        predictor: The predictor at each boundary (each gets its own copy), or one by boundary name. ``"auto"`` chooses
            by what crosses and what there is to predict from, see :class:`~lightning_sg.AutoPredictor`, and says so.
        delay: How many steps later than at once a predictor learns from a target. With the stages on several
            processes, a stage may be so many batches ahead of the next; 0 leaves it least time to wait for, larger
            values ride out longer hiccups.
        context: What predictors are told of a batch besides activations: ``"auto"`` (the labels of an ``(x, y)``
            pair, or of a dict under the usual names), a key, an index, a function of the batch, or ``None``.
        exact: When exact gradients travel up and what is done with them, see :class:`~lightning_sg.ExactGradients`.
        training: How the predictors are trained, see :class:`~lightning_sg.PredictorTraining`.
        guard: Watches the predictions and falls back where they do harm, see :class:`~lightning_sg.AlignmentGuard`.
            ``None`` for no guard: then a prediction that is not finite is an error.
        through_time: How boundaries in time are predicted, see :class:`~lightning_sg.ThroughTime`: every
            :class:`~lightning_sg.TimeBoundary` and :class:`~lightning_sg.MessageBoundary` in the model.
        inputs: Has the activations at the boundaries predicted too, so that no stage waits for those before it;
            ``None``: stages go on with the true ones.

    Raises:
        BoundaryError: At the start of training, if a boundary is unknown, not reached, or gone around.
    """

    def __init__(
        self,
        boundaries: Sequence[str] | Literal["auto"] | None = None,
        predictor: Literal["auto"] | GradientPredictor | Mapping[str, GradientPredictor] = "auto",
        delay: int = 1,
        context: ContextSource = "auto",
        exact: ExactGradients = ExactGradients(),  # noqa: B008 (settings, never changed)
        training: PredictorTraining = PredictorTraining(),  # noqa: B008 (settings, never changed)
        guard: AlignmentGuard | None = AlignmentGuard(),  # noqa: B008 (settings, never changed)
        through_time: ThroughTime = ThroughTime(),  # noqa: B008 (settings, never changed)
        inputs: SyntheticInputs | None = None,
    ) -> None:
        super().__init__()
        if delay < 0:
            raise ValueError(f"SyntheticGradients needs delay >= 0, not {delay}.")
        if exact.correction and training.update_probability < 1:
            raise ValueError(
                "ExactGradients(correction=...) does not go with PredictorTraining(update_probability=...) below 1: a "
                "stage that was not updated with a batch has nothing to correct. Use correction=0."
            )
        if isinstance(boundaries, str) and boundaries != "auto":
            raise ValueError(f"boundaries takes a list of names: boundaries=['{boundaries}'].")
        #: Whether :meth:`choose_boundaries` is to say where to cut.
        self.automatic = boundaries == "auto"
        self.names = None if boundaries is None else [] if isinstance(boundaries, str) else list(boundaries)
        if isinstance(predictor, str) and predictor != "auto":
            raise ValueError(f"predictor must be 'auto', a predictor, or one by boundary name, not '{predictor}'.")
        self.predictor: GradientPredictor | Mapping[str, GradientPredictor] = (
            AutoPredictor() if isinstance(predictor, str) else predictor
        )
        self.optimizer = training.optimizer
        self.delay = delay
        self.train_every = training.every
        self.context = context
        self.bound = training.bound
        self.seed = training.seed
        self.exact_every = exact.every
        self.bootstrap = exact.bootstrap
        self.exact_weight = 1.0
        self.correction = exact.correction
        self.warm_up = exact.warm_up
        self.mix = 0.0
        self.scale = 1.0
        self.guard = guard
        self.lr_scheduler = training.lr_scheduler
        self.updates = training.updates
        self.ema = training.ema
        self.through_time = through_time
        #: How many training batches there have been.
        self.batches = 0
        self.corrections = Corrections()
        self.inputs = InputBoundaries(inputs, delay)
        self.random_updates = RandomUpdates(training.update_probability)
        self.step = Step(self.inputs, self.random_updates)
        self.exchange = Exchange()
        self.boundaries: Boundaries | None = None
        #: Of the boundaries between stages.
        self.trainers: dict[str, PredictorTrainer] = {}
        self.times = TimeCrossings()
        self.trace: Trace | None = None
        self._module: pl.LightningModule | None = None
        self._restored: dict[str, Any] = {}
        self._pass: ExactPass | None = None
        self._first_backward = True
        self._seed = 0
        self._announced: set[str] = set()
        self._unlogged: Figures = {}

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Cuts the module at its boundaries, if it is there yet."""
        # The strategy says where the stages are; any other strategy has them in one process.
        self.exchange = getattr(trainer.strategy, "exchange", None) or Exchange()
        self.boundaries, self.trace = None, None
        if self.automatic and self._module is not pl_module:
            self.names = []
        if not self.exchange.split and trainer.world_size > 1:
            raise SyntheticGradientsError(
                f"SyntheticGradients does not support {trainer.world_size} replicas under "
                f"{type(trainer.strategy).__name__}, which would train other predictors in each. Use "
                f"SyntheticGradientStrategy(replicas={trainer.world_size}), or one device."
            )
        if self.automatic and not self.exchange.split and stage == "fit":
            rank_zero_warn(
                "boundaries='auto' cuts the model into as many stages as strategy='synthetic_gradients' has devices, "
                "here one: it trains undivided. Name the boundaries, or give it more devices."
            )
        if not is_overridden("configure_model", pl_module):  # which comes later, and makes the submodules
            self.cut(trainer, pl_module, self.names)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cuts a module that was made in ``configure_model``."""
        if self.boundaries is None:
            self.cut(trainer, pl_module, self.names)

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: Sequence[str] | None) -> None:
        """Cuts the module: in :meth:`setup`, once it has its submodules, or when it is known where.

        Raises:
            BoundaryError: If a name is unknown or given twice.
        """
        self.boundaries = Boundaries(pl_module, names)
        names = [site.name for site in self.boundaries.sites]
        in_time = list(boundaries_in_time(pl_module))
        if in_time and names and self.through_time.trace_decay:
            raise SyntheticGradientsError(
                f"ThroughTime(trace_decay=...) with boundaries between stages too ({names}): how the state of a chunk "
                "depends on the one before cannot be found through them. Use trace_decay=0."
            )
        if self._module is not pl_module or list(self._all_trainers) != [*names, *in_time]:
            if self._module is not None and not self._restored:
                self.batches, self.corrections = 0, Corrections()
                self.random_updates.forget()
            self._module = pl_module
            trainers = self._new_trainers(trainer, names, in_time)
            self.trainers = {name: trainers[name] for name in names}
            self.times.attach(pl_module, trainers, self._new_auxiliary, self.step, self.through_time)
        self.times.install()
        for trained in self._all_trainers.values():
            trained.profile = trainer.profiler.profile  # type: ignore[attr-defined]
        self.inputs.follow(trainer)

    @property
    def _all_trainers(self) -> dict[str, PredictorTrainer]:
        """The predictors at all boundaries, between stages and in time."""
        return {**self.trainers, **self.times.trainers}

    @property
    def undecided(self) -> bool:
        """Whether it is still to be chosen where to cut."""
        return self.automatic and not self.names

    def choose_boundaries(
        self,
        module: pl.LightningModule,
        stages: int,
        run: Callable[[], STEP_OUTPUT],
        device: torch.device,
        batch: Any,
    ) -> list[str]:
        """Says, for ``boundaries="auto"``, where to cut: where a checkpoint has it, or by the stages' cost.

        Args:
            module: The model, without boundaries installed.
            stages: How many to cut it into.
            run: Calls the step on ``batch``.
            device: The device that the step runs on.
            batch: A batch.

        Raises:
            PartitionError: If there are too few places for a cut, or the step cannot be followed.
        """
        if isinstance(self.predictor, Mapping):
            raise SyntheticGradientsError("boundaries='auto' takes one predictor for all boundaries, not one by name.")
        if len(self._restored) == stages - 1:
            self.names = list(self._restored)
            return self.names
        context = context_of(batch, self.context)

        def operations(trace: Trace, names: Sequence[str]) -> dict[str, float]:
            return self.operations_of_predictors(trace, context, names)

        self.names = choose_boundaries(module, stages, run, device, operations)
        _log.info(f"boundaries='auto' cuts after {self.names}. To keep the cuts, write these names in its place.")
        return self.names

    def costs_of_predictors(
        self, trace: Trace, context: Any, names: Sequence[str] | None = None, *, leave_out: bool = False
    ) -> dict[str, tuple[str, float]]:
        """What predictors would cost at the boundaries of a traced step.

        Args:
            trace: The step.
            context: What the predictors are told of the batch.
            names: Of which boundaries; by default of all.
            leave_out: Leave out those that cannot be built for their boundary.

        Returns:
            For each boundary, in words what predicts there, and its floating-point operations for a batch.

        Raises:
            SyntheticGradientsError: If one cannot be built, unless those are left out.
        """
        templates = self.templates(trace.order)
        known: dict[Any, PredictorCost] = {}
        costs = {}
        for name in trace.order if names is None else names:
            shapes, template = trace.shapes[name], templates[name]
            key = (id(template), *shapes)
            try:
                if key not in known:
                    known[key] = cost_of_predictor(template, name, shapes, context, trace.loss)
            except SyntheticGradientsError:
                if leave_out:
                    continue
                raise
            exact = self.exact_every > 0 and template.wants_exact(shapes, context)
            targets = 1.0 if name == trace.order[-1] else 1 / self.exact_every if exact else 0.0
            costs[name] = (known[key].words, known[key].of_batch(self.train_every, targets))
        return costs

    def operations_of_predictors(
        self, trace: Trace, context: Any, names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """The operations alone of those that can be built; see :meth:`costs_of_predictors`."""
        costs = self.costs_of_predictors(trace, context, names, leave_out=True)
        return {name: operations for name, (_words, operations) in costs.items()}

    def templates(self, names: Sequence[str]) -> dict[str, GradientPredictor]:
        """The unbuilt predictor at each of these boundaries.

        Raises:
            SyntheticGradientsError: If predictors are given by name, but for other boundaries.
        """
        if not isinstance(self.predictor, Mapping):
            return dict.fromkeys(names, self.predictor)
        templates = dict(self.predictor)
        in_time = () if self._module is None else boundaries_in_time(self._module)
        if set(templates) - set(in_time) != set(names) - set(in_time) or not set(names) <= set(templates):
            raise SyntheticGradientsError(
                f"SyntheticGradients(predictor=...) names the boundaries {sorted(templates)}, but the model has "
                f"{sorted({*names, *in_time})}. Give one predictor for each, or one for all."
            )
        return templates

    def _new_trainers(
        self, trainer: pl.Trainer, between_stages: list[str], in_time: list[str]
    ) -> dict[str, PredictorTrainer]:
        seed = trainer.strategy.broadcast(torch.initial_seed()) if self.seed is None else self.seed
        names = [*between_stages, *in_time]
        templates = self.templates(names)
        assert self._module is not None
        carried = [name for name, cut in boundaries_in_time(self._module).items() if isinstance(cut, TimeBoundary)]
        for name in carried:
            template = templates[name]
            if isinstance(template, AutoPredictor):
                templates[name] = template.of_state()
        self._seed = seed & (2**63 - 1)
        trainers = {
            name: PredictorTrainer(
                name,
                templates[name],
                self.optimizer,
                delay=self.delay,
                train_every=self.train_every,
                bound=self.bound,
                seed=self._seed,
                make_scheduler=self.lr_scheduler,
                updates=self.updates,
                ema=self.ema,
                scale=self.scale * (self.through_time.scale if name in carried else 1.0),
                bootstrap=self.bootstrap,
                exact_weight=self.exact_weight,
                guard=self.guard.of_state() if self.guard is not None and name in carried else self.guard,
                replicas=self.exchange.replicas,
            )
            for name in names
        }
        if not self.random_updates.certain and any(trained.correction for trained in trainers.values()):
            raise SyntheticGradientsError(
                "SyntheticGradients(update_probability=...) does not go with DelayedGradient: a stage that was not "
                "updated with a batch would be corrected for it. Use another predictor, or update_probability=1."
            )
        self.inputs.install(between_stages, self._seed, self.exchange.replicas)
        self.random_updates.start(self._seed)
        for name, state in self._restored.items():
            self._load(trainers, name, state)
        self._restored = {}
        return trainers

    def _new_auxiliary(self, name: str) -> Auxiliary | None:
        """The auxiliary task at a boundary in time, if one is wanted."""
        if not self.through_time.auxiliary:
            return None
        seed = self._seed ^ zlib.crc32(f"{name} (auxiliary)".encode())
        predictor: GradientPredictor = MLPPredictor(conditional=False)
        learner = Learner(predictor, self.optimizer, self.lr_scheduler, seed=seed, replicas=self.exchange.replicas)
        return Auxiliary(learner, self.through_time.auxiliary)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was: without hooks, an ordinary LightningModule."""
        self.step.end()
        self.times.end()
        self.times.remove()
        if self.boundaries is not None:
            self.boundaries.remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was: Lightning calls no ``teardown`` after an error."""
        self.teardown(trainer, pl_module, "")

    def accept(self, trace: Trace) -> None:
        """Takes what a traced step showed about the model."""
        self.trace = trace
        self.random_updates.accept(trace, len(self.trainers))
        self.step.loss = trace.loss
        order = trace.order or list(self.trainers)
        for place, name in enumerate(order):
            self.trainers[name].distance = len(order) - place
            self.trainers[name].shapes = trace.shapes.get(name, [])
        self._ask_for_exact()

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tells the boundaries about the batch; checks the cut on the first one."""
        assert self.boundaries is not None
        self._pass, self._first_backward = None, True
        true_share = 1.0 if self.batches < self.warm_up else self.mix
        self.step.begin(trainer, context_of(batch, self.context), true_share=true_share)
        self.inputs.begin(batch)
        self.random_updates.begin(trainer.global_step)
        if self.trace is None and len(self.boundaries) and not self.exchange.split:
            self._check(trainer, pl_module, batch, batch_idx)
        self._ask_for_exact()
        self.times.begin(trainer.strategy.root_device)
        if not self.exchange.split:
            for site in self.boundaries.sites:
                inputs = self.inputs.trainers.get(site.name)
                site.open(LocalCrossing(self.trainers[site.name], self.step, inputs), without_gradient=False)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Lets boundaries in time predict; on a batch whose exact gradient is asked for, finds it where the loss is."""
        if not self._first_backward:
            return
        self.times.inject(loss)
        if self.step.exact and self.exchange.has_loss:
            self._pass = ExactPass.run(
                loss, self.step.crossings, self.exchange.leaves, self.corrected(), self.step.gradient_scale()
            )

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Applies what earlier batches' exact gradients, which have arrived, were more than those used.

        Predictors at boundaries in time learn from the targets that this backward pass has brought.
        """
        if not self._first_backward:
            return
        self._first_backward = False
        self.times.learn()
        scale = self.step.gradient_scale()
        if self._pass is not None:
            self.hold(self.batches, self._pass.corrections(self.corrected(), scale))
        self.corrections.apply(pl_module, self.batches, scale, self.exchange.holds)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Leaves stages out that are not updated at this step, before gradients are clipped."""
        self.random_updates.drop(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the figures of the targets that were learned from in this step."""
        assert self.boundaries is not None
        self.batches += 1
        self._pass = None
        self.times.end()
        self.step.end()
        self.boundaries.close()
        logs = logs_now(trainer) or trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if logs:
            for trained in self._all_trainers.values():
                trained.check_finite()
        self.inputs.end(check=logs)
        self._announce(pl_module)
        figures = {name: self._figures_of(trained) for name, trained in self._all_trainers.items()}
        self.inputs.add_figures(figures)
        for name, values in self.exchange.route(figures).items():
            self._unlogged.setdefault(name, {}).update(values)
        # `log` takes longer than a small predictor: it is called only where its value is seen.
        if logs:
            for name, values in self._unlogged.items():
                for key, value in values.items():
                    pl_module.log(f"sg/{name}/{key}", value, on_step=True, on_epoch=False, batch_size=1)
            cosines = [values["cosine"] for values in self._unlogged.values() if "cosine" in values]
            if cosines:  # loggers have that of each boundary
                mean = torch.stack([value.float().cpu() for value in cosines]).mean()
                pl_module.log("sg/cosine", mean, prog_bar=True, logger=False, batch_size=1)
            self._unlogged = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets what is carried in time begin anew."""
        self.times.begin_evaluation()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets what is carried in time begin anew."""
        self.times.begin_evaluation()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets what is carried in time begin anew."""
        self.times.begin_evaluation()

    def _announce(self, module: pl.LightningModule) -> None:
        """Says, once, what was chosen for each boundary and what it costs."""
        if len(self._announced) == len(self._all_trainers):
            return
        size = sum(parameter.numel() for parameter in module.parameters())
        for name, trained in self._all_trainers.items():
            if name in self._announced or trained.flops is None or not isinstance(trained.predictor, AutoPredictor):
                continue
            self._announced.add(name)
            own = sum(parameter.numel() for parameter in trained.predictor.parameters())
            share = f"{own / size:.1%} of the model's parameters" if size else ""
            cost = self._cost_of(trained)
            if share and cost is not None:
                share += f" and {cost:.1%} of its operations"
            _log.info(f"Boundary '{name}': {trained.predictor.choice}; {share}.")

    def _figures_of(self, trained: PredictorTrainer) -> dict[str, Tensor]:
        figures = trained.take_figures()
        cost = self._cost_of(trained) if figures else None
        if cost is not None:
            figures["cost"] = torch.tensor(cost)
        return figures

    def _cost_of(self, trained: PredictorTrainer) -> float | None:
        """The predictor's operations as a share of the model's, once both were counted."""
        model = 0 if self.trace is None else sum(self.trace.flops)
        # A training step is about three forward passes.
        return trained.flops / (3 * model) if trained.flops is not None and model else None

    # ------------------------------------------------------------------ exact gradients

    @property
    def exact_pass(self) -> ExactPass | None:
        """What the current batch's exact pass found, if it had one."""
        return self._pass

    def _ask_for_exact(self) -> None:
        """Decides what the batch that is going on does for exact gradients.

        Again once the first step was followed: what crosses the boundaries has a say in it.
        """
        sent = self._sends_exact(self.step.context)
        number = self.batches - self.warm_up
        coupled = number < 0 or self.mix == 1
        self.step.bootstrap = not sent
        self.step.exact = sent and not coupled and (self._corrects_late or number % self.exact_every == 0)

    def _sends_exact(self, context: Any) -> bool:
        """Whether exact gradients travel up at all, on whichever batches."""
        trainers = self.trainers.values()
        if self._corrects_late:
            return True
        useful = len(trainers) > 1 and any(trained.wants_exact(context) for trained in trainers)
        return self.exact_every > 0 and (useful or self.correction > 0)

    @property
    def _corrects_late(self) -> bool:
        """Whether a predictor is one that applies every batch's true gradient when it arrives."""
        return any(trained.correction > 0 for trained in self.trainers.values())

    def corrected(self) -> Parameters:
        """The parameters of this process's stages to which corrections are due, by name."""
        return {name: parameter for name, (parameter, _due, _weight) in self._corrected().items()}

    def hold(self, number: int, gradients: Mapping[str, Tensor]) -> None:
        """Keeps corrections of batch ``number`` until they are due: the later, the further from the loss."""
        averaged = dict(zip(gradients, self.exchange.replicas.average(list(gradients.values()))))
        by_due: dict[int, dict[str, Tensor]] = {}
        for name, (_parameter, later, weight) in self._corrected().items():
            if name in averaged:
                gradient = averaged[name] if weight == 1 else weight * averaged[name]
                by_due.setdefault(number + later, {})[name] = gradient
        for due, held in by_due.items():
            self.corrections.hold(due, held)

    def _corrected(self) -> dict[str, tuple[torch.nn.Parameter, int, float]]:
        """The parameters with how many batches later their correction is due, and its weight."""
        trace = self.trace
        if trace is None or not any(self._weight_of(name) for name in self.trainers):
            return {}
        if not trace.order:
            raise SyntheticGradientsError(
                "Corrections with the true gradient need to know which stage a parameter belongs to, but the step "
                "could not be followed on tensors without data (see the warning at the start). Use correction=0 and "
                "no DelayedGradient with this model, or move the code that reads values behind the last boundary."
            )
        assert self._module is not None
        corrected = {}
        for name, parameter in self._module.named_parameters():
            users = trace.uses.get(name)
            if not users or min(users) == len(trace.order) or not parameter.requires_grad:
                continue
            boundary = trace.order[min(users)]
            weight = self._weight_of(boundary)
            if weight and self.exchange.holds(name):
                distance = self.trainers[boundary].distance
                corrected[name] = (parameter, distance * (1 + self.delay), weight)
        return corrected

    def _weight_of(self, boundary: str) -> float:
        trained = self.trainers[boundary]
        own = trained.correction
        return float(own**trained.distance) if own else self.correction

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Follows one step without data: is every boundary reached, and does nothing go around it?"""
        assert self.boundaries is not None

        def run() -> Any:
            with trainer.precision_plugin.train_step_context():
                return call_training_step(module, batch, batch_idx)

        try:
            trace = trace_step(module, self.boundaries.sites, run, trainer.strategy.root_device, without_gradient=False)
        except PartitionError as error:
            rank_zero_warn(f"The boundaries could not be checked before training, which goes on. {error}")
            self.accept(Trace())
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
        """The predictors with their optimizers and the targets under way, by boundary; what is carried in time."""
        if not self._all_trainers:
            return {
                "batches": self.batches,
                "boundaries": self._restored,
                "corrections": self.corrections.state_dict(),
                "inputs": self.inputs.state_dict(self.exchange.owns_inputs),
                "updates": self.random_updates.state_dict(),
                "times": {},
            }
        self.exchange.flush()
        in_time = self.times.here(split=self.exchange.split)
        owned = [name for name in self.trainers if self.exchange.owns(name)] + in_time
        trainers = self._all_trainers
        return {
            "batches": self.batches,
            "boundaries": self.exchange.gather({name: trainers[name].state_dict() for name in owned}),
            "corrections": self.exchange.gather(self.corrections.state_dict()),
            "times": self.exchange.gather(self.times.state_dict(in_time)),
            "inputs": self.exchange.gather(self.inputs.state_dict(self.exchange.owns_inputs)),
            "updates": self.random_updates.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; a boundary that the saved run did not have starts afresh."""
        self.batches = state_dict["batches"]
        self.corrections.load_state_dict(state_dict["corrections"])
        self.inputs.load_state_dict(state_dict.get("inputs", {}))  # not in checkpoints of earlier versions
        self.random_updates.load_state_dict(state_dict.get("updates", {}))
        self.times.load_state_dict(state_dict.get("times", {}))
        if not self._all_trainers:
            self._restored = state_dict["boundaries"]
            return
        for name, state in state_dict["boundaries"].items():
            self._load(self._all_trainers, name, state)

    @staticmethod
    def _load(trainers: dict[str, PredictorTrainer], name: str, state: dict[str, Any]) -> None:
        if name in trainers:
            trainers[name].load_state_dict(state)
        else:
            rank_zero_warn(f"The checkpoint has a predictor for boundary '{name}', which this model does not have.")


__all__ = ["SyntheticGradients"]
