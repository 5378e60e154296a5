"""Keeps the processes of a split run in agreement on metrics, stops and epoch ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from lightning_sg._compat import saves_at_step
from lightning_sg.distributed.guard import GUARDED, HookGuard
from lightning_sg.distributed.hook_watch import BETWEEN_STEPS, HookWatch
from lightning_sg.distributed.hooks import EVALUATIONS, is_users, users_callbacks, users_hooks
from lightning_sg.distributed.metric_sync import metrics_over
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.distributed.whole_model import WholeModel
from lightning_sg.lightning_api import Callback, ModelCheckpoint, pl
from lightning_sg.partition.shadow import shadowed

# Where the processes meet anyway: the hooks of the user's, there and up to the next place, that see the whole model.
_PLACES = {
    **{hook: (hook,) for hook in ("on_train_epoch_start", "on_train_epoch_end", "on_train_end")},
    **{
        f"on_{stage}_start": tuple(
            f"on_{stage}_{part}" for part in ("start", "epoch_start", "batch_start", "batch_end")
        )
        for stage in EVALUATIONS
    },
    **{f"on_{stage}_{part}": (f"on_{stage}_{part}",) for stage in EVALUATIONS for part in ("epoch_end", "end")},
}
_SEEING = tuple(dict.fromkeys(hook for hooks in _PLACES.values() for hook in hooks))
# Of these, those before which all processes get the metrics.
_WITH_METRICS = ("on_train_epoch_end", "on_validation_epoch_end", "on_test_epoch_end", "on_test_end")


class StageCoordinator(Callback):
    """Runs first of all callbacks under :class:`~lightning_sg.SyntheticGradientStrategy`.

    Only the last stage has the loss, and so the metrics. At the end of each validation and training epoch, where the
    processes meet anyway, all of them get the metrics: ``ModelCheckpoint``, ``EarlyStopping``, plateau schedulers and
    hooks of the user's then decide alike everywhere. Hooks of the user's there see the whole current model, too. A
    request to stop travels with the messages, so that all stop after the same batch.

    Args:
        runtime: This process's part of the run.
        gather: Makes the module whole in every process. A collective.
    """

    def __init__(self, runtime: StageRuntime, gather: Callable[[], None]) -> None:
        self._runtime = runtime
        self._whole = WholeModel(runtime, gather)
        self._users: set[str] = set()
        self._for_the_run = ExitStack()

    # ------------------------------------------------------------------ a run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Looks for the user's hooks, guards them, and keeps metrics to this process and its replicas."""
        peers = self._runtime.grid.peers
        if peers.count == 1:
            # Lightning's advice is for replicas. Stages have nothing to sum over each other.
            warnings.filterwarnings("ignore", message=r".*recommended to use `self\.log\(.*sync_dist=True")
        own = users_hooks(trainer, pl_module, _SEEING)
        # All go by all, as some users have a callback on one rank only.
        self._users = {hook for each in self._runtime.meetings.gather("hooks", own) for hook in each}
        self._for_the_run.enter_context(metrics_over(peers))
        self._for_the_run.enter_context(shadowed(list(self._in_place_of_hooks(trainer, pl_module))))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the module, the callbacks and the metrics back their own."""
        self._for_the_run.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tells the neighbours before any other callback runs; from here on nothing waits for them."""
        self._runtime.fail(exception)
        self.teardown(trainer, pl_module, "")

    def _in_place_of_hooks(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[Any, str, Any]]:
        """The hooks that are replaced in the module and the user's callbacks: whose, the name, and by what."""
        guard, watch = HookGuard(self._runtime.grid, self._runtime.status), HookWatch(self._runtime, module)
        if not module.automatic_optimization:
            self._runtime.around_training = partial(watch.watching, f"{type(module).__name__}.training_step")
        names = dict.fromkeys((*GUARDED, *BETWEEN_STEPS))
        for name in names:
            for callback in users_callbacks(trainer, name):
                yield callback, name, _safe(callback, name, guard, watch)
        ends = {name for name in self._users if "batch" not in name}
        for name in dict.fromkeys((*names, *sorted(ends))):
            hook = own = getattr(module, name)
            if name in names and is_users(module, name):
                hook = _safe(module, name, guard, watch)
            if name == "on_train_batch_end":
                hook = self._ending_batch(hook, trainer)
            elif name in ends or name == "on_train_epoch_end":
                hook = self._ending(hook, name, trainer)
            if hook is not own:
                yield module, name, hook

    # ------------------------------------------------------------------ before the user's hooks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A process that takes the place of another goes to where that one was."""
        self._runtime.presence.training_starts(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes where a new process in this one's place would begin."""
        self._runtime.presence.epoch_starts(trainer)
        self._prepare("on_train_epoch_start", trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes the batch towards the neighbours, even if it had no backward pass."""
        self._runtime.end_batch()
        self._whole.trained()
        if self._saves_now(trainer):
            self._share_metrics(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_train_epoch_end", trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_train_end", trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_validation_start", trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_validation_epoch_end", trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shares the validation metrics; prepares for the user's hooks."""
        self._share_metrics(trainer)
        self._prepare("on_validation_end", trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_test_start", trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_test_epoch_end", trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_test_end", trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_predict_start", trainer)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *results: Any) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_predict_epoch_end", trainer)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares for the user's hooks."""
        self._prepare("on_predict_end", trainer)

    def _prepare(self, place: str, trainer: pl.Trainer) -> None:
        """Before hooks of the user's that see the whole model and the metrics, if there are any."""
        if self._users.isdisjoint(_PLACES[place]):
            return
        self._whole.bring(trainer.lightning_module)
        if place in _WITH_METRICS:
            self._tell_metrics(trainer)

    # ------------------------------------------------------------------ after the user's hooks

    def _ending(self, hook: Callable[..., Any], name: str, trainer: pl.Trainer) -> Callable[..., Any]:
        """Wraps the last of some hooks of one name: takes over what they have written and logged."""

        def run(*arguments: Any) -> None:
            hook(*arguments)
            if name == "on_train_epoch_end":
                self._share_metrics(trainer)
            if name in self._users:
                self._whole.take_writes(trainer.lightning_module, name)

        return run

    def _ending_batch(self, hook: Callable[..., Any], trainer: pl.Trainer) -> Callable[..., Any]:
        """Wraps the last hook of a batch, after which nobody else asks this process to stop."""

        def run(*arguments: Any) -> None:
            hook(*arguments)
            if trainer.should_stop and not self._runtime.final:
                self._runtime.stopping.wanted = True
            trainer.should_stop = self._runtime.final
            self._runtime.presence.batch_ends(trainer)

        return run

    def _share_metrics(self, trainer: pl.Trainer) -> None:
        """Gives all processes the last stage's metrics; all stop at the end of the epoch if one wants to."""
        self._tell_metrics(trainer)
        agree_on_stop(trainer, self._runtime)

    @staticmethod
    def _tell_metrics(trainer: pl.Trainer) -> None:
        metrics = {
            name: value.detach().cpu() if isinstance(value, Tensor) else value
            for name, value in trainer.callback_metrics.items()
        }
        shared = trainer.strategy.broadcast(metrics)
        if not trainer.is_global_zero:
            trainer.callback_metrics.update(shared)

    @staticmethod
    def _saves_now(trainer: pl.Trainer) -> bool:
        """Whether a ModelCheckpoint looks at metrics after this very step."""
        return any(
            isinstance(callback, ModelCheckpoint)
            and callback.monitor is not None
            and saves_at_step(callback, trainer.global_step)
            for callback in trainer.checkpoint_callbacks
        )


def _safe(owner: Any, name: str, guard: HookGuard, watch: HookWatch) -> Callable[..., Any]:
    """A hook of the user's that is guarded and watched as far as that concerns it."""
    hook: Callable[..., Any] = getattr(owner, name)
    if name in GUARDED:
        hook = guard.guarded(hook, name, owner)
    if name in BETWEEN_STEPS:
        hook = watch.watched(hook, f"{type(owner).__name__}.{name}")
    return hook


def agree_on_stop(trainer: pl.Trainer, runtime: StageRuntime) -> None:
    """Stops all processes if one of them wants to. A collective."""
    if not trainer.strategy.reduce_boolean_decision(trainer.should_stop or runtime.stopping.wanted, all=False):
        return
    runtime.stopping.wanted = False
    trainer.should_stop = True


__all__ = ["StageCoordinator", "agree_on_stop"]
