"""Stages that are given different batches say so."""

from __future__ import annotations

import os
from collections import UserDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy
from tests.models import dataset, make_trainer
from tests.ranks import run_ranks
from tests.refused import Stages, fit_split
from tests.two_stages import Two


def shuffled_by_rank() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    return DataLoader(dataset(), batch_size=10, shuffle=True, generator=generator)


def test_stages_that_see_different_batches() -> None:
    last, first = fit_split(Stages, data=shuffled_by_rank)
    assert last.kind == "BatchMismatchError"
    assert "stage 1 (rank 0) and stage 0 (rank 1) were given different batches at training batch 0" in last.message
    assert first.kind == "StageLostError"
    assert "stage 1 (rank 0) failed at training batch 0" in first.message


def sized_by_rank() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=10 + int(os.environ["RANK"]))


def test_stages_that_see_batches_of_different_size() -> None:
    last, _first = fit_split(Stages, data=sized_by_rank)
    assert "has activations of shape [(11, 8)] where [(10, 8)] are due" in last.message


class Batch(UserDict[str, Tensor]):
    """A batch of a class of its own, as tokenizers return."""


class Named(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])


def named_by_rank() -> Any:
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    return torch.utils.data.DataLoader(
        dataset(),
        batch_size=16,
        shuffle=True,
        generator=generator,
        collate_fn=lambda rows: Batch(x=torch.stack([r[0] for r in rows]), y=torch.stack([r[1] for r in rows])),
    )


def test_different_batches_are_noticed_in_containers_of_any_class() -> None:
    def work() -> None:
        strategy = SyntheticGradientStrategy(timeout=15.0)
        make_trainer(strategy=strategy, devices=2, callbacks=[SyntheticGradients(context="y")]).fit(
            Named(), named_by_rank()
        )

    last, _first = run_ranks(2, work, may_fail=True)
    assert last.kind == "BatchMismatchError"
