"""Replicas of the stages train as one process does on all their batches together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sg import (
    Boundary,
    DelayedGradient,
    ExactGradients,
    HeadOptions,
    LateGradients,
    LossModelPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientStrategy,
    ZeroPredictor,
)
from lightning_sg.errors import SyntheticGradientsError
from lightning_sg.training import PredictorTrainer
from tests.models import CLASSES, FEATURES, dataset, make_trainer, state_of
from tests.ranks import run_ranks
from tests.smooth import BATCH, SAMPLES, SEED, Smooth, data


def train(
    devices: int,
    replicas: int,
    callback: Callable[[], SyntheticGradients] | None = None,
    make: Callable[[], pl.LightningModule] = Smooth,
    checkpoint: str | None = None,
    folder: Path | None = None,
    epoch: int = 0,
    strategy: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, float]]:
    """Trains and returns the weights, the predictors and the metrics."""
    pl.seed_everything(SEED, verbose=False)
    module, own = make(), (callback or synthetic())()
    defaults: dict[str, Any] = {"precision": "64-true", "max_epochs": 2, "use_distributed_sampler": devices > 1}
    if devices > 1:
        defaults["strategy"] = SyntheticGradientStrategy(replicas=replicas, timeout=40, **(strategy or {}))
    trainer = make_trainer(devices=devices, callbacks=[own], default_root_dir=folder, **{**defaults, **arguments})
    trainer.fit(module, **data(replicas, devices, epoch), ckpt_path=checkpoint)
    if folder is not None:
        trainer.save_checkpoint(folder / "last.ckpt")
    predictors = {
        name: trained.predictor.state_dict() if isinstance(trained, PredictorTrainer) else {}  # a rule has none
        for name, trained in own.trainers.items()
        if trained.ready
    }
    return state_of(module), predictors, {name: float(value) for name, value in trainer.callback_metrics.items()}


def alike(one: Any, other: Any, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class Frozen(Smooth):
    """Parameters of two layers are frozen until the second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.requires_grad_(False)
        self.net[3].bias.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.requires_grad_(True)


class Tied(Smooth):
    """Two stages on different processes share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net[6].weight = self.net[3].weight


class Nothing(Smooth):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 2 else loss


class TwoOptimizers(Smooth):
    """Manual optimization, with an optimizer for the last stage and one for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, last = self.optimizers()
        first.zero_grad()
        last.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        first.step()
        last.step()

    def configure_optimizers(self) -> Any:
        last = list(self.net[-1].parameters())
        others = [parameter for parameter in self.parameters() if all(parameter is not each for each in last)]
        return torch.optim.SGD(others, lr=0.1), torch.optim.SGD(last, lr=0.2)


class Matching(MLPPredictor):
    """Its loss is a mean over samples, so that replicas can average it."""

    def __init__(self) -> None:
        super().__init__(hidden=6, normalize="none")

    def loss(self, activations: Any, context: Any, targets: Any) -> Tensor:
        predictions = self(activations, context)
        assert predictions is not None
        return sum((p - t).square().sum() for p, t in zip(predictions, targets)) / len(activations[0])  # type: ignore[return-value]


UNBOUND = PredictorTraining(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1), bound=1e9)


def synthetic(**options: Any) -> Callable[[], SyntheticGradients]:
    """Predictors that look at each sample alone, without a bound, which depends on the whole batch."""
    defaults: dict[str, Any] = {
        "predictor": LossModelPredictor(hidden=6, objective="loss", head=HeadOptions(hidden_norm="none")),
        "training": UNBOUND,
    }
    return lambda: SyntheticGradients(**{**defaults, **options})


RUNS: dict[str, dict[str, Any]] = {
    "a loss model": {},
    "three processes a replica": {"devices": 6},
    "one process a replica": {"devices": 2},
    "four replicas": {"devices": 4, "replicas": 4},
    "matching targets": {"callback": synthetic(predictor=Matching(), exact=ExactGradients(every=2))},
    "corrections": {
        "callback": synthetic(predictor=Matching(), exact=ExactGradients(every=2, correction=0.5), delay=0)
    },
    "delayed gradients": {"callback": synthetic(predictor=DelayedGradient())},
    "late gradients": {"callback": synthetic(late=LateGradients(0.2), delay=0)},
    "late gradients, three processes a replica": {
        "callback": synthetic(late=LateGradients(0.2, every=2)),
        "devices": 6,
    },
    "late gradients, recomputed": {"callback": synthetic(late=LateGradients(0.2, recompute=True), delay=0)},
    "late gradients, accumulated and clipped": {
        "callback": synthetic(late=LateGradients(0.2), delay=0),
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,
        "strategy": {"clip_over": "model"},
    },
    "no gradient": {"callback": synthetic(predictor=ZeroPredictor())},
    "accumulation and clipping": {
        "callback": synthetic(exact=ExactGradients(correction=0.5)),
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,
        "strategy": {"clip_over": "model"},
    },
    "an average of the predictor": {"callback": synthetic(training=replace(UNBOUND, ema=0.5, updates=2))},
    "frozen layers": {"make": Frozen},
    "manual optimization": {"make": TwoOptimizers},
    "a tied weight, accumulated": {
        "make": Tied,
        "accumulate_grad_batches": 2,
        "strategy": {"tied_weights": "synchronize"},
    },
    "DDP's options": {"strategy": {"ddp": {"find_unused_parameters": True, "gradient_as_bucket_view": True}}},
}


