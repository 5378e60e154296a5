"""Random numbers: stages draw alike outside the network, and the check of the first step draws none."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_sg import (
    SyntheticGradients,
    TrueGradient,
)
from tests.everywhere import everywhere, trainer_for
from tests.models import CLASSES, FEATURES, Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks
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
