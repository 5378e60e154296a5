"""Runs of Weights & Biases on disk: all that was logged, whole or cut off."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_sg import SyntheticGradients
from lightning_sg.tools.report import ReportError, read_run
from lightning_sg.tools.report.wandb_log import _BLOCK, _HEADER, _RECORD, _records
from tests.models import Classifier, loader, make_trainer

pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline run of two epochs, logged at every step."""
    from lightning.pytorch.loggers import WandbLogger

    from tests.offline_wandb import finish

    folder = tmp_path_factory.mktemp("offline")
    logger = WandbLogger(project="tests", save_dir=folder, offline=True)
    trainer = make_trainer(logger=logger, callbacks=[SyntheticGradients()], log_every_n_steps=1)
    trainer.fit(Classifier(), loader(), loader(shuffle=False))
    finish(folder)
    return folder


def test_an_offline_run_is_read(folder: Path) -> None:
    [own] = (folder / "wandb").glob("offline-run-*")
    for path in (folder, folder / "wandb", own):
        run = read_run(path)
        assert len(run.metrics["train_loss"].steps) == 10
        assert len(run.metrics["val_accuracy"].steps) == 2
        assert set(run.boundaries) == {"net.1", "net.3", "net.5"}
        assert run.epochs == 2
        assert not [name for name in run.metrics if name.startswith("_")]


def test_a_log_that_is_cut_off_is_read_up_to_there(folder: Path, tmp_path: Path) -> None:
    [path] = folder.rglob("*.wandb")
    data = path.read_bytes()
    (tmp_path / "run-cut.wandb").write_bytes(data[: int(0.7 * len(data))])
    assert 0 < len(read_run(tmp_path).metrics["train_loss"].steps) <= 10


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run-x.wandb").write_bytes(b"something else")
    with pytest.raises(ReportError, match="not a log of Weights & Biases"):
        read_run(tmp_path)


@pytest.mark.parametrize("sizes", [[10], [_BLOCK - _HEADER - _RECORD - 3, 50], [3 * _BLOCK, 1]])
def test_records_may_span_blocks(sizes: list[int]) -> None:
    """A record that does not fit the rest of a block is divided, and a rest too short for a header is left empty."""
    records = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    data = b"0" * _HEADER
    for record in records:
        rest, first = record, True
        while first or rest:
            left = _BLOCK - len(data) % _BLOCK
            if left < _RECORD:
                data += bytes(left)
                continue
            part, rest = rest[: left - _RECORD], rest[left - _RECORD :]
            kind = {(True, False): 1, (True, True): 2, (False, True): 3, (False, False): 4}[first, bool(rest)]
            data += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
            first = False
    assert list(_records(data)) == records
