"""The options of the callback: what is out of range is refused, and they travel to other processes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from lightning_sg import PredictorTraining, SyntheticGradients


def test_the_callback_can_be_pickled_for_spawn() -> None:
    assert pickle.loads(pickle.dumps(SyntheticGradients(delay=3))).settings.delay == 3


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (SyntheticGradients, {"delay": -1}, "delay must be a whole number from 0"),
        (SyntheticGradients, {"boundaries": "first"}, "boundaries"),
        (PredictorTraining, {"every": 0}, "every must be a whole number from 1"),
        (PredictorTraining, {"bound": 0.0}, "bound must be a finite number above 0"),
    ],
)
def test_arguments_out_of_range(options: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**arguments)
