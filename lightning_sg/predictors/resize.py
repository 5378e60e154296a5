"""Changes the resolution of feature maps and labels.

It uses means and products with small matrices. Unlike torch's pooling and interpolation, these have deterministic
derivatives of any order on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Changes the resolution: averages to fewer cells, interpolates linearly to more.

    Args:
        maps: ``(N, C, H, W)``, floating point.
        size: The new height and width.

    Returns:
        ``(N, C, *size)``. Each direction is as by ``adaptive_avg_pool2d`` or ``interpolate(mode="bilinear")``.
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
    """Picks the labels nearest to the centers of a coarser grid.

    Args:
        labels: ``(N, H, W)``.
        size: The new height and width.

    Returns:
        ``(N, *size)``.
    """
    for axis, wanted in zip((1, 2), size):
        given = labels.shape[axis]
        if given != wanted:
            centers = (2 * torch.arange(wanted, device=labels.device) + 1) * given // (2 * wanted)
            labels = labels.index_select(axis, centers)
    return labels


def _weights(given: int, wanted: int, like: Tensor) -> Tensor:
    """The matrix ``(wanted, given)`` that resamples ``given`` cells to ``wanted``."""
    cells = torch.arange(given, device=like.device)
    places = torch.arange(wanted, device=like.device).unsqueeze(1)
    if given > wanted:
        start, end = places * given // wanted, -((places + 1) * -given // wanted)
        inside = ((cells >= start) & (cells < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)
    centers = ((places + 0.5) * (given / wanted) - 0.5).clamp(0, given - 1)
    return (1 - (centers - cells).abs()).clamp_min(0).to(like.dtype)


__all__ = ["at_most", "pick", "resize"]
