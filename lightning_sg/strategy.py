"""The Lightning strategy that puts the stages of a network on several processes."""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_sg._compat import (
    MultiProcessingLauncher,
    SubprocessScriptLauncher,
    default_process_group_backend,
    init_dist_connection,
    optimizers_to_device,
    reduce_over,
    set_rank_zero,
)
from lightning_sg.batch.fingerprint import fingerprint
from lightning_sg.callback import SyntheticGradients
from lightning_sg.checkpoint.sharded import is_sharded, load_optimizers, load_rest, load_weights, merge, own_weights
from lightning_sg.checkpoint.sharded import save as save_shards
from lightning_sg.checkpoint.whole import gather_weights, own_optimizer_state
from lightning_sg.distributed.coordination import StageCoordinator, agree_on_stop
from lightning_sg.distributed.restarts import store_of_attempt
from lightning_sg.distributed.runtime import StageRuntime
from lightning_sg.distributed.scaler import StageScaler
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.partition.materialize import materialize
from lightning_sg.partition.paging import PagedParameters
from lightning_sg.partition.placement import too_few_stages
from lightning_sg.replicas import Replicas
from lightning_sg.rng import random_state, set_random_state
from lightning_sg.runtime import Exchange
from lightning_sg.transport import CODINGS, Coding

_SHARDS = "lightning_sg_shards"  # in a checkpoint that is being loaded: the folder with its tensors


