"""Checkpoints in shards: what is saved and resumed from is what one file would hold."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn

from lightning_sg import PredictorTraining, SyntheticGradients, SyntheticGradientStrategy
from lightning_sg.checkpoint.sharded import merge
from lightning_sg.checkpoint.shards import is_sharded
from lightning_sg.cli import main
from tests.checkpoint.shards import train
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of two epochs on two processes."""
    folder = tmp_path_factory.mktemp("first")
    run_ranks(2, lambda: train(2, folder))
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights after four epochs in one process."""
    return train(1, tmp_path_factory.mktemp("whole"), epochs=4)


def test_each_process_writes_its_own_part(first: Path) -> None:
    assert is_sharded(first)
    sizes = [file.stat().st_size for file in sorted(first.glob("*/*.distcp"))]
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
    run_ranks(2, lambda: train(2, tmp_path, str(first), epochs=2))  # it has had both
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


def test_the_strategy_on_one_device_reads_shards(first: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    pl.seed_everything(3, verbose=False)
    module = Classifier()
    callback = SyntheticGradients(training=PredictorTraining(seed=2))
    strategy = SyntheticGradientStrategy(checkpoint="sharded")
    make_trainer(strategy=strategy, callbacks=[callback], max_epochs=4).fit(
        module, loader(shuffle=False), ckpt_path=str(first)
    )
    assert_same_state(whole, state_of(module))


def test_one_replica_writes_and_all_read(tmp_path: Path) -> None:
    def work(epochs: int, checkpoint: str | None) -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = Classifier()
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(checkpoint="sharded", replicas=2, timeout=30),
            devices=4,
            callbacks=[SyntheticGradients(training=PredictorTraining(seed=2))],
            max_epochs=epochs,
        )
        trainer.fit(module, loader(shuffle=False), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return state_of(module)

    run_ranks(4, lambda: work(1, None))
    assert sorted(path.name for path in (tmp_path / "1.ckpt").iterdir()) == [
        "checksums",
        "process-0",
        "process-1",
        "rest.pt",
    ]
    expected = run_ranks(4, lambda: work(2, None))
    for undisturbed, state in zip(expected, run_ranks(4, lambda: work(2, str(tmp_path / "1.ckpt")))):
        # A checkpoint has the running statistics of replica 0.
        weights = {name for name in state if "running" not in name}
        assert_same_state(*({name: each[name] for name in weights} for each in (undisturbed, state)))


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
    """One process dies while it writes; the checkpoint before stays."""
    run_ranks(2, lambda: train(2, tmp_path, how=how))
    good = merge(tmp_path / "last.ckpt") if how == "sharded" else torch.load(tmp_path / "last.ckpt", weights_only=False)

    opens = Path.open

    def dies_within_the_file(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        stream = opens(path, mode, *arguments, **options)
        if path.suffix == ".distcp" or path.name == ".last.ckpt.part":
            stream.write(b"half")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return stream

    def work() -> None:
        if os.environ["RANK"] == "0":
            monkeypatch.setattr(Path, "open", dies_within_the_file)  # by torch for a shard, by us for one file
        train(2, tmp_path, epochs=3, how=how)

    dead, alive = run_ranks(2, work, may_fail=True)
    assert dead is None
    if how == "sharded":
        assert any(shard.read_bytes() == b"half" for shard in tmp_path.glob(".last.ckpt.part/*/*.distcp"))
    else:
        assert (tmp_path / ".last.ckpt.part").read_bytes() == b"half"
    assert "is gone" in alive.message
    left = merge(tmp_path / "last.ckpt") if how == "sharded" else torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert left["global_step"] == good["global_step"]
    assert_same_state(good["state_dict"], left["state_dict"], exact=True)
    for state in run_ranks(2, lambda: train(2, tmp_path / "b", str(tmp_path / "last.ckpt"), epochs=3, how=how)):
        assert all(tensor.isfinite().all() for tensor in state.values())
