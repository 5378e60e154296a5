"""Test error on MNIST of decoupled training beside plain backpropagation, with seeds and spread.

    python -m benchmarks.mnist --root FOLDER --seeds 0 1 2

Six hidden layers of 256 with BatchNorm, batch 256, Adam whose rate falls from 1e-3 to zero along a cosine, all 60000
training images, the same number of epochs for all. Three ways to train: plain backpropagation; a boundary after every
hidden layer, in one process; one boundary in the middle, each half on a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl

from benchmarks.workers import run_workers
from examples.mnist import Mnist, MnistMLP
from lightning_sg import SyntheticGradients

MODES: dict[str, tuple[Literal["every", "middle", "none"], int]] = {
    "plain backpropagation": ("none", 1),
    "boundary after every layer, one process": ("every", 1),
    "two stages on two processes": ("middle", 2),
}


def worker(mode: str, root: Path, seed: int, epochs: int, out: Path) -> None:
    """Trains once and writes the test error in percent and the seconds that training took."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(seed, verbose=False)
    cuts, devices = MODES[mode]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="synthetic_gradients" if devices > 1 else "auto",
        callbacks=[] if cuts == "none" else [SyntheticGradients()],
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, data = MnistMLP(cuts=cuts), Mnist(root=root, batch_size=256, validation=0)
    began = time.monotonic()
    trainer.fit(module, data)
    seconds = time.monotonic() - began
    (result,) = trainer.test(module, data, verbose=False)
    if trainer.is_global_zero:
        out.write_text(json.dumps({"error": result["test_error"], "seconds": seconds}))


def main() -> None:
    """Trains all ways with all seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder with the four IDX files")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.root, options.seeds[0], options.epochs, options.out)
        return
    errors: dict[str, list[float]] = {mode: [] for mode in MODES}
    for seed in options.seeds:
        for mode in MODES:
            arguments = ["--worker", mode, "--root", str(options.root), "--seeds", str(seed)]
            (result,) = run_workers("benchmarks.mnist", [*arguments, "--epochs", str(options.epochs)])
            errors[mode].append(result["error"])
            print(f"seed {seed}: {mode}: {result['error']:.2f} % in {result['seconds']:.0f} s", flush=True)
    base = statistics.mean(errors["plain backpropagation"])
    print(f"\n| {options.epochs} epochs | test error %, mean (each seed) | over backpropagation |\n|---|---|---|")
    for mode, values in errors.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        mean = statistics.mean(values)
        print(f"| {mode} | {mean:.2f} ({each}) | {mean - base:+.2f} |")
    if options.out:
        options.out.write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
