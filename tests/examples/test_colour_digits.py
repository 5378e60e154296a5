"""Colour images of digits: the same every time, from other digits in each part; and the network for them."""

from __future__ import annotations

import pytest
import torch

from examples.colour_digits import ColourDigits, compose
from examples.residual_cnn import CUTS, ResidualCNN
from lightning_sg import Boundary, LateGradients, SyntheticGradients
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks


def made(**arguments):
    data = ColourDigits(batch_size=16, train_images=64, held_out=32, **arguments)
    data.setup("fit")
    return data


def test_images_are_the_same_every_time_and_those_of_the_seed():
    first = made()
    torch.rand(3)  # they do not depend on torch's own random numbers
    again, other = made(), made(seed=1)
    for part in ("train", "validation", "test"):
        images, labels = getattr(first, part).tensors
        assert images.shape == (len(labels), 3, 32, 32)
        assert torch.equal(images, getattr(again, part).tensors[0])
        assert not torch.equal(images, getattr(other, part).tensors[0])
    images = first.train.tensors[0]
    first.setup("test")
    assert first.train.tensors[0] is images  # made once


def test_images_show_the_digit_of_their_label():
    """Of the same random choices, only the large digit depends on what digits there are."""
    blank, ink = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    empty, _ = compose(blank, torch.zeros(1), 4, seed=0)
    full, labels = compose(ink, torch.full((1,), 7), 4, seed=0)
    assert torch.equal(labels, torch.full((4,), 7))
    assert ((full - empty).abs().amax(1) > 0.1).flatten(1).float().mean(1).min() > 0.15


@pytest.mark.parametrize("stages", CUTS)
def test_the_network_has_its_stages(stages):
    model = ResidualCNN(channels=(4, 8, 8), stages=stages)
    assert sum(isinstance(child, Boundary) for child in model.modules()) == stages - 1
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_network_has_no_more_stages():
    with pytest.raises(ValueError, match="1 to 4 stages, not 5"):
        ResidualCNN(stages=5)


def test_late_gradients_train_it_alike_in_one_process_and_in_two():
    def train(devices):
        torch.manual_seed(0)
        model = ResidualCNN(channels=(4, 4, 8), stages=4)
        callback = SyntheticGradients(late=LateGradients(0.2), delay=0)
        strategy = "auto" if devices == 1 else "synthetic_gradients"
        trainer = make_trainer(devices=devices, strategy=strategy, max_steps=8, max_epochs=-1, callbacks=[callback])
        data = made()
        data.train_dataloader = lambda: torch.utils.data.DataLoader(data.train, 16)
        trainer.fit(model, data)
        return state_of(model)

    expected = train(1)
    for state in run_ranks(2, lambda: train(2)):
        assert_same_state(expected, state)
