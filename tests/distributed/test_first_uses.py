"""Layers that the first batch does not go through train in the stage that uses them first, or are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_sg import (
    Boundary,
    DelayedGradient,
    ExactGradients,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    SyntheticInputs,
    TrueGradient,
)
from lightning_sg.checkpoint.sharded import merge
from tests.models import CLASSES, FEATURES, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks

WIDTH = 16


def normed(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


class Three(pl.LightningModule):
    """Up to three stages; subclasses choose layers by the batch."""

    cuts = 1

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(normed(FEATURES, WIDTH) for _ in range(3))
        self.middle = nn.ModuleList(normed(WIDTH, WIDTH) for _ in range(3))
        self.first, self.second = Boundary(), Boundary() if self.cuts == 2 else nn.Identity()
        self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0], batch_idx), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0], batch_idx + 1), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Stems(Three):
    """Another stem for each batch."""

    def forward(self, x: Tensor, number: int) -> Tensor:
        return self.head(self.second(self.middle[0](self.first(self.stems[number % 3](x)))))


class InTheMiddle(Three):
    """Another block for each batch, between two boundaries and behind the last."""

    cuts = 2

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(2))

    def forward(self, x: Tensor, number: int) -> Tensor:
        h = self.second(self.middle[number % 3](self.first(self.stems[number % 2](x))))
        return self.heads[number % 2](h)


class Dropped(Three):
    """Skips layers of each stage at random, all of a stage's at the first batch."""

    cuts = 2

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(FEATURES, WIDTH, bias=False)
        self.blocks = nn.ModuleList(normed(WIDTH, WIDTH) for _ in range(2))
        self.choice = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor, number: int) -> Tensor:
        kept = (torch.rand(4, generator=self.choice) < 0.6).tolist()
        kept = [False, True, False, False] if number == 0 else kept
        h = self.start(x)
        h = self.first(self.blocks[0](h) if kept[0] else h)
        h = self.middle[0](h) if kept[1] else self.middle[1](h)
        h = self.second(self.middle[2](h) if kept[2] else h)
        return self.head(self.blocks[1](h) if kept[3] else h)


