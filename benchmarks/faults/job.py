"""The training that is disturbed: a small model, twelve steps, a checkpoint every five."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.faults.fault import CONNECTING, END, GATHERING, START, Fault, Trap
from lightning_sg import Boundary, LinearPredictor, SyntheticGradients, SyntheticGradientStrategy, ZeroPredictor
from lightning_sg.transport.chain import Chain

FEATURES, CLASSES, BATCH = 12, 5, 8
BATCHES, EPOCHS = 6, 2
STEPS = BATCHES * EPOCHS
SAVED_EVERY = 5  # steps
_MOST = 32  # batches; a shorter loader has the first of the longer


@dataclass(frozen=True)
class Odd:
    """What is different about one rank, or about what the model computes there.

    Attributes:
        rank: The rank.
        delay: Of its predictors.
        predictor: Its kind of predictor: ``"zero"`` in place of linear ones.
        wire: How it sends.
        width: Of its last hidden layer.
        seed: Of its data.
        batches: How many batches it has.
        nan: Where a NaN appears: in the ``"data"``, the ``"loss"`` or this rank's ``"activations"``.
        step: When.
    """

    rank: int = 0
    delay: int | None = None
    predictor: str | None = None
    wire: str | None = None
    width: int | None = None
    seed: int | None = None
    batches: int | None = None
    nan: str | None = None
    step: int = 0


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        folder: Where it keeps its files; checkpoints are in ``checkpoints`` there.
        processes: How many.
        replicas: Copies of the model.
        launcher: ``"environment"`` as under torchrun, ``"popen"`` or ``"spawn"``.
        checkpoint: ``"whole"`` or ``"sharded"``.
        timeout: The strategy's, in seconds.
        resume: The checkpoint that it starts from.
        epochs: To train for; 0 for evaluation alone.
        afterwards: ``"test"`` or ``"predict"``, after training; ``""`` for neither.
        fault: What disturbs it.
        odd: How one rank differs.
        network: Each rank has a network device of its own, which can go down.
        disk: The size of the file system of the checkpoints in bytes; 0 for the machine's own.
    """

    folder: Path
    processes: int = 2
    replicas: int = 1
    launcher: str = "environment"
    checkpoint: str = "whole"
    timeout: float = 3.0
    resume: Path | None = None
    epochs: int = EPOCHS
    afterwards: str = ""
    fault: Fault | None = None
    odd: Odd = field(default_factory=Odd)
    network: bool = False
    disk: int = 0

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def stages(self) -> int:
        """Stages of the model: one for each process of a replica."""
        return self.processes // self.replicas

    @property
    def struck(self) -> Path:
        """The file that appears when the fault strikes."""
        return self.folder / "struck"

    def run(self) -> None:
        """Trains, in every process; writes how it ended for each rank."""
        rank, began = _rank(), time.time()
        (self.folder / f"pid-{rank}").write_text(str(os.getpid()))
        try:
            module = self._train(rank)
        except BaseException as error:
            self.note(rank, began, error=_told(error))
            raise
        self.note(rank, began, digest=digest_of(module))

    def note(self, rank: int, began: float, **found: Any) -> None:
        """Writes how a rank has ended."""
        beside = self.folder / f".rank-{rank}"
        beside.write_text(json.dumps({"seconds": time.time() - began, **found}))
        beside.rename(self.folder / f"rank-{rank}.json")

    def _train(self, rank: int) -> pl.LightningModule:
        warnings.simplefilter("ignore")
        mine = self.fault is not None and self.fault.rank == rank and self.launcher != "spawn"
        trap = Trap(self.fault, self.struck) if self.fault is not None and mine else None
        if trap is not None:
            trap.reach(START)
            _set(trap)
        odd = self.odd if self.odd.rank == rank else Odd()
        pl.seed_everything(7, verbose=False)
        kind, listener = Model, Listener
        if trap is not None and self.fault is not None:
            if hasattr(Model, self.fault.hook):
                kind = trap.wrap(Model, self.fault.hook)
            elif hasattr(pl.Callback, self.fault.hook):
                listener = trap.wrap(Listener, self.fault.hook)
        module = kind(self.stages, odd.width or 16, self.odd)
        trainer = self._trainer(odd, listener(self))
        count = self.replicas * (odd.batches or BATCHES)
        data, other = batches(count, odd.seed or 0, self.odd), batches(2 * self.replicas, 1)
        if self.epochs:
            trainer.fit(module, data, other, ckpt_path=None if self.resume is None else str(self.resume))
        if self.afterwards == "test":
            trainer.test(module, other, verbose=False)
        elif self.afterwards == "predict":
            trainer.predict(module, other)
        if trap is not None:
            trap.reach(END)
        return module

    def _trainer(self, odd: Odd, listener: pl.Callback) -> pl.Trainer:
        predictor = ZeroPredictor() if odd.predictor == "zero" else LinearPredictor()
        learning = SyntheticGradients(delay=odd.delay or 1, predictor=predictor)
        start: Any = {} if self.launcher == "environment" else {"start_method": self.launcher}
        kept: Any = {"checkpoint": self.checkpoint, "wire": odd.wire or "full"}
        saving = ModelCheckpoint(
            self.checkpoints, "{step}", save_top_k=-1, save_last=True, every_n_train_steps=SAVED_EVERY
        )
        return pl.Trainer(
            accelerator="cpu",
            devices=self.processes,
            strategy=SyntheticGradientStrategy(timeout=self.timeout, replicas=self.replicas, **start, **kept),
            max_epochs=self.epochs,
            num_sanity_val_steps=1,
            callbacks=[learning, saving, listener],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


class Listener(pl.Callback):
    """Writes down the error that ends a training, where the launcher keeps it to itself.

    Args:
        job: The training.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.time()
        self._trap: Trap | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Under ``spawn``, the fault is set here: only now is it known which rank this is."""
        job, rank = self._job, trainer.global_rank
        if job.launcher == "spawn":
            (job.folder / f"pid-{rank}").write_text(str(os.getpid()))
            if job.fault is not None and job.fault.rank == rank:
                self._trap = Trap(job.fault, job.struck)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The moment of all faults under ``spawn``."""
        if self._trap is not None:
            self._trap.reach("on_train_batch_start", trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """See above."""
        self._job.note(trainer.global_rank, self._began, error=_told(exception))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Says that training has begun."""
        (self._job.folder / f"trains-{trainer.global_rank}").touch()

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """For faults."""


class Model(pl.LightningModule):
    """A stage for each process of a replica.

    Args:
        stages: How many.
        width: Of the last hidden layer.
        odd: Where a NaN appears.
    """

    def __init__(self, stages: int, width: int, odd: Odd) -> None:
        super().__init__()
        self.odd = odd
        layers: list[nn.Module] = []
        size = FEATURES
        for stage in range(stages - 1):
            layers += [nn.Linear(size, 16), nn.ReLU(), Spoiling(self, stages - 1 - stage), Boundary()]
            size = 16
        self.net = nn.Sequential(*layers, nn.Linear(size, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """From ``(B, FEATURES)`` to ``(B, CLASSES)``."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss, from the odd step on NaN if that is asked for."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.odd.nan == "loss" and self.trainer.global_step >= self.odd.step:
            return loss * float("nan")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss."""
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The logits."""
        return self(batch[0])

    def configure_model(self) -> None:
        """For faults."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Spoiling(nn.Module):
    """Turns activations of a stage into NaN if that is asked for.

    Args:
        model: Knows when, and in which rank.
        rank: The rank of this stage in the first replica.
    """

    def __init__(self, model: Model, rank: int) -> None:
        super().__init__()
        self._model = [model]  # in a list: not a submodule
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        """The input, or NaN."""
        model = self._model[0]
        if model.odd.nan != "activations" or model.odd.rank != self.rank or not model.training:
            return x
        return x * float("nan") if model.trainer.global_step >= model.odd.step else x


def batches(count: int, seed: int, odd: Odd = Odd()) -> DataLoader[Any]:
    """Random batches, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(_MOST * BATCH, FEATURES, generator=generator)
    y = (x[:, :CLASSES] + 0.3 * torch.randn(len(x), CLASSES, generator=generator)).argmax(-1)
    x, y = x[: count * BATCH].clone(), y[: count * BATCH]
    if odd.nan == "data":
        x[odd.step % count * BATCH] = float("nan")
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def digest_of(module: nn.Module) -> str:
    """A checksum of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _set(trap: Trap) -> None:
    """Sets the trap for the moments within the strategy's own work."""
    connect, copies = torch.distributed.init_process_group, Chain.copies

    def connecting(*args: Any, **kwargs: Any) -> Any:
        result = connect(*args, **kwargs)
        trap.reach(CONNECTING)
        return result

    def gathering(self: Chain, what: str, names: list[str]) -> Any:
        copy, seen = copies(self, what, names), []

        def copy_and_count(name: str, *args: Any) -> Any:
            seen.append(name)
            if what == "gathering weights" and len(seen) == 2:
                trap.reach(GATHERING)
            return copy(name, *args)

        return copy_and_count

    torch.distributed.init_process_group = connecting
    Chain.copies = gathering  # type: ignore[method-assign]


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def _told(error: BaseException) -> str:
    """An error with those that it came from, as a user would read them."""
    parts, seen = [], set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        parts.append(f"{type(link).__name__}: {link}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n".join(parts)


__all__ = ["BATCHES", "EPOCHS", "SAVED_EVERY", "STEPS", "Job", "Odd"]
