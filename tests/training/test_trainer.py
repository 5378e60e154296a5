"""The order in which a boundary's predictor learns, its checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sg import (
    GradientPredictor,
    HeadOptions,
    LinearPredictor,
    LossModelPredictor,
    MLPPredictor,
    PredictorTraining,
    SyntheticGradientsError,
)
from lightning_sg.predictors.base import Gradients, LossInfo, TargetUse
from lightning_sg.training import PredictorTrainer, Record, TrainerOptions
from lightning_sg.training.record import TargetPlan


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
    own = {name: arguments.pop(name) for name in ("delay", "seed", "matching") if name in arguments}
    options = TrainerOptions(**{"seed": 3, **own}, training=PredictorTraining(**{"optimizer": adam, **arguments}))
    return PredictorTrainer("cut", template or LinearPredictor(), options)


def take_in(trained: PredictorTrainer, activation: Tensor, context: Any = None, loss: LossInfo | None = None) -> Record:
    """The next batch reaches the boundary."""
    record = trained.open([activation], context, loss)
    trained.receive_due(record.step)
    trained.learn_due(record.step)
    trained.predict(record)
    return record


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
        record = take_in(trained, activation, labels, LossInfo("cross_entropy", 3))
        record.add_target([gradient])
        predictions.append(None if record.prediction is None else record.prediction[0])
    return predictions


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_prediction_has_learned_from_all_targets_but_those_of_the_delay(delay: int) -> None:
    trained = trainer(Memory(), delay=delay, bound=1e9, optimizer=sgd)
    for step in range(7):
        record = take_in(trained, torch.ones(2, 3))
        record.add_target([torch.full((2, 3), (step + 1.0) / 2)])
        due = max(0, step - delay)
        assert record.prediction is not None
        assert torch.equal(record.prediction[0], torch.full((2, 3), float(due)))
        assert trained.predictor.learned == [number + 1.0 for number in range(due)]


@pytest.mark.parametrize("train_every", [2, 3])
def test_only_every_nth_batch_wants_a_target_and_is_learned_from(train_every: int) -> None:
    trained = trainer(Memory(), delay=0, every=train_every, optimizer=sgd)
    wanted = []
    for step in range(8):
        record = take_in(trained, torch.ones(1, 3))
        record.add_target([torch.full((1, 3), float(step))])
        wanted.append(record.wants_target)
    due = [step for step in range(8) if step % train_every == 0]
    assert [step for step, wants in enumerate(wanted) if wants] == due
    trained.learn_due(7)
    assert trained.predictor.learned == [float(step) for step in due]


class MemoryWithALoss(Memory):
    """Learns without targets too, and notes those as zero."""

    target_use = TargetUse.OPTIONAL

    def loss(self, activations: Gradients, context: Any, targets: Gradients) -> Tensor:
        return super().loss(activations, context, targets or (torch.zeros_like(activations[0]),))


@pytest.mark.parametrize(
    ("use", "matching", "matched"),
    [
        (TargetUse.OPTIONAL, 3, [66, 69]),
        (TargetUse.OPTIONAL, 1, [64, 65, 66, 67, 68, 69, 70]),
        (TargetUse.REQUIRED, 3, [64, 65, 66, 67, 68, 69, 70]),
    ],
)
def test_a_predictor_with_a_loss_of_its_own_matches_at_times(use: TargetUse, matching: int, matched: list[int]) -> None:
    template = MemoryWithALoss() if use is TargetUse.OPTIONAL else Memory()
    trained = trainer(template, delay=0, matching=matching, optimizer=sgd)
    for step in range(72):
        record = take_in(trained, torch.ones(1, 3))
        record.add_target([torch.full((1, 3), step + 1.0)])
    assert [target - 1 for target in trained.predictor.learned[64:] if target] == matched
    assert 0 not in trained.predictor.learned[:64], "at the start it matches every target"
    assert len(trained.predictor.learned) == 71


@pytest.mark.parametrize(
    ("use", "matching", "asks"),
    [
        (TargetUse.OPTIONAL, 3, [66, 69, 72]),
        (TargetUse.BOUND, 4, [64, 68, 72]),
        (TargetUse.BOUND, 1, list(range(64, 74))),
        (TargetUse.REQUIRED, 3, list(range(64, 74))),
        (TargetUse.NONE, 3, []),
    ],
)
def test_later_it_is_bounded_and_judged_by_the_targets_of_some_batches(
    use: TargetUse, matching: int, asks: list[int]
) -> None:
    template = MemoryWithALoss()
    template.target_use = use
    trained = trainer(template, delay=0, matching=matching, optimizer=sgd)
    wanted = []
    for _step in range(74):
        record = take_in(trained, torch.ones(1, 3))
        record.add_target([torch.ones(1, 3)])
        wanted += [record.step] * record.wants_target
    assert [step for step in wanted if step >= 64] == asks
    assert len(trained.predictor.learned) == 73


def test_a_predictor_with_a_loss_of_its_own_matches_whatever_its_stage_waits_for() -> None:
    trained = trainer(MemoryWithALoss(), delay=0, matching=3, optimizer=sgd)
    trained.step = 100
    for step in range(5):
        record = trained.open([torch.ones(1, 3)], None, None, TargetPlan(coupled=True))
        trained.learn_due(record.step)
        trained.predict(record)
        record.add_target([torch.full((1, 3), step + 1.0)])
    assert trained.predictor.learned == [1.0, 2.0, 3.0, 4.0]


class Elsewhere:
    """Targets that another process would send, each once."""

    def __init__(self, note: Callable[[Record], None], gradient: Tensor | None = None) -> None:
        self.note = note
        self.gradient = torch.ones(1, 3) if gradient is None else gradient

    def target(self, record: Record) -> None:
        if record.targets is None:
            self.note(record)
            record.add_target([self.gradient])

    def exact(self, record: Record) -> None:
        raise AssertionError("no exact gradient was asked for")


def test_a_target_from_elsewhere_is_fetched_once_and_only_when_it_is_due() -> None:
    trained = trainer(Memory(), delay=1, optimizer=sgd)
    fetched: list[int] = []
    trained.targets = Elsewhere(lambda record: fetched.append(record.step))
    for expected in ([], [], [0], [0, 1]):
        take_in(trained, torch.ones(1, 3))
        assert fetched == expected
    trained.collect()
    assert fetched == [0, 1, 2, 3]
    assert len(trained.predictor.learned) == 2


def test_a_batch_without_a_backward_pass_teaches_nothing() -> None:
    trained = trainer(Memory(), delay=0, optimizer=sgd)
    take_in(trained, torch.ones(1, 3))
    trained.learn_due(0)
    assert trained.predictor.learned == []


def test_an_activation_is_remembered_as_it_was_taken_in_detached_and_in_float32() -> None:
    activation = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    record = trainer().open([activation], None, None)
    assert record.activations[0].dtype == torch.float32
    assert not record.activations[0].requires_grad


def test_building_draws_none_of_the_users_random_numbers_and_depends_on_seed_and_name_only() -> None:
    def weights(name: str = "cut", seed: int = 3, before: int = 0) -> Tensor:
        trained = PredictorTrainer(name, MLPPredictor(hidden=4), TrainerOptions(seed=seed))
        torch.manual_seed(before)
        outside = torch.get_rng_state()
        trained.open([torch.ones(2, 3)], None, None)
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


def test_metrics_are_those_of_the_last_batch_learned_from_and_are_taken_once() -> None:
    trained = trainer(delay=0)
    go(trained, range(5))
    expected = relative(trained, 3)
    metrics = trained.take_metrics()
    assert set(metrics) == {"loss", "cosine", "norm_ratio", "bias", "variance"}
    assert metrics["loss"].isfinite()
    assert metrics["cosine"] == pytest.approx(expected)
    assert trained.take_metrics() == {}


def relative(trained: PredictorTrainer, step: int) -> float:
    """The cosine of the prediction for ``step`` in a run of its own."""
    again = trainer(delay=trained.delay)
    prediction = go(again, range(step + 1))[-1]
    assert prediction is not None
    return torch.cosine_similarity(prediction.flatten(), batch(step)[2].flatten(), dim=0).item()


def test_an_overflowed_target_does_not_spoil_the_predictor() -> None:
    trained = trainer(delay=0)
    go(trained, range(3))
    record = take_in(trained, batch(3)[0], batch(3)[1], None)
    record.add_target([torch.full((8, 6), float("inf"))])
    trained.learn_due(3)
    assert all(parameter.isfinite().all() for parameter in trained.predictor.parameters())
    assert trained.scale.rms is not None
    assert trained.scale.rms.isfinite().all()


# ---------------------------------------------------------------------- checkpoints

TEMPLATES = {
    "linear": LinearPredictor(normalize="scale"),
    "loss model": LossModelPredictor(hidden=8, objective="both", head=HeadOptions(normalize="scale")),
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
    record = first.open([activation], labels, LossInfo("cross_entropy", 3))
    first.predict(record)
    first.targets = Elsewhere(lambda record: None, gradient)
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


def test_a_zero_target_does_not_stop_an_adaptive_optimizer_for_good() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 6)
    trainer = PredictorTrainer("b", LinearPredictor(normalize="scale"), TrainerOptions(0, PredictorTraining(adam)))
    for step in range(600):
        x = torch.randn(32, 6)
        record = take_in(trainer, x)
        sign = 1.0 if step < 50 else -1.0
        record.add_target([torch.zeros_like(x) if step == 20 else sign * x @ weight / 32])
    assert trainer.take_metrics()["cosine"] > 0.95


def test_loading_a_state_leaves_it_as_it_was() -> None:
    def train(trainer: PredictorTrainer, steps: int) -> None:
        for step in range(steps):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            record = take_in(trainer, x)
            record.add_target([x])

    def fresh() -> PredictorTrainer:
        return PredictorTrainer("b", LinearPredictor(), TrainerOptions(1, PredictorTraining(adam)))

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
