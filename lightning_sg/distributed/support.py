"""Refuses by name what does not go with a split run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_sg.arguments import Check
from lightning_sg.crossings.evaluations import evaluated_again
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import Callback, GradClipAlgorithmType, pl, rank_zero_warn
from lightning_sg.settings import Settings
from lightning_sg.training.base import BoundaryTrainer
from lightning_sg.transport import Away


def _ddp_options(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError
    known = set(inspect.signature(DistributedDataParallel).parameters) - {"module", "process_group"}
    unknown = sorted(map(repr, set(value) - known))
    if unknown:
        raise ValueError(f"It takes no {', '.join(unknown)}.")
    return value


#: What the argument ``ddp`` may be. The module and the process group are the strategy's.
DDP_OPTIONS = Check("a dict of arguments of DistributedDataParallel", _ddp_options)


# Callbacks of Lightning's that cannot work on several processes, by the name of their class, each with the reason. Not
# every version of Lightning has them all.
_REFUSED = {
    "LearningRateFinder": "needs the loss in every process, and only the last stage has it. Find the rate in one "
    "process, with the SyntheticGradients callback alone",
    "SpikeDetection": "needs the loss in every process, and only the last stage has it. SyntheticGradients("
    "on_non_finite='skip') leaves batches out whose loss or gradients are not finite",
    "BatchSizeFinder": "(and Tuner.scale_batch_size) tries batches until memory runs out, and one process that fails "
    "ends all. Find the size in one process, with the SyntheticGradients callback alone",
    "ModelPruning": "puts other parameters into the model while it trains, and each process has those of its own "
    "stages only. Prune the trained model, in one process",
}


@dataclass(frozen=True)
class StrategyOptions:
    """What the user said to the strategy, as far as options exclude each other.

    Attributes:
        clip_over: What clipping takes the norm of.
        checkpoint: How checkpoints are written.
        tied_weights: What to do about tied weights.
        replicas: The number of replicas.
        sync_batchnorm: Whether Lightning was asked to synchronize BatchNorm.
    """

    clip_over: Literal["stages", "model"]
    checkpoint: Literal["whole", "sharded"]
    tied_weights: Literal["refuse", "synchronize"]
    replicas: int
    sync_batchnorm: bool


def check_callbacks(trainer: pl.Trainer) -> None:
    """Refuses callbacks that need what a process does not have.

    Raises:
        SyntheticGradientsError: If there is one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind in type(callback).__mro__:
            if kind.__name__ in _REFUSED and issubclass(kind, Callback):
                raise SyntheticGradientsError(f"{kind.__name__} {_REFUSED[kind.__name__]}.")


def check_away(replicas: int, tied_weights: str, clip_over: str, backend: str) -> None:
    """Refuses what has stages wait for each other in every step, where one may be away.

    Raises:
        SyntheticGradientsError: If something does.
    """
    waits = {
        "replicas > 1": replicas > 1,
        "tied_weights='synchronize'": tied_weights == "synchronize",
        "clip_over='model'": clip_over == "model",
        "tensors that travel over NCCL (use process_group_backend='gloo')": backend == "nccl",
    }
    for what, given in waits.items():
        if given:
            raise SyntheticGradientsError(
                f"SyntheticGradientStrategy(away=...) does not go with {what}: then a stage cannot go on without the "
                "others."
            )


def check_snapshots(away: Away, module: pl.LightningModule) -> None:
    """Refuses what a process that is started anew could not catch up with.

    Raises:
        SyntheticGradientsError: For manual optimization, which does not count a batch that is skipped as a step.
    """
    if away.folder is not None and not module.automatic_optimization:
        raise SyntheticGradientsError(
            "Away(folder=...) does not go with manual optimization: a process that was started anew could not count "
            "the steps that it leaves out. Use Away() without a folder."
        )


def check_replays(settings: Settings) -> None:
    """Refuses what a stage cannot run again if its neighbour was away.

    Args:
        settings: What the user said to the callback.

    Raises:
        SyntheticGradientsError: If stages run old batches again.
    """
    if settings.late is not None and settings.late.recompute:
        raise SyntheticGradientsError(
            "SyntheticGradientStrategy(away=...) does not go with LateGradients(recompute=True): what a stage has to "
            "run again would be lost with it. Use recompute=False."
        )


