"""What a shell sees: exit code 1 for an error in user code, never an abort; and Ctrl-C ends everything."""

from __future__ import annotations

from pathlib import Path
from signal import SIGINT

import pytest

from benchmarks.faults.fault import Fault, interrupting_all, raising
from benchmarks.faults.job import BATCHES, SAVED_EVERY, Job
from benchmarks.faults.verdict import NAMED, Ends
from benchmarks.faults.warm import Warm


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("hook", "step"),
    # The hooks at the ends of batches and epochs may need the loss: in other stages they end early, with a warning.
    [("configure_optimizers", 0), ("on_train_batch_start", BATCHES - 1), ("on_save_checkpoint", SAVED_EVERY)],
)
def test_an_exception_outside_a_step_ends_every_rank_with_exit_code_1(
    hook: str, step: int, rank: int, warm: Warm, tmp_path: Path
) -> None:
    outcome = warm.run(Job(tmp_path, fault=Fault.at(rank=rank, step=step, hook=hook).by(raising(KeyError("odd")))))
    assert [ending.code for ending in outcome.endings.values()] == [1, 1]
    assert outcome.left == 0


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_an_evaluation_that_fails_ends_every_rank_with_exit_code_1(stage: str, warm: Warm, tmp_path: Path) -> None:
    fault = Fault.at(rank=0, hook=f"{stage}_step").by(raising(KeyError("odd")))
    outcome = warm.run(Job(tmp_path, epochs=0, afterwards=stage, fault=fault))
    assert [ending.code for ending in outcome.endings.values()] == [1, 1]


@pytest.mark.parametrize("hook", ["training_step", "on_train_start", "on_validation_start"])
def test_control_c_to_all_ranks_ends_all_within_seconds(hook: str, warm: Warm, tmp_path: Path) -> None:
    fault = Fault.at(rank=0, step=3 * (hook == "training_step"), hook=hook).by(interrupting_all)
    outcome = warm.run(Job(tmp_path, timeout=20.0, fault=fault))
    verdict = Ends().judge(outcome, "")
    assert verdict.kind == NAMED, verdict.why
    assert all(ending.seconds < 10 for ending in outcome.endings.values())


def test_control_c_to_the_script_ends_what_lightning_has_started(warm: Warm, tmp_path: Path) -> None:
    fault = Fault.at(rank=0, step=3).by(SIGINT)
    outcome = warm.run(Job(tmp_path, launcher="popen", timeout=40.0, fault=fault))
    verdict = Ends().judge(outcome, "")
    assert verdict.kind == NAMED, verdict.why
    assert outcome.endings[0].seconds < 10
