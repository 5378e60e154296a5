"""What a split costs besides its stages: the start, and the way through the code of other stages' layers.

    python -m benchmarks.overheads --out overheads.json

Two models, through the real Trainer, one thread a process: one of 1000 small modules on two processes, for the time
that it takes to follow the first step and to place the stages; and a transformer of 48 blocks on four, whose step runs
without data up to a process's own blocks.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.quiet import QUIET
from benchmarks.workers import run_group
from lightning_sg import SyntheticGradients, profiling
from lightning_sg.tools.timeline import Timeline
from lightning_sg.tools.timeline.spans import batches_of

Model = tuple["Layers", list[str], Callable[[], Any]]


class Layers(pl.LightningModule):
    """Calls layers one after the other, as a loop in ``forward`` does."""

    def __init__(self, first: nn.Module, layers: list[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.first, self.layers, self.last = first, nn.ModuleList(layers), last

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy over the last dimension."""
        hidden = self.first(batch[0])
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.last(hidden).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def thousand_modules() -> Model:
    """Alternating Linear(32) and ReLU, cut in the middle."""
    layers = [part for _ in range(498) for part in (nn.Linear(32, 32), nn.ReLU())]
    module = Layers(nn.Identity(), layers, nn.Linear(32, 10))
    return module, ["layers.497"], lambda: (torch.randn(8, 32), torch.randint(0, 10, (8,)))


def transformer() -> Model:
    """48 blocks of width 256 on 8 x 64 tokens, in four stages."""

    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)

    module = Layers(nn.Embedding(1000, 256), [block() for _ in range(48)], nn.Linear(256, 1000))
    cuts = ["layers.11", "layers.23", "layers.35"]
    return module, cuts, lambda: (torch.randint(0, 1000, (8, 64)), torch.randint(0, 1000, (8, 64)))


MODELS: dict[str, Callable[[], Model]] = {"1000 modules": thousand_modules, "48 blocks": transformer}


def measure(name: str, steps: int) -> dict[str, float]:
    """Trains for some steps in this process, and reads the times from its timeline, in milliseconds."""
    pl.seed_everything(0, verbose=False)
    module, cuts, batch = MODELS[name]()
    with tempfile.TemporaryDirectory() as folder:
        timeline = Timeline(folder, skip=0, batches=steps)
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy="synthetic_gradients",
            devices=len(cuts) + 1,
            max_steps=steps,
            max_epochs=-1,
            **QUIET,
            profiler=timeline,
            callbacks=[SyntheticGradients(boundaries=cuts)],
        )
        batches: Any = [batch() for _ in range(steps)]
        trainer.fit(module, DataLoader(batches, batch_size=None))
    counted = batches_of(timeline.spans)[len(cuts) + 3 :]  # the chain is full, and memory warm

    def median(action: str) -> float:
        inside = [span.duration for span in timeline.spans if span.name == action and span.start >= counted[0].start]
        return 1000 * statistics.median(inside) if inside else 0.0

    start_up = sum(span.duration for span in timeline.spans if span.name == profiling.START_UP)
    return {
        "modules": float(len(list(module.modules()))),
        "start-up": 1000 * start_up,
        "step": 1000 * statistics.median(span.duration for span in counted),
        "fake tensors": median(profiling.FAKE_TENSORS),
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """What was measured, by rank."""
    rows = ["| model | rank | modules | start-up, s | step, ms | without data, ms | of the step |", "|---" * 7 + "|"]
    for name, ranks in found.items():
        for rank, seen in enumerate(ranks):
            share = seen["fake tensors"] / seen["step"]
            rows.append(
                f"| {name} | {rank} | {seen['modules']:.0f} | {seen['start-up'] / 1000:.2f} | {seen['step']:.0f} | "
                f"{seen['fake tensors']:.2f} | {share:.2%} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Measures both models and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True, help="write the measurements as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        own = measure(options.worker, options.steps)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        if dist.get_rank() == 0:
            options.out.write_text(json.dumps(every))
        return
    found = {}
    for name, make in MODELS.items():
        processes = len(make()[1]) + 1
        arguments = ["--worker", name, "--steps", str(options.steps)]
        found[name] = run_group("benchmarks.overheads", arguments, processes, None)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
