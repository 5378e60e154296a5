"""How rows of a head become a tensor of the shape that the model's loss takes.

Legend: N samples, T positions, C channels, H W height and width, K outputs for each sample, position or cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_sg.predictors.base import Gradients
from lightning_sg.predictors.features import join_rows
from lightning_sg.predictors.positions import MOST_OUTPUTS_OF_A_SAMPLE, Crop, resampled
from lightning_sg.predictors.resize import resize
from lightning_sg.predictors.view import Place


@dataclass(frozen=True)
class OutputForm:
    """The form of one of the outputs that a loss takes.

    Attributes:
        place: What has an output of its own.
        size: The number K of outputs at each place.
        shape: The shape of the output in the first batch.
        samples: The dimension of the samples.
        positions: The dimension of the positions; ``None`` if there is none, or if they are in one with the samples.
        each: For a dimension in which samples are together with something else, how many of that are in each sample.
        scale: For cells, the height and width of the output as multiples of those of the cells.
        crop: For positions, which of them the output has; ``None`` for all.
        length: For positions, how many the output has, as a multiple of those of the activations.
        grid: For positions that are the patches of an image, how they lie in it.
    """

    place: Place
    size: int
    shape: tuple[int, ...]
    samples: int = 0
    positions: int | None = None
    each: int = 1
    scale: tuple[float, float] = (1.0, 1.0)
    crop: Crop | None = None
    length: float = 1.0
    grid: Patches | None = None

    def of(self, rows: Tensor) -> Tensor:
        """The output, from rows ``(N, K)``, ``(N, T, K)`` or ``(N, H, W, K)``."""
        number = rows.shape[0]
        if self.place == "cell":
            size = round(rows.shape[1] * self.scale[0]), round(rows.shape[2] * self.scale[1])
            return resize(rows.movedim(-1, 1), size)
        rest = list(self.shape)
        if self.place == "sample":
            rest[self.samples] = number * self.each
            if self.samples == 0:
                return rows.reshape(rest)
            first = [rest.pop(self.samples), *rest]
            return rows.reshape(first).movedim(0, self.samples)
        if self.grid is not None:
            return self.grid.image(rows)
        if self.crop is not None:
            rows = self.crop.of(rows)
        rows = resampled(rows, round(rows.shape[1] * self.length))
        if self.positions is None:
            return rows.reshape(number * rows.shape[1], *rest[1:])
        others = [size for place, size in enumerate(rest) if place not in (self.samples, self.positions)]
        return rows.reshape(number, rows.shape[1], *others).movedim((0, 1), (self.samples, self.positions))


@dataclass(frozen=True)
class Patches:
    """How the positions of a sequence lie in an image, row by row.

    Attributes:
        before: How many positions come before them, such as a class token.
        sides: Rows over columns.
        scale: Points of the output in a patch, vertically and horizontally.
    """

    before: int
    sides: float
    scale: tuple[float, float]

    def image(self, rows: Tensor) -> Tensor:
        """The output ``(N, K, H, W)`` from rows ``(N, T, K)``."""
        cells = rows[:, self.before :]
        height = max(1, round(math.sqrt(cells.shape[1] * self.sides)))
        maps = cells.unflatten(1, (height, -1)).movedim(-1, 1)
        return resize(maps, (round(maps.shape[2] * self.scale[0]), round(maps.shape[3] * self.scale[1])))


def with_positions(activations: Gradients) -> list[int]:
    """Which activations a head for positions sees: all, unless only some of them are sequences.

    A recurrent layer returns its last states beside the sequence ``(N, T, D)``.
    """
    if len(activations) == 1 or join_rows(activations).ndim > 2:
        return list(range(len(activations)))
    sequences = [place for place, each in enumerate(activations) if each.ndim == 3]
    lead = activations[sequences[0]].shape[:2] if sequences else None
    if lead is None or lead[0] != activations[0].shape[0]:
        return list(range(len(activations)))
    return [place for place in sequences if activations[place].shape[:2] == lead]


def form_of_output(shape: tuple[int, ...], activations: Gradients, crop: Crop | None = None) -> OutputForm:
    """Finds what of an output belongs to which sample, position or cell.

    Args:
        shape: The shape of the output in the first batch.
        activations: The first activations, each ``(N, ...)``.
        crop: Which positions of a sequence the output has, if not all.

    Raises:
        ValueError: If no dimension of the output belongs to the samples.
    """
    number, size = activations[0].shape[0], math.prod(shape)
    maps = [activation for activation in activations if activation.ndim == 4]
    if maps and len(shape) == 4 and shape[0] == number and shape[2] > 1 and shape[3] > 1:
        scale = shape[2] / maps[0].shape[2], shape[3] / maps[0].shape[3]
        if 0.7 < scale[0] / scale[1] < 1.4:
            return OutputForm("cell", shape[1], shape, scale=scale)
    rows = join_rows(tuple(activations[place] for place in with_positions(activations)))
    if not maps and rows.ndim == 3:
        found = _by_position(shape, number, rows.shape[1])
        if found is None and crop is not None and crop.positions == rows.shape[1]:
            found = _by_position(shape, number, crop.left)
            found = None if found is None else replace(found, crop=crop)
        found = found or _of_patches(shape, number, rows.shape[1]) or _resampled(shape, number, rows.shape[1])
        if found is not None:
            return found
    if shape and shape[0] % number == 0 and shape[0] > 0:
        return OutputForm("sample", size // number, shape, each=shape[0] // number)
    if number in shape:
        return OutputForm("sample", size // number, shape, samples=shape.index(number))
    raise ValueError(
        f"the model's output of shape {shape} has no dimension of {number}, the number of samples in activations of "
        f"shape {tuple(activations[0].shape)}"
    )


def _by_position(shape: tuple[int, ...], number: int, positions: int) -> OutputForm | None:
    size = math.prod(shape) // max(1, number * positions)
    for places in ((0, 1), (1, 0), (0, 2)):
        if len(shape) > max(places) and tuple(shape[place] for place in places) == (number, positions):
            return OutputForm("position", size, shape, *places)
    if shape and shape[0] == number * positions:
        return OutputForm("position", size, shape, positions=None)
    return None


def _of_patches(shape: tuple[int, ...], number: int, positions: int) -> OutputForm | None:
    """The form of an image's dense output where positions are its patches, perhaps after a class token."""
    if len(shape) != 4 or shape[0] != number or math.prod(shape[1:]) <= MOST_OUTPUTS_OF_A_SAMPLE:
        return None
    for before in (0, 1):
        patches = positions - before
        height = round(math.sqrt(max(0, patches) * shape[2] / shape[3]))
        if height > 1 and patches % height == 0 and patches > height:
            scale = shape[2] / height, shape[3] * height / patches
            if 0.7 < scale[0] / scale[1] < 1.4:
                grid = Patches(before, height * height / patches, scale)
                return OutputForm("position", shape[1], shape, grid=grid)
    return None


def _resampled(shape: tuple[int, ...], number: int, positions: int) -> OutputForm | None:
    """The form of an output of another sequence, if it is too large to be one of each sample."""
    if math.prod(shape) // max(1, number) <= MOST_OUTPUTS_OF_A_SAMPLE:
        return None
    if len(shape) == 3 and shape[0] == number:
        others = shape[1]
    elif len(shape) == 3 and shape[1] == number:
        others = shape[0]
    elif len(shape) == 2 and shape[0] % number == 0 and shape[0] > number:
        others = shape[0] // number
    else:
        return None
    found = _by_position(shape, number, others)
    return None if found is None else replace(found, length=others / positions)


__all__ = ["OutputForm", "form_of_output", "with_positions"]
