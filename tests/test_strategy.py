"""The strategy by its flag: it brings the callback, leaves the module clean, and runs on one device too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator

from lightning_sg import (
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticGradientStrategy,
    ZeroPredictor,
)
from tests.cut import is_cut
from tests.models import FEATURES, Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import free_port, run_ranks
from tests.two_stages import Two

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize(("name", "method"), [("notebook", "fork"), ("fork", "fork"), ("spawn", "spawn")])
def test_ways_to_start_processes_have_names(name: str, method: str) -> None:
    trainer = make_trainer(strategy=f"synthetic_gradients_{name}", devices=2)
    assert isinstance(trainer.strategy, SyntheticGradientStrategy)
    assert trainer.strategy.start_method == method


def test_a_notebook_is_told_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(SyntheticGradientsError, match="strategy='synthetic_gradients_notebook'"):
        make_trainer(strategy="synthetic_gradients", devices=2)
    make_trainer(strategy="synthetic_gradients_notebook", devices=2)


def test_a_notebook_trains_on_two_processes() -> None:
    """Forked processes: the user's own model is trained when they have ended."""
    code = (
        "import sys; sys.ps1 = '>>> '\n"
        "import lightning.pytorch as pl, torch, lightning_sg\n"
        "from tests.models import Classifier, loader, make_trainer\n"
        "pl.seed_everything(0)\n"
        "module = Classifier(stages=2)\n"
        "before = [parameter.clone() for parameter in module.parameters()]\n"
        "make_trainer(accelerator='cpu', strategy='synthetic_gradients_notebook', devices=2).fit(module, loader())\n"
        "print('trained', all(not torch.equal(*pair) for pair in zip(before, module.parameters())))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LOCAL_", "MASTER_"))}
    environment |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "trained True" in ran.stdout, ran.stderr


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


@pytest.mark.parametrize("devices", [1, 2])
def test_one_trainer_after_another_takes_the_same_strategy(devices: int) -> None:
    def fitted(strategies: list[SyntheticGradientStrategy], **first: Any) -> dict[str, torch.Tensor]:
        pl.seed_everything(5, verbose=False)
        module = Two()
        for strategy, more in zip(strategies, (first, {"precision": "32-true"})):
            trainer = make_trainer(strategy=strategy, devices=devices, max_epochs=1, **more)
            trainer.fit(module, loader(shuffle=False))
            trainer.validate(module, loader(), verbose=False)
            assert trainer.precision == more["precision"]
        return state_of(module)

    def work() -> Any:
        strategy = SyntheticGradientStrategy(timeout=20.0)
        again = fitted([strategy, strategy], precision="bf16-mixed")
        return again, fitted([SyntheticGradientStrategy(timeout=20.0) for _ in range(2)], precision="bf16-mixed")

    for again, fresh in run_ranks(devices, work) if devices > 1 else [work()]:
        assert_same_state(again, fresh, exact=True)


def test_the_next_trainer_may_have_other_devices_than_the_last() -> None:
    strategy = SyntheticGradientStrategy()
    first = make_trainer(strategy=strategy, accelerator="cpu", devices=2)
    assert first.num_devices == 2
    assert make_trainer(strategy=strategy, accelerator="cpu", devices=1).num_devices == 1
    assert make_trainer(strategy=strategy, accelerator="cpu", devices=3).num_devices == 3


def test_what_the_user_gives_the_strategy_stays_with_it() -> None:
    devices = [torch.device("cpu"), torch.device("cpu")]
    strategy = SyntheticGradientStrategy(parallel_devices=devices)
    for _ in range(3):
        assert make_trainer(strategy=strategy, accelerator="cpu", devices=2).strategy.parallel_devices == devices
    given = SyntheticGradientStrategy(accelerator=CPUAccelerator())
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match="both strategy class and accelerator flag"):
            make_trainer(strategy=given, accelerator="cpu")
        assert make_trainer(strategy=given, accelerator="auto").accelerator is given.accelerator


def test_a_trainer_whose_strategy_another_has_taken_says_so() -> None:
    strategy = SyntheticGradientStrategy()
    first, second = (make_trainer(strategy=strategy, max_epochs=1) for _ in range(2))
    with pytest.raises(SyntheticGradientsError, match="given to another Trainer after this one"):
        first.fit(Two(), loader())
    second.fit(Two(), loader())
