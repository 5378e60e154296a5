"""Batches of classes of the user's own: they train in stages as in plain Lightning, and different ones are noticed."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy, TrueGradient
from tests.batch.objects import KINDS
from tests.models import assert_same_state, dataset, make_trainer, state_of
from tests.ranks import run_ranks
from tests.two_stages import Two


class OfObjects(Two):
    """Trains on objects, and changes them in place."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch.x.mul_(2)
        return F.cross_entropy(self(batch.x), batch.y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch.x), batch.y))


def objects(kind: Any, sampler: Any = None) -> DataLoader[Any]:
    def collate(rows: list[Any]) -> Any:
        return kind(*map(torch.stack, zip(*rows)))

    return DataLoader(dataset(), batch_size=16, collate_fn=collate, sampler=sampler)


def plain(kind: Any) -> dict[str, Tensor]:
    pl.seed_everything(2, verbose=False)
    module = OfObjects()
    make_trainer().fit(module, objects(kind))
    return state_of(module)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_is_exact_on_batches_of_any_class(kind: Any, recwarn: pytest.WarningsRecorder) -> None:
    pl.seed_everything(2, verbose=False)
    module = OfObjects()
    make_trainer(callbacks=[SyntheticGradients(predictor=TrueGradient())]).fit(module, objects(kind))
    assert_same_state(state_of(module), plain(kind), exact=True)
    assert not [str(each.message) for each in recwarn if "could not be checked" in str(each.message)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_exact_on_batches_of_any_class(kind: Any) -> None:
    def work() -> dict[str, Tensor]:
        pl.seed_everything(2, verbose=False)
        module, callback = OfObjects(), SyntheticGradients(predictor=TrueGradient())
        strategy = SyntheticGradientStrategy(timeout=15.0)
        make_trainer(callbacks=[callback], devices=2, strategy=strategy).fit(module, objects(kind))
        return state_of(module)

    expected = plain(kind)
    for state in run_ranks(2, work):
        assert_same_state(state, expected)


class OfRank(Sampler[int]):
    """What a DistributedSampler gives each process: another part of the data."""

    def __iter__(self) -> Any:
        return iter(range(int(os.environ["RANK"]), len(dataset()), 2))

    def __len__(self) -> int:
        return len(dataset()) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_own_distributed_sampler_is_noticed(kind: Any) -> None:
    def work() -> None:
        trainer = make_trainer(devices=2, strategy=SyntheticGradientStrategy(timeout=15.0))
        trainer.fit(OfObjects(), objects(kind, OfRank()))

    last, _first = run_ranks(2, work, may_fail=True)
    assert last.kind == "BatchMismatchError"
    assert "the latter's has other values" in last.message