class ByDomain(Three):
    """A stem and a bare parameter for each domain; the first label says which."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict({str(domain): nn.Parameter(torch.ones(WIDTH)) for domain in range(CLASSES)})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0], int(batch[1][0])), batch[1])

    def forward(self, x: Tensor, number: int) -> Tensor:
        h = self.stems[number % 3](x) * self.scales[str(number % CLASSES)]
        return self.head(self.middle[0](self.first(h)))


class ByHand(Stems):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Whole(Stems):
    """Nothing of the first stage trains at the first batch."""

    def forward(self, x: Tensor, number: int) -> Tensor:
        h = F.pad(x, (0, WIDTH - FEATURES)) if number == 0 else self.stems[number % 3](x)
        return self.head(self.middle[0](self.first(h)))


def train(kind: type[Three], devices: int = 1, *, plain: bool = False, **arguments: Any) -> Any:
    """Trains, and returns the state and the metrics."""
    predictor, validates = arguments.pop("predictor", TrueGradient()), arguments.pop("validates", True)
    callbacks = [] if plain else [SyntheticGradients(predictor=predictor)]
    strategy = SyntheticGradientStrategy(timeout=15.0, **arguments.pop("split", {})) if devices > 1 else "auto"
    pl.seed_everything(2, verbose=False)
    module = kind()
    callbacks += arguments.pop("callbacks", [])
    trainer = make_trainer(callbacks=callbacks, devices=devices, strategy=strategy, **arguments)
    trainer.fit(module, loader(shuffle=False), loader(shuffle=False) if validates else None)
    return state_of(module), {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("kind", [Stems, ByDomain, ByHand, Whole, InTheMiddle, Dropped])
def test_stages_train_what_a_later_batch_uses_first(kind: type[Three]) -> None:
    expected, metrics = train(kind, plain=True)
    for state, measured in run_ranks(kind.cuts + 1, lambda: train(kind, kind.cuts + 1)):
        assert_same_state(state, expected)
        assert measured["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-5)


@pytest.mark.parametrize("kind", [Stems, InTheMiddle, Whole])
def test_predictions_are_those_of_one_process(kind: type[Three]) -> None:
    expected, _metrics = train(kind, predictor="auto")
    for state, _measured in run_ranks(kind.cuts + 1, lambda: train(kind, kind.cuts + 1, predictor="auto")):
        assert_same_state(state, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"predictor": DelayedGradient()},
        {"exact": ExactGradients(every=2, correction=0.5)},
        {"training": PredictorTraining(update_probability=0.5)},
        {"inputs": SyntheticInputs()},
        {"on_non_finite": "skip"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("kind", [Stems, InTheMiddle])
def test_every_option_knows_the_stage_of_what_is_used_late(kind: type[Three], options: dict[str, Any]) -> None:
    def work(devices: int) -> dict[str, Tensor]:
        callback = SyntheticGradients(**options)
        return train(kind, devices, plain=True, callbacks=[callback], validates=False, max_epochs=3)[0]

    expected = work(1)
    for state in run_ranks(kind.cuts + 1, lambda: work(kind.cuts + 1)):
        assert_same_state(state, expected)
    pl.seed_everything(2, verbose=False)
    start = state_of(kind())
    late = [name for name in start if name.startswith("stems.1") and name.endswith("weight")]
    assert not any(torch.equal(expected[name], start[name]) for name in late)


def test_a_model_can_be_copied_while_a_layer_is_waited_for(tmp_path: Path) -> None:
    copies: list[nn.Module] = []

    class Copies(Stems):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            copies.append(copy.deepcopy(self.stems))
            torch.save(self.stems, tmp_path / "stems.pt")

    train(Copies, max_steps=4)
    copied, loaded = copies[0], torch.load(tmp_path / "stems.pt", weights_only=False)
    for stems in (copied, loaded):
        stems[1](torch.ones(2, FEATURES))


@pytest.mark.parametrize("checkpoint", ["whole", "sharded"])
def test_a_checkpoint_has_what_was_used_late(checkpoint: str, tmp_path: Path) -> None:
    def work() -> None:
        saving = ModelCheckpoint(tmp_path, "split", save_top_k=-1, every_n_train_steps=3)
        train(Stems, 2, callbacks=[saving], enable_checkpointing=True, max_steps=3, split={"checkpoint": checkpoint})

    run_ranks(2, work)
    saving = ModelCheckpoint(tmp_path, "one", save_top_k=-1, every_n_train_steps=3)
    train(Stems, callbacks=[saving], enable_checkpointing=True, max_steps=3)
    if checkpoint == "sharded":
        split = merge(tmp_path / "split.ckpt", True)
    else:
        split = torch.load(tmp_path / "split.ckpt", weights_only=False)
    one = torch.load(tmp_path / "one.ckpt", weights_only=False)
    assert_same_state(split["state_dict"], one["state_dict"])
    (left,), (right,) = split["optimizer_states"], one["optimizer_states"]
    assert left["state"].keys() == right["state"].keys()
    for number, entry in left["state"].items():
        torch.testing.assert_close(entry["exp_avg"], right["state"][number]["exp_avg"], rtol=1e-5, atol=1e-5)


def test_a_resumed_run_goes_on_with_what_was_used_late(tmp_path: Path) -> None:
    def run(devices: int, plain: bool) -> Any:
        saving = ModelCheckpoint(tmp_path, f"of-{devices}", every_n_train_steps=3)
        train(Stems, devices, plain=plain, callbacks=[saving], enable_checkpointing=True, max_steps=3)
        callbacks = [] if plain else [SyntheticGradients(predictor=TrueGradient())]
        strategy = SyntheticGradientStrategy(timeout=15.0) if devices > 1 else "auto"
        module = Stems()
        trainer = make_trainer(callbacks=callbacks, devices=devices, strategy=strategy, max_epochs=3)
        trainer.fit(module, loader(shuffle=False), ckpt_path=tmp_path / f"of-{devices}.ckpt")
        return state_of(module)

    expected = run(1, True)
    for state in run_ranks(2, lambda: run(2, False)):
        assert_same_state(state, expected)


# Refused


class Borrows(Three):
    """The first stage takes a layer of the last at a later batch."""

    def forward(self, x: Tensor, number: int) -> Tensor:
        h = self.first(self.stems[0](x) if number < 2 else self.middle[0](self.stems[0](x)))
        return self.head(self.middle[0](h))


class BorrowsInTheLast(Three):
    """The last stage takes a layer of the first at a later batch."""

    def forward(self, x: Tensor, number: int) -> Tensor:
        h = self.first(self.middle[0](self.stems[0](x)))
        return self.head(h if number < 2 else self.middle[0](h))


class Moves(Three):
    """A layer is used by the first stage, and then by the last."""

    def forward(self, x: Tensor, number: int) -> Tensor:
        h = self.stems[0](x)
        h = self.first(self.middle[1](h) if number == 1 else h)
        return self.head(self.middle[1](h) if number == 3 else h)


class MovesBack(Three):
    """A layer is used by the last stage, and then by the first."""

    def forward(self, x: Tensor, number: int) -> Tensor:
        h = self.stems[0](x)
        h = self.first(self.middle[1](h) if number == 3 else h)
        return self.head(self.middle[1](h) if number == 1 else h)


@pytest.mark.parametrize(
    ("kind", "boundary", "parameter", "batch"),
    [
        (Borrows, True, "middle.0.0.weight", 2),
        (BorrowsInTheLast, False, "middle.0.0.weight", 2),
        (Moves, False, "middle.1.0.weight", 3),
    ],
)
def test_a_layer_of_another_stage_is_named(kind: type[Three], boundary: bool, parameter: str, batch: int) -> None:
    failures = run_ranks(2, lambda: train(kind, 2, validates=False), may_fail=True)
    (failure,) = [each for each in failures if each.kind == "PartitionError"]
    assert f"training batch {batch}" in failure.message
    assert f"depends on parameter '{parameter}', which stage {1 if boundary else 0}" in failure.message
    assert ("reaches boundary 'first'" if boundary else "the loss of") in failure.message
    (other,) = [each for each in failures if each is not failure]
    assert parameter in other.message


def test_a_layer_that_two_stages_use_at_different_batches_is_named() -> None:
    failures = run_ranks(2, lambda: train(MovesBack, 2, validates=False), may_fail=True)
    assert any(
        "'middle.1.0.weight' was used by stage 0 (rank 1) and stage 1 (rank 0)" in each.message for each in failures
    )


def test_nothing_without_data_is_measured() -> None:
    class Measures(BorrowsInTheLast):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0], batch_idx), batch[1]))

    failures = run_ranks(2, lambda: train(Measures, 2, num_sanity_val_steps=0, limit_train_batches=2), may_fail=True)
    (failure,) = [each for each in failures if each.kind == "PartitionError"]
    assert "'val_loss' of validation batch 2" in failure.message
    assert "middle.0.0.weight" in failure.message


class Returns(Three):
    """What it predicts is no result of the last stage's."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        h = self.stems[0](batch[0])
        return h, self.head(self.middle[0](self.first(h)))


def test_no_prediction_is_without_data() -> None:
    def work() -> None:
        make_trainer(devices=2, strategy=SyntheticGradientStrategy(timeout=15.0)).predict(Returns(), loader())

    last, _first = run_ranks(2, work, may_fail=True)
    assert "stage 1 (rank 0): the result of predict batch 0 depends on" in last.message


def test_replicas_find_what_is_used_late() -> None:
    split = {"replicas": 2, "ddp": {"find_unused_parameters": True}}
    states = [state for state, _metrics in run_ranks(4, lambda: train(Stems, 4, split=split))]
    pl.seed_everything(2, verbose=False)
    start = state_of(Stems())
    names = [name for name in start if name.startswith("stems") and name.endswith("weight")]
    for state in states:
        assert all(torch.equal(state[name], states[0][name]) for name in names)
    assert not any(torch.equal(states[0][name], start[name]) for name in names)


def test_replicas_say_what_they_need() -> None:
    failures = run_ranks(4, lambda: train(Stems, 4, validates=False, split={"replicas": 2}), may_fail=True)
    assert any("ddp={'find_unused_parameters': True}" in each.message for each in failures)
