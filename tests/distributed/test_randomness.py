"""Random numbers: stages draw alike outside the network, and the check of the first step draws none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_sg import Boundary, PredictorTraining, SyntheticGradients, TrueGradient
from tests.everywhere import everywhere, trainer_for
from tests.models import (
    CLASSES,
    FEATURES,
    Classifier,
    assert_same_state,
    fit_and_save,
    loader,
    make_trainer,
    state_of,
)
from tests.ranks import run_ranks
from tests.refused import fit_split
from tests.two_stages import Two, fit


class Denoiser(Two):
    """The first stage gets noise as its input; the last stage compares its output with the same noise."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, CLASSES)
        self.error = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(len(batch[0]), CLASSES, device=self.device) + random.random() + float(np.random.rand())
        loss = F.mse_loss(self(torch.cat([batch[0][:, : FEATURES - CLASSES], noise], 1)), noise)
        self.error = loss.item()
        return loss


def test_numbers_drawn_before_the_network_are_the_same_in_all_stages() -> None:
    def work() -> float:
        pl.seed_everything(2, verbose=False)
        module = Denoiser()
        trainer = make_trainer(
            strategy="synthetic_gradients",
            devices=2,
            max_epochs=60,
            callbacks=[SyntheticGradients(predictor=TrueGradient())],
        )
        trainer.fit(module, loader(samples=64))
        return module.error

    assert run_ranks(2, work)[0] < 0.1  # with noise of its own, each stage would stay at 1


class Sampling(Two):
    """Draws in the middle of every stage, in every way, in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.spread = nn.Dropout(0.3), nn.Linear(16, 16)
        self.middle, self.other_cut = nn.Linear(16, 16), Boundary()

    def forward(self, x: Tensor) -> Tensor:
        h = self.noisy(self.drop(torch.relu(self.first(x + 0.1 * torch.randn_like(x)))))
        h = self.noisy(F.dropout(torch.relu(self.middle(self.cut(h))), 0.2))
        h = self.other_cut(h)
        sampled = torch.distributions.Normal(h, F.softplus(self.spread(h))).rsample()
        return self.second(self.drop(self.noisy(sampled + torch.randn(16))))

    def noisy(self, h: Tensor) -> Tensor:
        h = h + torch.randn_like(h) * torch.rand(h.shape[-1]) + torch.normal(0.0, 0.1, h.shape)
        h = h * torch.bernoulli(torch.full_like(h, 0.9)) + torch.empty_like(h).uniform_(-0.1, 0.1)
        return h + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.01 * torch.randperm(h.shape[-1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]) * (1 + torch.rand(())))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]) * (1 + torch.rand(())))


def sampled(devices: int, folder: Path, epochs: int = 3, checkpoint: str | None = None) -> Any:
    pl.seed_everything(2, verbose=False)
    module, sums = Sampling(), Sums()
    trainer = trainer_for(
        devices,
        [SyntheticGradients(training=PredictorTraining(seed=5)), sums],
        max_epochs=epochs,
        num_sanity_val_steps=1,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(), loader(shuffle=False), ckpt_path=checkpoint)
    losses = [float(trainer.callback_metrics["val_loss"])]
    trainer.save_checkpoint(folder / f"{devices}.ckpt")
    losses += [trainer.test(module, loader(shuffle=False), verbose=False)[0].get("test_loss") for _ in range(2)]
    return state_of(module), losses, sums.seen, torch.rand(3).tolist()


@pytest.mark.parametrize("devices", [2, 3])
def test_stages_draw_the_same_numbers_in_several_processes_as_in_one(devices: int, tmp_path: Path) -> None:
    state, losses, seen, after = sampled(1, tmp_path)
    assert losses[1] == losses[2]  # the same model is tested with the same numbers
    ranks = run_ranks(devices, lambda: sampled(devices, tmp_path))
    assert ranks[0][1][1:] == pytest.approx(losses[1:], rel=1e-4)  # the last stage alone knows what tests give
    for split, split_losses, split_seen, split_after in ranks:
        assert_same_state(split, state)
        assert split_losses[0] == pytest.approx(losses[0], rel=1e-4)
        assert split_seen == seen
        assert split_after == after


def resumable(devices: int, folder: Path, epochs: int, checkpoint: str | None = None) -> dict[str, Tensor]:
    """Trains on batches in a fixed order, as Lightning does not save the state of the generators."""
    pl.seed_everything(2, verbose=False)
    module, callback = Sampling(), SyntheticGradients(training=PredictorTraining(seed=5))
    fit_and_save(module, callback, devices, folder, checkpoint, epochs)
    return state_of(module)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_resumed_run_draws_what_the_whole_run_does(devices: int, tmp_path: Path) -> None:
    whole = resumable(1, tmp_path, epochs=3)
    everywhere(devices, lambda devices: resumable(devices, tmp_path, epochs=1))
    checkpoint = str(tmp_path / "last.ckpt")
    for state in everywhere(devices, lambda devices: resumable(devices, tmp_path / "resumed", 3, checkpoint)):
        assert_same_state(state, whole)


def test_in_one_process_steps_leave_the_generators_alone() -> None:
    def after(kind: type[pl.LightningModule], *callbacks: Callback) -> list[float]:
        module = kind()
        pl.seed_everything(2, verbose=False)
        make_trainer(callbacks=list(callbacks)).fit(module, loader(), loader())
        return [torch.rand(()).item(), float(np.random.rand()), random.random()]

    assert after(Sampling, SyntheticGradients()) == after(Still)


class Still(Two):
    """Draws nothing."""


def test_with_the_true_gradient_one_process_draws_as_plain_training_does() -> None:
    def plain() -> dict[str, Tensor]:
        pl.seed_everything(2, verbose=False)
        module = Sampling()
        make_trainer().fit(module, loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    assert_same_state(plain(), fit(Sampling, callback={"predictor": TrueGradient()}), exact=True)


class NoiseLate(Two):
    """The noise that the loss compares with is drawn in the first stage, after its dropout."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = F.dropout(torch.relu(self.first(batch[0])), 0.5)
        noise = torch.randn(len(batch[0]), CLASSES)
        return F.mse_loss(self.second(self.cut(h)), noise)


