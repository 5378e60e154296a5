"""What input predictors are told of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_sg import SyntheticGradientsError
from lightning_sg.batch.features import features_of


def test_the_input_is_found_in_a_batch() -> None:
    x, y = torch.randn(4, 3), torch.arange(4)
    assert torch.equal(features_of((x, y), "auto"), x)
    assert torch.equal(features_of(x, "auto"), x)
    assert torch.equal(features_of({"labels": y, "image": x}, "auto"), x)
    assert torch.equal(features_of({"a": y, "b": x}, "b"), x)
    assert torch.equal(features_of((y, x), 1), x)
    assert torch.equal(features_of((x, y), lambda batch: F.one_hot(batch[1], 4).float()), torch.eye(4))
    assert features_of((torch.ones(2, 3, dtype=torch.uint8), y), "auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("batch", "source", "message"),
    [
        ((torch.arange(4), torch.arange(4)), "auto", "say little as they are"),
        ({"labels": torch.ones(3)}, "auto", "finds a NoneType"),
        ((torch.tensor(1.0),), "auto", "finds a scalar"),
        ({"x": torch.ones(3)}, "image", "has no such entry"),
    ],
)
def test_what_cannot_be_an_input_is_refused(batch: Any, source: Any, message: str) -> None:
    with pytest.raises(SyntheticGradientsError, match=message):
        features_of(batch, source)
