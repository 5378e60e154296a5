"""``python -m examples.demo``: one network under plain backpropagation, and in two stages that do not wait.

Each training is a worker process of its own, ``python -m examples.demo --worker NAME --out FILE``; for the second
stage, Lightning starts the same command again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLAIN, DECOUPLED = "plain", "decoupled"
TITLES = {PLAIN: "plain, one process", DECOUPLED: "decoupled, two processes"}

# Wide enough that the time goes into matrix products, not into Python.
DEPTH, WIDTH, BATCH_SIZE, EPOCHS, LEARNING_RATE, SEED = 7, 1024, 64, 12, 1e-4, 0


# ---------------------------------------------------------------------- a worker: trains one network


def work(name: str, out: Path, epochs: int) -> None:
    """Trains and tests the network in one way.

    Args:
        name: ``"plain"`` or ``"decoupled"``.
        out: Where the process with the progress bar writes its record, as JSON.
        epochs: How long.
    """
    # Here and not above: the driver does without torch.
    import logging
    import warnings

    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import Callback

    from examples.digits import Digits, DigitsClassifier
    from lightning_sg import SyntheticGradients

    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")

    class Record(Callback):
        """Notes speed, accuracy and alignment."""

        def __init__(self) -> None:
            self.samples_per_second: list[float] = []
            self.val_accuracy: list[float] = []
            self.cosine: dict[str, list[float]] = {}
            self.cosine_epoch: list[int] = []

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.started = time.perf_counter()
            self.samples = 0

        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.samples += len(batch[1])
            self.stopped = time.perf_counter()
            metrics = trainer.callback_metrics
            parts = {tuple(key.split("/")): value for key, value in metrics.items()}
            # Of each boundary: "sg/cosine" is the mean of all, for the progress bar.
            cosines = {key[1]: value for key, value in parts.items() if len(key) == 3 and key[2] == "cosine"}
            for boundary, cosine in cosines.items():
                self.cosine.setdefault(boundary, []).append(float(cosine))
            if cosines:
                self.cosine_epoch.append(trainer.current_epoch)

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            # Validation lies between the last batch and here: it is not timed.
            self.samples_per_second.append(self.samples / (self.stopped - self.started))
            self.val_accuracy.append(float(trainer.callback_metrics["val_accuracy"]))

    pl.seed_everything(SEED, verbose=False)
    data = Digits(batch_size=BATCH_SIZE)
    # One stage has no Boundary: with the same seed, the weights are the same.
    model = DigitsClassifier(DEPTH, WIDTH, stages=2 if name == DECOUPLED else 1, learning_rate=LEARNING_RATE)
    record = Record()
    decoupled: dict[str, Any] = {"strategy": "synthetic_gradients", "devices": 2}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[SyntheticGradients(), record] if name == DECOUPLED else [record],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # the plot has the alignment of each batch
        **(decoupled if name == DECOUPLED else {"devices": 1}),
    )
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    if trainer.is_global_zero:
        result = {
            "samples_per_second": record.samples_per_second,
            "val_accuracy": record.val_accuracy,
            "cosine": record.cosine,
            "cosine_epoch": record.cosine_epoch,
            "test_accuracy": tested["test_accuracy"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        out.write_text(json.dumps(result))


# ---------------------------------------------------------------------- the driver: runs both, compares


def run_worker(name: str, out: Path, epochs: int) -> dict[str, Any]:
    """Runs one training to its end.

    Args:
        name: ``"plain"`` or ``"decoupled"``.
        out: A path for the worker's record.
        epochs: How long.

    Returns:
        The record.

    Raises:
        SystemExit: If the training fails; its own messages are in the terminal above.
    """
    command = [sys.executable, "-m", "examples.demo", "--worker", name, "--out", str(out), "--epochs", str(epochs)]
    # A process group of its own: Ctrl-C reaches this process alone, which then ends the group, whatever it is doing.
    worker = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, process_group=0
    )
    try:
        status = worker.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    if status != 0 or not out.exists():
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise SystemExit(f"The training '{TITLES[name]}' failed ({how}); see its messages above.")
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def speed(record: dict[str, Any]) -> float:
    """Training samples a second: the median of the epochs, without the first if there are more."""
    rates = record["samples_per_second"]
    return statistics.median(rates[1:] or rates)


def alignment(record: dict[str, Any]) -> dict[str, float]:
    """Each boundary's cosine of prediction to target, averaged over the last epoch."""
    last = record["cosine_epoch"].count(max(record["cosine_epoch"]))
    return {boundary: statistics.fmean(values[-last:]) for boundary, values in record["cosine"].items()}


