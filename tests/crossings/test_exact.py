"""Exact gradients that travel up late: as targets, as corrections, in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sg import (
    AutoPredictor,
    Boundary,
    DelayedGradient,
    ExactGradients,
    GradientPredictor,
    LateGradients,
    LossModelPredictor,
    Matching,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    TrueGradient,
    ZeroPredictor,
)
from lightning_sg.predictors.base import Gradients, LossInfo
from lightning_sg.rules import BoundaryRule
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.noted import Watch
from tests.ranks import run_ranks
from tests.resuming import resumed_and_whole


class Sgd(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(devices: int, *, stages: int = 4, epochs: int = 3, module: Any = Sgd, **callback: Any) -> Any:
    """Trains, in ``devices`` processes, and returns the state of the module on each rank."""

    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        model = module(stages=stages)
        trainer = make_trainer(
            strategy="synthetic_gradients" if devices > 1 else "auto",
            devices=devices,
            max_epochs=epochs,
            callbacks=[SyntheticGradients(**callback)],
        )
        trainer.fit(model, loader(), loader(shuffle=False))
        return state_of(model)

    return run_ranks(devices, work) if devices > 1 else [work()]


CASES: dict[str, dict[str, Any]] = {
    "exact targets on every batch": {"exact": ExactGradients(every=1)},
    "exact targets on every third batch": {"exact": ExactGradients(every=3), "delay": 2},
    "nothing learned between": {"exact": ExactGradients(every=3, bootstrap=False), "delay": 0},
    "corrections": {"exact": ExactGradients(every=1, correction=1.0)},
    "corrections on every other batch": {"exact": ExactGradients(every=2, correction=0.5), "delay": 2},
    "delayed gradients": {"predictor": DelayedGradient()},
    "warm-up, then exact targets": {"exact": ExactGradients(every=2, warm_up=4)},
    "two updates, averaged": {"training": PredictorTraining(updates=2, ema=0.5)},
}


@pytest.mark.parametrize("case", CASES)
def test_one_two_and_four_processes_end_with_the_same_weights(case: str) -> None:
    (expected,) = train(1, **CASES[case])
    for devices in (2, 4):  # with two, there are boundaries within each process
        for state in train(devices, **CASES[case]):
            assert_same_state(expected, state)


def test_exact_targets_are_the_gradients_of_the_undivided_model() -> None:
    torch.manual_seed(0)
    module = Sgd(stages=4)
    watch = Watch()
    data = loader(shuffle=False)
    # Without learning rate the weights stay, so that every batch's gradients can be had afterwards.
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    callback = SyntheticGradients(predictor=MLPPredictor(), exact=ExactGradients(every=2, bootstrap=False), delay=1)
    make_trainer(max_epochs=3, callbacks=[callback, watch]).fit(module, data)
    batches = [batch for _ in range(3) for batch in data]
    module.train()
    for distance, (name, learned) in zip((3, 2, 1), watch.learned.items()):
        last = len(batches) - 1 - distance * 2  # what is due before the last prediction
        expected_steps = [step for step in range(last + 1) if step % 2 == 0 or distance == 1]
        assert [step for step, _ in learned] == expected_steps
        for step, target in learned:
            x, y = batches[step]
            place = int(name.split(".")[1])
            h = module.net[:place](x).detach().requires_grad_()
            F.cross_entropy(module.net[place + 1 :](h), y).backward()
            torch.testing.assert_close(target, h.grad * len(x), rtol=1e-4, atol=1e-6)


def test_what_a_corrected_stage_applies_in_total_is_the_exact_gradient() -> None:
    """With a learning rate of nearly zero, SGD's weights move by the sum of all gradients applied."""
    pl.seed_everything(3, verbose=False)
    module, rate = Sgd(stages=3), 1e-5
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=rate)  # type: ignore[method-assign]
    module.double()
    before = state_of(module)
    data = [(x.double(), y) for x, y in loader(shuffle=False, batch_size=14)]
    callback = SyntheticGradients(exact=ExactGradients(every=1, correction=1.0), delay=1)
    trainer = make_trainer(max_epochs=2, precision="64-true", callbacks=[callback])
    trainer.fit(module, DataLoader(data, batch_size=None))
    still_due = {}
    for key, gradient in callback.session.exact.state_dict().items():
        name = key.split(":")[1]
        still_due[name] = still_due.get(name, 0.0) + gradient
    assert len(still_due) == 6  # two stages with a weight and two parameters of BatchNorm each
    reference = Sgd(stages=3).double()
    reference.load_state_dict(before)
    reference.train()
    for x, y in [*data, *data]:
        F.cross_entropy(reference(x), y).backward()
    for name, parameter in module.named_parameters():
        applied = (before[name] - parameter.detach()) / rate
        total = applied + still_due.get(name, 0.0)
        torch.testing.assert_close(total, reference.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
        if name in still_due:
            assert not torch.allclose(applied, total, rtol=1e-2, atol=1e-3)


def test_warm_up_is_backpropagation() -> None:
    (coupled,) = train(1, epochs=2, exact=ExactGradients(warm_up=10))
    (exact,) = train(1, epochs=2, predictor=TrueGradient())
    assert_same_state(coupled, exact, exact=True)


def test_predictors_learn_during_warm_up_from_exact_targets() -> None:
    module, watch = Sgd(stages=4), Watch()
    make_trainer(callbacks=[SyntheticGradients(exact=ExactGradients(warm_up=10)), watch]).fit(module, loader())
    assert all(len(learned) == 8 for learned in watch.learned.values())


def test_late_gradients_train_a_stage_whose_predictor_says_nothing() -> None:
    (late,) = train(1, predictor=DelayedGradient())
    (detached,) = train(1, predictor=ZeroPredictor())
    first = "net.0.0.weight"
    assert not torch.equal(late[first], detached[first])


def test_accumulated_batches_are_corrected_by_their_share() -> None:
    """A correction is of the batch's share of the step, as its gradient is."""
    seen: list[Tensor] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradient = pl_module.net[0][0].weight.grad
            seen.append(torch.zeros(()) if gradient is None else gradient.clone())

    def run(accumulate: int) -> Tensor:
        seen.clear()
        torch.manual_seed(0)
        module = Sgd(stages=2)
        data = loader(batch_size=35, shuffle=False)
        callback = SyntheticGradients(predictor=DelayedGradient(), delay=0)
        trainer = make_trainer(max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[callback, Look()])
        trainer.fit(module, data)
        return seen[-1]

    # The second of two batches applies the first one's gradient, with the first one's weights.
    torch.testing.assert_close(run(2) * 2, run(1))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("case", ["corrections", "delayed gradients", "exact targets on every third batch"])
def test_a_resumed_run_goes_on_exactly(case: str, devices: int, tmp_path: Path) -> None:
    """The checkpoint is taken while exact gradients are under way."""
    both = resumed_and_whole(lambda: Sgd(stages=4), lambda: SyntheticGradients(**CASES[case]), devices, tmp_path)
    for resumed, whole in both:
        assert_same_state(whole, resumed)


def test_a_checkpoint_in_the_middle_of_an_epoch_waits_for_what_is_under_way(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        module = Sgd(stages=4)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(
            strategy="synthetic_gradients",
            devices=4,
            enable_checkpointing=True,
            callbacks=[SyntheticGradients(exact=ExactGradients(every=1, correction=1.0)), saver],
        )
        trainer.fit(module, loader(), loader(shuffle=False))
        return state_of(module)

    (expected,) = train(1, epochs=2, exact=ExactGradients(every=1, correction=1.0))
    for state in run_ranks(4, work):
        assert_same_state(expected, state)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=False)["callbacks"]
    (held,) = (state["corrections"] for key, state in saved.items() if "SyntheticGradients" in key)
    assert held


def test_every_kind_of_layer_keeps_its_weights_for_the_late_backward_pass() -> None:
    """Two processes, so that graphs are kept over optimizer steps; big steps make stale weights visible."""

    class Fast(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    arguments: dict[str, Any] = {
        "exact": ExactGradients(every=1, correction=1.0),
        "delay": 0,
        "epochs": 1,
        "module": Fast,
    }
    (expected,) = train(1, **arguments)
    for state in train(4, **arguments):
        assert_same_state(expected, state)


def test_a_predictor_may_differ_from_boundary_to_boundary() -> None:
    predictors: dict[str, GradientPredictor | BoundaryRule] = {
        "net.1": DelayedGradient(),
        "net.3": LossModelPredictor(),
        "net.5": TrueGradient(),
    }
    (expected,) = train(1, predictor=predictors)
    for state in train(4, predictor=predictors):
        assert_same_state(expected, state)


def test_own_loss_heads_send_for_no_exact_gradient_and_learn_from_every_batch() -> None:
    class Count(Callback):
        exact = 0

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            callback = next(c for c in trainer.callbacks if isinstance(c, SyntheticGradients))
            self.exact += callback.session.batch.plan.exact

    for predictor, expected in (("auto", 0), (LossModelPredictor(objective="both"), 5)):
        count, watch = Count(), Watch()
        callback = SyntheticGradients(predictor=predictor, exact=ExactGradients(every=2))  # type: ignore[arg-type]
        make_trainer(callbacks=[callback, count, watch]).fit(Sgd(stages=3), loader())
        assert count.exact == expected
        assert len(watch.learned["net.1"]) == (8 if expected == 0 else 3)


@pytest.mark.parametrize("between", [True, False])
def test_between_exact_targets_a_head_learns_its_own_loss_or_nothing(between: bool) -> None:
    class Noting(LossModelPredictor):
        def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
            super().build(activations, context, loss)
            self.learned: list[bool] = []

        def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
            if torch.is_grad_enabled():
                self.learned.append(bool(targets))
            return super().loss(activations, context, targets)

    predictor = Noting(objective="both", matching=Matching(between=between))
    callback = SyntheticGradients(predictor=predictor, exact=ExactGradients(every=4), delay=0)
    make_trainer(callbacks=[callback]).fit(Sgd(stages=3), loader())
    learned = {name: trained.predictor.learned for name, trained in callback.trainers.items()}  # type: ignore[attr-defined]
    # Of ten batches the first, the fifth and the ninth are exact. Their gradients are here two batches later, the other
    # targets one batch later, and what is due after the last batch is not learned from.
    assert learned["net.3"] == [True] * 9  # the last boundary's targets always are exact
    assert learned["net.1"] == ([True, False, False, False] * 2 if between else [True, True])


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (ExactGradients, {"every": -1}, "every must be a whole number from 0 to .*, not -1"),
        (ExactGradients, {"warm_up": -1}, "warm_up must be a whole number from 0 to .*, not -1"),
        (ExactGradients, {"correction": -0.1}, "correction must be a finite number at least 0 .*, not -0.1"),
        (ExactGradients, {"correction": 1.0, "every": 0}, "every must be 1 or more"),
        (PredictorTraining, {"updates": 0}, "updates must be a whole number from 1 to .*, not 0"),
        (PredictorTraining, {"ema": 1.0}, "ema must be a finite number at least 0 and below 1"),
        (SyntheticGradients, {"predictor": "best"}, "predictor"),
    ],
)
def test_bad_settings_are_refused(options: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**arguments)


