"""A kill or a full disk in the middle of a checkpoint leaves one that loads: the earlier one, or the new one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sg import files
from lightning_sg.checkpoint import sharded
from lightning_sg.checkpoint.plugin import AtomicCheckpointIO, save_whole
from lightning_sg.files import part_of
from tests.checkpoint.shards import train
from tests.ranks import run_ranks
from tests.small_disk import forked, small_disk

Save = Callable[[dict[str, Any], Path], object]


def checkpoint(number: int) -> dict[str, Any]:
    return {
        "state_dict": {"weight": torch.full((100, 10), float(number))},
        "optimizer_states": [{"state": {0: {"mean": torch.full((3,), float(number))}}, "param_groups": []}],
        "number": number,
    }


def save_shards(what: dict[str, Any], path: Path) -> None:
    sharded.save(path, what, 0, lambda: None, writes_rest=True)


def load(path: Path) -> dict[str, Any]:
    return sharded.merge(path) if path.is_dir() else AtomicCheckpointIO().load_checkpoint(path)


def assert_whole(path: Path, numbers: tuple[int, ...]) -> int:
    """All of a checkpoint is of one of these numbers; returns it."""
    found = load(path)
    number: int = found["number"]
    assert number in numbers
    torch.testing.assert_close(found["state_dict"], checkpoint(number)["state_dict"])
    torch.testing.assert_close(
        found["optimizer_states"][0]["state"], checkpoint(number)["optimizer_states"][0]["state"]
    )
    return number


@pytest.mark.parametrize("first", [save_whole, save_shards])
@pytest.mark.parametrize("second", [save_whole, save_shards])
def test_a_kill_at_any_sync_or_rename_leaves_a_checkpoint(
    first: Save, second: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    outcomes = []
    for moment in range(1, 40):
        first(checkpoint(1), path)

        def dies(moment: int = moment) -> None:
            calls = iter(range(1, moment + 1))

            def counted(call: Any) -> Any:
                def run(*arguments: Any) -> Any:
                    if next(calls) == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*arguments)

                return run

            monkeypatch.setattr(os, "fsync", counted(os.fsync))
            monkeypatch.setattr(os, "replace", counted(os.replace))
            monkeypatch.setattr(files, "_exchange", counted(files._exchange))
            second(checkpoint(2), path)

        ended = forked(dies)
        outcomes.append(assert_whole(path, (1, 2)))
        if ended == 0:
            break
        assert ended == signal.SIGKILL
    assert ended == 0
    assert outcomes[0] == 1
    assert outcomes == sorted(outcomes)
    assert outcomes[-1] == 2
    assert not part_of(path).exists()


@pytest.mark.parametrize("save", [save_whole, save_shards])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(save: Save, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 256) as folder:
        path = folder / "last.ckpt"
        save(checkpoint(1), path)
        before = sorted(each.name for each in folder.rglob("*"))
        huge = {**checkpoint(2), "state_dict": {"weight": torch.zeros(1000, 1000)}}
        with pytest.raises(OSError, match=r"No space left on device.*last\.ckpt"):
            save(huge, path)
        assert assert_whole(path, (1,)) == 1
        assert sorted(each.name for each in folder.rglob("*")) == before


@pytest.mark.parametrize("how", ["whole", "sharded"])
def test_a_run_that_fills_the_disk_leaves_the_last_good_checkpoint(how: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 4096) as folder:
        run_ranks(2, lambda: train(2, folder, how=how))
        path = folder / "last.ckpt"
        good = load(path)
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "filler").write_bytes(bytes(free - 8192))
        failures = run_ranks(2, lambda: train(2, folder, str(path), epochs=3, how=how), may_fail=True)
        assert any(failure and "No space left on device" in failure.message for failure in failures)
        assert any(failure and "last.ckpt" in failure.message for failure in failures)
        left = load(path)
        assert left["global_step"] == good["global_step"]
        torch.testing.assert_close(left["state_dict"], good["state_dict"], rtol=0, atol=0)
        assert [each.name for each in folder.iterdir() if each.name.startswith(".")] == []
