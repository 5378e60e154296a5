"""Checkpoints in shards: what is saved, resumed from and merged is what one file would hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn

from lightning_sg import SyntheticGradients, SyntheticGradientStrategy
from lightning_sg.checkpoint.sharded import is_sharded, merge
from lightning_sg.cli import main
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


class Tied(Classifier):
    """A weight under two names, a parameter that no stage uses, and a buffer that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.net[6][0].weight = self.net[4][0].weight
        self.unused = nn.Parameter(torch.arange(3.0))
        self.register_buffer("noted", torch.arange(2))
        self.alias = self.net[0]  # its BatchNorm has buffers, under two names now

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = "kept"


def train(
    devices: int,
    folder: Path,
    checkpoint: str | None = None,
    epochs: int = 2,
    how: str = "sharded",
    make: Any = Classifier,
) -> dict[str, Tensor]:
    pl.seed_everything(3, verbose=False)
    module = make()
    trainer = make_trainer(
        strategy=SyntheticGradientStrategy(checkpoint=how, timeout=30) if devices > 1 else "auto",
        devices=devices,
        callbacks=[SyntheticGradients(seed=2)],
        max_epochs=epochs,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(shuffle=False), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return state_of(module)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two epochs on two processes."""
    folder = tmp_path_factory.mktemp("first")
    run_ranks(2, lambda: train(2, folder))
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Of four epochs in one process."""
    return train(1, tmp_path_factory.mktemp("whole"), epochs=4)


def test_each_process_writes_its_own_part(first: Path) -> None:
    assert is_sharded(first)
    sizes = [file.stat().st_size for file in sorted(first.glob("*.distcp"))]
    assert len(sizes) == 2
    assert max(sizes) < 0.75 * sum(sizes)
    assert [path.name for path in first.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_run_goes_on_from_shards_on_any_number_of_processes(
    devices: int, first: Path, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    if devices == 1:
        main(["merge", str(first), str(tmp_path / "one.ckpt")])
        states = [train(1, tmp_path, str(tmp_path / "one.ckpt"), epochs=4)]
    else:
        states = run_ranks(devices, lambda: train(devices, tmp_path, str(first), epochs=4))
    for state in states:
        assert_same_state(whole, state)


def test_a_process_reads_the_optimizer_states_of_its_own_stages_alone(first: Path, tmp_path: Path) -> None:
    def work() -> Any:
        module = Classifier()
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(checkpoint="sharded", timeout=30), devices=2, max_epochs=4
        )
        trainer.fit(module, loader(shuffle=False), ckpt_path=str(first))
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return {names[id(parameter)] for parameter in trainer.optimizers[0].state}

    last, start = run_ranks(2, work)
    assert start == {name for name, _ in Classifier().named_parameters() if name.startswith(("net.0.", "net.2."))}
    assert last == {name for name, _ in Classifier().named_parameters()} - start


def test_a_finished_run_that_is_saved_again_keeps_its_optimizer_states(first: Path, tmp_path: Path) -> None:
    run_ranks(2, lambda: train(2, tmp_path, str(first), epochs=2))  # which it has had
    before, after = merge(first)["optimizer_states"][0], merge(tmp_path / "last.ckpt")["optimizer_states"][0]
    assert after["state"].keys() == before["state"].keys()
    torch.testing.assert_close(after["state"], before["state"])


def test_what_shards_cannot_do_is_refused(tmp_path: Path) -> None:
    def averaged() -> None:
        strategy = SyntheticGradientStrategy(checkpoint="sharded", timeout=30)
        callbacks = [WeightAveraging()]
        make_trainer(strategy=strategy, devices=2, callbacks=callbacks).fit(Classifier(), loader(shuffle=False))

    def remote() -> None:
        strategy = SyntheticGradientStrategy(checkpoint="sharded", timeout=30)
        trainer = make_trainer(strategy=strategy, devices=2, max_epochs=1)
        trainer.fit(Classifier(), loader(shuffle=False))
        trainer.save_checkpoint("s3://bucket/last.ckpt")

    for failure in run_ranks(2, averaged, may_fail=True):
        assert "does not support WeightAveraging" in failure.message
    for failure in run_ranks(2, remote, may_fail=True):
        assert "not to s3://bucket/last.ckpt" in failure.message


def test_shards_go_on_from_one_file_and_one_file_from_shards(
    first: Path, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    train(1, tmp_path)
    for state in run_ranks(2, lambda: train(2, tmp_path / "a", str(tmp_path / "last.ckpt"), epochs=4)):
        assert_same_state(whole, state)
    for state in run_ranks(2, lambda: train(2, tmp_path / "b", str(first), epochs=4, how="whole")):
        assert_same_state(whole, state)
    assert (tmp_path / "b" / "last.ckpt").is_file()


def test_merged_shards_are_the_checkpoint_of_one_process(tmp_path: Path) -> None:
    train(1, tmp_path / "one", make=Tied)
    run_ranks(2, lambda: train(2, tmp_path / "two", make=Tied))
    one = torch.load(tmp_path / "one" / "last.ckpt", weights_only=False)
    two = merge(tmp_path / "two" / "last.ckpt")
    assert two["own"] == "kept"
    assert {key for key in two if two[key] or one.get(key)} - {"optimizer_states"} >= {"state_dict", "loops", "epoch"}
    assert_same_state(one["state_dict"], two["state_dict"])
    (own,), (merged,) = one["optimizer_states"], two["optimizer_states"]
    assert own["param_groups"] == merged["param_groups"]
    torch.testing.assert_close(merged["state"], own["state"], rtol=1e-5, atol=1e-5)
    plain = Tied()
    plain.load_state_dict(two["state_dict"])


def test_the_strategy_on_one_device_reads_shards(first: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    module = Classifier()
    callback = SyntheticGradients(seed=2)
    strategy = SyntheticGradientStrategy(checkpoint="sharded")
    make_trainer(strategy=strategy, callbacks=[callback], max_epochs=4).fit(
        module, loader(shuffle=False), ckpt_path=str(first)
    )
    assert_same_state(whole, state_of(module))


def test_model_checkpoint_keeps_and_removes_folders(tmp_path: Path) -> None:
    def work() -> Any:
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=1, save_last=True)
        strategy = SyntheticGradientStrategy(checkpoint="sharded", timeout=30)
        trainer = make_trainer(
            strategy=strategy, devices=2, callbacks=[checkpoint], enable_checkpointing=True, max_epochs=3
        )
        module = Classifier()
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
        value = trainer.validate(module, loader(shuffle=False), ckpt_path="best", verbose=False)
        return checkpoint.best_model_path, float(checkpoint.best_model_score), value

    (best, score, (values,)), (other, _, _) = run_ranks(2, work)
    assert best == other
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({Path(best).name, "last.ckpt"})
    assert values["val_loss"] == pytest.approx(score)


def test_shards_of_another_model_are_refused_by_name(first: Path, tmp_path: Path) -> None:
    class Wider(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)
            self.net[0][0].weight = nn.Parameter(torch.zeros(17, 12))

    failures = run_ranks(2, lambda: train(2, tmp_path, str(first), make=Wider), may_fail=True)
    for failure in failures:
        assert (
            "only in the model: ['more.bias', 'more.weight']; of another shape: ['net.0.0.weight']" in failure.message
        )


@pytest.mark.parametrize("how", ["sharded", "whole"])
def test_a_crash_while_saving_leaves_the_last_good_checkpoint(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of one stage dies in the middle of writing; then the checkpoint is still the one before."""
    run_ranks(2, lambda: train(2, tmp_path, how=how))
    good = merge(tmp_path / "last.ckpt") if how == "sharded" else torch.load(tmp_path / "last.ckpt", weights_only=False)

    def dies(*_arguments: Any, **_options: Any) -> None:
        os._exit(1)

    def work() -> None:
        if os.environ["RANK"] == "0":
            # What writes the bytes: torch for a shard, fsspec's file for a whole one.
            monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", dies)
            monkeypatch.setattr("fsspec.implementations.local.LocalFileOpener.write", dies)
        train(2, tmp_path, epochs=3, how=how)

    dead, alive = run_ranks(2, work, may_fail=True)
    assert dead is None
    assert "is gone" in alive.message
    left = merge(tmp_path / "last.ckpt") if how == "sharded" else torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert left["global_step"] == good["global_step"]
    assert_same_state(good["state_dict"], left["state_dict"], exact=True)
    for state in run_ranks(2, lambda: train(2, tmp_path / "b", str(tmp_path / "last.ckpt"), epochs=3, how=how)):
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_the_command_refuses_what_is_no_folder_of_shards_and_overwrites_nothing(first: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no folder of shards"):
        main(["merge", str(tmp_path), str(tmp_path / "a")])
    (tmp_path / "there").touch()
    with pytest.raises(SystemExit, match=r"exists; nothing was written"):
        main(["merge", str(first), str(tmp_path / "there")])
    with pytest.raises(ValueError, match="'whole' or 'sharded', not 'shards'"):
        SyntheticGradientStrategy(checkpoint="shards")  # type: ignore[arg-type]
