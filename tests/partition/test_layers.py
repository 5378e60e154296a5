"""A traced step finds every parameter and operation of layers of many kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.partition.models import CLASSES, SAMPLES, Cut, labelled, trace


class First(nn.Module):
    """A recurrent or attention layer's first result."""

    def __init__(self, layer: nn.Module, arguments: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.arguments)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: First(nn.LSTM(8, 8, num_layers=2, batch_first=True)), (4, 8)),
    "GRU": (lambda: First(nn.GRU(8, 8, bidirectional=True)), (4, 8)),
    "attention": (lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), 3), (4, 8)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (4, 8)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), (3, 6, 6)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8)), (4,)),
}


class Probe(nn.Module):
    """Any activation to class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_every_parameter_of_a_layer_is_found_in_its_stage(
    make: Callable[[], nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    torch.manual_seed(0)
    x, labels = labelled(*shape)
    if len(shape) == 1:
        x = torch.randint(5, (SAMPLES, *shape))
    module = Cut(make(), nn.Sequential(nn.LazyLinear(8), nn.ReLU()), Probe()).train(training)
    module(x)  # makes the lazy layers
    traced = trace(module, (x, labels))
    expected = {name: {int(name.split(".")[1])} for name, _ in module.named_parameters()}
    assert {name: stages for name, stages in traced.uses.items() if name in expected} == expected
    assert traced.cut_short is None


@pytest.mark.parametrize("kind", ["attention", "transformer", "convolution"])
def test_the_operations_of_a_layer_are_counted(kind: str) -> None:
    make, shape = LAYERS[kind]
    module = Cut(make(), Probe())
    module(labelled(*shape)[0])
    assert all(count > 0 for count in trace(module, labelled(*shape)).flops)
