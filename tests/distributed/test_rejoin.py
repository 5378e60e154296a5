"""A process that is killed and started again takes its place, while the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sg import Away, SyntheticGradientStrategy
from lightning_sg.distributed.snapshots import SnapshotFile
from lightning_sg.errors import StageLostError
from tests.models import loader, make_trainer
from tests.ranks import free_port, run_ranks
from tests.rejoining import BATCHES, Noting, train

ROOT = Path(__file__).parents[2]
EPOCHS = 2
_PATIENCE = 240.0  # far more than any test needs
_LAUNCHED = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Run:
    """Processes with the environment variables of torchrun, and a supervisor that starts killed ones again.

    Args:
        folder: Where they leave their files.
        processes: How many there are.
        launched: Whether Lightning starts all but the first, which is then all that is started here.
    """

    def __init__(self, folder: Path, processes: int, *, launched: bool = False) -> None:
        self.folder = folder
        self.processes = processes
        self.restarts = 0
        self._launched = launched
        self._port = free_port()

    def kill(self, rank: int, moment: str) -> Run:
        """Has the process of a rank killed; see ``tests/rejoining.py`` for the moments."""
        (self.folder / f"kill-{rank}-{moment}").touch()
        return self

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": str(self._port)}
        if not self._launched:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "LOCAL_WORLD_SIZE": self.processes}
            own |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "tests"}
            own |= {name: str(value) for name, value in ranks.items()}
        command = [sys.executable, "tests/rejoining.py", str(self.folder), str(self.processes), str(EPOCHS)]
        with (self.folder / f"output-{rank}").open("ab") as output:
            return subprocess.Popen(
                command, env={**inherited, **own}, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def end(self) -> list[dict[str, Any]]:
        """Supervises the processes to their ends; what each says then."""
        running = [self._start(rank) for rank in range(1 if self._launched else self.processes)]
        deadline = time.monotonic() + _PATIENCE
        try:
            while any(process.poll() is None for process in running) and time.monotonic() < deadline:
                for rank, process in enumerate(running):
                    if process.poll() == -signal.SIGKILL:
                        self.restarts += 1
                        running[rank] = self._start(rank)
                time.sleep(0.05)
        finally:
            for process in running:
                process.kill()
                process.wait()
        assert [process.returncode for process in running] == [0] * len(running), self.output
        return [json.loads((self.folder / f"ended-{rank}.json").read_text()) for rank in range(self.processes)]

    @property
    def output(self) -> str:
        """What all processes have printed."""
        return "\n\n".join(path.read_text() for path in sorted(self.folder.glob("output-*")))

    def trained(self, rank: int) -> list[tuple[int, int]]:
        """The batches that a rank was trained with: the id of its process, and the step."""
        lines = (self.folder / f"trained-{rank}").read_text().splitlines()
        return [(int(pid), int(step)) for pid, step in (line.split() for line in lines)]


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """The losses at the end of undisturbed runs with other seeds; in one process, which computes the same."""
    return [float(train(3, EPOCHS, seed=seed).callback_metrics["val_loss"]) for seed in range(4)]


def assert_rejoined(run: Run, ends: list[dict[str, Any]], killed: list[int], losses: list[float]) -> None:
    steps = EPOCHS * BATCHES
    for rank, said in enumerate(ends):
        trained = run.trained(rank)
        pids = list(dict.fromkeys(pid for pid, _step in trained))
        assert len(pids) == 1 + killed.count(rank)  # nobody else was started again
        assert (said["step"], said["rate"]) == (steps, pytest.approx(1e-2 * 0.8**EPOCHS))
        assert said["sum"] == ends[0]["sum"]  # all have the whole model
        rejoined = max(next(step for pid, step in run.trained(each) if pid == ends[each]["pid"]) for each in killed)
        assert {step for _pid, step in trained} >= set(range(rejoined + 1, steps))
    loss = ends[0]["loss"]
    assert min(losses) - 0.2 < loss < max(losses) + 0.2
    checkpoint = torch.load(run.folder / "last.ckpt", weights_only=True)
    whole = Noting(None, run.processes).state_dict()
    assert checkpoint["state_dict"].keys() == whole.keys()
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
    parameters = len(list(Noting(None, run.processes).parameters()))
    assert checkpoint["optimizer_states"][0]["state"].keys() == set(range(parameters))


def test_a_first_stage_that_is_killed_while_it_saves_a_checkpoint_rejoins(tmp_path: Path, losses: list[float]) -> None:
    run = Run(tmp_path, 2).kill(1, "save-2")
    assert_rejoined(run, run.end(), [1], losses)
    assert run.restarts == 1


def test_killed_stages_rejoin_in_mid_epoch_while_the_one_before_goes_on(tmp_path: Path, losses: list[float]) -> None:
    run = Run(tmp_path, 3).kill(1, f"train-{BATCHES + 10}").kill(2, "train-6")
    assert_rejoined(run, run.end(), [1, 2], losses)
    assert run.restarts == 2
    assert "goes on without targets" in run.output
    assert "stage 1 (rank 1) was started anew and is back" in run.output


def test_lightning_s_launcher_starts_a_killed_process_again(tmp_path: Path, losses: list[float]) -> None:
    run = Run(tmp_path, 2, launched=True).kill(1, f"train-{BATCHES + 10}")
    assert_rejoined(run, run.end(), [1], losses)
    assert "LOCAL_RANK=1 was killed by signal 9. It is started again" in run.output


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


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 0}, ValueError),
        ({"every": 1.5}, ValueError),
        ({"every": True}, ValueError),
        ({"folder": 3}, TypeError),
    ],
)
def test_options_are_checked_by_name(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"Away\({next(iter(options))}=\.\.\.\)"):
        Away(**options)


def test_a_process_without_a_snapshot_of_the_run_says_so(tmp_path: Path) -> None:
    SnapshotFile(tmp_path, 1, "earlier").write({"number": 3})
    assert SnapshotFile(tmp_path, 1, "earlier").read()["number"] == 3
    with pytest.raises(StageLostError, match=r"rank 1 was started while the others run .* it is of another run"):
        SnapshotFile(tmp_path, 1, "now").read()
    with pytest.raises(StageLostError, match=r"rank 2 was started while the others run .* there is none"):
        SnapshotFile(tmp_path, 2, "now").read()
