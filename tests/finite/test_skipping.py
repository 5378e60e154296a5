"""A batch that is not finite is skipped by the stages that can know, alike in one process and in several."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sg import (
    Boundary,
    DelayedGradient,
    ExactGradients,
    LateGradients,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    SyntheticGradientStrategy,
    SyntheticInputs,
    TrueGradient,
)
from tests.everywhere import trainer_for
from tests.finite.models import BAD, Stages, data
from tests.finite.test_raising import ByHand, PastTheHooks
from tests.models import assert_same_state, make_trainer, state_of
from tests.ranks import DEVICE, run_ranks


class Watching(Callback):
    """Notes the weights and the predictors before and after the batch that is not finite."""

    def __init__(self, callback: SyntheticGradients) -> None:
        self.callback = callback
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.optimizer: list[Any] = []
        self.predictors: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) in ((0, BAD), (0, BAD + 1)):
            self.before, self.after = self.after, state_of(module)
            states = trainer.optimizers[0].state_dict()["state"]
            self.optimizer.append({key: {k: v.clone() for k, v in s.items()} for key, s in states.items()})
            self.predictors.append({name: each.step for name, each in self.callback.trainers.items()})

    def changed(self) -> set[str]:
        return {name for name, tensor in self.after.items() if not torch.equal(tensor, self.before[name])}


def run(
    devices: int, make: Any, bad: int | None = None, replicas: int = 1, epochs: int = 2, **arguments: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state and the metrics in this process."""
    callback = arguments.pop("callback", {})
    pl.seed_everything(1, verbose=False)
    module = make()
    strategy: Any = SyntheticGradientStrategy(timeout=20, replicas=replicas) if devices > 1 else "auto"
    trainer = make_trainer(
        devices=devices,
        strategy=strategy,
        callbacks=[SyntheticGradients(**{"on_non_finite": "skip", **callback})],
        max_epochs=epochs,
        log_every_n_steps=1,
        **arguments,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data(bad), data())
    return state_of(module), {k: float(v) for k, v in trainer.callback_metrics.items()}


def train(devices: int, make: Any, bad: int | None = None, **arguments: Any) -> list[Any]:
    """What :func:`run` returns on each rank."""

    def work() -> Any:
        return run(devices, make, bad, **arguments)

    return run_ranks(devices, work) if devices > 1 else [work()]


FAULTS = ["data", "first", "second", "third", "constant", "first gradient", "second gradient", "third gradient"]
# From which stage on the batch is skipped; of a gradient, only that stage.
SKIPPED = {
    "data": ("first", "norm", "second", "third"),
    "first": ("first", "norm", "second", "third"),
    "second": ("second", "third"),
    "third": ("third",),
    "constant": ("third",),
    "first gradient": ("first", "norm"),
    "second gradient": ("second",),
    "third gradient": ("third",),
}
CALLBACKS: dict[str, dict[str, Any]] = {
    "default": {},
    "no delay": {"delay": 0},
    "direct": {"predictor": MLPPredictor(hidden=8), "training": PredictorTraining(every=2)},
    "true": {"predictor": TrueGradient()},
    "delayed": {"predictor": DelayedGradient()},
    "exact": {"exact": ExactGradients(every=1, correction=1.0)},
    "warm-up": {"exact": ExactGradients(every=2, warm_up=5)},
    "late": {"late": LateGradients(0.2)},
}

#: Others differ by rounding without any fault: gradients for one sample and for the mean are not the same bits.
TO_THE_BIT = ("default",)


