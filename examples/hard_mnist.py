"""MNIST made harder: digits turned, shifted and shrunk, among pieces of other digits and noise."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.mnist import ImageSet, Mnist

# At a difficulty of one. The digit keeps most of its size: in 28 × 28 pixels, smaller ones are soon unreadable.
_DEGREES, _SHIFT, _SHRINK, _PIECES, _NOISE = 30.0, 1.0, 0.1, 2.0, 0.05
_MOST_DEGREES = 45.0  # beyond, a 6 is hard to tell from a 9 for anyone
_PIECE_SIDE = 6
_CHUNK = 5000


class HardMnist(Mnist):
    """MNIST's images with each digit turned, shifted and shrunk at random, then cluttered.

    The images are made in memory from those of MNIST when they are first needed, and are the same for the same
    ``seed`` and ``difficulty``. They are as large as MNIST's, so that the same models take them.

    Args:
        root: The folder with the four IDX files of MNIST, compressed with gzip or not.
        batch_size: Samples in a training batch.
        validation: How many training images are held out for validation, the last ones; 0 for none.
        difficulty: 0 leaves the images as they are; at 1 digits are turned by up to 30 degrees and shifted by up to
            one pixel, among two pieces of other digits; the effects grow in proportion, turning up to 45 degrees.
        train_images: How many of the images not held out are used to train, the first ones; by default all.
        seed: Seeds the distortions; it has nothing to do with the seed of the training.
    """

    def __init__(
        self,
        root: str = "data/mnist",
        batch_size: int = 256,
        validation: int = 5000,
        difficulty: float = 1.0,
        train_images: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, validation)
        if difficulty < 0:
            raise ValueError(f"HardMnist needs difficulty >= 0, not {difficulty}.")
        self.difficulty = difficulty
        self.train_images = train_images
        self.seed = seed
        self._made = False

    def setup(self, stage: str) -> None:
        """Reads the files and makes the images, unless an earlier call did.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, or has fewer images than ``train_images`` asks for.
        """
        if self._made:
            return
        super().setup(stage)
        held = len(self.train_set)
        if self.train_images is not None and not 1 <= self.train_images <= held:
            raise ValueError(f"train_images must be 1 to {held} (those not held out), not {self.train_images}.")
        train = ImageSet(self.train_set.images[: self.train_images], self.train_set.labels[: self.train_images])
        # Seeds of their own: the test images stay the same, however many there are to train on.
        self.train_set, self.val_set, self.test_set = (
            ImageSet(distort(part.images, self.difficulty, 3 * self.seed + place), part.labels) if len(part) else part
            for place, part in enumerate((train, self.val_set, self.test_set))
        )
        self._made = True


def distort(images: Tensor, difficulty: float, seed: int) -> Tensor:
    """Turns, shifts, shrinks and clutters images.

    Args:
        images: uint8, ``(N, 28, 28)``.
        difficulty: See :class:`HardMnist`.
        seed: Seeds all that is random.

    Returns:
        uint8, ``(N, 28, 28)``.
    """
    generator = torch.Generator().manual_seed(seed)
    # In chunks: a grid of float coordinates for all images at once takes more memory than the images themselves.
    return torch.cat([_distort(chunk, difficulty, generator) for chunk in images.split(_CHUNK)])


def _distort(images: Tensor, difficulty: float, generator: torch.Generator) -> Tensor:
    values = images.float().unsqueeze(1) / 255
    moved = F.grid_sample(values, _grid(values, difficulty, generator), align_corners=False).flatten(1)
    cluttered = _with_pieces(moved, values.flatten(1), values.shape[-1], round(_PIECES * difficulty), generator)
    noise = _NOISE * difficulty * torch.randn(cluttered.shape, generator=generator)
    return (cluttered + noise).clamp_(0, 1).mul_(255).round_().to(torch.uint8).reshape(images.shape)


def _grid(images: Tensor, difficulty: float, generator: torch.Generator) -> Tensor:
    """Where each pixel comes from: an affine map for each image."""

    def spread(largest: float, *shape: int) -> Tensor:
        return largest * (2 * torch.rand(len(images), *shape, generator=generator) - 1)

    angle = spread(math.radians(min(_DEGREES * difficulty, _MOST_DEGREES)))
    shift = spread(2 * _SHIFT * difficulty / images.shape[-1], 2, 1)  # the grid's coordinates go from -1 to 1
    zoom = 1 + _SHRINK * difficulty * torch.rand(len(images), generator=generator)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1) * zoom.unsqueeze(-1)
    return F.affine_grid(torch.cat([turn.reshape(-1, 2, 2), shift], dim=-1), list(images.shape), align_corners=False)


def _with_pieces(images: Tensor, others: Tensor, side: int, pieces: int, generator: torch.Generator) -> Tensor:
    """Puts square pieces of other digits at random places, keeping the brighter of the two pixels.

    Args:
        images: ``(N, side²)``.
        others: Where the pieces come from, of the same shape.
        side: Of the images.
        pieces: How many for each image.
        generator: Says which pieces, and where they go.
    """
    count = len(images)
    across = torch.arange(_PIECE_SIDE)
    offsets = (side * across.unsqueeze(1) + across).flatten()
    last = side - _PIECE_SIDE

    def corners(low: int, high: int) -> Tensor:
        row, column = torch.randint(low, high + 1, (2, count, 1), generator=generator)
        return side * row + column + offsets

    for _ in range(pieces):
        donors = others[torch.randint(count, (count,), generator=generator)]
        taken = donors.gather(1, corners(last // 4, last - last // 4))  # from around the middle, where there is ink
        images = images.scatter_reduce(1, corners(0, last), taken, "amax")
    return images
