"""Mixtures of synthetic and late true gradients: what is applied when, in one process as in several."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sg import (
    DelayedGradient,
    ExactGradients,
    LateGradients,
    LinearPredictor,
    LossModelPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradients,
    SyntheticGradientsError,
    TrueGradient,
    ZeroPredictor,
)
from lightning_sg.crossings.late import FallingRate, usual_share
from tests.models import Classifier, assert_same_state, loader, make_trainer, state_of
from tests.noted import Watch
from tests.ranks import run_ranks
from tests.resuming import resumed_and_whole


class Nadam(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.NAdam(self.parameters(), 0.01, betas=(0.95, 0.999), decoupled_weight_decay=True)


class Falling(Nadam):
    """With a rate that rises at first, and then falls at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3) * 0.8**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sgd(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ByHand(Nadam):
    """Manual optimization, with two backward passes in each step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(x), y))
        optimizer.step()


class Dropout(Nadam):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for place in (0, 2, 4, 6):
            self.net[place].append(torch.nn.Dropout(0.3))


def train(
    devices: int,
    *,
    stages: int = 4,
    epochs: int = 3,
    module: Any = Nadam,
    trainer: dict[str, Any] | None = None,
    **callback: Any,
) -> Any:
    """Trains, in ``devices`` processes, and returns the state of the module on each rank."""

    def work() -> Any:
        pl.seed_everything(7, verbose=False)
        model = module(stages=stages)
        arguments: dict[str, Any] = {"max_epochs": epochs, **(trainer or {})}
        make_trainer(
            strategy="synthetic_gradients" if devices > 1 else "auto",
            devices=devices,
            callbacks=[SyntheticGradients(**callback)],
            **arguments,
        ).fit(model, loader(), loader(shuffle=False))
        return state_of(model)

    return run_ranks(devices, work) if devices > 1 else [work()]


CASES: dict[str, dict[str, Any]] = {
    "half and half": {"late": LateGradients(0.2)},
    "no further delay": {"late": LateGradients(share=0.3), "delay": 0},
    "late gradients of every third batch": {"late": LateGradients(0.2, every=3), "delay": 2},
    "late gradients alone": {"late": LateGradients(share=1)},
    "late gradients alone, of every other batch": {"late": LateGradients(share=1, every=2)},
    "predictors that learn from exact gradients on batches between": {
        "late": LateGradients(0.2, every=2),
        "exact": ExactGradients(every=3),
        "predictor": LossModelPredictor(objective="both"),
    },
    "direct predictors": {"late": LateGradients(0.2), "predictor": MLPPredictor()},
    "no predictors": {"late": LateGradients(0.2), "predictor": ZeroPredictor()},
    "the usual share": {"late": LateGradients(), "module": Falling},
    "a share that stays": {"late": LateGradients(0.2, adapts=False), "module": Falling},
    "a share that adapts, of every other batch": {"late": LateGradients(0.2, every=2), "module": Falling},
    "after a warm-up": {"late": LateGradients(0.2), "exact": ExactGradients(warm_up=4)},
    "one rule for each boundary": {
        "late": LateGradients(0.2),
        "predictor": {"net.1": DelayedGradient(), "net.3": LossModelPredictor(), "net.5": TrueGradient()},
    },
    "accumulated batches": {"late": LateGradients(0.2), "trainer": {"accumulate_grad_batches": 2}},
    "clipped by value": {
        "late": LateGradients(0.2),
        "trainer": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    },
    "manual optimization": {"late": LateGradients(0.2), "module": ByHand},
    "recomputed": {"late": LateGradients(0.2, recompute=True)},
    "recomputed, every other batch": {"late": LateGradients(0.2, every=2, recompute=True), "delay": 0},
    "recomputed, late gradients alone": {"late": LateGradients(share=1, recompute=True), "delay": 0},
    "recomputed, predictors learn on others": {
        "late": LateGradients(0.2, every=2, recompute=True),
        "exact": ExactGradients(every=3),
        "predictor": LossModelPredictor(objective="both"),
    },
    "recomputed, accumulated": {
        "late": LateGradients(0.2, recompute=True),
        "trainer": {"accumulate_grad_batches": 2},
    },
    "recomputed, a falling rate": {"late": LateGradients(0.2, recompute=True), "module": Falling},
    "recomputed, with dropout": {"late": LateGradients(0.2, recompute=True), "module": Dropout},
}


@pytest.mark.parametrize("case", CASES)
def test_one_two_three_and_four_processes_end_with_the_same_weights(case: str) -> None:
    (expected,) = train(1, **CASES[case])
    for devices in (2, 3, 4):  # with two and three, there are boundaries within a process
        for state in train(devices, **CASES[case]):
            assert_same_state(expected, state)


@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_is_mixed_to_its_precision(recompute: bool) -> None:
    late = LateGradients(0.2, recompute=recompute)
    arguments: dict[str, Any] = {"late": late, "trainer": {"precision": "bf16-mixed"}}
    (expected,) = train(1, **arguments)
    for state in train(3, **arguments):
        for name, tensor in expected.items():
            torch.testing.assert_close(tensor, state[name], rtol=2e-2, atol=2e-2)


class Gradients(Callback):
    """Notes the gradients of one layer that the optimizer is given at each step."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.seen: list[Tensor | None] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradient = pl_module.get_parameter(self.layer).grad
        self.seen.append(None if gradient is None else gradient.clone())


#: Heads that learn their own loss alone, unbound: what they predict does not depend on which targets come.
OWN_LOSS: dict[str, Any] = {
    "predictor": LossModelPredictor(objective="loss"),
    "training": PredictorTraining(bound=1e9),
}
DIRECT = MLPPredictor(hidden=8)
LAYERS = {"net.0.0.weight": 3, "net.2.0.weight": 2, "net.4.0.weight": 1}


def gradients_of(
    layer: str, *, batches: int = 12, rates: list[float] | None = None, **callback: Any
) -> list[Tensor | None]:
    """The gradients of a layer in each step of a run whose weights stay as they are, or nearly, with small rates."""
    pl.seed_everything(7, verbose=False)
    module, noted = Sgd(stages=4), Gradients(layer)
    rates = rates or [0.0] * batches

    def configure() -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, batches - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module.configure_optimizers = configure  # type: ignore[method-assign]
    trainer = make_trainer(max_steps=batches, max_epochs=-1, callbacks=[SyntheticGradients(**callback), noted])
    trainer.fit(module, loader(shuffle=False))
    return noted.seen


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("share", "every", "delay"), [(0.5, 1, 0), (0.25, 1, 1), (0.5, 2, 0), (0.5, 3, 1)])
def test_a_step_applies_the_newest_synthetic_and_an_older_true_gradient(
    layer: str, share: float, every: int, delay: int
) -> None:
    late = LateGradients(share, every, adapts=False)
    mixed = gradients_of(layer, **OWN_LOSS, late=late, delay=delay)
    synthetic = gradients_of(layer, **OWN_LOSS, delay=delay)
    true = gradients_of(layer, predictor=TrueGradient())
    age = LAYERS[layer] * (1 + delay)
    arrived = 0
    for step, (found, newest) in enumerate(zip(mixed, synthetic, strict=True)):
        assert newest is not None
        expected, older = newest, step - age
        if older >= 0 and older % every == 0:  # else the synthetic gradient has its full weight
            expected = (1 - share) * newest + share * true[older]  # type: ignore[operator]
            arrived += 1
            assert not torch.allclose(newest, expected, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert arrived == len(range(0, 12 - age, every))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_share_is_larger_the_younger_a_gradient_and_the_lower_the_rate(layer: str) -> None:
    rates = [1e-12 * rate for rate in (1, 4, 4, 2, 1, 1, 2, 1, 0.5, 0.25, 0.04, 0)]
    grown = gradients_of(layer, **OWN_LOSS, late=LateGradients(0.25), delay=0, rates=rates)
    synthetic = gradients_of(layer, **OWN_LOSS, delay=0)
    true = gradients_of(layer, predictor=TrueGradient())
    age = LAYERS[layer]
    for step in range(age, 12):
        older = step - age  # its rate counts, wherever and whenever its gradient arrives
        left = 1 - 1 / (1 + 3 * (rates[older] / max(rates[: older + 1]) * age / 2) ** 2)
        expected = left * synthetic[step] + (1 - left) * true[older]  # type: ignore[operator]
        torch.testing.assert_close(grown[step], expected, rtol=1e-4, atol=1e-6)


def test_what_counts_is_the_highest_rate_of_all_groups() -> None:
    rate = FallingRate(kept=1)
    optimizers = [torch.optim.SGD([{"params": [torch.ones(1)], "lr": lr}]) for lr in (0.0, 0.4)]
    rate.begin(0, optimizers)
    optimizers[1].param_groups[0]["lr"] = torch.tensor(0.1)
    rate.begin(1, optimizers)
    assert [rate.at(number) for number in (0, 1, 2)] == [1, pytest.approx(0.25), 1]
    again = FallingRate(kept=1)
    again.load_state_dict(rate.state_dict())
    again.begin(2, optimizers)
    assert [again.at(number) for number in (0, 1, 2)] == [1, pytest.approx(0.25), pytest.approx(0.25)]
    again.load_state_dict({})  # of an earlier version
    assert again.at(2) == 1


def test_without_a_rate_the_share_stays() -> None:
    rate = FallingRate(kept=1)
    rate.begin(0, [])
    assert rate.at(0) == 1


def test_before_the_first_late_gradient_a_stage_without_a_predictor_stays() -> None:
    seen = gradients_of("net.0.0.weight", late=LateGradients(share=1), delay=0)
    assert [gradient is None or not gradient.any() for gradient in seen] == [True] * 3 + [False] * 9


def test_late_gradients_alone_are_delayed_gradients() -> None:
    (alone,) = train(1, late=LateGradients(share=1))
    (rule,) = train(1, predictor=DelayedGradient())
    assert_same_state(alone, rule, exact=True)


def test_what_nobody_predicts_is_late_alone() -> None:
    late = gradients_of(
        "net.4.0.weight", predictor=ZeroPredictor(), late=LateGradients(share=0.5, adapts=False), delay=0
    )
    true = gradients_of("net.4.0.weight", predictor=TrueGradient())
    for step in range(1, 12):
        torch.testing.assert_close(late[step], 0.5 * true[step - 1], rtol=1e-4, atol=1e-6)  # type: ignore[operator]


def test_the_last_stage_applies_its_whole_true_gradient() -> None:
    mixed = gradients_of("net.7.weight", **OWN_LOSS, late=LateGradients(0.2))
    true = gradients_of("net.7.weight", predictor=TrueGradient())
    for found, expected in zip(mixed, true, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_predictors_are_told_whole_targets() -> None:
    """What a stage applies is weighed; what it sends to the stage before is not."""

    def targets(**callback: Any) -> list[tuple[int, Tensor]]:
        pl.seed_everything(7, verbose=False)
        module, watch = Sgd(stages=3), Watch()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
        make_trainer(callbacks=[SyntheticGradients(predictor=DIRECT, delay=0, **callback), watch]).fit(
            module, loader(shuffle=False)
        )
        return watch.learned["net.1"]

    exact = targets(exact=ExactGradients(every=1))
    late = targets(late=LateGradients(0.2))
    assert [step for step, _ in late] == [step for step, _ in exact]
    for (_, found), (_, expected) in zip(late, exact):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_nothing_stays_on_the_parameters() -> None:
    class Look(Callback):
        hooks = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.hooks += sum(bool(parameter._backward_hooks) for parameter in pl_module.parameters())
            copy.deepcopy(pl_module.net[0])

    look = Look()
    make_trainer(callbacks=[SyntheticGradients(late=LateGradients(0.2)), look]).fit(Nadam(), loader())
    assert look.hooks == 0


def test_an_error_in_a_backward_pass_leaves_nothing_on_the_parameters() -> None:
    class Fails(Nadam):
        def on_after_backward(self) -> None:
            if self.global_step == 8:
                raise RuntimeError("on purpose")

    module = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(callbacks=[SyntheticGradients(late=LateGradients(0.2))]).fit(module, loader())
    assert not any(parameter._backward_hooks for parameter in module.parameters())


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(
    "late", [LateGradients(0.2), LateGradients(0.2, every=3), LateGradients(share=1), LateGradients(0.2, adapts=False)]
)
def test_a_resumed_run_goes_on_exactly(late: LateGradients, devices: int, tmp_path: Path) -> None:
    """The checkpoint is taken while late gradients are under way."""
    module = Falling if late == LateGradients(0.2) else Nadam
    both = resumed_and_whole(lambda: module(stages=4), lambda: SyntheticGradients(late=late), devices, tmp_path)
    for resumed, whole in both:
        assert_same_state(whole, resumed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"late": LateGradients(0.2), "exact": ExactGradients(correction=1.0)}, "does not go with ExactGradients"),
        ({"late": LateGradients(share=1), "predictor": LinearPredictor()}, "a predictor has nothing to do"),
    ],
)
def test_options_that_exclude_each_other_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticGradients(**arguments)


