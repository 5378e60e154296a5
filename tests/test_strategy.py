"""The strategy by its flag: it brings the callback, leaves the module clean, and runs on one device too."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_sg import PredictorTraining, SyntheticGradients, SyntheticGradientStrategy, ZeroPredictor
from tests.cut import is_cut
from tests.models import FEATURES, Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks
from tests.two_stages import Two


def test_the_flag_alone_brings_the_callback_and_leaves_the_module_clean() -> None:
    def work() -> Any:
        pl.seed_everything(5, verbose=False)
        module = Classifier(stages=2)
        trainer = make_trainer(strategy="synthetic_gradients", devices=2)
        trainer.fit(module, loader(), loader())
        (callback,) = (each for each in trainer.callbacks if isinstance(each, SyntheticGradients))
        clean = all("forward" not in child.__dict__ for child in module.modules())
        clean = clean and not any(name.startswith("on_") for name in module.__dict__)
        return (
            clean,
            not is_cut(module, callback, torch.randn(2, FEATURES)),
            sorted(type(c).__name__ for c in trainer.callbacks),
        )

    for clean, undivided, callbacks in run_ranks(2, work):
        assert clean
        assert undivided
        assert callbacks == ["StageCoordinator", "SyntheticGradients"]


def test_one_device_runs_all_stages_in_one_process() -> None:
    pl.seed_everything(5, verbose=False)
    expected, module = Classifier(), Classifier()
    module.load_state_dict(expected.state_dict())
    make_trainer(callbacks=[SyntheticGradients(training=PredictorTraining(seed=1))]).fit(
        expected, loader(shuffle=False)
    )
    with pytest.warns(UserWarning, match="has one device"):
        make_trainer(
            strategy="synthetic_gradients", callbacks=[SyntheticGradients(training=PredictorTraining(seed=1))]
        ).fit(module, loader(shuffle=False))
    assert_same_state(state_of(expected), state_of(module), exact=True)


def test_a_callback_from_a_split_run_serves_in_one_process_again() -> None:
    def work() -> Any:
        callback = SyntheticGradients(predictor=ZeroPredictor())
        make_trainer(strategy="synthetic_gradients", devices=2, callbacks=[callback]).fit(Two(), loader())
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(variable)
        module = Two()
        before = state_of(module)
        make_trainer(callbacks=[callback]).fit(module, loader())
        return torch.equal(before["first.weight"], module.first.weight), module.second.weight.equal(
            before["second.weight"]
        )

    assert run_ranks(2, work) == [(True, False), (True, False)]


def test_an_unknown_wire_is_refused() -> None:
    with pytest.raises(ValueError, match=r"wire must be 'full', 'bf16' or 'int8', not 'int4'"):
        SyntheticGradientStrategy(wire="int4")  # type: ignore[arg-type]
