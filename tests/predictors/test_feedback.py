"""Feedback alignment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg import FeedbackAlignment
from lightning_sg.predictors.base import LossInfo

SAMPLES, CLASSES = 8, 3


def made(predictor: Any, activations: tuple[Tensor, ...], context: Any, loss: LossInfo | None = None) -> Any:
    torch.manual_seed(0)
    predictor.build(activations, context, loss)
    return predictor


def batch(*shape: int, seed: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    activations = (torch.randn(SAMPLES, *shape, generator=generator),)
    return activations, torch.randint(CLASSES, (SAMPLES,), generator=generator)


@pytest.mark.parametrize("trained", [False, True])
def test_feedback_is_the_readouts_error_times_a_fixed_matrix(trained: bool) -> None:
    activations, labels = batch(6)
    predictor = made(FeedbackAlignment(scale=2.0, normalize="none"), activations, labels)
    readout = predictor.readout.head[-1]
    if trained:
        torch.nn.init.normal_(readout.weight)
    error = (activations[0] @ readout.weight.T + readout.bias).softmax(-1) - F.one_hot(labels, CLASSES)
    (matrix,) = predictor.feedback
    assert matrix.shape == (CLASSES, 6)
    torch.testing.assert_close(predictor(activations, labels)[0], error.detach() @ matrix)


def test_feedback_to_a_map_is_spread_over_the_cells_that_were_averaged() -> None:
    activations, labels = batch(2, 14, 14)
    predictor = made(FeedbackAlignment(), activations, labels)
    (error,) = predictor.errors(activations, labels)
    rows = (error @ predictor.feedback[0]).reshape(SAMPLES, 2, 7, 7)
    spread = rows.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    torch.testing.assert_close(predictor(activations, labels)[0], spread)


def test_the_feedback_matrix_is_not_trained_but_saved() -> None:
    activations, labels = batch(6)
    predictor = made(FeedbackAlignment(), activations, labels)
    predictor.loss(activations, labels, ()).backward()
    assert predictor.feedback[0].grad is None
    other = FeedbackAlignment()
    torch.manual_seed(1)
    other.build(activations, labels, None)
    other.load_state_dict(predictor.state_dict())
    assert torch.equal(other(activations, labels)[0], predictor(activations, labels)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": 0.0}, "scale.* above 0"), ({"hidden": 0}, "hidden.* from 1"), ({"layers": -1}, "layers")],
)
def test_feedback_alignment_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"FeedbackAlignment\(.*\): {message}"):
        FeedbackAlignment(**options)
