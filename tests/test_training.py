"""The bound on predictions, and the order in which a boundary's predictor learns."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import GradientPredictor, LinearPredictor, LossModelPredictor, MLPPredictor, SyntheticGradientsError
from lightning_sg.predictors.base import Gradients, LossInfo
from lightning_sg.training import PredictorTrainer, Record, TargetScale, compare

CPU = torch.device("cpu")


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


# ---------------------------------------------------------------------- the bound


@pytest.mark.parametrize("bound", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", [1e-3, 0.2, 5.0, 1e4])
def test_a_prediction_is_at_most_bound_times_the_targets_in_size(bound: float, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = TargetScale(bound)
    targets = torch.randn(16, 6, generator=generator), 0.01 * torch.randn(16, 3, generator=generator)
    scale.update(targets)
    predictions = tuple(size * torch.randn(target.shape, generator=generator) for target in targets)
    for limited, prediction, target in zip(scale.limit(predictions), predictions, targets):
        assert rms(limited) == pytest.approx(min(rms(prediction), bound * rms(target)), rel=1e-5)
        assert compare((limited,), (prediction,))["cosine"] == pytest.approx(1.0)


def test_before_the_first_target_the_bound_is_zero() -> None:
    (limited,) = TargetScale().limit((torch.ones(3, 2),))
    assert torch.equal(limited, torch.zeros(3, 2))
    assert TargetScale().rms is None


def test_the_size_of_targets_is_an_average_over_squares_that_weights_recent_ones() -> None:
    scale = TargetScale(decay=0.9)
    for value in (1.0, 2.0, 4.0):
        scale.update((torch.full((5,), value),))
    expected = ((0.81 * 1 + 0.9 * 4 + 16) / (0.81 + 0.9 + 1)) ** 0.5
    torch.testing.assert_close(scale.rms, torch.tensor([expected]))


def test_the_bound_recovers_from_zero_targets() -> None:
    scale = TargetScale()
    scale.update((torch.zeros(4),))
    (limited,) = scale.limit((torch.ones(4),))
    assert torch.equal(limited, torch.zeros(4))
    for _ in range(60):
        scale.update((torch.full((4,), 2.0),))
    (limited,) = scale.limit((torch.full((4,), 100.0),))
    torch.testing.assert_close(limited, torch.full((4,), 2.0), rtol=0.01, atol=0)


def test_a_zero_prediction_stays_zero() -> None:
    scale = TargetScale()
    scale.update((torch.ones(4),))
    assert torch.equal(scale.limit((torch.zeros(4),))[0], torch.zeros(4))


@pytest.mark.parametrize("targets", [0, 3])
def test_the_bound_survives_saving(targets: int) -> None:
    scale, restored = TargetScale(), TargetScale()
    for value in range(targets):
        scale.update((torch.full((4,), value + 1.0), torch.full((2,), value + 5.0)))
    restored.load_state_dict(scale.state_dict(), CPU)
    for each in (scale, restored):
        each.update((torch.ones(4), torch.ones(2)))
    assert torch.equal(restored.rms, scale.rms)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the order


class Memory(GradientPredictor):
    """Counts the targets it has learned from, in its one parameter, and predicts that number."""

    def build(self, activations: Gradients, context: Any, loss: LossInfo | None) -> None:
        self.count = nn.Parameter(torch.zeros(()))
        self.learned: list[float] = []

    def forward(self, activations: Gradients, context: Any) -> Gradients:
        return tuple(torch.zeros_like(part) + self.count.detach() for part in activations)

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        self.learned.append(targets[0].flatten()[0].item())
        return -self.count


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def trainer(template: GradientPredictor | None = None, **arguments: Any) -> PredictorTrainer:
    defaults: dict[str, Any] = {"delay": 1, "train_every": 1, "bound": 1.0, "seed": 3, "make_optimizer": adam}
    return PredictorTrainer("cut", template or LinearPredictor(), **{**defaults, **arguments})


def batch(step: int, samples: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """An activation, labels and the gradient of a mean loss."""
    generator = torch.Generator().manual_seed(step)
    activation = torch.randn(samples, 6, generator=generator)
    labels = torch.randint(3, (samples,), generator=generator)
    return activation, labels, torch.randn(samples, 6, generator=generator) / samples


def go(trained: PredictorTrainer, steps: range, samples: int = 8) -> list[Tensor | None]:
    """Runs steps in one process: the target is there right after the prediction."""
    predictions: list[Tensor | None] = []
    for step in steps:
        activation, labels, gradient = batch(step, samples)
        record = trained.prepare([activation], labels, LossInfo("cross_entropy", 3))
        trained.predict(record)
        record.add_target([gradient])
        predictions.append(None if record.prediction is None else record.prediction[0])
    return predictions


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_prediction_has_learned_from_all_targets_but_those_of_the_delay(delay: int) -> None:
    trained = trainer(Memory(), delay=delay, bound=1e9, make_optimizer=sgd)
    for step in range(7):
        record = trained.prepare([torch.ones(2, 3)], None, None)
        trained.predict(record)
        record.add_target([torch.full((2, 3), (step + 1.0) / 2)])
        due = max(0, step - delay)
        assert record.prediction is not None
        assert torch.equal(record.prediction[0], torch.full((2, 3), float(due)))
        assert trained.predictor.learned == [number + 1.0 for number in range(due)]


@pytest.mark.parametrize("train_every", [2, 3])
def test_only_every_nth_batch_wants_a_target_and_is_learned_from(train_every: int) -> None:
    trained = trainer(Memory(), delay=0, train_every=train_every, make_optimizer=sgd)
    wanted = []
    for step in range(8):
        record = trained.prepare([torch.ones(1, 3)], None, None)
        trained.predict(record)
        record.add_target([torch.full((1, 3), float(step))])
        wanted.append(record.wants_target)
    due = [step for step in range(8) if step % train_every == 0]
    assert [step for step, wants in enumerate(wanted) if wants] == due
    trained.settle(7)
    assert trained.predictor.learned == [float(step) for step in due]


def test_a_target_from_elsewhere_is_fetched_once_and_only_when_it_is_due() -> None:
    trained = trainer(Memory(), delay=1, make_optimizer=sgd)
    fetched: list[int] = []

    def fetch(step: int) -> Gradients:
        fetched.append(step)
        return (torch.ones(1, 3),)

    for step, expected in enumerate([[], [], [0], [0, 1]]):
        record = trained.prepare([torch.ones(1, 3)], None, None)
        record.fetch = lambda step=step: fetch(step)
        trained.predict(record)
        assert fetched == expected
    trained.collect()
    assert fetched == [0, 1, 2, 3]
    assert len(trained.predictor.learned) == 2


def test_a_batch_without_a_backward_pass_teaches_nothing() -> None:
    trained = trainer(Memory(), delay=0, make_optimizer=sgd)
    trained.predict(trained.prepare([torch.ones(1, 3)], None, None))
    trained.settle(0)
    assert trained.predictor.learned == []


def test_targets_of_several_backward_passes_add_up() -> None:
    record = Record(0, (torch.ones(4, 2),), None, wants_target=True)
    record.add_target([torch.full((4, 2), 0.25)])
    record.add_target([None])
    record.add_target([torch.full((4, 2), 0.5)])
    assert record.targets is not None
    assert torch.equal(record.targets[0], torch.full((4, 2), 3.0))


def test_a_smaller_last_batch_has_targets_of_the_same_size_for_each_sample() -> None:
    target_of_each_sample = torch.tensor([1.0, -2.0])
    for samples in (8, 3):
        record = Record(0, (torch.ones(samples, 2),), None, wants_target=True)
        record.add_target([target_of_each_sample.expand(samples, 2) / samples])
        assert record.targets is not None
        torch.testing.assert_close(record.targets[0], target_of_each_sample.expand(samples, 2))


def test_an_activation_is_remembered_as_it_was_taken_in_detached_and_in_float32() -> None:
    activation = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    record = trainer().prepare([activation], None, None)
    assert record.activations[0].dtype == torch.float32
    assert not record.activations[0].requires_grad


def test_building_draws_none_of_the_users_random_numbers_and_depends_on_seed_and_name_only() -> None:
    def weights(name: str = "cut", seed: int = 3, before: int = 0) -> Tensor:
        trained = PredictorTrainer(name, MLPPredictor(hidden=4), adam, delay=1, train_every=1, bound=1.0, seed=seed)
        torch.manual_seed(before)
        outside = torch.get_rng_state()
        trained.prepare([torch.ones(2, 3)], None, None)
        assert torch.equal(torch.get_rng_state(), outside)
        return trained.predictor.net[0].weight.detach()

    assert torch.equal(weights(before=0), weights(before=1))
    assert not torch.equal(weights(), weights(seed=4))
    assert not torch.equal(weights(), weights(name="other"))


def test_the_template_is_not_touched() -> None:
    template = LinearPredictor()
    go(trainer(template), range(4))
    assert list(template.parameters()) == []
    assert template.target_rms is None


def test_figures_are_those_of_the_last_batch_learned_from_and_are_taken_once() -> None:
    trained = trainer(delay=0)
    go(trained, range(5))
    expected = relative(trained, 3)
    figures = trained.take_figures()
    assert set(figures) == {"loss", "cosine", "norm_ratio", "bias", "variance"}
    assert figures["loss"].isfinite()
    assert figures["cosine"] == pytest.approx(expected)
    assert trained.take_figures() == {}


def relative(trained: PredictorTrainer, step: int) -> float:
    """The cosine of the prediction for ``step`` in a run of its own."""
    again = trainer(delay=trained.delay)
    prediction = go(again, range(step + 1))[-1]
    assert prediction is not None
    return torch.cosine_similarity(prediction.flatten(), batch(step)[2].flatten(), dim=0).item()


def test_an_overflowed_target_does_not_spoil_the_predictor() -> None:
    trained = trainer(delay=0)
    go(trained, range(3))
    record = trained.prepare([batch(3)[0]], batch(3)[1], None)
    trained.predict(record)
    record.add_target([torch.full((8, 6), float("inf"))])
    trained.settle(3)
    assert all(parameter.isfinite().all() for parameter in trained.predictor.parameters())
    assert trained.scale.rms is not None
    assert trained.scale.rms.isfinite().all()


# ---------------------------------------------------------------------- checkpoints

TEMPLATES = {
    "linear": LinearPredictor(normalize="scale"),
    "loss model": LossModelPredictor(hidden=8, objective="both", normalize="scale"),
}


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_restored_trainer_goes_on_bit_for_bit(template: GradientPredictor, delay: int) -> None:
    whole = trainer(template, delay=delay)
    expected = go(whole, range(20))[11:]
    first, second = trainer(template, delay=delay), trainer(template, delay=delay, seed=99)
    go(first, range(11))
    state = saved_and_loaded(first.state_dict())
    assert len(state["pending"]) == delay + 1
    second.load_state_dict(state)
    for left, right in zip(go(second, range(11, 20)), expected, strict=True):
        assert left is not None
        assert right is not None
        assert torch.equal(left, right)
        assert left.abs().sum() > 0
    assert second.step == whole.step == 20


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_saving_waits_for_targets_under_way_and_keeps_them() -> None:
    first, second = trainer(delay=1), trainer(delay=1)
    go(first, range(3))
    activation, labels, gradient = batch(3)
    record = first.prepare([activation], labels, LossInfo("cross_entropy", 3))
    record.fetch = lambda: (gradient,)
    first.predict(record)
    state = first.state_dict()
    torch.testing.assert_close(state["pending"][-1]["targets"][0], gradient * 8)
    second.load_state_dict(saved_and_loaded(state))
    expected = go(first, range(4, 8))
    assert all(torch.equal(left, right) for left, right in zip(go(second, range(4, 8)), expected))  # type: ignore[arg-type]


def test_a_saved_state_does_not_change_when_the_training_goes_on() -> None:
    trained = trainer()
    go(trained, range(5))
    state = trained.state_dict()
    before = copy.deepcopy(state)
    go(trained, range(5, 10))
    for tensor in trained.predictor.parameters():
        tensor.data.fill_(7.0)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_a_state_saved_before_the_first_batch_starts_afresh_at_its_step() -> None:
    unbuilt = trainer()
    restored = trainer()
    restored.load_state_dict(saved_and_loaded(unbuilt.state_dict()))
    expected = go(trainer(), range(5))
    assert all(torch.equal(left, right) for left, right in zip(go(restored, range(5)), expected))  # type: ignore[arg-type]


def test_a_restored_state_that_no_batch_has_built_yet_is_saved_as_it_came() -> None:
    first, second, third = trainer(), trainer(), trainer()
    go(first, range(6))
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    third.load_state_dict(saved_and_loaded(second.state_dict()))
    expected = go(first, range(6, 10))
    assert all(torch.equal(left, right) for left, right in zip(go(third, range(6, 10)), expected))  # type: ignore[arg-type]


def test_a_state_of_another_predictor_is_refused_by_name() -> None:
    first, second = trainer(), trainer(MLPPredictor(hidden=4))
    go(first, range(2))
    second.load_state_dict(first.state_dict())
    with pytest.raises(SyntheticGradientsError, match=r"boundary 'cut' does not fit .*MLPPredictor"):
        go(second, range(2, 3))


# ---------------------------------------------------------------------- figures


def test_compare_measures_direction_and_size_over_all_tensors_together() -> None:
    prediction = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    targets = torch.tensor([[0.0, 0.0]]), torch.tensor([10.0])
    figures = compare(prediction, targets)
    assert figures["cosine"] == pytest.approx(4 / 5)
    assert figures["norm_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_compare_of_multiples(factor: float) -> None:
    targets = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),)
    figures = compare((factor * targets[0],), targets)
    assert figures["cosine"] == pytest.approx(1.0 if factor > 0 else -1.0)
    assert figures["norm_ratio"] == pytest.approx(abs(factor))


def test_compare_with_a_zero_prediction_is_zero() -> None:
    expected = {"cosine": 0.0, "norm_ratio": 0.0, "bias": 1.0, "variance": 0.0}
    assert compare((torch.zeros(3),), (torch.ones(3),)) == expected
    assert compare((torch.ones(3),), (torch.zeros(3),))["cosine"] == 0.0


def test_bias_and_variance_share_the_relative_squared_error() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(500, 4, generator=generator)
    noise = torch.randn(500, 4, generator=generator)
    noise = noise - noise.mean(0)
    relative = noise.square().sum() / target.square().sum()
    noisy = compare((target + noise,), (target,))
    assert noisy["bias"].item() == pytest.approx(0.0, abs=1e-5)
    assert noisy["variance"].item() == pytest.approx(relative.item(), rel=1e-4)
    biased = compare((target + 0.5,), (target,))
    assert biased["variance"].item() == pytest.approx(0.0, abs=1e-5)
    assert biased["bias"].item() == pytest.approx((4 * 0.25 * 500 / target.square().sum()).item(), rel=1e-4)


def test_a_zero_target_does_not_stop_an_adaptive_optimizer_for_good() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 6)
    trainer = PredictorTrainer(
        "b",
        LinearPredictor(normalize="scale"),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        delay=0,
        train_every=1,
        bound=1.0,
        seed=0,
    )
    for step in range(600):
        x = torch.randn(32, 6)
        record = trainer.prepare([x], None, None)
        trainer.predict(record)
        sign = 1.0 if step < 50 else -1.0
        record.add_target([torch.zeros_like(x) if step == 20 else sign * x @ weight / 32])
    assert trainer.take_figures()["cosine"] > 0.95


def test_loading_a_state_leaves_it_as_it_was() -> None:
    def train(trainer: PredictorTrainer, steps: int) -> None:
        for step in range(steps):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            record = trainer.prepare([x], None, None)
            trainer.predict(record)
            record.add_target([x])

    def fresh() -> PredictorTrainer:
        return PredictorTrainer(
            "b",
            LinearPredictor(),
            lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
            delay=1,
            train_every=1,
            bound=1.0,
            seed=0,
        )

    first = fresh()
    train(first, 5)
    state = first.state_dict()
    results = []
    for _ in range(2):
        again = fresh()
        again.load_state_dict(state)
        train(again, 5)
        results.append(again.predictor.state_dict()["net.0.weight"])
    assert torch.equal(*results)
