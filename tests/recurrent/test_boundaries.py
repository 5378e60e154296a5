"""All boundaries in time of a model: what is saved, what is logged, and which predictors they get."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_sg import (
    AlignmentGuard,
    AutoPredictor,
    Chunks,
    LinearPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    ThroughTime,
)
from tests.models import assert_same_state, make_trainer, state_of
from tests.recurrent_models import CHUNK, LENGTH, Recurrent, fit, make, sequences


def test_validation_between_two_chunks_leaves_the_state_of_training_alone() -> None:
    undisturbed, disturbed = make("lstm"), make("lstm")
    callback = SyntheticGradients(predictor=MLPPredictor(8, conditional=False), training=PredictorTraining(seed=1))
    fit(undisturbed, Chunks(sequences(), CHUNK, sequence_length=LENGTH), callback)
    trainer = make_trainer(
        callbacks=[
            SyntheticGradients(predictor=MLPPredictor(8, conditional=False), training=PredictorTraining(seed=1))
        ],
        max_epochs=1,
        val_check_interval=3,
    )
    validation = Chunks(sequences(1, seed=5), 5)
    trainer.fit(disturbed, Chunks(sequences(), CHUNK, sequence_length=LENGTH), validation)
    assert_same_state(state_of(disturbed), state_of(undisturbed), exact=True)
    assert "val_loss" in trainer.callback_metrics


@pytest.mark.parametrize(
    "settings", [ThroughTime(), ThroughTime(trace_decay=0.9), ThroughTime(auxiliary=0.5)], ids=["plain", "trace", "aux"]
)
@pytest.mark.parametrize("known", [True, False], ids=["length known", "unknown"])
@pytest.mark.parametrize("stop", [2, 4, 7, 8, 9])
def test_a_run_resumed_in_the_middle_of_a_sequence_equals_one_that_went_on(
    settings: ThroughTime, stop: int, known: bool, tmp_path: Path
) -> None:
    def callback() -> SyntheticGradients:
        return SyntheticGradients(
            predictor=MLPPredictor(8, conditional=False), through_time=settings, training=PredictorTraining(seed=1)
        )

    def data() -> Chunks:
        return Chunks(sequences(), CHUNK, sequence_length=LENGTH if known else None)

    uninterrupted = make("lstm")
    fit(uninterrupted, data(), callback(), max_epochs=2)
    checkpoint = pl.callbacks.ModelCheckpoint(
        tmp_path, "stopped", every_n_train_steps=stop, save_on_train_epoch_end=False
    )
    trainer = make_trainer(callbacks=[callback(), checkpoint], max_steps=stop, max_epochs=-1, enable_checkpointing=True)
    trainer.fit(make("lstm"), data())
    resumed = Recurrent("lstm")
    trainer = make_trainer(callbacks=[callback()], max_epochs=2)
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "stopped.ckpt")
    assert_same_state(state_of(resumed), state_of(uninterrupted), exact=True)


def test_the_model_keeps_no_keys_and_no_state() -> None:
    module = make("lstm")
    fit(module, Chunks(sequences(), CHUNK, stateful=True), SyntheticGradients())
    assert not any("memory" in name for name in module.state_dict())
    assert copy.deepcopy(module).memory.read() is None


def test_the_metrics_of_a_boundary_in_time_are_logged() -> None:
    trainer = fit(
        make("gru"), Chunks(sequences(8), CHUNK), SyntheticGradients(predictor=MLPPredictor(8)), log_every_n_steps=1
    )
    assert {"sg/memory/cosine", "sg/memory/norm_ratio"} <= set(trainer.callback_metrics)


def test_without_a_choice_a_linear_predictor_sees_the_state_and_the_guard_is_patient() -> None:
    for guard, threshold in ((AlignmentGuard(patience=7), -0.2), (AlignmentGuard(threshold=0.1), 0.1)):
        callback = SyntheticGradients(guard=guard)
        fit(make("lstm"), Chunks(sequences(), CHUNK), callback)
        (trained,) = callback.session.times.trainers.values()
        assert isinstance(trained.predictor, AutoPredictor)
        assert isinstance(trained.predictor.chosen, LinearPredictor)
        assert trained.predictor.choice.startswith("LinearPredictor")
        watching = trained.guard
        assert watching is not None
        assert (watching.threshold, watching.patience) == (threshold, guard.patience)
