"""A process that is killed and started again takes its place, while the others go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sg import Away, SyntheticGradientStrategy
from tests.models import loader, make_trainer
from tests.ranks import Failure, free_port, run_ranks
from tests.rejoining import BATCHES, EPOCHS, Noting, Supervised, train

ROOT = Path(__file__).parents[2]
STEPS = BATCHES * EPOCHS
_LAUNCHED = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """The losses at the end of undisturbed runs with other seeds; in one process, which computes the same."""
    return [float(train(3, seed=seed).callback_metrics["val_loss"]) for seed in range(3)]


def assert_rejoined(run: Supervised, ends: list[Any], killed: list[int], losses: list[float]) -> None:
    """All have trained to the end, in step; who was killed missed a few batches; nobody else was started again."""
    for rank, end in enumerate(ends):
        assert isinstance(end, dict), f"rank {rank} ended with {end}"
        assert len(run.pids[rank]) == 1 + killed.count(rank)
        assert end["pid"] == run.pids[rank][-1]
        assert (end["steps"], end["batches"]) == (STEPS, STEPS)
        assert end["rate"] == pytest.approx(1e-2 * 0.8**EPOCHS)
        assert end["loss"] == ends[0]["loss"]
        assert end["state"].keys() == ends[0]["state"].keys()
        assert all(torch.equal(tensor, ends[0]["state"][name]) for name, tensor in end["state"].items())
        assert all(tensor.isfinite().all() for tensor in end["state"].values())
    rejoined = max(next(step for pid, step in run.trained(rank) if pid == run.pids[rank][-1]) for rank in killed)
    for rank in range(run.processes):
        assert {step for _pid, step in run.trained(rank)} >= set(range(rejoined + 1, STEPS))
    assert min(losses) - 0.2 < ends[0]["loss"] < max(losses) + 0.2 < 1.6  # log(5), the loss at the start


def test_a_killed_middle_stage_rejoins_while_the_one_before_trains_on(tmp_path: Path, losses: list[float]) -> None:
    run = Supervised(tmp_path, checkpoint="sharded", alone=8).kill(1, f"train-{BATCHES + 3}")
    assert_rejoined(run, run.run(), [1], losses)
    assert "stage 1 (rank 1) was started anew and is back" in run.log
    alone = re.search(r"stage 1 \(rank 1\) is back, after (\d+) batches without targets from it", run.log)
    assert alone is not None
    assert int(alone[1]) >= 6  # two more may have been on their way
    assert re.search(r"stage 1 \(rank 1\) was started anew\. .* \d+ batches are not trained by its stages", run.log)


def test_a_first_stage_that_is_killed_while_a_checkpoint_is_saved_rejoins(tmp_path: Path, losses: list[float]) -> None:
    run = Supervised(tmp_path, processes=2).kill(1, "save-2")
    ends = run.run()
    assert_rejoined(run, ends, [1], losses)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == ends[0]["state"].keys()
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(list(Noting(None, 2).parameters()))


def test_the_last_stage_cannot_be_replaced_and_the_others_say_so(tmp_path: Path) -> None:
    run = Supervised(tmp_path, restarts=False, away=Away(seconds=2.0, patience=0.5)).kill(0, "train-9")
    last, *others = run.run()
    assert last is None
    for end in others:
        assert isinstance(end, Failure)
        assert end.kind == "StageLostError"
        assert "(rank 0) is gone" in end.message
        assert "No new process can take the place of rank 0" in end.message


def test_a_process_that_does_not_come_back_is_lost_when_the_budget_is_spent(tmp_path: Path) -> None:
    run = Supervised(tmp_path, restarts=False, away=Away(seconds=2.0, patience=0.5)).kill(1, "train-9")
    last, middle, first = run.run()
    assert middle is None
    for end in (last, first):
        assert isinstance(end, Failure)
        assert end.kind == "StageLostError"
        assert "stage 1 (rank 1) is gone" in end.message
        assert "no new process took its place within 2 s" in end.message


def test_a_process_that_was_killed_before_its_first_snapshot_says_so_to_all(tmp_path: Path) -> None:
    for end in Supervised(tmp_path, processes=2).kill(1, "train-0").run():
        assert isinstance(end, Failure)
        assert end.kind == "StageLostError"
        assert "rank 1 was started while the others run already" in end.message
        assert "the first is written after the first training batch" in end.message


def test_lightning_s_launcher_starts_a_killed_process_again(tmp_path: Path) -> None:
    (tmp_path / f"kill-1-train-{BATCHES + 8}").touch()
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
    command = [sys.executable, "tests/rejoining.py", str(tmp_path)]
    done = subprocess.run(
        command, env={**inherited, **own}, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "LOCAL_RANK=1 was killed by signal 9. It is started again" in (tmp_path / "log").read_text()
    last, first = (torch.load(tmp_path / f"ended-{rank}", weights_only=True) for rank in range(2))
    assert last["batches"] == first["batches"] == STEPS
    assert all(torch.equal(tensor, first["state"][name]) for name, tensor in last["state"].items())


def test_what_cannot_be_skipped_is_refused(tmp_path: Path) -> None:
    def work() -> str:
        module = Noting(None, 2)
        module.automatic_optimization = False
        strategy = SyntheticGradientStrategy(timeout=20.0, away=Away(folder=tmp_path))
        trainer = make_trainer(strategy=strategy, devices=2)
        with pytest.raises(Exception, match="manual optimization") as caught:
            trainer.fit(module, loader())
        return str(caught.value)

    assert all("Away(folder=...)" in message for message in run_ranks(2, work))
