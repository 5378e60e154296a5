"""Small cut modules, and the trace of one step of theirs."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_sg import Boundary
from lightning_sg.boundary import Boundaries
from lightning_sg.partition import Trace, trace_step

CPU = torch.device("cpu")
WIDTH, CLASSES, SAMPLES = 6, 3, 5
Loss = Callable[[Tensor, Tensor], Tensor]


class Cut(pl.LightningModule):
    """Parts with a boundary after each but the last, and a loss on what comes out."""

    def __init__(self, *parts: nn.Module, loss: Loss = F.cross_entropy) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.cuts = nn.ModuleList(Boundary() for _ in parts[1:])
        self.loss = loss

    def forward(self, x: Any) -> Any:
        for number, part in enumerate(self.parts):
            x = part(x)
            if number < len(self.cuts):
                x = self.cuts[number](x)
        return x

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        return self.loss(self(batch[0]), batch[1])


def linears(count: int = 3, loss: Loss = F.cross_entropy) -> Cut:
    sizes = [WIDTH] * count + [CLASSES]
    return Cut(*(nn.Linear(left, right) for left, right in itertools.pairwise(sizes)), loss=loss)


def labelled(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, *shape, generator=generator), torch.arange(SAMPLES) % CLASSES


def trace(module: pl.LightningModule, batch: Any = None, step: Callable[[], Any] | None = None) -> Trace:
    batch = labelled(WIDTH) if batch is None else batch
    boundaries = Boundaries(module, None)
    try:
        return trace_step(module, boundaries.sites, step or (lambda: module.training_step(batch)), CPU)
    finally:
        boundaries.remove()


class Counting(Cut):
    """Does everything that leaves marks in a module."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)), nn.Linear(WIDTH, CLASSES)
        )
        self.register_buffer("seen", torch.zeros(CLASSES))
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES)
        self.outputs: list[Tensor] = []
        self.recent: deque[int] = deque([1], maxlen=2)
        self.by_name: dict[str, int] = {}
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.names = {"before"}
        self.steps = 0
        self.logged = 0

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        x, labels = batch
        torch.rand(3), np.random.rand(3), random.random()
        self.steps += 1
        self.parts[0].steps = 1  # a submodule's attribute
        self.seen += 1
        scores = self(x)
        loss = F.cross_entropy(scores, labels)
        self.outputs.append(loss)
        self.recent.append(2)
        self.by_name["loss"] = 1
        self.counts["loss"] += 1
        self.names.add("after")
        self.accuracy(scores, labels)
        self.accuracy.update(scores, labels)
        self.log("loss", loss)
        self.log_dict({"loss": loss})
        self.last = scores
        return loss


def held(module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))
