"""Stages that are given different batches say so."""

from __future__ import annotations

import os
import re
import time
from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy, SyntheticInputs
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


def cut_by_rank(*lengths: int, batch_size: int = 10, shuffle: bool = False) -> Any:
    """The first samples of the same data, another number on each rank."""

    def data() -> DataLoader[Any]:
        part = torch.utils.data.Subset(dataset(), range(lengths[int(os.environ["RANK"])]))
        return DataLoader(part, batch_size=batch_size, shuffle=shuffle)

    return data


def test_stages_that_see_batches_of_different_size_name_the_sizes() -> None:
    last, first = fit_split(Stages, data=sized_by_rank)
    for failure in (last, first):
        assert "the latter's batch has 11 samples, here 10" in failure.message
        assert "other values" not in failure.message


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ((50, 30), "the latter's data loader gives 3 batches, here 5"),
        ((30, 50), "the latter's data loader gives 5 batches, here 3"),
    ],
)
def test_loaders_of_different_length_are_told_at_the_first_batch(
    lengths: tuple[int, ...], said: str, shuffle: bool
) -> None:
    last, first = fit_split(Stages, data=cut_by_rank(*lengths, shuffle=shuffle))
    assert last.kind == "BatchMismatchError"
    for failure in (last, first):
        assert "were given different batches at training batch 0" in failure.message
        assert said in failure.message
        assert "other values" not in failure.message


def test_a_last_batch_of_another_size_is_told_by_its_size() -> None:
    last, _first = fit_split(Stages, data=cut_by_rank(28, 25))
    assert "at training batch 2" in last.message
    assert "the latter's batch has 5 samples, here 8" in last.message


def test_loaders_of_evaluation_of_different_length_are_told_too() -> None:
    def work() -> None:
        trainer = make_trainer(strategy=SyntheticGradientStrategy(timeout=15.0), devices=2)
        trainer.validate(Two(), cut_by_rank(40, 20)(), verbose=False)

    last, _first = run_ranks(2, work, may_fail=True)
    assert last.kind == "BatchMismatchError"
    assert "at validation batch 0: the latter's data loader gives 2 batches, here 4" in last.message


class Endless(IterableDataset[Any]):
    """Batches whose number nobody knows."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(torch.utils.data.Subset(dataset(), range(self.samples)))


class TwoSets(Two):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ((40, 20), "validation batch 2: the latter is at validation batch 0 already, because the latter was given"),
        (
            (20, 40),
            "validation batch 0: the latter is at validation batch 2 already, because this process was given",
        ),
    ],
)
def test_a_neighbour_that_has_gone_on_to_other_data_is_told_as_that(lengths: tuple[int, ...], said: str) -> None:
    def work() -> None:
        trainer = make_trainer(strategy=SyntheticGradientStrategy(timeout=15.0), devices=2)
        own = lengths[int(os.environ["RANK"])]
        loaders = [DataLoader(Endless(samples), batch_size=10) for samples in (own, 40)]
        trainer.validate(TwoSets(), loaders, verbose=False)

    last, _first = run_ranks(2, work, may_fail=True)
    assert last.kind == "BatchMismatchError"
    assert said in last.message


@pytest.mark.parametrize("inputs", [None, SyntheticInputs()], ids=["true inputs", "predicted inputs"])
@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (
            (100, 30),
            r"^stage 1 .*it is the last batch of the latter, which was given fewer batches than this process",
        ),
        ((30, 100), r"it is the last batch of (this process|the latter), which was given fewer batches than"),
    ],
)
def test_an_end_that_one_stage_comes_to_first_is_told_without_a_wait(
    lengths: tuple[int, ...], said: str, inputs: Any
) -> None:
    def work() -> None:
        data = DataLoader(Endless(lengths[int(os.environ["RANK"])]), batch_size=10)
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=30.0),
            devices=2,
            callbacks=[SyntheticGradients(inputs=inputs)],
        )
        trainer.fit(Two(), data)

    begun = time.monotonic()
    failures = run_ranks(2, work, may_fail=True)
    assert time.monotonic() - begun < 20
    found = [failure.message for failure in failures if failure.kind == "BatchMismatchError"]
    assert found
    for message in found:
        assert re.search(said, message)


@pytest.mark.parametrize("use", ["validate", "test", "predict"])
def test_an_end_of_evaluation_that_one_stage_comes_to_first_is_told(use: str) -> None:
    class Evaluated(Two):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    def work() -> None:
        data = DataLoader(Endless((50, 30)[int(os.environ["RANK"])]), batch_size=10)
        trainer = make_trainer(strategy=SyntheticGradientStrategy(timeout=15.0), devices=2)
        getattr(trainer, use)(Evaluated(), data)

    last, _first = run_ranks(2, work, may_fail=True)
    assert last.kind == "BatchMismatchError"
    assert "it is the last batch of the latter, which was given fewer batches than this process" in last.message


def test_loaders_of_unknown_length_train_as_before() -> None:
    def work() -> None:
        trainer = make_trainer(strategy=SyntheticGradientStrategy(timeout=15.0), devices=2)
        data = DataLoader(Endless(40), batch_size=10)
        trainer.fit(TwoSets(), data, [data, data])

    assert run_ranks(2, work) == [None, None]
