"""Activations may have other sizes in each batch: sequences, states beside them, feature maps and volumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sg import AutoPredictor, LinearPredictor, LossModelPredictor, MLPPredictor, SyntheticGradients
from lightning_sg.predictors.cheap import ScalePredictor
from lightning_sg.predictors.features import join_rows, split_rows
from lightning_sg.predictors.sizes import FirstSizes, resampled
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks

CLASSES = 3
N, D = 4, 8
Make = Callable[[int, int], tuple[Tensor, ...]]
#: Activations of so many samples and positions.
SHAPES: dict[str, Make] = {
    "a sequence and last states": lambda n, t: (torch.randn(n, t, D), torch.randn(1, n, D), torch.randn(1, n, D)),
    "channels before positions": lambda n, t: (torch.randn(n, D, t),),
    "small maps": lambda n, t: (torch.randn(n, D, t - 2, t - 1),),
    "volumes": lambda n, t: (torch.randn(n, D, 2, t - 2, t - 1),),
    "a packed sequence and last states": lambda n, t: (torch.randn(n * t, D), torch.randn(1, n, D)),
}
PREDICTORS: dict[str, Callable[[], Any]] = {
    "auto": AutoPredictor,
    "loss model": lambda: LossModelPredictor(objective="both"),
    "MLP": lambda: MLPPredictor(hidden=8),
    "linear": LinearPredictor,
    "a factor for each feature": ScalePredictor,
}


@pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_predictors_work_on_sizes_that_they_were_not_made_for(shape: Make, predictor: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    made = predictor()
    first = shape(N, 5)
    labels = torch.arange(first[0].shape[0]) % CLASSES
    made.build(first, labels, None)
    for samples, positions in ((N, 7), (N, 3), (N - 1, 6)):
        activations = shape(samples, positions)
        context = labels.repeat(2)[: len(activations[0])]
        predicted = made(activations, context)
        assert [each.shape for each in predicted] == [each.shape for each in activations]
        made.loss(activations, context, tuple(map(torch.randn_like, activations))).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in made.parameters())


@pytest.mark.parametrize("positions", [3, 5, 7, 10])
def test_a_gradient_goes_back_to_the_size_that_it_is_of(positions: int) -> None:
    """It keeps what it does to a shift of all features, and is of the activations' own shapes."""
    sizes = FirstSizes((torch.randn(N, 5, D), torch.randn(2, N, D)))
    activations = torch.randn(N, positions, D), torch.randn(2, N, D)
    rows, seen = sizes.rows(activations)
    assert rows.shape == (N, 5 * D + 2 * D)
    gradients = tuple(map(torch.randn_like, seen))
    back = sizes.back(gradients, activations)
    assert [each.shape for each in back] == [each.shape for each in activations]
    if positions in (5, 10):  # each first position is a mean of as many positions, or is one
        torch.testing.assert_close(back[0].sum(1), gradients[0].sum(1))


def test_resampling_averages_and_interpolates() -> None:
    line = torch.arange(6.0).reshape(1, 6, 1)
    torch.testing.assert_close(resampled(line, 1, 3).flatten(), torch.tensor([0.5, 2.5, 4.5]))
    torch.testing.assert_close(resampled(line, 1, 12).flatten()[1:-1].diff(), torch.full((9,), 0.5))
    assert resampled(line, 1, 6) is line


def test_what_has_other_rows_is_left_out_and_gets_a_gradient_of_zero() -> None:
    packed, state = torch.randn(11, D), torch.randn(1, N, D)
    rows = join_rows((packed, state))
    assert rows is not packed
    torch.testing.assert_close(rows, packed)
    back = split_rows(rows, (packed, state))
    torch.testing.assert_close(back[0], packed)
    assert not back[1].any()


class Lengths(pl.LightningModule):
    """A recurrent layer that is cut by name, and with it its last states."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(D, 8, batch_first=True), nn.Linear(8, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h, _states = self.rnn(x)
        return F.cross_entropy(self.out(h.mean(1)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(devices: int = 1) -> Any:
    pl.seed_everything(3, verbose=False)
    module = Lengths()
    labels = torch.arange(8) % CLASSES
    batches = [(torch.randn(8, length, D) + labels[:, None, None], labels) for length in (5, 7, 3, 6)]
    trainer = make_trainer(
        max_epochs=2,
        callbacks=[SyntheticGradients(["rnn"])],
        devices=devices,
        strategy="synthetic_gradients" if devices > 1 else "auto",
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return state_of(module)


def test_sequences_of_other_lengths_train_alike_in_one_process_and_in_two() -> None:
    whole = fit()
    for state in run_ranks(2, lambda: fit(2)):
        assert_same_state(whole, state)