@pytest.mark.parametrize("name", RUNS)
def test_replicas_train_as_one_process_does_on_all_their_batches(name: str) -> None:
    run = {"devices": 4, "replicas": 2, **RUNS[name]}
    devices, replicas = run.pop("devices"), run.pop("replicas")
    whole, predictors, metrics = train(1, replicas, **{k: v for k, v in run.items() if k != "strategy"})
    results = run_ranks(devices, lambda: train(devices, replicas, **run))
    for state, own, seen in results:
        alike(state, whole)
        for boundary in own:
            alike(dict(own[boundary]), predictors[boundary], 1e-5)
        for metric in ("val_loss", "val_accuracy"):
            assert seen[metric] == pytest.approx(metrics[metric], rel=1e-6)
    assert set().union(*(own for _, own, _ in results)) == set(predictors)
    stages = devices // replicas
    for rank in range(stages):  # replicas of a stage agree to the last bit
        for other in range(rank + stages, devices, stages):
            alike(results[rank][:2], results[other][:2], 0.0)


@pytest.mark.parametrize(("devices", "checkpoint_of"), [(4, 4), (4, 1), (1, 4), (2, 4)])
def test_a_run_goes_on_in_another_number_of_processes(devices: int, checkpoint_of: int, tmp_path: Path) -> None:
    """Targets under way are restored too; they come from the batches of all replicas."""

    def make(count: int, **arguments: Any) -> Any:
        arguments = {"callback": synthetic(training=replace(UNBOUND, seed=1)), **arguments}
        return run_ranks(count, lambda: train(count, 2, **arguments)) if count > 1 else [train(1, 2, **arguments)]

    ((whole, _, _),) = make(1, max_epochs=3)
    make(checkpoint_of, max_epochs=1, folder=tmp_path)
    checkpoint = str(tmp_path / "last.ckpt")
    for state, _, _ in make(devices, max_epochs=3, checkpoint=checkpoint, epoch=1):
        alike(state, whole, 1e-6)


class StopsOnce(Callback):
    """Only the second replica wants to stop."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_arguments: Any) -> None:
        if trainer.strategy.replica == 1 and trainer.global_step == 3:
            trainer.should_stop = True


@pytest.mark.parametrize("devices", [2, 4])
def test_a_stop_that_one_replica_wants_is_everyones_in_mid_epoch(devices: int) -> None:
    def work() -> int:
        pl.seed_everything(SEED, verbose=False)
        strategy = SyntheticGradientStrategy(replicas=2, timeout=20)
        trainer = make_trainer(devices=devices, strategy=strategy, callbacks=[StopsOnce()], max_epochs=50)
        trainer.fit(Smooth(), DataLoader(dataset(40 * BATCH), batch_size=BATCH, shuffle=True))
        return trainer.global_step

    steps = set(run_ranks(devices, work))
    assert len(steps) == 1
    assert steps.pop() < 20  # an epoch has 20 batches per replica


def test_a_batch_without_a_loss_is_refused() -> None:
    def work() -> None:
        strategy = SyntheticGradientStrategy(replicas=2, timeout=20)
        make_trainer(devices=4, strategy=strategy).fit(Nothing(), **data(2, 4))

    failures = run_ranks(4, work, may_fail=True)
    assert "training_step returned None at training batch 2" in failures[0].message


class Batches(Callback):
    """Notes the sum of each batch."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {"train": [], "val": []}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sums["train"].append(float(batch[0].sum()))

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.sums["val"].append(float(batch[0].sum()))


