"""What a split run does not support is refused by name, or warned about."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    LearningRateFinder,
)

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy
from tests.blocks import Blocks, plain
from tests.everywhere import trainer_for
from tests.models import Classifier, loader, make_trainer
from tests.ranks import Failure, run_ranks
from tests.two_stages import Two, fit


class LineSearch(Blocks):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def test_optimizers_that_evaluate_a_step_several_times_are_refused() -> None:
    def work() -> None:
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=10.0), devices=2, callbacks=[SyntheticGradients()]
        )
        trainer.fit(LineSearch(*plain().parts), loader())

    for result in run_ranks(2, work, may_fail=True):
        assert isinstance(result, Failure)
        assert "LBFGS" in result.message, result.message


def test_the_learning_rate_finder_is_refused_by_name() -> None:
    assert all("LearningRateFinder needs the loss" in r.message for r in fit(Two, 2, callbacks=[LearningRateFinder()]))


def test_clipping_by_norm_says_whose_norm_it_is() -> None:
    def work() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_for(2, gradient_clip_val=0.1, max_epochs=1).fit(Classifier(), loader())
        return [str(warning.message) for warning in caught]

    rank_zero, _rank_one = run_ranks(2, work)
    assert any("clips by the norm of each process's own stages" in message for message in rank_zero)