def plot(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws errors over epochs and alignment over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    colours = {PLAIN: "#7f7f7f", DECOUPLED: "#0b6e99"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    for name, record in records.items():
        error = [100 * (1 - value) for value in record["val_accuracy"]]
        left.plot(range(1, len(error) + 1), error, "o-", markersize=4, color=colours[name], label=TITLES[name])
    left.set(xlabel="epoch", ylabel="wrong answers (%)")
    left.set_yscale("log", nonpositive="clip")
    left.set_yticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
    left.minorticks_off()
    left.set_ylim(0.8, 100)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("Validation error", loc="left", fontweight="bold")
    left.legend(loc="upper right", frameon=False)

    [(boundary, cosines)] = records[DECOUPLED]["cosine"].items()
    window = 15
    steps = range(1, len(cosines) + 1)
    smooth = [statistics.fmean(cosines[max(0, step - window) : step]) for step in steps]
    right.plot(steps, cosines, color=colours[DECOUPLED], alpha=0.3, linewidth=0.8, label="each batch")
    right.plot(steps, smooth, color=colours[DECOUPLED], linewidth=2, label=f"mean of {window} batches")
    right.axhline(0, color="#444444", linewidth=0.8)
    right.set(xlabel="training step", ylabel="cosine, synthetic to true gradient", ylim=(min(-0.05, *cosines), 1))
    right.set_title(f"Alignment at boundary '{boundary}'", loc="left", fontweight="bold")
    right.legend(loc="upper right", frameon=False)

    for axes in (left, right):
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.get_layout_engine().set(wspace=0.08)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def busy() -> str:
    """Why the speeds may not be comparable, or nothing."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    if processors < 2:
        return "There is one processor: two processes will not be faster than one."
    if processors - load < 1.5:
        return f"Other programs are busy (load {load:.1f} on {processors} processors): the speeds may be off."
    return ""


def drive(outputs: Path, epochs: int) -> None:
    """Trains in both ways, prints the comparison and draws the plot.

    Args:
        outputs: The folder for the plot.
        epochs: How long each network is trained.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    begun = time.perf_counter()
    console.print(f"[bold]Digits[/bold]: an MLP of {DEPTH} layers, {WIDTH} wide, {epochs} epochs, one thread a process")
    if warning := busy():
        console.print(f"[yellow]{warning}[/yellow]")
    records = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in (PLAIN, DECOUPLED):
                console.print(f"\n[bold]{TITLES[name][0].upper()}{TITLES[name][1:]}[/bold]")
                records[name] = run_worker(name, Path(folder) / f"{name}.json", epochs)
        finally:
            console.show_cursor()  # hidden by the progress bar of a worker that was ended

    table = Table(title="\nWhat was measured", title_justify="left")
    for heading in ("", "test accuracy", "training samples/s", "alignment"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, record in records.items():
        found = alignment(record) if record["cosine"] else {}
        table.add_row(
            TITLES[name],
            f"{100 * record['test_accuracy']:.1f} %",
            f"{speed(record):,.0f}",
            "\n".join(f"{boundary}: {cosine:.2f}" for boundary, cosine in found.items()) or "–",
        )
    console.print(table)
    ratio = speed(records[DECOUPLED]) / speed(records[PLAIN])
    path = outputs / "demo.png"
    plot(records, path)
    console.print(
        f"Decoupled, training went at {ratio:.2f} times the speed.\n"
        "[dim]samples/s: training only, the median of the epochs after the first\n"
        "alignment: cosine of synthetic to true gradient at each boundary, mean of the last epoch[/dim]\n"
        f"Plot: {path}, after {time.perf_counter() - begun:.0f} s"
    )


def main() -> None:
    """Reads the arguments; drives, or works."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="Two ways to train one network.")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="how long each is trained (default: %(default)s)")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder for the plot")
    parser.add_argument("--worker", choices=(PLAIN, DECOUPLED), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    if arguments.worker:
        work(arguments.worker, arguments.out, arguments.epochs)
        return
    # `kill` and a closed terminal are to end the workers too.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        drive(arguments.outputs, arguments.epochs)
    except KeyboardInterrupt:
        raise SystemExit("\nStopped.") from None


if __name__ == "__main__":
    main()
