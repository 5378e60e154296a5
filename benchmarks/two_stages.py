"""Throughput of two decoupled stages on two processes, through the real Trainer, one thread each.

    python -m benchmarks.two_stages --rounds 7

The model is 2 × 4 Linear(2048) with ReLU (33.6 M parameters), batch 256. Three modes take turns, in an order that
rotates with the rounds: one process; two processes decoupled; two independent copies of the one-process run at the same
time, which is what two cores of this machine can do at most. Printed are medians, and the
median of each round's ratio to one process.
"""

from __future__ import annotations

import argparse
import json
import logging
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

from benchmarks.workers import run_workers
from lightning_sg import Boundary

WIDTH, BATCH, LAYERS = 2048, 256, 4
MODES = ("one process", "two processes, decoupled", "two independent copies")


class Linears(pl.LightningModule):
    """Two stages of four Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        stages = [[layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())] for _ in range(2)]
        self.net = nn.Sequential(*stages[0], Boundary(), *stages[1][:-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy over the last layer's outputs."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """Notes the time after each batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_arguments: Any) -> None:
        """Called by Lightning."""
        self.times.append(time.monotonic())


def worker(decoupled: bool, steps: int, skip: int, out: Path) -> None:
    """Trains for ``steps`` batches and writes the samples per second after the first ``skip``."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(BATCH * steps, WIDTH), torch.randint(0, 10, (BATCH * steps,)))
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="synthetic_gradients" if decoupled else "auto",
        devices=2 if decoupled else 1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    trainer.fit(Linears(), DataLoader(data, batch_size=BATCH))
    if trainer.is_global_zero:
        speed = BATCH * (steps - 1 - skip) / (clock.times[-1] - clock.times[skip])
        out.write_text(json.dumps(speed))


def measure(mode: str, steps: int, skip: int) -> float:
    """Runs one mode in fresh processes; for two copies, their mean."""
    arguments = ["--worker", mode, "--steps", str(steps), "--skip", str(skip)]
    return statistics.mean(run_workers("benchmarks.two_stages", arguments, copies=2 if mode == MODES[2] else 1))


def main() -> None:
    """Measures all modes in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=8, help="batches at the start that are not counted")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker == MODES[1], arguments.steps, arguments.skip, arguments.out)
        return
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for round_ in range(arguments.rounds):
        for place in range(len(MODES)):
            mode = MODES[(place + round_) % len(MODES)]
            speeds[mode].append(measure(mode, arguments.steps, arguments.skip))
        print(f"round {round_ + 1}: " + ", ".join(f"{mode} {values[-1]:.0f}" for mode, values in speeds.items()))
    # Of two copies, the sum: what two perfect halves would reach. Ratios are taken round by round, which a machine
    # whose speed drifts disturbs less than a ratio of medians.
    print(f"\n| mode | samples/s, median (min-max) of {arguments.rounds} | over one process |\n|---|---|---|")
    for mode, values in speeds.items():
        factor = 2 if mode == MODES[2] else 1
        low, middle, high = (factor * f(values) for f in (min, statistics.median, max))
        ratio = statistics.median(factor * value / one for value, one in zip(values, speeds[MODES[0]]))
        print(f"| {mode} | {middle:.0f} ({low:.0f}-{high:.0f}) | {ratio:.2f} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(speeds))


if __name__ == "__main__":
    main()
