"""Changes the resolution of feature maps and labels.

By means, and products with small matrices: unlike torch's pooling and interpolation, these have deterministic
derivatives on CUDA, of any order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages where there are more cells than wanted, and interpolates linearly where there are fewer.

    Args:
        maps: ``(N, C, H, W)``, floating point.
        size: The height and width to make.

    Returns:
        ``(N, C, *size)``; as ``adaptive_avg_pool2d``, or ``interpolate(mode="bilinear")``, in each direction.
    """
    (given_height, given_width), (height, width) = maps.shape[-2:], size
    if given_width > width and given_width % width == 0:
        maps = maps.unflatten(-1, (width, -1)).mean(-1)
    elif given_width != width:
        maps = maps @ _weights(given_width, width, maps).T
    if given_height > height and given_height % height == 0:
        maps = maps.unflatten(-2, (height, -1)).mean(-2)
    elif given_height != height:
        maps = _weights(given_height, height, maps) @ maps
    return maps


def at_most(maps: Tensor, side: int) -> Tensor:
    """Averages ``(N, C, H, W)`` to at most ``side`` cells in each direction."""
    return resize(maps, (min(maps.shape[-2], side), min(maps.shape[-1], side)))


def pick(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The labels nearest to the centres of a coarser grid.

    Args:
        labels: ``(N, H, W)``.
        size: The height and width to make.

    Returns:
        ``(N, *size)``.
    """
    for axis, wanted in zip((1, 2), size):
        given = labels.shape[axis]
        if given != wanted:
            centres = (2 * torch.arange(wanted, device=labels.device) + 1) * given // (2 * wanted)
            labels = labels.index_select(axis, centres)
    return labels


def _weights(given: int, wanted: int, like: Tensor) -> Tensor:
    """The matrix ``(wanted, given)`` that makes ``wanted`` numbers of ``given``."""
    cells = torch.arange(given, device=like.device)
    places = torch.arange(wanted, device=like.device).unsqueeze(1)
    if given > wanted:
        start, end = places * given // wanted, -((places + 1) * -given // wanted)
        inside = ((cells >= start) & (cells < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)
    centres = ((places + 0.5) * (given / wanted) - 0.5).clamp(0, given - 1)
    return (1 - (centres - cells).abs()).clamp_min(0).to(like.dtype)


__all__ = ["at_most", "pick", "resize"]
