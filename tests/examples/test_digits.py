"""Small digits: their split, their model and its boundaries."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from examples.digits import Digits, DigitsClassifier
from lightning_sg import Boundary, SyntheticGradients
from tests.models import make_trainer


def test_digits_split_is_the_same_every_time():
    splits = []
    for seed in (1, 2):
        pl.seed_everything(seed, verbose=False)
        data = Digits()
        data.setup("fit")
        splits.append(data)
    first, second = splits
    assert (len(first.train), len(first.validation), len(first.test)) == (1257, 270, 270)
    assert torch.equal(first.test.tensors[0], second.test.tensors[0])
    seen = {tuple(row) for row in first.train.tensors[0].tolist()}
    assert not seen & {tuple(row) for row in first.test.tensors[0].tolist()}
    assert first.train.tensors[0].max() == 1


@pytest.mark.parametrize(("depth", "stages", "places"), [(4, 2, [2]), (7, 2, [4]), (3, 3, [1, 3]), (3, 1, [])])
def test_digits_boundaries(depth, stages, places):
    model = DigitsClassifier(depth=depth, width=8, stages=stages)
    assert [place for place, child in enumerate(model.net) if isinstance(child, Boundary)] == places


def test_digits_stages_must_fit():
    with pytest.raises(ValueError, match="not 4"):
        DigitsClassifier(depth=3, stages=4)


def test_digits_model_trains():
    model, data = DigitsClassifier(width=16), Digits()
    trainer = make_trainer(fast_dev_run=True, callbacks=[SyntheticGradients()])
    trainer.fit(model, data)
    [tested] = trainer.test(model, data, verbose=False)
    assert 0 <= tested["test_accuracy"] <= 1
