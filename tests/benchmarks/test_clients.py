"""How the benchmark of other people's packages compares losses and says what worked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.clients import compare, outcome, read, record_of, source_of, steps_to_half, table
from tests.clients.runs import CLIENTS, Run
from tests.ranks import Failure


def run(losses: list[float] | None = None, weight: float = 1.0, **given: Any) -> Run:
    fields: dict[str, Any] = {"per_epoch": 1, "parameters": 1, "said": [], "warned": [], **given}
    return Run(losses or [4.0] * 10, state={"weight": torch.tensor([weight])}, **fields)


FAILURE = Failure("BoundaryError", "was never reached", "")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        pytest.param([8, 8, 6, 4, 4, 4], 5, id="the mean of the last two"),
        pytest.param([8, 8, 6, 5, 5, 5], None, id="never"),
        pytest.param([1, 15, 6, 4, 4, 4], 5, id="one batch is not the start"),
    ],
)
def test_steps_are_counted_until_the_mean_loss_has_halved(losses: list[float], expected: int | None) -> None:
    assert steps_to_half(losses, 2) == expected


def test_all_losses_are_read_after_as_many_steps_as_plain_training_needs() -> None:
    plain = run([8.0] * 5 + [4.0] * 5 + [1.0] * 5)
    found = compare(plain, run([8.0] * 5 + [5.0] * 5 + [9.0] * 5), run([8.0] * 5 + [3.0] * 5 + [9.0] * 5))
    assert found == {"steps": 10, "halved": True, "plain": 4.0, "decoupled": 5.0, "late": 3.0}


def test_a_loss_that_never_halves_is_read_at_the_end_and_says_so() -> None:
    found = compare(run([8.0] * 5 + [7.0] * 5), run([8.0] * 10), run([8.0] * 10))
    assert found == {"steps": 10, "halved": False, "plain": 7.0, "decoupled": 8.0, "late": 8.0}


def test_what_predictors_predict_from_is_taken_from_what_they_say() -> None:
    said = ["Boundary 'agg': LossModelPredictor; predicts from batch.Y, by the model's mse_loss."]
    assert source_of([run(said=["Epoch 1."]), run(said=said)]) == "batch.Y, by the model's mse_loss"
    assert source_of([run()]) == ""


def test_weights_of_two_processes_are_compared_with_those_of_one() -> None:
    runs = {"callback": run(), "split": [run(), run(weight=1.5)], "auto": FAILURE}
    assert outcome(runs, "split", "callback") == "weights differ by 0.5"
    assert outcome({**runs, "split": [run(), run()]}, "split", "callback") == "yes"
    assert outcome(runs, "auto", "auto in one") == "fails: BoundaryError"
    assert outcome({**runs, "callback": FAILURE}, "split", "callback") == "one process fails: BoundaryError"


def test_the_table_has_a_row_for_each_client_with_the_spread_over_seeds() -> None:
    runs = {"callback": run(), "split": [run(), run()], "auto": FAILURE}
    halved, same = run([8.0] * 5 + [4.0] * 5), run([8.0] * 10)
    seeds = {0: (halved, run([8.0] * 5 + [4.4] * 5), halved), 1: (same, same, same)}
    name = next(name for name, entry in CLIENTS.items() if entry.distribution == "lightning")
    (row,) = table([record_of(name, runs, seeds)]).splitlines()[2:]
    assert (
        "| yes | yes | fails: BoundaryError | nothing found | × 1.05 (1.00 to 1.10) after 10 steps, not halved "
        "| × 1.00 (1.00 to 1.00) |" in row
    )


def test_every_recorded_client_is_known() -> None:
    assert {record["client"] for record in read()} <= set(CLIENTS)
