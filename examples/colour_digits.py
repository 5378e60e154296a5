"""Colour images of 32 x 32 made from scikit-learn's digits: a large one on a texture, small ones, and noise."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SIDE, CLASSES = 32, 10
_DEGREES, _LARGE, _SMALL = 30.0, (0.55, 0.85), (0.2, 0.4)  # sizes are shares of the image
_OTHERS, _WAVES = 2, 2
_CONTRAST, _NOISE = (0.35, 0.9), 0.1
_CHUNK = 2000

Batch = tuple[Tensor, Tensor]


class ColourDigits(pl.LightningDataModule):
    """Says which digit is the large one: between a backpropagated CNN's 20 and 35 % of errors, as on natural images.

    Each image has a large digit, turned and shifted, in a colour that differs little from the ground, which is a sum of
    coloured waves; two small digits, which do not count; and noise. Training, validation and test images are made
    from different handwritten digits, in memory, and are the same for the same ``seed``.

    Args:
        batch_size: Samples in a training batch.
        train_images: How many images to make for training.
        held_out: How many to make for validation, and as many for the test.
        seed: Seeds the images; it has nothing to do with the seed of the training.
    """

    def __init__(self, batch_size: int = 128, train_images: int = 20_000, held_out: int = 4_000, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train_images = train_images
        self.held_out = held_out
        self.seed = seed
        self._made = False

    def setup(self, stage: str) -> None:
        """Makes the images, unless an earlier call did."""
        if self._made:
            return
        pixels, numbers = load_digits(return_X_y=True)
        digits, labels = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(numbers)
        rest, test = train_test_split(torch.arange(len(labels)), test_size=300, random_state=0, stratify=labels)
        train, validation = train_test_split(rest, test_size=300, random_state=0, stratify=labels[rest])
        counts = (self.train_images, self.held_out, self.held_out)
        self.train, self.validation, self.test = (
            TensorDataset(*compose(digits[part], labels[part], count, 3 * self.seed + place))
            for place, (part, count) in enumerate(zip((train, validation, test), counts))
        )
        self._made = True

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training images, in a new order each epoch."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The images held out."""
        return DataLoader(self.validation, 500)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images."""
        return DataLoader(self.test, 500)


def compose(digits: Tensor, labels: Tensor, count: int, seed: int) -> Batch:
    """Makes images.

    Args:
        digits: What they are made from, ``(M, 1, 8, 8)``, from 0 to 1.
        labels: Which digit each is, ``(M,)``.
        count: How many images N to make.
        seed: Seeds all that is random.

    Returns:
        The images, ``(N, 3, 32, 32)``, of mean about 0 and deviation about 1; and which digit is large in each,
        ``(N,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(digits), (count,), generator=generator)
    parts = [_compose(digits, part, generator) for part in chosen.split(_CHUNK)]  # in chunks, to save memory
    return torch.cat(parts), labels[chosen]


def _compose(digits: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    count = len(chosen)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def drawn(which: Tensor, sizes: tuple[float, float], reach: float) -> Tensor:
        """Digits somewhere in an image, ``(N, 1, 32, 32)``: an affine map for each."""
        angle = uniform(-math.radians(_DEGREES), math.radians(_DEGREES))
        size = uniform(*sizes)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(-1, 2, 2)
        turn = turn / size.reshape(-1, 1, 1)
        middle = uniform(-reach, reach, 2, 1)  # in the grid's coordinates, which go from -1 to 1
        grid = F.affine_grid(torch.cat([turn, -turn @ middle], -1), [count, 1, SIDE, SIDE], align_corners=False)
        return F.grid_sample(digits[which], grid, align_corners=False)

    def colour() -> Tensor:
        """A direction in colours for each image, ``(N, 3, 1, 1)``."""
        return F.normalize(torch.randn(count, 3, 1, 1, generator=generator), dim=1)

    steps = torch.linspace(0, 1, SIDE)
    images = uniform(0.3, 0.7, 3, 1, 1).expand(-1, -1, SIDE, SIDE)
    for _ in range(_WAVES):
        across, down, phase = uniform(-8, 8, 1, 1, 1), uniform(-8, 8, 1, 1, 1), uniform(0, 2 * math.pi, 1, 1, 1)
        waves = torch.sin(2 * math.pi * (across * steps + down * steps.unsqueeze(-1)) + phase)
        images = images + 0.1 * waves * colour()
    for _ in range(_OTHERS):
        others = torch.randint(len(digits), (count,), generator=generator)
        images = images + drawn(others, _SMALL, 0.8) * colour() * uniform(*_CONTRAST, 1, 1, 1)
    images = images + drawn(chosen, _LARGE, 0.25) * colour() * uniform(*_CONTRAST, 1, 1, 1)
    images = images + _NOISE * torch.randn(images.shape, generator=generator)
    return (images - 0.5) / 0.3


__all__ = ["CLASSES", "SIDE", "Batch", "ColourDigits", "compose"]
