"""A stage that dies, fails or hangs: the others end, and say which one it was and why."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy
from tests.cut import is_cut
from tests.models import FEATURES, Classifier, loader, make_trainer
from tests.ranks import run_ranks
from tests.refused import fit_split
from tests.two_stages import Two


class Dying(Classifier):
    """Its last stage dies without a word at the sixth batch."""

    how = "kill"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.trainer.global_step == 5 and loss.requires_grad and loss.item() > -1:
            if self.how == "kill":
                os._exit(1)
            if self.how == "hang":
                time.sleep(6)
            raise ValueError("the loss is odd")
        return loss


class Failing(Dying):
    how = "raise"


class Hanging(Dying):
    how = "hang"


def test_a_stage_that_dies_is_named_at_once() -> None:
    began = time.monotonic()
    results = fit_split(lambda: Dying(stages=3), devices=3, timeout=60.0)
    assert results[0] is None
    assert results[1].kind == results[2].kind == "StageLostError"
    assert "stage 2 (rank 0) is gone" in results[1].message
    # The reason reaches the first stage too, through the one between.
    assert "stage 1 (rank 1)" in results[2].message
    assert time.monotonic() - began < 45


def test_a_stage_that_fails_tells_its_neighbours_why() -> None:
    results = fit_split(lambda: Failing(stages=3), devices=3, timeout=60.0)
    assert results[0].kind == "ValueError"
    for result in results[1:]:
        assert "stage 2 (rank 0) failed at training batch" in result.message
        assert "ValueError: the loss is odd" in result.message


def test_a_stage_that_hangs_runs_into_the_timeout() -> None:
    results = fit_split(lambda: Hanging(stages=2), devices=2, timeout=2.0)
    assert results[1].kind == "StageLostError"
    assert "stage 1 (rank 0) did not send the target of" in results[1].message
    assert "within 2 s" in results[1].message


class Raising(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if loss.item() > 0 and self.trainer.global_step == 3:
            raise ValueError("odd")
        return loss


def test_after_an_error_the_module_is_whole_and_saving_does_not_wait(tmp_path: Path) -> None:
    def work() -> Any:
        module, callback = Raising(), SyntheticGradients(boundaries=["first"])
        checkpoint = ModelCheckpoint(tmp_path, save_on_exception=True)
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=40.0),
            devices=2,
            enable_checkpointing=True,
            callbacks=[callback, checkpoint],
        )
        try:
            trainer.fit(module, loader())
        except Exception as error:
            chain = [error, error.__context__, error.__cause__]
            kinds = {type(link).__name__ for link in chain}
            module(torch.randn(2, FEATURES))
            module(torch.randn(2, FEATURES))
            return kinds, is_cut(module, callback, torch.randn(2, FEATURES)), "on_train_epoch_end" in module.__dict__
        return None

    (last, first) = run_ranks(2, work)
    assert "ValueError" in last[0]
    assert "StageLostError" in first[0]
    assert not last[1]
    assert not last[2]
