"""A run that is resumed with other boundaries or predictors says by name what is dropped and what starts afresh."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import (
    AlignmentGuard,
    DelayedGradient,
    LinearPredictor,
    LocalLoss,
    MLPInputPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticInputs,
    TrueGradient,
    ZeroPredictor,
)
from tests.models import CLASSES, FEATURES, loader, make_trainer
from tests.ranks import run_ranks


class Plain(pl.LightningModule):
    """Three layers, to cut by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.c(torch.relu(self.b(torch.relu(self.a(x))))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder: Path, epochs: int, devices: int = 1, module: Any = Plain, **callback: Any) -> list[str]:
    """Trains, from the folder's checkpoint if there is one, and saves; returns the warnings of all processes."""

    def work() -> list[str]:
        pl.seed_everything(1, verbose=False)
        path = folder / "last.ckpt"
        trainer = make_trainer(
            strategy="synthetic_gradients" if devices > 1 else "auto",
            devices=devices,
            max_epochs=epochs,
            callbacks=[SyntheticGradients(**callback)] if callback else [],
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module(), loader(shuffle=False), ckpt_path=str(path) if path.exists() else None)
        trainer.save_checkpoint(path)
        return [str(each.message) for each in caught]

    return [each for found in (run_ranks(devices, work) if devices > 1 else [work()]) for each in found]


def told(messages: list[str]) -> list[str]:
    """Those of the warnings that are about what is resumed."""
    words = ("dropped", "afresh", "another", "does not use")
    return sorted(message for message in messages if any(word in message for word in words))


def resumed(folder: Path, before: dict[str, Any], after: dict[str, Any], devices: int = 1) -> list[str]:
    run(folder, 1, devices, **before)
    return told(run(folder, 2, devices, **after))


DROPPED = "The checkpoint has {} for boundary '{}', which this model does not have: it is dropped."
BOTH, A, B = ({"boundaries": names} for names in (["a", "b"], ["a"], ["b"]))


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_is_said_about_a_run_that_goes_on_as_it_was(devices: int, tmp_path: Path) -> None:
    assert resumed(tmp_path, BOTH, BOTH, devices) == []


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("before", "after", "dropped", "fresh"),
    [
        pytest.param(BOTH, A, ["b"], [], id="fewer"),
        pytest.param(A, BOTH, [], ["b"], id="more"),
        pytest.param(A, B, ["a"], ["b"], id="others"),
    ],
)
def test_other_boundaries_are_named_once(
    before: Any, after: Any, dropped: list[str], fresh: list[str], devices: int, tmp_path: Path
) -> None:
    found = resumed(tmp_path, before, after, devices)
    assert len(found) == len(dropped) + len(fresh)
    for name in dropped:
        assert DROPPED.format("a predictor", name) in found
    for name in fresh:
        assert f"Predictors start afresh at '{name}': the checkpoint has none of these boundaries." in found


def test_all_predictors_dropped_are_named(tmp_path: Path) -> None:
    found = resumed(tmp_path, BOTH, {"boundaries": []})
    assert [f"for boundary '{name}'" in text for name, text in zip("ab", found, strict=True)] == [True, True]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["SyntheticGradients"]["boundaries"] == {}


@pytest.mark.parametrize("later", [False, True])
def test_an_undivided_run_says_which_predictors_it_keeps_for_later(later: bool, tmp_path: Path) -> None:
    run(tmp_path, 1, **BOTH)
    (found,) = told(run(tmp_path, 2, module=Configured if later else Plain, boundaries="auto"))
    assert "keeps but does not use, for boundaries ['a', 'b']" in found
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["SyntheticGradients"]["boundaries"].keys() == {"a", "b"}


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_that_had_no_callback_has_no_predictors_to_go_on_with(devices: int, tmp_path: Path) -> None:
    run(tmp_path, 1)
    (found,) = told(run(tmp_path, 2, devices, **BOTH))
    assert "start afresh at 'a', 'b': the checkpoint is of a run without SyntheticGradients" in found


