"""The file from which a new process takes the place of one that is gone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sg.distributed.snapshots import SnapshotFile
from lightning_sg.errors import StageLostError, SyntheticGradientsError


class Planted:
    """Runs code when it is read by a careless reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_newer_snapshot_replaces_the_older(tmp_path: Path) -> None:
    file = SnapshotFile(tmp_path / "snapshots", 1, "now")
    for number in range(2):
        file.write({"weights": {"w": torch.full((3,), float(number))}, "number": number})
    found = SnapshotFile(tmp_path / "snapshots", 1, "now").read()
    assert found["number"] == 1
    assert found["weights"]["w"].tolist() == [1.0, 1.0, 1.0]
    assert [each.name for each in (tmp_path / "snapshots").iterdir()] == ["rank-1.snapshot"]


def test_a_snapshot_that_could_not_be_read_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(SyntheticGradientsError, match=r"Away\(folder=\.\.\.\): rank 1 cannot read its own snapshot"):
        SnapshotFile(tmp_path, 1, "now").write({"schedulers": [Path(tmp_path)]})


def test_a_process_without_a_snapshot_of_the_run_says_so(tmp_path: Path) -> None:
    SnapshotFile(tmp_path, 1, "earlier").write({"number": 3})
    with pytest.raises(StageLostError, match=r"rank 1 was started while the others run .* it is of another run"):
        SnapshotFile(tmp_path, 1, "now").read()
    with pytest.raises(StageLostError, match=r"rank 2 was started while the others run .* there is none"):
        SnapshotFile(tmp_path, 2, "now").read()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-40]])
def test_a_damaged_snapshot_is_refused(tmp_path: Path, damage: Any) -> None:
    file = SnapshotFile(tmp_path, 1, "now")
    file.write({"weights": torch.zeros(1000)})
    file.path.write_bytes(damage(file.path.read_bytes()))
    with pytest.raises(StageLostError, match="it cannot be read"):
        file.read()


def test_code_in_a_snapshot_is_not_run(tmp_path: Path) -> None:
    file, mark = SnapshotFile(tmp_path, 1, "now"), tmp_path / "ran"
    for content in (pickle.dumps(Planted(mark), protocol=2), None):
        if content is None:
            torch.save({"attempt": "now", "weights": Planted(mark)}, file.path)
        else:
            file.path.write_bytes(content)
        with pytest.raises(StageLostError, match="it cannot be read"):
            file.read()
    assert not mark.exists()
