"""All that differs for the strategy between one process and several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from lightning_sg.distributed.alike import check_alike, description
from lightning_sg.distributed.clipping import ClippingOverModel, ClippingOverStages
from lightning_sg.distributed.collectives import Collectives, GridCollectives, OneProcessCollectives
from lightning_sg.distributed.coordination import agree_on_stop
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.distributed.saving import OneProcessSaving, Saving, ShardedSaving, WholeSaving
from lightning_sg.distributed.scaler import StageScaler
from lightning_sg.distributed.startup import Cutter
from lightning_sg.distributed.support import (
    StrategyOptions,
    check_optimizers,
    check_options,
    clips_by_norm,
    warn_of_clipping,
)
from lightning_sg.lightning_api import pl, pl_worker_init_function
from lightning_sg.partition.materialize import materialize
from lightning_sg.partition.paging import PagedParameters
from lightning_sg.partition.placement import too_few_stages
from lightning_sg.rng import random_state, set_random_state
from lightning_sg.runtime import OneProcess, Runtime


class Arrangement(Protocol):
    """What the strategy delegates to.

    Attributes:
        runtime: Runs the steps.
        collectives: Lightning's collectives.
        saving: Checkpoints.
    """

    @property
    def runtime(self) -> Runtime: ...  # noqa: D102 (see above)

    @property
    def collectives(self) -> Collectives: ...  # noqa: D102

    @property
    def saving(self) -> Saving: ...  # noqa: D102

    def making_model(self, module: pl.LightningModule | None) -> AbstractContextManager[None]:
        """Around ``configure_model``."""

    def initializing(
        self, default: AbstractContextManager[None], precision: AbstractContextManager[None]
    ) -> AbstractContextManager[None]:
        """Around the making of a model's tensors."""

    def prepare(self, trainer: pl.Trainer, precision: Any, device: torch.device) -> None:
        """Before the model goes to its device."""

    def check_setup(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuses optimizers that cannot be used, and processes that were set up differently."""

    def seed_workers(self, dataloader: object) -> None:
        """Seeds the workers of a data loader."""

    def agree_on_stop(self, trainer: pl.Trainer) -> None:
        """After validation: whether training stops."""

    def finish(self) -> None:
        """The run is over."""


class OneProcessArrangement:
    """All stages are in this process: Lightning does everything."""

    def __init__(self) -> None:
        self.runtime: Runtime = OneProcess()
        self.collectives: Collectives = OneProcessCollectives()
        self.saving: Saving = OneProcessSaving()

    @contextmanager
    def making_model(self, module: pl.LightningModule | None) -> Iterator[None]:
        """Gives what was made on the meta device its memory and values."""
        yield
        if module is not None:
            materialize(module)

    def initializing(
        self, default: AbstractContextManager[None], precision: AbstractContextManager[None]
    ) -> AbstractContextManager[None]:
        """Lightning's own: on the device."""
        return default

    def prepare(self, trainer: pl.Trainer, precision: Any, device: torch.device) -> None:
        """Does nothing."""

    def check_setup(self, optimizers: Sequence[Optimizer]) -> None:
        """Does nothing: a boundary says itself what it does not support."""

    def seed_workers(self, dataloader: object) -> None:
        """Does nothing: Lightning seeds them."""

    def agree_on_stop(self, trainer: pl.Trainer) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


class SplitArrangement:
    """The stages are on several processes.

    Args:
        runtime: This process's part of the run.
        module: The module.
        cutter: Cuts the module.
        pages: The parameters that are in files.
        options: What the user said to the strategy.
    """

    def __init__(
        self,
        runtime: StageRuntime,
        module: pl.LightningModule,
        cutter: Cutter,
        pages: PagedParameters,
        options: StrategyOptions,
    ) -> None:
        self.runtime = runtime
        self.collectives: Collectives = GridCollectives(runtime.grid, runtime.meetings, runtime.status)
        kind = ShardedSaving if options.checkpoint == "sharded" else WholeSaving
        self.saving: Saving = kind(runtime, module, pages)
        self._module = module
        self._cutter = cutter
        self._pages = pages
        self._options = options

    @contextmanager
    def making_model(self, module: pl.LightningModule | None) -> Iterator[None]:
        """Puts what is made into files; what belongs to its own stages comes into memory later."""
        with self._pages.making():
            yield
            # Here, for weights of a checkpoint are loaded before `setup`.
            if module is not None:
                materialize(module)

    def initializing(
        self, default: AbstractContextManager[None], precision: AbstractContextManager[None]
    ) -> AbstractContextManager[None]:
        """On the host, as a device holds its own stages only."""
        return precision

    def prepare(self, trainer: pl.Trainer, precision: Any, device: torch.device) -> None:
        """Cuts the model if that waited for ``configure_model``; checks options; shares random numbers.

        Raises:
            PartitionError: If there are fewer stages than processes.
            SyntheticGradientsError: If options exclude each other.
        """
        self._cut(trainer)
        scaler = getattr(precision, "scaler", None)
        check_options(self._options, trainer, self._module, scaled=scaler is not None)
        if scaler is not None and not isinstance(scaler, StageScaler):
            # Each process scales its own surrogate loss, by a factor of its own once one of them has overflowed.
            precision.scaler = StageScaler(device, scaler)
        if self._options.clip_over == "model":
            # Lightning's own place for what clipping means; `clip_gradients` of the module ends there too.
            precision.clip_grad_by_norm = ClippingOverModel(self.runtime, precision.main_params)
        else:
            clips = clips_by_norm(trainer)
            if clips:
                warn_of_clipping("gradient_clip_val")
            precision.clip_grad_by_norm = ClippingOverStages(precision, said=clips)
        set_random_state(self.collectives.broadcast(random_state(device), 0), device)

    def _cut(self, trainer: pl.Trainer) -> None:
        cutter, stages = self._cutter, len(self.runtime.grid.ranks)
        if not cutter.is_cut:  # the module was made in `configure_model`, after the callback's `setup`
            cutter.cut(trainer, self._module)
        count = len(self.runtime.stage.session.boundaries) + 1
        if count < stages and not cutter.undecided:
            raise too_few_stages(count, stages)

    def check_setup(self, optimizers: Sequence[Optimizer]) -> None:
        """See :func:`~lightning_sg.distributed.support.check_optimizers` and :func:`check_alike`."""
        check_optimizers(optimizers)
        runtime = self.runtime
        own = description(self._module, self._cutter.settings, (runtime.options, self._options), optimizers)
        described = dict(zip(runtime.grid.ranks, runtime.meetings.gather("set-up", own)))
        with runtime.status.meeting("set-up"):
            replicas = runtime.grid.peers.gather(described)
        check_alike({rank: words for each in replicas for rank, words in each.items()})

    def seed_workers(self, dataloader: Any) -> None:
        """Seeds the workers of all stages' loaders alike, by replica; Lightning would seed them by rank."""
        seeded = int(os.environ.get("PL_SEED_WORKERS", "0"))
        if seeded and getattr(dataloader, "worker_init_fn", 0) is None:
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=self.runtime.grid.replica)

    def agree_on_stop(self, trainer: pl.Trainer) -> None:
        """After all callbacks: a stop that one process's callback wants is every process's."""
        agree_on_stop(trainer, self.runtime)

    def finish(self) -> None:
        """Makes the module whole on every process; after an error, touches nothing that others would wait for."""
        if not self.runtime.status.failed:
            self.runtime.close()
            self.saving.gather_weights()
            self.runtime.end()


__all__ = ["Arrangement", "OneProcessArrangement", "SplitArrangement"]