def test_stages_that_are_updated_at_random_times_are_refused() -> None:
    callback = SyntheticGradients(late=LateGradients(0.2), training=PredictorTraining(update_probability=0.5))
    with pytest.raises(SyntheticGradientsError, match="does not go with DelayedGradient and LateGradients"):
        make_trainer(callbacks=[callback]).fit(Nadam(), loader())


def test_late_gradients_need_to_know_the_stages() -> None:
    class Reads(Nadam):
        def forward(self, x: Tensor) -> Tensor:
            h = self.net[0](x)
            return self.net[1:](h if h.max() > -1e9 else -h)

    with pytest.raises(SyntheticGradientsError, match="Late gradients need to know which stage"):
        make_trainer(callbacks=[SyntheticGradients(late=LateGradients(0.2))]).fit(Reads(stages=3), loader())


def warned(optimizer: Any, **callback: Any) -> list[str]:
    class Model(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = optimizer(self.parameters(), lr=0.01)
            return made

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[SyntheticGradients(**callback)]).fit(Model(stages=2), loader())
    return [str(each.message) for each in caught if "Late gradients meet" in str(each.message)]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("callback", [{"late": LateGradients(0.2)}, {"predictor": DelayedGradient()}])
def test_adam_is_warned_of_once(optimizer: Any, callback: dict[str, Any]) -> None:
    (message,) = warned(optimizer, **callback)
    assert message.startswith(f"Late gradients meet {optimizer.__name__}, with which")
    assert "torch.optim.NAdam(parameters, lr, betas=(0.95, 0.999), decoupled_weight_decay=True)" in message


