"""Checkpoints run no code: a planted pickle is refused by an error that names its file, and an honest file loads."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_sg import (
    AlignmentGuard,
    CheckpointError,
    LocalLoss,
    MLPInputPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    SyntheticInputs,
)
from lightning_sg.checkpoint.index import read_index
from lightning_sg.checkpoint.sharded import merge
from lightning_sg.cli import main
from tests.checkpoint.shards import train
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks

EARLIER = Path(__file__).parent / "earlier"


class Planted:
    """Runs code when it is unpickled: makes a file."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.evidence),)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    run_ranks(2, lambda: train(2, folder))
    return folder / "last.ckpt"


@pytest.fixture(params=["now", "earlier"])
def shards(request: pytest.FixtureRequest, honest: Path, tmp_path: Path) -> Path:
    """A folder of shards as they are written now, without checksums, or as they were."""
    folder = tmp_path / "shards.ckpt"
    shutil.copytree(honest if request.param == "now" else EARLIER / "shards.ckpt", folder)
    (folder / "checksums").unlink(missing_ok=True)
    return folder


def in_rest(folder: Path, planted: Any) -> Path:
    path = folder / "rest.pt"
    rest = torch.load(path, weights_only=True)
    torch.save({**rest, "planted": planted}, path)
    return path


def as_rest(folder: Path, planted: Any) -> Path:
    path = folder / "rest.pt"
    path.write_bytes(pickle.dumps(planted))
    return path


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


def as_metadata(folder: Path, planted: Any) -> Path:
    path = first(folder, ".metadata")
    path.write_bytes(pickle.dumps(planted))
    return path


def in_metadata(folder: Path, planted: Any) -> Path:
    path = first(folder, ".metadata")
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = planted
    path.write_bytes(pickle.dumps(metadata))
    return path


def in_a_shard(folder: Path, planted: Any) -> Path:
    """In the place of a tensor; the index says that it is no tensor, so that torch would load it as an object."""
    index = first(folder, ".metadata")
    metadata = pickle.loads(index.read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.startswith("state_dict."))
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    info = next(info for key, info in metadata.storage_data.items() if key.fqn == name)
    content = io.BytesIO()
    torch.save(planted, content)
    path: Path = index.parent / info.relative_path
    info.offset, info.length = path.stat().st_size, len(content.getvalue())
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    path.write_bytes(path.read_bytes() + content.getvalue())
    index.write_bytes(pickle.dumps(metadata))
    return path


PLACES = [in_rest, as_rest, in_metadata, as_metadata, in_a_shard]


def resume(devices: int, checkpoint: Path, folder: Path, **arguments: Any) -> None:
    trainer = make_trainer(
        strategy=SyntheticGradientStrategy(checkpoint="sharded", timeout=30),
        devices=devices,
        max_epochs=3,
        default_root_dir=folder,
    )
    trainer.fit(Classifier(), loader(shuffle=False), ckpt_path=str(checkpoint), **arguments)


