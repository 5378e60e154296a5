"""A neighbour that is silent for a while: the stage before it goes on, and both go on together afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor

from lightning_sg import Away, LateGradients, SyntheticGradients, SyntheticGradientsError, SyntheticGradientStrategy
from tests.models import Classifier, assert_same_state, loader, make_trainer
from tests.ranks import run_ranks, stop_this_process

BATCHES = 40


class Times(pl.Callback):
    """Notes when each batch ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_end(self, *_args: Any) -> None:
        self.at.append(time.monotonic())


class Disturbed(Classifier):
    """Something happens to one process at one step."""

    def __init__(self, rank: int = 0, step: int = 10, disturb: Callable[[Any], None] = lambda trainer: None) -> None:
        super().__init__()
        self.when = (rank, step)
        self.disturb = disturb

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if (self.trainer.global_rank, self.trainer.global_step) == self.when:
            self.disturb(self.trainer)


def stopped_for(seconds: float) -> Callable[[Any], None]:
    """Stops the process for a while."""
    return lambda trainer: stop_this_process(seconds)


def cut_connection(trainer: Any) -> None:
    for link in trainer.strategy.runtime.chain.links:
        link._line.current().close()


def run(
    away: Away | None,
    disturb: Callable[[Any], None],
    rank: int = 0,
    late: LateGradients | None = None,
    **options: Any,
) -> list[Any]:
    """Trains in two processes: for each the weights, the times of its batches, and those that went on alone."""

    def work() -> tuple[dict[str, Tensor], list[float], float]:
        pl.seed_everything(5, verbose=False)
        module, times = Disturbed(rank, disturb=disturb), Times()
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=20.0, away=away, **options),
            devices=2,
            max_epochs=1,
            callbacks=[times, SyntheticGradients(late=late)],
            log_every_n_steps=1,
        )
        trainer.fit(module, loader(samples=16 * BATCHES, shuffle=False))
        untaught = sum(float(each) for name, each in trainer.callback_metrics.items() if name.endswith("/untaught"))
        return module.state_dict(), times.at, untaught

    return run_ranks(2, work)


def nothing(trainer: Any) -> None:
    """No disturbance."""


def test_without_an_outage_nothing_changes() -> None:
    (plain, *_), _ = run(None, nothing)
    (away, _, untaught), _ = run(Away(), nothing)
    assert_same_state(plain, away, exact=True)
    assert untaught == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_connection_that_breaks_is_made_again_and_nothing_is_lost(rank: int) -> None:
    (plain, *_), _ = run(None, nothing)
    (away, _, untaught), _ = run(Away(), cut_connection, rank)
    assert_same_state(plain, away, exact=True)
    assert untaught == 0


def test_a_stage_goes_on_while_the_next_is_stopped_until_its_budget_is_spent() -> None:
    (weights, last, untaught), (_, first, _) = run(Away(batches=12, patience=0.4), stopped_for(3.0))
    assert len(first) == len(last) == BATCHES
    assert untaught == 12
    pause = max(range(1, BATCHES), key=lambda batch: last[batch] - last[batch - 1])
    during = [at for at in first if last[pause - 1] + 0.1 < at < last[pause] - 0.1]
    assert len(during) >= 12  # and those that needed no answer yet
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_stage_waits_for_one_that_was_away_before_it() -> None:
    (_, last, untaught), (_, first, _) = run(Away(patience=0.4), stopped_for(1.5), rank=1)
    assert len(first) == len(last) == BATCHES
    assert untaught == 0


def test_a_neighbour_that_never_comes_back_is_lost() -> None:
    def work() -> None:
        def die(trainer: Any) -> None:
            os._exit(1)

        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=2.0, away=Away(batches=5, seconds=2.0, patience=0.4)),
            devices=2,
            callbacks=[SyntheticGradients()],
        )
        trainer.fit(Disturbed(disturb=die), loader(samples=16 * BATCHES))

    began = time.monotonic()
    results = run_ranks(2, work, may_fail=True)
    assert results[0] is None
    assert results[1].kind == "StageLostError"
    assert "rank 0) is gone" in results[1].message
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "options",
    [{"tied_weights": "synchronize"}, {"clip_over": "model"}, {"replicas": 2}],
    ids=lambda each: next(iter(each)),
)
def test_what_has_stages_wait_in_every_step_is_refused(options: dict[str, Any]) -> None:
    def work() -> str:
        trainer = make_trainer(strategy=SyntheticGradientStrategy(away=Away(), **options), devices=2)
        with pytest.raises(SyntheticGradientsError, match=r"SyntheticGradientStrategy\(away") as caught:
            trainer.fit(Classifier(), loader())
        return str(caught.value)

    for message in run_ranks(2, work):
        assert next(iter(options)) in message


def test_stages_that_run_old_batches_again_are_refused() -> None:
    def work() -> str:
        callback = SyntheticGradients(late=LateGradients(0.2, recompute=True))
        trainer = make_trainer(strategy=SyntheticGradientStrategy(away=Away()), devices=2, callbacks=[callback])
        with pytest.raises(SyntheticGradientsError, match=r"SyntheticGradientStrategy\(away") as caught:
            trainer.fit(Classifier(), loader())
        return str(caught.value)

    for message in run_ranks(2, work):
        assert "LateGradients(recompute=True)" in message


def test_a_stage_goes_on_with_whole_synthetic_gradients_where_no_late_ones_come() -> None:
    """The last stage is away for a while; what has a late gradient then, and what has none, trains on."""
    (_, last, untaught), (_, first, _) = run(Away(patience=0.4), stopped_for(1.5), late=LateGradients(0.2))
    assert len(first) == len(last) == BATCHES
    assert untaught > 0
