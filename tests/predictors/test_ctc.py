"""Connectionist temporal classification: a loss that torch differentiates once only, with lengths of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import AutoPredictor, LossModelPredictor, SyntheticGradients, SyntheticGradientsError
from lightning_sg.lightning_api import pl
from lightning_sg.predictors.base import GradientPredictor
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks

SAMPLES, LENGTH, FEATURES, TOKENS, LABELS = 8, 24, 6, 5, 4


class Speech(pl.LightningModule):
    """Halves the number of steps behind the boundary, and spells what it hears.

    Args:
        tokens: How many there are, the blank among them.
    """

    def __init__(self, tokens: int = TOKENS) -> None:
        super().__init__()
        self.ear = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh())
        self.fewer = nn.Conv1d(16, 16, 2, stride=2)
        self.head = nn.Linear(16, tokens)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels, lengths = batch
        heard = torch.tanh(self.fewer(self.ear(x).transpose(1, 2))).transpose(1, 2)
        logarithms = self.head(heard).log_softmax(-1).transpose(0, 1)
        steps = torch.full((len(x),), logarithms.shape[0])
        loss = F.ctc_loss(logarithms, labels, steps, lengths)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def data(tokens: int = TOKENS) -> DataLoader[Any]:
    made = torch.Generator().manual_seed(0)
    labels = torch.randint(1, tokens, (6 * SAMPLES, LABELS), generator=made)
    spoken = F.one_hot(labels % FEATURES, FEATURES).float().repeat_interleave(LENGTH // LABELS, 1)
    x = spoken + 0.1 * torch.randn(spoken.shape, generator=made)
    lengths = torch.full((len(x),), LABELS)
    return DataLoader(TensorDataset(x, labels, lengths), SAMPLES)


def train(
    predictor: GradientPredictor | None = None,
    *,
    devices: int = 1,
    epochs: int = 2,
    tokens: int = TOKENS,
    **options: Any,
) -> tuple[Speech, SyntheticGradients]:
    pl.seed_everything(1, verbose=False)
    model = Speech(tokens)
    callback = SyntheticGradients(boundaries=["ear"], predictor=predictor or AutoPredictor())
    strategy = "synthetic_gradients" if devices > 1 else "auto"
    make_trainer(callbacks=[callback], devices=devices, strategy=strategy, max_epochs=epochs).fit(model, data(tokens))
    return model, callback


@pytest.mark.parametrize("tokens", [TOKENS, 60])
def test_the_head_spells_too(tokens: int) -> None:
    _model, callback = train(tokens=tokens)
    (trainer,) = callback.trainers.values()
    words = trainer.predictor.describe()
    assert words.startswith("local loss")
    assert "ctc_loss" in words
    assert ("for each position, 60 outputs" in words) == (tokens == 60)


def test_training_learns() -> None:
    first, last = (float(train(epochs=epochs)[0].trainer.callback_metrics["loss"]) for epochs in (1, 25))
    assert last < 0.5 * first


def test_matching_which_needs_a_second_derivative_is_refused_where_it_was_asked_for() -> None:
    with pytest.raises(SyntheticGradientsError, match="LossModelPredictor at boundary 'ear' cannot work with"):
        train(LossModelPredictor(objective="both"))


def test_two_processes_equal_one() -> None:
    def ends() -> dict[str, Tensor]:
        return state_of(train(devices=2)[0])

    assert_same_state(run_ranks(2, ends)[0], state_of(train()[0]))