def test_the_choice_and_its_cost_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch"):
        make_trainer(callbacks=[SyntheticGradients()]).fit(Sgd(stages=3), loader())
    told = [record.message for record in caplog.records if record.message.startswith("Boundary ")]
    assert len(told) == 2
    assert "LossModelPredictor" in told[0]
    assert "% of the model's parameters and" in told[0]


MATCHED = "trained on its own loss and 0.5 × the target gradient"


@pytest.mark.parametrize(
    ("arguments", "matched"),
    [
        ({}, [False, True]),  # the targets of the last boundary always are exact
        ({"exact": ExactGradients(bootstrap=True)}, [True, True]),
        ({"exact": ExactGradients(correction=1.0)}, [True, True]),
        ({"late": LateGradients(0.2)}, [False, True]),  # they are applied, not matched
        ({"predictor": AutoPredictor(options={"objective": "both"})}, [True, True]),
        ({"predictor": AutoPredictor(options={"objective": "both"}), "exact": ExactGradients(every=0)}, [False, True]),
        ({"predictor": AutoPredictor(options={"objective": "loss"})}, [False, False]),
    ],
)
def test_what_is_announced_is_what_is_learned(
    arguments: dict[str, Any], matched: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch()
    callback = SyntheticGradients(**arguments)
    with caplog.at_level("INFO", "lightning.pytorch"):
        make_trainer(callbacks=[callback, watch]).fit(Sgd(stages=3), loader())
    told = {record.message.split("'")[1]: record.message for record in caplog.records if "Boundary '" in record.message}
    for name, expected in zip(("net.1", "net.3"), matched, strict=True):
        assert (MATCHED in told[name]) is expected
        assert ("local loss (LossModelPredictor): head" in told[name]) is not expected
        learned = any(record.learns_target and record.wants_target for record in watch.ledgers[name][1].seen)
        can = callback.trainers[name].predictor.target_use.learns_from_targets  # type: ignore[attr-defined]
        assert (learned and can) is expected


def test_corrections_need_to_know_the_stages() -> None:
    class Reads(Sgd):
        def forward(self, x: Tensor) -> Tensor:
            h = self.net[0](x)
            return self.net[1:](h if h.max() > -1e9 else -h)

    with pytest.raises(Exception, match="which stage a parameter belongs to"):
        make_trainer(callbacks=[SyntheticGradients(exact=ExactGradients(every=1, correction=1.0))]).fit(
            Reads(stages=3), loader()
        )


class Twice(Sgd):
    """Two tensors cross together, one of which is made from the other."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__(stages=1)
        self.first, self.middle = nn.Linear(12, 16), nn.Linear(16, 16)
        self.last, self.cuts = nn.Linear(16, 5), nn.ModuleList([Boundary(), Boundary()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h, skipped = self.cuts[0](h, h.tanh())
        h = (self.middle(h) + skipped).relu()
        return self.last(self.cuts[1](h))


def test_of_two_tensors_that_depend_on_each_other_each_has_its_own_exact_gradient() -> None:
    arguments: dict[str, Any] = {
        "module": Twice,
        "predictor": MLPPredictor(),
        "exact": ExactGradients(every=2, correction=1.0),
        "delay": 0,
    }
    (expected,) = train(1, **arguments)
    for devices in (2, 3):
        for state in train(devices, **arguments):
            assert_same_state(expected, state)


class Quantized(Sgd):
    """On some batches no gradient can leave the middle stage."""

    def __init__(self, stages: int = 3) -> None:
        super().__init__(stages=3)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[:3](x)
        self.seen += self.training
        return self.net[3:](h.detach() if self.seen % 2 else h)


def test_no_stage_waits_for_an_exact_gradient_that_cannot_come() -> None:
    for state in train(3, module=Quantized, predictor=MLPPredictor(), exact=ExactGradients(every=1)):
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_without_exact_gradients_predictors_learn_from_bootstrapped_targets() -> None:
    callback = SyntheticGradients(predictor=MLPPredictor(), exact=ExactGradients(every=0))
    watch = Watch()
    make_trainer(callbacks=[callback, watch]).fit(Sgd(stages=4), loader())
    assert all(len(learned) == 8 for learned in watch.learned.values())


def test_a_sequence_regression_learns_at_every_boundary() -> None:
    class Sequences(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), Boundary(), nn.Linear(8, 8), Boundary(), nn.Linear(8, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    x = torch.randn(64, 5, 3)
    watch = Watch()
    data = DataLoader(TensorDataset(x, x[..., :2].cumsum(1)), batch_size=8)
    make_trainer(callbacks=[SyntheticGradients(exact=ExactGradients(every=2)), watch]).fit(Sequences(), data)
    assert len(watch.learned["net.1"]) >= 5


def test_a_backward_of_the_users_that_cannot_keep_the_graph_is_refused() -> None:
    class Own(Sgd):
        def backward(self, loss: Tensor) -> None:  # type: ignore[override]
            loss.backward()

    def work() -> Any:
        trainer = make_trainer(
            strategy="synthetic_gradients",
            devices=2,
            callbacks=[SyntheticGradients(predictor=MLPPredictor(), exact=ExactGradients(every=1))],
        )
        trainer.fit(Own(stages=4), loader())

    failures = run_ranks(2, work, may_fail=True)
    assert any("does not take `retain_graph`" in failure.message for failure in failures)
