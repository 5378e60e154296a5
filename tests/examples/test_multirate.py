"""Networks at different rates: what they count, and that they train."""

from __future__ import annotations

import pytest
import torch

from examples.mnist import PIXELS
from examples.multirate import DigitSequences, TwoRates
from lightning_sg import SyntheticGradients
from tests.examples.files import random_digits
from tests.models import make_trainer, state_of


def test_sequences_of_digits_are_counted_in_their_spans():
    images = random_digits()
    images.images[:] = images.labels[:, None, None]  # so that an image tells its label
    (x, odd, threes, recent) = next(iter(DigitSequences(images, 2, windows=3, batch_size=5, batches=1, seed=1)))
    tone = x[..., 0]
    labels = torch.searchsorted(tone.unique(), tone)  # the digits in order of their tone
    assert x.shape == (5, 12, PIXELS)
    assert len(tone.unique()) == 10
    assert torch.equal(odd[:, 1::2], (labels % 2).view(5, 6, 2).sum(2))
    assert torch.equal(recent[:, 1::2], (labels == 3).long().view(5, 6, 2).sum(2))
    assert torch.equal(threes[:, 3::4], (labels == 3).long().view(5, 3, 4).sum(2))


@pytest.mark.parametrize(("coupled", "labels"), [(True, False), (False, False), (False, True)])
def test_networks_at_different_rates_train_and_are_judged(coupled, labels):
    torch.manual_seed(0)
    sequences = DigitSequences(random_digits(), 2, windows=2, batch_size=4, batches=3, seed=1)
    module = TwoRates(2, coupled, width=8, message=4, labels=labels)
    trainer = make_trainer(max_epochs=1, callbacks=[] if coupled else [SyntheticGradients()])
    before = state_of(module)
    trainer.fit(module, module.chunks(sequences), sequences)
    assert trainer.global_step == 3 * (2 if coupled else 4)
    assert 0 <= float(trainer.callback_metrics["val_threes"]) <= 100
    after = state_of(module)
    assert not any(torch.equal(before[name], after[name]) for name in ("slow.weight_ih_l0", "fast.weight_ih_l0"))