class NoiseEarly(Two):
    """The same, before the dropout."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = torch.relu(self.first(batch[0]))
        noise = torch.randn(len(batch[0]), CLASSES)
        return F.mse_loss(self.second(self.cut(F.dropout(h, 0.5))), noise)


def test_noise_that_only_an_earlier_stage_can_draw_is_refused() -> None:
    raised = fit_split(NoiseLate)
    assert "It is drawn at random after other numbers that only its stage draws" in str(raised)
    for state in fit(NoiseEarly, devices=2):
        assert_same_state(state, fit(NoiseEarly))


class Views(Sampling):
    """Runs the network several times, each time with dropout; what is drawn in between is an input and in the loss."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.cut(self.noisy(self.drop(torch.relu(self.first(x)))))
        h = self.other_cut(self.noisy(F.dropout(torch.relu(self.middle(h)), 0.2)))
        return self.second(self.drop(self.noisy(h)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            target = self(x).softmax(-1)
        losses = [F.cross_entropy(self(x), target)]
        for _view in range(2):
            noise = torch.randn(x.shape)
            losses.append(F.cross_entropy(self(x + 0.3 * noise), y) * (1 + noise.square().mean()))
        return torch.stack(losses).mean() * (1 + torch.rand(()))


class ViewsByHand(Views):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for _time in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


@pytest.mark.parametrize("kind", [Views, ViewsByHand])
def test_several_runs_of_the_network_draw_alike_and_so_does_what_is_between(kind: type[pl.LightningModule]) -> None:
    expected = fit(kind)
    for devices in (2, 3):
        for state in fit(kind, devices=devices):
            assert_same_state(state, expected)


class Augmented(torch.utils.data.Dataset[Any]):
    """Draws from numpy, from ``random`` and from torch."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, place: int) -> Any:
        shift = np.random.rand() + random.random()
        return torch.ones(FEATURES) * shift + torch.randn(FEATURES), place % CLASSES


class Sums(Callback):
    """Notes the sum of each training batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(batch[0].sum()))


class DrawingLate(Two):
    """Also draws after the boundary, so only in the last stage."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits + np.random.rand() + random.random() + torch.rand(()), batch[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentations_agree_under_seed_everything_with_workers(workers: int) -> None:
    def work() -> list[float]:
        pl.seed_everything(2, workers=True, verbose=False)
        data = torch.utils.data.DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers)
        sums = Sums()
        make_trainer(strategy="synthetic_gradients", devices=2, callbacks=[sums]).fit(DrawingLate(), data)
        return sums.seen

    last, first = run_ranks(2, work)
    assert last == first
    assert len(set(last)) == 12  # two epochs of six batches, each with numbers of its own


class MixingUp(Two):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0] * np.random.beta(1, 1) * random.random()), batch[1])


def test_the_check_of_the_first_step_draws_no_number() -> None:
    def plain() -> dict[str, Tensor]:
        pl.seed_everything(2, verbose=False)
        module = MixingUp()
        make_trainer().fit(module, loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    assert_same_state(plain(), fit(MixingUp, callback={"predictor": TrueGradient()}), exact=True)


class Noisy(Classifier):
    """Dropout in every stage, and augmentation drawn from torch's generator in the main process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(F.dropout(x, 0.5, self.training)), y)


class Jittered(torch.utils.data.Dataset[Any]):
    """A sample of its own for each place, with noise from torch's global generator."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: int) -> Any:
        generator = torch.Generator().manual_seed(place)
        return torch.randn(12, generator=generator) + 0.1 * torch.randn(12), place % CLASSES


@pytest.mark.parametrize("workers", [0, 1])
def test_stages_get_the_same_batches_without_a_seed(workers: int) -> None:
    def work(devices: int) -> int:
        data = torch.utils.data.DataLoader(Jittered(), batch_size=8, shuffle=True, num_workers=workers)
        trainer = trainer_for(devices, max_epochs=2)
        trainer.fit(Noisy(), data)
        return trainer.global_step

    assert everywhere(2, work) == [16, 16]
