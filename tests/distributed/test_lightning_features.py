"""Features of Lightning, one at a time: a split run does what one process does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from lightning_sg import PredictorTraining, SyntheticGradients, SyntheticGradientStrategy
from tests.blocks import Blocks, middle, plain
from tests.distributed.feature_modules import (
    Bare,
    Checkpointed,
    Frozen,
    InPlace,
    Named,
    Plateau,
    Pooled,
    Recurrent,
    ShapeDependent,
    Skips,
    Splitting,
    Stepping,
    Tabulated,
    Tokens,
    Twice,
    TwoOptimizers,
    Words,
    encoder,
    hooked,
)
from tests.models import Classifier, dataset, loader, make_trainer, state_of
from tests.ranks import Failure, run_ranks


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset(40))


class Reloading(pl.LightningDataModule):
    """Loads other samples in every epoch."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return loader(samples=20 + 10 * self.trainer.current_epoch)


class EMA(lightning_callbacks.WeightAveraging):
    def __init__(self) -> None:
        super().__init__(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))


def both() -> dict[str, Any]:
    return {"train_dataloaders": loader(), "val_dataloaders": loader(shuffle=False)}


@dataclass
class Case:
    """One feature: how it is used, what differs, and the number of stages."""

    trainer: dict[str, Any] = field(default_factory=dict)
    module: Callable[[], pl.LightningModule] = plain
    data: Callable[[], dict[str, Any]] = both
    callbacks: Callable[[Path], list[Any]] = lambda folder: []
    tolerance: float = 1e-5
    words: str = ""
    stages: int = 3


def only(callback: Callable[[], Any]) -> Callable[[Path], list[Any]]:
    return lambda folder: [callback()]


CASES: dict[str, Case] = {
    "fast_dev_run": Case({"fast_dev_run": True}),
    "overfit_batches": Case({"overfit_batches": 2}),
    "limit_train_batches and limit_val_batches": Case({"limit_train_batches": 3, "limit_val_batches": 1}),
    "limit_train_batches as a share": Case({"limit_train_batches": 0.5}),
    "val_check_interval": Case({"val_check_interval": 2}),
    "check_val_every_n_epoch": Case({"check_val_every_n_epoch": 2}),
    "max_steps": Case({"max_steps": 7, "max_epochs": -1}),
    "min_epochs": Case({"min_epochs": 3, "max_epochs": 4}),
    "num_sanity_val_steps": Case({"num_sanity_val_steps": 2}),
    "no sanity check": Case({"num_sanity_val_steps": 0}),
    "accumulate_grad_batches": Case({"accumulate_grad_batches": 3}),
    "gradient_clip_val by value": Case({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "several validation loaders": Case(data=lambda: {**both(), "val_dataloaders": [loader(shuffle=False)] * 2}),
    "an iterable dataset without length": Case(
        data=lambda: {"train_dataloaders": DataLoader(Endless(), batch_size=8)}, trainer={"limit_val_batches": 0}
    ),
    "reload_dataloaders_every_n_epochs": Case(
        {"reload_dataloaders_every_n_epochs": 1}, data=lambda: {"datamodule": Reloading()}
    ),
    "a plateau schedule on a validation metric": Case(
        {"max_epochs": 4},
        module=lambda: Plateau(*plain().parts),
        callbacks=only(lightning_callbacks.LearningRateMonitor),
    ),
    "optimizer_step and hooks around it": Case(module=lambda: Stepping(*plain().parts)),
    "two optimizers, by hand": Case(module=lambda: TwoOptimizers(*plain().parts)),
    "frozen layers": Case(module=lambda: Frozen(*plain().parts)),
    "nn.TransformerEncoder": Case(module=encoder),
    "an LSTM inside a stage": Case(module=lambda: Blocks(Tokens(), Recurrent(), Pooled())),
    "a skip connection inside a stage": Case(module=lambda: middle(Skips())),
    "activation checkpointing inside a stage": Case(module=lambda: middle(Checkpointed())),
    "an embedding with sparse gradients": Case(module=Words, stages=2),
    "a dict with a mask and a number across a boundary": Case(module=Named, stages=2),
    "BatchNorm": Case(module=Classifier),
    "a branch on the batch size": Case(module=lambda: middle(ShapeDependent(16, 16))),
    "an in-place operation right behind a boundary": Case(module=lambda: middle(InPlace(16, 16))),
    "a block that is called twice, a keyword argument": Case(module=lambda: middle(Twice())),
    "an operation with several results, some unused": Case(module=lambda: middle(Splitting(16, 16))),
    "a table made from a buffer, used by every stage": Case(module=lambda: Tabulated(*plain().parts)),
    "bare parameters, an alias, a buffer": Case(module=lambda: middle(Bare())),
    "hooks of the user's, forwards and backwards": Case(module=hooked),
    "torch.compile of a stage": Case(module=lambda: middle(torch.compile(Skips(), backend="eager"))),
    "ModelCheckpoint, the best and the last": Case(
        callbacks=lambda folder: [
            lightning_callbacks.ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, save_last=True)
        ]
    ),
    "ModelCheckpoint on steps and a training metric": Case(
        callbacks=lambda folder: [
            lightning_callbacks.ModelCheckpoint(folder, monitor="train_loss", every_n_train_steps=3, save_top_k=2)
        ]
    ),
    "EarlyStopping": Case(
        {"max_epochs": 6},
        callbacks=only(lambda: lightning_callbacks.EarlyStopping("val_loss", min_delta=10.0, patience=1)),
    ),
    "WeightAveraging": Case(callbacks=only(EMA)),
    "StochasticWeightAveraging": Case(
        {"max_epochs": 4},
        callbacks=only(lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=1)),
    ),
    "Timer": Case(callbacks=only(lambda: lightning_callbacks.Timer(duration={"hours": 1}))),
    "ModelSummary": Case({"enable_model_summary": True}),
    "TQDMProgressBar": Case({"enable_progress_bar": True}),
    "RichProgressBar": Case(
        {"enable_progress_bar": True}, callbacks=only(lightning_callbacks.RichProgressBar)
    ),
    "DeviceStatsMonitor": Case(callbacks=only(lambda: lightning_callbacks.DeviceStatsMonitor(cpu_stats=False))),
    "profiler='simple'": Case({"profiler": "simple"}),
    "GradientAccumulationScheduler": Case(
        callbacks=only(lambda: lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 2}))
    ),
    "bf16-true": Case({"precision": "bf16-true"}, tolerance=5e-3, words="to the precision of bfloat16"),
    "64-true": Case({"precision": "64-true"}),
    "detect_anomaly": Case({"detect_anomaly": True}),
    "deterministic": Case({"deterministic": True}),
}  # fmt: skip


