"""Changes of resolution are torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_sg.predictors.resize import pick, resize
from tests.predictors.loss_models import normal


@pytest.mark.parametrize(("given", "wanted"), [((8, 6), (4, 3)), ((9, 7), (4, 4)), ((5, 5), (5, 2))])
def test_resizing_to_fewer_averages(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    maps = normal(2, 3, *given)
    torch.testing.assert_close(resize(maps, wanted), F.adaptive_avg_pool2d(maps, wanted))


@pytest.mark.parametrize(("given", "wanted"), [((3, 4), (6, 8)), ((3, 4), (7, 5)), ((1, 1), (4, 4))])
def test_resizing_to_more_interpolates(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    maps = normal(2, 3, *given)
    torch.testing.assert_close(resize(maps, wanted), F.interpolate(maps, wanted, mode="bilinear"))


def test_labels_are_picked_at_the_centers() -> None:
    image = torch.arange(36).reshape(1, 6, 6)
    assert pick(image, (2, 2)).tolist() == [[[7, 10], [25, 28]]]
    assert pick(image, (6, 6)) is image
