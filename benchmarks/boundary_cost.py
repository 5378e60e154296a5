"""What a boundary costs in one process: processor time and torch operations of a training step, beside plain Lightning.

    python -m benchmarks.boundary_cost --rounds 7

A network of six layers with BatchNorm, and a small residual CNN, through the real Trainer on one thread, with batches
that are ready in memory. The runs take turns, and each is compared with the plain run of its own round.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from benchmarks.quiet import QUIET
from lightning_sg import ExactGradients, LinearPredictor, LocalLoss, SyntheticGradients, ZeroPredictor
from lightning_sg.lightning_api import pl

#: Steps at the start that are not counted: the first is traced, predictors are built, and they look at every target.
WARM = 72
#: Exact gradients travel on every how many-th batch: the cost of a step is a mean over as many.
EVERY = ExactGradients().every


class Stack(pl.LightningModule):
    """Layers one after the other, trained on class labels."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as most users write it."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Residual(nn.Module):
    """Two 3 × 3 convolutions with BatchNorm around a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride=stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to ``(N, out, H / stride, W / stride)``."""
        inner = F.relu(self.norms[0](self.first(maps)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(maps))


def mlp() -> tuple[Stack, list[str], tuple[Tensor, Tensor]]:
    """Six layers of 256 on batches of 256."""
    layers = [nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()) for _ in range(6)]
    batch = torch.randn(256, 256), torch.randint(0, 10, (256,))
    return Stack([*layers, nn.Linear(256, 10)]), [f"layers.{place}" for place in range(6)], batch


def cnn() -> tuple[Stack, list[str], tuple[Tensor, Tensor]]:
    """Six residual blocks of 16 to 64 channels on batches of 64 images of 32 × 32."""
    sizes = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    batch = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    return Stack([stem, *(Residual(*size) for size in sizes), head]), ["layers.1", "layers.3", "layers.5"], batch


class Meter(pl.Callback):
    """Notes of each step the processor time and the wall time in seconds, or the number of its torch operations."""

    def __init__(self, *, counts: bool) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.operations: list[int] = []
        self.names: Counter[str] = Counter()
        self._counting = _Counting(self.names) if counts else nullcontext()
        self._last = (0.0, 0.0, 0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins to count."""
        self._counting.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is over."""
        now, last = self._now(), self._last
        if batch_idx >= WARM:
            self.cpu.append(now[0] - last[0])
            self.wall.append(now[1] - last[1])
            self.operations.append(now[2] - last[2])
        else:
            self.names.clear()
        self._last = self._now()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The run is over."""
        self._counting.__exit__(None, None, None)

    def _now(self) -> tuple[float, float, int]:
        return time.process_time(), time.perf_counter(), sum(self.names.values())


class _Counting(TorchDispatchMode):
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counted[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


#: What is at the boundaries; ``None`` for plain Lightning.
PREDICTORS: dict[str, Callable[[], Any]] = {
    "plain": lambda: None,
    "one boundary, default": lambda: "one",
    "default": lambda: "auto",
    "LocalLoss": LocalLoss,
    "LinearPredictor": LinearPredictor,
    "no gradient": ZeroPredictor,
}


def run(model: str, predictor: Any, steps: int, *, counts: bool = False) -> Meter:
    """Trains for some steps and returns what was noted.

    Args:
        model: Its name.
        predictor: At the boundaries; ``"one"`` for the default at one of them, ``None`` for no boundaries.
        steps: How many.
        counts: Whether to count operations.
    """
    pl.seed_everything(0, verbose=False)
    module, cuts, batch = MODELS[model]()
    meter = Meter(counts=counts)
    callbacks: list[pl.Callback] = [meter]
    if predictor is not None:
        boundaries = cuts[len(cuts) // 2 :][:1] if predictor == "one" else cuts
        chosen = "auto" if predictor == "one" else predictor
        callbacks.insert(0, SyntheticGradients(boundaries=boundaries, predictor=chosen))
    trainer = pl.Trainer(accelerator="cpu", max_steps=steps, max_epochs=1, **QUIET, callbacks=callbacks)
    trainer.fit(module, DataLoader([batch] * (steps + 1), batch_size=None))
    return meter


def operations(model: str, predictor: Any) -> list[int]:
    """The number of torch operations of each of some steps."""
    return run(model, predictor, WARM + 15, counts=True).operations


MODELS: dict[str, Callable[[], tuple[Stack, list[str], tuple[Tensor, Tensor]]]] = {"mlp": mlp, "cnn": cnn}
#: What is measured of each model.
ROWS = {"mlp": list(PREDICTORS), "cnn": ["plain", "default", "LocalLoss"]}


def typical(steps: Sequence[float]) -> float:
    """The cost of a step: the median over groups of steps, in each of which an exact gradient travels once."""
    return statistics.median(statistics.fmean(group) for group in zip(*[iter(steps)] * EVERY))


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=136, help="a run has")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print("| model | boundaries | CPU time of a step, ms | of plain | wall time, of plain | torch operations |")
    print("|---|---|---|---|---|---|")
    for model in options.models:
        meters: dict[str, list[Meter]] = {row: [] for row in ROWS[model]}
        for _ in range(options.rounds):
            for row in ROWS[model]:
                meters[row].append(run(model, PREDICTORS[row](), options.steps))
        for row, own in meters.items():
            cpu = [typical(meter.cpu) for meter in own]
            plain = meters["plain"]
            shares = [mine / typical(other.cpu) for mine, other in zip(cpu, plain)]
            walls = [typical(a.wall) / typical(b.wall) for a, b in zip(own, plain)]
            counted = typical(operations(model, PREDICTORS[row]()))
            print(
                f"| {model} | {row} | {1000 * statistics.median(cpu):.1f} | {statistics.median(shares):.2f} "
                f"({min(shares):.2f} to {max(shares):.2f}) | {statistics.median(walls):.2f} | {counted:.0f} |"
            )


if __name__ == "__main__":
    main()
