"""A rank fails at every moment of a training: the others end in time, and name it and its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import pytest

from benchmarks.faults.campaign import Undisturbed
from benchmarks.faults.fault import CONNECTING, END, GATHERING, START, Fault, exit_with, hanging, raising
from benchmarks.faults.job import BATCHES, SAVED_EVERY, Job
from benchmarks.faults.verdict import NAMED, SURVIVED, Names, Survives
from benchmarks.faults.warm import Warm

odd = raising(ValueError("the data are odd"))

SET_UP = [
    Fault.at(rank=0, hook=START).by(SIGKILL),
    Fault.at(rank=1, hook=START).by(hanging),
    Fault.at(rank=1, hook=CONNECTING).by(SIGKILL),
    Fault.at(rank=0, hook=CONNECTING).by(hanging),
    Fault.at(rank=0, hook=CONNECTING).by(odd),
    Fault.at(rank=1, hook="setup").by(odd),
    Fault.at(rank=0, hook="configure_model").by(SIGKILL),
    Fault.at(rank=1, hook="configure_optimizers").by(odd),
    Fault.at(rank=0, hook="on_fit_start").by(hanging),
    Fault.at(rank=1, hook="on_sanity_check_start").by(odd),
    Fault.at(rank=1, hook="on_train_start").by(hanging),
]
TRAINING = [
    Fault.at(rank=1, step=5).by(SIGKILL),
    Fault.at(rank=0, step=5).by(odd),
    Fault.at(rank=1, step=5).by(SIGSTOP),
    Fault.at(rank=1, step=4, hook="on_train_batch_start").by(odd),
    Fault.at(rank=0, step=4, hook="on_before_optimizer_step").by(exit_with(3)),
    Fault.at(rank=1, step=4, hook="on_train_batch_end").by(hanging),
    Fault.at(rank=0, step=BATCHES, hook="on_validation_start").by(odd),
    Fault.at(rank=1, step=BATCHES, hook="validation_step").by(SIGKILL),
    Fault.at(rank=1, step=BATCHES, hook="on_validation_epoch_end").by(hanging),
    Fault.at(rank=0, step=BATCHES, hook="on_train_epoch_end").by(odd),
    Fault.at(rank=1, step=SAVED_EVERY, hook="on_save_checkpoint").by(odd),
    Fault.at(rank=1, hook=GATHERING).by(SIGKILL),
    Fault.at(rank=0, hook=GATHERING).by(hanging),
    Fault.at(rank=1, hook="on_train_end").by(odd),
]
LAST = [Fault.at(rank=1, hook="teardown").by(odd), Fault.at(rank=0, hook=END).by(SIGKILL)]
EVALUATION = [Fault.at(rank=0, hook="test_step").by(odd), Fault.at(rank=1, hook="predict_step").by(SIGKILL)]


def reason_of(fault: Fault) -> str:
    return "the data are odd" if fault.action == odd else ""


def assert_named(fault: Fault, job: Job, warm: Warm, undisturbed: Undisturbed, *, may_end: bool = False) -> None:
    outcome = warm.run(replace(job, fault=fault))
    assert outcome.struck
    verdict = Names(fault.rank, reason_of(fault), may_end).judge(outcome, undisturbed.digest(warm, job))
    assert verdict.kind == NAMED or (may_end and verdict.kind == SURVIVED), f"{verdict.kind}: {verdict.why}"


@pytest.mark.parametrize("fault", [*SET_UP, *TRAINING], ids=str)
def test_the_other_names_the_rank_that_failed(
    fault: Fault, warm: Warm, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    assert_named(fault, Job(tmp_path), warm, undisturbed)


@pytest.mark.parametrize("fault", LAST, ids=str)
def test_at_the_very_end_the_others_may_end_well(
    fault: Fault, warm: Warm, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    assert_named(fault, Job(tmp_path), warm, undisturbed, may_end=True)


@pytest.mark.parametrize("fault", EVALUATION, ids=str)
def test_so_it_is_in_evaluation(fault: Fault, warm: Warm, undisturbed: Undisturbed, tmp_path: Path) -> None:
    job = Job(tmp_path, afterwards=fault.hook.removesuffix("_step"))
    assert_named(fault, job, warm, undisturbed)


@pytest.mark.parametrize("hook", ["training_step", "configure_optimizers"])
def test_all_of_three_stages_name_the_one_in_the_middle(
    hook: str, warm: Warm, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    assert_named(Fault.at(rank=1, hook=hook).by(odd), Job(tmp_path, processes=3), warm, undisturbed)


@pytest.mark.parametrize("rank", [0, 3])
def test_all_of_two_replicas_name_the_one_that_failed(
    rank: int, warm: Warm, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    job = Job(tmp_path, processes=4, replicas=2, timeout=4.0)
    assert_named(Fault.at(rank=rank, step=3).by(SIGKILL), job, warm, undisturbed)


def test_a_failure_while_a_checkpoint_is_loaded_is_named(warm: Warm, undisturbed: Undisturbed, tmp_path: Path) -> None:
    job = Job(tmp_path)
    job = replace(job, resume=undisturbed.checkpoint(warm, job, tmp_path / "resume"))
    assert_named(Fault.at(rank=1, hook="on_load_checkpoint").by(odd), job, warm, undisturbed)


def test_a_short_stop_is_survived_to_the_bit(warm: Warm, undisturbed: Undisturbed, tmp_path: Path) -> None:
    job = Job(tmp_path, fault=Fault.at(rank=1, step=5).by(SIGSTOP, seconds=1.0))
    verdict = Survives().judge(warm.run(job), undisturbed.digest(warm, job))
    assert verdict.kind == SURVIVED, verdict.why
