"""The work of stages: what is counted, and what a cut goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_sg import Boundary, SyntheticGradients
from lightning_sg.partition.placement import stage_costs
from lightning_sg.partition.work import Work, WorkCounter
from lightning_sg.tools.plan import plan
from tests.partition.models import CLASSES, WIDTH, Cut, labelled, trace

SAMPLES = len(labelled(WIDTH)[0])
FLOAT = 4


def model(*layers: nn.Module) -> pl.LightningModule:
    return Cut(nn.Sequential(*layers), nn.Linear(WIDTH, CLASSES))


def test_arithmetic_and_memory_add_up() -> None:
    work = (Work(10, 2) + Work(5, 1) * 2 - Work(0, 1)) * 2
    assert work == Work(40, 6)
    assert work.on("cpu") == 40 + 8 * 6
    assert work.on("cuda") > work.on("cpu"), "a GPU computes more in the time that it takes to read a byte"


@pytest.mark.parametrize(
    ("operation", "values"),
    [
        (lambda x: x.relu(), 2 * 12),
        (lambda x: x + x, 3 * 12),
        (lambda x: x.sum(), 12 + 1),
        (lambda x: x.view(4, 3), 0),
        (lambda x: x.detach(), 0),
        (lambda x: x.t(), 0),
        (lambda x: x[torch.tensor([1])], 2 * 4),
        (lambda x: nn.functional.embedding(torch.tensor([0, 1]), x), 2 * 8),
        (lambda x: x.mul_(2), 2 * 12),
        (lambda x: torch.empty_like(x), 0),
    ],
)
def test_an_operation_moves_what_it_reads_and_writes(operation: Callable[[Tensor], Any], values: int) -> None:
    x = torch.ones(3, 4)
    with WorkCounter() as counter:
        operation(x)
    # What an index or a scalar beside it is costs a few bytes more.
    assert counter.forward.bytes == pytest.approx(values * FLOAT, abs=20)


def test_activation_functions_and_normalisation_are_work() -> None:
    bare, full = (
        trace(model(nn.Linear(WIDTH, WIDTH), *more)) for more in ((), (nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Dropout()))
    )
    assert bare.flops == full.flops
    assert full.work[0].step.bytes > 2 * bare.work[0].step.bytes


def flops_of_step(module: pl.LightningModule) -> int:
    with FlopCounterMode(display=False) as counter:
        module.training_step(labelled(WIDTH)).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Linear(WIDTH, WIDTH),),
        (nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
        (nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
        (nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 1, 3, padding=1), nn.Flatten()),
        (
            nn.Linear(WIDTH, 8 * WIDTH),
            nn.Unflatten(1, (8, WIDTH)),
            nn.TransformerEncoderLayer(WIDTH, 1, batch_first=True),
            nn.Flatten(),
            nn.Linear(8 * WIDTH, WIDTH),
        ),
    ],
    ids=["one layer", "two layers", "the first is frozen", "convolutions", "attention"],
)
def test_backward_passes_are_counted_as_they_run(layers: tuple[nn.Module, ...]) -> None:
    """A first layer computes no gradient of its input, and a frozen one none of its weight."""
    module = model(*layers)
    traced = trace(module)
    assert sum(work.step.flops for work in traced.work) == pytest.approx(flops_of_step(module), rel=0.05)


def test_a_frozen_first_part_costs_its_forward_pass_alone() -> None:
    def cost(trains: bool) -> float:
        backbone = nn.Sequential(nn.Linear(WIDTH, 400), nn.ReLU(), nn.Linear(400, WIDTH)).requires_grad_(trains)
        module = model(backbone, Trained())
        return stage_costs(module, trace(module))[0]

    assert cost(False) < 0.4 * cost(True)


class Trained(nn.Module):
    """Makes a frozen stage carry a gradient, and costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_shared_pass_counts_as_often_as_it_is_run() -> None:
    class Twice(Cut):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch) + super().training_step(batch)

    once, twice = (kind(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)) for kind in (Cut, Twice))
    assert trace(twice).work[0].step.bytes == 2 * trace(once).work[0].step.bytes


class Deep(pl.LightningModule):
    """Layers between which there may be cuts."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])


def test_cuts_balance_memory_as_well_as_arithmetic() -> None:
    """Equal arithmetic in all four blocks, but the first two move far more."""

    def block(*more: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(256, 256), *more, nn.ReLU())

    heavy = [nn.BatchNorm1d(256), nn.GELU(), nn.BatchNorm1d(256), nn.GELU(), nn.BatchNorm1d(256), nn.GELU()]
    batch = torch.randn(256, 256), torch.randint(0, 4, (256,))
    even, uneven = (
        Deep(block(*more), block(*more), *(block() for _ in range(4)), nn.Linear(256, 4)) for more in ((), heavy)
    )
    cuts = [
        int(plan(each, batch, SyntheticGradients(boundaries="auto"), 2).boundaries[0].name.split(".")[1])
        for each in (even, uneven)
    ]
    assert cuts[0] > cuts[1]
    assert not any(isinstance(child, Boundary) for child in even.modules())
