"""The gradients of a head in closed form are those that autograd finds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sg import LossModelPredictor
from lightning_sg.predictors.base import Gradients, LossInfo
from lightning_sg.predictors.head_options import HeadOptions

VECTORS = (torch.randn(32, 20, generator=torch.Generator().manual_seed(0)),)
SEQUENCES = (torch.randn(8, 6, 20, generator=torch.Generator().manual_seed(1)),)
MAPS = (torch.randn(8, 6, 10, 10, generator=torch.Generator().manual_seed(2)),)
LABELS = torch.arange(32) % 5
GOALS = torch.randn(32, 3, generator=torch.Generator().manual_seed(3))

CASES: dict[str, tuple[Gradients, Tensor, LossInfo | None, dict[str, Any]]] = {
    "vectors": (VECTORS, LABELS, None, {}),
    "three layers": (VECTORS, LABELS, None, {"layers": 3}),
    "a linear head": (VECTORS, LABELS, None, {"layers": 0}),
    "two tensors": ((*VECTORS, VECTORS[0][:, :4]), LABELS, None, {}),
    "a label for each position": (SEQUENCES, torch.arange(48).reshape(8, 6) % 5, None, {}),
    "a label for each sequence": (SEQUENCES, LABELS[:8], None, {}),
    "maps": (MAPS, LABELS[:8], None, {}),
    "maps and convolutions": (MAPS, LABELS[:8], None, {"head": HeadOptions(conv_layers=1)}),
    "regression": (VECTORS, GOALS, None, {}),
    "huber": (VECTORS, GOALS, LossInfo("huber", 3, beta=0.5), {}),
    "label smoothing": (VECTORS, LABELS, LossInfo("cross_entropy", 5, label_smoothing=0.1), {}),
    "labels to ignore": (VECTORS, LABELS.masked_fill(LABELS == 0, -100), LossInfo("cross_entropy", 5), {}),
    "positions to ignore": (
        SEQUENCES,
        (torch.arange(48).reshape(8, 6) % 5).masked_fill(torch.arange(6) > 3, 2),
        LossInfo("cross_entropy", 5, ignore_index=2),
        {"head": HeadOptions(normalize="scale")},
    ),
    "no norm": (VECTORS, LABELS, None, {"head": HeadOptions(hidden_norm="none")}),
    "scaled inputs": (VECTORS, LABELS, None, {"head": HeadOptions(normalize="scale")}),
    "low rank": (VECTORS, torch.arange(32) % 50, None, {"head": HeadOptions(rank=4)}),
}
BY_AUTOGRAD: dict[str, tuple[Gradients, Tensor, LossInfo | None, dict[str, Any]]] = {
    "a single label": (VECTORS, LABELS.where(torch.arange(32) == 7, -100), LossInfo("cross_entropy", 5), {}),
    "no label": (VECTORS, torch.full_like(LABELS, -100), LossInfo("cross_entropy", 5), {}),
    "LayerNorm": (VECTORS, LABELS, None, {"head": HeadOptions(hidden_norm="layer")}),
    "one sample": ((VECTORS[0][:1],), LABELS[:1], LossInfo("cross_entropy", 5), {}),
}


def built(name: str) -> tuple[LossModelPredictor, Gradients, Tensor]:
    activations, context, loss, options = {**CASES, **BY_AUTOGRAD}[name]
    torch.manual_seed(0)
    predictor = LossModelPredictor(**options)
    predictor.build(activations, context, loss)
    for parameter in predictor.parameters():  # its last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return predictor, activations, context


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, activations, context = built(name)
    plain, only_predicts = copy.deepcopy(closed), copy.deepcopy(closed)
    assert copy.deepcopy(closed)._in_closed_form(activations, context, learns=True) is not None
    prediction, value = closed.forward_and_backward(activations, context)
    monkeypatch.setattr(plain, "_in_closed_form", lambda *_args, **_options: None)
    expected, loss = plain.forward_and_backward(activations, context)
    torch.testing.assert_close(value, loss)
    torch.testing.assert_close(prediction, expected)
    for (key, own), other in zip(closed.named_parameters(), plain.parameters()):
        torch.testing.assert_close(own.grad, other.grad, msg=key)
    for (key, own), other in zip(closed.named_buffers(), plain.buffers()):
        torch.testing.assert_close(own, other, msg=key)
    torch.testing.assert_close(plain.loss(activations, context, ()), loss)
    if closed.factory.options.normalize == "none":  # what is learned from first updates the scale
        torch.testing.assert_close(only_predicts(activations, context), expected)
    assert all(parameter.grad is None for parameter in only_predicts.parameters())


@pytest.mark.parametrize("name", BY_AUTOGRAD)
def test_what_has_no_closed_form_is_left_to_autograd(name: str) -> None:
    predictor, activations, context = built(name)
    assert predictor._in_closed_form(activations, context, learns=True) is None
    prediction, value = predictor.forward_and_backward(activations, context)
    assert value.isfinite()
    assert (prediction[0].abs().sum() > 0) == (name != "no label")
    assert all(parameter.grad is not None for parameter in predictor.parameters())


def test_a_subclass_with_a_loss_of_its_own_learns_from_that() -> None:
    class Doubled(LossModelPredictor):
        def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
            return 2 * super().loss(activations, context, targets)

    assert LossModelPredictor().learns_in_passing
    assert not Doubled().learns_in_passing
