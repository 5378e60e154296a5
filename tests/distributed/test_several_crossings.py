"""Steps that run the network several times, or not at all, on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sg import (
    AlignmentGuard,
    DelayedGradient,
    ExactGradients,
    LinearPredictor,
    SyntheticGradients,
    SyntheticGradientStrategy,
    SyntheticInputs,
    TrueGradient,
)
from lightning_sg.errors import BoundaryError
from tests.distributed.test_data_parallel import alike, train
from tests.models import CLASSES, FEATURES, assert_same_state, loader, make_trainer, state_of
from tests.ranks import Failure, run_ranks
from tests.several_models import (
    Adversarial,
    AdversarialOfThree,
    EarlyReturn,
    Evaluated,
    Mixed,
    MixedOfThree,
    Sharp,
    Siamese,
    SiameseOfThree,
    Skipping,
    SkippingOfThree,
    Stages,
    ThreeStages,
)
from tests.smooth import Smooth

KINDS = [
    Siamese,
    SiameseOfThree,
    Mixed,
    MixedOfThree,
    Skipping,
    SkippingOfThree,
    EarlyReturn,
    Adversarial,
    AdversarialOfThree,
]


def fit(kind: type[pl.LightningModule], devices: int, callback: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """The state on each rank; in one process, the state. Without callback arguments, plain Lightning."""

    def work() -> Any:
        pl.seed_everything(3, verbose=False)
        module = kind()
        callbacks = [] if callback is None else [SyntheticGradients(**callback)]
        strategy: Any = SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto"
        trainer = make_trainer(callbacks=callbacks, strategy=strategy, devices=devices, **arguments)
        trainer.fit(module, loader(shuffle=False))
        return state_of(module)

    return run_ranks(devices, work, may_fail=True) if devices > 1 else work()


def stages_of(kind: type[pl.LightningModule]) -> int:
    return getattr(kind, "stages", 2)


def assert_alike(expected: dict[str, Tensor], found: list[Any]) -> None:
    assert not [each for each in found if isinstance(each, Failure) or each is None], found
    for state in found:
        assert_same_state(expected, state)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_true_gradient_it_is_plain_lightning(kind: type[pl.LightningModule]) -> None:
    assert_alike(fit(kind, 1), fit(kind, stages_of(kind), {"predictor": TrueGradient()}))


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_learn_as_in_one_process(kind: type[pl.LightningModule]) -> None:
    callback = {"predictor": LinearPredictor()}
    assert_alike(fit(kind, 1, callback), fit(kind, stages_of(kind), callback))


@pytest.mark.parametrize(
    "callback",
    [
        {},
        {"delay": 0},
        {"exact": ExactGradients(every=2, correction=0.5)},
        {"on_non_finite": "skip"},
        {"exact": ExactGradients(every=1, warm_up=3)},
        {"guard": AlignmentGuard(fallback="couple", patience=1)},
        {"predictor": DelayedGradient()},
    ],
    ids=["by default", "no delay", "exact gradients", "skipping", "a warm-up", "a guard that couples", "late"],
)
@pytest.mark.parametrize("kind", [SiameseOfThree, MixedOfThree, AdversarialOfThree])
def test_settings_go_with_several_crossings(kind: type[pl.LightningModule], callback: dict[str, Any]) -> None:
    assert_alike(fit(kind, 1, callback), fit(kind, 3, callback))


def test_exact_gradients_go_with_batches_without_the_network() -> None:
    callback = {"predictor": LinearPredictor(), "exact": ExactGradients(every=2, correction=0.5)}
    assert_alike(fit(SkippingOfThree, 1, callback), fit(SkippingOfThree, 3, callback))


def test_accumulated_gradients_and_stages_within_a_process() -> None:
    callback = {"predictor": LinearPredictor()}
    expected = fit(SiameseOfThree, 1, callback, accumulate_grad_batches=2)
    assert_alike(expected, fit(SiameseOfThree, 2, callback, accumulate_grad_batches=2))


class Views(Smooth):
    """Two views of each sample, whose losses are means over the samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y) + F.cross_entropy(self(0.5 * x), y)


def test_replicas_learn_from_every_crossing() -> None:
    expected = train(1, 2, make=Views)
    found = run_ranks(4, lambda: train(4, 2, make=Views))
    for state, _predictors, _metrics in found:
        alike(state, expected[0])


