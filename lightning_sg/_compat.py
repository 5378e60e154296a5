"""Collects every private name that this package uses from torch and Lightning.

Each comes with the reason why no public name will do. ``tests/test_compat.py`` fails and names the symbol if a new
release moves one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Calls an operation on a tensor of a user's class as on a plain one. torch documents it, but only under this name.
from torch._C import DisableTorchFunctionSubclass

# torch exports its stores under no public name, and has no public way to get the one of the process group.
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

# Decomposes operations in Python, as torch.compile does. Fake recurrent layers on a GPU need it, because cuDNN reads
# the data of their weights.
from torch._dispatch.python import enable_python_dispatcher

# Tensors with a shape, dtype and device but no data. torch documents FakeTensorMode but exports it nowhere.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

# Lets us add a zero in place to a loss that an operation may have saved. There is no public way to say that the value
# stays the same.
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as value_unchanged
from torch.distributed.distributed_c10d import _get_default_store as default_store

# Sees every operation, also in the backward pass. torch documents it, but only under this name.
from torch.utils._python_dispatch import TorchDispatchMode

# Public pytree functions arrived in torch long after 2.6; these have been stable since 2.0.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from lightning_sg import lightning_api
from lightning_sg.lightning_api import ModelCheckpoint, ParallelStrategy, pl

# Lightning has no public way for a strategy to choose its launcher or to open the process group.
default_process_group_backend = lightning_api._get_default_process_group_backend_for_device
init_dist_connection = lightning_api._init_dist_connection
MultiProcessingLauncher = lightning_api._MultiProcessingLauncher
SubprocessScriptLauncher = lightning_api._SubprocessScriptLauncher

# Reduces what is logged with `sync_dist=True` as Lightning's own strategies do, with every name of the operation.
reduce_over = lightning_api._sync_ddp_if_available
optimizers_to_device = lightning_api._optimizers_to_device

# The type of Lightning's loops, to find those in another.
Loop = lightning_api._Loop

# Tells DistributedDataParallel after the forward pass that the coming backward pass shall average gradients.
prepare_for_backward = lightning_api.prepare_for_backward


def set_rank_zero(rank: int) -> None:
    """Tells Lightning's rank-zero decorators which process this is: each carries the rank as an attribute."""
    for decorator in (lightning_api.rank_zero_only, lightning_api.fabric_rank_zero_only):
        decorator.rank = rank  # type: ignore[attr-defined]


def saves_at_step(checkpoint: ModelCheckpoint, step: int) -> bool:
    """Whether a checkpoint callback may save at ``step``. With a time interval it may at every step.

    ModelCheckpoint has no public attribute for it.
    """
    every = checkpoint._every_n_train_steps
    return checkpoint._train_time_interval is not None or (every > 0 and step % every == 0)


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether what the current training batch logs reaches the loggers. Lightning's own callbacks ask like this."""
    return trainer._logger_connector.should_update_logs


def logged_step(trainer: pl.Trainer) -> int:
    """The step under which the current training batch is logged. Lightning's own callbacks read it like this."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


@contextmanager
def progressed(module: nn.Module, steps: int, epochs: int) -> Iterator[None]:
    """Has a module's trainer be at a later optimizer step and epoch inside the context, as far as a step can see.

    Lightning computes ``global_step`` and ``current_epoch`` from counters that it gives no public way to set.
    """
    trainer: Any = getattr(module, "_trainer", None)
    if trainer is None:
        yield
        return
    loop = trainer.fit_loop
    counters = [
        (loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total, steps),
        (loop.epoch_loop.manual_optimization.optim_step_progress.total, steps),
        (loop.epoch_progress.current, epochs),
    ]
    before = [(counter, dict(vars(counter))) for counter, _more in counters]
    for counter, more in counters:
        for name in {"completed", "processed"} & vars(counter).keys():
            setattr(counter, name, getattr(counter, name) + more)
    try:
        yield
    finally:
        for counter, values in before:
            vars(counter).update(values)


def belongs_to(strategy: ParallelStrategy, trainer: pl.Trainer) -> bool:
    """Whether ``trainer`` is the last that took ``strategy``. A Trainer keeps its own accelerator only in there."""
    return trainer._accelerator_connector.accelerator is strategy.accelerator


def goes_backward() -> bool:
    """Whether autograd runs a backward pass in this thread, so that a forward pass recomputes activations."""
    return torch._C._current_graph_task_id() != -1


def continue_loops(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Sets the training loop to the start of an epoch, as if it had come there itself.

    After ``load_state_dict`` alone, it would take itself for one that is resumed from a checkpoint, and Lightning would
    go on with the iterator of the data loader that it has made before.
    """
    trainer.fit_loop.load_state_dict(state)
    loops: list[Any] = [trainer.fit_loop]
    for loop in loops:
        for name in ("_restarting", "_loaded_from_state_dict", "_resuming_from_checkpoint"):
            if hasattr(loop, name):
                setattr(loop, name, False)
        loops += [child for child in vars(loop).values() if isinstance(child, Loop)]


def resume_from_nothing(trainer: pl.Trainer) -> None:
    """Has the trainer read no checkpoint, whatever ``fit`` is given: its path does not go by the strategy."""
    connector = trainer._checkpoint_connector
    resume = connector.resume_start
    connector.resume_start = lambda *args, **kwargs: resume(None)  # type: ignore[method-assign]


# torch raises these when code reads a value of a fake tensor.
DATA_DEPENDENT_ERRORS: tuple[type[BaseException], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "DisableTorchFunctionSubclass",
    "FakeTensor",
    "FakeTensorMode",
    "Loop",
    "MultiProcessingLauncher",
    "PrefixStore",
    "Store",
    "SubprocessScriptLauncher",
    "TCPStore",
    "TorchDispatchMode",
    "belongs_to",
    "continue_loops",
    "default_process_group_backend",
    "default_store",
    "enable_python_dispatcher",
    "goes_backward",
    "init_dist_connection",
    "logged_step",
    "logs_now",
    "optimizers_to_device",
    "prepare_for_backward",
    "reduce_over",
    "resume_from_nothing",
    "saves_at_step",
    "set_rank_zero",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "value_unchanged",
]
