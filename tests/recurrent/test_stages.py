"""Boundaries in time and between stages in one model, in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_sg import (
    Boundary,
    Chunks,
    LinearPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    ThroughTime,
)
from tests.message_models import TICKS, TwoNetworks, steps
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks
from tests.recurrent_models import CHUNK, FEATURES, LENGTH, WIDTH, TwoStages, sequences


def callback() -> SyntheticGradients:
    return SyntheticGradients(
        predictor=LinearPredictor(conditional=False, normalize="none"),
        training=PredictorTraining(seed=3),
        through_time=ThroughTime(auxiliary=0.1),
    )


def train(devices: int, folder: Path, checkpoint: str | None = None, steps: int = -1) -> None:
    module = TwoStages()
    trainer = make_trainer(
        strategy="synthetic_gradients" if devices > 1 else "auto",
        devices=devices,
        callbacks=[callback(), pl.callbacks.ModelCheckpoint(folder, "at-{step}", every_n_train_steps=6, save_top_k=-1)],
        max_epochs=2,
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    data = Chunks(sequences(4), CHUNK, sequence_length=LENGTH)
    trainer.fit(module, data, Chunks(sequences(1, seed=7), 5), ckpt_path=checkpoint)
    if trainer.is_global_zero:
        torch.save({"state": state_of(module), "val_loss": trainer.callback_metrics["val_loss"]}, folder / "end.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(1, folder)
    return folder


def test_two_processes_equal_one(whole: Path, tmp_path: Path) -> None:
    run_ranks(2, lambda: train(2, tmp_path))
    one, two = torch.load(whole / "end.pt"), torch.load(tmp_path / "end.pt")
    assert_same_state(two["state"], one["state"])
    torch.testing.assert_close(two["val_loss"], one["val_loss"])


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_of_two_processes_resumes_in_the_middle_of_a_sequence_on_one_and_two(
    devices: int, whole: Path, tmp_path: Path
) -> None:
    run_ranks(2, lambda: train(2, tmp_path))
    again = tmp_path / "again"
    again.mkdir()
    checkpoint = str(tmp_path / "at-step=6.ckpt")
    if devices == 1:
        train(1, again, checkpoint)
    else:
        run_ranks(2, lambda: train(2, again, checkpoint))
    assert_same_state(torch.load(again / "end.pt")["state"], torch.load(whole / "end.pt")["state"])


class TwoRates(TwoNetworks):
    """Both networks before the cut, both after it, or one on each side."""

    def __init__(self, where: str, first: int) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.where, self.acts_first = where, first
        self.see, self.end = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.cut = Boundary()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, total = batch
        h = self.see(x)
        if self.where == "after":
            h = self.cut(h)
        said = self.fast(h)
        self.messages.send(said, context=x[:, :1])
        own = self.out(said)
        if self.where == "across":
            own = self.cut(own)
        acts = batch_idx % TICKS == self.acts_first
        heard = x.new_zeros(len(x), 2 * WIDTH)
        if acts:
            heard = self.slow(torch.stack(self.messages.receive(), dim=1))[0][:, -1]
        told = self.sum(heard)
        if self.where == "before":
            own, told = self.cut(own, told)
        loss = (self.end(own) - x).square().mean()
        return loss + acts * (told.squeeze(1) - total).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def train_rates(devices: int, where: str, first: int = 0) -> dict[str, Tensor]:
    predictors = {"cut": MLPPredictor(8, conditional=False), "messages": MLPPredictor(8)}
    module = TwoRates(where, first)
    make_trainer(
        strategy="synthetic_gradients" if devices > 1 else "auto",
        devices=devices,
        max_epochs=1,
        callbacks=[SyntheticGradients(predictor=predictors, training=PredictorTraining(seed=1))],
    ).fit(module, steps(4))
    messages = module.messages.train()
    assert len(messages.carried()) == len(messages)  # none is left whose data is in another process
    return state_of(module)


@pytest.mark.parametrize(("where", "first"), [("before", 0), ("after", 0), ("after", TICKS - 1)])
def test_messages_within_a_stage_are_the_same_in_two_processes(where: str, first: int) -> None:
    one = train_rates(1, where, first)
    whole, _ = run_ranks(2, lambda: train_rates(2, where, first))
    assert_same_state(whole, one)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (0, "'messages' is used in the stages [0, 1]"),
        (TICKS - 1, "depends on a parameter or activation of another stage"),  # the first step does not show it
    ],
)
def test_messages_to_another_process_are_refused(first: int, words: str) -> None:
    failures = run_ranks(2, lambda: train_rates(2, "across", first), may_fail=True)
    assert any(words in failure.message for failure in failures)


def test_a_state_that_is_read_in_another_process_than_written_is_refused() -> None:
    class Late(TwoStages):
        def loss(self, chunk: Any) -> Tensor:
            (x, y), first, last = chunk
            h, state = self.first(x, self.first_memory.read(first))
            h, _ = self.second(self.cut(h))
            self.first_memory.write(state.detach(), last)
            return (self.out(h) - y).square().mean()

    def work() -> None:
        trainer = make_trainer(strategy="synthetic_gradients", devices=2, callbacks=[SyntheticGradients()])
        trainer.fit(Late(), Chunks(sequences(1), CHUNK))

    for failure in run_ranks(2, work, may_fail=True):
        assert "'first_memory' is used in the stages [0, 1]" in failure.message
        assert "all of it before 'cut'" in failure.message


def test_a_trace_with_boundaries_between_stages_is_refused() -> None:
    trainer = make_trainer(callbacks=[SyntheticGradients(through_time=ThroughTime(trace_decay=0.5))], max_steps=1)
    with pytest.raises(SyntheticGradientsError, match="trace_decay"):
        trainer.fit(TwoStages(), Chunks(sequences(1), CHUNK))