def test_each_replica_has_its_part_of_the_data_and_the_stages_of_one_the_same() -> None:
    def work() -> Any:
        watch = Batches()
        strategy = SyntheticGradientStrategy(replicas=2, timeout=20)
        module = Smooth()
        trainer = make_trainer(devices=4, strategy=strategy, callbacks=[watch], max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(module, **data(2, 4))
        best = trainer.validate(module, data(2, 4)["val_dataloaders"], verbose=False)
        gathered = module.all_gather(torch.tensor(float(strategy.replica)))
        return watch.sums, best, (strategy.replica, gathered.tolist(), strategy.distributed_sampler_kwargs)

    results = run_ranks(4, work)
    (first, _, own), (second, _, _), (third, _, other), (fourth, _, _) = results
    assert first == second
    assert third == fourth
    assert first["train"] != third["train"]
    assert first["val"] != third["val"]
    every = [float(x.sum()) for x, _ in DataLoader(dataset(SAMPLES), batch_size=SAMPLES)]
    assert sum(first["train"]) + sum(third["train"]) == pytest.approx(every[0], abs=1e-3)
    assert own == (0, [0.0, 1.0], {"num_replicas": 2, "rank": 0})
    assert other == (1, [0.0, 1.0], {"num_replicas": 2, "rank": 1})
    assert results[0][1] == results[2][1]


class Normalised(Smooth):
    """Two stages, each with BatchNorm."""

    def __init__(self) -> None:
        super().__init__(stages=2)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 8),
            nn.BatchNorm1d(8),
            Boundary(),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, CLASSES),
        )


def test_running_statistics_are_the_first_replicas_as_with_ddp() -> None:
    def work() -> Any:
        pl.seed_everything(SEED, verbose=False)
        module = Normalised()
        strategy = SyntheticGradientStrategy(replicas=2, timeout=20)
        checkpoint = ModelCheckpoint(monitor="val_loss", save_weights_only=True)
        trainer = make_trainer(
            devices=4, strategy=strategy, callbacks=[checkpoint], enable_checkpointing=True, max_epochs=2
        )
        trainer.fit(module, **data(2, 4))
        state = {
            name: value
            for name, value in state_of(module).items()
            if "running" not in name  # replicas differ in them until the next forward pass
        }
        return state, checkpoint.best_model_path, float(checkpoint.best_model_score)

    first, *others = run_ranks(4, work)
    for other in others:
        alike(other[0], first[0], 0.0)
        assert other[1:] == first[1:]


def test_a_replica_that_dies_ends_the_others() -> None:
    class Dies(Smooth):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_rank == 3 and batch_idx == 2:
                raise ValueError("this one is odd")
            return super().training_step(batch, batch_idx)

    def work() -> None:
        strategy = SyntheticGradientStrategy(replicas=2, timeout=20)
        make_trainer(devices=4, strategy=strategy).fit(Dies(), **data(2, 4))

    failures = run_ranks(4, work, may_fail=True)
    assert "this one is odd" in failures[3].message
    assert "this one is odd" in failures[2].message  # its neighbour in the same replica
    assert all(failure is not None and failure.kind != "Timeout" for failure in failures)


def test_processes_that_do_not_divide_are_refused() -> None:
    def work() -> None:
        strategy = SyntheticGradientStrategy(replicas=2)
        make_trainer(devices=3, strategy=strategy).fit(Smooth(), **data(2, 3))

    for failure in run_ranks(3, work, may_fail=True):
        assert failure.kind == SyntheticGradientsError.__name__
        assert "3 processes cannot hold 2 replicas" in failure.message
    with pytest.raises(ValueError, match=r"replicas must be a whole number from 1 to .*, not 0"):
        SyntheticGradientStrategy(replicas=0)


def test_replicas_are_as_little_coupled_to_other_stages_as_one_is() -> None:
    """The first stages run ahead by the delay while both last stages sleep."""
    import time

    class Sleeps(Smooth):
        def __init__(self) -> None:
            super().__init__(stages=2)
            self.times: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 4 and loss.item() > -1:
                time.sleep(1.5)
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.times.append(time.monotonic())

    def work() -> list[float]:
        pl.seed_everything(SEED, verbose=False)
        module = Sleeps()
        strategy = SyntheticGradientStrategy(replicas=2, timeout=20)
        callback = SyntheticGradients(delay=2)
        make_trainer(devices=4, strategy=strategy, callbacks=[callback], max_epochs=1).fit(module, **data(2, 4))
        return module.times

    last, first, _, other = run_ranks(4, work)
    for times in (first, other):
        assert (
            sum(moment < last[4] - 0.2 for moment in times) == 4 + 1 + 2
        )  # batches 0 to 4, and two more for the delay


def test_synchronised_batchnorm_is_refused() -> None:
    def work() -> None:
        strategy = SyntheticGradientStrategy(replicas=2, timeout=20)
        make_trainer(devices=2, strategy=strategy, sync_batchnorm=True).fit(Normalised(), **data(2, 2))

    for failure in run_ranks(2, work, may_fail=True):
        assert "sync_batchnorm=True is not supported with replicas" in failure.message
