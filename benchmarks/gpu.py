"""What synthetic gradients add to a step on a GPU, in time and in memory, all stages in one process.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --table --out benchmarks/gpu.json

All contestants take turns through the real Trainer on the same model and data, in rounds whose order rotates. A step's
time is that of many without waiting for the device, which is waited for at both ends. One process gains nothing from
stages that are independent: this is what they cost, to be weighed against a second device.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.overheads import Layers
from benchmarks.quiet import QUIET
from lightning_sg import GradientPredictor, LinearPredictor, LocalLoss, SyntheticGradients, ZeroPredictor

Model = tuple[Layers, list[str], tuple[torch.Tensor, torch.Tensor]]
WARM_UP = 10  # steps: kernels are loaded, predictors built, memory is warm


def small() -> Model:
    """Four layers of width 64: the device waits for the host."""
    layers: list[nn.Module] = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]
    batch = torch.randn(256, 64), torch.randint(0, 10, (256,))
    return Layers(nn.Identity(), layers, nn.Linear(64, 10)), ["layers.1"], batch


def mlp() -> Model:
    """Eight layers of width 4096 on 4096 samples."""
    layers: list[nn.Module] = [nn.Sequential(nn.Linear(4096, 4096), nn.ReLU()) for _ in range(8)]
    batch = torch.randn(4096, 4096), torch.randint(0, 1000, (4096,))
    return Layers(nn.Identity(), layers, nn.Linear(4096, 1000)), ["layers.3"], batch


def transformer() -> Model:
    """Twelve blocks of width 768 on 16 x 512 tokens of 32,000."""

    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, batch_first=True, norm_first=True)

    tokens = torch.randint(0, 32_000, (16, 512)), torch.randint(0, 32_000, (16, 512))
    model = Layers(nn.Embedding(32_000, 768), [block() for _ in range(12)], nn.Linear(768, 32_000))
    return model, ["layers.5"], tokens


MODELS: dict[str, Callable[[], Model]] = {
    "4 × Linear(64)": small,
    "8 × Linear(4096)": mlp,
    "12 transformer blocks": transformer,
}
PLAIN = "Lightning alone"
CONTESTANTS: dict[str, Callable[[], GradientPredictor | str] | None] = {
    PLAIN: None,
    "no gradient": ZeroPredictor,
    "linear predictor": LinearPredictor,
    "local loss": LocalLoss,
    "default predictor": lambda: "auto",
}


class Stopwatch(pl.Callback):
    """The time and the memory of the steps after the first."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.milliseconds = 0.0
        self.mebibytes = 0.0
        self._start = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_others: Any) -> None:
        """Starts it."""
        if trainer.global_step == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = time.perf_counter()

    def on_train_end(self, *_others: Any) -> None:
        """Stops it."""
        torch.cuda.synchronize()
        self.milliseconds = 1000 * (time.perf_counter() - self._start) / self.steps
        self.mebibytes = torch.cuda.max_memory_allocated() / 2**20


def measure(model: str, contestant: str, precision: Any, steps: int) -> dict[str, float]:
    """Trains for some steps: milliseconds a step, and the most memory in MiB."""
    pl.seed_everything(0, verbose=False)
    with torch.device("cuda"):
        module, cuts, batch = MODELS[model]()
    predictor = CONTESTANTS[contestant]
    watch = Stopwatch(steps)
    callbacks: list[pl.Callback] = [watch]
    if predictor is not None:
        callbacks.append(SyntheticGradients(boundaries=cuts, predictor=predictor()))  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=WARM_UP + steps,
        max_epochs=-1,
        precision=precision,
        callbacks=callbacks,
        log_every_n_steps=WARM_UP + steps + 1,
        **QUIET,
    )
    batches: Any = [batch] * (WARM_UP + steps)  # on the device: what is measured is the step, not its data's way there
    trainer.fit(module, DataLoader(batches, batch_size=None))
    del trainer, module, batches, callbacks
    gc.collect()  # there are cycles in it, and the next must find the memory empty
    torch.cuda.empty_cache()
    return {"milliseconds": watch.milliseconds, "MiB": watch.mebibytes}


def contest(model: str, precision: Any, rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """The measurements of each contestant, round by round."""
    names = list(CONTESTANTS)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            found[name].append(measure(model, name, precision, steps))
    return found


def table(found: dict[str, Any]) -> str:
    """What was measured, as Markdown: medians, and of the ratios their range."""
    lines = [f"{found['device']}, torch {found['torch']}.", ""]
    lines += ["| model | precision | contestant | a step, ms | over Lightning alone | memory, MiB |", "|---" * 6 + "|"]
    for entry in found["contests"]:
        plain = [each["milliseconds"] for each in entry["found"][PLAIN]]
        for name, rounds in entry["found"].items():
            own = [each["milliseconds"] for each in rounds]
            ratios = [one / other for one, other in zip(own, plain)]
            lines.append(
                f"| {entry['model']} | {entry['precision']} | {name} | {statistics.median(own):.2f} | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
                f"{max(each['MiB'] for each in rounds):.0f} |"
            )
    return "\n".join(lines)


CONTESTS = [
    ("4 × Linear(64)", "32-true", 200),
    ("8 × Linear(4096)", "32-true", 15),
    ("8 × Linear(4096)", "16-mixed", 60),
    ("12 transformer blocks", "bf16-mixed", 20),
]


def main() -> None:
    """Measures, or prints the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the measurements as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only print what the file has")
    options = parser.parse_args()
    if not options.table:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        contests = []
        for model, precision, steps in CONTESTS:
            found = contest(model, precision, options.rounds, steps)
            contests.append({"model": model, "precision": precision, "found": found})
            record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "contests": contests}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
