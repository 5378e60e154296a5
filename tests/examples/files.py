"""Small files of the data that the examples read."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import nn

from examples.mnist import FILES, ImageSet
from examples.shakespeare import FILE
from lightning_sg import Boundary

SAMPLES = 40


def idx_bytes(values: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def write_mnist(folder: Path, samples: int = SAMPLES, compressed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for name in FILES:
        images = "images" in name
        high, shape = (256, (samples, 28, 28)) if images else (10, (samples,))
        content = idx_bytes(torch.randint(0, high, shape, generator=generator))
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def write_text(folder: Path, text: str | None = None) -> None:
    (folder / FILE).write_text(text or "To be, or not to be: that is the question.\n" * 20)


def random_digits(samples: int = 60) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (samples, 28, 28), generator=generator).to(torch.uint8)
    return ImageSet(images, torch.randint(10, (samples,), generator=generator).to(torch.uint8))


def count_boundaries(model: nn.Module) -> int:
    return sum(isinstance(child, Boundary) for child in model.modules())
