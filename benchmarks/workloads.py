"""The models that the throughput benchmark trains, each as a list of chunks that any peer can put into stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

CLASSES = 10
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model in an even number of chunks, and its data.

    Attributes:
        title: What it is, for the tables.
        stages: How many stages it has; each is two neighbouring chunks, so that interleaved schedules fit too.
        batch: Samples in a batch.
        inputs: The shape of one sample.
        build: Makes the chunks, in the order of the data; the last returns ``(N, CLASSES or more)``.
        emulated: Whether the stages sleep in place of computing.
    """

    title: str
    stages: int
    batch: int
    inputs: tuple[int, ...]
    build: Callable[[], list[nn.Module]]
    emulated: bool = False

    def chunks(self) -> list[nn.Module]:
        """The same initial weights at every call, in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            chunks = self.build()
        assert len(chunks) == 2 * self.stages
        return chunks

    def cut(self) -> list[nn.Sequential]:
        """The stages."""
        chunks = self.chunks()
        return [nn.Sequential(*chunks[place : place + 2]) for place in range(0, len(chunks), 2)]

    def batches(self, count: int) -> DataLoader[Batch]:
        """``count`` batches of noise, the same for everyone."""
        return DataLoader(_Noise(self, count), batch_size=None)


class _Noise(Dataset[Any]):
    """A few different batches, again and again: making them must take no time."""

    def __init__(self, workload: Workload, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._count = count
        self._batches = [
            (
                torch.randn(workload.batch, *workload.inputs, generator=generator),
                torch.randint(0, CLASSES, (workload.batch,), generator=generator),
            )
            for _ in range(4)
        ]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Batch:
        if place >= self._count:
            raise IndexError(place)
        return self._batches[place % len(self._batches)]


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Everybody's loss."""
    return F.cross_entropy(outputs, labels)


def _linears(width: int, layers: list[int]) -> list[nn.Module]:
    """Chunks of so many Linear layers with ReLU; the very last layer has none, as its outputs are logits."""
    chunks = [
        nn.Sequential(*(part for _ in range(count) for part in (nn.Linear(width, width), nn.ReLU())))
        for count in layers
    ]
    chunks[-1] = chunks[-1][:-1]
    return list(chunks)


class _Pooled(nn.Module):
    """Classifies the mean over the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


def _encoder(width: int, blocks: int) -> list[nn.Module]:
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)

    chunks = [nn.Sequential(*(layer() for _ in range(blocks // 4))) for _ in range(4)]
    chunks[-1].append(_Pooled(width))
    return list(chunks)


def _convolutions() -> list[nn.Module]:
    def convolution(inputs: int, outputs: int, stride: int = 1) -> Iterator[nn.Module]:
        yield nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        yield nn.BatchNorm2d(outputs)
        yield nn.ReLU()

    return [
        nn.Sequential(*convolution(3, 64), *convolution(64, 64)),
        nn.Sequential(*convolution(64, 64)),
        nn.Sequential(*convolution(64, 128, stride=2), *convolution(128, 128)),
        nn.Sequential(*convolution(128, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES)),
    ]


class _Sleep(torch.autograd.Function):
    """Identity that sleeps so many seconds on the way forwards and on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forwards: float, backwards: float) -> Tensor:
        ctx.backwards = backwards
        time.sleep(forwards)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backwards)
        return gradient, None, None


class Emulated(nn.Module):
    """Stands for layers on a device of their own: sleeps a third of ``seconds`` in each of three passes.

    These are the forward pass, the gradient of the input and the gradient of the weights, which schedules that split
    the backward pass do apart. A microbatch sleeps its share.

    Args:
        seconds: Of a training step of a whole batch.
        batch: Samples in a whole batch.
        width: Of its input and output.
    """

    def __init__(self, seconds: float, batch: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._third = seconds / 3
        self._batch = batch

    def forward(self, inputs: Tensor) -> Tensor:
        """Identity at first; ``weight`` learns a little."""
        nap = self._third * len(inputs) / self._batch
        if not inputs.requires_grad and torch.is_grad_enabled():
            # It stands for several layers: all but the first of a network need the gradient of their input.
            inputs = inputs.detach().requires_grad_()
        return _Sleep.apply(inputs, nap, nap) * _Sleep.apply(self.weight, 0.0, nap)  # type: ignore[no-any-return]


def emulated(stages: int, seconds: float) -> Workload:
    """A chain of devices that sleep.

    Args:
        stages: How many.
        seconds: Of one stage's training step.
    """
    batch, width = 64, 64
    return Workload(
        f"{stages} emulated stages of {1000 * seconds:g} ms",
        stages,
        batch,
        (width,),
        lambda: [Emulated(seconds / 2, batch, width) for _ in range(2 * stages)],
        emulated=True,
    )


WORKLOADS = {
    "linears": Workload("2 × 4 Linear(2048)", 2, 256, (2048,), lambda: _linears(2048, [2, 2, 2, 2])),
    "encoder": Workload("transformer encoder, 8 blocks of width 256", 2, 32, (64, 256), lambda: _encoder(256, 8)),
    "cnn": Workload("CNN, 6 convolutions", 2, 32, (3, 32, 32), _convolutions),
    "unbalanced": Workload("6 + 2 Linear(2048)", 2, 256, (2048,), lambda: _linears(2048, [3, 3, 1, 1])),
}

__all__ = ["CLASSES", "WORKLOADS", "Batch", "Emulated", "Workload", "emulated", "loss_of"]
