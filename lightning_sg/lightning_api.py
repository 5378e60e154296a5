"""The names of Lightning that this package uses, from whichever of Lightning's two packages the user's code imported.

No other module imports Lightning. The private names among them are explained in :mod:`lightning_sg._compat`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sg.which_lightning import CHOICE, UNIFIED

# The two branches must have the same names: tests/test_lightning_api.py compares them.
if TYPE_CHECKING or CHOICE.package == UNIFIED:
    import lightning.pytorch as pl
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, TorchCheckpointIO
    from lightning.fabric.utilities import move_data_to_device
    from lightning.fabric.utilities.cloud_io import get_filesystem
    from lightning.fabric.utilities.distributed import (
        _get_default_process_group_backend_for_device,
        _init_dist_connection,
        _sync_ddp_if_available,
    )
    from lightning.fabric.utilities.optimizer import _optimizers_to_device
    from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
    from lightning.fabric.utilities.seed import pl_worker_init_function
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.loops.loop import _Loop
    from lightning.pytorch.overrides.distributed import prepare_for_backward
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
    from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info, rank_zero_only, rank_zero_warn
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.types import STEP_OUTPUT
else:
    import pytorch_lightning as pl
    from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment, TorchCheckpointIO
    from lightning_fabric.utilities import move_data_to_device
    from lightning_fabric.utilities.cloud_io import get_filesystem
    from lightning_fabric.utilities.distributed import (
        _get_default_process_group_backend_for_device,
        _init_dist_connection,
        _sync_ddp_if_available,
    )
    from lightning_fabric.utilities.optimizer import _optimizers_to_device
    from lightning_fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
    from lightning_fabric.utilities.seed import pl_worker_init_function
    from pytorch_lightning.accelerators import Accelerator
    from pytorch_lightning.callbacks import Callback, ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.loops.loop import _Loop
    from pytorch_lightning.overrides.distributed import prepare_for_backward
    from pytorch_lightning.plugins import Precision
    from pytorch_lightning.profilers import Profiler
    from pytorch_lightning.strategies import ParallelStrategy, StrategyRegistry
    from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
    from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
    from pytorch_lightning.trainer.states import TrainerFn
    from pytorch_lightning.utilities import GradClipAlgorithmType, rank_zero_info, rank_zero_only, rank_zero_warn
    from pytorch_lightning.utilities.exceptions import SIGTERMException
    from pytorch_lightning.utilities.model_helpers import is_overridden
    from pytorch_lightning.utilities.types import STEP_OUTPUT

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

#: As in Lightning's command line, which is slow to import.
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]


def __getattr__(name: str) -> Any:
    """Imports what only the command line needs when it is asked for."""
    if name in ("LightningArgumentParser", "LightningCLI"):
        return getattr(import_module(f"{pl.__name__}.cli"), name)
    raise AttributeError(name)


#: The name of the logger that users of the chosen package see.
LOGGER = pl.__name__

__all__ = [
    "LOGGER",
    "STEP_OUTPUT",
    "Accelerator",
    "CSVLogger",
    "Callback",
    "CheckpointIO",
    "ClusterEnvironment",
    "DummyLogger",
    "GradClipAlgorithmType",
    "LRSchedulerCallable",
    "LightningArgumentParser",
    "LightningCLI",
    "ModelCheckpoint",
    "OptimizerCallable",
    "ParallelStrategy",
    "Precision",
    "Profiler",
    "SIGTERMException",
    "StrategyRegistry",
    "TorchCheckpointIO",
    "TrainerFn",
    "_Loop",
    "_MultiProcessingLauncher",
    "_SubprocessScriptLauncher",
    "_get_default_process_group_backend_for_device",
    "_init_dist_connection",
    "_optimizers_to_device",
    "_sync_ddp_if_available",
    "fabric_rank_zero_only",
    "get_filesystem",
    "is_overridden",
    "move_data_to_device",
    "pl",
    "pl_worker_init_function",
    "prepare_for_backward",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
