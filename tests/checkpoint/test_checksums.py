"""A checkpoint has a checksum beside it, which finds a flipped bit, and goes where the checkpoint goes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_sg import AtomicCheckpointIO, CheckpointError, SyntheticGradients, SyntheticGradientStrategy
from lightning_sg.checkpoint.sharded import merge
from lightning_sg.cli import main
from lightning_sg.files import part_of
from tests.checkpoint.shards import train
from tests.models import Classifier, loader, make_trainer
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run's checkpoint as one file and, in the folder ``shards``, in shards."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, lambda: train(2, folder, how="whole"))
    run_ranks(2, lambda: train(2, folder / "shards"))
    return folder


def flip(file: Path, place: float = 0.5) -> None:
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def resume(devices: int, checkpoint: Path) -> list[str]:
    """Resumes; returns the message of each process that refuses."""

    def work() -> None:
        trainer = make_trainer(strategy=SyntheticGradientStrategy(timeout=30), devices=devices, max_epochs=3)
        trainer.fit(Classifier(), loader(shuffle=False), ckpt_path=str(checkpoint))

    failures = run_ranks(devices, work, may_fail=True)
    assert {failure.kind for failure in failures if failure} <= {"CheckpointError", "StageLostError"}
    return [failure.message for failure in failures if failure and failure.kind == "CheckpointError"]


def test_the_checksums_are_those_of_sha256sum(saved: Path) -> None:
    line = (saved / "last.ckpt.sha256").read_text()
    assert line == f"{hashlib.sha256((saved / 'last.ckpt').read_bytes()).hexdigest()}  last.ckpt\n"
    shards = saved / "shards" / "last.ckpt"
    listed = {line.split("  ")[1] for line in (shards / "checksums").read_text().splitlines()}
    files = {str(file.relative_to(shards)) for file in shards.rglob("*") if file.is_file()}
    assert listed == files - {"checksums"}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "last.ckpt.sha256"], cwd=saved, check=True)
        subprocess.run(["sha256sum", "--check", "--strict", "checksums"], cwd=shards, check=True)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("damage", [flip, cut_short])
def test_a_damaged_file_is_named_and_can_be_loaded_without_its_checksum(
    devices: int, damage: Any, saved: Path, tmp_path: Path
) -> None:
    for file in saved.glob("last.ckpt*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "last.ckpt"
    assert resume(devices, path) == []
    damage(path)
    messages = resume(devices, path)
    assert len(messages) == devices
    for message in messages:
        assert message.startswith(f"{path} is not the file that was saved")
        assert f"delete {path}.sha256" in message
    (tmp_path / "last.ckpt.sha256").unlink()
    if damage is cut_short:
        assert all(f"{path} cannot be read" in message for message in resume(devices, path))
    else:
        assert resume(devices, path) == []


@pytest.mark.parametrize("damage", [flip, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["rest.pt", "process-0/__0_0.distcp", "process-1/__0_0.distcp", "process-1/.metadata"])
def test_damage_in_shards_is_found_and_named(name: str, damage: Any, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    shutil.copytree(saved / "shards" / "last.ckpt", path)
    assert merge(path)
    damage(path / name)
    if (name, damage) == ("rest.pt", Path.unlink):
        return  # no folder of shards any more
    with pytest.raises(CheckpointError, match=f"{path / name} is "):
        merge(path)
    messages = resume(2, path) if damage is flip else [str(path / name)]
    assert messages
    assert all(str(path / name) in message for message in messages)


def test_a_missing_process_is_found(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    shutil.copytree(saved / "shards" / "last.ckpt", path)
    shutil.rmtree(path / "process-1")
    with pytest.raises(CheckpointError, match=r"process-1/\.metadata is missing"):
        merge(path)


@pytest.mark.parametrize("content", ["", "nonsense\n", "\udcff"])
def test_damaged_checksums_are_named(content: str, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "last.ckpt", tmp_path)
    path = tmp_path / "last.ckpt.sha256"
    path.write_bytes(content.encode(errors="surrogateescape"))
    (message,) = resume(1, tmp_path / "last.ckpt")
    assert f"The checksums in {path} are damaged. Delete that file" in message


def test_merged_shards_have_a_checksum(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    main(["merge", str(saved / "shards" / "last.ckpt"), str(path)])
    assert resume(1, path) == []
    flip(path)
    assert len(resume(1, path)) == 1


def checkpoints_of(folder: Path, devices: int, plugins: Any = None, how: Any = "whole", **arguments: Any) -> list[str]:
    """Three epochs with a checkpoint after each, of which one is kept; returns what is in the folder."""

    def work() -> None:
        checkpoint = ModelCheckpoint(folder, "{epoch}", **{"save_top_k": 1, **arguments})
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(checkpoint=how, timeout=30),
            devices=devices,
            callbacks=[checkpoint],
            enable_checkpointing=True,
            max_epochs=3,
            plugins=plugins() if plugins else None,
        )
        trainer.fit(Classifier(), loader(shuffle=False))

    run_ranks(devices, work)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("devices", [1, 2])
def test_a_checkpoint_that_is_removed_takes_its_checksum_along(devices: int, tmp_path: Path) -> None:
    names = checkpoints_of(tmp_path, devices, save_last=True)
    assert names == ["epoch=2.ckpt", "epoch=2.ckpt.sha256", "last.ckpt", "last.ckpt.sha256"]
    assert resume(devices, tmp_path / "last.ckpt") == []


def test_a_link_to_the_last_checkpoint_is_checked_by_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt.sha256").write_text(f"{'0' * 64}  last.ckpt\n")  # of an earlier file, not of the link
    checkpoints_of(tmp_path, 2, save_last="link")
    path = tmp_path / "last.ckpt"
    assert path.is_symlink()
    assert resume(2, path) == []
    flip(path)
    assert len(resume(2, path)) == 2
    run_ranks(2, lambda: train(2, tmp_path, how="whole"))  # saves by the name of the link
    assert not path.is_symlink()
    assert resume(2, path) == []


def test_a_link_may_lead_to_shards(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    names = checkpoints_of(tmp_path, 2, how="sharded", save_last="link")
    assert names == ["epoch=2.ckpt", "last.ckpt"]
    assert path.is_symlink()
    assert resume(2, path) == []
    run_ranks(2, lambda: train(2, tmp_path))
    assert not path.is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == names


@pytest.mark.parametrize("how", ["whole", "sharded"])
def test_one_kind_of_checkpoint_takes_the_place_of_the_other(how: str, tmp_path: Path) -> None:
    other = {"whole": "sharded", "sharded": "whole"}[how]
    run_ranks(2, lambda: train(2, tmp_path, how=other))
    run_ranks(2, lambda: train(2, tmp_path, how=how))
    assert (tmp_path / "last.ckpt").is_dir() == (how == "sharded")
    names = {"whole": ["last.ckpt", "last.ckpt.sha256"], "sharded": ["last.ckpt"]}[how]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert resume(2, tmp_path / "last.ckpt") == []


def test_a_plugin_that_writes_in_the_background_has_checksums_too(tmp_path: Path) -> None:
    names = checkpoints_of(tmp_path, 2, lambda: [AsyncCheckpointIO()])
    assert [name for name in names if name.endswith(".sha256")] == [
        f"{name}.sha256" for name in names if "ckpt." not in name
    ]
    assert names


def test_any_strategy_can_have_it(tmp_path: Path) -> None:
    trainer = make_trainer(plugins=[AtomicCheckpointIO()], callbacks=[SyntheticGradients()])
    trainer.fit(Classifier(), loader(shuffle=False))
    path = tmp_path / "folder" / "last.ckpt"
    trainer.save_checkpoint(f"file://{path}")
    trainer.validate(Classifier(), loader(), ckpt_path=str(path), verbose=False)
    flip(path)
    with pytest.raises(CheckpointError, match=f"{path} is not the file that was saved"):
        trainer.validate(Classifier(), loader(), ckpt_path=str(path), verbose=False)
    trainer.strategy.remove_checkpoint(str(path))
    assert list(path.parent.iterdir()) == []


def test_a_path_means_what_it_means_to_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"a": 1}, "~/a.ckpt")
    plugin.save_checkpoint({"a": 2}, "memory://a.ckpt")
    assert plugin.load_checkpoint(tmp_path / "a.ckpt") == {"a": 1}
    assert plugin.load_checkpoint("memory://a.ckpt") == {"a": 2}
    with pytest.raises(FileNotFoundError, match=r"b\.ckpt"):
        plugin.load_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match=r"is a folder without rest\.pt"):
        plugin.load_checkpoint(tmp_path)
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint({}, tmp_path / "b.ckpt", {"some": "option"})


@pytest.mark.parametrize("devices", [1, 2])
def test_lightning_does_not_take_a_checksum_for_the_newest_checkpoint_on_slurm(devices: int, tmp_path: Path) -> None:
    def work() -> str:
        strategy = SyntheticGradientStrategy(timeout=30)
        trainer = make_trainer(strategy=strategy, devices=devices, max_epochs=2, default_root_dir=tmp_path)
        trainer.fit(Classifier(), loader(shuffle=False), ckpt_path="hpc")
        return str(trainer.ckpt_path)

    run_ranks(2, lambda: train(2, tmp_path, how="whole"))
    AtomicCheckpointIO().save_checkpoint(torch.load(tmp_path / "last.ckpt"), tmp_path / "hpc_ckpt_7.ckpt")
    part_of(tmp_path / "hpc_ckpt_8.ckpt").touch()  # of a process that was killed
    assert (tmp_path / "hpc_ckpt-7.ckpt.sha256").exists()
    assert run_ranks(devices, work) == [str(tmp_path / "hpc_ckpt_7.ckpt")] * devices
    flip(tmp_path / "hpc_ckpt_7.ckpt")
    assert all(failure.kind == "CheckpointError" for failure in run_ranks(devices, work, may_fail=True))


def test_a_plugin_of_the_users_writes_as_it_likes(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    assert checkpoints_of(tmp_path, 2, lambda: [Own()]) == ["epoch=2.ckpt"]
