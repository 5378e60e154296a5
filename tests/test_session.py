"""The training of one module over several runs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor

from lightning_sg import PredictorTraining, SyntheticGradients, SyntheticGradientsError
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


def fit(module: pl.LightningModule, callback: SyntheticGradients, devices: int) -> None:
    strategy: Any = "synthetic_gradients" if devices > 1 else "auto"
    trainer = make_trainer(strategy=strategy, devices=devices, callbacks=[callback])
    trainer.fit(module, loader(shuffle=False))


def test_a_second_run_goes_on_with_what_was_learned_and_begins_anew_with_another_module() -> None:
    callback = SyntheticGradients()
    module = Classifier(stages=3)
    fit(module, callback, 1)
    session, steps = callback.session, callback.trainers["net.1"].step
    fit(module, callback, 1)
    assert callback.session is session
    assert callback.trainers["net.1"].step == 2 * steps
    assert session.batches == 2 * steps
    fit(Classifier(stages=3), callback, 1)
    assert callback.session is not session
    assert callback.trainers["net.1"].step == steps


def test_a_run_in_one_process_goes_on_where_one_on_two_has_ended() -> None:
    def work(devices: tuple[int, int]) -> dict[str, Tensor]:
        pl.seed_everything(7, verbose=False)
        module = Classifier(stages=2)
        callback = SyntheticGradients(training=PredictorTraining(seed=1))
        for each in devices:
            fit(module, callback, each)
        return state_of(module)

    expected = work((1, 1))
    # Rank 1 has the first stage and its predictor, which goes on alone.
    assert_same_state(expected, run_ranks(2, lambda: work((2, 1)))[1])


def test_before_there_is_a_module_there_is_no_session() -> None:
    callback = SyntheticGradients()
    assert callback.trainers == {}
    with pytest.raises(SyntheticGradientsError, match="no module yet"):
        _ = callback.session
