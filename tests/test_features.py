"""What users of Lightning use, one feature at a time: split over processes it does what it does in one."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_sg import Boundary, LinearPredictor, SyntheticGradients, SyntheticGradientStrategy, ZeroPredictor
from tests.models import CLASSES, FEATURES, Classifier, assert_same_state, dataset, loader, make_trainer, state_of
from tests.ranks import DEVICE, Failure, run_ranks

# ---------------------------------------------------------------------- modules


class Blocks(pl.LightningModule):
    """Three parts with a boundary between each two, trained by SGD."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.cuts = nn.ModuleList(Boundary() for _ in parts[1:])

    def forward(self, x: Any) -> Any:
        for part, cut in zip(self.parts, self.cuts):
            x = cut(part(x))
        return self.parts[-1](x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def plain() -> Blocks:
    return Blocks(
        nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU()),
        nn.Linear(16, CLASSES),
    )


class Tabulated(Blocks):
    """A table is made from a buffer at the start and used by every stage, as rotary embeddings are."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.register_buffer("frequencies", torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.outer(torch.arange(len(x), device=x.device).float(), self.frequencies).cos()
        h = self.cuts[0](self.parts[0](x) + table)
        return self.parts[2](self.cuts[1](self.parts[1](h * table)) - table)


class Tokens(nn.Module):
    """Cuts the features into tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x.view(len(x), 3, 4))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))


def encoder() -> Blocks:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return Blocks(Tokens(), nn.TransformerEncoder(layer, 2), Pooled())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


