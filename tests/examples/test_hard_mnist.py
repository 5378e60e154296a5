"""Distorted digits: the same every time, and not the originals."""

from __future__ import annotations

import pytest
import torch

from examples.hard_mnist import HardMnist, distort
from examples.mnist import Mnist
from tests.examples.files import SAMPLES, write_mnist


def test_hard_images_are_the_same_every_time_and_not_the_originals(tmp_path):
    write_mnist(tmp_path)
    made = []
    for _ in range(2):
        torch.rand(3)  # the distortions do not depend on torch's own random numbers
        data = HardMnist(str(tmp_path), validation=8)
        data.setup("fit")
        made.append(data)
    first, second = made
    for name in ("train_set", "val_set", "test_set"):
        assert torch.equal(getattr(first, name).images, getattr(second, name).images)
    plain = Mnist(str(tmp_path), validation=8)
    plain.setup("fit")
    assert first.train_set.images.shape == plain.train_set.images.shape
    assert not (first.train_set.images == plain.train_set.images).flatten(1).all(1).any()
    assert torch.equal(first.train_set.labels, plain.train_set.labels)
    images = first.train_set.images
    first.setup("test")
    assert first.train_set.images is images  # made once
    other = HardMnist(str(tmp_path), validation=8, seed=1)
    other.setup("fit")
    assert not torch.equal(other.train_set.images, images)


def test_hard_images_take_part_of_the_training_set(tmp_path):
    write_mnist(tmp_path)
    data, whole = (HardMnist(str(tmp_path), validation=8, train_images=count) for count in (5, None))
    for each in (data, whole):
        each.setup("fit")
    assert (len(data.train_set), len(whole.train_set)) == (5, SAMPLES - 8)
    assert torch.equal(data.test_set.images, whole.test_set.images)
    with pytest.raises(ValueError, match="train_images must be 1 to 32"):
        HardMnist(str(tmp_path), validation=8, train_images=33).setup("fit")
    with pytest.raises(ValueError, match="difficulty >= 0"):
        HardMnist(difficulty=-1)


def test_hard_images_of_no_difficulty_are_the_originals():
    images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    difference = distort(images, 0.0, seed=0).int() - images.int()
    assert difference.abs().max() <= 1
