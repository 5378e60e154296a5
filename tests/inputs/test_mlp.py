"""The input predictor that is used where none is named."""

from __future__ import annotations

import torch

from lightning_sg import MLPInputPredictor


def test_an_untrained_predictor_says_the_running_mean() -> None:
    predictor = MLPInputPredictor(hidden=4)
    features, activations = torch.randn(8, 3), (torch.randn(8, 2, 5), torch.randn(8))
    predictor.build(features, [(2, 5), ()])
    predictor.loss(features, activations)
    first, second = predictor(features)
    torch.testing.assert_close(first, activations[0].mean(0, keepdim=True).expand(8, 2, 5))
    torch.testing.assert_close(second, activations[1].mean().expand(8))
