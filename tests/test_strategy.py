"""The strategy under a real Trainer: decoupling, evaluation, checkpoints, callbacks, launchers' environment."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_sg import LossModelPredictor, MLPPredictor, SyntheticGradients, TrueGradient, ZeroPredictor
from tests.models import CLASSES, Classifier, assert_same_state, loader, make_trainer, state_of
from tests.ranks import run_ranks


def trainer_for(devices: int, callbacks: list[Callback] | None = None, **arguments: Any) -> pl.Trainer:
    if devices > 1:
        arguments["strategy"] = "synthetic_gradients"
    return make_trainer(devices=devices, callbacks=callbacks or [SyntheticGradients()], **arguments)


def everywhere(devices: int, work: Any) -> list[Any]:
    """Runs ``work(devices)`` in one process or in several."""
    return run_ranks(devices, lambda: work(devices)) if devices > 1 else [work(1)]


# ---------------------------------------------------------------------- decoupling


class SlowEnd(Classifier):
    """Its last stage sleeps once; each process notes when its own work on each batch was over."""

    SLEEP = 1.5

    def __init__(self) -> None:
        super().__init__(stages=2)
        self.times: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if loss.requires_grad and batch_idx == 8 and loss.item() > -1:
            time.sleep(self.SLEEP)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.monotonic())


@pytest.mark.parametrize("delay", [0, 1, 4])
@pytest.mark.parametrize("predictor", [LossModelPredictor(hidden=8), ZeroPredictor()])
def test_the_first_stage_goes_on_up_to_its_delay_and_no_further(delay: int, predictor: Any) -> None:
    def work() -> list[float]:
        pl.seed_everything(1, verbose=False)
        module = SlowEnd()
        callback = SyntheticGradients(delay=delay, predictor=predictor)
        trainer_for(2, [callback], max_epochs=1).fit(module, loader(batch_size=8, samples=8 * 20))
        return module.times

    last, first = run_ranks(2, work)
    stuck = last[8] - SlowEnd.SLEEP + 0.2, last[8] - 0.2  # while the last stage sleeps, with a margin
    done_before = sum(moment < stuck[0] for moment in first)
    done_after = sum(moment < stuck[1] for moment in first)
    # Batches 0 to 7 have their targets, batch 8 has none: the first stage gets to the end of batch 8 + delay.
    assert done_before == done_after == 9 + delay
    assert len(first) == 20


def test_a_locked_boundary_is_plain_backpropagation_across_processes() -> None:
    def work(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(1, verbose=False)
        module = Classifier(stages=4)
        trainer_for(devices, [SyntheticGradients(predictor=TrueGradient())], max_epochs=3).fit(module, loader())
        return state_of(module)

    pl.seed_everything(1, verbose=False)
    plain = Classifier(stages=4)
    make_trainer(max_epochs=3).fit(plain, loader())
    for state in everywhere(3, work):
        assert_same_state(state_of(plain), state)


class Manual(Classifier):
    """Manual optimization with a metric object and two backward passes."""

    def __init__(self) -> None:
        super().__init__(stages=4)
        self.automatic_optimization = False
        self.accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        logits = self(batch[0])
        self.manual_backward(F.cross_entropy(logits, batch[1]), retain_graph=True)
        self.manual_backward(0.01 * logits.square().mean())
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")
        optimizer.step()
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)


class Accumulating(Classifier):
    """A schedule on every step, parameter groups by name, and weight decay."""

    def configure_optimizers(self) -> Any:
        heads = [parameter for name, parameter in self.named_parameters() if "6" in name]
        others = [parameter for name, parameter in self.named_parameters() if "6" not in name]
        optimizer = torch.optim.AdamW([{"params": heads, "lr": 1e-3}, {"params": others}], lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Flat(pl.LightningModule):
    """No annotations, no normalisation; boundaries by name, and a tuple of tensors at one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        outputs, _states = self.lstm(x.view(len(x), 3, 4))
        return F.cross_entropy(self.head(torch.relu_(self.mix(outputs).mean(1))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


CASES: dict[str, Any] = {
    "manual": (Manual, {}, {}),
    "accumulation": (Accumulating, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1,
                                    "gradient_clip_algorithm": "value"}, {}),
    "bf16": (Classifier, {"precision": "bf16-mixed"}, {}),
    "direct": (Classifier, {}, {"predictor": MLPPredictor(hidden=8), "train_every": 3}),
    "zero": (Classifier, {}, {"predictor": ZeroPredictor()}),
    "gradient_matching": (Classifier, {}, {"predictor": LossModelPredictor(hidden=8, objective="both")}),
    "lstm_by_name": (Flat, {}, {"boundaries": ["lstm", "mix"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_split_equals_one_process(case: str) -> None:
    kind, arguments, callback = CASES[case]

    def work(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(5, verbose=False)
        module = kind()
        trainer_for(devices, [SyntheticGradients(**callback)], max_epochs=3, **arguments).fit(module, loader())
        return state_of(module)

    (expected,) = everywhere(1, work)
    tolerance = 2e-2 if case == "bf16" else 1e-5
    for state in everywhere(2, work):
        for name in expected:
            if not name.startswith("accuracy"):
                torch.testing.assert_close(state[name], expected[name], rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- data


class Noisy(Classifier):
    """Dropout in every stage, and augmentation drawn from torch's generator in the main process."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(F.dropout(x, 0.5, self.training)), y)


class Augmented(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, place: int) -> Any:
        generator = torch.Generator().manual_seed(place)
        return torch.randn(12, generator=generator) + 0.1 * torch.randn(12), place % CLASSES


@pytest.mark.parametrize("workers", [0, 1])
def test_stages_get_the_same_batches_without_a_seed(workers: int) -> None:
    def work(devices: int) -> int:
        data = torch.utils.data.DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers)
        trainer = trainer_for(devices, max_epochs=2)
        trainer.fit(Noisy(), data)
        return trainer.global_step

    assert everywhere(2, work) == [16, 16]


# ---------------------------------------------------------------------- evaluation and metrics


class Scored(Classifier):
    """A torchmetrics object, and epoch-end code that needs the outputs of steps."""

    def __init__(self) -> None:
        super().__init__(stages=4)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.losses: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.losses.append(F.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", torch.stack(self.losses).mean())
        self.losses.clear()


def test_evaluation_is_that_of_the_whole_network() -> None:
    def work(devices: int) -> Any:
        pl.seed_everything(5, verbose=False)
        module = Scored()
        trainer = trainer_for(devices)
        trainer.fit(module, loader(), loader(shuffle=False))
        fitted = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        (validated,) = trainer.validate(module, loader(shuffle=False), verbose=False)
        (tested,) = trainer.test(module, loader(shuffle=False), verbose=False)
        predicted = trainer.predict(module, loader(shuffle=False))
        alone = trainer_for(devices, max_epochs=1)
        (before_any_fit,) = alone.test(module, loader(shuffle=False), verbose=False)
        return fitted, validated, tested, predicted, before_any_fit

    ((fitted, validated, tested, predicted, again),) = everywhere(1, work)
    results = everywhere(2, work)
    for result in results:
        assert result[0] == pytest.approx(fitted, abs=1e-5)
    assert results[0][1] == pytest.approx(validated, abs=1e-5)
    assert results[0][2] == pytest.approx(tested, abs=1e-5)
    assert results[0][4] == pytest.approx(again, abs=1e-5)
    torch.testing.assert_close(results[0][3], predicted, rtol=1e-4, atol=1e-5)


class Worsening(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.log("val_loss", 1.0 + self.current_epoch)


def test_early_stopping_stops_all_stages() -> None:
    def work(devices: int) -> int:
        stopping = EarlyStopping("val_loss", patience=1)
        trainer = trainer_for(devices, [SyntheticGradients(), stopping], max_epochs=10)
        trainer.fit(Worsening(), loader(), loader())
        return trainer.current_epoch

    assert everywhere(1, work) + everywhere(3, work) == [2, 2, 2, 2]


class StopAt(Callback):
    """Stops in the middle of an epoch, on the wish of one process only."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 7:
            trainer.should_stop = True


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stop_that_one_stage_wants_stops_all_after_the_same_batch(rank: int) -> None:
    def work(devices: int) -> int:
        trainer = trainer_for(devices, [SyntheticGradients(), StopAt(rank)], max_epochs=1)
        trainer.fit(Classifier(), loader(samples=16 * 40))
        return trainer.global_step

    steps = everywhere(3, work)
    assert len(set(steps)) == 1
    assert 7 <= steps[0] <= 20  # the wish travels to the first stage, the last batches from there down


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_an_ordinary_checkpoint_and_resumes_on_other_numbers_of_processes(tmp_path: Path) -> None:
    def begin(devices: int) -> None:
        pl.seed_everything(5, verbose=False)
        checkpoints = ModelCheckpoint(tmp_path / str(devices), monitor="val_loss", filename="best", save_last=True)
        trainer = trainer_for(
            devices, [SyntheticGradients(), checkpoints], max_epochs=2, enable_checkpointing=True, deterministic=True
        )
        trainer.fit(Classifier(), loader(shuffle=False), loader(shuffle=False))
        trainer.save_checkpoint(tmp_path / f"{devices}.ckpt")

    def resume(devices: int, saved: int) -> dict[str, Tensor]:
        pl.seed_everything(99, verbose=False)
        module = Classifier()
        trainer = trainer_for(devices, max_epochs=4)
        trainer.fit(module, loader(shuffle=False), ckpt_path=tmp_path / f"{saved}.ckpt", weights_only=True)
        return state_of(module)

    def uninterrupted(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(5, verbose=False)
        module = Classifier()
        trainer_for(devices, max_epochs=4).fit(module, loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    for devices in (1, 2, 4):
        everywhere(devices, begin)
    one, two = (torch.load(tmp_path / f"{devices}.ckpt", weights_only=True) for devices in (1, 2))
    assert_same_state(one["state_dict"], two["state_dict"])
    assert one["optimizer_states"][0]["state"].keys() == two["optimizer_states"][0]["state"].keys()
    assert one.keys() == two.keys()
    assert (tmp_path / "2" / "best.ckpt").exists()
    assert (tmp_path / "2" / "last.ckpt").exists()

    plain = Classifier.load_from_checkpoint(tmp_path / "2.ckpt", weights_only=True)  # without this package's help
    assert_same_state(state_of(plain), one["state_dict"])

    (expected,) = everywhere(1, uninterrupted)
    for saved, devices in ((1, 1), (1, 2), (2, 1), (2, 4), (4, 2)):
        for state in everywhere(devices, lambda devices, saved=saved: resume(devices, saved)):
            assert_same_state(expected, state)


def test_training_goes_on_in_a_second_fit() -> None:
    def work(devices: int) -> dict[str, Tensor]:
        pl.seed_everything(5, verbose=False)
        module = Classifier()
        trainer = trainer_for(devices, max_epochs=1)
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
        return state_of(module)

    (expected,) = everywhere(1, work)
    for state in everywhere(2, work):
        assert_same_state(expected, state)


def test_the_flag_alone_brings_the_callback_and_leaves_the_module_clean() -> None:
    def work() -> Any:
        pl.seed_everything(5, verbose=False)
        module = Classifier(stages=2)
        trainer = make_trainer(strategy="synthetic_gradients", devices=2)
        trainer.fit(module, loader(), loader())
        clean = all("forward" not in child.__dict__ for child in module.modules())
        clean = clean and not any(name.startswith("on_") for name in module.__dict__)
        return clean, module.net[1]._site is None, sorted(type(c).__name__ for c in trainer.callbacks)

    for clean, no_site, callbacks in run_ranks(2, work):
        assert clean
        assert no_site
        assert callbacks == ["StageCoordinator", "SyntheticGradients"]


def test_one_device_runs_all_stages_in_one_process() -> None:
    pl.seed_everything(5, verbose=False)
    expected, module = Classifier(), Classifier()
    module.load_state_dict(expected.state_dict())
    make_trainer(callbacks=[SyntheticGradients(seed=1)]).fit(expected, loader(shuffle=False))
    with pytest.warns(UserWarning, match="has one device"):
        make_trainer(strategy="synthetic_gradients", callbacks=[SyntheticGradients(seed=1)]).fit(
            module, loader(shuffle=False)
        )
    assert_same_state(state_of(expected), state_of(module), exact=True)


def test_clipping_by_norm_says_whose_norm_it_is() -> None:
    def work() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_for(2, gradient_clip_val=0.1, max_epochs=1).fit(Classifier(), loader())
        return [str(warning.message) for warning in caught]

    rank_zero, _rank_one = run_ranks(2, work)
    assert any("clips by the norm of each process's own stages" in message for message in rank_zero)