class Checkpointed(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def middle(part: nn.Module) -> Blocks:
    return Blocks(nn.Linear(FEATURES, 16), part, nn.Linear(16, CLASSES))


class Words(pl.LightningModule):
    """An embedding with sparse gradients, which the second stage does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16, sparse=True)
        self.cut = Boundary()
        self.head = nn.Linear(16, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words = (10 * batch[0]).long().clamp(0, 49)
        return F.cross_entropy(self.head(self.cut(self.words(words).mean(1))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Named(pl.LightningModule):
    """A dict crosses the boundary, with a mask that carries no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cut, self.last = nn.Linear(FEATURES, 16), Boundary(), nn.Linear(16, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.first(batch[0])
        crossed = self.cut({"hidden": hidden, "mask": batch[0][:, :1] > 0, "pair": (hidden.exp(), 3)})
        features = crossed["hidden"] * crossed["mask"] + crossed["pair"][0] * crossed["pair"][1]
        return F.cross_entropy(self.last(features), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ShapeDependent(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if len(x) > 6 else 2 * x)  # the last batch is smaller


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x += 1  # the first thing behind the boundary
        return super().forward(x).relu_()


class Twice(nn.Module):
    """One block, called twice, with a keyword argument that has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(16, 16)

    def once(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return self.block(x) if scale is None else scale * self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(torch.relu(self.once(x)), scale=torch.full((), 0.5))


class SplitInTwo(torch.autograd.Function):
    """Two outputs, of which the second has no gradient where nothing uses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.exp()

    @staticmethod
    def backward(ctx: Any, double: Tensor, _exponential: Tensor | None) -> Tensor:
        return 2 * double


class Splitting(nn.Linear):
    """Several results of one operation, one of them unused."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = super().forward(x).split(8, dim=1)
        used, _unused = SplitInTwo.apply(torch.cat([right, left], 1))
        return used


class Bare(nn.Module):
    """Parameters without a module of their own, an alias of one, and a buffer that goes into the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(16, 16))
        self.alias = self.weight
        self.register_buffer("shift", torch.arange(16.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(torch.mm(x, self.weight), self.alias) + 0.01 * self.shift.clone()


def hooked() -> Blocks:
    module = plain()
    module.parts[1].register_forward_hook(lambda _module, _args, output: 0.5 * output)
    module.parts[0].register_forward_pre_hook(lambda _module, args: (args[0] - 1,))
    module.parts[2].register_full_backward_hook(lambda _module, gradients, _outputs: (2 * gradients[0],))
    return module


class Plateau(Blocks):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Stepping(Blocks):
    """Overrides what users override about optimizers."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.seen = 0.0

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:  # a warm-up, as in Lightning's documentation
            group["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 8)
        optimizer.step(closure=optimizer_closure)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-0.01, 0.01)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.seen += 1


class TwoOptimizers(Blocks):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        schedule = self.lr_schedulers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()
        schedule.step()

    def configure_optimizers(self) -> Any:
        halves = [p for part in self.parts[:2] for p in part.parameters()], self.parts[2].parameters()
        first, second = torch.optim.Adam(halves[0], lr=1e-2), torch.optim.SGD(halves[1], lr=0.1)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(first, 0.9)]


class Frozen(Blocks):
    def configure_optimizers(self) -> Any:
        self.parts[1][0].requires_grad_(False)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


# ---------------------------------------------------------------------- data


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset(40))


class Reloading(pl.LightningDataModule):
    """Other samples in every epoch."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return loader(samples=20 + 10 * self.trainer.current_epoch)


class EMA(lightning_callbacks.WeightAveraging):
    def __init__(self) -> None:
        super().__init__(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))


def both() -> dict[str, Any]:
    return {"train_dataloaders": loader(), "val_dataloaders": loader(shuffle=False)}


# ---------------------------------------------------------------------- cases


@dataclass
class Case:
    """One feature: how it is used, whether something differs, and how many stages there are."""

    trainer: dict[str, Any] = field(default_factory=dict)
    module: Callable[[], pl.LightningModule] = plain
    data: Callable[[], dict[str, Any]] = both
    callbacks: Callable[[Path], list[Any]] = lambda folder: []
    tolerance: float = 1e-5
    words: str = ""
    stages: int = 3


def only(callback: Callable[[], Any]) -> Callable[[Path], list[Any]]:
    return lambda folder: [callback()]


CASES: dict[str, Case] = {
    "fast_dev_run": Case({"fast_dev_run": True}),
    "overfit_batches": Case({"overfit_batches": 2}),
    "limit_train_batches and limit_val_batches": Case({"limit_train_batches": 3, "limit_val_batches": 1}),
    "limit_train_batches as a share": Case({"limit_train_batches": 0.5}),
    "val_check_interval": Case({"val_check_interval": 2}),
    "check_val_every_n_epoch": Case({"check_val_every_n_epoch": 2}),
    "max_steps": Case({"max_steps": 7, "max_epochs": -1}),
    "min_epochs": Case({"min_epochs": 3, "max_epochs": 4}),
    "num_sanity_val_steps": Case({"num_sanity_val_steps": 2}),
    "no sanity check": Case({"num_sanity_val_steps": 0}),
    "accumulate_grad_batches": Case({"accumulate_grad_batches": 3}),
    "gradient_clip_val by value": Case({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "several validation loaders": Case(data=lambda: {**both(), "val_dataloaders": [loader(shuffle=False)] * 2}),
    "an iterable dataset without length": Case(
        data=lambda: {"train_dataloaders": DataLoader(Endless(), batch_size=8)}, trainer={"limit_val_batches": 0}
    ),
    "reload_dataloaders_every_n_epochs": Case(
        {"reload_dataloaders_every_n_epochs": 1}, data=lambda: {"datamodule": Reloading()}
    ),
    "a plateau schedule on a validation metric": Case(
        {"max_epochs": 4},
        module=lambda: Plateau(*plain().parts),
        callbacks=only(lightning_callbacks.LearningRateMonitor),
    ),
    "optimizer_step and hooks around it": Case(module=lambda: Stepping(*plain().parts)),
    "two optimizers, by hand": Case(module=lambda: TwoOptimizers(*plain().parts)),
    "frozen layers": Case(module=lambda: Frozen(*plain().parts)),
    "nn.TransformerEncoder": Case(module=encoder),
    "an LSTM inside a stage": Case(module=lambda: Blocks(Tokens(), Recurrent(), Pooled())),
    "a skip connection inside a stage": Case(module=lambda: middle(Skips())),
    "activation checkpointing inside a stage": Case(module=lambda: middle(Checkpointed())),
    "an embedding with sparse gradients": Case(module=Words, stages=2),
    "a dict with a mask and a number across a boundary": Case(module=Named, stages=2),
    "BatchNorm": Case(module=Classifier),
    "a branch on the batch size": Case(module=lambda: middle(ShapeDependent(16, 16))),
    "an in-place operation right behind a boundary": Case(module=lambda: middle(InPlace(16, 16))),
    "a block that is called twice, a keyword argument": Case(module=lambda: middle(Twice())),
    "an operation with several results, some unused": Case(module=lambda: middle(Splitting(16, 16))),
    "a table made from a buffer, used by every stage": Case(module=lambda: Tabulated(*plain().parts)),
    "bare parameters, an alias, a buffer": Case(module=lambda: middle(Bare())),
    "hooks of the user's, forwards and backwards": Case(module=hooked),
    "torch.compile of a stage": Case(module=lambda: middle(torch.compile(Skips(), backend="eager"))),
    "ModelCheckpoint, the best and the last": Case(
        callbacks=lambda folder: [
            lightning_callbacks.ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, save_last=True)
        ]
    ),
    "ModelCheckpoint on steps and a training metric": Case(
        callbacks=lambda folder: [
            lightning_callbacks.ModelCheckpoint(folder, monitor="train_loss", every_n_train_steps=3, save_top_k=2)
        ]
    ),
    "EarlyStopping": Case(
        {"max_epochs": 6},
        callbacks=only(lambda: lightning_callbacks.EarlyStopping("val_loss", min_delta=10.0, patience=1)),
    ),
    "WeightAveraging": Case(callbacks=only(EMA)),
    "StochasticWeightAveraging": Case(
        {"max_epochs": 4},
        callbacks=only(lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=1)),
    ),
    "Timer": Case(callbacks=only(lambda: lightning_callbacks.Timer(duration={"hours": 1}))),
    "ModelSummary": Case({"enable_model_summary": True}),
    "TQDMProgressBar": Case({"enable_progress_bar": True}),
    "RichProgressBar": Case(
        {"enable_progress_bar": True}, callbacks=only(lightning_callbacks.RichProgressBar)
    ),
    "DeviceStatsMonitor": Case(callbacks=only(lambda: lightning_callbacks.DeviceStatsMonitor(cpu_stats=False))),
    "profiler='simple'": Case({"profiler": "simple"}),
    "GradientAccumulationScheduler": Case(
        callbacks=only(lambda: lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 2}))
    ),
    "bf16-true": Case({"precision": "bf16-true"}, tolerance=5e-3, words="to the precision of bfloat16"),
    "64-true": Case({"precision": "64-true"}),
    "detect_anomaly": Case({"detect_anomaly": True}),
    "deterministic": Case({"deterministic": True}),
}  # fmt: skip


def train(name: str, devices: int, folder: Path) -> dict[str, Any]:
    """Trains as a user would, with a logger, and returns what is to be equal."""
    case = CASES[name]
    folder = folder / name.replace(" ", "_") / str(devices)
    pl.seed_everything(11, verbose=False)
    module = case.module()
    trainer = make_trainer(
        **{
            "logger": CSVLogger(folder),
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            "enable_checkpointing": any(
                isinstance(callback, lightning_callbacks.ModelCheckpoint) for callback in case.callbacks(folder)
            ),
            **case.trainer,
        },
        strategy=SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto",
        devices=devices,
        callbacks=[SyntheticGradients(seed=1), *case.callbacks(folder)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, **case.data())
    metrics = {
        key: float(value)
        for key, value in trainer.callback_metrics.items()
        if not key.startswith("sg/") and not key.startswith("DeviceStats")
    }
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    files = sorted(path.name for path in folder.glob("*.ckpt"))
    counts = (trainer.global_step, trainer.current_epoch)
    return {"state": state_of(module), "metrics": metrics, "rates": rates, "files": files, "counts": counts}


def compare(expected: dict[str, Any], found: dict[str, Any], tolerance: float) -> None:
    for key, value in expected["state"].items():
        assert torch.allclose(found["state"][key], value, rtol=tolerance, atol=tolerance), key
    assert found["counts"] == expected["counts"]
    assert found["rates"] == pytest.approx(expected["rates"])
    assert found["files"] == expected["files"]
    for key, value in expected["metrics"].items():
        if "train_loss" not in key:  # known where the loss is; shared at the ends of epochs
            assert found["metrics"][key] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), key


GROUPS = [list(CASES)[start : start + 7] for start in range(0, len(CASES), 7)]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_split_over_processes_it_does_what_it_does_in_one(group: list[str], tmp_path: Path) -> None:
    def work(devices: int) -> dict[str, Any]:
        return {name: train(name, devices, tmp_path) for name in group if CASES[name].stages >= devices}

    results = {devices: run_ranks(devices, partial(work, devices), may_fail=True) for devices in (2, 3)}
    for result in (each for ranks in results.values() for each in ranks):
        assert not isinstance(result, Failure), result.trace
    for name in group:
        expected = train(name, 1, tmp_path)
        for devices, ranks in results.items():
            for rank, result in enumerate(ranks):
                if name not in result:
                    continue  # it has fewer stages
                try:
                    compare(expected, result[name], CASES[name].tolerance)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {devices} processes, rank {rank}: {error}") from error


# ---------------------------------------------------------------------- checkpoints and several runs


def resumed(folder: Path, devices: int, steps: int, checkpoint: str | None = None) -> dict[str, Tensor]:
    pl.seed_everything(4, verbose=False)
    module = Plateau(*plain().parts)
    trainer = make_trainer(
        strategy="synthetic_gradients" if devices > 1 else "auto",
        devices=devices,
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[SyntheticGradients(seed=1)],
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{devices}.ckpt")
    return state_of(module)


def test_a_run_goes_on_in_mid_epoch_on_any_number_of_processes(tmp_path: Path) -> None:
    # An epoch has five batches. Lightning takes the loader from its beginning again, so that what there is to compare
    # with is a run that was interrupted at the same places.
    alone = tmp_path / "alone"
    resumed(alone, 1, 8)
    resumed(alone, 1, 12, str(alone / "1.ckpt"))
    expected = resumed(alone, 1, 17, str(alone / "1.ckpt"))
    run_ranks(2, lambda: resumed(tmp_path, 2, 8))
    resumed(tmp_path, 1, 12, str(tmp_path / "2.ckpt"))
    for state in run_ranks(3, lambda: resumed(tmp_path, 3, 17, str(tmp_path / "1.ckpt"))):
        assert_same_state(expected, state)


def test_evaluation_alone_and_from_a_checkpoint_is_that_of_one_process(tmp_path: Path) -> None:
    def work(devices: int) -> Any:
        pl.seed_everything(4, verbose=False)
        module = Classifier(stages=3)
        arguments: dict[str, Any] = {"strategy": "synthetic_gradients" if devices > 1 else "auto", "devices": devices}
        trainer = make_trainer(**arguments, callbacks=[SyntheticGradients(seed=1)])
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False))
        trainer.save_checkpoint(tmp_path / "eval.ckpt")
        found = []
        for path in (None, str(tmp_path / "eval.ckpt")):
            fresh = Classifier(stages=3) if path else module
            alone = make_trainer(**arguments, callbacks=[SyntheticGradients(seed=1)])
            data = loader(shuffle=False)
            found.append(alone.validate(fresh, data, ckpt_path=path, verbose=False))
            found.append(alone.test(fresh, data, ckpt_path=path, verbose=False))
            predicted = alone.predict(fresh, data, ckpt_path=path)
            if alone.is_global_zero:
                found.append({"predicted": float(torch.cat(predicted).sum())})
        return found

    expected = work(1)
    first, *_others = run_ranks(2, lambda: work(2))
    for one, other in zip(expected, first, strict=True):
        for left, right in zip(one if isinstance(one, list) else [one], other if isinstance(other, list) else [other]):
            assert right == pytest.approx(left, rel=1e-4)


