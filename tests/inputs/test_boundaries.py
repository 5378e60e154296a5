"""The input predictors of all boundaries: seeds, logging and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_sg import (
    MLPInputPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticInputs,
)
from tests.input_models import classifier, fit
from tests.models import assert_same_state, fit_and_save, state_of


def test_inputs_leave_the_users_random_numbers_alone() -> None:
    drawn = []
    for inputs in (None, SyntheticInputs()):
        fit(classifier(), SyntheticGradients(inputs=inputs))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_seeds_of_boundaries_differ_and_are_repeated() -> None:
    def first_layers() -> list[Tensor]:
        callback = SyntheticGradients(inputs=SyntheticInputs(), training=PredictorTraining(seed=1))
        fit(classifier(), callback, max_steps=1)
        built = [trained.predictor for trained in callback.session.inputs.trainers.values()]
        return [next(predictor.parameters()).detach().clone() for predictor in built]

    one, again = first_layers(), first_layers()
    assert all(torch.equal(left, right) for left, right in zip(one, again))
    assert not torch.equal(one[0], one[1])


@pytest.mark.slow
def test_the_error_is_logged_for_each_boundary_and_falls(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = fit(
        classifier(), SyntheticGradients(inputs=SyntheticInputs()), logger=logger, log_every_n_steps=1, max_epochs=40
    )
    logger.save()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    heads = rows[0].split(",")
    assert trainer.callback_metrics["sg/net.1/input_error"] < 0.3
    for name in ("net.1", "net.3", "net.5"):
        place = heads.index(f"sg/{name}/input_error")
        values = [float(row.split(",")[place]) for row in rows[1:] if row.split(",")[place]]
        assert len(values) >= 190
        assert sum(values[-20:]) < 0.7 * sum(values[2:22])


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: Path | None) -> dict[str, Tensor]:
        module = classifier()
        callback = SyntheticGradients(inputs=SyntheticInputs(warm_up=3), delay=2)
        fit_and_save(module, callback, 1, tmp_path, None if checkpoint is None else str(checkpoint), epochs)
        return state_of(module)

    whole = run(4, None)
    run(2, None)
    assert_same_state(whole, run(4, tmp_path / "last.ckpt"), exact=True)


def test_another_predictor_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    fit_and_save(classifier(), SyntheticGradients(inputs=SyntheticInputs()), 1, tmp_path, None, 1)
    other = SyntheticInputs(MLPInputPredictor(hidden=8))
    with pytest.raises(SyntheticGradientsError, match=r"input predictor saved for boundary 'net.1' does not fit"):
        fit_and_save(classifier(), SyntheticGradients(inputs=other), 1, tmp_path, str(tmp_path / "last.ckpt"), 2)


def test_a_checkpoint_with_inputs_goes_on_without(tmp_path: Path) -> None:
    fit_and_save(classifier(), SyntheticGradients(inputs=SyntheticInputs()), 1, tmp_path, None, 1)
    with pytest.warns(UserWarning, match="ignores"):
        fit_and_save(classifier(), SyntheticGradients(), 1, tmp_path, str(tmp_path / "last.ckpt"), 2)
