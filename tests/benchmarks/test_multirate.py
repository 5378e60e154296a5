"""Networks at different rates: all methods see the same digits, and the table says when a share was reached."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import multirate
from tests.examples.files import random_digits


@pytest.mark.parametrize("method", multirate.METHODS)
def test_networks_at_different_rates_see_the_same_digits_with_every_method(monkeypatch, method):
    digits = random_digits()
    data = SimpleNamespace(setup=lambda stage: None, train_set=digits, val_set=digits)
    monkeypatch.setattr(multirate, "Mnist", lambda folder: data)
    monkeypatch.setattr(multirate, "STREAMS", 4)
    monkeypatch.setattr(multirate, "LOOK", 64)
    record = multirate.train(method, 0, 128, "nowhere")
    assert record["steps"] == (128 // 16 if method == multirate.COUPLED else 128 // 4)
    assert [point["digits"] for point in record["curve"]] == [64, 128]


def test_multirate_table_says_when_a_share_of_the_coupled_accuracy_was_reached():
    def record(method: str, odd: list[float]) -> dict[str, Any]:
        curve = [{"digits": 640 * (n + 1), "odd": value, "threes": 10.0} for n, value in enumerate(odd)]
        return {"method": method, "seed": 0, "digits": 9600, "steps": 7, "seconds": 1.0, "curve": curve}

    records = [record(multirate.COUPLED, [50, 90, 90, 90]), record(multirate.NONE, [20, 30, 40, 50])]
    printed = multirate.table(records, 9600)
    assert "A is at 81.0 %" in printed
    assert "| coupled | 7 | 90.0 | 10.0 | 1,280 | 640 | 1 | 1 |" in printed
    assert "| no gradient | 7 | 40.0 | 10.0 | - (1 of 1 never) | 640 | 1 | 1 |" in printed