def test_max_time_stops_all_stages_after_the_same_batch() -> None:
    class Slow(lightning_callbacks.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_arguments: Any) -> None:
            time.sleep(0.02)

    def work() -> tuple[int, float]:
        began = time.monotonic()
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=20.0),
            devices=2,
            max_epochs=-1,
            max_time={"seconds": 1},
            callbacks=[Slow()],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(plain(), loader())
        return trainer.global_step, time.monotonic() - began

    (steps, took), (other, _) = run_ranks(2, work)
    assert steps == other > 5
    assert took < 15


def test_progress_bars_show_the_alignment() -> None:
    def work() -> dict[str, Any]:
        seen: dict[str, Any] = {}

        class Shows(lightning_callbacks.TQDMProgressBar):
            def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
                super().on_train_batch_end(trainer, pl_module, *rest)
                seen.update(self.get_metrics(trainer, pl_module))

        trainer = make_trainer(
            strategy="synthetic_gradients",
            devices=2,
            callbacks=[Shows(), SyntheticGradients()],
            log_every_n_steps=1,
            enable_progress_bar=True,
        )
        trainer.fit(plain(), loader())
        return seen

    shown, other = run_ranks(2, work)
    assert {"sg/cosine", "train_loss_step", "train_loss_epoch"} <= set(shown)
    assert -1 <= float(shown["sg/cosine"]) <= 1
    assert "sg/cosine" not in other


