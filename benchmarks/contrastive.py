"""Losses that take no labels: they compare the samples of a batch, or normalize what they compare with a goal.

    python -m benchmarks.contrastive --seeds 0 1 2

A small network of three stages learns points of which there are two noisy versions each. Plain backpropagation, default
predictors, and predictors that are not told the loss (``context=None``) have equal weights and batches. The table shows
the loss on held-out points, and the mean cosine of the default's predictions over the last batches.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.accuracy import spread
from benchmarks.quiet import QUIET
from lightning_sg import SyntheticGradients
from lightning_sg.lightning_api import pl

FEATURES, LATENT, BATCH, STEPS = 64, 8, 16, 300
#: From the network and two versions of the points to the loss.
Loss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


def simclr(network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Normalized temperature-scaled cross-entropy (Chen et al. 2020, arXiv 2002.05709, equation 1)."""
    points, number = F.normalize(network(torch.cat([first, second])), dim=1), len(first)
    alike = (points @ points.t() / 0.2).masked_fill(torch.eye(2 * number, dtype=torch.bool), -1e9)
    return F.cross_entropy(alike, torch.arange(2 * number).roll(number))


def barlow_twins(network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """The cross-correlation of two versions shall be the identity (Zbontar et al. 2021, arXiv 2103.03230)."""
    left, right = (
        (half - half.mean(0)) / (half.std(0) + 1e-4) for half in network(torch.cat([first, second])).chunk(2)
    )
    matrix = left.t() @ right / len(left)
    diagonal = torch.diagonal(matrix)
    return (diagonal - 1).square().sum() + 0.005 * (matrix.square().sum() - diagonal.square().sum())


def vicreg(network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Invariance, variance and covariance (Bardes et al. 2022, arXiv 2105.04906)."""
    halves = network(torch.cat([first, second])).chunk(2)
    loss = 25 * F.mse_loss(*halves)
    for half in halves:
        centred = half - half.mean(0)
        matrix = centred.t() @ centred / (len(half) - 1)
        variances = torch.diagonal(matrix)
        loss = loss + 25 * F.relu(1 - (variances + 1e-4).sqrt()).mean()
        loss = loss + (matrix.square().sum() - variances.square().sum()) / half.shape[1]
    return loss


def siglip(network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """A sigmoid for each pair (Zhai et al. 2023, arXiv 2303.15343)."""
    left, right = (F.normalize(half, dim=1) for half in network(torch.cat([first, second])).chunk(2))
    signs = 2 * torch.eye(len(left)) - 1
    return -F.logsigmoid(signs * (10 * left @ right.t() - 5)).mean()


def triplet(network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """A version of the same point is nearer than another point (Schroff et al. 2015, arXiv 1503.03832)."""
    anchor, positive = network(torch.cat([first, second])).chunk(2)
    return F.triplet_margin_loss(anchor, positive, positive.roll(1, 0))


def to_a_text(network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """As CLIP trains an encoder beside a frozen one (Radford et al. 2021, arXiv 2103.00020)."""
    alike = F.normalize(network(first), dim=1) @ F.normalize(second[:, :16], dim=1).t() / 0.1
    places = torch.arange(len(first))
    return (F.cross_entropy(alike, places) + F.cross_entropy(alike.t(), places)) / 2


def direction(network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Points where a goal does, as in distillation."""
    return 1 - F.cosine_similarity(network(first), second[:, :16]).mean()


LOSSES: dict[str, Loss] = {
    "SimCLR": simclr,
    "Barlow Twins": barlow_twins,
    "VICReg": vicreg,
    "SigLIP": siglip,
    "triplets": triplet,
    "CLIP, beside a frozen encoder": to_a_text,
    "cosine similarity to a goal": direction,
}
METHODS: dict[str, dict[str, Any] | None] = {"backpropagation": None, "default": {}, "not told": {"context": None}}


class Encoder(pl.LightningModule):
    """Three stages.

    Args:
        loss: Its loss.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        self.stages = nn.Sequential(
            nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU()),
            nn.Sequential(nn.Linear(32, 32), nn.ReLU()),
            nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        return self.loss(self.stages, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@dataclass
class Cosines(pl.Callback):
    """Notes the mean cosine over boundaries of each batch."""

    found: list[float] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is over."""
        metrics = trainer.callback_metrics
        cosines = [float(value) for name, value in metrics.items() if name.endswith("/cosine")]
        self.found += [statistics.mean(cosines)] if cosines else []


def points(count: int, directions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two versions of some points, each ``(count, FEATURES)``."""
    centres = torch.randn(count, LATENT, generator=generator) @ directions
    noise = 0.5 * torch.randn(2, count, FEATURES, generator=generator)
    return centres + noise[0], centres + noise[1]


def run(loss: Loss, method: str, seed: int) -> tuple[float, float | None]:
    """Trains, and returns the held-out loss and the cosine."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(LATENT, FEATURES, generator=generator)
    batches = [points(BATCH, directions, generator) for _ in range(STEPS)]
    held_out = [points(64, directions, generator) for _ in range(8)]
    pl.seed_everything(seed, verbose=False)
    module, cosines, options = Encoder(loss), Cosines(), METHODS[method]
    callbacks: list[pl.Callback] = [cosines]
    if options is not None:
        callbacks.insert(0, SyntheticGradients(boundaries=["stages.0", "stages.1"], **options))
    quiet = {**QUIET, "log_every_n_steps": 1}
    pl.Trainer(accelerator="cpu", max_epochs=1, **quiet, callbacks=callbacks).fit(
        module, DataLoader(batches, batch_size=None)
    )
    with torch.no_grad():
        value = statistics.mean(float(loss(module.stages, *pair)) for pair in held_out)
    return value, statistics.mean(cosines.found[-50:]) if cosines.found else None


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"| loss | {' | '.join(METHODS)} | cosine |")
    print("|---|" + "---|" * (len(METHODS) + 1))
    for name in options.losses:
        found = {method: [run(LOSSES[name], method, seed) for seed in options.seeds] for method in METHODS}
        cells = [spread([value for value, _cosine in runs], "{:.3f}".format) for runs in found.values()]
        cosine = statistics.mean(cosine for _value, cosine in found["default"] if cosine is not None)
        print(f"| {name} | {' | '.join(cells)} | {cosine:.2f} |", flush=True)


if __name__ == "__main__":
    main()