def test_other_optimizers_and_runs_without_late_gradients_are_not_warned_of() -> None:
    assert not warned(torch.optim.Adam)
    for optimizer in (torch.optim.NAdam, torch.optim.SGD):
        assert not warned(optimizer, late=LateGradients(0.2))
    assert not warned(torch.optim.AdamW, late=LateGradients(0.05))


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (torch.optim.NAdam, 0.2),
        (partial(torch.optim.SGD, momentum=0.9, nesterov=True), 0.2),
        (partial(torch.optim.SGD, momentum=0.9), 0.05),
        (torch.optim.SGD, 0.05),
        (torch.optim.AdamW, 0.05),
        (torch.optim.RMSprop, 0.05),
    ],
)
def test_the_usual_share_depends_on_whether_all_optimizers_look_ahead(make: Any, share: float) -> None:
    assert usual_share([make([torch.ones(1)], lr=0.1)]) == share
    ahead = torch.optim.NAdam([torch.ones(1)])
    assert usual_share([make([torch.ones(1)], lr=0.1), ahead]) == share


@pytest.mark.parametrize(("module", "share"), [(Nadam, 0.2), (Classifier, 0.05)])
def test_a_run_without_a_share_of_its_own_has_the_usual_one(
    module: Any, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    (named,) = train(1, module=module, late=LateGradients(share))
    caplog.clear()
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        (usual,) = train(1, module=module, late=LateGradients())
    assert_same_state(usual, named, exact=True)
    assert ("With Adam, late gradients have a weight of 0.05" in caplog.text) == (share == 0.05)
