"""Sequences that become others, as from encoder to decoder: a head has outputs for positions, not for all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import AutoPredictor, FeedbackAlignment, HeadOptions, LossModelPredictor
from lightning_sg.lightning_api import pl
from lightning_sg.partition import Trace
from lightning_sg.predictors.positions import resampled
from tests.traced import traced

SAMPLES, LENGTH, ANSWER, WIDTH = 4, 9, 6, 8


class Translator(pl.LightningModule):
    """An encoder whose mean is what a decoder without inputs of its own goes by."""

    def __init__(self, tokens: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.encoder, self.decoder = nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, tokens)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, weight = batch
        seen = torch.tanh(self.encoder(x)).mean(1, keepdim=True).expand(-1, y.shape[1], -1)
        logits = self.head(self.decoder(seen)[0])
        if self.kind == "mean":
            return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)
        if self.kind == "weighted":
            losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
            return (losses * weight.unsqueeze(1)).mean()
        losses = -logits.transpose(0, 1).log_softmax(-1).gather(-1, y.T.unsqueeze(-1)).squeeze(-1)
        return (losses * weight).mean()


def batch_of(tokens: int, samples: int = SAMPLES, length: int = LENGTH, answer: int = ANSWER) -> Any:
    return torch.randn(samples, length, WIDTH), torch.randint(tokens, (samples, answer)), torch.rand(samples)


def built(kind: str, tokens: int, predictor: Any) -> Trace:
    batch = batch_of(tokens)
    trace = traced(Translator(tokens, kind), batch, ["encoder"])
    assert trace.inputs.context is not None
    predictor.build((batch[0],), trace.inputs.context.of(batch), trace.inputs.loss)
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.3)
    return trace


@pytest.mark.parametrize("kind", ["mean", "weighted", "positions first"])
def test_with_many_tokens_the_head_is_for_positions(kind: str) -> None:
    predictor = AutoPredictor()
    built(kind, 100, predictor)
    assert "for a sequence with a label for each position" in predictor.choice
    assert ", 100 classes" in predictor.choice or ", 100 outputs" in predictor.choice
    few = AutoPredictor()
    built(kind, 7, few)
    assert "for a sequence with one label" in few.choice
    assert f", {7 * ANSWER} " in few.choice


@pytest.mark.parametrize("kind", ["mean", "weighted", "positions first"])
@pytest.mark.parametrize(("samples", "length", "answer"), [(4, 9, 6), (3, 9, 6), (4, 18, 12)])
def test_the_prediction_is_the_gradient_of_the_loss_on_the_sequence_resampled(
    kind: str, samples: int, length: int, answer: int
) -> None:
    plain = LossModelPredictor(16, objective="loss", head=HeadOptions(hidden_norm="none", normalize="none"))
    trace = built(kind, 100, plain)
    x, y, weight = batch_of(100, samples, length, answer)
    assert trace.inputs.context is not None
    (found,) = plain((x,), trace.inputs.context.of((x, y, weight)))
    leaf = x.clone().requires_grad_()
    net = plain.heads[0].net if kind == "mean" else plain.heads[0].nets["position"]
    logits = net(resampled(leaf, answer)) if kind == "mean" else resampled(net(leaf), answer)
    losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    loss = losses.mean() if kind == "mean" else (losses * weight.unsqueeze(1)).mean()
    torch.testing.assert_close(found, torch.autograd.grad(loss, leaf)[0] * samples)


@pytest.mark.parametrize("kind", ["mean", "weighted", "positions first"])
def test_feedback_comes_from_such_outputs_too(kind: str) -> None:
    predictor = FeedbackAlignment()
    trace = built(kind, 100, predictor)
    assert trace.inputs.context is not None
    x, y, weight = batch_of(100)
    (found,) = predictor((x,), trace.inputs.context.of((x, y, weight)))
    assert found.shape == x.shape
    assert found.abs().sum() > 0


def test_labels_may_be_of_any_length_later() -> None:
    predictor = LossModelPredictor(16, objective="loss")
    trace = built("mean", 100, predictor)
    assert trace.inputs.context is not None
    batch = batch_of(100, answer=17)
    (found,) = predictor((batch[0],), trace.inputs.context.of(batch))
    assert found.abs().sum() > 0
    prediction, value = predictor.forward_and_backward((batch[0],), trace.inputs.context.of(batch))
    assert value.isfinite()
    assert prediction[0].abs().sum() > 0


@pytest.mark.parametrize("length", [1, 3, 4, 9, 10, 27])
def test_resampling_averages_or_interpolates(length: int) -> None:
    rows = torch.randn(2, 9, 5)
    features = rows.transpose(1, 2)
    if length <= 9:
        expected = F.adaptive_avg_pool1d(features, length)
    else:
        expected = F.interpolate(features, length, mode="linear")
    torch.testing.assert_close(resampled(rows, length), expected.transpose(1, 2))


class Segmenter(pl.LightningModule):
    """Sees an image as patches, perhaps behind a class token, and says of what class each pixel is."""

    def __init__(self, token: bool) -> None:
        super().__init__()
        self.token = token
        self.patches = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.block, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.smooth = nn.Conv2d(5, 5, 3, padding=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        maps = self.patches(x)
        tokens = maps.flatten(2).transpose(1, 2)
        if self.token:
            tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        said = self.head(torch.tanh(self.block(tokens)))[:, int(self.token) :]
        coarse = said.transpose(1, 2).unflatten(2, maps.shape[2:])
        return F.cross_entropy(self.smooth(F.interpolate(coarse, y.shape[1:], mode="bilinear")), y)


@pytest.mark.parametrize("token", [False, True])
def test_patches_of_an_image_have_outputs_of_their_own(token: bool) -> None:
    samples = 3
    batch = torch.randn(samples, 3, 32, 48), torch.randint(5, (samples, 32, 48))
    trace = traced(Segmenter(token), batch, ["block"])
    predictor = LossModelPredictor(objective="loss")
    assert trace.inputs.context is not None
    tokens = torch.randn(samples, 24 + token, WIDTH)
    predictor.build((tokens,), trace.inputs.context.of(batch), trace.inputs.loss)
    head = predictor.heads[0]
    assert ", 5 outputs" in head.describe()
    nn.init.normal_(head.net[-1].weight)
    rows = head.net(head.view((tokens,)))
    image = head.forms[0].of(rows)
    cells = rows[:, int(token) :].transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(image, F.interpolate(cells, (32, 48), mode="bilinear"))
    (found,) = predictor((tokens,), trace.inputs.context.of(batch))
    assert found[:, 1:].abs().sum() > 0
    larger = torch.randn(2, 3, 64, 96), torch.randint(5, (2, 64, 96))
    assert head.forms[0].of(torch.randn(2, 96 + token, 5)).shape == (2, 5, 64, 96)
    (found,) = predictor((torch.randn(2, 96 + token, WIDTH),), trace.inputs.context.of(larger))
    assert found.isfinite().all()
