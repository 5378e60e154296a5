"""What follows from a plain and some split trainings."""

from __future__ import annotations

import pytest

from lightning_sg.tools.advise.advice import Advice, Trial, sentences, table
from lightning_sg.tools.advise.measure import Measured
from lightning_sg.tools.plan import Overhead

PLAIN = Measured(100.0, [{"compute": 0.9, "data": 0.1}], {"loss": 0.5}, {}, [300.0])


def split(
    milliseconds: float, first: float, last: float, predictor: float = 0.05, loss: float = 0.5, other: float = 0.1
) -> Measured:
    """Two processes that wait for these shares of their time."""
    shares = [
        {"wait": first, "predictor": predictor, "compute": 1 - first - predictor - other, "Lightning": other},
        {"wait": last, "compute": 1 - last - other, "send": other},
    ]
    return Measured(milliseconds, shares, {"loss": loss}, {"net.2": 0.4}, [200.0, 250.0])


def advice(*splits: Measured) -> Advice:
    names = ["net.2", "net.4", "net.6"]
    return Advice(PLAIN, [Trial(name, [name], measured) for name, measured in zip(names, splits)])


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (split(55, 0.02, 0.03), "Speed: 1.82 times"),
        (split(80, 0.02, 0.40), "There is more to gain: rank 1 is the bottleneck"),
        (split(80, 0.40, 0.02), "There is more to gain: rank 0 is the bottleneck"),
        (split(99, 0.02, 0.40, predictor=0.3), "does not pay here: the predictor takes 30%"),
        (split(99, 0.02, 0.02, other=0.6), "does not pay here: a step takes 59.4 ms besides computing"),
        (split(99, 0.02, 0.02), "does not pay here: the processes may share cores"),
        (split(55, 0.0, 0.0, loss=float("nan")), "The loss is not finite"),
        (split(55, 0.0, 0.0, loss=0.75), "Price so far, after equally many steps: loss +0.25."),
        (PLAIN, "Nothing was decoupled"),
        (Measured(110.0, [{}], {}, {"net.2": 0.4}), "In one process decoupling only costs time"),
    ],
    ids=[
        "fast",
        "first stage",
        "second stage",
        "predictor",
        "overhead",
        "cores",
        "nan",
        "price",
        "no boundary",
        "one process",
    ],
)
def test_advice_follows_from_the_figures(measured: Measured, said: str) -> None:
    assert said in " ".join(sentences(advice(measured)))


def test_a_fast_split_is_not_found_fault_with() -> None:
    assert not [line for line in sentences(advice(split(55, 0.02, 0.03))) if "gain" in line or "pay" in line]


def test_the_fastest_cut_is_the_best_unless_it_breaks_the_training() -> None:
    slow, fast, broken = split(80, 0.1, 0.1), split(60, 0.1, 0.1), split(50, 0.1, 0.1, loss=float("inf"))
    made = advice(slow, fast, broken)
    assert made.best.names == ["net.4"]
    assert made.speedup == pytest.approx(100 / 60)
    assert made.price == {"loss": 0.0}
    assert "The best cut is net.4." in str(made)


def test_the_overhead_is_what_is_neither_computing_nor_waiting() -> None:
    """Of 100 ms a plain step computes 90; a split one spends 10 of 50 ms otherwise."""
    overhead = advice(split(50, 0.3, 0.0, other=0.2)).overhead
    assert (overhead.plain, overhead.split) == pytest.approx((10 / 90, 10 / 90))
    assert f"--overhead {Overhead(10 / 90, 10 / 90)}." in str(advice(split(50, 0.3, 0.0, other=0.2)))


def test_table_has_all_side_by_side() -> None:
    rows = [line.split() for line in table(advice(split(55, 0.1, 0.2), split(60, 0.3, 0.4)))]
    assert ["ms", "a", "step", "100.0", "55.0", "60.0"] in rows
    assert ["peak", "memory,", "MiB", "300", "250", "250"] in rows
    assert ["wait,", "rank", "1", "10%", "30%"] in rows
    assert ["wait,", "rank", "0", "20%", "40%"] in rows
    assert ["cosine", "at", "net.2", "0.40", "0.40"] in rows
    assert ["loss,", "last", "steps", "0.5", "0.5", "0.5"] in rows
