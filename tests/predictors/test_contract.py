"""What every gradient predictor promises, for every form of activation."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sg import (
    AutoPredictor,
    FeedbackAlignment,
    GradientPredictor,
    LinearPredictor,
    LocalLoss,
    LossModelPredictor,
    Matching,
    MLPPredictor,
    TargetUse,
)
from lightning_sg.predictors.base import LossInfo
from tests.predictors.forms import (
    ALONE,
    CLASSES,
    FORMS,
    Form,
    LinearTask,
    Task,
    built,
    forms,
    learning,
    predict,
    trained_a_little,
)


@forms
@learning
def test_an_untrained_predictor_predicts_zero_of_the_activations_shapes(
    make: Callable[[], GradientPredictor], form: Form
) -> None:
    activations, labels = Task(form).batch(0)
    predictor = built(make, activations, labels)
    prediction = predictor(activations, labels)
    assert [part.shape for part in prediction] == [part.shape for part in activations]
    assert all(torch.count_nonzero(part) == 0 for part in prediction)


@forms
@learning
def test_a_trained_predictor_predicts_finite_numbers_that_are_not_zero(
    make: Callable[[], GradientPredictor], form: Form
) -> None:
    predictor = trained_a_little(make, form)
    prediction = predict(predictor, *Task(form).batch(99))
    assert all(part.isfinite().all() and part.abs().sum() > 0 for part in prediction)


@forms
@pytest.mark.parametrize("make", ALONE.values(), ids=ALONE.keys())
def test_a_sample_is_predicted_alone_as_in_its_batch(make: Callable[[], GradientPredictor], form: Form) -> None:
    predictor = trained_a_little(make, form)
    activations, labels = Task(form).batch(99)
    prediction = predict(predictor, activations, labels)
    for few in (slice(2, 3), slice(2, 7)):
        alone = predict(predictor, form.take(activations, few), labels[few])
        torch.testing.assert_close(alone, form.take(prediction, few), rtol=1e-4, atol=1e-7)


# One of each kind.
KINDS: dict[str, Callable[[], GradientPredictor]] = {
    "linear": LinearPredictor,
    "MLP": functools.partial(MLPPredictor, hidden=16),
    "loss model, loss": functools.partial(LossModelPredictor, hidden=16),
    "loss model, gradient": functools.partial(LossModelPredictor, hidden=16, objective="gradient"),
    "loss model, both": functools.partial(LossModelPredictor, hidden=16, objective="both"),
    "loss model, both, nothing between": functools.partial(
        LossModelPredictor, hidden=16, objective="both", matching=Matching(between=False)
    ),
    "local loss": functools.partial(LocalLoss, hidden=16),
    "feedback alignment": FeedbackAlignment,
    "auto": AutoPredictor,
    "auto, of a state": lambda: AutoPredictor().of_state(),
}
USES = {
    "linear": TargetUse.REQUIRED,
    "MLP": TargetUse.REQUIRED,
    "loss model, loss": TargetUse.BOUND,
    "loss model, gradient": TargetUse.REQUIRED,
    "loss model, both": TargetUse.OPTIONAL,
    "loss model, both, nothing between": TargetUse.REQUIRED,
    "local loss": TargetUse.NONE,
    "feedback alignment": TargetUse.NONE,
    "auto, of a state": TargetUse.REQUIRED,
}

kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


@pytest.mark.parametrize(("kind", "use"), USES.items())
def test_each_kind_says_what_it_does_with_targets(kind: str, use: TargetUse) -> None:
    predictor = built(KINDS[kind], *Task(FORMS["vectors"]).batch(0))
    assert predictor.target_use is use


@forms
@kinds
def test_building_leaves_the_template_and_depends_on_the_seed_alone(
    make: Callable[[], GradientPredictor], form: Form
) -> None:
    template = make()
    activations, labels = Task(form).batch(0)
    one, other = (built(lambda: copy.deepcopy(template), activations, labels) for _ in range(2))
    assert not list(template.parameters())
    assert list(one.parameters())
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), other.parameters(), strict=True))


@forms
@kinds
def test_feedback_alignment_alone_does_not_start_at_zero(make: Callable[[], GradientPredictor], form: Form) -> None:
    activations, labels = Task(form).batch(0)
    predictor = built(make, activations, labels)
    prediction = predict(predictor, activations, labels)
    assert [part.shape for part in prediction] == [part.shape for part in activations]
    zero = all(torch.count_nonzero(part) == 0 for part in prediction)
    assert zero is not isinstance(predictor, FeedbackAlignment)


@forms
@kinds
def test_gradients_are_per_sample(make: Callable[[], GradientPredictor], form: Form) -> None:
    """A batch in which every sample is there twice has the gradients of the samples, not half of them."""
    predictor = trained_a_little(make, form)
    activations, labels = Task(form).batch(99)
    once = predict(predictor, activations, labels)
    twice = predict(predictor, form.twice(activations), torch.cat([labels, labels]))
    torch.testing.assert_close(twice, form.twice(once), rtol=1e-3, atol=1e-6)


@forms
@kinds
def test_a_predictor_is_saved_copied_and_pickled(make: Callable[[], GradientPredictor], form: Form) -> None:
    predictor = trained_a_little(make, form)
    activations, labels = Task(form).batch(99)
    loaded = built(make, *Task(form).batch(0), LossInfo("cross_entropy", CLASSES))
    loaded.load_state_dict(copy.deepcopy(predictor.state_dict()))
    loaded.target_rms = predictor.target_rms
    others = (loaded, copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor)))
    expected = predict(predictor, activations, labels)
    for other in others:
        assert other.target_use is predictor.target_use
        assert all(torch.equal(*parts) for parts in zip(predict(other, activations, labels), expected, strict=True))


@forms
@kinds
def test_the_loss_uses_targets_as_target_use_says(make: Callable[[], GradientPredictor], form: Form) -> None:
    predictor = trained_a_little(make, form)
    task = LinearTask(form)
    activations, labels = task.batch(99)
    targets = task.targets(activations, labels, with_labels=True)

    def loss(*given: Tensor) -> Tensor:
        """Of a copy, because a loss may update running statistics."""
        learner = copy.deepcopy(predictor)
        value = learner.loss(activations, labels, given)
        assert value.shape == ()
        assert value.isfinite()
        value.backward()
        assert any(parameter.grad is not None for parameter in learner.parameters())
        return value

    use = predictor.target_use
    changed = loss(*targets) != loss(*(-target for target in targets))
    assert bool(changed) is use.learns_from_targets
    if use.learns_without_targets:
        without = loss()
        assert use.learns_from_targets or without == loss(*targets)


@forms
@kinds
def test_exact_targets_are_wanted_only_by_what_learns_from_targets_and_before_build_as_after(
    make: Callable[[], GradientPredictor], form: Form
) -> None:
    activations, labels = Task(form).batch(0)
    shapes = [tuple(activation.shape) for activation in activations]
    predictor = built(make, activations, labels)
    wanted = make().wants_exact(shapes, labels)
    assert predictor.wants_exact(shapes, labels) is wanted
    assert predictor.target_use.learns_from_targets or not wanted


@forms
@kinds
def test_predicting_and_learning_leave_the_users_random_numbers_and_the_activations(
    make: Callable[[], GradientPredictor], form: Form
) -> None:
    task = LinearTask(form)
    activations, labels = task.batch(0)
    predictor = built(make, activations, labels)
    before, kept = torch.get_rng_state(), copy.deepcopy(activations)
    predict(predictor, activations, labels)
    predictor.loss(activations, labels, task.targets(activations, labels, with_labels=True)).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*parts) for parts in zip(activations, kept, strict=True))


@kinds
def test_the_default_optimizer_takes_the_trainable_parameters(make: Callable[[], GradientPredictor]) -> None:
    predictor = built(make, *Task(FORMS["vectors"]).batch(0))
    parameters = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    optimizer = predictor.default_optimizer(parameters)
    assert optimizer.param_groups[0]["params"] == parameters
