"""Heads: their layers, their size, and what BatchNorm does in them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_sg import HeadOptions, LossModelPredictor
from lightning_sg.predictors.base import LossInfo
from tests.predictors.forms import FORMS, TOGETHER, Task, built, predict, trained_a_little
from tests.predictors.loss_models import CLASSES, SAMPLES, labels, made, normal


def test_with_batch_norm_in_the_head_gradients_sum_to_zero_over_the_batch_as_before_batch_norm_in_a_model() -> None:
    predictor = trained_a_little(TOGETHER["loss model, loss, hidden batch"], FORMS["vectors"])
    activations, labels = Task(FORMS["vectors"]).batch(99)
    (prediction,) = predict(predictor, activations, labels)
    assert prediction.abs().sum(0).min() > 0
    torch.testing.assert_close(prediction.sum(0), torch.zeros(prediction.shape[1]), rtol=0, atol=1e-5)


def test_a_lone_sample_is_normalised_by_the_running_statistics() -> None:
    predictor = trained_a_little(TOGETHER["loss model, loss, hidden batch"], FORMS["vectors"])
    activations, labels = Task(FORMS["vectors"]).batch(99)
    alone = tuple(part[:1] for part in activations)
    (prediction,) = predict(predictor, alone, labels[:1])
    (expected,) = predict(predictor.eval(), alone, labels[:1])
    assert prediction.abs().sum() > 0
    torch.testing.assert_close(prediction, expected)


def test_rows_without_a_label_have_no_say_in_the_heads_batch_norm() -> None:
    (sequence,), labels = Task(FORMS["sequences with a label for each position"]).batch(0)
    whole = built(LossModelPredictor, (sequence,), labels, LossInfo("cross_entropy", CLASSES))
    torch.nn.init.normal_(whole.head[-1].weight)
    short, padded = copy.deepcopy(whole), labels.clone()
    padded[:, -2:] = -100
    (kept,) = predict(short, (sequence[:, :-2],), labels[:, :-2])
    (prediction,) = predict(whole, (sequence,), padded)
    torch.testing.assert_close(prediction[:, :-2], kept)
    assert torch.count_nonzero(prediction[:, -2:]) == 0
    for (name, left), right in zip(whole.named_buffers(), short.buffers()):
        if "running" in name:
            torch.testing.assert_close(left, right, msg=name)
    padded[:] = -100
    padded[0, 0] = 1  # one row has no spread
    (prediction,) = predict(whole, (sequence,), padded)
    assert prediction.isfinite().all()


def test_a_linear_heads_prediction_is_the_gradient_by_hand() -> None:
    activations, context = (normal(SAMPLES, 5, 7),), labels(SAMPLES, 5)
    predictor = made(activations, context, layers=0)
    layer = predictor.head[-1]
    chances = (activations[0] @ layer.weight.T + layer.bias).softmax(-1)
    expected = (chances - F.one_hot(context, CLASSES)) @ layer.weight / 5
    torch.testing.assert_close(predictor(activations, context)[0], expected.detach())


def test_the_cost_of_a_head_hardly_grows_with_the_resolution() -> None:
    def flops(side: int, **options: Any) -> int:
        activations = (normal(2, 8, side, side),)
        predictor = made(activations, labels(2), classes=3, **options)
        with FlopCounterMode(display=False) as counter:
            predictor.loss(activations, labels(2), ())
        return int(counter.get_total_flops())

    # Four times the cells; what grows is the averaging, by some 30 operations a number.
    assert flops(128, head=HeadOptions(conv_layers=2)) < 2 * flops(64, head=HeadOptions(conv_layers=2))


def test_50000_classes_are_cheap() -> None:
    activations, context = (normal(8, 128, 256),), labels(8, 128, classes=50_000)
    predictor = made(activations, context, LossInfo("cross_entropy", 50_000), awake=False, layers=0)
    with FlopCounterMode(display=False) as counter:
        predictor.loss(activations, context, ()).backward()
    full = 3 * 2 * 8 * 128 * 256 * 50_000  # forwards, and backwards to input and weight
    assert counter.get_total_flops() < 0.03 * full
    assert sum(parameter.numel() for parameter in predictor.parameters()) < 0.3 * 256 * 50_000
    assert predictor(activations, context)[0].shape == (8, 128, 256)


def test_the_low_rank_can_be_chosen_or_refused() -> None:
    activations, context = (normal(2, 300),), labels(2)
    loss = LossInfo("cross_entropy", 8000)

    def widths(**options: Any) -> list[int]:
        return [layer.out_features for layer in made(activations, context, loss, layers=0, **options).head]

    assert widths() == [64, 8000]
    assert widths(head=HeadOptions(rank=16)) == [16, 8000]
    assert widths(head=HeadOptions(rank=0)) == [8000]
