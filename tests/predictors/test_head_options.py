"""Options of heads."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_sg import HeadOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must be a whole number from 0"),
        ({"samples": -1}, "samples must be a whole number from 0"),
        ({"pooled_side": 0}, "pooled_side must be a whole number from 1"),
        ({"conv_layers": -1}, "conv_layers must be a whole number from 0"),
        ({"conv_width": 0}, "conv_width must be a whole number from 1"),
        ({"hidden_norm": "instance"}, "hidden_norm must be"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadOptions(**options)