@pytest.mark.parametrize("plant", PLACES)
@pytest.mark.parametrize("how", ["merge", "one process"])
def test_a_planted_pickle_is_refused_in_one_process(plant: Any, how: str, shards: Path, tmp_path: Path) -> None:
    path = plant(shards, Planted(tmp_path / "evidence"))
    with pytest.raises(CheckpointError, match=r"was refused, and nothing in it has run.*weights_only=False") as caught:
        merge(shards) if how == "merge" else resume(1, shards, tmp_path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize(("plant", "asked"), [*((plant, {}) for plant in PLACES), (in_rest, {"weights_only": True})])
def test_a_planted_pickle_is_refused_in_two_processes(
    plant: Any, asked: dict[str, Any], honest: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards.ckpt"
    shutil.copytree(honest, folder)
    (folder / "checksums").unlink()
    path = plant(folder, Planted(tmp_path / "evidence"))
    for failure in run_ranks(2, lambda: resume(2, folder, tmp_path, **asked), may_fail=True):
        assert failure.kind == "CheckpointError"
        assert f"{path} was refused" in failure.message
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_planted_pickle_in_one_file_is_refused(devices: int, tmp_path: Path) -> None:
    train(1, tmp_path)
    path = tmp_path / "last.ckpt"
    torch.save({**torch.load(path, weights_only=True), "planted": Planted(tmp_path / "evidence")}, path)
    path.with_name("last.ckpt.sha256").unlink(missing_ok=True)

    def work() -> None:
        resume(devices, path, tmp_path)

    if devices == 1:
        with pytest.raises(CheckpointError, match=f"{path} was refused"):
            work()
    else:
        for failure in run_ranks(devices, work, may_fail=True):
            assert f"{path} was refused" in failure.message
    assert not (tmp_path / "evidence").exists()


def test_who_trusts_a_file_may_say_so(honest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards.ckpt"
    shutil.copytree(honest, folder)
    (folder / "checksums").unlink()
    in_rest(folder, Planted(tmp_path / "evidence"))
    arguments = ["merge", str(folder), str(tmp_path / "whole.ckpt")]
    with pytest.raises(SystemExit, match="--trust"):
        main(arguments)
    assert not (tmp_path / "whole.ckpt").exists()
    main([*arguments, "--trust"])
    assert (tmp_path / "whole.ckpt").exists()
    assert (tmp_path / "evidence").exists()
    (tmp_path / "evidence").rmdir()
    run_ranks(1, lambda: resume(1, folder, tmp_path, weights_only=False))
    assert (tmp_path / "evidence").exists()


def test_an_index_runs_nothing_even_for_those_who_trust_it(shards: Path, tmp_path: Path) -> None:
    path = in_metadata(shards, Planted(tmp_path / "evidence"))
    assert read_index(path.parent, weights_only=False)
    assert not (tmp_path / "evidence").exists()


def test_an_index_that_leads_out_of_the_folder_is_refused(shards: Path, tmp_path: Path) -> None:
    path = first(shards, ".metadata")
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read.*outside the folder"):
        merge(shards)


def test_a_file_cannot_say_that_its_tensors_are_elsewhere(honest: Path, tmp_path: Path) -> None:
    run_ranks(2, lambda: train(2, tmp_path, how="whole"))
    path = tmp_path / "last.ckpt"
    torch.save({**torch.load(path, weights_only=True), "lightning_sg_shards": str(honest)}, path)
    path.with_name("last.ckpt.sha256").unlink()
    for state in run_ranks(2, lambda: train(2, tmp_path / "b", str(path), epochs=3, how="whole")):
        assert all(tensor.isfinite().all() for tensor in state.values())


class Scheduled(Classifier):
    """Everything that a checkpoint may have numbers of other libraries or odd containers in."""

    schedules: tuple[Callable[[Any], Any], ...] = (
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.float64(0.9) ** epoch),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, np.float64(0.1), total_steps=100),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.001, np.float32(0.1), cycle_momentum=False),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
            [2],
        ),
    )

    def __init__(self, which: int, rate: Any) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["rate"], momentum=np.float64(0.5))
        return [optimizer], [self.schedules[self.hparams["which"]](optimizer)]


def slowing(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], gamma=np.float64(0.5))


def odd_training() -> SyntheticGradients:
    training = PredictorTraining(
        seed=1,
        ema=0.5,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=np.float64(0.01)),
        lr_scheduler=slowing,
    )
    return SyntheticGradients(
        training=training,
        guard=AlignmentGuard(threshold=0.99, patience=2, fallback=LocalLoss(hidden=8)),
        inputs=SyntheticInputs(MLPInputPredictor(hidden=8)),
    )


@pytest.mark.parametrize("how", ["sharded", "whole", "one process"])
@pytest.mark.parametrize("which", range(len(Scheduled.schedules)))
@pytest.mark.filterwarnings("ignore:Boundary 'net.*")
def test_an_honest_checkpoint_loads_by_default(which: int, how: str, tmp_path: Path) -> None:
    devices = 1 if how == "one process" else 2

    def run(epochs: int, checkpoint: str | None = None) -> Any:
        pl.seed_everything(3, verbose=False)
        module = Scheduled(which, np.float64(0.01))
        strategy = SyntheticGradientStrategy(checkpoint="sharded" if how == "sharded" else "whole", timeout=30)
        trainer = make_trainer(
            strategy=strategy,
            devices=devices,
            callbacks=[odd_training()],
            max_epochs=epochs,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, loader(shuffle=False), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return state_of(module)

    undisturbed = run_ranks(devices, lambda: run(2))[0]
    run_ranks(devices, lambda: run(1))
    resumed = run_ranks(devices, lambda: run(2, str(tmp_path / "last.ckpt")))[0]
    assert_same_state(undisturbed, resumed)


@pytest.mark.parametrize("path", sorted(EARLIER.glob("*.ckpt")), ids=lambda path: path.stem)
def test_the_checkpoints_of_earlier_versions_have_only_plain_values(path: Path) -> None:
    assert merge(path) if path.is_dir() else torch.load(path, weights_only=True)
