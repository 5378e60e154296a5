"""Models made in ``configure_model``: the same training, and no process holds the weights of other stages in memory."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_sg import Boundary, PredictorTraining, SyntheticGradients
from lightning_sg.partition.paging import PagedParameters
from tests.models import CLASSES, FEATURES, assert_same_state, fit_and_save, loader, make_trainer, state_of
from tests.ranks import run_ranks

WIDE = 192  # 144 KiB a weight: enough for a file


def anonymous() -> int:
    """MiB of this process's memory that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) // 1024
    pytest.skip("The kernel does not tell RssAnon.")


class Configured(pl.LightningModule):
    """A network that is made in ``configure_model``; two stages, with a tied weight in the second."""

    def __init__(self, width: int = WIDE, layers: int = 2, device: str = "cpu") -> None:
        super().__init__()
        self.width, self.layers, self.device_to_make_on = width, layers, device
        self.net: nn.Module | None = None
        self.memory: list[int] = []

    def configure_model(self) -> None:
        if self.net is not None:
            return
        gc.collect()
        before = anonymous()
        width = self.width

        def stage(inputs: int) -> nn.Sequential:
            first = nn.Linear(inputs, width)
            return nn.Sequential(first, nn.ReLU(), *(nn.Linear(width, width) for _ in range(self.layers)))

        with torch.device(self.device_to_make_on):
            self.net = nn.Sequential(stage(FEATURES), Boundary(), nn.ReLU(), stage(width), nn.Linear(width, CLASSES))
        self.net[3][0].weight = self.net[3][-1].weight
        self.accuracy = MulticlassAccuracy(CLASSES)  # would wait for the other process if it were not told better
        gc.collect()
        self.memory.append(anonymous() - before)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log_dict({"val_loss": F.cross_entropy(logits, batch[1]), "val_accuracy": self.accuracy})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(
    folder: Path, devices: int, checkpoint: str | None = None, epochs: int = 2, device: str = "cpu"
) -> dict[str, Tensor]:
    pl.seed_everything(3, verbose=False)
    module, callback = Configured(device=device), SyntheticGradients(training=PredictorTraining(seed=5))
    trainer = fit_and_save(module, callback, devices, folder, checkpoint, epochs)
    assert list(callback.trainers) == ["net.1"]
    assert 0 < float(trainer.callback_metrics["val_accuracy"]) <= 1
    return state_of(module)


def test_training_is_as_in_one_process_and_a_checkpoint_resumes_in_either(tmp_path: Path) -> None:
    whole = train(tmp_path, 1, epochs=4)
    first = train(tmp_path, 1)
    for state in run_ranks(2, lambda: train(tmp_path, 2)):
        assert_same_state(first, state)
    checkpoint = str(tmp_path / "last.ckpt")  # of two processes
    for state in run_ranks(2, lambda: train(tmp_path / "two", 2, checkpoint, epochs=4)):
        assert_same_state(whole, state)
    assert_same_state(whole, train(tmp_path / "one", 1, checkpoint, epochs=4))


def test_a_model_made_on_the_meta_device_begins_and_trains_as_one_made_on_the_host(tmp_path: Path) -> None:
    whole = train(tmp_path, 1)
    for state in run_ranks(2, lambda: train(tmp_path, 2, device="meta")):
        assert_same_state(whole, state)
    again = train(tmp_path / "one", 1, epochs=4)
    for state in run_ranks(2, lambda: train(tmp_path / "two", 2, str(tmp_path / "last.ckpt"), 4, device="meta")):
        assert_same_state(again, state)


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen["set up"] = anonymous()

    def on_train_batch_end(self, trainer: pl.Trainer, *_arguments: Any) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free but not yet given back is not held
        self.seen["trained"] = anonymous()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_process_holds_the_whole_model_in_memory(device: str) -> None:
    width, layers = 1448, 4  # two stages of 32 MiB
    stage = layers * width * width * 4 // 2**20

    def work() -> tuple[list[int], int, int]:
        module, watch = Configured(width, layers, device), Watch()
        trainer = make_trainer(
            strategy="synthetic_gradients",
            devices=2,
            callbacks=[SyntheticGradients(), watch],
            max_steps=2,
            max_epochs=-1,
        )
        gc.collect()
        before = anonymous()
        trainer.fit(module, loader(shuffle=False))
        return module.memory, watch.seen["set up"] - before, watch.seen["trained"] - before

    for (made,), set_up, trained in run_ranks(2, work):
        assert made < stage  # of the two that were made: memory is given back a few weights at a time
        assert set_up < stage / 2
        # The weights of its own stage and their gradients and momenta, three times a stage, and a predictor.
        assert trained < 4.5 * stage
    assert stage > 30


def test_what_is_made_is_the_same_and_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    torch.manual_seed(0)
    plain = nn.Linear(300, 300)
    following = torch.rand(3)
    torch.manual_seed(0)
    pages = PagedParameters()
    with pages.making():
        paged = nn.Linear(300, 300)
        assert torch.equal(torch.rand(3), following)
    nn.Linear(300, 300)
    assert not os.listdir(tmp_path)
    assert torch.equal(paged.weight, plain.weight)
    assert pages.holds(paged.weight)
    assert not pages.holds(paged.bias)
    with torch.no_grad():
        paged.weight += 1  # it is written to, paged out and read again
    pages.let_go()
    assert torch.equal(paged.weight, plain.weight + 1)
    with pages.hidden(paged):
        paged.double()
    assert (paged.weight.dtype, paged.bias.dtype) == (torch.float32, torch.float64)
    pages.keep(paged.weight)
    pages.keep(paged.weight)
    assert not pages.holds(paged.weight)
    assert torch.equal(paged.weight, plain.weight + 1)


def test_parameters_that_have_no_memory_of_their_own_are_left_alone() -> None:
    pages = PagedParameters()
    with pages.making():
        lazy = nn.LazyLinear(300)
        meta = nn.Linear(300, 300, device="meta")
        tied = nn.Linear(300, 300)
        other = nn.Linear(300, 300)
        other.weight = tied.weight
    assert not pages.holds(lazy.weight)
    assert not pages.holds(meta.weight)
    assert pages.holds(other.weight)
    assert pages.count == 1
    del tied, other
    pages.let_go()
    assert pages.count == 0
