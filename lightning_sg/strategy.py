"""The Lightning strategy that puts the stages of a network on several processes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sg._compat import (
    MultiProcessingLauncher,
    SubprocessScriptLauncher,
    default_process_group_backend,
    optimizers_to_device,
    set_rank_zero,
)
from lightning_sg.arguments import MOST_SECONDS, checked, instance, number, one_of, optional, whole
from lightning_sg.callback import callback_of
from lightning_sg.checkpoint.plugin import with_default
from lightning_sg.distributed.arrangement import Arrangement, OneProcessArrangement, SplitArrangement
from lightning_sg.distributed.coordination import StageCoordinator
from lightning_sg.distributed.processes import Processes
from lightning_sg.distributed.relaunching import RelaunchingLauncher
from lightning_sg.distributed.rendezvous import Rendezvous
from lightning_sg.distributed.reusable import ReusableStrategy
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.distributed.signals import EndedBySignal
from lightning_sg.distributed.startup import SplitOptions
from lightning_sg.distributed.support import (
    DDP_OPTIONS,
    StrategyOptions,
    check_away,
    check_callbacks,
    check_replays,
    check_snapshots,
    refuse_interactive,
)
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.lightning_api import Callback, CheckpointIO, TrainerFn, pl, rank_zero_warn
from lightning_sg.partition.paging import PagedParameters
from lightning_sg.plain import plain_checkpoint
from lightning_sg.runtime import Runtime
from lightning_sg.transport import COMPRESSIONS, Away, Chain, Compression, ProcessGrid, Watch
from lightning_sg.which_lightning import CHOICE, VARIABLE


class SyntheticGradientStrategy(ReusableStrategy):
    """Splits a LightningModule at its boundaries over the devices and trains the stages decoupled.

    ``Trainer(strategy="synthetic_gradients", devices=2)`` is all it takes for a model with a
    :class:`~lightning_sg.Boundary` in it; :class:`~lightning_sg.SyntheticGradients` in the trainer's callbacks names
    other boundaries and chooses predictors, ``delay`` and the rest. What is computed is what that callback
    computes in one process.

    Every process runs the user's own code on the same batches. The last stage is on global rank 0, where Lightning
    expects loggers, progress bar and checkpoints.

    Args:
        timeout: How many seconds a stage waits for its neighbour before it gives up with an error that names it. At
            most 30 days.
        start_method: How processes are started: ``"popen"`` runs the script again for each, ``"spawn"`` and
            ``"fork"`` do not. ``"fork"`` is for notebooks, and has a name: ``strategy="synthetic_gradients_notebook"``.
            Under torchrun or SLURM, none are started.
        wire: How activations and targets travel between processes in training: ``"full"`` unchanged, or, for slow
            links, ``"bf16"`` as bfloat16 or ``"int8"`` with a scale for each 256 values. The next stage then trains on
            the rounded activations. Validation, test and prediction always send them in full.
        clip_over: What ``Trainer(gradient_clip_val=...)`` takes the norm of: ``"stages"``, the stages of each process
            on their own, or ``"model"``, all stages, as in one process. With ``"model"`` every stage waits for all
            others in every step, so that nothing runs ahead.
        replicas: How many copies of the model are trained, each on its part of the data, with ``devices / replicas``
            processes each; their gradients are averaged as by DDP.
        ddp: Arguments for the :class:`~torch.nn.parallel.DistributedDataParallel` that averages them, such as
            ``{"find_unused_parameters": True}``.
        tied_weights: What to do about a parameter that stages on different processes use. ``"refuse"`` raises an error.
            ``"synchronize"`` gives each process a copy, and every copy the sum of their gradients, as one weight would
            have; these stages then wait for each other in every step.
        checkpoint: ``"whole"`` gathers all stages into one ordinary checkpoint. ``"sharded"`` has every process write
            its own stages into a folder, for models whose state does not fit one process; ``lightning-sg merge`` makes
            an ordinary checkpoint of it.
        away: How long a stage goes on by itself while a neighbour is silent; by default it waits.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default, the one that suits the device.
        **kwargs: Arguments of Lightning's ``ParallelStrategy``, such as ``parallel_devices`` and ``checkpoint_io``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range.
    """

    strategy_name = "synthetic_gradients"

    def __init__(
        self,
        timeout: float = 600.0,
        start_method: Literal["popen", "spawn", "fork"] = "popen",
        process_group_backend: str | None = None,
        wire: Compression = "full",
        clip_over: Literal["stages", "model"] = "stages",
        replicas: int = 1,
        ddp: dict[str, Any] | None = None,
        checkpoint: Literal["whole", "sharded"] = "whole",
        tied_weights: Literal["refuse", "synchronize"] = "refuse",
        away: Away | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        self.timeout = checked(name, "timeout", timeout, number(above=0, most=MOST_SECONDS))
        self.start_method = checked(name, "start_method", start_method, one_of("popen", "spawn", "fork"))
        backend = checked(name, "process_group_backend", process_group_backend, optional(one_of("nccl", "gloo")))
        self._process_group_backend = backend
        self.wire: Compression = checked(name, "wire", wire, one_of(*COMPRESSIONS))
        self.clip_over = checked(name, "clip_over", clip_over, one_of("stages", "model"))
        self.replicas = checked(name, "replicas", replicas, whole(1, 100_000))
        ddp = checked(name, "ddp", ddp, optional(DDP_OPTIONS))
        self.ddp = dict(ddp or {})
        self.checkpoint = checked(name, "checkpoint", checkpoint, one_of("whole", "sharded"))
        self.tied_weights = checked(name, "tied_weights", tied_weights, one_of("refuse", "synchronize"))
        self.away = checked(name, "away", away, optional(instance(Away)))
        self.num_nodes = 1
        self._layer_sync: Any = None  # Lightning puts it here, by this name, for `sync_batchnorm=True`
        self._processes = Processes()
        self._pages = PagedParameters()
        self._arrangement: Arrangement = OneProcessArrangement()

    # ------------------------------------------------------------------ processes

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """The number of processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def _all_processes(self) -> int:
        return self.num_nodes * self.num_processes

    @property
    def stages_in_parallel(self) -> int:
        """The number of processes that the stages of a replica are on."""
        return self._all_processes // self.replicas

    @property
    def replica(self) -> int:
        """Which replica this process is of, from 0."""
        return self.global_rank // self.stages_in_parallel

    @property
    def runtime(self) -> Runtime:
        """Runs the stages; the callback asks for it at its set-up."""
        return self._arrangement.runtime

    @property
    def world_size(self) -> int:
        """Always 1: stages are not data-parallel ranks; see :attr:`replicas`.

        Lightning synchronizes ``world_size > 1`` processes before every batch, which would chain the stages together.
        """
        return 1

    @property
    def is_distributed(self) -> bool:
        """Whether there are replicas, each with a part of the data."""
        return self.replicas > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All stages of a replica get the same samples."""
        return {"num_replicas": self.replicas, "rank": self.replica}

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally:
            return
        os.environ[VARIABLE] = CHOICE.package  # the new processes may import in another order
        if self.start_method == "popen":
            refuse_interactive()
            restarts = self.away is not None and self.away.folder is not None
            kind = RelaunchingLauncher if restarts else SubprocessScriptLauncher
            self._launcher = kind(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = MultiProcessingLauncher(self, start_method=self.start_method)

    def set_world_ranks(self) -> None:
        """Tells the cluster environment and Lightning's rank-zero tools which process this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self._all_processes)
        set_rank_zero(self.global_rank)

    def setup_environment(self) -> None:
        """Opens the process group and brings in the callbacks, before any of their hooks run."""
        super().setup_environment()
        self.set_world_ranks()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        callback = callback_of(trainer)
        processes = self._all_processes
        if processes % self.replicas:
            raise SyntheticGradientsError(
                f"{processes} processes cannot hold {self.replicas} replicas with the same number of stages each: "
                "devices × num_nodes must be a multiple of SyntheticGradientStrategy(replicas=...)."
            )
        if processes == 1:
            rank_zero_warn(
                "strategy='synthetic_gradients' has one device, so all stages run in one process, decoupled but not in "
                "parallel. Pass Trainer(devices=...) to split them."
            )
            self._arrangement = OneProcessArrangement()
            return
        check_callbacks(trainer)
        backend = self._process_group_backend or default_process_group_backend(self.root_device)
        if self.away is not None:
            check_away(self.replicas, self.tied_weights, self.clip_over, backend)
            check_snapshots(self.away, self.lightning_module)
            check_replays(callback.settings)
        options = SplitOptions(self.wire, self.tied_weights == "synchronize", self.ddp, self.away)
        grid, chain = self._meet(backend)
        chain.watch.check = EndedBySignal(trainer)
        runtime = StageRuntime(grid, chain, options, self._pages, callback)
        self._processes.run(runtime, trainer)
        self._arrangement = SplitArrangement(
            runtime,
            self.lightning_module,
            callback,
            self._pages,
            StrategyOptions(
                self.clip_over, self.checkpoint, self.tied_weights, self.replicas, self._layer_sync is not None
            ),
        )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [other for other in callbacks if not isinstance(other, StageCoordinator)]
        callbacks.insert(0, StageCoordinator(runtime, self._arrangement.saving.gather_weights))

    def _meet(self, backend: str) -> tuple[ProcessGrid, Chain]:
        """Brings the processes together, once for all runs of this strategy."""
        assert self.cluster_environment is not None
        rendezvous = Rendezvous(self.cluster_environment, self._all_processes, self.timeout)
        grid = ProcessGrid.of(
            self.global_rank, self._all_processes, self.replicas, self.root_device, backend, self.timeout
        )
        return self._processes.meet(rendezvous, grid, Watch(self.timeout, away=self.away))

    def leave_trainer(self) -> None:
        """Another Trainer takes the strategy, perhaps with other processes."""
        self._processes.part()

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: pl.Trainer) -> None:
        """Places the module and makes the optimizers; the split itself waits for the first batch."""
        assert self.accelerator is not None
        assert self.model is not None
        self._arrangement.prepare(trainer, self.precision_plugin, self.root_device)
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self._arrangement.check_setup(self.optimizers)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            optimizers_to_device(self.optimizers, self.root_device)

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The user's plugin, or one that writes and reads whole checkpoints atomically and checked."""
        self._checkpoint_io = with_default(self._checkpoint_io)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Around ``configure_model``: several processes make the model on the host, as each holds its own stages."""
        default, precision = super().tensor_init_context(empty_init), self.precision_plugin.tensor_init_context()
        with self._arrangement.initializing(default, precision):
            yield

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around ``configure_model``: what it makes goes to files; its own stages come to memory later."""
        with self._arrangement.making_model(self.lightning_module):
            yield

    def model_to_device(self) -> None:
        """Moves the module to this process's device, but for weights that wait in files for their process."""
        assert self.model is not None
        with self._pages.hidden(self.model):
            self.model.to(self.root_device)

    def process_dataloader(self, dataloader: object) -> object:
        """Seeds the workers of all stages' loaders alike."""
        self._arrangement.seed_workers(dataloader)
        return dataloader

    def on_validation_end(self) -> None:
        """After all callbacks: a stop that one process's callback wants is every process's."""
        assert self.lightning_module is not None
        self._arrangement.agree_on_stop(self.lightning_module.trainer)

    # ------------------------------------------------------------------ steps

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Moves a batch as Lightning does; notes which one it is, to compare with the neighbours."""
        self.runtime.take_batch(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``training_step`` on this process's stages."""
        with self.precision_plugin.train_step_context():
            return self._step("training_step", args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``validation_step`` on this process's stages."""
        with self.precision_plugin.val_step_context():
            return self._step("validation_step", args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``test_step`` on this process's stages."""
        with self.precision_plugin.test_step_context():
            return self._step("test_step", args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``predict_step`` on this process's stages."""
        with self.precision_plugin.predict_step_context():
            return self._step("predict_step", args, kwargs)

    def _step(self, name: str, args: Any, kwargs: Any) -> Any:
        return self.runtime.run(name, getattr(self.lightning_module, name), args, kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Goes backward through this process's stages and answers the stage before."""
        default = super().backward

        def run(loss: Tensor, **more: Any) -> Tensor:
            if more:
                self._check_backward()
            return default(loss, optimizer, *args, **{**kwargs, **more})

        return self.runtime.backward(closure_loss, run)

    def _check_backward(self) -> None:
        """Refuses a module's own ``backward`` that cannot be told to keep the graph."""
        assert self.lightning_module is not None
        parameters = inspect.signature(self.lightning_module.backward).parameters
        if "retain_graph" not in parameters and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            raise SyntheticGradientsError(
                f"{type(self.lightning_module).__name__}.backward does not take `retain_graph`, which a batch whose "
                "exact gradient travels up needs. Give it `*args, **kwargs` and hand them to `loss.backward`, or use "
                "SyntheticGradients(exact=ExactGradients(every=0))."
            )

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around a step whose gradients are accumulated: replicas average them at the last."""
        with self.runtime.accumulating():
            yield

    # ------------------------------------------------------------------ collectives

    def barrier(self, name: str | None = None) -> None:
        """Waits for all processes."""
        self._arrangement.collectives.barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Sends an object from one process to all."""
        return self._arrangement.collectives.broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over the replicas, among the processes with the same stages."""
        return self._arrangement.collectives.reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Gathers a tensor from the replicas, among the processes with the same stages: ``(replicas, ...)``."""
        default = super().all_gather
        return self._arrangement.collectives.all_gather(
            tensor, group, lambda members: default(tensor, members, sync_grads), sync_grads=sync_grads
        )

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Asks all processes: whether all (or any) of them say yes."""
        return self._arrangement.collectives.vote(decision, all_of_them=all)

    # ------------------------------------------------------------------ state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole model's state, with the keys of the undivided model; of shards, this process's. A collective."""
        return self._arrangement.saving.weights(super().lightning_module_state_dict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer's state, on global rank 0; of shards, this process's. A collective."""
        inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        return self._arrangement.saving.optimizer_state(inner, super().optimizer_state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint: on global rank 0, or of shards, in each process of the first replica."""
        default = super().save_checkpoint
        checkpoint = plain_checkpoint(checkpoint)
        self._arrangement.saving.save(checkpoint, filepath, lambda: default(checkpoint, filepath, storage_options))

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint, plain values only by default; for shards, what is in none: tensors are loaded later."""
        default = super().load_checkpoint
        weights_only = (args[0] if args else kwargs.get("weights_only")) in (None, True)
        return self._arrangement.saving.load(
            checkpoint_path, weights_only, lambda: default(checkpoint_path, *args, **kwargs)
        )

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restores the weights of all stages."""
        default = super().load_model_state_dict
        self._arrangement.saving.load_weights(checkpoint, strict, lambda: default(checkpoint, strict))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the optimizers; of shards, the states of this process's stages, once it knows them."""
        super().load_optimizer_state_dict(checkpoint)
        self._arrangement.saving.load_optimizers(checkpoint, self.optimizers)

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        """Tells the neighbouring stages why this one stops."""
        self.runtime.fail(exception)
        self._processes.part()
        super().on_exception(exception)

    def teardown(self) -> None:
        """Makes the module whole on every process; after an error, touches nothing that others would wait for."""
        self._arrangement.finish()
        super().teardown()


__all__ = ["SyntheticGradientStrategy"]