def in_order(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def made(fault: str) -> tuple[Any, int | None]:
    return (Stages, BAD) if fault == "data" else (lambda: Stages(fault), None)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_stages_that_can_know_stay_as_they_were(fault: str) -> None:
    make, bad = made(fault)
    pl.seed_everything(1, verbose=False)
    callback = SyntheticGradients(on_non_finite="skip")
    watching = Watching(callback)
    module = make()
    trainer = make_trainer(callbacks=[callback, watching], log_every_n_steps=1)
    with pytest.warns(UserWarning, match=rf"Training batch {BAD} \(batch_idx\) of epoch 0 is skipped in stage \d"):
        trainer.fit(module, data(bad))
    assert all(tensor.isfinite().all() for tensor in state_of(module).values())
    stages = {name.split(".")[0] for name in watching.changed()}
    assert not stages & set(SKIPPED[fault])
    assert stages == {"first", "norm", "second", "third"} - set(SKIPPED[fault])
    skipped = {
        place for place, (name, _) in enumerate(module.named_parameters()) if name.split(".")[0] in SKIPPED[fault]
    }
    for place in skipped:
        before, after = (states[place] for states in watching.optimizer)
        assert all(torch.equal(before[key], after[key]) for key in before)
    times = 2 if fault == "data" else 1  # which are the same in both epochs
    assert trainer.callback_metrics["sg/skipped"] == times * ("third" in SKIPPED[fault])
    for each in callback.trainers.values():
        assert all(parameter.isfinite().all() for parameter in each.predictor.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", ["third", "third gradient"])
def test_gradients_that_come_past_the_hooks_are_dropped(fault: str) -> None:
    pl.seed_everything(1, verbose=False)
    module = PastTheHooks(fault)
    with pytest.warns(UserWarning, match="is skipped in stage"):
        make_trainer(callbacks=[SyntheticGradients(on_non_finite="skip")], max_epochs=1).fit(module, data())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("devices", [1, 2])
def test_a_skipped_batch_has_no_gradients_to_clip(devices: int) -> None:
    def work() -> dict[str, Tensor]:
        pl.seed_everything(1, verbose=False)
        module = Stages()
        trainer = trainer_for(
            devices,
            [SyntheticGradients(on_non_finite="skip")],
            gradient_clip_val=0.1,
            gradient_clip_algorithm="value",
        )
        trainer.fit(module, data(BAD))
        return state_of(module)

    states = run_ranks(devices, work) if devices > 1 else [work()]
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())


def test_a_batch_with_bad_data_might_as_well_not_be_there() -> None:
    def run(batches: list[Any]) -> dict[str, Tensor]:
        pl.seed_everything(1, verbose=False)
        module = Stages()
        make_trainer(callbacks=[SyntheticGradients(on_non_finite="skip")], max_epochs=1).fit(module, in_order(batches))
        return state_of(module)

    batches = list(data())
    bad = (batches[0][0] * float("inf"), batches[0][1])
    with pytest.warns(UserWarning, match="is skipped in stage 0"):
        seen = run([*batches[:BAD], bad, bad, *batches[BAD:]])
    assert_same_state(run(batches), seen, exact=True)


@pytest.mark.parametrize(
    ("case", "devices"), [("default", 2), *((case, 3) for case in CALLBACKS), ("exact", 2), ("delayed", 2)]
)
def test_several_processes_skip_as_one_does(case: str, devices: int) -> None:
    faults = FAULTS if case == "default" else ["data", "second", "constant", "second gradient"]

    def work(devices: int) -> list[Any]:
        return [run(devices, *made(fault), callback=CALLBACKS[case]) for fault in faults]

    expected = work(1)
    for rank, results in enumerate(run_ranks(devices, lambda: work(devices))):
        for fault, (state, metrics), (seen, seen_metrics) in zip(faults, expected, results, strict=True):
            assert all(tensor.isfinite().all() for tensor in state.values()), fault
            assert_same_state(state, seen, exact=case in TO_THE_BIT)
            assert seen_metrics["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-5)
            if rank == 0:
                assert seen_metrics["sg/skipped"] == metrics["sg/skipped"]


@pytest.mark.parametrize("fault", ["data", "third", "second gradient"])
def test_of_accumulated_batches_only_the_bad_one_is_missing(fault: str) -> None:
    make, bad = made(fault)
    ((expected, _),) = train(1, make, bad, accumulate_grad_batches=2)
    ((without, _),) = train(1, Stages, accumulate_grad_batches=2)
    assert all(tensor.isfinite().all() for tensor in expected.values())
    assert any(not torch.equal(expected[name], without[name]) for name in expected)
    for state, _ in train(3, make, bad, accumulate_grad_batches=2):
        assert_same_state(expected, state, exact=True)


def test_the_other_accumulated_batch_is_learned_from() -> None:
    class Kept(Stages):
        gradients: dict[str, Tensor] | None = None

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.gradients is None:
                self.gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def run(batches: list[Any], accumulate: int) -> dict[str, Tensor]:
        pl.seed_everything(1, verbose=False)
        module = Kept()
        callback = SyntheticGradients(on_non_finite="skip")
        trainer = make_trainer(callbacks=[callback], max_epochs=1, accumulate_grad_batches=accumulate)
        trainer.fit(module, in_order(batches))
        assert module.gradients is not None
        return module.gradients

    first, other, *_ = list(data())
    bad = (other[0] * float("nan"), other[1])
    with pytest.warns(UserWarning, match="is skipped"):
        half = run([first, bad], 2)
    whole = run([first], 1)
    assert half.keys() == whole.keys()
    for name, gradient in half.items():
        torch.testing.assert_close(2 * gradient, whole[name])


@pytest.mark.parametrize("fault", ["first", "third", "second gradient"])
def test_manual_optimization_skips_alike(fault: str) -> None:
    ((expected, _),) = train(1, lambda: ByHand(fault))
    assert all(tensor.isfinite().all() for tensor in expected.values())
    for state, _ in train(3, lambda: ByHand(fault)):
        assert_same_state(expected, state, exact=True)


@pytest.mark.parametrize("fault", ["data", "third", "second gradient"])
def test_all_replicas_skip_together(fault: str) -> None:
    make, bad = made(fault)
    results = train(4, make, bad, replicas=2, epochs=1, use_distributed_sampler=True)
    for state, _ in results:
        assert all(tensor.isfinite().all() for tensor in state.values())
        weights = {name: tensor for name, tensor in state.items() if "running" not in name}  # of each replica's own
        assert_same_state({name: results[0][0][name] for name in weights}, weights, exact=True)
    assert {results[rank][1]["sg/skipped"] for rank in (0, 2)} <= {0.0, 1.0}


def test_predictors_do_not_learn_from_a_label_that_is_not_finite() -> None:
    class Regression(Stages):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.hidden(batch[0], batch_idx), batch[1])

    batches = [(x, F.one_hot(y, 5).float()) for x, y in data()]
    batches[BAD] = (batches[BAD][0], batches[BAD][1] * float("nan"))
    pl.seed_everything(1, verbose=False)
    callback = SyntheticGradients(on_non_finite="skip", guard=None)
    module = Regression()
    with pytest.warns(UserWarning, match=r"is skipped in stage 0 .*The data are at fault: batch\[1\]"):
        make_trainer(callbacks=[callback]).fit(module, in_order(batches))
    assert all(tensor.isfinite().all() for tensor in state_of(module).values())
    for trainer in callback.trainers.values():
        assert all(parameter.isfinite().all() for parameter in trainer.predictor.parameters())  # type: ignore[attr-defined]


class TestWhatIsRefused:
    """By name, before anything is trained."""

    def test_predicted_inputs(self) -> None:
        with pytest.raises(ValueError, match="on_non_finite='skip' does not go with SyntheticInputs"):
            SyntheticGradients(on_non_finite="skip", inputs=SyntheticInputs())

    def test_a_gradient_scaler(self) -> None:
        scaling = MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE))
        trainer = make_trainer(callbacks=[SyntheticGradients(on_non_finite="skip")], plugins=[scaling])
        with pytest.raises(SyntheticGradientsError, match=r"on_non_finite='skip'.*16-mixed"):
            trainer.fit(Stages(), data())

    def test_a_weight_of_several_stages(self) -> None:
        class Tied(Stages):
            def __init__(self) -> None:
                super().__init__()
                self.third = nn.Sequential(nn.BatchNorm1d(16), self.second, nn.Linear(16, 5))

        with pytest.raises(SyntheticGradientsError, match=r"weight that several stages use \(second"):
            make_trainer(callbacks=[SyntheticGradients(on_non_finite="skip")]).fit(Tied(), data())

    def test_a_step_that_cannot_be_followed(self) -> None:
        class Reads(Stages):
            def __init__(self) -> None:
                super().__init__()
                self.cut3 = Boundary()

            def hidden(self, x: Tensor, batch_idx: int) -> Tensor:
                h = self.first(x)
                return super().hidden(x + 0 * h.sum().item(), batch_idx)

        with (
            pytest.warns(UserWarning, match="could not be checked"),
            pytest.raises(SyntheticGradientsError, match="needs to know which stage a parameter belongs to"),
        ):
            make_trainer(callbacks=[SyntheticGradients(on_non_finite="skip")]).fit(Reads(), data())
