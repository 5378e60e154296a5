"""What a head sees of activations."""

from __future__ import annotations

import pytest
import torch

from lightning_sg.predictors.view import Place, View, place_of


@pytest.mark.parametrize(
    ("shapes", "context", "expected"),
    [
        ([(8, 6)], (8,), "sample"),
        ([(8, 5, 6)], (8,), "sample"),
        ([(8, 5, 6)], (8, 5), "position"),
        ([(8, 5, 6)], (8, 5, 2), "position"),
        ([(8, 4, 6, 6)], (8,), "sample"),
        ([(8, 4, 6, 6)], (8, 12, 12), "cell"),
        ([(8, 4, 6, 6)], (8, 3, 12, 12), "cell"),
        ([(8, 4, 6, 6)], (8, 10, 4), "sample"),  # boxes are no image
        ([(8, 3), (8, 4, 6, 6)], (8, 12, 12), "cell"),
    ],
)
def test_what_gets_an_output_of_its_own(shapes: list[tuple[int, ...]], context: tuple[int, ...], expected: str) -> None:
    activations = tuple(torch.zeros(shape) for shape in shapes)
    assert place_of(activations, torch.zeros(context)) == expected


@pytest.mark.parametrize(
    ("place", "shape", "layers", "expected"),
    [
        ("sample", (8, 6), 0, (8, 6)),
        ("sample", (8, 5, 6), 0, (8, 6)),
        ("position", (8, 5, 6), 0, (8, 5, 6)),
        ("sample", (8, 4, 9, 9), 0, (8, 4 * 3 * 3)),
        ("sample", (8, 4, 9, 9), 2, (8, 2 * 3 * 3)),
        ("cell", (8, 4, 9, 9), 0, (8, 9, 9, 4)),
        ("cell", (8, 4, 99, 9), 2, (8, 64, 9, 2)),
    ],
)
def test_the_rows_of_a_view(place: Place, shape: tuple[int, ...], layers: int, expected: tuple[int, ...]) -> None:
    view = View(place, "none", pooled_side=3, conv_layers=layers, conv_width=2)
    activations = (torch.randn(shape),)
    assert view.build(activations) == expected[-1]
    assert view(activations).shape == expected
