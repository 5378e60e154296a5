"""Tied weights across processes: their synchronized copies train as one weight does in one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import (
    Boundary,
    ExactGradients,
    LossModelPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
)
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import run_ranks

WORDS, WIDTH = 11, 8


class Language(pl.LightningModule):
    """The embedding is the head's weight; a bias is shared by the first two stages of three."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, sparse=sparse)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.cut, self.again = Boundary(), Boundary()
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.embed.weight
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        h = self.cut(torch.tanh(self.first(self.embed(x).mean(1))))
        return self.head(self.again(torch.tanh(self.second(h))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class Frozen(Language):
    def __init__(self) -> None:
        super().__init__()
        self.embed.weight.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.3)


class ByHand(Language):
    """Two backward passes before a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(0.1 * loss)
        optimizer.step()


def words() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(WORDS, (64, 5), generator=generator)
    return DataLoader(TensorDataset(x, x[:, 0]), batch_size=8)


def train(
    devices: int, make: Any = Language, resume: str | None = None, folder: Path | None = None, **options: Any
) -> dict[str, Tensor]:
    pl.seed_everything(3, verbose=False)
    module = make()
    split = {key: options.pop(key) for key in ("clip_over", "checkpoint", "tied_weights") if key in options}
    callback = SyntheticGradients(
        predictor=LossModelPredictor(hidden=8), training=PredictorTraining(seed=1), **options.pop("callback", {})
    )
    strategy: Any = SyntheticGradientStrategy(**{"tied_weights": "synchronize", "timeout": 20.0, **split})
    trainer = make_trainer(
        devices=devices, strategy=strategy if devices > 1 else "auto", callbacks=[callback], **options
    )
    trainer.fit(module, words(), ckpt_path=resume)
    if folder is not None:
        trainer.save_checkpoint(folder / "last.ckpt")
    return state_of(module)


RUNS: dict[str, dict[str, Any]] = {
    "a language model": {},
    "manual optimization": {"make": ByHand},
    "a sparse gradient": {"make": lambda: Language(sparse=True)},
    "exact gradients": {"callback": {"exact": ExactGradients(every=2)}},
    "a warm-up with the true gradient": {"callback": {"exact": ExactGradients(warm_up=3)}},
    "a frozen weight under weight decay": {"make": lambda: Frozen()},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping by the norm of the model": {"gradient_clip_val": 0.1, "clip_over": "model"},
}


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_copies_train_as_one_weight(name: str, devices: int) -> None:
    whole = train(1, **{key: value for key, value in RUNS[name].items() if key != "clip_over"})
    for state in run_ranks(devices, lambda: train(devices, **RUNS[name])):
        assert_same_state(whole, state)


def test_processes_without_a_seed_begin_with_the_owners_weight() -> None:
    def work() -> Any:
        torch.manual_seed(int(os.environ["RANK"]))
        module = Language()
        callback = SyntheticGradients(predictor=LossModelPredictor(hidden=8))
        strategy = SyntheticGradientStrategy(tied_weights="synchronize", timeout=20.0)
        make_trainer(devices=2, strategy=strategy, callbacks=[callback]).fit(module, words())
        return state_of(module)

    one, other = run_ranks(2, work)
    assert_same_state(one, other, exact=True)
    assert torch.equal(one["embed.weight"], one["head.weight"])


@pytest.mark.parametrize("how", ["whole", "sharded"])
def test_a_checkpoint_goes_on_in_any_number_of_processes(how: str, tmp_path: Path) -> None:
    whole = train(1, max_epochs=3)
    run_ranks(3, lambda: train(3, max_epochs=1, folder=tmp_path, checkpoint=how))
    last = str(tmp_path / "last.ckpt")
    for state in run_ranks(2, lambda: train(2, resume=last, checkpoint=how, max_epochs=3)):
        assert_same_state(whole, state)
    if how == "whole":
        assert_same_state(whole, train(1, resume=last, max_epochs=3))


def test_replicas_of_copies_train_as_one_weight_on_all_batches() -> None:
    def work() -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = Language()
        strategy = SyntheticGradientStrategy(tied_weights="synchronize", replicas=2, timeout=20.0)
        trainer = make_trainer(devices=4, strategy=strategy, callbacks=[SyntheticGradients()])
        trainer.fit(module, words())
        return state_of(module)

    first, *others = run_ranks(4, work)
    for state in others:
        assert_same_state(first, state, exact=True)
    assert torch.equal(first["embed.weight"], first["head.weight"])


def test_what_would_part_the_copies_is_refused() -> None:
    for failure in run_ranks(2, lambda: train(2, gradient_clip_val=0.1), may_fail=True):
        assert "clip_over='model'" in failure.message
    for failure in run_ranks(2, lambda: train(2, tied_weights="refuse"), may_fail=True):
        assert "tied_weights='synchronize'" in failure.message
    for failure in run_ranks(2, lambda: train(2, callback={"exact": ExactGradients(correction=0.5)}), may_fail=True):
        assert "does not go with late gradients (LateGradients, " in failure.message
    for failure in run_ranks(
        2, lambda: train(2, make=ByHand, callback={"exact": ExactGradients(warm_up=2)}), may_fail=True
    ):
        assert "does not go with manual optimization where the true gradient is waited for" in failure.message
    with pytest.raises(ValueError, match="'refuse' or 'synchronize', not 'copy'"):
        SyntheticGradientStrategy(tied_weights="copy")  # type: ignore[arg-type]
