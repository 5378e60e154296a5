"""Real processes: Lightning's own launchers, torchrun, Ctrl-C, and Weights & Biases offline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_sg import SyntheticGradients
from tests.models import Classifier, assert_same_state, loader, make_trainer
from tests.ranks import free_port, run_ranks

ROOT = Path(__file__).parents[2]


def start(command: list[str]) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK")}
    environment = {**clean, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}

    def hear_interrupts() -> None:
        # Started in the background by a shell, the tests and their children would ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_interrupts,
    )


def descendants(pid: int) -> list[int]:
    """The children of process ``pid``, and their descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [other for child in children for other in descendants(int(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    """The sums of the weights after the same training in one process."""
    pl.seed_everything(5, verbose=False)
    module = Classifier()
    make_trainer(callbacks=[SyntheticGradients()]).fit(module, loader(), loader(shuffle=False))
    return {name: float(tensor.double().sum()) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("mode", ["popen", "torchrun", "spawn", "fork"])
def test_every_launcher_trains_the_same(mode: str, tmp_path: Path, expected: dict[str, float]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if mode == "torchrun" else []
    process = start([sys.executable, *launcher, "tests/script.py", mode, str(tmp_path)])
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    sums = json.loads((tmp_path / f"{mode}.json").read_text())
    assert sums == pytest.approx(expected, abs=1e-3)
    if mode in ("popen", "torchrun"):  # otherwise gloo's threads may abort a process that ended well
        assert {path.name for path in tmp_path.glob("left-*")} == {"left-0", "left-1"}
    if mode == "popen":
        assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}
        logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
        assert "train_loss" in logged
        assert "sg/net.3/cosine" in logged


def test_a_killed_stage_restarts_the_job_which_ends_as_if_undisturbed(tmp_path: Path) -> None:
    """Under torchrun with restarts: killed in mid-epoch, resumed from the checkpoint of the epoch before."""
    ends = {}
    for mode in ("undisturbed", "restarted"):
        (tmp_path / mode).mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        process = start([sys.executable, *launcher, "tests/script.py", mode, str(tmp_path / mode)])
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, output
        ends[mode] = torch.load(tmp_path / mode / "end.pt")
    assert (ends["undisturbed"]["restarts"], ends["restarted"]["restarts"]) == ("0", "1")
    assert_same_state(ends["undisturbed"]["state"], ends["restarted"]["state"], exact=True)


def test_slurm_starts_the_processes(expected: dict[str, float]) -> None:
    """Lightning detects SLURM from the variables that it sets for each task."""

    def work() -> dict[str, float]:
        rank, port = os.environ["RANK"], os.environ["MASTER_PORT"]
        for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "GROUP_", "LOCAL_", "WORLD_"))]:
            del os.environ[name]
        tasks = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "PROCID": rank, "LOCALID": rank, "NODEID": "0", "NNODES": "1"}
        others = {"JOB_ID": "12345", "JOB_NAME": "train", "NODELIST": "localhost", "STEP_NUM_TASKS": "2"}
        os.environ.update({f"SLURM_{name}": value for name, value in {**tasks, **others}.items()}, MASTER_PORT=port)
        del os.environ["RANK"]
        pl.seed_everything(5, verbose=False)
        module = Classifier()
        trainer = make_trainer(strategy="synthetic_gradients", devices=2, num_nodes=1)
        assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)
        trainer.fit(module, loader(), loader(shuffle=False))
        return {name: float(tensor.double().sum()) for name, tensor in module.state_dict().items()}

    for sums in run_ranks(2, work):
        assert sums == pytest.approx(expected, abs=1e-3)


def test_control_c_ends_all_processes(tmp_path: Path) -> None:
    process = start([sys.executable, "tests/script.py", "slow", str(tmp_path)])
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "TRAINING" in line:
            break
    assert "TRAINING" in seen[-1], "".join(seen)
    everyone = [process.pid, *descendants(process.pid)]
    assert len(everyone) == 2
    for pid in everyone:  # as a terminal does
        os.kill(pid, signal.SIGINT)
    output, _ = process.communicate(timeout=40)
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in everyone) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in everyone), output


class Saved(Classifier):
    """Has hyperparameters to log."""

    def __init__(self, learning_rate: float = 0.0123) -> None:
        super().__init__(learning_rate=learning_rate)
        self.save_hyperparameters()


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_metrics_of_all_stages_reach_the_logger(kind: str, tmp_path: Path) -> None:
    def work() -> Any:
        logged: dict[str, float] = {}
        base = WandbLogger if kind == "wandb" else TensorBoardLogger

        class Watched(base):  # type: ignore[misc, valid-type]
            def log_metrics(self, metrics: Any, step: Any = None) -> None:
                logged.update(metrics)
                super().log_metrics(metrics, step)

        logger = Watched(save_dir=tmp_path, **({"offline": True} if kind == "wandb" else {}))
        pl.seed_everything(5, verbose=False)
        trainer = make_trainer(strategy="synthetic_gradients", devices=2, logger=logger, log_every_n_steps=1)
        module = Saved()
        if kind == "wandb":
            logger.watch(module, log="gradients", log_freq=1)
        trainer.fit(module, loader(), loader(shuffle=False))
        logger.finalize("success")
        return logged

    rank_zero, rank_one = run_ranks(2, work)
    metrics = {f"sg/{name}/{key}" for name in ("net.1", "net.3", "net.5") for key in ("cosine", "norm_ratio")}
    assert metrics | {"train_loss", "val_loss", "val_accuracy"} <= set(rank_zero)
    assert rank_one == {} or kind == "tensorboard"
    assert any(path.is_file() for path in tmp_path.rglob("*"))
    if kind == "wandb":
        (run,) = tmp_path.rglob("*.wandb")
        assert b"gradients/net.7.weight" in run.read_bytes()
        assert b"0.0123" in run.read_bytes()


def test_watching_every_parameter_is_refused(tmp_path: Path) -> None:
    def work() -> None:
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        module = Classifier()
        logger.watch(module, log="all")
        make_trainer(strategy="synthetic_gradients", devices=2, logger=logger).fit(module, loader())

    refused, _ = run_ranks(2, work, may_fail=True)  # rank 1 has no run to log to, and nothing to watch
    assert "Use watch(log='gradients')" in refused.message
