"""Short trainings of a module in processes of their own, which leave the module and the data as they are."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessException, start_processes

from lightning_sg.callback import SyntheticGradients
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import CSVLogger, pl
from lightning_sg.tools.advise.measure import LOG, SKIPPED, Measured, read_measured
from lightning_sg.tools.advise.memory import PeakMemory
from lightning_sg.tools.timeline import Timeline


@dataclass(frozen=True)
class Job:
    """What the processes of a training are given.

    Attributes:
        module: The module.
        data: A data module or a training loader.
        steps: How many steps are timed.
        folder: Where to write.
        trainer: More options of the Trainer.
        processes: The number of processes.
        callback: The options of the callback; ``None`` for plain backpropagation.
        port: A free port, where the processes meet.
    """

    module: pl.LightningModule
    data: Any
    steps: int
    folder: Path
    trainer: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    callback: Mapping[str, Any] | None = None
    port: int = 0


def run(job: Job, start_method: str) -> Measured:
    """Runs a training.

    Args:
        job: What is trained.
        start_method: How its processes are started: ``"fork"`` or ``"spawn"``.

    Raises:
        SyntheticGradientsError: If it fails, with what went wrong in the first process that did.
    """
    job.folder.mkdir()
    what = "plain backpropagation" if job.callback is None else f"boundaries {job.callback['boundaries']}"
    try:
        start_processes(_train, (job, start_method), nprocs=job.processes, start_method=start_method)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SyntheticGradientsError(
            f"The model, the data or the callback cannot be given to another process: {error}. Define their classes "
            "and functions in a file that can be imported, or use advise(..., start_method='fork'), on a CPU."
        ) from error
    except ProcessException as error:
        raise SyntheticGradientsError(
            f"A training of {SKIPPED + job.steps} steps with {what} failed. {error}"
        ) from error
    return read_measured(job.folder)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _train(rank: int, job: Job, start_method: str) -> None:
    """Trains as one process."""
    if start_method == "fork":
        # Threads of the process that forked this one are gone, and OpenMP would wait for them.
        torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))
    # All are there already, so Lightning is told what torchrun would tell it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "advise"}
    os.environ |= {"WORLD_SIZE": str(job.processes), "LOCAL_WORLD_SIZE": str(job.processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port)}
    warnings.simplefilter("ignore")  # of short runs, loaders without workers, and the like
    logging.disable(logging.INFO)
    pl.seed_everything(0, verbose=False)
    callbacks: list[Any] = [PeakMemory(str(job.folder))]
    if job.callback is not None:
        callbacks.append(SyntheticGradients(**job.callback))
    options: dict[str, Any] = {
        "strategy": "synthetic_gradients" if job.processes > 1 else "auto",
        "devices": job.processes,
        "max_steps": SKIPPED + job.steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": CSVLogger(job.folder, name=LOG),
        "profiler": Timeline(job.folder, skip=SKIPPED, batches=job.steps),
        "callbacks": callbacks,
    }
    trainer = pl.Trainer(**{**options, **job.trainer})
    # What comes to a spawned process shares memory with the process that started it.
    trainer.fit(copy.deepcopy(job.module), job.data)


__all__ = ["Job", "free_port", "run"]