class SyntheticGradientStrategy(ParallelStrategy):
    """Splits a LightningModule at its boundaries over the devices and trains the stages decoupled.

    ``Trainer(strategy="synthetic_gradients", devices=2)`` is all it takes for a model with a
    :class:`~lightning_sg.Boundary` in it; :class:`~lightning_sg.SyntheticGradients` in the trainer's callbacks names
    other boundaries and chooses predictors, ``delay`` and the rest. What is computed is what that callback
    computes in one process.

    Every process runs the user's own code on the same batches. The last stage is on global rank 0, so loggers,
    progress bar and checkpoints are where Lightning expects them.

    Args:
        timeout: How many seconds a stage waits for its neighbour before it gives up with an error that names it.
        start_method: How processes are started: ``"popen"`` runs the script again for each, ``"spawn"`` and
            ``"fork"`` do not (``"fork"`` is for notebooks). Under torchrun or SLURM, none are started.
        wire: How activations and targets travel between processes in training: ``"full"`` as they are, ``"bf16"`` as
            bfloat16, or ``"int8"`` with a scale for each 256 values, for slow links. The next stage then trains on
            the rounded activations; validation, test and prediction always send them in full.
        clip_over: What ``Trainer(gradient_clip_val=...)`` takes the norm of: ``"stages"``, those of each process on
            their own, or ``"model"``, all of them, as in one process. For the latter every stage waits for all others
            in every step, so that nothing runs ahead any more.
        replicas: How many copies of the model are trained, each on its part of the data, with ``devices / replicas``
            processes each; their gradients are averaged as by DDP.
        ddp: Arguments for the :class:`~torch.nn.parallel.DistributedDataParallel` that averages them, such as
            ``{"find_unused_parameters": True}``.
        tied_weights: What to do about a parameter that stages on different processes use: ``"refuse"`` the split, or
            ``"synchronize"``: each process has a copy, and all get the sum of their gradients, as one weight would;
            these stages then wait for each other in every step.
        checkpoint: ``"whole"`` gathers all stages into one ordinary checkpoint, ``"sharded"`` has every process write
            its own into a folder, for models whose state does not fit one process; ``lightning-sg merge`` makes the one
            of the other.
        process_group_backend: ``"nccl"`` or ``"gloo"``; by default what the device calls for.
    """

    strategy_name = "synthetic_gradients"

    def __init__(
        self,
        timeout: float = 600.0,
        start_method: Literal["popen", "spawn", "fork"] = "popen",
        process_group_backend: str | None = None,
        wire: Coding = "full",
        clip_over: Literal["stages", "model"] = "stages",
        replicas: int = 1,
        ddp: dict[str, Any] | None = None,
        checkpoint: Literal["whole", "sharded"] = "whole",
        tied_weights: Literal["refuse", "synchronize"] = "refuse",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if replicas < 1:
            raise ValueError(f"replicas is how many copies of the model are trained, at least 1, not {replicas}.")
        if timeout <= 0:
            raise ValueError(f"timeout is in seconds and must be positive, not {timeout}.")
        if wire not in CODINGS:
            raise ValueError(f"wire is one of {CODINGS}, not {wire!r}.")
        for name, value, (one, other) in (
            ("clip_over", clip_over, ("stages", "model")),
            ("checkpoint", checkpoint, ("whole", "sharded")),
            ("tied_weights", tied_weights, ("refuse", "synchronize")),
        ):
            if value not in (one, other):
                raise ValueError(f"{name} is '{one}' or '{other}', not {value!r}.")
        self.checkpoint = checkpoint
        self.tied_weights = tied_weights
        self.timeout = timeout
        self.clip_over = clip_over
        self.wire: Coding = wire
        self.start_method = start_method
        self.replicas = replicas
        self.ddp = dict(ddp or {})
        self.num_nodes = 1
        self._process_group_backend = process_group_backend
        self._layer_sync: Any = None  # Lightning puts it here, by this name, for `sync_batchnorm=True`
        self._host_group: Any = None
        self._stage_group: Any = None
        self._peers = Replicas()
        self._pages = PagedParameters()
        self._runtime: StageRuntime | None = None

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
    def exchange(self) -> Exchange:
        """Where the callback's predictors live; it asks at its set-up."""
        return self._runtime or Exchange()

    @property
    def world_size(self) -> int:
        """1, whatever the number of processes; that of copies of the model is :attr:`replicas`.

        Lightning synchronises ``world_size > 1`` processes before every batch, which would chain the stages together.
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
        if self.start_method == "popen":
            self._launcher = SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
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
        callback = self._find_callback(trainer)
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
            self._runtime = None
            return
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, LearningRateFinder):
                raise SyntheticGradientsError(
                    "LearningRateFinder needs the loss in every process, and only the last stage has it. Find the rate "
                    "in one process, with the SyntheticGradients callback alone."
                )
        assert self.cluster_environment is not None
        backend = self._process_group_backend or default_process_group_backend(self.root_device)
        if not dist.is_initialized():
            timeout = timedelta(seconds=self.timeout)
            arguments = store_of_attempt(processes, timeout)
            init_dist_connection(self.cluster_environment, backend, timeout=timeout, **arguments)
            atexit.register(_leave_process_group)
        stages = self.stages_in_parallel
        chains = [list(reversed(range(first, first + stages))) for first in range(0, processes, stages)]
        if self._host_group is None:
            self._make_groups(chains, backend)
        self._runtime = StageRuntime(
            self.lightning_module,
            callback,
            chains[self.replica].index(self.global_rank),
            chains,
            self.root_device,
            backend,
            self.timeout,
            self._stage_group,
            self.wire,
            self._pages,
            self._peers,
            self.ddp,
            self.tied_weights == "synchronize",
        )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [other for other in callbacks if not isinstance(other, StageCoordinator)]
        callbacks.insert(0, StageCoordinator(self._runtime))

    def _make_groups(self, chains: list[list[int]], backend: str) -> None:
        """Makes the process groups: of all, of each replica's stages, and of the processes with the same stages."""
        timeout = timedelta(seconds=self.timeout)
        self._host_group = dist.new_group(backend="gloo", timeout=timeout)
        self._stage_group = self._host_group
        if len(chains) == 1:
            return
        for chain in chains:  # every process takes part in making every group
            group = dist.new_group(chain, backend="gloo", timeout=timeout)
            if self.global_rank in chain:
                self._stage_group = group
        for ranks in zip(*chains):
            on_host = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
            group = on_host if backend == "gloo" else dist.new_group(list(ranks), backend=backend, timeout=timeout)
            if self.global_rank in ranks:
                self._peers = Replicas(len(chains), self.replica, group, on_host)

    @staticmethod
    def _find_callback(trainer: pl.Trainer) -> SyntheticGradients:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, SyntheticGradients)]
        if len(found) > 1:
            raise SyntheticGradientsError("The trainer has more than one SyntheticGradients callback; give one.")
        if not found:
            found = [SyntheticGradients()]
            callbacks.insert(0, found[0])
        return found[0]

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: pl.Trainer) -> None:
        """Places the module and makes the optimizers; the split itself waits for the first batch."""
        assert self.accelerator is not None
        assert self.model is not None
        if self._runtime is not None:
            callback = self._runtime.callback
            if callback.boundaries is None:  # the module was made in `configure_model`, after the callback's `setup`
                assert self.lightning_module is not None
                callback.cut(trainer, self.lightning_module, callback.names)
                for other in trainer.callbacks:  # type: ignore[attr-defined]
                    if isinstance(other, StageCoordinator):
                        other.keep_metrics(self.lightning_module)
            boundaries = callback.boundaries
            assert boundaries is not None
            if len(boundaries) + 1 < self.stages_in_parallel and not callback.undecided:
                raise too_few_stages(len(boundaries) + 1, self.stages_in_parallel)
            by_norm = trainer.gradient_clip_val and trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE
            scaler = getattr(self.precision_plugin, "scaler", None)
            self._refuse_unsupported(trainer, bool(by_norm), scaled=scaler is not None)
            if scaler is not None and not isinstance(scaler, StageScaler):
                # Each process scales its own surrogate loss, by a factor of its own once one of them has overflowed.
                self.precision_plugin.scaler = StageScaler(self.root_device, scaler)  # type: ignore[attr-defined]
            if self.clip_over == "model":
                # Lightning's own place for what clipping means; `clip_gradients` of the module ends there too.
                self.precision_plugin.clip_grad_by_norm = self._clip_by_norm_of_model  # type: ignore[method-assign]
            elif by_norm:
                rank_zero_warn(
                    "gradient_clip_val clips by the norm of each process's own stages; in one process the norm is that "
                    "of the whole model. SyntheticGradientStrategy(clip_over='model') takes that one, at the price of "
                    "stages that wait for each other; clipping by value is the same in both."
                )
            set_random_state(self.broadcast(random_state(self.root_device)), self.root_device)
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            if self._runtime is not None and any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
                raise SyntheticGradientsError(
                    "LBFGS evaluates a step several times, and a boundary is crossed once in each. Use an optimizer "
                    "that takes one gradient a step."
                )
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            optimizers_to_device(self.optimizers, self.root_device)

    def _refuse_unsupported(self, trainer: pl.Trainer, by_norm: bool, scaled: bool) -> None:
        """Refuses by name what does not go with a split run, or with the strategy's options."""
        self._refuse_watched_parameters()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = any(kind.__name__ == "WeightAveraging" for each in callbacks for kind in type(each).__mro__)
        if self.checkpoint == "sharded" and averaging:  # a class that Lightning 2.5 does not have
            raise SyntheticGradientsError(
                "checkpoint='sharded' does not support WeightAveraging, which saves a second whole model. Use "
                "checkpoint='whole'."
            )
        if self.replicas > 1 and self._layer_sync is not None:
            raise SyntheticGradientsError(
                "sync_batchnorm=True is not supported with replicas. Use a norm that needs no batch, such as "
                "GroupNorm or LayerNorm, or train without."
            )
        if self.tied_weights == "synchronize" and (scaled or (by_norm and self.clip_over == "stages")):
            raise SyntheticGradientsError(
                "tied_weights='synchronize' needs every copy to take the same step, which a loss scale of each "
                "process (precision='16-mixed') and clipping by the norm of each process's stages prevent. Use "
                "'bf16-mixed', and clip_over='model'."
            )
        if scaled and self.clip_over == "model":
            raise SyntheticGradientsError(
                "clip_over='model' needs gradients that are finite in every process, and with precision='16-mixed' "
                "they overflow in one at a time. Use 'bf16-mixed', or clip_over='stages'."
            )

    def _refuse_watched_parameters(self) -> None:
        """Refuses Weights & Biases' hook that reads every parameter in each forward pass."""
        assert self.lightning_module is not None
        # wandb keeps the names of its hooks there, to find them again.
        names = [name for child in self.lightning_module.modules() for name in getattr(child, "_wandb_hook_names", ())]
        if any(name.startswith("parameters/") for name in names):
            raise SyntheticGradientsError(
                "WandbLogger.watch(log='parameters') and log='all' read every parameter in each step, and a process "
                "has those of its own stages only. Use watch(log='gradients'), which shows those of the last process."
            )

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Around ``configure_model``: makes the model on the host, as a device holds its own stages only."""
        if self._runtime is None:
            with super().tensor_init_context(empty_init):
                yield
        else:
            with self.precision_plugin.tensor_init_context():
                yield

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around ``configure_model``: what it makes goes to files, and those of its own stages to memory later."""
        with self._pages.making() if self._runtime is not None else nullcontext():
            yield
            # Here, for weights of a checkpoint are loaded before `setup`.
            if self.lightning_module is not None:
                materialize(self.lightning_module)

    def model_to_device(self) -> None:
        """Moves the module to this process's device, but for weights that wait in files for their process."""
        assert self.model is not None
        with self._pages.hidden(self.model):
            self.model.to(self.root_device)

    def process_dataloader(self, dataloader: object) -> object:
        """Seeds the workers of all stages' loaders alike, by replica; Lightning would seed them by rank."""
        seeded = int(os.environ.get("PL_SEED_WORKERS", "0"))
        if self._runtime is not None and seeded and getattr(dataloader, "worker_init_fn", 0) is None:
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=self.replica)  # type: ignore[attr-defined]
        return dataloader

    def on_validation_end(self) -> None:
        """After all callbacks: a stop that one process's callback wants is every process's."""
        if self._runtime is not None:
            assert self.lightning_module is not None
            agree_on_stop(self.lightning_module.trainer, self._runtime)

    # ------------------------------------------------------------------ steps

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Moves a batch as Lightning does; notes which one it is, to compare with the neighbours."""
        if self._runtime is not None:
            self._runtime.take_batch(fingerprint(batch))
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
        step = getattr(self.lightning_module, name)
        if self._runtime is None:
            return step(*args, **kwargs)
        number = kwargs.get("batch_idx", args[1] if len(args) > 1 else "")
        kind = f"{name.removesuffix('_step')} batch {number}".strip()
        return self._runtime.run(kind, step, args, kwargs, training=name == "training_step")

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Goes backward through this process's stages and answers the stage before."""
        if self._runtime is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        if self._runtime.keeps_graph:
            kwargs["retain_graph"] = True
            self._check_backward()
        assert self.lightning_module is not None
        with self._runtime.summing_tied():
            loss = super().backward(self._runtime.backward_loss(closure_loss), optimizer, *args, **kwargs)
            if self.lightning_module.automatic_optimization:
                # Before copies of a tied weight meet: the stage before may wait for this target before its backward.
                self._runtime.return_targets()
        return loss

    def _check_backward(self) -> None:
        """Refuses a module's own ``backward`` that cannot be told to keep the graph."""
        assert self.lightning_module is not None
        parameters = inspect.signature(self.lightning_module.backward).parameters
        if "retain_graph" not in parameters and not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            raise SyntheticGradientsError(
                f"{type(self.lightning_module).__name__}.backward does not take `retain_graph`, which a batch whose "
                "exact gradient travels up needs. Give it `*args, **kwargs` and hand them to `loss.backward`, or use "
                "SyntheticGradients(exact_every=0)."
            )

    def _clip_by_norm_of_model(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips by the norm that the gradients of all processes have together. A collective."""
        if clip_val <= 0:
            return
        assert self._runtime is not None
        parameters = [p for p in self.precision_plugin.main_params(optimizer) if p.grad is not None]
        borrowed = self._runtime.borrowed  # of a weight with copies in several processes, one counts
        counted = (p.grad for p in parameters if p.grad is not None and id(p) not in borrowed)
        norm = torch.nn.utils.get_total_norm(counted)
        squares = norm.detach().double().cpu() ** 2
        with self._runtime.meeting("clipping gradients"):
            dist.all_reduce(squares, group=self._stage_group)
        torch.nn.utils.clip_grads_with_norm_(parameters, float(clip_val), squares.sqrt().to(norm))

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around a step whose gradients are accumulated: replicas average them at the last."""
        with nullcontext() if self._runtime is None else self._runtime.accumulating():
            yield

    # ------------------------------------------------------------------ collectives

    def barrier(self, name: str | None = None) -> None:
        """Waits for all processes."""
        if self._runtime is None:
            return
        with self._runtime.meeting("barrier"):
            dist.barrier(self._host_group)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Sends an object from one process to all."""
        if self._runtime is None:
            return obj
        box = [obj]
        with self._runtime.meeting("broadcast"):
            dist.broadcast_object_list(box, src, group=self._host_group)
        return box[0]

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over the replicas, among the processes with the same stages."""
        if self._runtime is None or self.replicas == 1 or not isinstance(tensor, Tensor):
            return tensor
        with self._runtime.meeting("reducing a value"):
            return reduce_over(tensor, self._peers.group if group is None else group, reduce_op=reduce_op)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Gathers a tensor from the replicas, among the processes with the same stages: ``(replicas, ...)``."""
        if self._runtime is None or self.replicas == 1:
            return tensor
        everyone = group is None or group is dist.group.WORLD  # what `LightningModule.all_gather` makes of no group
        with self._runtime.meeting("gathering a value"):
            return super().all_gather(tensor, self._peers.group if everyone else group, sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Asks all processes: whether all (or any) of them say yes."""
        if self._runtime is None:
            return decision
        votes = torch.tensor(int(decision))
        with self._runtime.meeting("vote"):
            dist.all_reduce(votes, group=self._host_group)
        return bool(votes == dist.get_world_size()) if all else bool(votes)

    # ------------------------------------------------------------------ state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole model's state, with the keys of the undivided model; of shards, this process's. A collective."""
        runtime = self._runtime
        if runtime is not None and self.checkpoint == "sharded":
            return own_weights(runtime.module, runtime.writes)
        self._gather_weights()
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer's state, on global rank 0; of shards, this process's. A collective."""
        inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        runtime = self._runtime
        if runtime is not None:
            runtime.settle()  # no batch has come since shards were loaded
        if runtime is None or runtime.placement is None:
            return super().optimizer_state(inner)
        with runtime.meeting("saving optimizers"):
            state = own_optimizer_state(inner, runtime.module, runtime.placement, runtime.position)
            if self.checkpoint == "whole":
                state["state"] = dict(sorted(runtime.unite(state["state"]).items()))
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint: on global rank 0, or of shards, in each process of the first replica."""
        if self._runtime is None or self.checkpoint == "whole":
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if "://" in str(filepath):
            raise SyntheticGradientsError(
                f"checkpoint='sharded' writes to a local or shared folder, not to {filepath}."
            )
        path = Path(self.broadcast(filepath))
        own = own_weights(self._runtime.module, self._runtime.writes)
        # What callbacks put there besides is not this process's, and another has it right.
        state = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        checkpoint = {**checkpoint, "state_dict": state}
        with self._runtime.meeting("saving shards"):
            if self.replica == 0:
                save_shards(path, checkpoint, self._stage_group, writes_rest=self.is_global_zero)
            dist.barrier(self._host_group)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint; of shards, what is no tensor of a stage, as these follow one by one."""
        if not is_sharded(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, *args, **kwargs)
        path = Path(checkpoint_path)
        if self._runtime is None:
            return merge(path)
        weights_only = args[0] if args else kwargs.get("weights_only")
        return {**load_rest(path, bool(weights_only)), _SHARDS: path}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restores the weights of all stages."""
        if _SHARDS not in checkpoint:
            super().load_model_state_dict(checkpoint, strict)
            return
        assert self.lightning_module is not None
        load_weights(checkpoint[_SHARDS], self.lightning_module, self._host_group, strict)
        self._pages.let_go()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the optimizers; of shards, the states of this process's stages, once it knows them."""
        super().load_optimizer_state_dict(checkpoint)
        runtime = self._runtime
        if _SHARDS in checkpoint and runtime is not None:
            runtime.on_settled = lambda: load_optimizers(
                checkpoint[_SHARDS], self.optimizers, runtime.module, runtime.holds, self._host_group
            )

    def _gather_weights(self) -> None:
        runtime = self._runtime
        if runtime is not None and runtime.placement is not None:
            with runtime.meeting("gathering weights"):
                gather_weights(runtime.module, runtime.placement, runtime.ranks, runtime.host_group)
            self._pages.let_go()

    # ------------------------------------------------------------------ the end

    def on_exception(self, exception: BaseException) -> None:
        """Tells the neighbouring stages why this one stops."""
        if self._runtime is not None:
            self._runtime.fail(exception)
        super().on_exception(exception)

    def teardown(self) -> None:
        """Makes the module whole on every process; after an error, touches nothing that others would wait for."""
        runtime = self._runtime
        if runtime is not None and not runtime.failed:
            runtime.close()
            self._gather_weights()
        super().teardown()


def _leave_process_group() -> None:
    """Ends gloo's threads while Python still is there.

    One that holds the last tensors of a transfer would otherwise release them when Python is gone, which aborts a
    process whose training went well.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


__all__ = ["SyntheticGradientStrategy"]
