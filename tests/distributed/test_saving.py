"""Checkpoints of a split run: they are ordinary ones, and resume on any number of processes."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_sg import PredictorTraining, SyntheticGradients
from tests.blocks import plain
from tests.distributed.feature_modules import Plateau
from tests.everywhere import everywhere, trainer_for
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


def test_a_checkpoint_is_an_ordinary_checkpoint_and_resumes_on_other_numbers_of_processes(tmp_path: Path) -> None:
    def begin(devices: int) -> None:
        pl.seed_everything(5, verbose=False)
        checkpoints = ModelCheckpoint(tmp_path / str(devices), monitor="val_loss", filename="best", save_last=True)
        trainer = trainer_for(
            devices, [SyntheticGradients(), checkpoints], max_epochs=2, enable_checkpointing=True, deterministic=True
        )
        trainer.fit(Classifier(), loader(shuffle=False), loader(shuffle=False))
        trainer.save_checkpoint(tmp_path / f"{devices}.ckpt")

    def resume(devices: int, saved: int) -> dict[str, Tensor]:
        pl.seed_everything(99, verbose=False)
        module = Classifier()
        trainer = trainer_for(devices, max_epochs=4)
        trainer.fit(module, loader(shuffle=False), ckpt_path=tmp_path / f"{saved}.ckpt", weights_only=True)
        return state_of(module)

    def uninterrupted(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(5, verbose=False)
        module = Classifier()
        trainer_for(devices, max_epochs=4).fit(module, loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    for devices in (1, 2, 4):
        everywhere(devices, begin)
    one, two = (torch.load(tmp_path / f"{devices}.ckpt", weights_only=True) for devices in (1, 2))
    assert_same_state(one["state_dict"], two["state_dict"])
    assert one["optimizer_states"][0]["state"].keys() == two["optimizer_states"][0]["state"].keys()
    assert one.keys() == two.keys()
    assert (tmp_path / "2" / "best.ckpt").exists()
    assert (tmp_path / "2" / "last.ckpt").exists()

    plain = Classifier.load_from_checkpoint(tmp_path / "2.ckpt", weights_only=True)  # without this package
    assert_same_state(state_of(plain), one["state_dict"])

    (expected,) = everywhere(1, uninterrupted)
    for saved, devices in ((1, 1), (1, 2), (2, 1), (2, 4), (4, 2)):
        for state in everywhere(devices, lambda devices, saved=saved: resume(devices, saved)):
            assert_same_state(expected, state)


def test_training_goes_on_in_a_second_fit() -> None:
    def work(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(5, verbose=False)
        module = Classifier()
        trainer = trainer_for(devices, max_epochs=1)
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    (expected,) = everywhere(1, work)
    for state in everywhere(2, work):
        assert_same_state(expected, state)


def resumed(folder: Path, devices: int, steps: int, checkpoint: str | None = None) -> dict[str, Tensor]:
    pl.seed_everything(4, verbose=False)
    module = Plateau(*plain().parts)
    trainer = make_trainer(
        strategy="synthetic_gradients" if devices > 1 else "auto",
        devices=devices,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[SyntheticGradients(training=PredictorTraining(seed=1))],
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{devices}.ckpt")
    return state_of(module)


def test_a_run_goes_on_in_mid_epoch_on_any_number_of_processes(tmp_path: Path) -> None:
    # An epoch has five batches. On resuming, Lightning starts the loader afresh, so the reference
    # is a run in one process that was interrupted at the same batches.
    alone = tmp_path / "alone"
    resumed(alone, 1, 8)
    resumed(alone, 1, 12, str(alone / "1.ckpt"))
    expected = resumed(alone, 1, 17, str(alone / "1.ckpt"))
    run_ranks(2, lambda: resumed(tmp_path, 2, 8))
    resumed(tmp_path, 1, 12, str(tmp_path / "2.ckpt"))
    for state in run_ranks(3, lambda: resumed(tmp_path, 3, 17, str(tmp_path / "1.ckpt"))):
        assert_same_state(expected, state)


def test_a_checkpoint_of_a_split_run_loads_in_plain_lightning(tmp_path: Path) -> None:
    (state, *_), *_rest = ([result] for result in run_ranks(2, lambda: resumed(tmp_path, 2, 8)))
    module = Plateau(*plain().parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns that the callback is missing
        make_trainer(max_steps=9, max_epochs=-1).fit(module, loader(), loader(), ckpt_path=str(tmp_path / "2.ckpt"))
    again = Plateau(*plain().parts)
    again.load_state_dict(torch.load(tmp_path / "2.ckpt", weights_only=False)["state_dict"])
    assert_same_state(state_of(again), state)