def train(name: str, devices: int, folder: Path) -> dict[str, Any]:
    """Trains as a user would, with a logger, and returns what must not depend on the number of processes."""
    case = CASES[name]
    folder = folder / name.replace(" ", "_") / str(devices)
    pl.seed_everything(11, verbose=False)
    module = case.module()
    trainer = make_trainer(
        **{
            "logger": CSVLogger(folder),
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            "enable_checkpointing": any(
                isinstance(callback, lightning_callbacks.ModelCheckpoint) for callback in case.callbacks(folder)
            ),
            **case.trainer,
        },
        strategy=SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto",
        devices=devices,
        callbacks=[SyntheticGradients(training=PredictorTraining(seed=1)), *case.callbacks(folder)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, **case.data())
    metrics = {
        key: float(value)
        for key, value in trainer.callback_metrics.items()
        if not key.startswith("sg/") and not key.startswith("DeviceStats")
    }
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    files = sorted(path.name for path in folder.glob("*.ckpt"))
    counts = (trainer.global_step, trainer.current_epoch)
    return {"state": state_of(module), "metrics": metrics, "rates": rates, "files": files, "counts": counts}


def compare(expected: dict[str, Any], found: dict[str, Any], tolerance: float) -> None:
    for key, value in expected["state"].items():
        assert torch.allclose(found["state"][key], value, rtol=tolerance, atol=tolerance), key
    assert found["counts"] == expected["counts"]
    assert found["rates"] == pytest.approx(expected["rates"])
    assert found["files"] == expected["files"]
    for key, value in expected["metrics"].items():
        if "train_loss" not in key:  # only the last stage knows it before the epoch ends
            assert found["metrics"][key] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), key


GROUPS = [list(CASES)[start : start + 7] for start in range(0, len(CASES), 7)]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_split_over_processes_it_does_what_it_does_in_one(group: list[str], tmp_path: Path) -> None:
    def work(devices: int) -> dict[str, Any]:
        # As many as there are stages, so that all but the smallest have one in the middle.
        return {name: train(name, devices, tmp_path) for name in group if CASES[name].stages == devices}

    results = {
        devices: run_ranks(devices, partial(work, devices), may_fail=True)
        for devices in {CASES[name].stages for name in group}
    }
    for result in (each for ranks in results.values() for each in ranks):
        assert not isinstance(result, Failure), result.trace
    for name in group:
        expected = train(name, 1, tmp_path)
        for devices, ranks in results.items():
            for rank, result in enumerate(ranks):
                if name not in result:
                    continue  # it has fewer stages
                try:
                    compare(expected, result[name], CASES[name].tolerance)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {devices} processes, rank {rank}: {error}") from error