def test_state_under_way_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    def run(devices: int, epochs: int, checkpoint: str | None = None) -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = SiameseOfThree()
        strategy: Any = SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto"
        trainer = make_trainer(
            callbacks=[SyntheticGradients(predictor=LinearPredictor())],
            strategy=strategy,
            devices=devices,
            max_epochs=epochs,
        )
        trainer.fit(module, loader(shuffle=False), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return state_of(module)

    whole = run(1, 2)
    run_ranks(3, lambda: run(3, 1))
    saved = str(tmp_path / "last.ckpt")
    assert_alike(whole, run_ranks(2, lambda: run(2, 2, saved)))


def test_predicted_inputs_are_refused_by_name() -> None:
    callback = {"inputs": SyntheticInputs()}
    with pytest.raises(BoundaryError, match="crossed several times in one step, and SyntheticGradients"):
        fit(Siamese, 1, callback)
    for failure in fit(Siamese, 2, callback):
        assert "crossed several times in one step" in failure.message


class ByHand(Stages):
    """Goes backward twice from one crossing, and then runs the network again."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer: Any = self.optimizers()
        out = self(x)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(out, y), retain_graph=True)
        self.manual_backward(0.1 * out.square().mean())
        optimizer.step()
        optimizer.zero_grad()
        self.manual_backward(self.loss(x.flip(0), y.flip(0)))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_by_hand_every_backward_pass_is_answered() -> None:
    assert_alike(fit(ByHand, 1), fit(ByHand, 2, {"predictor": TrueGradient()}))
    callback = {"predictor": LinearPredictor()}
    assert_alike(fit(ByHand, 1, callback), fit(ByHand, 2, callback))


# Evaluation


class Never(Evaluated):
    times = staticmethod(lambda batch_idx: 0)


class Twice(Evaluated):
    times = staticmethod(lambda batch_idx: 2)


class FirstMore(Evaluated):
    times = staticmethod(lambda batch_idx: 3 if batch_idx == 0 else 1)


class LaterMore(Evaluated):
    times = staticmethod(lambda batch_idx: batch_idx)


class AtTheSanityCheck(Evaluated):
    """Has nothing to validate then."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.trainer.sanity_checking else super().validation_step(batch, batch_idx)


class Uncut(AtTheSanityCheck):
    """Has no boundary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES)
        )


def test_boundaries_are_chosen_by_the_first_step_that_runs_the_network() -> None:
    def work() -> None:
        strategy = SyntheticGradientStrategy(timeout=20.0)
        trainer = make_trainer(
            callbacks=[SyntheticGradients("auto")], strategy=strategy, devices=2, max_epochs=1, num_sanity_val_steps=2
        )
        trainer.fit(Uncut(), loader(shuffle=False), loader(shuffle=False))
        assert "val_total" in trainer.callback_metrics

    run_ranks(2, work)


def evaluate(kind: type[pl.LightningModule], devices: int) -> Any:
    def work() -> Any:
        pl.seed_everything(3, verbose=False)
        module = kind()
        strategy: Any = SyntheticGradientStrategy(timeout=20.0) if devices > 1 else "auto"
        trainer = make_trainer(callbacks=[SyntheticGradients()], strategy=strategy, devices=devices, max_epochs=1)
        data = loader(shuffle=False)
        before = trainer.validate(module, data, verbose=False)
        trainer.fit(module, data, data)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        tested = trainer.test(module, data, verbose=False)
        predicted = trainer.predict(module, data)
        return before, logged, tested, predicted

    return run_ranks(devices, work) if devices > 1 else work()


@pytest.mark.parametrize("kind", [Evaluated, Never, Twice, FirstMore, LaterMore, AtTheSanityCheck])
def test_evaluation_may_run_the_network_any_number_of_times(kind: type[pl.LightningModule]) -> None:
    before, logged, tested, predicted = evaluate(kind, 1)
    first, *others = evaluate(kind, 2)
    for ours, theirs in ((before, first[0]), (tested, first[2])):
        assert theirs[0] == pytest.approx(ours[0], abs=1e-5)
    for result in (first, *others):
        assert result[1] == pytest.approx(logged, abs=1e-5)
    torch.testing.assert_close(first[3], predicted, rtol=1e-4, atol=1e-5)


class OfThree(LaterMore):
    stages = 3


def test_evaluation_on_three_processes() -> None:
    before, logged, tested, predicted = evaluate(OfThree, 1)
    first, *others = evaluate(OfThree, 3)
    assert first[0][0] == pytest.approx(before[0], abs=1e-5)
    assert first[2][0] == pytest.approx(tested[0], abs=1e-5)
    for result in (first, *others):
        assert result[1] == pytest.approx(logged, abs=1e-5)
    torch.testing.assert_close(first[3], predicted, rtol=1e-4, atol=1e-5)


# What cannot work


class FedBack(Stages):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(F.pad(self(x), (0, x.shape[1] - 5))), y)


def test_an_output_does_not_go_back_through_the_stages() -> None:
    for failure in fit(FedBack, 2, {}):
        assert "comes to boundary 'net.0.2' again with what" in failure.message
        assert "go back through the stages" in failure.message


class UntilItIsGood(Stages):
    """Runs the network as often as its loss says."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = self.loss(x, y)
        if loss.item() > 1.0:
            loss = loss + self.loss(x.flip(0), y.flip(0))
        return loss


def test_a_number_of_crossings_that_goes_by_the_loss_is_refused() -> None:
    found = fit(UntilItIsGood, 2, {}, max_epochs=20)
    assert any("another number of times" in str(getattr(each, "message", "")) for each in found), found


def test_a_step_that_is_evaluated_again_for_one_batch_is_refused() -> None:
    for failure in fit(Sharp, 2, {}):
        assert "evaluated several times for training batch 0" in failure.message


class StopsInTheMiddle(ThreeStages):
    """Has batches whose loss needs two of the three stages."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss(x, y) if batch_idx < 2 else self.net[1][0](self.net[0](x)).square().mean()


def test_a_loss_in_the_middle_of_the_stages_is_refused() -> None:
    found = fit(StopsInTheMiddle, 3, {})
    assert any("was not reached" in str(getattr(each, "message", "")) for each in found), found
