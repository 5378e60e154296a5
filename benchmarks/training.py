"""One training of a comparison, as a process of its own: ``python -m benchmarks.training --run JSON --out FILE``."""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import time
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from benchmarks.quiet import QUIET
from benchmarks.runs import Run
from benchmarks.tasks import ALL_METHODS, TASKS
from lightning_sg import NonFiniteLossError, SyntheticGradientStrategy


class Curve(Callback):
    """Notes step, seconds and a metric at every validation within the training.

    The clock stands still while validating. All processes wait for each other before it stops and before it goes on:
    else the first stage, which is ahead, would count the others' last steps as validation.

    Args:
        key: The metric.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.points: list[tuple[int, float, float | None]] = []
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._running_since: tuple[float, float] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._start(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the metric and lets the clock go on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self.note(trainer)
            self._start(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock for good."""
        self._stop(trainer)

    def note(self, trainer: pl.Trainer) -> None:
        """Adds a point with the metric of the validation that has just ended."""
        value = trainer.callback_metrics.get(self.key)
        self.points.append((trainer.global_step, round(self.seconds, 3), None if value is None else finite(value)))

    def _start(self, trainer: pl.Trainer) -> None:
        trainer.strategy.barrier()
        self._running_since = time.monotonic(), time.process_time()

    def _stop(self, trainer: pl.Trainer) -> None:
        trainer.strategy.barrier()
        if self._running_since is not None:
            self.seconds += time.monotonic() - self._running_since[0]
            self.cpu_seconds += time.process_time() - self._running_since[1]
        self._running_since = None


class Fingerprint(Callback):
    """A number that is the same for runs that start from the same weights and see the same labels in the same order.

    Args:
        module: The model before its training.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.value = 0
        for parameter in module.parameters():
            self._add(parameter.detach())

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Counts the batch in."""
        self._add(batch[1])

    def _add(self, tensor: torch.Tensor) -> None:
        self.value = zlib.crc32(tensor.contiguous().numpy().tobytes(), self.value)


def finite(value: Any) -> float | None:
    """A number for a JSON file, which has none for infinity and NaN."""
    value = float(value)
    return value if math.isfinite(value) else None


def train(run: Run, folders: dict[str, Path | None]) -> dict[str, Any] | None:
    """Trains once.

    Args:
        run: What, how, and from which seed.
        folders: Where the data are, by name.

    Returns:
        What is to be recorded, in the process that records; ``None`` in the others.
    """
    task, method = TASKS[run.task], ALL_METHODS[run.method]
    pl.seed_everything(run.seed, verbose=False)
    data = task.data(folders[task.folder] if task.folder else None, run.seed)
    module = task.model(learning_rate=run.learning_rate, **task.splits[run.split].model)
    # The steps are those of the task's own batches, however large they are.
    data.setup("fit")
    steps = max(1, round(run.budget * task.epochs * len(data.train_dataloader())))
    if method:
        method.prepare(module, data)
    curve, fingerprint = Curve(task.metric.watched), Fingerprint(module)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=run.devices,
        strategy=SyntheticGradientStrategy(wire=run.wire) if run.devices > 1 else "auto",  # type: ignore[arg-type]
        callbacks=[
            curve,
            fingerprint,
            *([method.callback(task.splits[run.split])] if method and not method.whole else []),
        ],
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=math.ceil(steps / run.points),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **QUIET,
    )
    # From here on, runs of the same seed draw the same numbers, whatever was drawn to make model and data.
    pl.seed_everything(run.seed, verbose=False)
    metrics: dict[str, float | None] = {}
    error = None
    try:
        trainer.fit(module, data)
        metrics = {key: finite(value) for key, value in trainer.callback_metrics.items() if key.startswith("val_")}
        if not curve.points or curve.points[-1][0] != trainer.global_step:
            (validated,) = trainer.validate(module, data, verbose=False)
            metrics = {key: finite(value) for key, value in validated.items()}
            curve.note(trainer)
        if task.metric.key not in metrics:
            (tested,) = trainer.test(module, data, verbose=False)
            metrics |= {key: finite(value) for key, value in tested.items()}
    except NonFiniteLossError as caught:
        error = str(caught)
    if not trainer.is_global_zero:
        return None
    return {
        "metrics": metrics,
        # An error rate stays finite when all else is NaN: only the loss tells.
        "diverged": error is not None or metrics.get("val_loss") is None,
        "error": error,
        "curve": curve.points,
        "steps": trainer.global_step,
        "seconds": round(curve.seconds, 3),
        "cpu_seconds": round(curve.cpu_seconds, 3),  # of this process: what a busy machine does not stretch
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "fingerprint": fingerprint.value,
        "torch": torch.__version__,
    }


def main() -> None:
    """Trains what the arguments say and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--shakespeare", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    run = Run(**json.loads(options.run))
    result = train(run, {"mnist": options.mnist, "shakespeare": options.shakespeare})
    if result is not None:
        options.out.write_text(json.dumps({**asdict(run), **result}))


if __name__ == "__main__":
    main()
