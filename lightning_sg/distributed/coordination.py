"""Keeps the processes of a split run in agreement on metrics, stops and epoch ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_sg._compat import saves_at_step
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import Callback, ModelCheckpoint, pl

# Hooks of the user's module in which results of steps are commonly used: only the last stage has them.
_ENDS = (
    "on_train_epoch_end",
    *(f"on_{stage}_{part}_end" for stage in ("validation", "test", "predict") for part in ("batch", "epoch")),
)


class StageCoordinator(Callback):
    """Runs first of all callbacks under :class:`~lightning_sg.SyntheticGradientStrategy`.

    Only the last stage has the loss, and so the metrics. At the end of each validation and training epoch, where the
    processes meet anyway, all of them get the metrics: ``ModelCheckpoint``, ``EarlyStopping`` and plateau schedulers
    then decide alike everywhere. A request to stop travels with the messages, so that all stop after the same batch.

    Args:
        runtime: This process's part of the run.
    """

    def __init__(self, runtime: StageRuntime) -> None:
        self._runtime = runtime
        self._warned: set[str] = set()
        self._hooks: dict[str, Any] = {}
        self._metrics: list[tuple[Metric, Any, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Guards the module's epoch-end hooks and keeps its metrics to this process."""
        if self._runtime.grid.peers.count == 1:
            # Lightning's advice is for replicas. Stages have nothing to sum over each other.
            warnings.filterwarnings("ignore", message=r".*recommended to use `self\.log\(.*sync_dist=True")
        self._hooks = {name: pl_module.__dict__.get(name) for name in (*_ENDS, "on_train_batch_end")}
        for name in _ENDS:
            setattr(pl_module, name, self._guarded(name, getattr(pl_module, name), trainer))
        pl_module.on_train_batch_end = self._agreeing(pl_module.on_train_batch_end, trainer)  # type: ignore[method-assign]
        self.keep_metrics(pl_module)

    def keep_metrics(self, pl_module: pl.LightningModule) -> None:
        """Restricts the module's metrics to this process, or to those with the same stages in other replicas.

        Called again after ``configure_model``, which may have made some.
        """
        replicas = self._runtime.grid.peers
        for child in pl_module.modules():
            if isinstance(child, Metric) and child.distributed_available_fn not in (_alone, _with_replicas):
                # It would gather over all processes, but only the last of each replica has values.
                self._metrics.append((child, child.distributed_available_fn, child.process_group))
                child.distributed_available_fn = _alone if replicas.count == 1 else _with_replicas
                child.process_group = replicas.group

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the module back its own hooks and metrics."""
        for metric, available, group in self._metrics:
            metric.distributed_available_fn, metric.process_group = available, group
        self._metrics.clear()
        for name, own in self._hooks.items():
            if own is None:
                pl_module.__dict__.pop(name, None)
            else:
                pl_module.__dict__[name] = own
        self._hooks.clear()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tells the neighbours before any other callback runs; from here on nothing waits for them."""
        self._runtime.fail(exception)
        self.teardown(trainer, pl_module, "")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A process that takes the place of another goes to where that one was."""
        self._runtime.presence.training_starts(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes where a new process in this one's place would begin."""
        self._runtime.presence.epoch_starts(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes the batch towards the neighbours, even if it had no backward pass."""
        self._runtime.end_batch()
        if self._saves_now(trainer):
            self._share_metrics(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shares the validation metrics."""
        self._share_metrics(trainer)

    def _guarded(self, name: str, hook: Callable[..., Any], trainer: pl.Trainer) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            self._call(hook, name, *arguments)
            if name == "on_train_epoch_end":
                self._share_metrics(trainer)

        return run

    def _agreeing(self, hook: Callable[..., Any], trainer: pl.Trainer) -> Callable[..., Any]:
        """Wraps the last hook of a batch, after which nobody else asks this process to stop."""

        def run(*arguments: Any) -> None:
            self._call(hook, "on_train_batch_end", *arguments)
            if trainer.should_stop and not self._runtime.final:
                self._runtime.stopping.wanted = True
            trainer.should_stop = self._runtime.final
            self._runtime.presence.batch_ends(trainer)

        return run

    def _call(self, hook: Callable[..., Any], name: str, *arguments: Any) -> None:
        """Runs a hook of the module; where it needs what only the last stage has, it ends early with a warning."""
        try:
            hook(*arguments)
        except SyntheticGradientsError:
            raise
        except Exception as error:  # the user's code: anything may come
            if self._runtime.grid.is_last:
                raise
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name} raised {type(error).__name__} ({error}) in {self._runtime.status.name}, where a step has "
                    "no loss and no outputs; it goes on there without the rest of the hook, which ran whole in the "
                    "last stage. If the rest matters to every stage, put what failed in "
                    "`if trainer.is_global_zero:`.",
                    stacklevel=2,
                )

    def _share_metrics(self, trainer: pl.Trainer) -> None:
        """Gives all processes the last stage's metrics; all stop at the end of the epoch if one wants to."""
        metrics = {
            name: value.detach().cpu() if isinstance(value, Tensor) else value
            for name, value in trainer.callback_metrics.items()
        }
        shared = trainer.strategy.broadcast(metrics)
        if not trainer.is_global_zero:
            trainer.callback_metrics.update(shared)
        agree_on_stop(trainer, self._runtime)

    @staticmethod
    def _saves_now(trainer: pl.Trainer) -> bool:
        """Whether a ModelCheckpoint looks at metrics after this very step."""
        return any(
            isinstance(callback, ModelCheckpoint)
            and callback.monitor is not None
            and saves_at_step(callback, trainer.global_step)
            for callback in trainer.checkpoint_callbacks
        )


def agree_on_stop(trainer: pl.Trainer, runtime: StageRuntime) -> None:
    """Stops all processes if one of them wants to. A collective."""
    if not trainer.strategy.reduce_boolean_decision(trainer.should_stop or runtime.stopping.wanted, all=False):
        return
    runtime.stopping.wanted = False
    trainer.should_stop = True


def _alone() -> bool:
    """Tells a metric that there are no processes to gather from."""
    return False


def _with_replicas() -> bool:
    """Tells a metric that there are replicas to gather from."""
    return True


__all__ = ["StageCoordinator", "agree_on_stop"]