def test_the_stages_with_their_parameters_are_told_once() -> None:
    def work() -> list[str]:
        told: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        make_trainer(strategy="synthetic_gradients", devices=2).fit(plain(), loader(), loader(shuffle=False))
        return [text for text in told if text.startswith("The stages")]

    parts = [sum(parameter.numel() for parameter in part.parameters()) for part in plain().parts]
    assert run_ranks(2, work) == [
        [
            "The stages on 2 processes:\n"
            f"stage 0 (rank 1): from the start up to 'cuts.0', {parts[0]:,} parameters\n"
            f"stages 1-2 (rank 0): after 'cuts.0' to the loss, {parts[1] + parts[2]:,} parameters"
        ],
        [],
    ]


def test_a_checkpoint_of_a_split_run_loads_in_plain_lightning(tmp_path: Path) -> None:
    (state, *_), *_rest = ([result] for result in run_ranks(2, lambda: resumed(tmp_path, 2, 8)))
    module = Plateau(*plain().parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says that the callback is not there
        make_trainer(max_steps=9, max_epochs=-1).fit(module, loader(), loader(), ckpt_path=str(tmp_path / "2.ckpt"))
    again = Plateau(*plain().parts)
    again.load_state_dict(torch.load(tmp_path / "2.ckpt", weights_only=False)["state_dict"])
    assert_same_state(state_of(again), state)


# ---------------------------------------------------------------------- what is refused


class LineSearch(Blocks):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def test_optimizers_that_evaluate_a_step_several_times_are_refused() -> None:
    def work() -> None:
        trainer = make_trainer(
            strategy=SyntheticGradientStrategy(timeout=10.0), devices=2, callbacks=[SyntheticGradients()]
        )
        trainer.fit(LineSearch(*plain().parts), loader())

    for result in run_ranks(2, work, may_fail=True):
        assert isinstance(result, Failure)
        assert "LBFGS" in result.message, result.message


def scaled(
    devices: int, folder: Path, predictor: Any = "auto", scale: float = 2.0**10, epochs: int = 2
) -> tuple[Any, float, int]:
    """A run in 16 bits with a scaled loss, which the Trainer chooses by ``precision="16-mixed"`` on GPUs only."""
    pl.seed_everything(3, verbose=False)
    module = plain()
    plugin = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, init_scale=scale))
    callback = SyntheticGradients(predictor=predictor, seed=1)
    strategy = SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto"
    trainer = make_trainer(
        strategy=strategy, devices=devices, callbacks=[callback], plugins=[plugin], max_epochs=epochs
    )
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer.fit(module, loader(shuffle=False))
    trainer.save_checkpoint(folder / "scaled.ckpt")
    changed = sum(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return state_of(module), plugin.scaler.get_scale(), changed


def test_scaled_losses_train_as_in_one_process(tmp_path: Path) -> None:
    whole, scale, changed = scaled(1, tmp_path)
    for state, own, count in run_ranks(2, lambda: scaled(2, tmp_path)):
        assert_same_state(whole, state)
        assert (own, count) == (scale, changed)
    saved = torch.load(tmp_path / "scaled.ckpt", weights_only=False)
    assert saved["MixedPrecision"]["scale"] == scale


class Small(Blocks):
    """A loss so small that its gradients vanish in 16 bits unless they are scaled, from activations in 16 bits."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 1e-6 * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1000.0)


def sizes_of_targets(devices: int, scaled: bool, **options: Any) -> dict[str, float]:
    """The root mean square of the targets at the boundaries that predictors of this process have."""
    pl.seed_everything(3, verbose=False)
    module = Small(nn.Linear(FEATURES, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, CLASSES))
    plugin = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, init_scale=2.0**16))
    callback = SyntheticGradients(predictor=LinearPredictor(), seed=1, **options)
    trainer = make_trainer(
        strategy=SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto",
        devices=devices,
        callbacks=[callback],
        plugins=[plugin] if scaled else [],
    )
    trainer.fit(module, loader(shuffle=False))
    return {name: float(t.scale.rms[0]) for name, t in callback.trainers.items() if t.scale.rms is not None}


@pytest.mark.parametrize("options", [{}, {"exact_every": 2}, {"mix": 0.5}], ids=["synthetic", "exact", "mixed"])
def test_targets_do_not_vanish_in_16_bits(options: dict[str, Any]) -> None:
    expected = sizes_of_targets(1, False, **options)
    assert 0 < expected["cuts.1"] < 1e-5
    several = run_ranks(3, lambda: sizes_of_targets(3, True, **options))
    for found in (
        sizes_of_targets(1, True, **options),
        {name: size for each in several for name, size in each.items()},
    ):
        assert found == pytest.approx(expected, rel=2e-2)


def test_scaled_losses_that_overflow_skip_steps_and_go_on(tmp_path: Path) -> None:
    """Each process by itself: its gradients are others, and so may its scale be."""
    for state, scale, changed in run_ranks(2, lambda: scaled(2, tmp_path, scale=2.0**24, epochs=6)):
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert scale < 2.0**24
        assert changed == len(state)


def test_scaled_losses_and_the_norm_of_the_model_are_refused_together() -> None:
    def work() -> None:
        plugin = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE))
        strategy = SyntheticGradientStrategy(timeout=20.0, clip_over="model")
        make_trainer(strategy=strategy, devices=2, plugins=[plugin], gradient_clip_val=1.0).fit(plain(), loader())

    for failure in run_ranks(2, work, may_fail=True):
        assert "Use 'bf16-mixed', or clip_over='stages'" in failure.message


def test_scaled_losses_need_no_gradient_in_every_process(tmp_path: Path) -> None:
    results = run_ranks(2, lambda: scaled(2, tmp_path, predictor=ZeroPredictor()))
    whole = scaled(1, tmp_path, predictor=ZeroPredictor())
    for state, _, count in results:
        assert_same_state(whole[0], state)
        assert count == whole[2] < len(state)
