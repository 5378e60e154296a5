"""Loss models: what they learn, and that their prediction is the gradient of their own loss."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sg import GradientPredictor, HeadOptions, LossModelPredictor, Matching, MLPPredictor
from lightning_sg.predictors.base import LossInfo
from tests.predictors.forms import CLASSES, FORMS, SAMPLES, ClassifierTask, Parts, Task, built, cosine, predict, train
from tests.predictors.loss_models import families, made, normal

ALIGNED: list[Any] = [
    # A form, an objective, an input scale, and the cosine to reach: measured, less about 0.1.
    ("vectors", "loss", "scale", 0.85),
    ("vectors", "loss", "layer", 0.5),
    ("vectors", "loss", "none", 0.85),
    ("vectors", "gradient", "scale", 0.85),
    ("vectors", "gradient", "layer", 0.5),
    ("vectors", "gradient", "none", 0.85),
    ("vectors", "both", "scale", 0.85),
    ("vectors", "both", "layer", 0.5),
    ("vectors", "both", "none", 0.85),
    ("sequences", "loss", "scale", 0.85),
    ("sequences with a label for each position", "loss", "scale", 0.85),
    ("feature maps", "loss", "scale", 0.55),
    ("numbers", "gradient", "scale", 0.9),
    ("two tensors", "loss", "scale", 0.85),
    ("two sequences", "loss", "scale", 0.85),
    ("an LSTM's output and state", "loss", "scale", 0.8),
]


@pytest.mark.parametrize(("form", "objective", "normalize", "bar"), ALIGNED)
def test_a_loss_model_comes_to_point_along_the_gradient_of_a_classifiers_loss(
    form: str, objective: Any, normalize: Any, bar: float
) -> None:
    task = ClassifierTask(FORMS[form])
    make = functools.partial(LossModelPredictor, hidden=32, objective=objective, head=HeadOptions(normalize=normalize))
    predictor = built(make, *task.batch(0), LossInfo("cross_entropy", CLASSES))

    def batch(number: int, samples: int = 32) -> tuple[Parts, Tensor, Parts]:
        activations, labels = task.batch(number, samples)
        return activations, labels, task.targets(activations, labels)

    activations, labels, targets = batch(10_000, 256)
    assert cosine(predict(predictor, activations, labels), targets) == 0.0
    train(predictor, 150, batch)
    assert cosine(predict(predictor, activations, labels), targets) > bar


CONTEXTS: dict[str, tuple[Callable[[], Tensor], LossInfo | None, str]] = {
    "labels": (lambda: torch.randint(CLASSES, (SAMPLES,)), LossInfo("cross_entropy", CLASSES), "cross_entropy"),
    "labels alone": (lambda: torch.arange(SAMPLES) % CLASSES, None, "cross_entropy"),
    "numbers": (lambda: torch.randn(SAMPLES), LossInfo("mse", 1), "mse"),
    "rows of numbers": (lambda: torch.randn(SAMPLES, 4), None, "mse"),
    "binary labels": (
        lambda: torch.randint(2, (SAMPLES, 4)),
        LossInfo("binary_cross_entropy", 4),
        "binary_cross_entropy",
    ),
    "probabilities of binary labels": (
        lambda: torch.rand(SAMPLES, 4),
        LossInfo("binary_cross_entropy", 4),
        "binary_cross_entropy",
    ),
}


@pytest.mark.parametrize("normalize", ["scale", "layer", "none"])
@pytest.mark.parametrize(("context", "loss", "kind"), CONTEXTS.values(), ids=CONTEXTS.keys())
def test_a_loss_models_prediction_is_the_gradient_of_its_own_loss(
    context: Callable[[], Tensor], loss: LossInfo | None, kind: str, normalize: Any
) -> None:
    torch.manual_seed(1)
    given = context()
    predictor = built(
        functools.partial(LossModelPredictor, hidden=16, head=HeadOptions(normalize=normalize)),
        (torch.randn(SAMPLES, 6),),
        given,
        loss,
    )
    torch.nn.init.normal_(predictor.head[-1].weight)
    assert predictor.kind == kind
    inputs = (torch.randn(SAMPLES, 6, requires_grad=True),)
    mean = predictor.loss(inputs, given, (torch.zeros(SAMPLES, 6),))
    (expected,) = torch.autograd.grad(mean * SAMPLES, inputs)
    (prediction,) = predict(predictor, inputs, given)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("kind", ["mse", "binary_cross_entropy"])
def test_a_loss_model_follows_the_loss_of_a_linear_layer(kind: str) -> None:
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    measure = F.mse_loss if kind == "mse" else F.binary_cross_entropy_with_logits

    def batch(number: int, samples: int = 32) -> tuple[Parts, Tensor, Parts]:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(samples, 6, generator=generator).requires_grad_()
        outputs = inputs @ weights
        goal = outputs.detach() + torch.randn(outputs.shape, generator=generator)
        if kind == "binary_cross_entropy":
            goal = torch.bernoulli(outputs.detach().sigmoid(), generator=generator).long()
        loss = measure(outputs, goal.float(), reduction="none").mean(-1).sum()
        return (inputs.detach(),), goal, torch.autograd.grad(loss, inputs)

    activations, goal, targets = batch(10_000, 256)
    make = functools.partial(LossModelPredictor, hidden=32, head=HeadOptions(normalize="scale"))
    predictor = built(make, activations, goal, LossInfo(kind, 4))
    train(predictor, 150, batch)
    assert cosine(predict(predictor, activations, goal), targets) > 0.8


def test_the_gradient_weight_weighs_the_gradients_error() -> None:
    activations, labels = Task(FORMS["vectors"]).batch(0)
    targets = (torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1)),)

    def loss(**arguments: Any) -> float:
        predictor = built(functools.partial(LossModelPredictor, **arguments), activations, labels)
        torch.nn.init.normal_(predictor.head[-1].weight, generator=torch.Generator().manual_seed(2))
        return predictor.loss(activations, labels, targets).item()

    own, gradient = loss(objective="loss"), loss(objective="gradient")
    assert loss(objective="both", matching=Matching(weight=0.25)) == pytest.approx(own + 0.25 * gradient)


def test_a_loss_model_averages_the_positions_of_a_sample() -> None:
    (sequence,), labels = Task(FORMS["sequences with a label for each position"]).batch(0)
    predictor = built(LossModelPredictor, (sequence,), labels)
    torch.nn.init.normal_(predictor.head[-1].weight)
    (once,) = predict(predictor, (sequence,), labels)
    (twice,) = predict(predictor, (sequence.repeat(1, 2, 1),), labels.repeat(1, 2))
    torch.testing.assert_close(2 * twice, once.repeat(1, 2, 1))


@pytest.mark.parametrize("ignored", [-100, 2])
def test_a_loss_model_has_no_gradient_for_the_label_that_the_models_loss_ignores(ignored: int) -> None:
    activations, labels = Task(FORMS["vectors"]).batch(0)
    labels[:4] = ignored
    predictor = built(LossModelPredictor, activations, labels, LossInfo("cross_entropy", CLASSES, ignored))
    torch.nn.init.normal_(predictor.head[-1].weight)
    (prediction,) = predict(predictor, activations, labels)
    assert torch.equal(prediction.abs().sum(1) == 0, labels == ignored)


@pytest.mark.parametrize("context", [None, ("a", "b"), 3])
def test_a_loss_model_says_that_it_needs_labels(context: Any) -> None:
    kind = type(context).__name__
    with pytest.raises(ValueError, match=f"needs the labels .* got {kind}.*context=.*MLPPredictor"):
        LossModelPredictor().build((torch.randn(4, 6),), context, None)


@pytest.mark.parametrize("kind", [MLPPredictor, LossModelPredictor])
@pytest.mark.parametrize("arguments", [{"hidden": 0}, {"layers": -1}])
def test_sizes_out_of_range_are_refused(kind: type[GradientPredictor], arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\((hidden|layers)=.* must be a whole number from (1|0) to"):
        kind(**arguments)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="objective must be 'loss', 'gradient' or 'both', not 'value'"):
        LossModelPredictor(objective="value")  # type: ignore[arg-type]


@families
@pytest.mark.parametrize("objective", ["loss", "both"])
def test_every_family_starts_at_zero_learns_and_has_the_right_shapes(
    shapes: Any, context: Any, loss: Any, options: dict[str, Any], objective: str
) -> None:
    activations = tuple(normal(*shape) for shape in shapes)
    predictor = made(activations, context, loss, awake=False, objective=objective, **options)
    prediction = predictor(activations, context)
    assert [part.shape for part in prediction] == [part.shape for part in activations]
    assert all(torch.count_nonzero(part) == 0 for part in prediction)
    targets = tuple(0.01 * normal(*shape, seed=2) for shape in shapes)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        value = predictor.loss(activations, context, targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    if objective == "loss":
        assert losses[-1] < losses[0]
    assert all(part.isfinite().all() and part.abs().sum() > 0 for part in predictor(activations, context))


@families
def test_gradients_are_per_sample_and_survive_saving(
    shapes: Any, context: Any, loss: Any, options: dict[str, Any]
) -> None:
    activations = tuple(normal(*shape) for shape in shapes)
    predictor = made(activations, context, loss, **options)
    once = predictor(activations, context)
    double = tuple(torch.cat([part, part]) for part in activations)
    both = (
        {name: torch.cat([part, part]) for name, part in context.items()}
        if isinstance(context, dict)
        else torch.cat([context, context])
    )
    for part, twice in zip(once, predictor(double, both)):
        torch.testing.assert_close(twice, torch.cat([part, part]), rtol=1e-3, atol=1e-5)
    other = made(activations, context, loss, **options)
    other.load_state_dict(predictor.state_dict())
    for same in (other, copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert all(torch.equal(a, b) for a, b in zip(same(activations, context), once))
