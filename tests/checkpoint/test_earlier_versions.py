"""Checkpoints that earlier code wrote load, and training from them ends with the weights that it ended with.

``earlier/<kind>.ckpt`` (a folder for shards) was written in the middle of a run at commit 74b676c, and
``earlier/<kind>.end.pt`` holds the weights with which that run, resumed there, ended. Heads that learn their own loss
learn in passing since, so where there are such, it holds those with which it ended when that came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import (
    AlignmentGuard,
    Chunks,
    DelayedGradient,
    ExactGradients,
    LinearPredictor,
    LocalLoss,
    MessageBoundary,
    MLPInputPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    SyntheticInputs,
    ThroughTime,
    TimeBoundary,
    TrueGradient,
    ZeroPredictor,
)
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks

EARLIER = Path(__file__).parent / "earlier"
MIDDLE, END = 7, 15  # optimizer steps; an epoch of the classifier has five


class Carrying(pl.LightningModule):
    """An LSTM whose state is carried from chunk to chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.out = nn.Linear(4, 3)
        self.memory = TimeBoundary()

    def training_step(self, chunk: Any, batch_idx: int) -> Tensor:
        (x, y), first, last = chunk
        out, state = self.lstm(x, self.memory.read(first))
        self.memory.write(state, last)
        return (self.out(out) - y).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Talking(pl.LightningModule):
    """A network that sends a message in every step, and one that hears four of them in every fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = nn.Linear(3, 4), nn.Linear(4, 1)
        self.messages = MessageBoundary()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        message = self.fast(x).tanh()
        self.messages.send(message, context=x[:, :1])
        loss = message.square().mean()
        if len(self.messages) == 4:
            heard = torch.stack(self.messages.receive()).sum(0)
            loss = loss + (self.slow(heard).squeeze(1) - x.sum(1)).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def random_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def sequences() -> Any:
    """Five chunks a sequence: the checkpoint is in the middle of the second."""
    x = random_rows(3, 6, 10, 3)
    return Chunks([(each, each.roll(2, dims=1)) for each in x], 2, sequence_length=10)


def rows() -> Any:
    """One long epoch, so that a resumed run goes on with a step in which a message is received."""
    return DataLoader(TensorDataset(random_rows(6 * 20, 3)), batch_size=6)


def classifier() -> pl.LightningModule:
    return Classifier(stages=3, width=8)


@dataclass(frozen=True)
class Run:
    """A kind of run: its callback, its model and data, and the processes that it was saved by."""

    callback: Callable[[], SyntheticGradients]
    module: Callable[[], pl.LightningModule] = classifier
    data: Callable[[], Any] = field(default=lambda: loader(shuffle=False))
    devices: int = 1
    strategy: dict[str, Any] = field(default_factory=dict)


def slowing(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


linear = PredictorTraining(seed=1, updates=2, ema=0.5, lr_scheduler=slowing)
seeded = PredictorTraining(seed=1)
RUNS = {
    "default": Run(lambda: SyntheticGradients(training=seeded)),
    "linear": Run(lambda: SyntheticGradients(predictor=LinearPredictor(), delay=2, training=linear)),
    "corrected": Run(lambda: SyntheticGradients(delay=2, exact=ExactGradients(2, correction=0.5), training=seeded)),
    "delayed": Run(lambda: SyntheticGradients(predictor=DelayedGradient(shrink=0.9), training=seeded)),
    "true": Run(lambda: SyntheticGradients(predictor=TrueGradient(), training=seeded)),
    "zero": Run(lambda: SyntheticGradients(predictor=ZeroPredictor(), training=seeded)),
    "by-name": Run(
        lambda: SyntheticGradients(
            predictor={"net.1": LinearPredictor(), "net.3": LocalLoss(hidden=8)},
            exact=ExactGradients(warm_up=3),
            training=seeded,
        )
    ),
    "guarded": Run(
        lambda: SyntheticGradients(
            predictor=LinearPredictor(),
            guard=AlignmentGuard(threshold=0.99, patience=2, fallback=LocalLoss(hidden=8)),
            training=seeded,
        )
    ),
    "inputs": Run(
        lambda: SyntheticGradients(inputs=SyntheticInputs(MLPInputPredictor(hidden=8), warm_up=2), training=seeded)
    ),
    "random-updates": Run(lambda: SyntheticGradients(training=PredictorTraining(seed=1, update_probability=0.5))),
    "in-time": Run(
        lambda: SyntheticGradients(through_time=ThroughTime(1.0, 0.9, 4, auxiliary=0.1), training=seeded),
        Carrying,
        sequences,
    ),
    "messages": Run(lambda: SyntheticGradients(predictor=LinearPredictor(), training=seeded), Talking, rows),
    "two-processes": Run(lambda: SyntheticGradients(delay=2, training=seeded), devices=2),
    "shards": Run(lambda: SyntheticGradients(training=seeded), devices=2, strategy={"checkpoint": "sharded"}),
    "replicas": Run(lambda: SyntheticGradients(training=seeded), devices=4, strategy={"replicas": 2}),
}


def train(run: Run, steps: int, checkpoint: Path | None, folder: Path) -> tuple[pl.Trainer, dict[str, Tensor]]:
    pl.seed_everything(3, verbose=False)
    module = run.module()
    trainer = make_trainer(
        strategy=SyntheticGradientStrategy(timeout=30, **run.strategy) if run.devices > 1 else "auto",
        devices=run.devices,
        callbacks=[run.callback()],
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
    )
    trainer.fit(module, run.data(), ckpt_path=None if checkpoint is None else str(checkpoint))
    return trainer, state_of(module)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.filterwarnings("ignore:Boundary 'net.*falls back")
def test_training_goes_on_from_an_earlier_checkpoint_as_earlier_code_did(kind: str, tmp_path: Path) -> None:
    run = RUNS[kind]
    expected = torch.load(EARLIER / f"{kind}.end.pt", weights_only=True)

    def work() -> dict[str, Tensor]:
        return train(run, END, EARLIER / f"{kind}.ckpt", tmp_path)[1]

    state = run_ranks(run.devices, work)[0] if run.devices > 1 else work()
    assert_same_state(expected, state)