def check_options(options: StrategyOptions, trainer: pl.Trainer, module: nn.Module, *, scaled: bool) -> None:
    """Refuses options of strategy and trainer that do not go together.

    Args:
        options: What the user said to the strategy.
        trainer: The trainer.
        module: The model.
        scaled: Whether a gradient scaler scales the loss.

    Raises:
        SyntheticGradientsError: If two exclude each other.
    """
    _refuse_watched_parameters(module)
    by_norm = clips_by_norm(trainer)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = any(kind.__name__ == "WeightAveraging" for each in callbacks for kind in type(each).__mro__)
    if options.checkpoint == "sharded" and averaging:  # a class that Lightning 2.5 does not have
        raise SyntheticGradientsError(
            "checkpoint='sharded' does not support WeightAveraging, which saves a second whole model. Use "
            "checkpoint='whole'."
        )
    if options.replicas > 1 and options.sync_batchnorm:
        raise SyntheticGradientsError(
            "sync_batchnorm=True is not supported with replicas. Use a norm that needs no batch, such as "
            "GroupNorm or LayerNorm, or train without."
        )
    if options.tied_weights == "synchronize" and (scaled or (by_norm and options.clip_over == "stages")):
        raise SyntheticGradientsError(
            "tied_weights='synchronize' needs every copy to take the same step, which a loss scale of each "
            "process (precision='16-mixed') and clipping by the norm of each process's stages prevent. Use "
            "'bf16-mixed', and clip_over='model'."
        )
    if scaled and options.clip_over == "model":
        raise SyntheticGradientsError(
            "clip_over='model' needs gradients that are finite in every process, and with precision='16-mixed' "
            "they overflow in one at a time. Use 'bf16-mixed', or clip_over='stages'."
        )


def clips_by_norm(trainer: pl.Trainer) -> bool:
    """Whether the trainer clips gradients by their norm."""
    return bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE


def may_wait(settings: Settings, trainers: Iterable[BoundaryTrainer]) -> bool:
    """Whether a stage may wait for the true gradient of a batch before it goes backward.

    Args:
        settings: What the user said to the callback.
        trainers: What supplies the gradients at the boundaries.
    """
    guard = settings.guard
    couples = guard is not None and guard.fallback == "couple"
    return bool(settings.exact.warm_up or couples or any(trainer.waits for trainer in trainers))


def warn_of_clipping(what: str) -> None:
    """Says what clipping by norm means where it goes by stages.

    Args:
        what: What clips.
    """
    rank_zero_warn(
        f"{what} clips by the norm of each process's own stages; in one process the norm is that "
        "of the whole model. SyntheticGradientStrategy(clip_over='model') takes that one, at the price of "
        "stages that wait for each other; clipping by value is the same in both."
    )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers that evaluate a step several times and read values of gradients before they do so.

    The others show it by what they do.

    Raises:
        BoundaryError: If there is one.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise evaluated_again(optimizers)


def _refuse_watched_parameters(module: nn.Module) -> None:
    """Refuses Weights & Biases' hook that reads every parameter in each forward pass."""
    # wandb keeps the names of its hooks there, to find them again.
    names = [name for child in module.modules() for name in getattr(child, "_wandb_hook_names", ())]
    if any(name.startswith("parameters/") for name in names):
        raise SyntheticGradientsError(
            "WandbLogger.watch(log='parameters') and log='all' read every parameter in each step, and a process "
            "has those of its own stages only. Use watch(log='gradients'), which shows those of the last process."
        )


def refuse_interactive() -> None:
    """Says what to do where there is no script that new processes could run: in a notebook or at a prompt."""
    if hasattr(sys, "ps1") or sys.flags.interactive:
        raise SyntheticGradientsError(
            "strategy='synthetic_gradients' runs the script again in each new process, and a notebook or a prompt has "
            "none. Use strategy='synthetic_gradients_notebook' (SyntheticGradientStrategy(start_method="
            "'fork')), which copies this process; on GPUs, call it before anything uses CUDA. Or run a script."
        )


__all__ = [
    "DDP_OPTIONS",
    "StrategyOptions",
    "check_away",
    "check_callbacks",
    "check_optimizers",
    "check_options",
    "check_replays",
    "check_snapshots",
    "clips_by_norm",
    "may_wait",
    "refuse_interactive",
    "warn_of_clipping",
]
