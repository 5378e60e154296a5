"""The model's loss is found and can be repeated, however the step computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg.batch.seen import SeenContext
from lightning_sg.predictors.replayed import ReplayedLoss
from tests.traced import traced

Loss = Callable[[Tensor, Any], Tensor]
SAMPLES, FEATURES = 6, 5


class Written(pl.LightningModule):
    """Two stages and a loss.

    Args:
        loss: From the outputs and the batch.
        outputs: The number of outputs.
    """

    def __init__(self, loss: Loss, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU())
        self.second = nn.Linear(8, outputs)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.second(self.first(batch[0])), batch)


def replayed(module: Written, batch: Any) -> tuple[ReplayedLoss, SeenContext]:
    """The operations of the loss, and what they take from the batch."""
    found = traced(module, batch, ["first"]).inputs
    replay = None if found.loss is None else found.loss.replay
    assert replay is not None, found.reason
    assert found.context is not None
    return replay, found.context


def assert_repeated(loss: Loss, goal: Tensor) -> None:
    """The loss that was found is, on other outputs, the loss of these."""
    batch, guess = (torch.randn(SAMPLES, FEATURES), goal), torch.randn(SAMPLES, 4)
    replay, context = replayed(Written(loss), batch)
    assert replay.shapes == ((SAMPLES, 4),)
    torch.testing.assert_close(replay([guess], context.of(batch), replay.parameters), loss(guess.clone(), batch))


# ------------------------------------------------------------------ checks of what the network computes


def halves(outputs: Tensor) -> tuple[Tensor, Tensor]:
    return outputs[:, :2], F.softplus(outputs[:, 2:]) + 1e-3


def raises_below_zero(outputs: Tensor, batch: Any) -> Tensor:
    mean, scale = halves(outputs)
    if (scale <= 0).any():
        raise ValueError("a scale is not positive")
    return (((mean - batch[1]) / scale) ** 2 / 2 + scale.log()).mean()


def asserts_above_zero(outputs: Tensor, batch: Any) -> Tensor:
    mean, scale = halves(outputs)
    assert bool((scale > 0).all())
    assert not scale.max() > 1e6
    return ((mean - batch[1]).abs() / scale + scale.log()).mean()


def gaussian(outputs: Tensor, batch: Any) -> Tensor:
    return F.gaussian_nll_loss(outputs[:, :2], batch[1], outputs[:, 2:].exp())


def gaussian_module(outputs: Tensor, batch: Any) -> Tensor:
    return nn.GaussianNLLLoss(full=True)(outputs[:, :2], batch[1], F.softplus(outputs[:, 2:]))


@pytest.mark.parametrize("loss", [raises_below_zero, asserts_above_zero, gaussian, gaussian_module])
def test_a_loss_that_checks_its_outputs_is_found(loss: Loss) -> None:
    assert_repeated(loss, torch.randn(SAMPLES, 2))


def test_a_loss_that_fails_whatever_it_reads_is_not_found() -> None:
    def fails(outputs: Tensor, batch: Any) -> Tensor:
        if (outputs > 0).any():
            raise ValueError("above")
        raise ValueError("below")

    found = traced(Written(fails), (torch.randn(SAMPLES, FEATURES), torch.randn(SAMPLES, 4)), ["first"])
    assert found.cut_short == "ValueError: above"  # the first answer is what the user is told of
    assert found.inputs.loss is None


# ------------------------------------------------------------------ changes in place


def column(outputs: Tensor, batch: Any) -> Tensor:
    changed = outputs.clone()
    changed[:, 0] = changed[:, 0].sigmoid()
    return F.mse_loss(changed, batch[1])


def part(outputs: Tensor, batch: Any) -> Tensor:
    changed = outputs.clone()
    changed[:, :2].sigmoid_()
    return F.mse_loss(changed, batch[1])


def flat(outputs: Tensor, batch: Any) -> Tensor:
    changed = outputs.clone()
    changed.view(-1)[::2] += 1
    return F.mse_loss(changed, batch[1])


def view_of_a_view(outputs: Tensor, batch: Any) -> Tensor:
    changed = outputs.clone()
    changed.view(len(outputs), 2, -1)[:, 0].mul_(2)
    return F.mse_loss(changed, batch[1])


def seen_through_another(outputs: Tensor, batch: Any) -> Tensor:
    changed = outputs.unsqueeze(1).clone()
    other, third = changed.squeeze(1), changed[:, 0, 1:]
    other *= batch[1]
    return F.l1_loss(third, batch[1][:, 1:])


def goal(outputs: Tensor, batch: Any) -> Tensor:
    wanted = batch[1].clone()
    wanted[:, 1:][wanted[:, 1:] < 0] = 0.0
    kept = wanted[:, 2]
    kept += 3
    return F.mse_loss(outputs, wanted)


def diagonal(outputs: Tensor, batch: Any) -> Tensor:
    changed = outputs.clone().view(-1, 2, 2)
    torch.diagonal(changed, dim1=1, dim2=2).add_(1)
    return F.mse_loss(changed.flatten(1), batch[1])


@pytest.mark.parametrize("loss", [column, part, flat, view_of_a_view, seen_through_another, goal, diagonal])
def test_a_tensor_that_is_changed_in_place_through_a_view_is_followed(loss: Loss) -> None:
    assert_repeated(loss, torch.randn(SAMPLES, 4))


def test_a_loss_that_uses_a_buffer_that_is_changed_through_a_view_is_not_repeated() -> None:
    class Counts(Written):
        def __init__(self) -> None:
            super().__init__(lambda outputs, batch: F.mse_loss(outputs.exp() * self.seen, batch[1]))
            self.register_buffer("seen", torch.ones(4))
            self.seen: Tensor

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.view(2, 2)[0] += 1
            return super().training_step(batch, batch_idx)

    batch = torch.randn(SAMPLES, FEATURES), torch.randn(SAMPLES, 4)
    found = traced(Counts(), batch, ["first"]).inputs
    assert found.loss is None or found.loss.replay is None


# ------------------------------------------------------------------ sizes that happen to be equal


def quantiles(outputs: Tensor, batch: Any) -> Tensor:
    levels = torch.linspace(0.1, 0.9, outputs.shape[1])
    error = batch[1][:, None] - outputs
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def compared_with_all(outputs: Tensor, batch: Any) -> Tensor:
    alike = F.normalize(outputs, dim=1) @ F.normalize(batch[1], dim=1).t()
    return F.cross_entropy(alike / 0.1, torch.arange(len(outputs)))


@pytest.mark.parametrize("outputs", [SAMPLES, SAMPLES + 1])
@pytest.mark.parametrize(("loss", "vectors"), [(quantiles, False), (compared_with_all, True)])
def test_a_size_of_the_network_may_equal_that_of_the_batch(loss: Loss, vectors: bool, outputs: int) -> None:
    goal = torch.randn(SAMPLES, outputs) if vectors else torch.randn(SAMPLES)
    replay, context = replayed(Written(loss, outputs), (torch.randn(SAMPLES, FEATURES), goal))
    fewer, guess = (torch.randn(4, FEATURES), goal[:4]), torch.randn(4, outputs)
    torch.testing.assert_close(replay([guess], context.of(fewer), ()), loss(guess, fewer))


class Windows(Written):
    """Draws as many windows from every batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        drawn = torch.randint(len(batch[0]), (2 * SAMPLES,))
        inputs, goals = batch[0][drawn], batch[1][drawn]
        return ((self.second(self.first(inputs)) - goals).abs() * goals.sign().abs()).sum() / len(goals)


def test_rows_that_are_drawn_from_a_batch_of_any_size_stay_as_many() -> None:
    batch = torch.randn(SAMPLES, FEATURES), torch.randn(SAMPLES, 4)
    replay, context = replayed(Windows(gaussian), batch)
    assert replay.shapes == ((2 * SAMPLES, 4),)
    fewer = tuple(each[:4] for each in batch)
    assert replay([torch.randn(2 * SAMPLES, 4)], context.of(fewer), replay.parameters).isfinite()
