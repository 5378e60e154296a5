"""Everything private that this package takes from torch and Lightning, in one place.

Each name is listed with the reason why no public one does. ``tests/test_compat.py`` fails, naming the
symbol, when a new release moves one of them.
"""

from __future__ import annotations

# Lightning has no public way for a strategy to choose its launcher or to open the process group.
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device as default_process_group_backend,
)
from lightning.fabric.utilities.distributed import _init_dist_connection as init_dist_connection

# How its own strategies reduce what is logged with `sync_dist=True`, for every way to name the operation.
from lightning.fabric.utilities.distributed import _sync_ddp_if_available as reduce_over
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device

# `rank_zero_only` of both packages carries the rank as an attribute that Lightning's strategies set.
from lightning.fabric.utilities.rank_zero import rank_zero_only as _fabric_rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

# DistributedDataParallel is told in the forward pass that a backward pass is to average gradients; this tells it later.
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies.launchers.multiprocessing import (
    _MultiProcessingLauncher as MultiProcessingLauncher,
)
from lightning.pytorch.strategies.launchers.subprocess_script import (
    _SubprocessScriptLauncher as SubprocessScriptLauncher,
)
from lightning.pytorch.utilities import rank_zero_only as _rank_zero_only

# Takes operations apart in Python where torch can, as torch.compile does. A GPU's recurrent layers must be, as cuDNN
# looks for the data of their weights.
from torch._dispatch.python import enable_python_dispatcher

# Tensors with a shape, dtype and device but no data. torch documents FakeTensorMode but exports it nowhere.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

# A zero is added in place to a loss that the operation before it may have saved; nothing public vouches for its value.
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as value_unchanged

# Sees every operation, those of the backward pass too. torch documents it, but only under this name.
from torch.utils._python_dispatch import TorchDispatchMode

# Public pytree functions arrived in torch long after 2.6; these have been stable since 2.0.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


def set_rank_zero(rank: int) -> None:
    """Tells Lightning's rank-zero decorators which process this is."""
    _rank_zero_only.rank = _fabric_rank_zero_only.rank = rank  # type: ignore[attr-defined]


def saves_at_step(checkpoint: ModelCheckpoint, step: int) -> bool:
    """Whether a checkpoint callback may save at ``step``; ModelCheckpoint has no public attribute for it.

    With a time interval all processes are asked at every batch.
    """
    every = checkpoint._every_n_train_steps
    return checkpoint._train_time_interval is not None or (every > 0 and step % every == 0)


def logs_now(trainer: Trainer) -> bool:
    """Whether loggers are given what a training batch logs; Lightning's own callbacks ask the same way."""
    return trainer._logger_connector.should_update_logs


# What torch raises when code on data-less tensors asks for a value.
DATA_DEPENDENT_ERRORS: tuple[type[BaseException], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "FakeTensor",
    "FakeTensorMode",
    "MultiProcessingLauncher",
    "SubprocessScriptLauncher",
    "TorchDispatchMode",
    "default_process_group_backend",
    "enable_python_dispatcher",
    "init_dist_connection",
    "logs_now",
    "optimizers_to_device",
    "prepare_for_backward",
    "reduce_over",
    "saves_at_step",
    "set_rank_zero",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "value_unchanged",
]
