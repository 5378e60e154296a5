"""Modules whose losses take other things from the batch than labels under a usual name, after the likes of packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_sg import Boundary

SAMPLES, WIDTH, OUTPUTS, STEPS = 70, 6, 4, 5
Loss = Callable[["Seen", Tensor, Any], Tensor]


class Seen(pl.LightningModule):
    """Two stages and a loss of the output, the batch and the module."""

    def __init__(self, loss: Loss, inputs: Callable[[Any], Tensor] = lambda batch: batch[0], width: int = 32) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.cut = Boundary()
        self.last = nn.Linear(width, OUTPUTS)
        self.dispersion = nn.Parameter(torch.zeros(OUTPUTS))
        self.register_buffer("scale", torch.full((OUTPUTS,), 2.0))
        self.metric = MaskedError()
        self.loss, self.inputs = loss, inputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, self.last(self.cut(self.first(self.inputs(batch)))), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class MaskedError(Metric):
    """A loss that is a metric, with missing goals and weights."""

    is_differentiable = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, goal: Tensor, weight: Tensor) -> None:
        mask = goal.isfinite()
        losses = F.mse_loss(output, goal.nan_to_num(nan=0.0), reduction="none") * weight.unsqueeze(1) * mask
        self.total += losses.sum()
        self.count += mask.sum()

    def compute(self) -> Tensor:
        return self.total / self.count


@dataclass
class Molecules:
    """A batch as an object."""

    X: Tensor
    Y: Tensor
    w: Tensor

    def to(self, device: Any) -> Molecules:
        return Molecules(self.X.to(device), self.Y.to(device), self.w.to(device))


def tensors(samples: int = SAMPLES, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, goals that depend on them, counts, and positive weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, WIDTH, generator=generator)
    goal = torch.tanh(x @ torch.randn(WIDTH, OUTPUTS, generator=generator))
    return x, goal, (goal.abs() * 5).round(), torch.rand(samples, generator=generator) + 0.5


def batches(make: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> DataLoader[Any]:
    """Batches of 16, the last of 6, each made from inputs, goals, counts and weights."""
    data = list(zip(*tensors()))
    return DataLoader(data, batch_size=16, collate_fn=lambda rows: make(*(torch.stack(each) for each in zip(*rows))))


def pinball(output: Tensor, goal: Tensor) -> Tensor:
    """A quantile loss: the outputs are quantiles of the first goal."""
    losses = []
    for place, quantile in enumerate((0.1, 0.4, 0.6, 0.9)):
        error = goal[:, 0] - output[:, place]
        losses.append(torch.max((quantile - 1) * error, quantile * error).unsqueeze(1))
    return torch.cat(losses, dim=1).mean()


def negative_binomial(module: Seen, output: Tensor, counts: Tensor) -> Tensor:
    """The likelihood of counts, with a learned dispersion for each output."""
    logits = F.softplus(output).add(1e-4).log() - module.dispersion
    likelihood = torch.distributions.NegativeBinomial(module.dispersion.exp(), logits=logits).log_prob(counts)
    return -likelihood.sum(-1).mean()


def contrast(output: Tensor) -> Tensor:
    """Each sample's two versions shall be more alike than those of different samples (Chen et al. 2020, SimCLR)."""
    points, number = F.normalize(output, dim=1), len(output) // 2
    alike = (points @ points.t() / 0.5).masked_fill(torch.eye(2 * number, dtype=torch.bool), -1e9)
    others = torch.arange(2 * number).roll(number)
    return F.cross_entropy(alike, others)


def variances(first: Tensor, second: Tensor) -> Tensor:
    """Two versions alike, each with a spread of its own in every output (Bardes et al. 2022, VICReg)."""
    spread = [F.relu(1 - (half.var(0) + 1e-4).sqrt()).mean() for half in (first, second)]
    return F.mse_loss(first, second) + sum(spread)


__all__ = ["Molecules", "Seen", "batches", "contrast", "negative_binomial", "pinball", "tensors", "variances"]
