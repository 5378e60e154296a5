"""The callback: settings, and the hooks in which Lightning calls the session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sg._compat import logs_now
from lightning_sg.batch.context import ContextSource
from lightning_sg.clipping import ClippingByValue
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.finite.diagnosis import BatchOrigin
from lightning_sg.finite.policy import OnNonFinite
from lightning_sg.inputs import SyntheticInputs
from lightning_sg.lightning_api import Callback, TrainerFn, is_overridden, pl, rank_zero_warn
from lightning_sg.metrics_log import MetricsLog, is_measured
from lightning_sg.mixture import refuse_mixture
from lightning_sg.optimizer_advice import advise_on_late_gradients
from lightning_sg.options import ExactGradients, LateGradients, PredictorTraining
from lightning_sg.predictors import GradientPredictor
from lightning_sg.recurrent.settings import ThroughTime
from lightning_sg.rules import BoundaryRule
from lightning_sg.run_summary import Times, summarize
from lightning_sg.runtime import OneProcess, Runtime
from lightning_sg.session import Session
from lightning_sg.settings import Settings
from lightning_sg.settings_log import SettingsLog
from lightning_sg.stage_randomness import StageRandomness
from lightning_sg.step_clock import clock_of
from lightning_sg.summary_picture import SummaryPicture
from lightning_sg.times_log import TimesLog
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.training.guard import AlignmentGuard
from lightning_sg.training.resumed import warn_of_fresh


class SyntheticGradients(Callback):
    """Trains the stages of a network decoupled, with synthetic gradients at its boundaries.

    Every stage is updated with a predicted gradient instead of waiting for the backward pass of the stages after
    it; the predictors are trained towards the gradients that those stages then return. Source: Jaderberg et al.
    2017, *Decoupled Neural Interfaces using Synthetic Gradients* (arXiv 1608.05343).

    The callback alone works under any single-device strategy. With ``strategy="synthetic_gradients"`` the stages
    run on several processes and compute the same. Validation, test and prediction use the network as it is.

    Logged for each boundary, about the last batch that its predictor learned from: ``sg/<boundary>/cosine`` and
    ``norm_ratio`` (of prediction to target), ``guarded`` (when the guard changes its mind, and while it has taken
    over), and once ``cost`` (the predictor's operations as a share of the model's); ``sg/cosine`` is the mean over
    boundaries. With ``inputs`` also ``input_error``, the relative squared error of the predicted activations. The
    settings, and what was chosen at each boundary, go into the config of every logger, under ``sg``.

    Args:
        boundaries: Names of submodules, as in ``model.named_modules()``, to cut after. By default every
            :class:`~lightning_sg.Boundary` in the model. ``"auto"`` cuts it at the first batch into as many stages as
            ``strategy="synthetic_gradients"`` has processes, of about equal cost, and says where; a resumed run keeps
            the cuts of its checkpoint.
        predictor: The predictor at each boundary (each gets its own copy) or a rule such as
            :class:`~lightning_sg.TrueGradient`, or one by boundary name. ``"auto"`` chooses
            by what crosses and what there is to predict from, see :class:`~lightning_sg.AutoPredictor`, and says so.
        delay: Extra steps before a predictor learns from a target; 0 means the next step. With the stages on several
            processes, a stage may be so many batches ahead of the next; 0 leaves it least time to wait for, larger
            values ride out longer hiccups. At most 1,000, as each step keeps one more batch's activations.
        context: What predictors are told of a batch besides activations: ``"auto"`` (what the model's loss compares the
            network with, found by tracing a step), a key, an index, a function of the batch, or ``None``.
        exact: When exact gradients travel up and what is done with them, see ``ExactGradients``.
        training: How the predictors are trained, see ``PredictorTraining``.
        guard: Watches the predictions and falls back where they do harm, see :class:`~lightning_sg.AlignmentGuard`.
            ``None`` for no guard: then a prediction that is not finite is an error.
        through_time: How boundaries in time are predicted, see ``ThroughTime``: every ``TimeBoundary`` and
            ``MessageBoundary`` in the model.
        inputs: Has the activations at the boundaries predicted too, so that no stage waits for those before it;
            ``None``: stages go on with the true ones.
        on_non_finite: What to do about a batch whose loss, activations or gradients are NaN or infinite: ``"raise"``
            an error that names the batch, the stage and what is at fault; ``"skip"`` the batch in every stage that
            can know; or ``"ignore"`` it, as plain Lightning does. On a CPU the error comes before the optimizer step;
            on other devices at the next logging step or checkpoint, because asking in each step would stop them.
        late: Mixes true gradients of earlier batches with the synthetic ones, see
            :class:`~lightning_sg.LateGradients`; ``None``: synthetic gradients alone.
        metrics: ``"compact"`` logs the above. ``"all"`` adds for each boundary ``loss`` (of the predictor), ``bias``
            and ``variance`` (of its error, see :func:`~lightning_sg.training.compare`) and ``bootstrapped_cosine`` (of
            the next stage's target with the exact one, on batches that have both).

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or two do not go together.
        BoundaryError: If a boundary is listed more than once; at the start of training, if a boundary is unknown, not
            reached, or gone around, or if no gradient reaches the stage before it.
        NonFiniteLossError: In training, with ``on_non_finite="raise"``.
    """

    def __init__(
        self,
        boundaries: Sequence[str] | Literal["auto"] | None = None,
        predictor: Literal["auto"]
        | GradientPredictor
        | BoundaryRule
        | Mapping[str, GradientPredictor | BoundaryRule] = "auto",
        delay: int = 1,
        context: ContextSource = "auto",
        exact: ExactGradients = ExactGradients(),
        training: PredictorTraining = PredictorTraining(),
        guard: AlignmentGuard | None = AlignmentGuard(),
        through_time: ThroughTime = ThroughTime(),
        inputs: SyntheticInputs | None = None,
        on_non_finite: OnNonFinite = "raise",
        late: LateGradients | None = None,
        metrics: Literal["compact", "all"] = "compact",
    ) -> None:
        super().__init__()
        self.settings = Settings(
            boundaries,
            predictor,
            delay,
            context,
            exact,
            training,
            guard,
            through_time,
            inputs,
            on_non_finite,
            late,
            metrics,
        )
        self._session: Session | None = None
        self._runtime: Runtime = OneProcess()
        self._randomness: StageRandomness | None = None
        self._metrics = MetricsLog()
        self._settings_log = SettingsLog()
        self._times = TimesLog()
        self._picture = SummaryPicture()
        self._chosen: list[str] | None = None
        self._restored: dict[str, Any] | None = None
        self._installed = False  # in the module of this run
        self._resumes_without = False  # from a checkpoint without predictors

    # ------------------------------------------------------------------ what it has

    @property
    def session(self) -> Session:
        """The training of the module that the trainer has.

        Raises:
            SyntheticGradientsError: Before the trainer has one.
        """
        if self._session is None:
            raise SyntheticGradientsError("SyntheticGradients has no module yet: the trainer brings it in `setup`.")
        return self._session

    @property
    def trainers(self) -> dict[str, BoundaryTrainer]:
        """What supplies the gradient at each boundary between stages; empty before the module is cut."""
        return {} if self._session is None else self._session.trainers

    @property
    def names(self) -> list[str] | None:
        """The boundaries that the user or the automatic choice names; ``None`` for those in the model."""
        return self.settings.names if self._chosen is None else self._chosen

    @property
    def is_cut(self) -> bool:
        """Whether the module of this run has its boundaries."""
        return self._installed

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Cuts the module at its boundaries, if it is there yet."""
        refuse_mixture([("the Trainer", trainer), ("the callback", self), ("the model", pl_module)])
        # The strategy says where the stages are; any other strategy has them in one process.
        self._runtime = getattr(trainer.strategy, "runtime", None) or OneProcess()
        self._installed = False
        ClippingByValue.install(trainer.precision_plugin)
        if self._session is not None and self._session.module is not pl_module:
            self._chosen = None
        split = self._runtime.ownership.split
        if not split and trainer.world_size > 1:
            raise SyntheticGradientsError(
                f"SyntheticGradients does not support {trainer.world_size} replicas under "
                f"{type(trainer.strategy).__name__}, which would train other predictors in each. Use "
                f"SyntheticGradientStrategy(replicas={trainer.world_size}), or one device."
            )
        if self.settings.automatic and not split and stage == "fit":
            rank_zero_warn(
                "boundaries='auto' cuts the model into as many stages as strategy='synthetic_gradients' has devices, "
                "here one: it trains undivided. Name the boundaries, or give it more devices."
            )
        if not is_overridden("configure_model", pl_module):  # which comes later, and makes the submodules
            self.cut(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cuts a module that was made in ``configure_model``; warns if there is no boundary to decouple anything."""
        if not self._installed:
            self.cut(trainer, pl_module)
        if not (self.session.decouples or self.settings.automatic or self._runtime.ownership.split):
            given = "has no boundary" if self.settings.names is None else "is given none (boundaries=[])"
            rank_zero_warn(
                f"{type(pl_module).__name__} {given}, so SyntheticGradients does nothing: this is plain "
                "backpropagation. Put `lightning_sg.Boundary()` into the model, name the submodules to cut after "
                "(SyntheticGradients(boundaries=[...])), or leave it to strategy='synthetic_gradients' with several "
                "devices (SyntheticGradients(boundaries='auto'))."
            )

    def cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Session:
        """Cuts the module: in :meth:`setup`, once it has its submodules, or when it is known where.

        Raises:
            BoundaryError: If a name is unknown or given twice.
        """
        profile = clock_of(trainer).profile
        session, batch, ownership = self._session, None, self._runtime.ownership
        if session is not None and session.fits(pl_module, self.names):
            session.install(self.names, ownership, profile)
        else:
            if session is not None:
                batch = session.batch
                session.remove()
            seed = self.settings.training.seed
            if seed is None:
                seed = trainer.strategy.broadcast(torch.initial_seed())
            session = Session(self.settings, pl_module, self.names, seed & (2**63 - 1), ownership, profile)
            self._session = session
        self._installed = True
        if self._restored is not None and (session.decouples or not self.undecided):
            restored, self._restored = self._restored, None
            session.load_state_dict(restored)
        elif self._restored is not None:
            self._say_what_waits(self._restored)
        self._say_what_is_fresh()
        self._runtime.follow(session)
        self._forget_randomness()
        if not ownership.split:
            self._randomness = StageRandomness(session, trainer)
        if batch is not None:
            session.take_over(batch, trainer)
        return session

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock; warns of optimizers that do not suit late gradients."""
        self._times.begin(clock_of(trainer))
        self._picture.begin()
        if self.session.exact.applies_late and (self._runtime.ownership.split or self.session.trainers):
            late = self.settings.late
            advise_on_late_gradients(trainer.optimizers, share=1.0 if late is None else late.share)

    # ------------------------------------------------------------------ automatic boundaries

    @property
    def undecided(self) -> bool:
        """Whether it is still to be chosen where to cut."""
        return self.settings.automatic and not self._chosen

    def saved_boundaries(self, stages: int) -> list[str] | None:
        """Where the checkpoint that is being resumed has its cuts, if they make so many stages."""
        saved = list((self._restored or {}).get("boundaries", {}))
        return saved if len(saved) == stages - 1 else None

    def choose(self, names: Sequence[str]) -> None:
        """Takes the automatic choice."""
        self._chosen = list(names)

    # ------------------------------------------------------------------ the end of a run

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was: without hooks, an ordinary LightningModule."""
        if self._session is not None:
            self._session.remove()
        self._forget_randomness()
        self._installed = False

    def _forget_randomness(self) -> None:
        if self._randomness is not None:
            self._randomness.close()
            self._randomness = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was: Lightning calls no ``teardown`` after an error."""
        if self._session is not None and self._session.batch is not None:
            self._session.finite.undo()
        self.teardown(trainer, pl_module, "")

    # ------------------------------------------------------------------ steps

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tells the boundaries about the batch; checks the cut on the first one."""
        clock_of(trainer).open()
        self.session.begin_batch(trainer, batch, BatchOrigin(trainer.current_epoch, batch_idx, batch))
        self._runtime.open_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Lets boundaries in time predict; finds the exact gradients where the loss is, if they are asked for."""
        self.session.before_backward(loss, self._runtime.leaves)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets boundaries in time learn; applies the corrections that are due."""
        self.session.after_backward()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Leaves stages out that are not updated at this step, before gradients are clipped."""
        self.session.before_optimizer_step()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the metrics of the targets that were learned from in this step."""
        session, clock = self.session, clock_of(trainer)
        session.end_batch()
        clock.tick()
        self._settings_log.write(trainer, session)
        # Logging takes longer than a small predictor: it is done only where its value is seen.
        logs = logs_now(trainer) or trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if logs:
            session.check_finite()
        self._metrics.announce(session)
        measured = logs or is_measured(trainer, session, batch_idx)
        own = self._times.joined(self._metrics.of_process(session), session, clock) if measured else {}
        self._metrics.add(self._times.take(self._runtime.route(own)))
        if logs:
            self._picture.add(trainer, self._metrics.write(session), self._times.write(trainer, clock))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what the training was like."""
        clock = clock_of(trainer)
        times = Times(clock.milliseconds, len(clock.gaps), self._times.shares(clock))
        summarize(trainer, self.session.all_trainers, times)
        self._picture.log(trainer, times)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets what is carried in time begin anew."""
        clock_of(trainer).pause()
        if self._session is not None:
            self._session.times.begin_evaluation()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets what is carried in time begin anew."""
        self.on_validation_start(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets what is carried in time begin anew."""
        self.on_validation_start(trainer, pl_module)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The predictors with their optimizers and the targets under way, by boundary; what is carried in time."""
        if self._restored is not None:
            return self._restored
        if self._session is None:
            return {}
        self._session.finite.check()
        if not self._session.decouples:
            return self._session.state_dict(lambda states: states)
        self._runtime.flush()
        return self._session.state_dict(self._runtime.gather)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; a boundary that the saved run did not have starts afresh."""
        if not state_dict:
            return
        if self._installed and self._session is not None and (self._session.decouples or not self.undecided):
            self._session.load_state_dict(state_dict)
            return
        self._restored = state_dict
        if self._installed:
            self._say_what_waits(state_dict)

    def _say_what_waits(self, restored: Mapping[str, Any]) -> None:
        """Warns that a run without boundaries, in one process, has no use for the predictors of its checkpoint."""
        if not self._runtime.ownership.split:
            rank_zero_warn(
                "The checkpoint has predictors, which this undivided run keeps but does not use, for boundaries "
                f"{sorted(restored['boundaries'])}."
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Says so if the checkpoint is of a run without predictors."""
        training = trainer.state.fn == TrainerFn.FITTING
        self._resumes_without = training and not checkpoint.get("callbacks", {}).get(self.state_key)
        if self._installed:
            self._say_what_is_fresh()

    def _say_what_is_fresh(self) -> None:
        """Warns, once there are boundaries, if the run is resumed from one without predictors."""
        if self._resumes_without and self.session.all_trainers:
            self._resumes_without = False
            warn_of_fresh(self.session.all_trainers, "the checkpoint is of a run without SyntheticGradients")


def callback_of(trainer: pl.Trainer) -> SyntheticGradients:
    """The trainer's callback, or a new one with its defaults."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, SyntheticGradients)]
    if len(found) > 1:
        raise SyntheticGradientsError("The trainer has more than one SyntheticGradients callback; give one.")
    if not found:
        found = [SyntheticGradients()]
        callbacks.insert(0, found[0])
    return found[0]


__all__ = ["SyntheticGradients", "callback_of"]