class Configured(Plain):
    """Makes its layers when Lightning asks for them, after the callback's set-up."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def configure_model(self) -> None:
        if not hasattr(self, "a"):
            self.a, self.b, self.c = Plain().children()


@pytest.mark.parametrize(
    ("module", "boundaries", "devices"),
    [(Configured, ["a", "b"], 1), (Configured, ["a", "b"], 2), (Plain, "auto", 2)],
)
def test_predictors_that_are_made_later_are_named_too(
    module: Any, boundaries: Any, devices: int, tmp_path: Path
) -> None:
    run(tmp_path, 1)
    (found,) = told(run(tmp_path, 2, devices, module, boundaries=boundaries))
    assert "the checkpoint is of a run without SyntheticGradients" in found
    assert told(run(tmp_path, 3, devices, module, boundaries=boundaries)) == []
    if devices == 1:
        assert told(run(tmp_path, 4, devices, module, boundaries=[])) == [
            DROPPED.format("a predictor", name) for name in boundaries
        ]


@pytest.mark.parametrize("devices", [1, 2])
def test_another_delay_is_named(devices: int, tmp_path: Path) -> None:
    (found,) = resumed(tmp_path, BOTH, {**BOTH, "delay": 3}, devices)
    assert "another delay" in found
    assert "'a' (1 in the checkpoint, 3 now), 'b' (1 in the checkpoint, 3 now)" in found
    assert told(run(tmp_path, 3, devices, **BOTH, delay=3)) == []


def kinds(predictor: Any, **training: Any) -> dict[str, Any]:
    return {**A, "predictor": predictor, "training": PredictorTraining(seed=1, **training)}


def test_another_rule_is_named(tmp_path: Path) -> None:
    (found,) = resumed(tmp_path, kinds(DelayedGradient()), kinds(TrueGradient()))
    assert (
        "another predictor or rule than they were saved with: 'a' (DelayedGradient in the checkpoint, TrueGradient"
        in found
    )


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (LinearPredictor(), MLPPredictor()),
        (LinearPredictor(), LocalLoss()),
        (LinearPredictor(), TrueGradient()),
        (DelayedGradient(), LinearPredictor()),
        (ZeroPredictor(), LinearPredictor()),
    ],
    ids=lambda predictor: type(predictor).__name__,
)
@pytest.mark.filterwarnings("ignore:Boundaries resume with another predictor")
def test_another_predictor_is_an_error_that_names_both(before: Any, after: Any, devices: int, tmp_path: Path) -> None:
    run(tmp_path, 1, devices, **kinds(before))

    def work() -> None:
        callback = SyntheticGradients(**kinds(after))
        strategy = "synthetic_gradients" if devices > 1 else "auto"
        trainer = make_trainer(strategy=strategy, devices=devices, callbacks=[callback], max_epochs=2)
        trainer.fit(Plain(), loader(shuffle=False), ckpt_path=str(tmp_path / "last.ckpt"))

    if devices == 1:
        with pytest.raises(SyntheticGradientsError, match="boundary 'a'") as caught:
            work()
        message = str(caught.value)
    else:
        message = run_ranks(2, work, may_fail=True)[1].message  # the first stage's
    assert type(after).__name__ in message
    assert "Resume with the predictor of the saved run" in message


adam, sgd, adamw = (partial(kind, lr=0.01) for kind in (torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW))
steps = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"optimizer": adam}, {"optimizer": sgd}, "optimizer starts afresh: it was Adam and is SGD now"),
        ({"optimizer": sgd}, {"optimizer": adam}, "optimizer starts afresh: it was SGD and is Adam now"),
        (
            {"lr_scheduler": steps},
            {"lr_scheduler": decay},
            "afresh: it was StepLR and is ExponentialLR now",
        ),
        ({"lr_scheduler": steps}, {}, "the predictor's scheduler is dropped"),
        ({}, {"lr_scheduler": steps}, "the predictor's scheduler starts afresh"),
        ({"ema": 0.5}, {}, "the moving average of the predictor's parameters is dropped"),
    ],
)
def test_another_way_to_train_the_predictor_is_named(
    before: Any, after: Any, said: str, devices: int, tmp_path: Path
) -> None:
    linear = LinearPredictor()
    (found,) = resumed(tmp_path, kinds(linear, **before), kinds(linear, **after), devices)
    assert "Boundary 'a': " in found
    assert said in found


@pytest.mark.parametrize("kind", [adam, adamw, sgd])
def test_a_checkpoint_of_an_earlier_version_does_not_say_which_optimizer_it_has(kind: Any, tmp_path: Path) -> None:
    run(tmp_path, 1, **kinds(LinearPredictor(), optimizer=adam))
    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for key in ("kind", "delay", "optimizer_kind", "scheduler_kind"):
        del checkpoint["callbacks"]["SyntheticGradients"]["boundaries"]["a"][key]
    torch.save(checkpoint, path)
    found = told(run(tmp_path, 2, **kinds(LinearPredictor(), optimizer=kind)))
    assert ["it was another and is SGD now" in text for text in found] == ([True] if kind is sgd else [])


@pytest.mark.filterwarnings("ignore:Boundary 'a', batch")
def test_another_fallback_of_the_guard_is_named(tmp_path: Path) -> None:
    def guarded(fallback: Any) -> dict[str, Any]:
        return {**kinds(LinearPredictor()), "guard": AlignmentGuard(fallback=fallback)}

    (found,) = resumed(tmp_path, guarded(LocalLoss(hidden=4)), guarded("zero"))
    assert "the predictor that the guard fell back to is dropped" in found
    (found,) = told(run(tmp_path, 3, **guarded(LocalLoss(hidden=4))))
    assert "the predictor that the guard falls back to starts afresh" in found
    with pytest.raises(SyntheticGradientsError, match="predictor saved for boundary 'a' does not fit"):
        run(tmp_path, 4, **guarded(LocalLoss(hidden=5)))


@pytest.mark.parametrize("devices", [1, 2])
def test_input_predictors_are_named_too(devices: int, tmp_path: Path) -> None:
    inputs = {"inputs": SyntheticInputs(MLPInputPredictor(hidden=4))}
    (found,) = resumed(tmp_path, BOTH, {**BOTH, **inputs}, devices)
    assert "start afresh at 'a', 'b': the checkpoint has no input predictors for these boundaries" in found
    assert told(run(tmp_path, 3, devices, **A, **inputs)) == [
        DROPPED.format(what, "b") for what in ("a predictor", "an input predictor")
    ]
    found, *_others = [text for text in run(tmp_path, 4, devices, **A) if "inputs=None" in text]
    assert "['a']" in found
