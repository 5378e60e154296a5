"""Trains a split network whose second half is away again and again, and compares with undisturbed runs.

    python -m benchmarks.outages --seeds 0 1 2

Two processes, an MLP with BatchNorm on data that it can learn. In the disturbed runs the process with the loss is
stopped (SIGSTOP) at random times, until the other has trained some batches without an answer, or for some seconds at
most. The table has the loss at the end, and the longest time between two batches of the stage that goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.workers import run_group
from lightning_sg import Away, Boundary, SyntheticGradients, SyntheticGradientStrategy

STEPS, OUTAGES, BATCHES = 2000, 8, 20
FEATURES, CLASSES, BATCH = 32, 10, 64
_WIDTH = 128
_PATIENCE = 0.2  # seconds of silence after which the stage goes on
_LONGEST = 10.0  # seconds of an outage

# Lets a stopped process go on once a file is there or time is up.
_GO_ON = """
import os, signal, sys, time
pid, mark, longest = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
deadline = time.monotonic() + longest
while not os.path.exists(mark) and time.monotonic() < deadline:
    time.sleep(0.01)
os.kill(pid, signal.SIGCONT)
"""


def _layer(inputs: int = _WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, _WIDTH), nn.BatchNorm1d(_WIDTH), nn.ReLU())


class Net(pl.LightningModule):
    """Four layers, cut in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(_layer(FEATURES), _layer(), Boundary(), _layer(), nn.Linear(_WIDTH, CLASSES))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Notes the loss, too."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Outages(pl.Callback):
    """Stops the process with the loss at random steps; in the other, ends the outage after some batches alone.

    Args:
        folder: Where the two leave marks for each other.
        seed: Of the steps.
        count: How many outages.
    """

    def __init__(self, folder: Path, seed: int, count: int) -> None:
        steps = random.Random(seed).sample(range(100, STEPS - 200, 100), count)
        self.at = {step: folder / str(number) for number, step in enumerate(sorted(steps))}
        self.alone = 0
        self.outages = 0
        self.longest = 0.0
        self._before: float | None = None
        self._folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins an outage of this process."""
        mark = self.at.get(trainer.global_step)
        if trainer.is_global_zero and mark is not None:
            command = [sys.executable, "-c", _GO_ON, str(os.getpid()), str(mark), str(_LONGEST)]
            subprocess.Popen(command, start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batches that this process trains alone."""
        now = time.monotonic()
        if trainer.is_global_zero:
            return
        if self._before is not None:
            self.longest = max(self.longest, now - self._before)
        self._before = now
        strategy: Any = trainer.strategy
        silent = strategy.runtime.chain.downstream.inbox.silent > _PATIENCE
        self.alone = self.alone + 1 if silent else 0
        if self.alone == BATCHES:
            (self._folder / str(self.outages)).touch()
            self.outages += 1


def data(seed: int) -> DataLoader[Any]:
    """A task of one seed: labels from a random network."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(STEPS * BATCH, FEATURES, generator=generator)
    teacher = torch.randn(FEATURES, 64, generator=generator), torch.randn(64, CLASSES, generator=generator)
    y = (torch.tanh(x @ teacher[0] / 4) @ teacher[1]).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def train(seed: int, count: int, folder: Path, out: Path) -> None:
    """One process of one run."""
    pl.seed_everything(seed, verbose=False)
    outages, module = Outages(folder, seed, count), Net()
    trainer = pl.Trainer(
        strategy=SyntheticGradientStrategy(away=Away(batches=2 * BATCHES, patience=_PATIENCE), timeout=60.0),
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        callbacks=[SyntheticGradients(), outages],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(seed))
    if not trainer.is_global_zero:
        (folder / "alone.json").write_text(json.dumps([outages.outages, outages.longest]))
        return
    deadline = time.monotonic() + 30
    while not (folder / "alone.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    alone = json.loads((folder / "alone.json").read_text())
    out.write_text(
        json.dumps({"loss": statistics.mean(module.losses[-200:]), "outages": alone[0], "longest": alone[1]})
    )


def measure(seed: int, count: int) -> dict[str, Any]:
    """One run in two processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--worker", folder, "--seeds", str(seed), "--outages", str(count)]
        found: dict[str, Any] = run_group("benchmarks.outages", arguments, 2, None)
    return found


def table(undisturbed: Sequence[dict[str, Any]], disturbed: Sequence[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    rows = [
        "| | outages | loss of the last 200 steps, by seed | longest time between two batches, s |",
        "|---|---|---|---|",
    ]
    for name, runs in (("undisturbed", undisturbed), ("disturbed", disturbed)):
        losses = " ".join(f"{run['loss']:.4f}" for run in runs)
        outages = " ".join(str(run["outages"]) for run in runs)
        rows.append(f"| {name} | {outages} | {losses} | {max(run['longest'] for run in runs):.2f} |")
    return "\n".join(rows)


def main(args: Sequence[str] | None = None) -> None:
    """Trains with and without outages, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--outages", type=int, default=OUTAGES)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.worker is not None:
        train(options.seeds[0], options.outages, options.worker, options.out)
        return
    undisturbed, disturbed = [], []
    for seed in options.seeds:
        undisturbed.append(measure(seed, 0))
        disturbed.append(measure(seed, options.outages))
    print(table(undisturbed, disturbed))


if __name__ == "__main__":
    main()
