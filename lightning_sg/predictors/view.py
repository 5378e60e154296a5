"""The features that a head sees of the activations at a boundary.

Legend: N samples, T positions, C channels, H W height and width, D features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sg.predictors.base import Gradients, LossInfo
from lightning_sg.predictors.features import is_label, join_rows
from lightning_sg.predictors.layers import HiddenNorm, convolutions
from lightning_sg.predictors.normalize import InputScale, Normalization
from lightning_sg.predictors.positions import MOST_OUTPUTS_OF_A_SAMPLE, Crop, resampled
from lightning_sg.predictors.resize import at_most, resize
from lightning_sg.predictors.sizes import FirstSizes

Place = Literal["sample", "position", "cell"]

# With dense labels, maps are averaged to at most this many cells a side.
_CELLS = 64


def place_of(activations: Gradients, context: Any, loss: LossInfo | None = None) -> Place:
    """What gets an output of its own: each sample, each position of a sequence, or each cell of a feature map.

    Args:
        activations: The tensors that cross the boundary, each ``(N, ...)``.
        context: The labels or goals.
        loss: What is known about the loss that compares them.

    Returns:
        ``"cell"`` for feature maps ``(N, C, H, W)`` with ``(N, H', W')`` or ``(N, K, H', W')`` of about the same
        proportions; ``"position"`` for sequences ``(N, T, D)`` with ``(N, T, ...)``, with ``(N, T', ...)`` for a part
        of the positions, or with so many labels ``(N, T')`` that a sample would need too many outputs; otherwise
        ``"sample"``.
    """
    if not isinstance(context, Tensor):
        return "sample"
    maps = [activation for activation in activations if activation.ndim == 4]
    if maps:
        return "cell" if context.ndim in (3, 4) and _same_proportions(maps[0], context) else "sample"
    rows = join_rows(activations)
    if rows.ndim > 2 and context.shape[: rows.ndim - 1] == rows.shape[:-1]:
        return "position"
    if loss is None or rows.ndim != 3 or context.ndim != 2 or context.shape[0] != rows.shape[0]:
        return "sample"
    a_part = loss.crop is not None and loss.crop.fits(rows.shape, context.shape)
    many = loss.kind == "cross_entropy" and context.shape[1] * loss.outputs > MOST_OUTPUTS_OF_A_SAMPLE
    return "position" if a_part or (many and is_label(context)) else "sample"


def _same_proportions(maps: Tensor, context: Tensor) -> bool:
    """Whether ``context`` may be an image: boxes ``(N, 10, 4)`` beside maps of 8 × 8 are not."""
    (height, width), (tall, wide) = maps.shape[2:], context.shape[-2:]
    return bool(0.7 < (tall / height) / max(wide / width, 1e-9) < 1.4)


class View(nn.Module):
    """Turns activations into rows of normalized features; feature maps can pass through convolutions.

    Args:
        place: What gets a row of its own, see :func:`place_of`.
        normalize: See :class:`~lightning_sg.predictors.normalize.InputScale`.
        pooled_side: With one row for each sample, feature maps are averaged to at most this many cells a side.
        conv_layers: The number of convolutions before that. With one row for each sample, each convolution halves the
            resolution and the first sees at most ``pooled_side * 2**conv_layers`` cells a side, so the cost does not
            grow with the resolution.
        conv_width: The number of channels of each convolution.
        conv_norm: What normalizes the convolutions.
        crop: Which positions get a row, if not all.
        resamples: Whether there are as many rows as :meth:`forward` is told, whatever the number of positions.
    """

    def __init__(
        self,
        place: Place,
        normalize: Normalization,
        pooled_side: int,
        conv_layers: int,
        conv_width: int,
        conv_norm: HiddenNorm = "none",
        crop: Crop | None = None,
        resamples: bool = False,
    ) -> None:
        super().__init__()
        self.place = place
        self.scale = InputScale(normalize)
        self.pooled_side = pooled_side
        self.conv_layers = conv_layers
        self.conv_width = conv_width
        self.conv_norm = conv_norm
        self.crop = crop
        self.resamples = resamples
        self.convolutions: nn.Sequential | None = None

    def build(self, activations: Gradients) -> int:
        """Makes the convolutions.

        Returns:
            The number of features of a row.
        """
        if self.conv_layers and any(activation.ndim == 4 for activation in activations):
            if self.place == "cell":
                channels, stride = self.rows(activations).shape[-1], 1
            else:
                channels, stride = self._joined_maps(activations)[0].shape[1], 2
            self.convolutions = convolutions(channels, self.conv_width, self.conv_layers, stride, self.conv_norm)
        self._sizes = FirstSizes(activations)
        self.update(activations)
        with torch.no_grad():
            self._features = int(self._seen(activations).shape[-1])
        return self._features

    def passes(self, activations: Gradients) -> bool:
        """Whether the rows are the activations as they are."""
        plain = self.scale.kind == "none" and self.convolutions is None and self.place == "sample"
        return plain and [activation.shape[1:] for activation in activations] == [(self._features,)]

    def forward(self, activations: Gradients, positions: int | None = None) -> Tensor:
        """One row for each place: ``(N, D)``, ``(N, T, D)`` or ``(N, H, W, D)``, of as many features as at first.

        Args:
            activations: The activations.
            positions: The number of positions T, if it is that of something else.
        """
        rows = self._seen(activations)
        if rows.shape[-1] != self._features:
            rows = self._seen(self._sizes.of(activations))
        return resampled(rows, positions) if self.resamples and positions is not None else rows

    def _seen(self, activations: Gradients) -> Tensor:
        if self.convolutions is not None and self.place == "sample":
            return self._convolved(self.convolutions, activations)
        rows: Tensor = self.scale(self.rows(activations))
        if self.convolutions is None:
            return rows
        cells: Tensor = self.convolutions(rows.movedim(-1, 1))
        return cells.movedim(1, -1)

    def _convolved(self, convolutions: nn.Sequential, activations: Gradients) -> Tensor:
        maps, rest = self._joined_maps(activations)
        rows = self.scale(maps.flatten(1) if rest is None else torch.cat([maps.flatten(1), rest], dim=1))
        seen, beside = rows.split([maps[0].numel(), rows.shape[1] - maps[0].numel()], dim=1)
        pooled = at_most(convolutions(seen.reshape(maps.shape)), self.pooled_side).flatten(1)
        return pooled if rest is None else torch.cat([pooled, beside], dim=1)

    def update(self, activations: Gradients) -> None:
        """Updates the running scale of the input with one batch."""
        if self.scale.kind == "scale":  # averaging maps is not free, and only this kind needs it
            self.scale.update(self.rows(activations))

    def rows(self, activations: Gradients) -> Tensor:
        """The rows before scaling. Maps to be convolved are flattened to one row a sample."""
        if self.place == "cell":
            maps, rest = self._joined_maps(activations)
            if rest is not None:
                maps = torch.cat([maps, rest[..., None, None].expand(-1, -1, *maps.shape[2:])], dim=1)
            return maps.movedim(1, -1)
        if self.convolutions is not None:
            maps, rest = self._joined_maps(activations)
            return maps.flatten(1) if rest is None else torch.cat([maps.flatten(1), rest], dim=1)
        rows = join_rows(tuple(self._pooled(activation) for activation in activations))
        if rows.ndim > 2 and self.place == "sample":
            return rows.flatten(1, -2).mean(1)
        return rows if self.crop is None else self.crop.of(rows)

    def _joined_maps(self, activations: Gradients) -> tuple[Tensor, Tensor | None]:
        """All feature maps as one ``(N, C_1 + C_2 + ..., H, W)``, and everything else as one row a sample."""
        side = _CELLS if self.place == "cell" else self.pooled_side * 2**self.conv_layers
        maps = [at_most(activation, side) for activation in activations if activation.ndim == 4]
        size = (max(one.shape[2] for one in maps), max(one.shape[3] for one in maps))
        joined = torch.cat([resize(one, size) for one in maps], dim=1)
        others = tuple(self._pooled(activation) for activation in activations if activation.ndim != 4)
        if not others:
            return joined, None
        rows = join_rows((joined.flatten(1), *others))[:, joined[0].numel() :]
        return joined, rows

    def _pooled(self, activation: Tensor) -> Tensor:
        """Averages feature maps and volumes to at most ``pooled_side`` cells a side, one row a sample; keeps others."""
        if activation.ndim == 4:
            return at_most(activation, self.pooled_side).flatten(1)
        if activation.ndim == 5:
            samples, channels, depth = activation.shape[:3]
            slices = at_most(activation.flatten(1, 2), self.pooled_side).reshape(samples, channels, depth, -1)
            return resize(slices, (min(depth, self.pooled_side), slices.shape[-1])).flatten(1)
        return activation


__all__ = ["Place", "View", "place_of"]
