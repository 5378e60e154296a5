"""Processes that were set up differently are refused, with what differs on which rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_sg import LocalLoss, SyntheticGradients, SyntheticGradientStrategy
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks


def refused(
    callback: Callable[[bool], SyntheticGradients] = lambda odd: SyntheticGradients(),
    strategy: Callable[[bool], Any] = lambda odd: SyntheticGradientStrategy(timeout=20.0),
    module: Callable[[bool], pl.LightningModule] = lambda odd: Classifier(),
    **flags: Callable[[bool], Any],
) -> list[str]:
    """What the ranks of a run are refused with in which rank 1 is set up in an odd way."""

    def work() -> None:
        odd = os.environ["RANK"] == "1"
        pl.seed_everything(5, verbose=False)
        given = {name: make(odd) for name, make in flags.items()}
        trainer = make_trainer(strategy=strategy(odd), devices=2, callbacks=[callback(odd)], **given)
        trainer.fit(module(odd), loader())

    results = run_ranks(2, work, may_fail=True)
    assert [result.kind for result in results] == ["SyntheticGradientsError"] * 2
    return [result.message for result in results]


class Deeper(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(3, 2)


class OtherRate(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"callback": lambda odd: SyntheticGradients(delay=2 if odd else 1)},
        "SyntheticGradients(delay=...): 1 on rank 0, 2 on rank 1",
    ),
    (
        {"callback": lambda odd: SyntheticGradients(predictor=LocalLoss() if odd else "auto")},
        "SyntheticGradients(predictor=...)",
    ),
    (
        {"strategy": lambda odd: SyntheticGradientStrategy(timeout=20.0, wire="bf16" if odd else "full")},
        "SyntheticGradientStrategy(wire=...): 'full' on rank 0, 'bf16' on rank 1",
    ),
    ({"module": lambda odd: Deeper() if odd else Classifier()}, "parameter 'more.weight': not there on rank 0, (2, 3)"),
    ({"module": lambda odd: OtherRate() if odd else Classifier()}, "optimizer 0"),
    (
        {"accumulate_grad_batches": lambda odd: 2 if odd else 1},
        "Trainer(accumulate_grad_batches=...): 1 on rank 0, 2 on rank 1",
    ),
]


@pytest.mark.parametrize(("odd", "words"), CASES, ids=[words for _odd, words in CASES])
def test_what_differs_is_named_on_every_rank(odd: dict[str, Any], words: str) -> None:
    for message in refused(**odd):
        assert message.startswith("The processes were set up differently. ")
        assert words in message
