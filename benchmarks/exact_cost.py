"""What exact and late gradients cost on two processes: processor time a step, and memory, of the first process.

    python -m benchmarks.exact_cost --rounds 3

Four stages of four Linear(512) each with a boundary between them, batch 256, two stages a process, one thread each.
Processor time, because a busy machine stretches the wall clock. The first process is the one that keeps graphs the
longest: its two boundaries are the third and the second from the loss. The ways take turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quiet import QUIET
from benchmarks.workers import run_workers
from lightning_sg import (
    Boundary,
    DelayedGradient,
    ExactGradients,
    LateGradients,
    LossModelPredictor,
    SyntheticGradients,
)

WIDTH, BATCH, LAYERS, STAGES = 512, 256, 4, 4
OWN_LOSS = LossModelPredictor()
WAYS: dict[str, dict[str, Any]] = {
    "no exact gradients": {"exact": ExactGradients(every=0, bootstrap=True)},
    "exact targets on every 8th batch": {"exact": ExactGradients(every=8, bootstrap=True)},
    "exact targets on every 4th batch": {"exact": ExactGradients(every=4, bootstrap=True)},
    "exact targets on every batch": {"exact": ExactGradients(every=1)},
    "exact targets and corrections on every batch": {"exact": ExactGradients(every=1, correction=1.0)},
    "delayed gradient": {"predictor": DelayedGradient()},
    "own loss, no late gradients": {"predictor": OWN_LOSS},
    "own loss, late gradients of every batch": {"predictor": OWN_LOSS, "late": LateGradients(0.2)},
    "own loss, late gradients of every 2nd batch": {"predictor": OWN_LOSS, "late": LateGradients(0.2, every=2)},
    "own loss, late gradients of every 4th batch": {"predictor": OWN_LOSS, "late": LateGradients(0.2, every=4)},
    "own loss, late gradients of every batch, recomputed": {
        "predictor": OWN_LOSS,
        "late": LateGradients(0.2, recompute=True),
    },
}


class Linears(pl.LightningModule):
    """Stages of Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in range(STAGES):
            layers += [Boundary()] * (stage > 0)
            layers += [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy over the last layer's outputs."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Meter(Callback):
    """Notes this process's processor time after each batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_arguments: Any) -> None:
        """Called by Lightning."""
        self.times.append(time.process_time())


def worker(way: str, steps: int, skip: int, out: Path) -> None:
    """Trains, and writes milliseconds a step and the peak memory of the process with the first stages."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,)))
    meter = Meter()
    arguments = {"predictor": LossModelPredictor(objective="both"), **WAYS[way]}
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="synthetic_gradients",
        devices=2,
        max_steps=steps,
        max_epochs=-1,
        **QUIET,
        callbacks=[SyntheticGradients(**arguments), meter],
    )
    trainer.fit(Linears(), DataLoader(data, batch_size=BATCH))
    if trainer.strategy.local_rank == 1:  # the first stages
        step = 1000 * (meter.times[-1] - meter.times[skip]) / (steps - 1 - skip)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        out.write_text(json.dumps([step, memory]))


def main() -> None:
    """Measures all ways in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", type=int, default=20, help="batches at the start that are not counted")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.steps, options.skip, options.out)
        return
    found: dict[str, list[list[float]]] = {way: [] for way in options.ways}
    for _ in range(options.rounds):
        for way in options.ways:
            arguments = ["--worker", way, "--steps", str(options.steps), "--skip", str(options.skip)]
            found[way] += run_workers("benchmarks.exact_cost", arguments)
    base = found[options.ways[0]]
    print(f"| {os.cpu_count()} cores | ms a step, median (min-max) | over the first | peak MiB, median |")
    print("|---|---|---|---|")
    for way, values in found.items():
        times, memory = zip(*values)
        ratio = statistics.median(mine / without[0] for mine, without in zip(times, base))
        print(
            f"| {way} | {statistics.median(times):.0f} ({min(times):.0f}-{max(times):.0f}) | {ratio:.2f} "
            f"| {statistics.median(memory):.0f} |"
        )


if __name__ == "__main__":
    main()
